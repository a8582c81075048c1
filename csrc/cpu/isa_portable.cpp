// Any machine: SSE2, NEON or scalar code.
#include "simd_portable.hpp"
// clang-format off
#include "dense.hpp"
#include "sjlt.hpp"
// clang-format on

namespace fastproj::cpu {

KernelTable kernels_portable() { return with_sjlt_kernels(dense_kernels()); }

}  // namespace fastproj::cpu
