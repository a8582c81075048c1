// The sparse kind: additions of whole chunks of 16 rows, gathered in a fixed order. Expects a Simd
// vocabulary with Chunk before; everything here is local to the translation unit.
#pragma once

#include <type_traits>

#include "arena.hpp"
#include "load.hpp"

namespace fastproj::cpu {
namespace {

constexpr int kSjltPass = 4;      // tiles of rows added in one pass over the sums of a sample
constexpr int kSjltSamples = 2;   // that share the unpacking of a chunk
constexpr int kSjltFold = 256;    // tiles that one fp32 sum adds up before it is folded
constexpr int kSjltRows = 65536;  // rows that a pass takes at most: 256 KiB of a sample
constexpr int kSjltGroup = 32;    // tiles whose tables are made at once, at most
constexpr std::int64_t kSjltTable = 32768;  // chunks of such a group: 128 KiB

constexpr std::int64_t chunks_of(std::int64_t cols) { return (cols + 15) / 16; }

inline int sjlt_pass(const MatrixKey& key) {
    const int tiles = kSjltRows >> key.block_log2;
    return tiles < 1 ? 1 : tiles < kSjltPass ? tiles : kSjltPass;
}

// Tiles whose tables are made at once: a power of two.
inline int sjlt_group(std::int64_t cols) {
    int tiles = kSjltPass;
    while (tiles < kSjltGroup && 2 * tiles * chunks_of(cols) <= kSjltTable) tiles *= 2;
    return tiles;
}

// Words of `count` places, four each, side by side. `count` is a multiple of kStep.
class SjltWords {
  public:
    using W = Simd::W;
    static constexpr int kLanes = Simd::kLanes / 2;
    static constexpr int kStep = kLanes * Simd::kPhiloxLanes;

    SjltWords(const MatrixKey& key, std::uint32_t which)
        : stream_(key.stream), tag_(sjlt_counter2(key, 0, which)) {
        for (std::uint32_t round = 0; round < 10; ++round) {
            keys_[round][0] = static_cast<std::uint32_t>(key.seed) + round * kPhiloxW0;
            keys_[round][1] = static_cast<std::uint32_t>(key.seed >> 32) + round * kPhiloxW1;
        }
    }

    // Counters lie in 64-bit lanes: a product is both its words, and what is above the low 32 bits
    // never matters. A round is a chain of some six cycles, so several vectors go side by side.
    void get(const std::uint64_t* tiles, const std::uint64_t* columns, std::uint32_t* words) const {
        constexpr int kCount = Simd::kPhiloxLanes;
        W c[kCount][4];
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
            std::memcpy(&c[i][0], tiles + i * kLanes, sizeof(W));
            std::memcpy(&c[i][1], columns + i * kLanes, sizeof(W));
            c[i][2] = (c[i][0] >> 24 & ~std::uint64_t{255}) | tag_;
            c[i][3] = W{} + stream_;
        }
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const W k0 = W{} + keys_[round][0], k1 = W{} + keys_[round][1];
#pragma GCC unroll 4
            for (int i = 0; i < kCount; ++i) {
                const W a = Simd::multiply(c[i][0], kPhiloxM0);
                const W b = Simd::multiply(c[i][2], kPhiloxM1);
                c[i][0] = Simd::xor3(b >> 32, c[i][1], k0);
                c[i][1] = b;
                c[i][2] = Simd::xor3(a >> 32, c[i][3], k1);
                c[i][3] = a;
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) Simd::interleave(c[i], words + i * 4 * kLanes);
    }

  private:
    std::uint32_t stream_, tag_;
    std::uint64_t keys_[10][2];
};

constexpr std::int64_t padded(std::int64_t count, std::int64_t step) {
    return (count + step - 1) / step * step;
}

// The packed chunks of `cols` columns from col_begin on, a multiple of 64, in `tiles` rows of
// tiles: tables[i * ld + h].
class SjltTables {
  public:
    static std::size_t bytes(const MatrixKey& key, int tiles, std::int64_t cols) {
        // Columns that begin at the end of a tile touch the most tiles.
        const std::uint32_t block = 1u << key.block_log2;
        const SjltTables sizes(key, block < 64 ? 0 : block - 64, tiles, cols, nullptr);
        return static_cast<std::size_t>(sizes.words_ * 16 + sizes.places_ * 16 +
                                        sizes.tile_words_ * 16) +
               4 * 64;
    }

