// Kind sjlt: sums of rows gathered in a fixed order (spec.hpp; fastproj/spec.py).
//
// A chunk is 16 neighbouring columns. They read 16 neighbouring rows of each tile, in an order that
// an xor gives. A packed chunk (spec.hpp) says which rows, in which order and with what signs.
//
// A block of threads owns a range of columns and a few samples, and has all their sums in
// registers. It brings whole tiles of G through a ring in shared memory. Its threads together make
// the packed chunks of the next tiles while they use those of the present ones. A thread owns 4
// neighbouring columns of several chunks: it reads 4 neighbouring rows at once and sorts them in
// registers. A column adds its tiles in order, whatever the configuration.
#pragma once

#include "simple.cuh"
#include "sjlt.hpp"

namespace fastproj::cuda {

constexpr int kSjltCallColumns = 64;  // whose chunks one Philox call makes

template <Dtype kType>
struct SjltType {
    static constexpr bool k16 = kType == Dtype::kBf16 || kType == Dtype::kF16;
    static constexpr int kBytes = element_bytes(kType);
    static constexpr int kWords = k16 ? 2 : kType == Dtype::kF32 ? 4 : 8;  // of 4 rows
    static constexpr int kEntryBytes = sjlt_entry_bytes(kType);
};
template <Dtype kType>
struct SjltSum {
    using Type = float;
};
template <>
struct SjltSum<Dtype::kF64> {
    using Type = double;
};

FASTPROJ_DEVICE MatrixKey sjlt_key(std::uint64_t seed, std::uint32_t stream, std::uint32_t log2) {
    return MatrixKey{Kind::kSjlt, stream, seed, log2};
}

// The signs of a packed chunk for 16-bit rows: a pair of columns has its two signs 16 bits apart,
// in the order in which its two rows lie in memory.
FASTPROJ_DEVICE std::uint32_t pair_signs(std::uint32_t packed) {
    const std::uint32_t even = packed >> 16 & 0x5555u, odd = packed >> 17 & 0x5555u;
    return (packed & 1u) != 0 ? even << 16 | odd : odd << 16 | even;
}

// acc[j] += the sign of column i + j times the row that it reads, of the 4 rows in `raw`; i is a
// multiple of 4.
template <Dtype kType>
FASTPROJ_DEVICE void add_rows(const std::uint32_t (&raw)[SjltType<kType>::kWords],
                              std::uint32_t packed, std::uint32_t signs, std::uint32_t i,
                              typename SjltSum<kType>::Type (&acc)[4]) {
    const bool far = (packed & 2u) != 0, odd = (packed & 1u) != 0;
    if constexpr (SjltType<kType>::k16) {
        const std::uint32_t word[2] = {far ? raw[1] : raw[0], far ? raw[0] : raw[1]};
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const std::uint32_t both =
                and_xor(signs << (15 - 2 * pair - i), 0x80008000u, word[pair]);
            if constexpr (kType == Dtype::kBf16) {
                const std::uint32_t first = odd ? 0x3244u : 0x1044u;
                acc[2 * pair] += bits_float(pick_bytes(both, 0, first));
                acc[2 * pair + 1] += bits_float(pick_bytes(both, 0, first ^ 0x2200u));
            } else {
                const std::uint32_t first = odd ? 0x1032u : 0x3210u;
                const std::uint32_t sorted = pick_bytes(both, 0, first);
                acc[2 * pair] += half_to_float(sorted & 0xffffu);
                acc[2 * pair + 1] += half_to_float(sorted >> 16);
            }
        }
    } else if constexpr (kType == Dtype::kF32) {
        const std::uint32_t half[4] = {far ? raw[2] : raw[0], far ? raw[3] : raw[1],
                                       far ? raw[0] : raw[2], far ? raw[1] : raw[3]};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const std::uint32_t value = odd ? half[j ^ 1] : half[j];
            acc[j] += bits_float(and_xor(packed << (15 - j - i), 0x80000000u, value));
        }
    } else {
        const std::uint32_t flip = packed & 3u;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const std::uint32_t near[2] = {(flip & 1) != 0 ? raw[2 * (j ^ 1)] : raw[2 * j],
                                           (flip & 1) != 0 ? raw[2 * (j ^ 1) + 1] : raw[2 * j + 1]};
            const int o = j ^ 2;
            const std::uint32_t away[2] = {(flip & 1) != 0 ? raw[2 * (o ^ 1)] : raw[2 * o],
                                           (flip & 1) != 0 ? raw[2 * (o ^ 1) + 1] : raw[2 * o + 1]};
            const std::uint32_t low = far ? away[0] : near[0];
            const std::uint32_t high =
                and_xor(packed << (15 - j - i), 0x80000000u, far ? away[1] : near[1]);
            acc[j] += words_double(low, high);
        }
    }
}

