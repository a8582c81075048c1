// Projections of kind sjlt: bfloat16 G.
#include "sjlt.cuh"

namespace fastproj::cuda {

const void* sjlt_bf16_kernel(const SjltKey& key) {
    FASTPROJ_SJLT(FASTPROJ_CASE_SJLT, Dtype::kBf16)
    return nullptr;
}

}  // namespace fastproj::cuda
