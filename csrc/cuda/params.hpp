// What the host hands to the kernels: plain structs. Strides are in elements, not bytes.
#pragma once

#include <cstdint>

#include "../call.hpp"

namespace fastproj::cuda {

constexpr int element_bytes(Dtype dtype) {
    return dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : dtype == Dtype::kI8 ? 1 : 2;
}

// How a tile of G reaches shared memory. Chosen per launch by the alignment of the piece.
enum class Loader : std::int32_t {
    kTma = 0,       // sm_90a: bulk tensor copies, 16-byte aligned base and row stride
    kCpAsync = 1,   // 16-bit, mma.sync: 16-byte asynchronous copies, the same alignment
    kVector = 2,    // mma.sync: through registers in 16-byte loads: fp32 to be split
    kScalar = 3,    // mma.sync: through registers one element at a time: any alignment, any stride
    kElements = 4,  // sm_90a: asynchronous copies of one element: any alignment, any stride
    kWords = 5,     // sjlt: 4-byte asynchronous copies of dense rows that start at multiples of 4
};

// Rows of P in one panel: one Philox block of Rademacher, 16 of Gaussian.
constexpr int kPanelRows = 512;
// Columns of R in one column tile of the split-P arithmetic, whatever the kernel's own tile is: the
// split must not depend on the kernel that the batch size selects.
constexpr int kSplitColumns = 256;

// One launch: dst[s, b, k] = scale * sum over the rows of split s of G[b, i] * R[row0 + i, k].
struct ProjectParams {
    const void* grads;  // G [batch, rows]
    std::int64_t grads_stride_b, grads_stride_p;
    float* dst;  // [splits, batch, cols]: the workspace, or the result when there is one split
    std::int64_t dst_stride_split, dst_stride_b, dst_stride_k;
    float scale;
    std::int32_t accumulate;         // add to dst
    std::uint32_t key0, key1;        // Philox key
    std::uint32_t counter2, stream;  // counter words 2 (without the lane) and 3
    std::uint32_t first_panel;       // counter word 0 of the first panel
    std::int32_t row_shift;          // rows of that panel that precede the piece, 0..511
    std::int32_t rows, batch, cols;
    std::int32_t panels;  // of 512 rows that the piece touches
    std::int32_t splits, col_tiles, batch_tiles;
    std::int32_t items;  // the product of the three
    std::int32_t loader, input;
    std::int32_t cluster;       // blocks that share what each fetches of G by multicast: 1 or 2
    std::int32_t tile_cluster;  // the same, where what is fetched are the tiles, else 1
    std::uint32_t sign_mask;    // 0x80008000; an argument, so that one LOP3 makes a pair
};

// out[b, k] (+)= scale * sum over s of partial[s, b, k], in the order of s.
struct ReduceParams {
    const void* partial;  // [splits, batch, cols]
    std::int64_t stride_split, stride_b;
    void* out;
    std::int64_t out_stride_b, out_stride_k;
    double scale;
    std::int32_t splits, batch, cols, accumulate, out_dtype;
};

// out[i, j] = R[row_offset + i, col_offset + j].
struct MatrixParams {
    void* out;
    std::int64_t stride_n, stride_m;
    std::int64_t rows, cols, row_offset;
    std::int64_t first_block, blocks;  // of the kind's own height
    std::uint64_t seed;
    std::uint32_t stream, col_offset;
    std::int32_t out_dtype;
    std::uint32_t block_log2;  // kind sjlt; its `blocks` are 16 rows high
};

// out[b, i] = scale * sum over k of y[b, k] * R[row_offset + i, k].
struct TransposeParams {
    const void* y;  // [batch, cols]
    std::int64_t y_stride_b, y_stride_k;
    void* out;  // [batch, rows]
    std::int64_t out_stride_b, out_stride_p;
    std::int64_t rows, row_offset;
    std::int64_t first_panel, panels;  // of 512 rows
    double scale;
    std::uint64_t seed;
    std::uint32_t stream, sign_mask;
    std::int32_t batch, cols, batch_tiles, input, out_dtype;
};

// dst[s, b, k] = sum over the rows of split s of G[b, i] * R[row_offset + i, first_col + k], in
// float, or in double when G is. Kind sjlt; its tiles have 2^block_log2 rows and columns.
struct SjltParams {
    const void* grads;  // [batch, rows]
    std::int64_t grads_stride_b, grads_stride_p;
    void* dst;
    std::int64_t dst_stride_split, dst_stride_b;
    std::int64_t first_tile;  // of the launch, counted from row 0 of R
    std::uint64_t seed;
    std::uint32_t stream, block_log2, first_col;
    std::int32_t row_shift;  // rows of the first tile that precede the piece
    std::int32_t rows, batch, cols;
    std::int32_t tiles;  // of rows that the piece touches
    std::int32_t splits, col_tiles, batch_tiles;
    std::int32_t threads;              // of a block
    std::int32_t stage_tiles, stages;  // of the ring in shared memory; no stages: none
    std::int32_t piece;  // bytes of one copy of G: 16, 4, or 0 for one element at a time
};

// out[b, i] = scale * sum over k of y[b, k] * R[row_offset + i, k]; kind sjlt.
struct SjltTransposeParams {
    const void* y;  // [batch, cols]
    std::int64_t y_stride_b, y_stride_k;
    void* out;  // [batch, rows], float or double
    std::int64_t out_stride_b, out_stride_p;
    std::int64_t rows, row_offset;
    std::int64_t first_chunk, chunks;  // of 16 rows of R
    double scale;
    std::uint64_t seed;
    std::uint32_t stream, block_log2;
    std::int32_t batch, cols, batch_tiles, input;
};

// dst[s, b, k] = sum over the rows of split s of G[b, i] * R[row_offset + i, k], all in double.
struct SimpleParams {
    const void* grads;  // [batch, rows], any dtype
    std::int64_t grads_stride_b, grads_stride_p;
    double* dst;
    std::int64_t dst_stride_split, dst_stride_b;
    std::int64_t rows, row_offset;
    std::int64_t first_panel, panels;
    std::uint64_t seed;
    std::uint32_t stream;
    std::int32_t first_col;  // of R: the column of dst[..., 0]
    std::int32_t batch, cols, splits, col_tiles, batch_tiles, input;
};

}  // namespace fastproj::cuda
