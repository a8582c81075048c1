// Gaussian projection for sm_80 and later: 16-bit G.
#include "kernels.hpp"
#include "project_sm80.cuh"

namespace fastproj::cuda {

Kernel find_sm80_gaussian(const KernelKey& key) {
    FASTPROJ_SM80_GAUSSIAN(FASTPROJ_GAUSSIAN80)
    return Kernel{};
}

}  // namespace fastproj::cuda