// The 4 rows from `at` on, in shared memory.
template <int kWords>
FASTPROJ_DEVICE void read_rows(std::uint32_t at, std::uint32_t (&raw)[kWords]) {
    if constexpr (kWords == 2) {
        load_shared_8(at, raw[0], raw[1]);
    } else {
#pragma unroll
        for (int w = 0; w < kWords; w += 4) {
            load_shared_16(at + 4 * w, raw[w], raw[w + 1], raw[w + 2], raw[w + 3]);
        }
    }
}

// The packed chunk of column k in tile row `tile`, as sjlt_chunk makes it: no word is picked by an
// index, which would put the words in local memory.
FASTPROJ_DEVICE std::uint32_t pick_word(const Words& words, std::uint32_t which) {
    const std::uint32_t low = (which & 1) != 0 ? words.w[1] : words.w[0];
    const std::uint32_t high = (which & 1) != 0 ? words.w[3] : words.w[2];
    return (which & 2) != 0 ? high : low;
}
FASTPROJ_DEVICE std::uint32_t packed_chunk(const MatrixKey& key, std::int64_t tile,
                                           std::uint32_t k) {
    const std::uint32_t m = key.block_log2 - 4;
    const Words permutation = sjlt_words(key, tile, k >> key.block_log2, 0);
    const std::uint32_t word = pick_word(sjlt_words(key, tile, k >> 6, 1), (k >> 4) & 3);
    return sjlt_packed(word, sjlt_row_chunk(permutation, (k >> 4) & ((1u << m) - 1u), m));
}

// One element of G as it is, from row i of a piece; zero outside it.
template <Dtype kType>
FASTPROJ_DEVICE std::uint64_t sjlt_element(const SjltParams& p, int b, int i, int rows) {
    if (b >= p.batch || i < 0 || i >= rows) return 0;
    const std::int64_t at = b * p.grads_stride_b + i * p.grads_stride_p;
    if constexpr (SjltType<kType>::kBytes == 2) {
        return load_global(static_cast<const std::uint16_t*>(p.grads) + at);
    } else if constexpr (SjltType<kType>::kBytes == 4) {
        return load_global(static_cast<const std::uint32_t*>(p.grads) + at);
    } else {
        return load_global(static_cast<const std::uint64_t*>(p.grads) + at);
    }
}

