// Vector vocabulary for AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <cstring>

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

    // Sums of a chunk of 16 columns; add_chunk adds row i ^ flip of a packed chunk (spec.hpp) to
    // column i, with its sign.
    using Chunk = __m512;
    static Chunk load_chunk(const float* sums) { return _mm512_loadu_ps(sums); }
    static void store_chunk(Chunk sum, float* sums) { _mm512_storeu_ps(sums, sum); }
    static void add_chunk(const float* rows, const std::uint32_t* packed, Chunk& sum) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i index = _mm512_xor_si512(_mm512_broadcastd_epi32(_mm_loadu_si32(packed)),
                                               lane);  // vpermps takes 4 bits of it
        __mmask16 negative;
        std::memcpy(&negative, reinterpret_cast<const char*>(packed) + 2, sizeof negative);
        const __m512 value =
            _mm512_permutexvar_ps(index, _mm512_loadu_ps(rows + (*packed & 0xfff0u)));
        sum = _mm512_add_ps(sum, _mm512_mask_xor_ps(value, negative, value, _mm512_set1_ps(-0.0f)));
    }

    // to[4 i + j] = words[j][i]
    static void interleave(const U words[4], std::uint32_t* to) {
        const __m512i a = _mm512_unpacklo_epi32((__m512i)words[0], (__m512i)words[1]);
        const __m512i b = _mm512_unpackhi_epi32((__m512i)words[0], (__m512i)words[1]);
        const __m512i c = _mm512_unpacklo_epi32((__m512i)words[2], (__m512i)words[3]);
        const __m512i d = _mm512_unpackhi_epi32((__m512i)words[2], (__m512i)words[3]);
        // Quarter q of rows[i] holds the four words of lane 4 q + i.
        const __m512i rows[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                                 _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
        for (int i = 0; i < 4; ++i) {
            auto* at = reinterpret_cast<__m128i*>(to) + i;
            _mm_storeu_si128(at, _mm512_castsi512_si128(rows[i]));
            _mm_storeu_si128(at + 4, _mm512_extracti32x4_epi32(rows[i], 1));
            _mm_storeu_si128(at + 8, _mm512_extracti32x4_epi32(rows[i], 2));
            _mm_storeu_si128(at + 12, _mm512_extracti32x4_epi32(rows[i], 3));
        }
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
