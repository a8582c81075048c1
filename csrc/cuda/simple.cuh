// Kernels without tensor cores: blocks of R, the sum over splits of P, and projections in double.
// The last serve float64, and are the simplest correct version of each operation.
#pragma once

#include "fragments.cuh"

namespace fastproj::cuda {

constexpr int kThreadsSimple = 256;

FASTPROJ_DEVICE MatrixKey matrix_key(Kind kind, std::uint64_t seed, std::uint32_t stream) {
    return MatrixKey{kind, stream, seed};
}

// The bf16 bits of the entry that row `at` of a panel takes from its word.
template <Kind kKind>
FASTPROJ_DEVICE std::uint32_t entry_in_word(std::uint32_t word, int at) {
    if constexpr (kKind == Kind::kRademacher) {
        return 0x3f80u | ((word >> (((at >> 3) & 15) + 16 * (at & 1))) & 1u) << 15;
    } else {
        return gaussian_bf16((word >> (16 * (at & 1))) & 0xffffu, kTableDevice);
    }
}
// Row within its block of row r, 0 .. 2 * kRun - 1, of word j and lane: a word serves kRun runs of
// 2 rows.
template <Kind kKind>
struct WordRows {
    static constexpr int kBlock = kKind == Kind::kRademacher ? 512 : 32;
    static constexpr int kCount = kBlock / 16;  // rows of one word and lane
    FASTPROJ_DEVICE static int row(int j, int lane, int r) {
        return j * (kBlock / 4) + (r >> 1) * 8 + lane * 2 + (r & 1);
    }
};

// Element `at` of an array of any of our dtypes.
FASTPROJ_DEVICE double load_element(const void* from, std::int32_t dtype, std::int64_t at) {
    switch (static_cast<Dtype>(dtype)) {
        case Dtype::kF32:
            return load_global(static_cast<const float*>(from) + at);
        case Dtype::kF64:
            return load_global(static_cast<const double*>(from) + at);
        case Dtype::kBf16: {
            const std::uint32_t bits = load_global(static_cast<const std::uint16_t*>(from) + at);
            return bits_float(bits << 16);
        }
        default:
            return half_to_float(load_global(static_cast<const std::uint16_t*>(from) + at));
    }
}

// ------------------------------------------------------------------------------- sum over splits

template <class T>
FASTPROJ_KERNEL(kThreadsSimple)
reduce_kernel(FASTPROJ_GRID_CONSTANT ReduceParams p) {
    const std::int64_t count = static_cast<std::int64_t>(p.batch) * p.cols;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreadsSimple;
    for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreadsSimple + threadIdx.x;
         at < count; at += step) {
        const std::int64_t b = at / p.cols, k = at % p.cols;
        const T* from = static_cast<const T*>(p.partial) + b * p.stride_b + k;
        T sum = 0;
        for (int s = 0; s < p.splits; ++s) sum += read_global(from + s * p.stride_split);
        const T value = static_cast<T>(p.scale) * sum;
        const std::int64_t to = b * p.out_stride_b + k * p.out_stride_k;
        if (p.out_dtype == static_cast<std::int32_t>(Dtype::kF64)) {
            double* out = static_cast<double*>(p.out) + to;
            write_global(out, p.accumulate ? read_global(out) + static_cast<double>(value)
                                           : static_cast<double>(value));
        } else {
            float* out = static_cast<float*>(p.out) + to;
            write_global(out, p.accumulate ? read_global(out) + static_cast<float>(value)
                                           : static_cast<float>(value));
        }
    }
}

// ------------------------------------------------------------------------------- blocks of R

FASTPROJ_DEVICE void store_entry(const MatrixParams& p, std::int64_t i, std::int64_t j,
                                 std::uint32_t bf16) {
    const std::int64_t to = i * p.stride_n + j * p.stride_m;
    const float value = bits_float(bf16 << 16);
    switch (static_cast<Dtype>(p.out_dtype)) {
        case Dtype::kF32:
            write_global(static_cast<float*>(p.out) + to, value);
            break;
        case Dtype::kF64:
            write_global(static_cast<double*>(p.out) + to, static_cast<double>(value));
            break;
        case Dtype::kBf16:
            write_global(static_cast<std::uint16_t*>(p.out) + to, static_cast<std::uint16_t>(bf16));
            break;
        case Dtype::kF16:
            write_global(static_cast<std::uint16_t*>(p.out) + to,
                         static_cast<std::uint16_t>(float_to_half(value)));
            break;
        case Dtype::kI8:
            write_global(static_cast<std::int8_t*>(p.out) + to, static_cast<std::int8_t>(value));
            break;
    }
}

