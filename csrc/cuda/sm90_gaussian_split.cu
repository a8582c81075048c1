// Gaussian projection for sm_90a: fp32 G in two and three bf16 terms.
#include "kernels.hpp"
#include "project_sm90.cuh"

namespace fastproj::cuda {

Kernel find_sm90_gaussian_split(const KernelKey& key) {
    FASTPROJ_SM90_GAUSSIAN_SPLIT(FASTPROJ_GAUSSIAN90)
    return Kernel{};
}

}  // namespace fastproj::cuda