    SjltTables(const MatrixKey& key, std::uint32_t col_begin, int tiles, std::int64_t cols,
               Arena* arena)
        : ld(4 * ((cols + 63) / 64)),
          key_(key),
          first_chunk_(col_begin / 16),
          chunks_(chunks_of(cols)),
          tile_cols_((((first_chunk_ + ld - 1) >> (key.block_log2 - 4)) -
                      (first_chunk_ >> (key.block_log2 - 4))) +
                     1) {
        words_ = padded(tiles * ld / 4, SjltWords::kStep);
        tile_words_ = padded(tiles * tile_cols_, SjltWords::kStep);
        places_ = words_ > tile_words_ ? words_ : tile_words_;
        if (arena == nullptr) return;
        tables_ = arena->take<std::uint32_t>(static_cast<std::size_t>(words_ * 4));
        permutations_ = arena->take<std::uint32_t>(static_cast<std::size_t>(tile_words_ * 4));
        tiles_ = arena->take<std::uint64_t>(static_cast<std::size_t>(places_));
        columns_ = arena->take<std::uint64_t>(static_cast<std::size_t>(places_));
    }

    const std::uint32_t* operator[](int i) const { return tables_ + i * ld; }
    std::int64_t ld;  // from one row of tiles to the next

    void make(std::int64_t tile, int tiles) {
        get(1, tile, tiles, first_chunk_ / 4, ld / 4, tables_);
        const std::uint32_t m = key_.block_log2 - 4;
        if (m == 0) {  // one chunk a tile: it reads row chunk 0
            for (std::int64_t h = 0; h < tiles * ld; ++h) tables_[h] = sjlt_packed(tables_[h], 0);
            return;
        }
        get(0, tile, tiles, first_chunk_ >> m, tile_cols_, permutations_);
        const std::uint32_t* permutation = permutations_;
        for (int i = 0; i < tiles; ++i) {
            std::uint32_t place = first_chunk_ & ((1u << m) - 1u);
            std::uint32_t* at = tables_ + i * ld;
            std::int64_t left = ld;
            for (std::int64_t c = 0; c < tile_cols_; ++c, permutation += 4) {
                const std::int64_t room = (std::int64_t{1} << m) - place;
                const std::int64_t count = left < room ? left : room;
                place_chunks(permutation, m, place, count, at);
                at += count, left -= count, place = 0;
            }
        }
    }

  private:
    void get(std::uint32_t which, std::int64_t tile, int tiles, std::uint64_t column,
             std::int64_t columns, std::uint32_t* words) {
        std::int64_t count = 0;
        for (int i = 0; i < tiles; ++i) {
            for (std::int64_t c = 0; c < columns; ++c) {
                tiles_[count + c] = static_cast<std::uint64_t>(tile + i);
                columns_[count + c] = column + static_cast<std::uint64_t>(c);
            }
            count += columns;
        }
        const std::int64_t end = padded(count, SjltWords::kStep);
        for (std::int64_t i = count; i < end; ++i) tiles_[i] = columns_[i] = 0;
        const SjltWords philox(key_, which);
        for (std::int64_t i = 0; i < end; i += SjltWords::kStep) {
            philox.get(tiles_ + i, columns_ + i, words + 4 * i);
        }
    }

    // Chunks place .. place + count of one tile.
    static void place_chunks(const std::uint32_t* permutation, std::uint32_t m, std::uint32_t place,
                             std::int64_t count, std::uint32_t* chunks) {
        using U = Simd::U;
        const Words p{{permutation[0], permutation[1], permutation[2], permutation[3]}};
        const std::uint32_t mask = (1u << m) - 1u, s = (m + 1) >> 1;
        U lane;
        for (int i = 0; i < Simd::kLanes; ++i) lane[i] = static_cast<std::uint32_t>(i);
        U start = (lane + place) * (p.w[0] | 1u) + p.w[1];
        std::int64_t h = 0;
        for (; h + Simd::kLanes <= count; h += Simd::kLanes) {
            U x = start & mask;
            start += Simd::kLanes * (p.w[0] | 1u);
            x ^= x >> s;
            x = (x * (p.w[2] | 1u) + p.w[3]) & mask;
            x ^= x >> s;
            U packed;
            std::memcpy(&packed, chunks + h, sizeof packed);
            packed = packed << 16 | x << 4 | (packed >> 16 & 15u);
            std::memcpy(chunks + h, &packed, sizeof packed);
        }
        for (; h < count; ++h) {
            chunks[h] =
                sjlt_packed(chunks[h], sjlt_row_chunk(p, place + static_cast<std::uint32_t>(h), m));
        }
    }

