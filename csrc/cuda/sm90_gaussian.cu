// Gaussian projection for sm_90a: 16-bit G.
#include "kernels.hpp"
#include "project_sm90.cuh"

namespace fastproj::cuda {

Kernel find_sm90_gaussian(const KernelKey& key) {
    FASTPROJ_SM90_GAUSSIAN(FASTPROJ_GAUSSIAN90)
    return Kernel{};
}

}  // namespace fastproj::cuda
