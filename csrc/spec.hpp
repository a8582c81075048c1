// The projection matrix, spec v1, for host and device: R[p, k] as a pure function of
// (kind, seed, stream, p, k), and of block for the sparse kind. The readable truth is
// fastproj/spec.py; both reproduce tests/data.
#pragma once

#include <cstdint>

#include "gauss_table.hpp"

#if defined(__CUDACC__)
#define FASTPROJ_HOST_DEVICE __host__ __device__ __forceinline__
#else
// static: each instruction set keeps its own copy, so none leaks into code for lesser machines.
#define FASTPROJ_HOST_DEVICE static inline
#endif

namespace fastproj {

constexpr int kSpecVersion = 1;

enum class Kind : std::uint32_t { kRademacher = 0, kGaussian = 1, kSjlt = 2 };

// Everything that names a matrix. Columns and rows are not part of it: R has no shape.
struct MatrixKey {
    Kind kind;
    std::uint32_t stream;
    std::uint64_t seed;
    std::uint32_t block_log2 = 0;  // kSjlt only: log2 of `block`, 4 to 16
};

// Rows that one Philox block covers: 512 (Rademacher, one bit a row) or 32 (Gaussian, 16 bits).
FASTPROJ_HOST_DEVICE constexpr int block_rows_log2(Kind kind) {
    return kind == Kind::kRademacher ? 9 : 5;
}
FASTPROJ_HOST_DEVICE constexpr std::int64_t block_rows(Kind kind) {
    return std::int64_t{1} << block_rows_log2(kind);
}

struct Words {
    std::uint32_t w[4];
};

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr std::uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr std::uint32_t kPhiloxW1 = 0xBB67AE85u;

// Philox4x32-10 (Salmon et al. 2011): ten rounds, the key bumped before each round but the first.
FASTPROJ_HOST_DEVICE Words philox4x32_10(Words c, std::uint32_t key0, std::uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = static_cast<std::uint64_t>(kPhiloxM0) * c.w[0];
        const std::uint64_t b = static_cast<std::uint64_t>(kPhiloxM1) * c.w[2];
        c = {{static_cast<std::uint32_t>(b >> 32) ^ c.w[1] ^ key0, static_cast<std::uint32_t>(b),
              static_cast<std::uint32_t>(a >> 32) ^ c.w[3] ^ key1, static_cast<std::uint32_t>(a)}};
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    return c;
}

// Counter words that do not depend on the column (which is word 1).
FASTPROJ_HOST_DEVICE std::uint32_t counter0(std::int64_t block) {
    return static_cast<std::uint32_t>(block);
}
FASTPROJ_HOST_DEVICE std::uint32_t counter2(Kind kind, std::int64_t block, std::uint32_t lane) {
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(block) >> 32) << 8 |
           static_cast<std::uint32_t>(kind) << 2 | lane;
}

// The four random words shared by the rows of one (block, lane) in column k.
FASTPROJ_HOST_DEVICE Words block_words(const MatrixKey& key, std::int64_t block, std::uint32_t lane,
                                       std::uint32_t column) {
    const Words counter{{counter0(block), column, counter2(key.kind, block, lane), key.stream}};
    return philox4x32_10(counter, static_cast<std::uint32_t>(key.seed),
                         static_cast<std::uint32_t>(key.seed >> 32));
}

// Where row p finds its bits: lane (p >> 1) & 3, then a word, a half of it and a bit or 16 bits.
FASTPROJ_HOST_DEVICE std::uint32_t row_lane(std::int64_t p) {
    return static_cast<std::uint32_t>(p >> 1) & 3u;
}

// 0 -> +1, 1 -> -1.
FASTPROJ_HOST_DEVICE std::uint32_t rademacher_bit(const Words& words, std::int64_t p) {
    const std::uint32_t word = words.w[(p >> 7) & 3];
    return (word >> (((p >> 3) & 15) + 16 * (p & 1))) & 1u;
}

FASTPROJ_HOST_DEVICE std::uint32_t gaussian_code(const Words& words, std::int64_t p) {
    const std::uint32_t word = words.w[(p >> 3) & 3];
    return (word >> (16 * (p & 1))) & 0xffffu;
}

// Bit 15 is the sign; bits 14..7 and bit 1 index the table (bank-conflict-free on GPUs).
FASTPROJ_HOST_DEVICE std::uint32_t gaussian_index(std::uint32_t code) {
    return ((code >> 7) & 255u) << 1 | ((code >> 1) & 1u);
}

// The entry as bf16 bits: exact, the same on every machine.
FASTPROJ_HOST_DEVICE std::uint32_t gaussian_bf16(std::uint32_t code, const std::uint16_t* table) {
    return table[gaussian_index(code)] | (code & 0x8000u);
}

