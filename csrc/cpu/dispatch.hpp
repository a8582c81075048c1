// The CPU backend's entry points: whole problems, cut into tiles and shared out among threads.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastproj::cpu {

const char* isa_name(Isa isa);

// Why an instruction set can't be used ("" when it can): not compiled in, or the processor or the
// operating system lacks something, by name.
std::string isa_unavailable(Isa isa);

// A writable tensor [rows, cols]; strides are in elements.
struct Output {
    void* data;
    DType dtype;
    std::int64_t stride_row;
    std::int64_t stride_col;
};

struct Run {
    Isa isa;
    int num_threads;
};

// out[b, k] = scale * sum_p G[b, p] * R[row_offset + p, k], plus out[b, k] when accumulate.
// dtype float64 sums in double throughout; all others in fp32 over 512 rows, then in double.
void project(const std::vector<Piece>& pieces, DType dtype, std::int64_t batch,
             std::int64_t row_offset, const MatrixKey& key, std::int64_t proj_dim, double scale,
             bool accumulate, Precision precision, const Output& out, const Run& run);

// out[b, r] = scale * sum_k Y[b, k] * R[row_offset + r, k] for r < rows. Y is float32 or float64.
void project_transpose(const Piece& y, DType dtype, std::int64_t batch, std::int64_t row_offset,
                       std::int64_t rows, const MatrixKey& key, double scale, const Output& out,
                       const Run& run);

// out[r, c] = R[row_offset + r, col_offset + c].
void matrix(const MatrixKey& key, std::int64_t row_offset, std::int64_t rows,
            std::int64_t col_offset, std::int64_t cols, const Output& out, const Run& run);

}  // namespace fastproj::cpu
