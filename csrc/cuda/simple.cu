// Kernels without tensor cores.
#include "simple.cuh"
#include "simple.hpp"

namespace fastproj::cuda {

namespace {
template <Kind kKind>
Kernel kernel_of_kind(SimpleKernel which) {
    switch (which) {
        case SimpleKernel::kProject:
            return kernel_of(&project_simple_kernel<kKind>, kThreadsSimple, kSimpleShared);
        case SimpleKernel::kTranspose:
            return kernel_of(&transpose_simple_kernel<kKind>, kThreadsSimple,
                             TransposeSimple<kKind>::kSharedBytes);
        case SimpleKernel::kMatrix:
            return kernel_of(&matrix_kernel<kKind>, kThreadsSimple);
        case SimpleKernel::kReduceFloat:
            return kernel_of(&reduce_kernel<float>, kThreadsSimple);
        default:
            return kernel_of(&reduce_kernel<double>, kThreadsSimple);
    }
}
}  // namespace

Kernel simple_kernel(SimpleKernel which, Kind kind) {
    return kind == Kind::kRademacher ? kernel_of_kind<Kind::kRademacher>(which)
                                     : kernel_of_kind<Kind::kGaussian>(which);
}

}  // namespace fastproj::cuda
