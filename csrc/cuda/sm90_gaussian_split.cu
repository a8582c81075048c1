// Gaussian projection for sm_90a: fp32 G in two and three bf16 terms.
#include "kernels.hpp"
#include "project_sm90.cuh"

namespace fastproj::cuda {

Kernel find_sm90_gaussian_split(const KernelKey& key) {
#define FASTPROJ_CASE(Op, terms, block_b, tiles)                                  \
    if (key == KernelKey{Kind::kGaussian, Op::kIsBf16, terms, block_b}) {         \
        return make_kernel<Config90<Kind::kGaussian, Op, terms, block_b, tiles>>( \
            reinterpret_cast<const void*>(                                        \
                &project_gaussian_sm90_kernel<Op, terms, block_b, tiles>),        \
            kThreads90);                                                          \
    }
    FASTPROJ_SM90_GAUSSIAN_SPLIT(FASTPROJ_CASE)
#undef FASTPROJ_CASE
    return Kernel{};
}

}  // namespace fastproj::cuda
