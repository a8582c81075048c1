// R built directly in the register fragments of mma.sync and wgmma.
//
// R transposed is operand A. Take a piece of it of 16 columns x 16 rows of P, and the thread with
// g = lane / 4 and t = lane % 4. The thread holds rows 2t, 2t + 1 of columns g and g + 8, and the
// same 8 rows further on: four registers of two 16-bit values. Spec v1 puts all the bits of one
// (column, t) into one Philox call.
#pragma once

#include "../spec.hpp"
#include "device.cuh"

namespace fastproj::cuda {

// What the generators of one thread have in common.
struct GeneratorKey {
    std::uint32_t key0, key1;
    std::uint32_t counter2;  // with the thread's lane
    std::uint32_t stream, sign_mask;
    std::uint32_t table;  // Gaussian: shared-memory address of the table | lane * 4
};

FASTPROJ_DEVICE Words column_words(const GeneratorKey& key, std::uint32_t block,
                                   std::uint32_t column) {
    return philox4x32_10(Words{{block, column, key.counter2, key.stream}}, key.key0, key.key1);
}

// Bits `bit` and `bit + 16` of a word as the pair (low, high) of +-1: two rows of one column.
template <class Op>
FASTPROJ_DEVICE std::uint32_t rademacher_pair(std::uint32_t word, int bit,
                                              std::uint32_t sign_mask) {
    return and_xor(word << (15 - bit), sign_mask, Op::kOne | Op::kOne << 16);
}

// --------------------------------------------------------------------------- the Gaussian table

// The table in shared memory: 256 rows of 128 bytes; row i holds 32 copies, one a lane, of entries
// 2i and 2i + 1. At a multiple of 32 KiB a lookup is one logic operation and one load from the
// lane's own bank.
constexpr int kTableBytes = 256 * 128;
// Dynamic shared memory starts 1 KiB (or a multiple) into the window, so this much reaches the end
// of a table at the next multiple of 32 KiB.
constexpr int kTableSpace = 2 * kTableBytes - 1024;

FASTPROJ_DEVICE std::uint32_t table_address(std::uint32_t base) {
    return (base + kTableBytes - 1) & ~static_cast<std::uint32_t>(kTableBytes - 1);
}

#if !defined(FASTPROJ_EMULATE)
__device__ const std::uint16_t kTableDevice[512] = {FASTPROJ_GAUSS_TABLE_V1};
#else
const std::uint16_t kTableDevice[512] = {FASTPROJ_GAUSS_TABLE_V1};
#endif

// Written by all threads of the block; a barrier must follow.
template <class Op>
FASTPROJ_DEVICE void fill_table(std::uint32_t address, int thread, int threads) {
    for (int cell = thread; cell < 256 * 32; cell += threads) {
        std::uint32_t pair[2];
        for (int i = 0; i < 2; ++i) {
            const std::uint32_t bf16 = kTableDevice[(cell >> 5) * 2 + i];
            pair[i] = Op::kIsBf16 ? bf16 : float_to_half(bits_float(bf16 << 16));
        }
        store_shared(address + cell * 4, pair[0] | pair[1] << 16);
    }
}

// Both 16-bit codes of a word as a pair of entries. `table`: address of the table | lane * 4.
FASTPROJ_DEVICE std::uint32_t gaussian_pair(std::uint32_t word, std::uint32_t table,
                                            std::uint32_t sign_mask) {
    const std::uint32_t low = load_shared_u16(and_or(word, 0x7f82u, table));
    const std::uint32_t high = load_shared_u16(and_or(word >> 16, 0x7f82u, table));
    return and_or(word, sign_mask, pack_low(low, high));
}

// ------------------------------------------------------------------------------- generators

// Fragments of kTiles pieces of 16 columns, for one panel after another. A panel begins with
// start(m, panel). Every 64 rows take a call of fragments(m, ...) for each m, and every 128 rows
// end with advance(). Alternatively the words of the next panel are made in kParts parts along the
// way: prepare(part, ...) for each, then turn() instead of start().
template <Kind kKind, class Op, int kTiles>
struct Generator;

template <class Op, int kTiles>
struct Generator<Kind::kRademacher, Op, kTiles> {
    static constexpr int kParts = 2 * kTiles;
    std::uint32_t w[kTiles][2][4];     // the words of this panel, the current one first
    std::uint32_t next[kTiles][2][4];  // those of the next

