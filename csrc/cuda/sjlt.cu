// Kind sjlt: the adjoint and blocks of R.
#include "sjlt.cuh"

namespace fastproj::cuda {

FASTPROJ_KERNEL(kThreadsSimple)
matrix_sjlt_kernel(FASTPROJ_GRID_CONSTANT MatrixParams p) { matrix_sjlt(p); }

Kernel sjlt_transpose_kernel(bool in_double) {
    return kernel_of(in_double ? &transpose_sjlt_kernel<double> : &transpose_sjlt_kernel<float>,
                     kThreadsSimple, kSjltTransposeShared);
}

Kernel sjlt_matrix_kernel() { return kernel_of(&matrix_sjlt_kernel, kThreadsSimple); }

}  // namespace fastproj::cuda
