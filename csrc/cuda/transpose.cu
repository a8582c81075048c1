// The adjoint with mma.sync.
#include "kernels.hpp"
#include "transpose_sm80.cuh"

namespace fastproj::cuda {

namespace {
template <Kind kKind, int kTerms>
Kernel make() {
    return kernel_of(&transpose_sm80_kernel<kKind, kTerms>, kThreadsTranspose,
                     ConfigTranspose<kKind, kTerms>::kSharedBytes);
}
}  // namespace

Kernel transpose_kernel(Kind kind, int terms) {
    if (kind == Kind::kRademacher) {
        return terms == 1 ? make<Kind::kRademacher, 1>() : make<Kind::kRademacher, 3>();
    }
    return terms == 1 ? make<Kind::kGaussian, 1>() : make<Kind::kGaussian, 3>();
}

}  // namespace fastproj::cuda
