// Vector vocabulary for NEON (AArch64's baseline).
#pragma once

#include <arm_neon.h>

#include "simd.hpp"

namespace fastproj::cpu {
namespace {

struct Simd : Vectors<16> {
    static constexpr int kDenseBatch = 4;   // 4 x 2 accumulators of the 32 registers
    static constexpr int kPhiloxLanes = 2;  // Philox lanes computed side by side

    static void mul_hi_lo(U x, std::uint32_t m, U& hi, U& lo) {
        const uint32x4_t factor = vdupq_n_u32(m);
        const auto low = (uint32x4_t)vmull_u32(vget_low_u32((uint32x4_t)x), vget_low_u32(factor));
        const auto high = (uint32x4_t)vmull_high_u32((uint32x4_t)x, factor);
        hi = (U)vuzp2q_u32(low, high);
        lo = (U)vuzp1q_u32(low, high);
    }

    static void add_to_double(F x, double* acc) {
        const float64x2_t low = vcvt_f64_f32(vget_low_f32((float32x4_t)x));
        const float64x2_t high = vcvt_high_f64_f32((float32x4_t)x);
        vst1q_f64(acc, vaddq_f64(vld1q_f64(acc), low));
        vst1q_f64(acc + 2, vaddq_f64(vld1q_f64(acc + 2), high));
    }

    // Numbers of 32 bits in 64-bit lanes; what is above them never matters.
    static W multiply(W x, std::uint32_t m) {
        return (W)vmull_u32(vmovn_u64((uint64x2_t)x), vdup_n_u32(m));
    }
    // to[4 i + j] = the low 32 bits of words[j][i]
    static void interleave(const W words[4], std::uint32_t* to) {
        const uint32x4_t first = vtrn1q_u32((uint32x4_t)words[0], (uint32x4_t)words[1]);
        const uint32x4_t second = vtrn1q_u32((uint32x4_t)words[2], (uint32x4_t)words[3]);
        vst1q_u64(reinterpret_cast<std::uint64_t*>(to),
                  vzip1q_u64((uint64x2_t)first, (uint64x2_t)second));
        vst1q_u64(reinterpret_cast<std::uint64_t*>(to + 4),
                  vzip2q_u64((uint64x2_t)first, (uint64x2_t)second));
    }

    static void gauss(U word, F& low, F& high) {
        U low_bits, high_bits;
        for (int i = 0; i < kLanes; ++i) {
            low_bits[i] = gaussian_bf16(word[i] & 0xffffu, kGaussTable);
            high_bits[i] = gaussian_bf16(word[i] >> 16, kGaussTable);
        }
        low = (F)(low_bits << 16);
        high = (F)(high_bits << 16);
    }
};

// For tbl: the bytes of entry `lane` in a table of 32-bit numbers. What an entry's number has above
// its low byte must be zero, as tbl gives 0 beyond the table.
inline uint8x16_t table_bytes(uint32x4_t entry) {
    return (uint8x16_t)vmlaq_n_u32(vdupq_n_u32(0x03020100u), entry, 0x04040404u);
}

template <>
struct Chunk<float> {
    struct Pick {
        std::uint32_t flip;  // its bits 2 and 3 permute the quarters
        uint8x16_t row;      // of a quarter, for tbl
        uint32x4_t sign[4];
    };
    struct Unpack {
        Pick operator()(const std::uint32_t* packed) const {
            static constexpr std::uint32_t kLane[4] = {0, 1, 2, 3};
            const uint32x4_t lane = vld1q_u32(kLane);
            const uint32x4_t word = vld1q_dup_u32(packed);
            const uint32x4_t within = vandq_u32(veorq_u32(word, lane), vdupq_n_u32(3));
            Pick pick{*packed & 12u, table_bytes(within), {}};
            for (int i = 0; i < 4; ++i) {
                const int32x4_t shift = vsubq_s32(vdupq_n_s32(15 - 4 * i), (int32x4_t)lane);
                pick.sign[i] = vandq_u32(vshlq_u32(word, shift), vdupq_n_u32(0x80000000u));
            }
            return pick;
        }
    };

    float32x4_t sum[4];

    void load(const float* from) {
        for (int i = 0; i < 4; ++i) sum[i] = vld1q_f32(from + 4 * i);
    }
    void store(float* to) const {
        for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, sum[i]);
    }
    void add(const float* rows, const Pick& pick) {
        for (std::uint32_t i = 0; i < 4; ++i) {
            const float32x4_t quarter = vld1q_f32(rows + (4 * i ^ pick.flip));
            const uint8x16_t value = vqtbl1q_u8((uint8x16_t)quarter, pick.row);
            sum[i] = vaddq_f32(sum[i], (float32x4_t)veorq_u32((uint32x4_t)value, pick.sign[i]));
        }
    }
};

template <>
struct Chunk<double> {
    struct Pick {
        std::uint32_t flip;  // its bits 1 to 3 permute the pairs
        uint8x16_t row;      // of a pair, for tbl
        uint64x2_t sign[8];
    };
    struct Unpack {
        Pick operator()(const std::uint32_t* packed) const {
            static constexpr std::uint64_t kColumn[2] = {0, 1};
            static constexpr std::uint32_t kHalf[4] = {0, 1, 2, 3};  // of the doubles of a pair
            const uint64x2_t column = vld1q_u64(kColumn);
            const uint64x2_t word = vdupq_n_u64(*packed);
            const uint32x4_t within = veorq_u32(vld1q_u32(kHalf), vdupq_n_u32(2 * (*packed & 1u)));
            Pick pick{*packed & 14u, table_bytes(within), {}};
            for (int i = 0; i < 8; ++i) {
                const int64x2_t shift = vsubq_s64(vdupq_n_s64(47 - 2 * i), (int64x2_t)column);
                pick.sign[i] = vandq_u64(vshlq_u64(word, shift), vdupq_n_u64(1ull << 63));
            }
            return pick;
        }
    };

    float64x2_t sum[8];

    void load(const double* from) {
        for (int i = 0; i < 8; ++i) sum[i] = vld1q_f64(from + 2 * i);
    }
    void store(double* to) const {
        for (int i = 0; i < 8; ++i) vst1q_f64(to + 2 * i, sum[i]);
    }
    void add(const double* rows, const Pick& pick) {
        for (std::uint32_t i = 0; i < 8; ++i) {
            const float64x2_t pair = vld1q_f64(rows + (2 * i ^ pick.flip));
            const uint8x16_t value = vqtbl1q_u8((uint8x16_t)pair, pick.row);
            sum[i] = vaddq_f64(sum[i], (float64x2_t)veorq_u64((uint64x2_t)value, pick.sign[i]));
        }
    }
};

}  // namespace
}  // namespace fastproj::cpu
