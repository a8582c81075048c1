// Gaussian projection for sm_80 and later: fp32 G in two and three bf16 terms.
#include "kernels.hpp"
#include "project_sm80.cuh"

namespace fastproj::cuda {

Kernel find_sm80_gaussian_split(const KernelKey& key) {
#define FASTPROJ_CASE(Op, terms, block_b)                                                     \
    if (key == KernelKey{Kind::kGaussian, Op::kIsBf16, terms, block_b}) {                     \
        return make_kernel<Config80<Kind::kGaussian, Op, terms, block_b>>(                    \
            reinterpret_cast<const void*>(&project_gaussian_sm80_kernel<Op, terms, block_b>), \
            kThreads80);                                                                      \
    }
    FASTPROJ_SM80_GAUSSIAN_SPLIT(FASTPROJ_CASE)
#undef FASTPROJ_CASE
    return Kernel{};
}

}  // namespace fastproj::cuda
