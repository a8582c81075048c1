// Projections of kind sjlt: float64 G.
#include "sjlt.cuh"

namespace fastproj::cuda {

const void* sjlt_f64_kernel(const SjltKey& key) {
    FASTPROJ_SJLT_F64(FASTPROJ_CASE_SJLT, Dtype::kF64)
    return nullptr;
}

}  // namespace fastproj::cuda
