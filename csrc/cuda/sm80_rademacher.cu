// Rademacher projection for sm_80 and later: 16-bit G.
#include "kernels.hpp"
#include "project_sm80.cuh"

namespace fastproj::cuda {

Kernel find_sm80_rademacher(const KernelKey& key) {
    FASTPROJ_SM80_RADEMACHER(FASTPROJ_RADEMACHER80)
    return Kernel{};
}

}  // namespace fastproj::cuda
