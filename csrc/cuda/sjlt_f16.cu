// Projections of kind sjlt: float16 G.
#include "sjlt.cuh"

namespace fastproj::cuda {

const void* sjlt_f16_kernel(const SjltKey& key) {
#define FASTPROJ_CASE(dtype, groups, batch, staged)                                               \
    if (key == SjltKey{dtype, groups, batch, staged}) {                                           \
        return reinterpret_cast<const void*>(&project_sjlt_kernel<dtype, groups, batch, staged>); \
    }
    FASTPROJ_SJLT(FASTPROJ_CASE, Dtype::kF16)
#undef FASTPROJ_CASE
    return nullptr;
}

}  // namespace fastproj::cuda
