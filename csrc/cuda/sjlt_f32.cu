// Projections of kind sjlt: float32 G.
#include "sjlt.cuh"

namespace fastproj::cuda {

const void* sjlt_f32_kernel(const SjltKey& key) {
    FASTPROJ_SJLT(FASTPROJ_CASE_SJLT, Dtype::kF32)
    return nullptr;
}

}  // namespace fastproj::cuda
