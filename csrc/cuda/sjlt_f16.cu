// Projections of kind sjlt: float16 G.
#include "sjlt.cuh"

namespace fastproj::cuda {

const void* sjlt_f16_kernel(const SjltKey& key) {
    FASTPROJ_SJLT(FASTPROJ_CASE_SJLT, Dtype::kF16)
    return nullptr;
}

}  // namespace fastproj::cuda
