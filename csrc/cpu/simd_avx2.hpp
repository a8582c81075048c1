// Vector vocabulary for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "kernels.hpp"

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

struct Simd {
    static constexpr int kBytes = 32;
    static constexpr int kLanes = 8;
    static constexpr int kDenseBatch = 4;   // 4 x 2 accumulators of the 16 registers
    static constexpr int kPhiloxLanes = 2;  // Philox lanes computed side by side
    using U = std::uint32_t __attribute__((vector_size(kBytes)));
    using F = float __attribute__((vector_size(kBytes)));
    using D = double __attribute__((vector_size(kBytes)));

    static U xor3(U a, U b, U c) { return a ^ b ^ c; }

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

    // Sums of a chunk of 16 columns; add_chunk adds row i ^ flip of a packed chunk (spec.hpp) to
    // column i, with its sign.
    struct Chunk {
        __m256 half[2];
    };
    static Chunk load_chunk(const float* sums) {
        return {{_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8)}};
    }
    static void store_chunk(const Chunk& sum, float* sums) {
        _mm256_storeu_ps(sums, sum.half[0]);
        _mm256_storeu_ps(sums + 8, sum.half[1]);
    }
    static void add_chunk(const float* rows, const std::uint32_t* at, Chunk& sum) {
        const std::uint32_t packed = *at;
        const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
        const __m256i word = _mm256_broadcastd_epi32(_mm_loadu_si32(at));
        const __m256i index = _mm256_xor_si256(word, lane);  // vpermps takes 3 bits of it
        const float* from = rows + (packed & 0xfff0u);
        for (std::uint32_t i = 0; i < 2; ++i) {
            const __m256 value =
                _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + (8 * i ^ (packed & 8u))), index);
            const __m256i sign = _mm256_sllv_epi32(
                word, _mm256_sub_epi32(_mm256_set1_epi32(static_cast<int>(15 - 8 * i)), lane));
            const __m256 sign_bit = _mm256_and_ps((__m256)sign, _mm256_set1_ps(-0.0f));
            sum.half[i] = _mm256_add_ps(sum.half[i], _mm256_xor_ps(value, sign_bit));
        }
    }

    // to[4 i + j] = words[j][i]
    static void interleave(const U words[4], std::uint32_t* to) {
        const __m256i a = _mm256_unpacklo_epi32((__m256i)words[0], (__m256i)words[1]);
        const __m256i b = _mm256_unpackhi_epi32((__m256i)words[0], (__m256i)words[1]);
        const __m256i c = _mm256_unpacklo_epi32((__m256i)words[2], (__m256i)words[3]);
        const __m256i d = _mm256_unpackhi_epi32((__m256i)words[2], (__m256i)words[3]);
        // Half q of rows[i] holds the four words of lane 4 q + i.
        const __m256i rows[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                                 _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
        for (int i = 0; i < 4; ++i) {
            auto* at = reinterpret_cast<__m128i*>(to) + i;
            _mm_storeu_si128(at, _mm256_castsi256_si128(rows[i]));
            _mm_storeu_si128(at + 4, _mm256_extracti128_si256(rows[i], 1));
        }
    }

    static F sign(U word, int position) {
        return (F)((word << (31 - position) & 0x80000000u) | 0x3f800000u);
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

}  // namespace
}  // namespace fastproj::cpu
