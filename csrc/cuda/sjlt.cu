// Kind sjlt: the adjoint and blocks of R.
#include "sjlt.cuh"

namespace fastproj::cuda {

FASTPROJ_KERNEL(kThreadsSimple)
matrix_sjlt_kernel(FASTPROJ_GRID_CONSTANT MatrixParams p) { matrix_sjlt(p); }

Kernel sjlt_transpose_kernel(bool in_double) {
    Kernel kernel;
    kernel.entry = in_double ? reinterpret_cast<const void*>(&transpose_sjlt_kernel<double>)
                             : reinterpret_cast<const void*>(&transpose_sjlt_kernel<float>);
    kernel.threads = kThreadsSimple;
    kernel.shared_bytes = kSjltTransposeShared;
    return kernel;
}

Kernel sjlt_matrix_kernel() {
    Kernel kernel;
    kernel.entry = reinterpret_cast<const void*>(&matrix_sjlt_kernel);
    kernel.threads = kThreadsSimple;
    return kernel;
}

}  // namespace fastproj::cuda