    FASTPROJ_DEVICE void start(const GeneratorKey& key, int m, std::uint32_t panel,
                               std::uint32_t column) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Words words = column_words(key, panel, column + 8 * h);
#pragma unroll
            for (int j = 0; j < 4; ++j) w[m][h][j] = words.w[j];
        }
    }
    // `column` is that of tile 0; the tiles lie 64 columns apart.
    FASTPROJ_DEVICE void prepare(const GeneratorKey& key, int part, std::uint32_t panel,
                                 std::uint32_t column) {
        // Opaque at both ends: so the compiler leaves it between the products where it is called.
        const Words words = column_words(key, panel, opaque(column + part / 2 * 64 + part % 2 * 8));
#pragma unroll
        for (int j = 0; j < 4; ++j) next[part / 2][part % 2][j] = opaque(words.w[j]);
    }
    FASTPROJ_DEVICE void turn() {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int j = 0; j < 4; ++j) w[m][h][j] = next[m][h][j];
            }
        }
    }
    // a[s]: rows 16 s .. 16 s + 15 of the 64 rows; `half` says which half of the word they take.
    FASTPROJ_DEVICE void fragments(const GeneratorKey& key, int m, int half, int, std::uint32_t,
                                   std::uint32_t, std::uint32_t (&a)[4][4]) {
        // Opaque: the compiler can't move what follows before a wait for the tensor cores.
        w[m][0][0] = opaque(w[m][0][0]);
        w[m][1][0] = opaque(w[m][1][0]);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {  // r & 1: column g or g + 8; r >> 1: rows 0-7 or 8-15
                const int bit = 8 * half + 2 * s + (r >> 1);
                a[s][r] = rademacher_pair<Op>(w[m][r & 1][0], bit, key.sign_mask);
            }
        }
    }
    FASTPROJ_DEVICE void advance() {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                w[m][h][0] = w[m][h][1];
                w[m][h][1] = w[m][h][2];
                w[m][h][2] = w[m][h][3];
            }
        }
    }
};

template <class Op, int kTiles>
struct Generator<Kind::kGaussian, Op, kTiles> {
    static constexpr int kParts = 0;
    FASTPROJ_DEVICE void start(const GeneratorKey&, int, std::uint32_t, std::uint32_t) {}
    FASTPROJ_DEVICE void prepare(const GeneratorKey&, int, std::uint32_t, std::uint32_t) {}
    FASTPROJ_DEVICE void turn() {}
    FASTPROJ_DEVICE void fragments(const GeneratorKey& key, int, int, int group,
                                   std::uint32_t panel, std::uint32_t column,
                                   std::uint32_t (&a)[4][4]) {
        column = opaque(column);
#pragma unroll
        for (int q = 0; q < 2; ++q) {  // 32-row blocks
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Words words = column_words(key, panel * 16 + group * 2 + q, column + 8 * h);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    a[2 * q + (j >> 1)][h + 2 * (j & 1)] =
                        gaussian_pair(words.w[j], key.table, key.sign_mask);
                }
            }
        }
    }
    FASTPROJ_DEVICE void advance() {}
};

// --------------------------------------------------------------------------- fp32 -> bf16 terms

// One element that is not finite, or so large that rounding could overflow: exact and slow.
template <int kTerms>
FASTPROJ_DEVICE void split_extreme(std::uint32_t bits, std::uint32_t (&term)[kTerms]) {
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) {  // inf - inf would be NaN; a NaN cut to 16 bits could be inf
        term[0] = (bits >> 16) | (magnitude > 0x7f800000u ? 0x40u : 0u);
#pragma unroll
        for (int t = 1; t < kTerms; ++t) term[t] = 0;
        return;
    }
    float rest = bits_float(bits);
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
        std::uint32_t value = float_bits(rest) >> 16;
        // Within a bf16 step of the largest float, rounding up would make the sum infinite.
        if (t == kTerms - 1 && magnitude < 0x7f7f0000u) value = round_bf16x2(rest, 0.0f) & 0xffffu;
        term[t] = value;
        rest -= bits_float(value << 16);
    }
}

// 8 floats -> kTerms x 8 bf16 whose sum is the float: exactly for three terms (cut to 8 + 8 + 8
// bits), else rounded in the last term.
template <int kTerms>
FASTPROJ_DEVICE void split_floats(const std::uint32_t (&x)[8], std::uint32_t (&out)[kTerms][4]) {
    float size = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) size = fmaf(fabsf(bits_float(x[e])), 2.0f, size);
    if (!(size < 3.0e38f)) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            std::uint32_t low[kTerms], high[kTerms];
            split_extreme<kTerms>(x[2 * pair], low);
            split_extreme<kTerms>(x[2 * pair + 1], high);
#pragma unroll
            for (int t = 0; t < kTerms; ++t) out[t][pair] = pack_low(low[t], high[t]);
        }
        return;
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        float low = bits_float(x[2 * pair]), high = bits_float(x[2 * pair + 1]);
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
            const std::uint32_t a = float_bits(low), b = float_bits(high);
            if (t == kTerms - 1 && kTerms < 3) {
                out[t][pair] = round_bf16x2(low, high);
            } else {
                out[t][pair] = pack_high(a, b);
                low -= bits_float(a & 0xffff0000u);
                high -= bits_float(b & 0xffff0000u);
            }
        }
    }
}

// -------------------------------------------------------------------------- elements into tiles

// A tile of 64 rows is moved in chunks of 8 elements, 8 chunks a sample: chunk c is rows 4 c to 4 c
// + 3 and the same 32 rows further on. So 8 threads take 128 contiguous bytes of fp32 with one
// instruction: whole sectors and all banks once, where 32 bytes a thread would take half of each.

