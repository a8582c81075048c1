// The adjoint with mma.sync.
#include "kernels.hpp"
#include "transpose_sm80.cuh"

namespace fastproj::cuda {

namespace {
template <Kind kKind, int kTerms>
Kernel make() {
    Kernel kernel;
    kernel.entry = reinterpret_cast<const void*>(&transpose_sm80_kernel<kKind, kTerms>);
    kernel.threads = kThreadsTranspose;
    kernel.shared_bytes = ConfigTranspose<kKind, kTerms>::kSharedBytes;
    return kernel;
}
}  // namespace

Kernel transpose_kernel(Kind kind, int terms) {
    if (kind == Kind::kRademacher) {
        return terms == 1 ? make<Kind::kRademacher, 1>() : make<Kind::kRademacher, 3>();
    }
    return terms == 1 ? make<Kind::kGaussian, 1>() : make<Kind::kGaussian, 3>();
}

}  // namespace fastproj::cuda
