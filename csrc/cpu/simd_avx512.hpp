// Vector vocabulary for AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "kernels.hpp"

namespace fastproj::cpu {
namespace {

struct Simd {
    static constexpr int kBytes = 64;
    static constexpr int kLanes = 16;
    static constexpr int kDenseBatch = 8;   // 8 x 2 accumulators of the 32 registers
    static constexpr int kPhiloxLanes = 4;  // Philox lanes computed side by side
    using U = std::uint32_t __attribute__((vector_size(kBytes)));
    using F = float __attribute__((vector_size(kBytes)));
    using D = double __attribute__((vector_size(kBytes)));

    static U xor3(U a, U b, U c) {
        return (U)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
    }

    // 16 products of 32 x 32 bits: even and odd lanes apart, then sorted into high and low words.
    static void mul_hi_lo(U x, std::uint32_t m, U& hi, U& lo) {
        const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
        const __m512i even = _mm512_mul_epu32((__m512i)x, factor);
        const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), factor);
        hi = (U)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
        lo = (U)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB);
    }

    // acc[i] += x[i]
    static void add_to_double(F x, double* acc) {
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
        _mm512_storeu_pd(acc, _mm512_add_pd(_mm512_loadu_pd(acc), low));
        _mm512_storeu_pd(acc + 8, _mm512_add_pd(_mm512_loadu_pd(acc + 8), high));
    }

    // +1 where bit `position` of the word is 0, -1 where it is 1.
    static F sign(U word, int position) {
        const __m512i moved = _mm512_sll_epi32((__m512i)word, _mm_cvtsi32_si128(31 - position));
        return (F)_mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(INT32_MIN),
                                            _mm512_set1_epi32(0x3f800000), 0xEA);  // (a & b) | c
    }

    // The two Gaussian entries in each word as bf16 bits (low half: even row). 512 magnitudes are
    // eight tables of 64 for vpermi2w, chosen by three mask bits; the index has bits 8..1 from code
    // bits 14..7 and bit 0 from code bit 1.
    static U gauss_bf16(U word) {
        const __m512i w = (__m512i)word;
        const __m512i index =
            _mm512_ternarylogic_epi32(_mm512_set1_epi16(1), _mm512_srli_epi16(w, 1),
                                      _mm512_srli_epi16(w, 6), 0xCA);  // a ? b : c
        const auto* t = reinterpret_cast<const __m512i*>(kGaussTable);
        __m512i m[8];
        for (int i = 0; i < 8; ++i) {
            m[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(t + 2 * i), index,
                                             _mm512_loadu_si512(t + 2 * i + 1));
        }
        const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(1 << 6));
        const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(1 << 7));
        const __mmask32 bit8 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(1 << 8));
        for (int i = 0; i < 4; ++i) m[i] = _mm512_mask_mov_epi16(m[2 * i], bit6, m[2 * i + 1]);
        for (int i = 0; i < 2; ++i) m[i] = _mm512_mask_mov_epi16(m[2 * i], bit7, m[2 * i + 1]);
        const __m512i magnitude = _mm512_mask_mov_epi16(m[0], bit8, m[1]);
        return (U)_mm512_ternarylogic_epi32(w, _mm512_set1_epi16(INT16_MIN), magnitude,
                                            0xEA);  // (a & b) | c
    }

    static void gauss(U word, F& low, F& high) {
        const U entries = gauss_bf16(word);
        low = (F)(entries << 16);
        high = (F)(entries & 0xffff0000u);
    }
};

}  // namespace
}  // namespace fastproj::cpu