// The 4 rows from i on, in global memory; i is a multiple of 4 of a tile.
template <Dtype kType>
FASTPROJ_DEVICE void read_rows(const SjltParams& p, int b, int i,
                               std::uint32_t (&raw)[SjltType<kType>::kWords]) {
    constexpr int kBytes = SjltType<kType>::kBytes;
    if (p.piece == 16 && b < p.batch && i >= 0 && i + 4 <= p.rows) {
        const auto* from = reinterpret_cast<const std::uint64_t*>(
            static_cast<const char*>(p.grads) + (b * p.grads_stride_b + i) * kBytes);
#pragma unroll
        for (int w = 0; w < SjltType<kType>::kWords; w += 2) {
            const std::uint64_t two = load_global(from + w / 2);
            raw[w] = static_cast<std::uint32_t>(two);
            raw[w + 1] = static_cast<std::uint32_t>(two >> 32);
        }
        return;
    }
    std::uint64_t element[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) element[e] = sjlt_element<kType>(p, b, i + e, p.rows);
#pragma unroll
    for (int w = 0; w < SjltType<kType>::kWords; ++w) {
        if constexpr (kBytes == 2) {
            raw[w] = static_cast<std::uint32_t>(element[2 * w] | element[2 * w + 1] << 16);
        } else if constexpr (kBytes == 4) {
            raw[w] = static_cast<std::uint32_t>(element[w]);
        } else {
            raw[w] = static_cast<std::uint32_t>(element[w / 2] >> (32 * (w & 1)));
        }
    }
}

// Packed chunks of kTiles tiles at a time, for the columns of a block: two buffers of them, and two
// of the permutations that they are made from.
template <Dtype kType, int kGroups>
struct SjltTables {
    static constexpr int kTiles = sjlt_table_tiles(kGroups);
    static constexpr int kEntry = SjltType<kType>::kEntryBytes;
    const SjltParams& p;
    std::uint32_t base;    // in shared memory
    std::int64_t tile;     // the item's first
    std::uint32_t column;  // of R, the block's first: a multiple of 64

    FASTPROJ_DEVICE int chunks() const { return kGroups * p.threads / 4; }  // of a block's columns
    FASTPROJ_DEVICE MatrixKey key() const { return sjlt_key(p.seed, p.stream, p.block_log2); }
    FASTPROJ_DEVICE std::uint32_t table(int batch) const {
        return base + (batch & 1) * kTiles * chunks() * kEntry;
    }
    FASTPROJ_DEVICE std::uint32_t words(int batch) const {
        return base + 2 * kTiles * chunks() * kEntry + (batch & 1) * (p.threads + kTiles) * 16;
    }
    // The permutations of the batch-th kTiles tiles; of small tiles, make() makes its own.
    FASTPROJ_DEVICE void permute(int batch) const {
        if (p.block_log2 < 6) return;
        const std::uint32_t first = column >> p.block_log2;
        const std::uint32_t last =
            (column + 16 * static_cast<std::uint32_t>(chunks()) - 1) >> p.block_log2;
        const int total = kTiles * static_cast<int>(last - first + 1);
#pragma unroll 1
        for (int j = static_cast<int>(opaque(threadIdx.x)); j < total; j += p.threads) {
            const Words w =
                sjlt_words(key(), tile + batch * kTiles + j % kTiles, first + j / kTiles, 0);
            store_shared(words(batch) + j * 16, w.w[0], w.w[1], w.w[2], w.w[3]);
        }
    }
    // The packed chunks of the batch-th kTiles tiles, after permute(batch): a thread those of 64
    // columns of one tile.
    FASTPROJ_DEVICE void make(int batch) const {
        const int thread = static_cast<int>(opaque(threadIdx.x));
        const int slot = thread % kTiles, group = thread / kTiles;
        const std::uint32_t m = p.block_log2 - 4, mask = (1u << m) - 1u;
        const std::int64_t t = tile + batch * kTiles + slot;
        const std::uint32_t k = column + group * kSjltCallColumns;
        const Words w = sjlt_words(key(), t, k / kSjltCallColumns, 1);
        const std::uint32_t to = table(batch) + (slot * chunks() + group * 4) * kEntry;
        Words permutation{};
        if (m >= 2) {
            const std::uint32_t at =
                ((k >> p.block_log2) - (column >> p.block_log2)) * kTiles + slot;
            load_shared_16(words(batch) + at * 16, permutation.w[0], permutation.w[1],
                           permutation.w[2], permutation.w[3]);
        }
        std::uint32_t packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t chunk = k / 16 + i;
            std::uint32_t x = 0;
            if (m != 0) {
                if (m == 1 && (i & 1) == 0) permutation = sjlt_words(key(), t, chunk >> 1, 0);
                x = sjlt_row_chunk(permutation, chunk & mask, m);
            }
            packed[i] = sjlt_packed(w.w[i], x);
        }
        if constexpr (kEntry == 4) {
            store_shared(to, packed[0], packed[1], packed[2], packed[3]);
        } else {
            store_shared(to, packed[0], pair_signs(packed[0]), packed[1], pair_signs(packed[1]));
            store_shared(to + 16, packed[2], pair_signs(packed[2]), packed[3],
                         pair_signs(packed[3]));
        }
    }
};

