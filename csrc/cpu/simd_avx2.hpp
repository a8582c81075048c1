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