// The sample of the q-th 8 threads. Two neighbours, whose stores go together, differ in bit 2: the
// swizzle puts them in different banks.
FASTPROJ_DEVICE int chunk_sample(int q) { return (q & ~7) | (q & 1) << 2 | (q >> 1 & 3); }

// Where the first half of chunk c of sample n goes, in a tile of 128-byte rows with 128-byte
// swizzle; the second half goes to this ^ 64.
FASTPROJ_DEVICE std::uint32_t chunk_offset(int n, int c) {
    return n * 128 + (((c >> 1) ^ (n & 7)) << 4 | (c & 1) << 3);
}

// One element on its way into a word of shared memory: fp32, or the aligned word that holds the
// 16-bit element. `last`: where the last 16-bit element of the tensor lies (0: it has wider ones);
// what follows it in its word must not be read.
FASTPROJ_DEVICE void copy_element(std::uint32_t to, std::uintptr_t from, bool valid,
                                  std::uintptr_t last) {
    const bool cut = from == last && (from & 2) == 0;
    copy_async_4(to, reinterpret_cast<const void*>(from & ~std::uintptr_t{3}),
                 !valid ? 0
                 : cut  ? 2
                        : 4);
}
// Which bytes of two words, as copied above, are two neighbouring 16-bit elements, the first at
// `base` + 2 * `at`: of an odd element the upper half.
FASTPROJ_DEVICE std::uint32_t element_halves(const void* base, std::uint32_t at,
                                             std::uint32_t step) {
    const std::uint32_t odd =
        static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(base) >> 1) + at;
    return 0x5410 + (odd & 1) * 0x22 + ((odd + step) & 1) * 0x2200;
}

// Writes chunk c of sample n of a tile; terms lie `term_bytes` apart. `halves` chooses the bytes of
// two words that are two 16-bit elements.
template <class Op, int kTerms>
FASTPROJ_DEVICE void store_chunk(const ProjectParams& p, std::uint32_t tile,
                                 std::uint32_t term_bytes, int n, int c,
                                 const std::uint32_t (&raw)[8], std::uint32_t halves = 0x5410) {
    const std::uint32_t first = tile + chunk_offset(n, c),
                        second = tile + (chunk_offset(n, c) ^ 64);
    if constexpr (Op::kIsBf16) {
        if (kTerms > 1 || p.input == static_cast<std::int32_t>(Dtype::kF32)) {
            std::uint32_t out[kTerms][4];
            split_floats<kTerms>(raw, out);
#pragma unroll
            for (int t = 0; t < kTerms; ++t) {
                store_shared(first + t * term_bytes, out[t][0], out[t][1]);
                store_shared(second + t * term_bytes, out[t][2], out[t][3]);
            }
            return;
        }
    }
    store_shared(first, pick_bytes(raw[0], raw[1], halves), pick_bytes(raw[2], raw[3], halves));
    store_shared(second, pick_bytes(raw[4], raw[5], halves), pick_bytes(raw[6], raw[7], halves));
}

// ------------------------------------------------------------------------------- work and results

// One item of work: a tile of samples, a tile of columns and a range of panels.
struct WorkItem {
    int batch_tile, col_tile, split;
    int first, last;  // panels

    FASTPROJ_DEVICE static WorkItem at(const ProjectParams& p, int index) {
        WorkItem item;
        item.col_tile = index % p.col_tiles;  // fastest: blocks that run together share G in L2
        const int rest = index / p.col_tiles;
        item.split = rest % p.splits;
        item.batch_tile = rest / p.splits;
        item.first = static_cast<int>(static_cast<std::int64_t>(p.panels) * item.split / p.splits);
        item.last =
            static_cast<int>(static_cast<std::int64_t>(p.panels) * (item.split + 1) / p.splits);
        return item;
    }
};

FASTPROJ_DEVICE void store_result(const ProjectParams& p, int split, int b, int k, float sum) {
    if (b >= p.batch || k >= p.cols) return;
    float* to = p.dst + split * p.dst_stride_split + b * p.dst_stride_b + k * p.dst_stride_k;
    const float value = p.scale * sum;
    write_global(to, p.accumulate ? read_global(to) + value : value);
}

// ------------------------------------------------------------------------------------ the sums

// Of M by N products of mma.sync, four numbers of a thread each.
template <int M, int N>
using Accumulators = float[M][N][4];

template <int M, int N>
FASTPROJ_DEVICE void clear_sums(Accumulators<M, N>& acc) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
        }
    }
}

// sum += acc, which begins anew.
template <int M, int N>
FASTPROJ_DEVICE void fold_sums(Accumulators<M, N>& sum, Accumulators<M, N>& acc) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[m][n][i] += acc[m][n][i];
                acc[m][n][i] = 0.0f;
            }
        }
    }
}

}  // namespace fastproj::cuda