// Brings stages of whole tiles of the samples of a block to shared memory: [sample, row].
template <Dtype kType, int kBatch>
struct SjltFeeder {
    static constexpr int kBytes = SjltType<kType>::kBytes;
    const SjltParams& p;
    std::uint32_t ring;
    int b, row, rows;  // first sample; first row of the item and the end of its last tile, in G
    std::uint32_t stage_log2;  // rows of a stage

    FASTPROJ_DEVICE std::uint32_t sample_bytes() const { return kBytes << stage_log2; }
    FASTPROJ_DEVICE std::uint32_t slot(int stage) const {  // stages are 2 or 4
        return ring + (stage & (p.stages - 1)) * kBatch * sample_bytes();
    }
    FASTPROJ_DEVICE void copy(int stage) const {
        if (p.piece == 16) {
            copy_pieces<16>(stage);
        } else if (p.piece == 4) {
            copy_pieces<4>(stage);
        } else {
            copy_elements(stage);
        }
    }
    template <int kPiece>
    FASTPROJ_DEVICE void copy_pieces(int stage) const {
        constexpr int kRows = kPiece > kBytes ? kPiece / kBytes : 1;
        constexpr int kPieces = kPiece > kBytes ? 1 : kBytes / kPiece;  // of one element
        const int start = row + (stage << stage_log2);
        const std::uint32_t to = slot(stage);
        const int line = ((1 << stage_log2) / kRows) * kPieces;  // pieces of a sample: a power of 2
        for (int j = static_cast<int>(opaque(threadIdx.x)); j < kBatch * line; j += p.threads) {
            const int n = b + j / line;
            const int at = j & (line - 1);
            const int i = start + at / kPieces * kRows;
            const bool inside = n < p.batch && i >= 0 && i + kRows <= rows;
            if (inside || n >= p.batch || i >= rows || i + kRows <= 0) {
                // An aligned address even where nothing is read: p.grads itself need not be.
                const auto base = reinterpret_cast<std::uintptr_t>(p.grads);
                const std::uintptr_t from =
                    inside ? base + (n * p.grads_stride_b + i) * kBytes + at % kPieces * kPiece
                           : base & ~std::uintptr_t{15};
                if constexpr (kPiece == 16) {
                    copy_async_16(to + j * 16, reinterpret_cast<const void*>(from), inside);
                } else {
                    copy_async_4(to + j * 4, reinterpret_cast<const void*>(from), inside ? 4 : 0);
                }
            } else {  // the piece straddles an end of the row
                put_elements(to + j * kPiece, n, i, kRows);
            }
        }
    }
    FASTPROJ_DEVICE void copy_elements(int stage) const {
        constexpr int kRows = kBytes == 2 ? 2 : 1;  // of one store
        const int start = row + (stage << stage_log2);
        const std::uint32_t to = slot(stage);
        const int line_log2 = static_cast<int>(stage_log2) - (kBytes == 2 ? 1 : 0);
#pragma unroll 2
        for (int j = static_cast<int>(opaque(threadIdx.x)); j < kBatch << line_log2;
             j += p.threads) {
            const int n = b + (j >> line_log2);
            const int i = start + (j & ((1 << line_log2) - 1)) * kRows;
            put_elements(to + j * kRows * kBytes, n, i, kRows);
        }
    }
    FASTPROJ_DEVICE void put_elements(std::uint32_t to, int n, int i, int count) const {
        if constexpr (kBytes == 2) {
            for (int e = 0; e < count; e += 2) {
                const auto low = static_cast<std::uint32_t>(sjlt_element<kType>(p, n, i + e, rows));
                const auto high =
                    static_cast<std::uint32_t>(sjlt_element<kType>(p, n, i + e + 1, rows));
                store_shared(to + e * 2, low | high << 16);
            }
        } else {
            for (int e = 0; e < count; ++e) {
                const std::uint64_t value = sjlt_element<kType>(p, n, i + e, rows);
                if constexpr (kBytes == 4) {
                    store_shared(to + e * 4, static_cast<std::uint32_t>(value));
                } else {
                    store_shared(to + e * 8, static_cast<std::uint32_t>(value),
                                 static_cast<std::uint32_t>(value >> 32));
                }
            }
        }
    }
};

