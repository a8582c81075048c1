// Projections of kind sjlt: float64 G.
#include "sjlt.cuh"

namespace fastproj::cuda {

const void* sjlt_f64_kernel(const SjltKey& key) {
#define FASTPROJ_CASE(dtype, groups, batch, staged)                                               \
    if (key == SjltKey{dtype, groups, batch, staged}) {                                           \
        return reinterpret_cast<const void*>(&project_sjlt_kernel<dtype, groups, batch, staged>); \
    }
    FASTPROJ_SJLT_F64(FASTPROJ_CASE, Dtype::kF64)
#undef FASTPROJ_CASE
    return nullptr;
}

}  // namespace fastproj::cuda
