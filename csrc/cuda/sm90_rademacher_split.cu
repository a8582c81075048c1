// Rademacher projection for sm_90a: fp32 G in two and three bf16 terms.
#include "kernels.hpp"
#include "project_sm90.cuh"

namespace fastproj::cuda {

Kernel find_sm90_rademacher_split(const KernelKey& key) {
    FASTPROJ_SM90_RADEMACHER_SPLIT(FASTPROJ_RADEMACHER90)
    return Kernel{};
}

}  // namespace fastproj::cuda