    MatrixKey key_;
    std::uint32_t first_chunk_;
    std::int64_t chunks_, tile_cols_;
    std::int64_t words_, tile_words_, places_;
    std::uint32_t *tables_ = nullptr, *permutations_ = nullptr;
    std::uint64_t *tiles_ = nullptr, *columns_ = nullptr;
};

// A pass of add_tiles. sums[s][16 h + i] += the sign of column i of chunk h times the row that it
// reads, one tile after the other.
template <class T, int kSamples>
struct SjltPass {
    const T* rows[kSamples];  // [tiles * block]
    std::int64_t block;
    const std::uint32_t* table;  // [tiles, table_ld]
    std::int64_t table_ld, chunks;
    T* sums;  // [kSamples, sums_ld]
    std::int64_t sums_ld;
    // Rows of a later pass, to prefetch: chunks are read in random order, which the hardware can't
    // foresee.
    const char* next[kSamples];
    std::int64_t next_lines;
};

// Adds chunks begin .. end. Each chunk prefetches kAhead cache lines of a later pass: many at once
// would wait for each other.
template <int kTiles, int kAhead, class T, int kSamples>
void add_chunks(const SjltPass<T, kSamples>& from, std::int64_t begin, std::int64_t end) {
    const SjltPass<T, kSamples> pass = from;  // into registers: no store below changes it
    const typename Chunk<T>::Unpack unpack;
    for (std::int64_t h = begin; h < end; ++h) {
        T* sums = pass.sums + 16 * h;
        Chunk<T> sum[kSamples];
#pragma GCC unroll 8
        for (int s = 0; s < kSamples; ++s) sum[s].load(sums + s * pass.sums_ld);
#pragma GCC unroll 8
        for (int i = 0; i < kTiles; ++i) {
            if (i < kAhead) {
#pragma GCC unroll 8
                for (int s = 0; s < kSamples; ++s) {
                    __builtin_prefetch(pass.next[s] + 64 * (kAhead * h + i));
                }
            }
            const std::uint32_t* packed = pass.table + i * pass.table_ld + h;
            std::uint16_t low;
            std::memcpy(&low, packed, sizeof low);
            const std::int64_t first = i * pass.block + (low & 0xfff0);
            const auto pick = unpack(packed);
#pragma GCC unroll 8
            for (int s = 0; s < kSamples; ++s) sum[s].add(pass.rows[s] + first, pick);
        }
#pragma GCC unroll 8
        for (int s = 0; s < kSamples; ++s) sum[s].store(sums + s * pass.sums_ld);
    }
}

template <int kTiles, class T, int kSamples>
void add_tiles(const SjltPass<T, kSamples>& pass) {
    const std::int64_t chunks = pass.chunks, lines = pass.next_lines;
    if (lines <= chunks) {
        add_chunks<kTiles, 1>(pass, 0, lines);
        add_chunks<kTiles, 0>(pass, lines, chunks);
    } else {
        const std::int64_t split =
            (lines + kTiles - 1) / kTiles < chunks ? (lines + kTiles - 1) / kTiles : chunks;
        add_chunks<kTiles, kTiles>(pass, 0, split);
        add_chunks<kTiles, 0>(pass, split, chunks);
    }
}

inline std::size_t sjlt_scratch_bytes(const MatrixKey& key, int batch, std::int64_t cols) {
    const std::size_t tables = SjltTables::bytes(key, sjlt_group(cols), cols);
    const std::size_t rows =
        (static_cast<std::size_t>(kSjltSamples * sjlt_pass(key)) << key.block_log2) * 8;
    const std::size_t sums =
        static_cast<std::size_t>(batch) * static_cast<std::size_t>(chunks_of(cols)) * 16 * 4;
    return tables + rows + sums + 3 * 64;
}

// `tiles` tiles from t on for samples b .. b + kSamples.
template <class T, int kSamples>
void sjlt_pass_add(const SjltTile& tile, SjltPass<T, kSamples> pass, int b, std::int64_t t,
                   int tiles, T* staged, int next_b, std::int64_t next_t) {
    constexpr Dtype kInPlace = std::is_same_v<T, double> ? Dtype::kF64 : Dtype::kF32;
    const std::int64_t block = pass.block;
    for (int s = 0; s < kSamples; ++s) {
        const std::int64_t sample = tile.batch_begin + b + s;
        const RawRows raw = raw_rows(*tile.source, sample, t * block, tiles * block);
        if (raw.at != nullptr && raw.dtype == kInPlace) {
            pass.rows[s] = reinterpret_cast<const T*>(raw.at);
        } else {
            T* to = staged + s * tiles * block;
            load_span(*tile.source, sample, t * block, tiles * block, to);
            pass.rows[s] = to;
        }
        const RawRows next =
            raw_rows(*tile.source, tile.batch_begin + next_b + s, next_t * block, tiles * block);
        pass.next[s] = next.at;
        pass.next_lines =
            next.at == nullptr || (s > 0 && pass.next_lines == 0) ? 0 : next.bytes / 64;
    }
    // A matrix of fewer columns than a tile leaves most rows unread.
    if (pass.chunks * 16 < block &&
        reinterpret_cast<const char*>(pass.rows[0]) != reinterpret_cast<const char*>(staged))
        pass.next_lines = 0;
    pass.sums += b * pass.sums_ld;
    if (tiles == kSjltPass) {
        add_tiles<kSjltPass>(pass);
        return;
    }
    for (int i = 0; i < tiles; ++i) {
        add_tiles<1>(pass);
        pass.next_lines = 0;
        pass.table += pass.table_ld;
        for (int s = 0; s < kSamples; ++s) pass.rows[s] += block;
    }
}

template <class T>
void sjlt_project(const SjltTile& tile) {
    Arena arena(tile.scratch);
    const std::int64_t chunks = chunks_of(tile.cols), width = 16 * chunks;
    // As scratch was sized: by the widest slab, whose stride this is. The last one may be narrower.
    const int group = sjlt_group(tile.acc_ld), pass = sjlt_pass(tile.key);
    SjltTables tables(tile.key, tile.col_begin, group, tile.cols, &arena);
    T* staged = arena.take<T>(static_cast<std::size_t>(kSjltSamples * pass) << tile.key.block_log2);
    T* sums;
    std::int64_t sums_ld;
    if constexpr (std::is_same_v<T, float>) {
        sums = arena.take<float>(static_cast<std::size_t>(tile.batch * width));
        std::memset(sums, 0, static_cast<std::size_t>(tile.batch * width) * sizeof(float));
        sums_ld = width;
    } else {
        sums = tile.acc;
        sums_ld = tile.acc_ld;
        for (int b = 0; b < tile.batch; ++b) {
            std::memset(sums + b * sums_ld, 0, static_cast<std::size_t>(width) * sizeof(double));
        }
    }
    bool folded = false;
    const auto fold = [&] {
        if constexpr (std::is_same_v<T, float>) {
            for (int b = 0; b < tile.batch; ++b) {
                for (std::int64_t c = 0; c < width; c += Simd::kLanes) {
                    Simd::F value;
                    float* from = sums + b * width + c;
                    std::memcpy(&value, from, sizeof value);
                    double* to = tile.acc + b * tile.acc_ld + c;
                    if (!folded) std::memset(to, 0, Simd::kLanes * sizeof(double));
                    Simd::add_to_double(value, to);
                    std::memset(from, 0, sizeof value);
                }
            }
            folded = true;
        }
    };

    const std::int64_t block = std::int64_t{1} << tile.key.block_log2;
    for (std::int64_t t = tile.tile_begin; t < tile.tile_end; t += group) {
        const int tiles = static_cast<int>(tile.tile_end - t < group ? tile.tile_end - t : group);
        tables.make(t, tiles);
        for (int b = 0; b < tile.batch;) {
            const int samples = tile.batch - b >= kSjltSamples ? kSjltSamples : 1;
            for (int i = 0; i < tiles; i += pass) {
                const int here = tiles - i < pass ? tiles - i : pass;
                // A pass over small tiles takes less time than memory needs to answer.
                const int ahead = block <= 1024 ? 2 * pass : pass;
                std::int64_t next_t = t + i + ahead;
                int next_b = b;
                if (i + ahead >= tiles) {
                    next_t -= tiles, next_b = b + samples;
                    if (next_b + samples > tile.batch) next_t += tiles, next_b = 0;
                }
                const auto add = [&](auto pass) {
                    sjlt_pass_add(tile, pass, b, t + i, here, staged, next_b, next_t);
                };
                if (samples == kSjltSamples) {
                    add(SjltPass<T, kSjltSamples>{
                        {}, block, tables[i], tables.ld, chunks, sums, sums_ld, {}, 0});
                } else {
                    add(SjltPass<T, 1>{
                        {}, block, tables[i], tables.ld, chunks, sums, sums_ld, {}, 0});
                }
            }
            b += samples;
        }
        if ((t + group - tile.tile_begin) % kSjltFold == 0) fold();
    }
    fold();
}

// Y's chunks go where the forward product reads: y[i] with the sign of column i to row i ^ flip.
template <class T>
void sjlt_transpose(const SjltTransposeTile& tile) {
    Arena arena(tile.scratch);
    const std::int64_t block = std::int64_t{1} << tile.key.block_log2;
    const std::int64_t chunks = chunks_of(tile.cols);
    SjltTables tables(tile.key, 0, 1, tile.cols, &arena);
    tables.make(tile.tile, 1);
    const std::uint32_t* table = tables[0];
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

inline KernelTable with_sjlt_kernels(KernelTable table) {
    table.sjlt_scratch_bytes = sjlt_scratch_bytes;
    table.sjlt_f32 = sjlt_project<float>;
    table.sjlt_f64 = sjlt_project<double>;
    table.sjlt_transpose_f32 = sjlt_transpose<float>;
    table.sjlt_transpose_f64 = sjlt_transpose<double>;
    return table;
}

}  // namespace
}  // namespace fastproj::cpu
