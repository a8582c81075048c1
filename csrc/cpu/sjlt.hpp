// The sparse kind: additions of whole chunks of 16 rows, gathered in a fixed order. Expects a Simd
// vocabulary with Chunk before; everything here is local to the translation unit.
#pragma once

#include <type_traits>

#include "arena.hpp"
#include "load.hpp"

namespace fastproj::cpu {
namespace {

constexpr int kSjltPass = 4;      // tiles of rows added in one pass over the sums of a sample
constexpr int kSjltFold = 256;    // tiles that one fp32 sum adds up before it is folded
constexpr int kSjltRows = 16384;  // rows that a pass takes at most: 64 KiB of a sample

constexpr std::int64_t chunks_of(std::int64_t cols) { return (cols + 15) / 16; }

inline int sjlt_pass(const MatrixKey& key) {
    const int tiles = kSjltRows >> key.block_log2;
    return tiles < 1 ? 1 : tiles < kSjltPass ? tiles : kSjltPass;
}

// Chunk words come 64 columns a Philox call and kLanes calls at a time.
constexpr std::int64_t padded_chunks(std::int64_t cols) {
    constexpr std::int64_t step = 4 * Simd::kLanes;
    return (chunks_of(cols) + step - 1) / step * step;
}

// Philox for kLanes counters that differ in word 1, `kCount` vectors side by side.
template <int kCount>
void philox_columns(const MatrixKey& key, std::int64_t tile, std::uint32_t which,
                    const Simd::U* columns, Simd::U (*words)[4]) {
    using U = Simd::U;
    U c0[kCount], c1[kCount], c2[kCount], c3[kCount];
    for (int i = 0; i < kCount; ++i) {
        c0[i] = U{} + counter0(tile);
        c1[i] = columns[i];
        c2[i] = U{} + sjlt_counter2(key, tile, which);
        c3[i] = U{} + key.stream;
    }
    std::uint32_t k0 = static_cast<std::uint32_t>(key.seed);
    std::uint32_t k1 = static_cast<std::uint32_t>(key.seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
            U hi0, lo0, hi1, lo1;
            Simd::mul_hi_lo(c0[i], kPhiloxM0, hi0, lo0);
            Simd::mul_hi_lo(c2[i], kPhiloxM1, hi1, lo1);
            c0[i] = Simd::xor3(hi1, c1[i], U{} + k0);
            c1[i] = lo1;
            c2[i] = Simd::xor3(hi0, c3[i], U{} + k1);
            c3[i] = lo0;
        }
        k0 += kPhiloxW0;
        k1 += kPhiloxW1;
    }
    for (int i = 0; i < kCount; ++i) {
        words[i][0] = c0[i], words[i][1] = c1[i], words[i][2] = c2[i], words[i][3] = c3[i];
    }
}

// table[h] = the packed chunk of columns col_begin + 16 h of a tile row; col_begin is a multiple of
// 64. Writes padded_chunks(cols) of them.
inline void sjlt_table(const MatrixKey& key, std::int64_t tile, std::uint32_t col_begin,
                       std::int64_t cols, std::uint32_t* table) {
    using U = Simd::U;
    constexpr int kLanes = Simd::kLanes;
    const auto chunks = static_cast<std::uint32_t>(padded_chunks(cols));
    U column;
    for (int i = 0; i < kLanes; ++i) column[i] = col_begin / 64 + static_cast<std::uint32_t>(i);
    for (std::uint32_t h = 0; h < chunks; h += 4 * kLanes) {
        U words[1][4];
        philox_columns<1>(key, tile, 1, &column, words);
        Simd::interleave(words[0], table + h);
        column += static_cast<std::uint32_t>(kLanes);
    }

    const std::uint32_t m = key.block_log2 - 4;
    if (m == 0) {  // one chunk a tile: it reads row chunk 0
        for (std::uint32_t h = 0; h < chunks; ++h) table[h] = sjlt_packed(table[h], 0);
        return;
    }
    const std::uint32_t mask = (1u << m) - 1u, s = (m + 1) >> 1, first = col_begin / 16;
    U lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<std::uint32_t>(i);
    U found[4];
    for (std::uint32_t h = 0; h < chunks;) {
        // Permutations of kLanes neighbouring tile columns at a time.
        const std::uint32_t c = (first + h) >> m;
        const U columns = lane + c;
        philox_columns<1>(key, tile, 0, &columns, &found);
        for (int i = 0; i < kLanes && h < chunks; ++i) {
            const Words p{{found[0][i], found[1][i], found[2][i], found[3][i]}};
            std::uint32_t place = (first + h) & mask;
            const std::uint32_t stop =
                h + (mask + 1 - place) < chunks ? h + (mask + 1 - place) : chunks;
            for (; h + kLanes <= stop; h += kLanes, place += kLanes) {
                U x = ((lane + place) * (p.w[0] | 1u) + p.w[1]) & mask;
                x ^= x >> s;
                x = (x * (p.w[2] | 1u) + p.w[3]) & mask;
                x ^= x >> s;
                U packed;
                std::memcpy(&packed, table + h, sizeof packed);
                packed = packed << 16 | x << 4 | (packed >> 16 & 15u);
                std::memcpy(table + h, &packed, sizeof packed);
            }
            for (; h < stop; ++h, ++place) {
                table[h] = sjlt_packed(table[h], sjlt_row_chunk(p, place, m));
            }
        }
    }
}

// sums[i] += the sign of column i times the row that it reads.
inline void add_chunk(const double* rows, std::uint32_t packed, double* sums) {
    for (std::uint32_t i = 0; i < kSjltChunk; ++i) {
        const double value = rows[sjlt_row(packed, i)];
        sums[i] += sjlt_negative(packed, i) ? -value : value;
    }
}

template <int kTiles>
void add_tiles(const float* const* rows, const std::uint32_t* table, std::int64_t table_ld,
               std::int64_t chunks, float* sums, const char* next, std::int64_t next_step) {
    for (std::int64_t h = 0; h < chunks; ++h) {
        // Chunks are read in random order, so the hardware would not see the next sample coming.
        for (std::int64_t line = 0; line < next_step; ++line) {
            __builtin_prefetch(next + 64 * (h * next_step + line));
        }
        Simd::Chunk sum = Simd::load_chunk(sums + 16 * h);
#pragma GCC unroll 4
        for (int i = 0; i < kTiles; ++i) {
            Simd::add_chunk(rows[i], table + i * table_ld + h, sum);
        }
        Simd::store_chunk(sum, sums + 16 * h);
    }
}

template <int kTiles>
void add_tiles(const double* const* rows, const std::uint32_t* table, std::int64_t table_ld,
               std::int64_t chunks, double* sums, const char*, std::int64_t) {
    for (std::int64_t h = 0; h < chunks; ++h) {
        for (int i = 0; i < kTiles; ++i) {
            add_chunk(rows[i], table[i * table_ld + h], sums + 16 * h);
        }
    }
}

// The rows of one tile of a sample where they lie side by side in one piece, else null.
template <class T>
const T* rows_in_place(const Source& source, std::int64_t b, std::int64_t row_begin,
                       std::int64_t count) {
    constexpr Dtype kInPlace = std::is_same_v<T, double> ? Dtype::kF64 : Dtype::kF32;
    const std::int64_t first = row_begin - source.row_offset;
    if (first < 0 || first + count > source.rows) return nullptr;
    const int at = piece_of(source, first);
    const View& piece = source.pieces[at];
    if (piece.dtype != kInPlace || piece.stride[1] != 1 ||
        first + count > source.piece_begin[at + 1]) {
        return nullptr;
    }
    return static_cast<const T*>(piece.data) + b * piece.stride[0] +
           (first - source.piece_begin[at]);
}

inline std::size_t sjlt_scratch_bytes(const MatrixKey& key, int batch, std::int64_t cols) {
    const std::size_t tables = static_cast<std::size_t>(sjlt_pass(key)) *
                               static_cast<std::size_t>(padded_chunks(cols)) * 4;
    const std::size_t rows = (static_cast<std::size_t>(sjlt_pass(key)) << key.block_log2) * 8;
    const std::size_t sums =
        static_cast<std::size_t>(batch) * static_cast<std::size_t>(chunks_of(cols)) * 16 * 4;
    return tables + rows + sums + 3 * 64;
}

template <class T>
void sjlt_project(const SjltTile& tile) {
    Arena arena(tile.scratch);
    const Source& source = *tile.source;
    const int pass = sjlt_pass(tile.key);
    const std::int64_t chunks = chunks_of(tile.cols), width = 16 * chunks;
    const std::int64_t table_ld = padded_chunks(tile.cols);
    const std::int64_t block = std::int64_t{1} << tile.key.block_log2;
    auto* table = arena.take<std::uint32_t>(static_cast<std::size_t>(pass * table_ld));
    T* staged = arena.take<T>(static_cast<std::size_t>(pass * block));
    float* sums = nullptr;
    if constexpr (std::is_same_v<T, float>) {
        sums = arena.take<float>(static_cast<std::size_t>(tile.batch * width));
        std::memset(sums, 0, static_cast<std::size_t>(tile.batch * width) * sizeof(float));
    }
    const auto fold = [&] {
        if constexpr (std::is_same_v<T, float>) {
            for (int b = 0; b < tile.batch; ++b) {
                for (std::int64_t c = 0; c < width; c += Simd::kLanes) {
                    Simd::F value;
                    float* from = sums + b * width + c;
                    std::memcpy(&value, from, sizeof value);
                    Simd::add_to_double(value, tile.acc + b * tile.acc_ld + c);
                    std::memset(from, 0, sizeof value);
                }
            }
        }
    };

    for (std::int64_t t = tile.tile_begin; t < tile.tile_end; t += pass) {
        const int tiles = static_cast<int>(tile.tile_end - t < pass ? tile.tile_end - t : pass);
        for (int i = 0; i < tiles; ++i) {
            sjlt_table(tile.key, t + i, tile.col_begin, tile.cols, table + i * table_ld);
        }
        for (int b = 0; b < tile.batch; ++b) {
            const T* rows[kSjltPass];
            for (int i = 0; i < tiles; ++i) {
                const std::int64_t row = (t + i) * block;
                rows[i] = rows_in_place<T>(source, tile.batch_begin + b, row, block);
                if (rows[i] == nullptr) {
                    load_span(source, tile.batch_begin + b, row, block, staged + i * block);
                    rows[i] = staged + i * block;
                }
            }
            const bool last = b + 1 == tile.batch;
            const T* next = rows_in_place<T>(source, tile.batch_begin + (last ? 0 : b + 1),
                                             (last ? t + pass : t) * block, tiles * block);
            const std::int64_t lines = tiles * block / 16;
            // A matrix of fewer columns than a tile leaves most rows unread.
            const std::int64_t step =
                next != nullptr && width >= block ? (lines + chunks - 1) / chunks : 0;
            const auto* ahead = reinterpret_cast<const char*>(next);
            T* to;
            if constexpr (std::is_same_v<T, float>) {
                to = sums + b * width;
            } else {
                to = tile.acc + b * tile.acc_ld;
            }
            switch (tiles) {
                case 1:
                    add_tiles<1>(rows, table, table_ld, chunks, to, ahead, step);
                    break;
                case 2:
                    add_tiles<2>(rows, table, table_ld, chunks, to, ahead, step);
                    break;
                case 3:
                    add_tiles<3>(rows, table, table_ld, chunks, to, ahead, step);
                    break;
                default:
                    add_tiles<4>(rows, table, table_ld, chunks, to, ahead, step);
            }
        }
        if ((t + pass - tile.tile_begin) % kSjltFold == 0) fold();
    }
    fold();
}

// Y's chunks go where the forward product reads: y[i] with the sign of column i to row i ^ flip.
template <class T>
void sjlt_transpose(const SjltTransposeTile& tile) {
    Arena arena(tile.scratch);
    const std::int64_t block = std::int64_t{1} << tile.key.block_log2;
    const std::int64_t chunks = chunks_of(tile.cols);
    auto* table = arena.take<std::uint32_t>(static_cast<std::size_t>(padded_chunks(tile.cols)));
    sjlt_table(tile.key, tile.tile, 0, tile.cols, table);
    for (int b = 0; b < tile.batch; ++b) {
        const T* y = static_cast<const T*>(tile.y) + b * tile.y_ld;
        double* out = tile.out + b * block;
        std::memset(out, 0, static_cast<std::size_t>(block) * sizeof(double));
        for (std::int64_t h = 0; h < chunks; ++h) {
            const std::uint32_t packed = table[h];
            for (std::uint32_t i = 0; i < kSjltChunk; ++i) {
                const double value = static_cast<double>(y[16 * h + i]);
                out[sjlt_row(packed, i)] += sjlt_negative(packed, i) ? -value : value;
            }
        }
    }
}

inline void add_sjlt_kernels(KernelTable& table) {
    table.sjlt_scratch_bytes = sjlt_scratch_bytes;
    table.sjlt_f32 = sjlt_project<float>;
    table.sjlt_f64 = sjlt_project<double>;
    table.sjlt_transpose_f32 = sjlt_transpose<float>;
    table.sjlt_transpose_f64 = sjlt_transpose<double>;
}

}  // namespace
}  // namespace fastproj::cpu
