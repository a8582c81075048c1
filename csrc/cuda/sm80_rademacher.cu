// Rademacher projection for sm_80 and later: 16-bit G.
#include "kernels.hpp"
#include "project_sm80.cuh"

namespace fastproj::cuda {

Kernel find_sm80_rademacher(const KernelKey& key) {
#define FASTPROJ_CASE(Op, terms, block_b)                                                       \
    if (key == KernelKey{Kind::kRademacher, Op::kIsBf16, terms, block_b}) {                     \
        return make_kernel<Config80<Kind::kRademacher, Op, terms, block_b>>(                    \
            reinterpret_cast<const void*>(&project_rademacher_sm80_kernel<Op, terms, block_b>), \
            kThreads80);                                                                        \
    }
    FASTPROJ_SM80_RADEMACHER(FASTPROJ_CASE)
#undef FASTPROJ_CASE
    return Kernel{};
}

}  // namespace fastproj::cuda