// ---- kSjlt: tiles of block x block, each a signed permutation matrix --------------------------

// Rows of a tile move in chunks of 16: column chunk h of tile (t, c) reads row chunk x(h), its rows
// xor-ed among each other, each with a sign.
constexpr std::uint32_t kSjltChunk = 16;

FASTPROJ_HOST_DEVICE std::uint32_t sjlt_counter2(const MatrixKey& key, std::int64_t tile,
                                                 std::uint32_t which) {
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(tile) >> 32) << 8 |
           (key.block_log2 - 4) << 4 | static_cast<std::uint32_t>(Kind::kSjlt) << 2 | which;
}

// Philox of tile row t: which = 0 gives the permutation of tile column c = column, which = 1 the
// words of the four chunks at columns 64 * column.
FASTPROJ_HOST_DEVICE Words sjlt_words(const MatrixKey& key, std::int64_t tile, std::uint32_t column,
                                      std::uint32_t which) {
    const Words counter{{counter0(tile), column, sjlt_counter2(key, tile, which), key.stream}};
    return philox4x32_10(counter, static_cast<std::uint32_t>(key.seed),
                         static_cast<std::uint32_t>(key.seed >> 32));
}

// The row chunk x that column chunk h of the tile reads: a bijection of 0 .. 2^m - 1.
FASTPROJ_HOST_DEVICE std::uint32_t sjlt_row_chunk(const Words& permutation, std::uint32_t h,
                                                  std::uint32_t m) {
    const std::uint32_t mask = (1u << m) - 1u, s = (m + 1) >> 1;
    std::uint32_t x = (h * (permutation.w[0] | 1u) + permutation.w[1]) & mask;
    x ^= x >> s;
    x = (x * (permutation.w[2] | 1u) + permutation.w[3]) & mask;
    return x ^ x >> s;
}

// One column chunk in 32 bits: bits 0..3 what the rows are xor-ed by, 4..15 the row chunk, 16..31
// the signs of the columns. `word` is the chunk's own of sjlt_words(.., 1).
FASTPROJ_HOST_DEVICE std::uint32_t sjlt_packed(std::uint32_t word, std::uint32_t row_chunk) {
    return word << 16 | row_chunk << 4 | ((word >> 16) & 15u);
}

// The row within its tile that column i of a packed chunk reads, and whether its sign is -1.
FASTPROJ_HOST_DEVICE std::uint32_t sjlt_row(std::uint32_t packed, std::uint32_t i) {
    return (packed ^ i) & 0xffffu;
}
FASTPROJ_HOST_DEVICE std::uint32_t sjlt_negative(std::uint32_t packed, std::uint32_t i) {
    return packed >> (16 + i) & 1u;
}

// The packed chunk that holds column k of tile row `tile`.
FASTPROJ_HOST_DEVICE std::uint32_t sjlt_chunk(const MatrixKey& key, std::int64_t tile,
                                              std::uint32_t k) {
    const std::uint32_t m = key.block_log2 - 4;
    const std::uint32_t h = (k >> 4) & ((1u << m) - 1u);
    const Words permutation = sjlt_words(key, tile, k >> key.block_log2, 0);
    const Words words = sjlt_words(key, tile, k >> 6, 1);
    return sjlt_packed(words.w[(k >> 4) & 3], sjlt_row_chunk(permutation, h, m));
}

// R[p, k]: -1, 0 or +1.
FASTPROJ_HOST_DEVICE int sjlt_entry(const MatrixKey& key, std::int64_t p, std::uint32_t k) {
    const std::int64_t tile = p >> key.block_log2;
    const std::uint32_t packed = sjlt_chunk(key, tile, k);
    const auto row = static_cast<std::uint32_t>(p - (tile << key.block_log2));
    if (row != sjlt_row(packed, k & 15u)) return 0;
    return sjlt_negative(packed, k & 15u) != 0 ? -1 : 1;
}

// R[p, k] as bf16 bits, of the dense kinds. `table` is kGaussTable or a copy of it in the caller's
// address space.
FASTPROJ_HOST_DEVICE std::uint32_t entry_bf16(const MatrixKey& key, std::int64_t p, std::uint32_t k,
                                              const std::uint16_t* table) {
    const Words words = block_words(key, p >> block_rows_log2(key.kind), row_lane(p), k);
    if (key.kind == Kind::kRademacher) {
        return 0x3f80u | rademacher_bit(words, p) << 15;
    }
    return gaussian_bf16(gaussian_code(words, p), table);
}

}  // namespace fastproj
