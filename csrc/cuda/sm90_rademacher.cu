// Rademacher projection for sm_90a: 16-bit G.
#include "kernels.hpp"
#include "project_sm90.cuh"

namespace fastproj::cuda {

Kernel find_sm90_rademacher(const KernelKey& key) {
    FASTPROJ_SM90_RADEMACHER(FASTPROJ_RADEMACHER90)
    return Kernel{};
}

}  // namespace fastproj::cuda