template <Dtype kType, int kGroups, int kBatch, bool kStaged>
FASTPROJ_DEVICE void project_sjlt(const SjltParams& p) {
    using Sum = typename SjltSum<kType>::Type;
    using Tables = SjltTables<kType, kGroups>;
    constexpr int kWords = SjltType<kType>::kWords, kBytes = SjltType<kType>::kBytes;
    const int thread = threadIdx.x;
    const std::uint32_t in_chunk = (thread & 3) * 4;  // the first of this thread's 4 columns
    const int columns = 4 * kGroups * p.threads;
    const std::uint32_t ring = shared_base();
    const int stage_tiles = kStaged ? p.stage_tiles : Tables::kTiles;
    std::uint32_t stage_log2 = p.block_log2;
    while ((1 << (stage_log2 - p.block_log2)) < stage_tiles) ++stage_log2;
    const std::uint32_t base = ring + (kStaged ? p.stages * kBatch * (kBytes << stage_log2) : 0);

    const int items = p.col_tiles * p.splits * p.batch_tiles;
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
        const int col_tile = index % p.col_tiles;
        const int split = index / p.col_tiles % p.splits;
        const int sample = index / p.col_tiles / p.splits * kBatch;
        const auto begin = static_cast<int>(static_cast<std::int64_t>(p.tiles) * split / p.splits);
        const auto end =
            static_cast<int>(static_cast<std::int64_t>(p.tiles) * (split + 1) / p.splits);
        const int row =
            static_cast<int>((static_cast<std::int64_t>(begin) << p.block_log2) - p.row_shift);
        const std::int64_t stop = (static_cast<std::int64_t>(end) << p.block_log2) - p.row_shift;
        const int rows = stop < p.rows ? static_cast<int>(stop) : p.rows;
        const int first_column = col_tile * columns;
        const Tables tables{p, base, p.first_tile + begin,
                            p.first_col + static_cast<std::uint32_t>(first_column)};
        const SjltFeeder<kType, kBatch> feeder{p, ring, sample, row, rows, stage_log2};

        Sum acc[kGroups][kBatch][4];
        auto clear = [&]() {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
#pragma unroll
                for (int n = 0; n < kBatch; ++n) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) acc[g][n][j] = Sum{0};
                }
            }
        };
        // Into the workspace, which holds what was folded before. What it computes is hidden from
        // the compiler, which would keep it all in registers while tiles are added.
        auto fold = [&](bool first) {
            const int k = first_column + static_cast<int>(opaque(threadIdx.x)) * 4;
            Sum* to = static_cast<Sum*>(p.dst) + opaque(split) * p.dst_stride_split +
                      sample * p.dst_stride_b + k;
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
#pragma unroll
                for (int n = 0; n < kBatch; ++n) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        if (sample + n >= p.batch || k + g * 4 * p.threads + j >= p.cols) continue;
                        Sum* at = to + n * p.dst_stride_b + g * 4 * p.threads + j;
                        write_global(at, first ? acc[g][n][j] : read_global(at) + acc[g][n][j]);
                    }
                }
            }
        };
        clear();

        __syncthreads();  // the last item's readers are done
        tables.permute(0);
        const int stages = (end - begin + stage_tiles - 1) / stage_tiles;
        if constexpr (kStaged) {
            for (int s = 0; s < p.stages - 1; ++s) {
                if (s < stages) feeder.copy(s);
                copy_async_commit();
            }
        }
        __syncthreads();
        tables.make(0);
        tables.permute(1);

        bool folded = false;
        for (int s = 0; s < stages; ++s) {
            if constexpr (kStaged) {
                if (p.stages == 4) {
                    copy_async_wait<2>();
                } else {
                    copy_async_wait<0>();
                }
            }
            __syncthreads();
            const int batch = s * stage_tiles / Tables::kTiles;
            if (s * stage_tiles % Tables::kTiles == 0 &&
                (batch + 1) * Tables::kTiles < end - begin) {
                tables.make(batch + 1);
                tables.permute(batch + 2);
            }
            if constexpr (kStaged) {
                if (s + p.stages - 1 < stages) feeder.copy(s + p.stages - 1);
                copy_async_commit();
            }
            const int done = s * stage_tiles;
            const int here = min(stage_tiles, end - begin - done);
#pragma unroll 1
            for (int t = 0; t < here; ++t) {
                const std::uint32_t table =
                    tables.table(batch) +
                    ((done % Tables::kTiles + t) * tables.chunks() + (thread >> 2)) *
                        Tables::kEntry;
                const std::uint32_t tile = feeder.slot(kStaged ? s : 0) +
                                           (static_cast<std::uint32_t>(t) << p.block_log2) * kBytes;
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    std::uint32_t packed, signs = 0;
                    const std::uint32_t at = table + g * (p.threads / 4) * Tables::kEntry;
                    if constexpr (Tables::kEntry == 8) {
                        load_shared_8(at, packed, signs);
                    } else {
                        packed = load_shared(at);
                    }
                    const std::uint32_t from = (packed ^ in_chunk) & 0xfffcu;
#pragma unroll
                    for (int n = 0; n < kBatch; ++n) {
                        std::uint32_t raw[kWords];
                        if constexpr (kStaged) {
                            read_rows<kWords>(tile + from * kBytes + n * feeder.sample_bytes(),
                                              raw);
                        } else {
                            const int i =
                                row + ((done + t) << p.block_log2) + static_cast<int>(from);
                            read_rows<kType>(p, sample + n, i, raw);
                        }
                        add_rows<kType>(raw, packed, signs, in_chunk, acc[g][n]);
                    }
                }
            }
            // At multiples of kSjltFold tiles, which stages divide.
            if ((done + stage_tiles) % kSjltFold == 0 && s + 1 < stages) {
                fold(!folded);
                folded = true;
                clear();
            }
        }
        if constexpr (kStaged) copy_async_wait<0>();
        fold(!folded);
    }
}