// A thread makes the rows of one (block, lane) in one column: one Philox call.
template <Kind kKind>
FASTPROJ_DEVICE void matrix_body(const MatrixParams& p) {
    using W = WordRows<kKind>;
    const MatrixKey key = matrix_key(kKind, p.seed, p.stream);
    const int lane = threadIdx.x >> 6;
    const std::int64_t column_tiles = (p.cols + 63) / 64;
    const std::int64_t items = column_tiles * p.blocks;
    for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const std::int64_t j = item % column_tiles * 64 + (threadIdx.x & 63);
        if (j >= p.cols) continue;
        const std::int64_t block = p.first_block + item / column_tiles;
        const Words words =
            block_words(key, block, lane, p.col_offset + static_cast<std::uint32_t>(j));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
#pragma unroll 1
            for (int r = 0; r < W::kCount; ++r) {
                const int at = W::row(w, lane, r);
                const std::int64_t i = block * W::kBlock + at - p.row_offset;
                if (i < 0 || i >= p.rows) continue;
                store_entry(p, i, j, entry_in_word<kKind>(words.w[w], at));
            }
        }
    }
}

template <Kind kKind>
FASTPROJ_KERNEL(kThreadsSimple)
matrix_kernel(FASTPROJ_GRID_CONSTANT MatrixParams p) {
    matrix_body<kKind>(p);
}

// ------------------------------------------------------------------------------- projection in
// double

constexpr int kSimpleBatch = 8;     // samples of a block
constexpr int kSimpleColumns = 64;  // columns of a block; 4 threads a column, one for each lane
constexpr int kSimpleShared = kSimpleBatch * kPanelRows * 8;

template <Kind kKind>
FASTPROJ_DEVICE void project_simple_body(const SimpleParams& p) {
    using W = WordRows<kKind>;
    const MatrixKey key = matrix_key(kKind, p.seed, p.stream);
    const std::uint32_t tile = shared_base();  // G [samples, 512 rows]
    const int lane = threadIdx.x & 3;
    const int local = threadIdx.x >> 2;
    const std::int64_t items = static_cast<std::int64_t>(p.col_tiles) * p.splits * p.batch_tiles;
    for (std::int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const int col_tile = static_cast<int>(index % p.col_tiles);
        const int split = static_cast<int>(index / p.col_tiles % p.splits);
        const int first_sample = static_cast<int>(index / p.col_tiles / p.splits) * kSimpleBatch;
        const int column = col_tile * kSimpleColumns + local;
        double sum[kSimpleBatch];
#pragma unroll
        for (int b = 0; b < kSimpleBatch; ++b) sum[b] = 0.0;
        for (std::int64_t panel = p.panels * split / p.splits;
             panel < p.panels * (split + 1) / p.splits; ++panel) {
            const std::int64_t row = (p.first_panel + panel) * kPanelRows;
            __syncthreads();
            for (int at = threadIdx.x; at < kSimpleBatch * kPanelRows; at += kThreadsSimple) {
                const int b = first_sample + at / kPanelRows;
                const std::int64_t i = row + at % kPanelRows - p.row_offset;
                const bool inside = b < p.batch && i >= 0 && i < p.rows;
                store_shared_f64(tile + at * 8,
                                 inside ? load_element(p.grads, p.input,
                                                       b * p.grads_stride_b + i * p.grads_stride_p)
                                        : 0.0);
            }
            __syncthreads();
#pragma unroll 1
            for (int start = 0; start < kPanelRows; start += W::kBlock) {
                const Words words =
                    block_words(key, (row + start) / W::kBlock, lane, p.first_col + column);
#pragma unroll
                for (int w = 0; w < 4; ++w) {
#pragma unroll 2
                    for (int r = 0; r < W::kCount; ++r) {
                        const int at = start + W::row(w, lane, r);
                        const double entry = bits_float(entry_in_word<kKind>(words.w[w], at) << 16);
#pragma unroll
                        for (int b = 0; b < kSimpleBatch; ++b) {
                            sum[b] += entry * load_shared_f64(tile + (b * kPanelRows + at) * 8);
                        }
                    }
                }
            }
        }
        // The four lanes of a column, in order.
        __syncthreads();
#pragma unroll
        for (int b = 0; b < kSimpleBatch; ++b) {
            store_shared_f64(tile + ((b * kSimpleColumns + local) * 4 + lane) * 8, sum[b]);
        }
        __syncthreads();
        for (int at = threadIdx.x; at < kSimpleBatch * kSimpleColumns; at += kThreadsSimple) {
            const int b = first_sample + at / kSimpleColumns;
            const int k = col_tile * kSimpleColumns + at % kSimpleColumns;
            double total = 0.0;
            for (int l = 0; l < 4; ++l) total += load_shared_f64(tile + (at * 4 + l) * 8);
            if (b < p.batch && k < p.cols) {
                write_global(p.dst + split * p.dst_stride_split + b * p.dst_stride_b + k, total);
            }
        }
    }
}

