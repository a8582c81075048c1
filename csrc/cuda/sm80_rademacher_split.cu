// Rademacher projection for sm_80 and later: fp32 G in two and three bf16 terms.
#include "kernels.hpp"
#include "project_sm80.cuh"

namespace fastproj::cuda {

Kernel find_sm80_rademacher_split(const KernelKey& key) {
    FASTPROJ_SM80_RADEMACHER_SPLIT(FASTPROJ_RADEMACHER80)
    return Kernel{};
}

}  // namespace fastproj::cuda