template <Dtype kType, int kGroups, int kBatch, bool kStaged>
FASTPROJ_KERNEL(sjlt_bound(kType, kGroups, kBatch))
project_sjlt_kernel(FASTPROJ_GRID_CONSTANT SjltParams p) {
    project_sjlt<kType, kGroups, kBatch, kStaged>(p);
}

// ------------------------------------------------------------------------------- the adjoint

// The inverse of an odd number modulo 2^32 (Newton's iteration, right in 5 bits at first).
FASTPROJ_DEVICE std::uint32_t inverse(std::uint32_t odd) {
    std::uint32_t x = odd * 3u ^ 2u;
#pragma unroll
    for (int i = 0; i < 3; ++i) x *= 2u - odd * x;
    return x;
}
// The chunk of columns that reads row chunk x: undoes sjlt_row_chunk, whose shifts of at least half
// of the bits are their own inverses.
FASTPROJ_DEVICE std::uint32_t sjlt_column_chunk(const Words& permutation, std::uint32_t x,
                                                std::uint32_t m) {
    const std::uint32_t mask = (1u << m) - 1u, s = (m + 1) >> 1;
    x ^= x >> s;
    x = (x - permutation.w[3]) * inverse(permutation.w[2] | 1u) & mask;
    x ^= x >> s;
    return (x - permutation.w[1]) * inverse(permutation.w[0] | 1u) & mask;
}

