// The operations, one file each: whole problems, cut into tiles and shared out among threads.
#pragma once

#include <vector>

#include "kernels.hpp"

namespace fastproj::cpu {

struct Run {
    Isa isa;
    int num_threads;
};

// out[b, k] = scale * sum_p G[b, p] * R[row_offset + p, k], plus out[b, k] when accumulate, with G
// the pieces side by side: at least one, all of one dtype and batch.
// float64 sums in double throughout; all others in fp32 over 512 rows, then in double.
void project(const std::vector<View>& pieces, const View& out, const Call& call, const Run& run);

// out[b, r] = scale * sum_k Y[b, k] * R[row_offset + r, k]. Y is float32 or float64.
void project_transpose(const View& y, const View& out, const Call& call, const Run& run);

// out[r, c] = R[row_offset + r, col_offset + c].
void matrix(const View& out, const Call& call, std::int64_t col_offset, const Run& run);

// The same three of the sparse kind.
void project_sjlt(const std::vector<View>& pieces, const View& out, const Call& call,
                  const Run& run);
void project_transpose_sjlt(const View& y, const View& out, const Call& call, const Run& run);
void matrix_sjlt(const View& out, const Call& call, std::int64_t col_offset, const Run& run);

// to [samples, padded_dim] = those rows of Y, zero beyond its columns; in its dtype.
void pack_batch(const View& y, std::int64_t batch_begin, std::int64_t samples,
                std::int64_t padded_dim, char* to);

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The panels of R that rows row_offset .. row_offset + rows touch.
struct Panels {
    Panels(std::int64_t row_offset, std::int64_t rows)
        : begin(row_offset / kPanelRows), count(ceil_div(row_offset + rows, kPanelRows) - begin) {}
    const std::int64_t begin, count;
};

}  // namespace fastproj::cpu
