// What one call asks for, as fastproj/call.py hands it over; shared by the CPU and the CUDA module.
// Plain data only: translation units with different compiler flags include this, so it must not
// define any function that could be merged across them.
#pragma once

#include <cstdint>

#include "spec.hpp"

namespace fastproj {

// The numbers are those of DTYPES in fastproj/call.py.
enum class Dtype : std::int32_t { kF32 = 0, kF64 = 1, kBf16 = 2, kF16 = 3, kI8 = 4 };

// A 2-D tensor: G and Y [batch, ...], or a block of R. Strides are in elements, not bytes.
struct View {
    void* data;  // of inputs, never written
    Dtype dtype;
    std::int64_t shape[2];
    std::int64_t stride[2];
};

struct Call {
    MatrixKey key;
    std::int64_t row_offset;  // the row of R that the first column of G meets
    double scale;
    bool accumulate;  // add to the output instead of overwriting it
    int terms;        // that a float32 value is multiplied as: 3, 2, 1 for highest, high, medium
};

}  // namespace fastproj
