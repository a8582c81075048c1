// Vector vocabulary for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "simd.hpp"

namespace fastproj::cpu {
namespace {

// The Gaussian magnitudes as float bits: 32-bit gathers fetch one entry a lane.
struct GaussFloatTable {
    std::uint32_t bits[512];
    constexpr GaussFloatTable() : bits() {
        for (int i = 0; i < 512; ++i) bits[i] = static_cast<std::uint32_t>(kGaussTable[i]) << 16;
    }
};
constexpr GaussFloatTable kGaussFloatTable;

struct Simd : Vectors<32> {
    static constexpr int kDenseBatch = 4;   // 4 x 2 accumulators of the 16 registers
    static constexpr int kPhiloxLanes = 2;  // Philox lanes computed side by side

    static void mul_hi_lo(U x, std::uint32_t m, U& hi, U& lo) {
        const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
        const __m256i even = _mm256_mul_epu32((__m256i)x, factor);
        const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
        hi = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
        lo = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    }

    static void add_to_double(F x, double* acc) {
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
        _mm256_storeu_pd(acc, _mm256_add_pd(_mm256_loadu_pd(acc), low));
        _mm256_storeu_pd(acc + 4, _mm256_add_pd(_mm256_loadu_pd(acc + 4), high));
    }

    // Numbers of 32 bits in 64-bit lanes; what is above them never matters.
    static W multiply(W x, std::uint32_t m) {
        return (W)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
    }
    // to[4 i + j] = the low 32 bits of words[j][i]
    static void interleave(const W words[4], std::uint32_t* to) {
        const auto pairs = [](W low, W high) {
            return _mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0xAA);
        };
        const __m256i first = pairs(words[0], words[1]), second = pairs(words[2], words[3]);
        const __m256i even = _mm256_unpacklo_epi64(first, second);
        const __m256i odd = _mm256_unpackhi_epi64(first, second);
        auto* at = reinterpret_cast<__m256i*>(to);
        _mm256_storeu_si256(at, _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256(at + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }

    static F gauss_one(U code) {  // code: 16 bits in the low half of each lane
        const U index = (code >> 6 & 0x1feu) | (code >> 1 & 1u);
        const __m256i magnitude = _mm256_i32gather_epi32(
            reinterpret_cast<const int*>(kGaussFloatTable.bits), (__m256i)index, 4);
        return (F)((U)magnitude | (code & 0x8000u) << 16);
    }
    static void gauss(U word, F& low, F& high) {
        low = gauss_one(word & 0xffffu);
        high = gauss_one(word >> 16);
    }
};

template <>
struct Chunk<float> {
    struct Pick {
        std::uint32_t flip;  // its bit 3 swaps the halves
        __m256i row;         // vpermps takes 3 bits of it
        __m256 sign[2];
    };
    struct Unpack {
        Pick operator()(const std::uint32_t* packed) const {
            const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
            const __m256i word = _mm256_broadcastd_epi32(_mm_loadu_si32(packed));
            Pick pick{*packed & 8u, _mm256_xor_si256(word, lane), {}};
            for (int i = 0; i < 2; ++i) {
                const __m256i shift = _mm256_sub_epi32(_mm256_set1_epi32(15 - 8 * i), lane);
                pick.sign[i] =
                    _mm256_and_ps((__m256)_mm256_sllv_epi32(word, shift), _mm256_set1_ps(-0.0f));
            }
            return pick;
        }
    };

    __m256 sum[2];

    void load(const float* from) {
        for (int i = 0; i < 2; ++i) sum[i] = _mm256_loadu_ps(from + 8 * i);
    }
    void store(float* to) const {
        for (int i = 0; i < 2; ++i) _mm256_storeu_ps(to + 8 * i, sum[i]);
    }
    void add(const float* rows, const Pick& pick) {
        for (std::uint32_t i = 0; i < 2; ++i) {
            const __m256 value =
                _mm256_permutevar8x32_ps(_mm256_loadu_ps(rows + (8 * i ^ pick.flip)), pick.row);
            sum[i] = _mm256_add_ps(sum[i], _mm256_xor_ps(value, pick.sign[i]));
        }
    }
};

template <>
struct Chunk<double> {
    struct Pick {
        std::uint32_t flip;  // its bits 2 and 3 permute the quarters
        __m256i row;         // of a quarter: for vpermps, a double being two lanes
        __m256d sign[4];
    };
    struct Unpack {
        Pick operator()(const std::uint32_t* packed) const {
            const __m256i column = _mm256_set_epi64x(3, 2, 1, 0);
            const __m256i word = _mm256_set1_epi64x(*packed);
            const __m256i within = _mm256_set1_epi32(static_cast<int>(2 * (*packed & 3u)));
            const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
            Pick pick{*packed & 12u, _mm256_xor_si256(lane, within), {}};
            for (int i = 0; i < 4; ++i) {
                const __m256i shift = _mm256_sub_epi64(_mm256_set1_epi64x(47 - 4 * i), column);
                pick.sign[i] =
                    _mm256_and_pd((__m256d)_mm256_sllv_epi64(word, shift), _mm256_set1_pd(-0.0));
            }
            return pick;
        }
    };

    __m256d sum[4];

    void load(const double* from) {
        for (int i = 0; i < 4; ++i) sum[i] = _mm256_loadu_pd(from + 4 * i);
    }
    void store(double* to) const {
        for (int i = 0; i < 4; ++i) _mm256_storeu_pd(to + 4 * i, sum[i]);
    }
    void add(const double* rows, const Pick& pick) {
        for (std::uint32_t i = 0; i < 4; ++i) {
            const __m256d quarter = _mm256_loadu_pd(rows + (4 * i ^ pick.flip));
            const __m256d value = (__m256d)_mm256_permutevar8x32_ps((__m256)quarter, pick.row);
            sum[i] = _mm256_add_pd(sum[i], _mm256_xor_pd(value, pick.sign[i]));
        }
    }
};

}  // namespace
}  // namespace fastproj::cpu
