// Philox4x32-10 for many columns at once. What does not change from block to block is computed
// once. A Simd vocabulary must be included before. Everything here is local to the translation
// unit.
#pragma once

#include "kernels.hpp"

namespace fastproj::cpu {
namespace {

// Only counter word 0 (the block) changes along P, and only word 1 (the column) along K. So round 1
// is scalar except for an xor with the column. In round 2 only the product with word 0 depends on
// the column, and it does not depend on the block. It is kept here, so that a block costs 7.5
// vector rounds instead of 10.
class ColumnWords {
  public:
    using U = Simd::U;
    static constexpr int kLanes = Simd::kLanes;

    static constexpr std::size_t bytes(int cols) {
        return static_cast<std::size_t>(4 * 2) * static_cast<std::size_t>(cols) * 4;
    }

    // Room for 2 x 4 x cols words at `storage`; cols is a multiple of the vector length.
    ColumnWords(const MatrixKey& key, std::uint32_t col_begin, int cols, void* storage)
        : key_(key),
          col_begin_(col_begin),
          vectors_(cols / kLanes),
          kept_(static_cast<U*>(storage)) {
        for (std::uint32_t round = 1; round <= 10; ++round) {
            round_keys_[round][0] = low(key.seed) + (round - 1) * kPhiloxW0;
            round_keys_[round][1] = high(key.seed) + (round - 1) * kPhiloxW1;
        }
    }

    // Call before the words of a block are asked for.
    void set_block(std::int64_t block) {
        const std::uint32_t c2 = counter2(key_.kind, block, 0);
        if (!ready_ || c2 != c2_) fill(c2);
        const std::uint64_t a = static_cast<std::uint64_t>(kPhiloxM0) * counter0(block);
        // Word 2 and 3 after round 1, scalars.
        const std::uint32_t r1c2 = high(a) ^ key_.stream ^ round_keys_[1][1];
        r1c3_ = low(a);
        const std::uint64_t b = static_cast<std::uint64_t>(kPhiloxM1) * r1c2;
        r2c1_ = low(b);
        for (std::uint32_t lane = 0; lane < 4; ++lane) {
            const std::uint32_t r1c1 = low(static_cast<std::uint64_t>(kPhiloxM1) * (c2_ | lane));
            const std::uint32_t r2c0 = high(b) ^ r1c1 ^ round_keys_[2][0];
            const std::uint64_t a3 = static_cast<std::uint64_t>(kPhiloxM0) * r2c0;
            r3_hi_[lane] = high(a3);
            r3_lo_[lane] = low(a3);
        }
    }

    // words[lane][0..4) of the block for the vector of columns col_begin + v * kLanes, lanes lane
    // to lane + kCount. A round is a chain of some six cycles, so several lanes go side by side.
    template <int kCount>
    void get(std::uint32_t lane, int v, U (*words)[4]) const {
        const U* kept = kept_ + (static_cast<std::ptrdiff_t>(v) * 4 + lane) * 2;
        U c0[kCount], c1[kCount], c2[kCount], c3[kCount];
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
            U hi1, lo1;
            Simd::mul_hi_lo(kept[2 * i] ^ (r1c3_ ^ round_keys_[2][1]), kPhiloxM1, hi1, lo1);
            c0[i] = hi1 ^ (r2c1_ ^ round_keys_[3][0]);
            c1[i] = lo1;
            c2[i] = kept[2 * i + 1] ^ (r3_hi_[lane + i] ^ round_keys_[3][1]);
            c3[i] = U{} + r3_lo_[lane + i];
        }
#pragma GCC unroll 7
        for (int round = 4; round <= 10; ++round) {
            const std::uint32_t k0 = round_keys_[round][0], k1 = round_keys_[round][1];
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
        }
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
            words[i][0] = c0[i], words[i][1] = c1[i], words[i][2] = c2[i], words[i][3] = c3[i];
        }
    }

    // All four lanes.
    void get_all(int v, U words[4][4]) const {
        for (std::uint32_t lane = 0; lane < 4; lane += Simd::kPhiloxLanes) {
            get<Simd::kPhiloxLanes>(lane, v, words + lane);
        }
    }

  private:
    static std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
    static std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }

    void fill(std::uint32_t c2) {
        ready_ = true;
        c2_ = c2;
        U column;
        for (int i = 0; i < kLanes; ++i) column[i] = col_begin_ + static_cast<std::uint32_t>(i);
        for (int v = 0; v < vectors_; ++v) {
            for (std::uint32_t lane = 0; lane < 4; ++lane) {
                const std::uint64_t b = static_cast<std::uint64_t>(kPhiloxM1) * (c2 | lane);
                U* kept = kept_ + (static_cast<std::ptrdiff_t>(v) * 4 + lane) * 2;
                Simd::mul_hi_lo(column ^ (high(b) ^ low(key_.seed)), kPhiloxM0, kept[0], kept[1]);
            }
            column += static_cast<std::uint32_t>(kLanes);
        }
    }

    MatrixKey key_;
    std::uint32_t col_begin_;
    int vectors_;
    U* kept_;
    std::uint32_t round_keys_[11][2];  // from memory a broadcast costs no arithmetic unit
    bool ready_ = false;
    std::uint32_t c2_ = 0;
    std::uint32_t r1c3_ = 0, r2c1_ = 0;
    std::uint32_t r3_hi_[4] = {}, r3_lo_[4] = {};
};

}  // namespace
}  // namespace fastproj::cpu
