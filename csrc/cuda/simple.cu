// Kernels without tensor cores.
#include "simple.cuh"
#include "simple.hpp"

namespace fastproj::cuda {

namespace {
template <class T>
const void* entry(T* kernel) {
    return reinterpret_cast<const void*>(kernel);
}
}  // namespace

Kernel simple_kernel(SimpleKernel which, Kind kind) {
    const bool rademacher = kind == Kind::kRademacher;
    Kernel kernel;
    kernel.threads = kThreadsSimple;
    switch (which) {
        case SimpleKernel::kProject:
            kernel.shared_bytes = kSimpleShared;
            kernel.entry = rademacher ? entry(&project_simple_kernel<Kind::kRademacher>)
                                      : entry(&project_simple_kernel<Kind::kGaussian>);
            break;
        case SimpleKernel::kTranspose:
            kernel.shared_bytes = rademacher ? TransposeSimple<Kind::kRademacher>::kSharedBytes
                                             : TransposeSimple<Kind::kGaussian>::kSharedBytes;
            kernel.entry = rademacher ? entry(&transpose_simple_kernel<Kind::kRademacher>)
                                      : entry(&transpose_simple_kernel<Kind::kGaussian>);
            break;
        case SimpleKernel::kMatrix:
            kernel.entry = rademacher ? entry(&matrix_kernel<Kind::kRademacher>)
                                      : entry(&matrix_kernel<Kind::kGaussian>);
            break;
        case SimpleKernel::kReduceFloat:
            kernel.entry = entry(&reduce_kernel<float>);
            break;
        case SimpleKernel::kReduceDouble:
            kernel.entry = entry(&reduce_kernel<double>);
            break;
    }
    return kernel;
}

}  // namespace fastproj::cuda
