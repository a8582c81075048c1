// What the CPU kernels are asked to do, and the table of functions that each instruction set
// offers. Plain data only: this header is shared by translation units with different compiler
// flags, so it must not define any function that could be merged across them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../call.hpp"

namespace fastproj::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3, kNeon = 4 };
constexpr int kNumIsas = 5;

// All kernels walk P in panels of 512 rows aligned to multiples of 512: one Rademacher block or
// sixteen Gaussian ones. Rows of a panel outside the input count as zeros.
constexpr int kPanelRows = 512;
// Column slabs and workspaces are padded to this many columns, so no kernel needs a column mask.
constexpr int kColumnPad = 64;

// G [batch, rows]: the pieces side by side; row 0 of the first is matrix row row_offset.
struct Source {
    const View* pieces;
    const std::int64_t* piece_begin;  // num_pieces + 1 running totals of rows
    int num_pieces;
    std::int64_t rows;
    std::int64_t row_offset;
};

// acc[b, c] += sum over the rows of panels [panel_begin, panel_end) of G[batch_begin + b, p] *
// R[p, col_begin + c], for batch x cols; columns up to the next multiple of kColumnPad may be
// written too. acc is [batch, acc_ld] double.
struct ProjectTile {
    const Source* source;
    MatrixKey key;
    int terms;
    std::int64_t batch_begin;
    int batch;
    std::int64_t panel_begin;
    std::int64_t panel_end;
    std::uint32_t col_begin;
    int cols;
    double* acc;
    std::int64_t acc_ld;
    void* scratch;  // scratch_bytes(batch, cols), aligned to 64
};

// out[b, r] = sum over c < cols of Y[b, c] * R[row_begin + r, c], for rows of one panel. Y is
// [batch, y_ld] of float or double, zero beyond cols up to a multiple of kColumnPad.
struct TransposeTile {
    MatrixKey key;
    const void* y;
    std::int64_t y_ld;
    int batch;
    std::int64_t cols;
    std::int64_t panel;
    double* out;  // [batch, kPanelRows]
    void* scratch;
};

// tile[r, c] = R[panel * 512 + r, col_begin + c] as float, for kPanelRows x kColumnPad.
struct MatrixTile {
    MatrixKey key;
    std::int64_t panel;
    std::uint32_t col_begin;
    float* tile;
    void* scratch;
};

// acc[b, c] = the same product for the sparse kind, over tiles [tile_begin, tile_end) of block
// rows. Columns come in whole chunks of 16: cols and acc_ld are multiples of it, col_begin of 64.
struct SjltTile {
    const Source* source;
    MatrixKey key;
    std::int64_t batch_begin;
    int batch;
    std::int64_t tile_begin;
    std::int64_t tile_end;
    std::uint32_t col_begin;
    int cols;
    double* acc;
    std::int64_t acc_ld;
    void* scratch;  // sjlt_scratch_bytes(key, batch, acc_ld), aligned to 64
};

// out[b, r] = sum over c < cols of Y[b, c] * R[tile * block + r, c] for the rows of one tile, as
// TransposeTile; out is [batch, block] double. y_ld is a multiple of 16.
struct SjltTransposeTile {
    MatrixKey key;
    const void* y;
    std::int64_t y_ld;
    int batch;
    std::int64_t cols;
    std::int64_t tile;
    double* out;
    void* scratch;  // sjlt_scratch_bytes(key, 1, cols)
};

// The functions of one instruction set. A null pointer never occurs: sets that add nothing of their
// own to a row point at the next lesser set's function.
struct KernelTable {
    std::size_t (*project_scratch_bytes)(int batch, int cols);
    void (*rademacher_f32)(const ProjectTile&);
    void (*gaussian_f32)(const ProjectTile&);
    void (*project_f64)(const ProjectTile&);
    std::size_t (*transpose_scratch_bytes)();
    void (*transpose_f32)(const TransposeTile&);
    void (*transpose_f64)(const TransposeTile&);
    std::size_t (*matrix_scratch_bytes)();
    void (*matrix)(const MatrixTile&);
    std::size_t (*sjlt_scratch_bytes)(const MatrixKey& key, int batch, std::int64_t cols);
    void (*sjlt_f32)(const SjltTile&);
    void (*sjlt_f64)(const SjltTile&);
    void (*sjlt_transpose_f32)(const SjltTransposeTile&);
    void (*sjlt_transpose_f64)(const SjltTransposeTile&);
};

KernelTable kernels_portable();
KernelTable kernels_avx2();
KernelTable kernels_avx512();
KernelTable kernels_amx();
KernelTable kernels_neon();

}  // namespace fastproj::cpu
