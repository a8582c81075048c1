// The kernels that have no tile configuration, found by name.
#pragma once

#include "kernels.hpp"

namespace fastproj::cuda {

enum class SimpleKernel { kProject, kTranspose, kMatrix, kReduceFloat, kReduceDouble };

Kernel simple_kernel(SimpleKernel which, Kind kind);

}  // namespace fastproj::cuda
