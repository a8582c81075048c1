// Gaussian projection for sm_80 and later: fp32 G in two and three bf16 terms.
#include "kernels.hpp"
#include "project_sm80.cuh"

namespace fastproj::cuda {

Kernel find_sm80_gaussian_split(const KernelKey& key) {
    FASTPROJ_SM80_GAUSSIAN_SPLIT(FASTPROJ_GAUSSIAN80)
    return Kernel{};
}

}  // namespace fastproj::cuda