template <Kind kKind>
FASTPROJ_KERNEL(kThreadsSimple)
project_simple_kernel(FASTPROJ_GRID_CONSTANT SimpleParams p) {
    project_simple_body<kKind>(p);
}

// ------------------------------------------------------------------------------- adjoint in double

template <Kind kKind>
struct TransposeSimple {
    static constexpr int kRows = kKind == Kind::kRademacher ? 512 : 32;
    static constexpr int kColumns = kKind == Kind::kRademacher ? 64 : 16;  // at a time
    static constexpr int kWordBytes = kPanelRows / kRows * 4 * kColumns * 4 * 4;
    static constexpr int kSharedBytes = kWordBytes + kSimpleBatch * kColumns * 8;
};

// A block makes 512 rows of the result for 8 samples; a thread two rows. Words are shared by the
// block.
template <Kind kKind>
FASTPROJ_DEVICE void transpose_simple_body(const TransposeParams& p) {
    using T = TransposeSimple<kKind>;
    const MatrixKey key = matrix_key(kKind, p.seed, p.stream);
    const std::uint32_t word_base = shared_base();  // [block, word, column, lane]
    const std::uint32_t y_base = word_base + T::kWordBytes;
    const std::int64_t items = p.panels * p.batch_tiles;
    for (std::int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const int first_sample = static_cast<int>(index % p.batch_tiles) * kSimpleBatch;
        const std::int64_t row = (p.first_panel + index / p.batch_tiles) * kPanelRows;
        double sum[2][kSimpleBatch];
#pragma unroll
        for (int b = 0; b < kSimpleBatch; ++b) sum[0][b] = sum[1][b] = 0.0;
        for (int first = 0; first < p.cols; first += T::kColumns) {
            __syncthreads();
            for (int at = threadIdx.x; at < kPanelRows / T::kRows * T::kColumns * 4;
                 at += kThreadsSimple) {
                const int lane = at & 3;
                const int column = (at >> 2) % T::kColumns;
                const int block = (at >> 2) / T::kColumns;
                const Words words = block_words(key, row / T::kRows + block, lane, first + column);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int to = ((block * 4 + j) * T::kColumns + column) * 4 + lane;
                    store_shared(word_base + to * 4, words.w[j]);
                }
            }
            for (int at = threadIdx.x; at < kSimpleBatch * T::kColumns; at += kThreadsSimple) {
                const int b = first_sample + at / T::kColumns;
                const int k = first + at % T::kColumns;
                const bool inside = b < p.batch && k < p.cols;
                store_shared_f64(
                    y_base + at * 8,
                    inside ? load_element(p.y, p.input, b * p.y_stride_b + k * p.y_stride_k) : 0.0);
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int at = threadIdx.x + r * kThreadsSimple;
                const int lane = (at >> 1) & 3;
                const int word =
                    kKind == Kind::kRademacher ? at >> 7 : (at >> 5) * 4 + ((at >> 3) & 3);
#pragma unroll 2
                for (int k = 0; k < T::kColumns; ++k) {
                    const std::uint32_t bits =
                        load_shared(word_base + ((word * T::kColumns + k) * 4 + lane) * 4);
                    const double entry = bits_float(entry_in_word<kKind>(bits, at) << 16);
#pragma unroll
                    for (int b = 0; b < kSimpleBatch; ++b) {
                        sum[r][b] += entry * load_shared_f64(y_base + (b * T::kColumns + k) * 8);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const std::int64_t i = row + threadIdx.x + r * kThreadsSimple - p.row_offset;
            if (i < 0 || i >= p.rows) continue;
#pragma unroll
            for (int b = 0; b < kSimpleBatch; ++b) {
                if (first_sample + b >= p.batch) continue;
                const std::int64_t to = (first_sample + b) * p.out_stride_b + i * p.out_stride_p;
                const double value = p.scale * sum[r][b];
                if (p.out_dtype == static_cast<std::int32_t>(Dtype::kF64)) {
                    write_global(static_cast<double*>(p.out) + to, value);
                } else {
                    write_global(static_cast<float*>(p.out) + to, static_cast<float>(value));
                }
            }
        }
    }
}

template <Kind kKind>
FASTPROJ_KERNEL(kThreadsSimple)
transpose_simple_kernel(FASTPROJ_GRID_CONSTANT TransposeParams p) {
    transpose_simple_body<kKind>(p);
}

}  // namespace fastproj::cuda