constexpr int kSjltTransposeChunks = 64;  // of 16 rows: of a block
constexpr int kSjltTransposeTiles = kThreadsSimple / kSjltTransposeChunks;  // of columns at a time
constexpr int kSjltTransposeBatch = 4;                                      // samples of a block
constexpr int kSjltTransposeFold = 64;  // times kSjltTransposeTiles entries
constexpr int kSjltTransposeShared = 2 * kThreadsSimple * 8;

// A thread finds, for one chunk of 16 rows, the chunk of columns that reads it in one tile, then
// adds for 4 rows of its own what those columns hold: in the order of the columns.
template <class Sum>
FASTPROJ_DEVICE void transpose_sjlt(const SjltTransposeParams& p) {
    constexpr int kEach = kSjltTransposeChunks / (kThreadsSimple / 16);  // rows of a thread
    const MatrixKey key = sjlt_key(p.seed, p.stream, p.block_log2);
    const std::uint32_t m = key.block_log2 - 4;
    const std::uint32_t base = shared_base();  // [2][tile, chunk]: column, packed
    const int thread = threadIdx.x;
    const int mine = thread % kSjltTransposeChunks, ahead = thread / kSjltTransposeChunks;
    const std::uint32_t i = thread & 15;
    const std::int64_t groups = (p.chunks + kSjltTransposeChunks - 1) / kSjltTransposeChunks;
    const int tiles = static_cast<int>(
        (static_cast<std::int64_t>(p.cols) + (std::int64_t{1} << key.block_log2) - 1) >>
        key.block_log2);
    for (std::int64_t index = blockIdx.x; index < groups * p.batch_tiles; index += gridDim.x) {
        const int sample = static_cast<int>(index % p.batch_tiles) * kSjltTransposeBatch;
        const std::int64_t first = p.first_chunk + index / p.batch_tiles * kSjltTransposeChunks;
        const std::int64_t tile = (first + mine) >> m;
        const std::uint32_t x = static_cast<std::uint32_t>(first + mine) & ((1u << m) - 1u);
        Sum acc[kEach][kSjltTransposeBatch], sum[kEach][kSjltTransposeBatch];
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
#pragma unroll
            for (int n = 0; n < kSjltTransposeBatch; ++n) acc[e][n] = sum[e][n] = Sum{0};
        }
        int turn = 0;
        for (int c = 0; c < tiles; c += kSjltTransposeTiles, ++turn) {
            const std::uint32_t buffer = base + (turn & 1) * kThreadsSimple * 8;
            {
                const std::uint32_t column = c + ahead;
                const Words permutation = sjlt_words(key, tile, column, 0);
                const std::uint32_t h = sjlt_column_chunk(permutation, x, m);
                const std::uint32_t k = (column << key.block_log2) + 16 * h;
                const Words words = sjlt_words(key, tile, k >> 6, 1);
                store_shared(buffer + thread * 8, k,
                             sjlt_packed(pick_word(words, (k >> 4) & 3), 0));
            }
            __syncthreads();  // one a turn is enough for two buffers
#pragma unroll
            for (int e = 0; e < kEach; ++e) {
                const int chunk = (thread >> 4) + e * (kThreadsSimple / 16);
#pragma unroll 1
                for (int t = 0; t < kSjltTransposeTiles && c + t < tiles; ++t) {
                    std::uint32_t k, packed;
                    load_shared_8(buffer + (t * kSjltTransposeChunks + chunk) * 8, k, packed);
                    const std::uint32_t in_chunk = (packed ^ i) & 15u;
                    k += in_chunk;
                    if (k >= static_cast<std::uint32_t>(p.cols)) continue;
                    const bool negative = sjlt_negative(packed, in_chunk) != 0;
#pragma unroll
                    for (int n = 0; n < kSjltTransposeBatch; ++n) {
                        if (sample + n >= p.batch) continue;
                        const auto value = static_cast<Sum>(load_element(
                            p.y, p.input, (sample + n) * p.y_stride_b + k * p.y_stride_k));
                        acc[e][n] += negative ? -value : value;
                    }
                }
            }
            if (turn % kSjltTransposeFold == kSjltTransposeFold - 1 ||
                c + kSjltTransposeTiles >= tiles) {
#pragma unroll
                for (int e = 0; e < kEach; ++e) {
#pragma unroll
                    for (int n = 0; n < kSjltTransposeBatch; ++n) {
                        sum[e][n] += acc[e][n];
                        acc[e][n] = Sum{0};
                    }
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            const int chunk = (thread >> 4) + e * (kThreadsSimple / 16);
            const std::int64_t row = (first + chunk) * 16 + i - p.row_offset;
            if (row < 0 || row >= p.rows) continue;
#pragma unroll
            for (int n = 0; n < kSjltTransposeBatch; ++n) {
                if (sample + n >= p.batch) continue;
                write_global(
                    static_cast<Sum*>(p.out) + (sample + n) * p.out_stride_b + row * p.out_stride_p,
                    static_cast<Sum>(p.scale) * sum[e][n]);
            }
        }
    }
}

template <class Sum>
FASTPROJ_KERNEL(kThreadsSimple)
transpose_sjlt_kernel(FASTPROJ_GRID_CONSTANT SjltTransposeParams p) {
    transpose_sjlt<Sum>(p);
}

// ------------------------------------------------------------------------------- blocks of R

// A thread makes 16 rows of one column.
FASTPROJ_DEVICE void matrix_sjlt(const MatrixParams& p) {
    const MatrixKey key = sjlt_key(p.seed, p.stream, p.block_log2);
    const std::uint32_t m = key.block_log2 - 4;
    const std::int64_t count = p.cols * p.blocks;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreadsSimple;
    for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreadsSimple + threadIdx.x;
         at < count; at += step) {
        const std::int64_t j = at % p.cols, chunk = p.first_block + at / p.cols;
        const std::uint32_t k = p.col_offset + static_cast<std::uint32_t>(j);
        const std::uint32_t packed = packed_chunk(key, chunk >> m, k);
        const std::uint32_t one = 0x3f80u | sjlt_negative(packed, k & 15u) << 15;
        const std::uint32_t place =
            sjlt_row(packed, k & 15u) - (static_cast<std::uint32_t>(chunk) & ((1u << m) - 1u)) * 16;
#pragma unroll 1
        for (std::uint32_t r = 0; r < kSjltChunk; ++r) {
            const std::int64_t i = chunk * 16 + r - p.row_offset;
            if (i >= 0 && i < p.rows) store_entry(p, i, j, r == place ? one : 0u);
        }
    }
}

// For the lists in sjlt.hpp: returns the kernel if it is the one that `key` names.
#define FASTPROJ_CASE_SJLT(dtype, groups, batch, staged)                                          \
    if (key == SjltKey{dtype, groups, batch, staged}) {                                           \
        return reinterpret_cast<const void*>(&project_sjlt_kernel<dtype, groups, batch, staged>); \
    }

}  // namespace fastproj::cuda
