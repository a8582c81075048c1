// Vector vocabulary for AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <cstring>

#include "simd.hpp"

namespace fastproj::cpu {
namespace {

struct Simd : Vectors<64> {
    static constexpr int kDenseBatch = 8;   // 8 x 2 accumulators of the 32 registers
    static constexpr int kPhiloxLanes = 4;  // Philox lanes computed side by side

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

    // Numbers of 32 bits in 64-bit lanes; what is above them never matters.
    static W multiply(W x, std::uint32_t m) {
        return (W)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
    }
    static W xor3(W a, W b, W c) { return (W)xor3((U)a, (U)b, (U)c); }
    // to[4 i + j] = the low 32 bits of words[j][i]
    static void interleave(const W words[4], std::uint32_t* to) {
        const __m512i first = (__m512i)words[0], third = (__m512i)words[2];
        const __m512i a =
            _mm512_mask_shuffle_epi32(first, 0xAAAA, (__m512i)words[1], _MM_PERM_CDAB);
        const __m512i b =
            _mm512_mask_shuffle_epi32(third, 0xAAAA, (__m512i)words[3], _MM_PERM_CDAB);
        _mm512_storeu_si512(
            to, _mm512_permutex2var_epi64(a, _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), b));
        _mm512_storeu_si512(
            to + 16, _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4), b));
    }

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

template <>
struct Chunk<float> {
    struct Pick {
        __m512i row, sign;  // of each column; vpermps takes 4 bits of row, the sign is bit 31
    };
    class Unpack {
      public:
        Unpack() {  // without this, both would be read from memory again for every chunk
            asm("" : "+v"(lane_), "+v"(shift_));
        }
        Pick operator()(const std::uint32_t* packed) const {
            const __m512i word = _mm512_broadcastd_epi32(_mm_loadu_si32(packed));
            return {_mm512_xor_si512(word, lane_), _mm512_sllv_epi32(word, shift_)};
        }

      private:
        __m512i lane_ = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512i shift_ = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    };

    __m512 sum;

    void load(const float* from) { sum = _mm512_loadu_ps(from); }
    void store(float* to) const { _mm512_storeu_ps(to, sum); }
    void add(const float* rows, const Pick& pick) {
        const __m512 value = _mm512_permutexvar_ps(pick.row, _mm512_loadu_ps(rows));
        sum =
            _mm512_add_ps(sum, (__m512)_mm512_ternarylogic_epi32(
                                   (__m512i)value, pick.sign, _mm512_set1_epi32(INT32_MIN), 0x78));
    }  // 0x78: a ^ (b & c)
};

template <>
struct Chunk<double> {
    struct Pick {
        __m512i row[2], sign[2];  // vpermt2pd takes 4 bits of row, the sign is bit 63
    };
    struct Unpack {
        Pick operator()(const std::uint32_t* packed) const {
            const __m512i word = _mm512_set1_epi64(*packed);
            const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
            Pick pick;
            for (int i = 0; i < 2; ++i) {
                const __m512i column = _mm512_add_epi64(lane, _mm512_set1_epi64(8 * i));
                pick.row[i] = _mm512_xor_si512(word, column);
                pick.sign[i] =
                    _mm512_sllv_epi64(word, _mm512_sub_epi64(_mm512_set1_epi64(47), column));
            }
            return pick;
        }
    };

    __m512d sum[2];

    void load(const double* from) {
        for (int i = 0; i < 2; ++i) sum[i] = _mm512_loadu_pd(from + 8 * i);
    }
    void store(double* to) const {
        for (int i = 0; i < 2; ++i) _mm512_storeu_pd(to + 8 * i, sum[i]);
    }
    void add(const double* rows, const Pick& pick) {
        const __m512d low = _mm512_loadu_pd(rows), high = _mm512_loadu_pd(rows + 8);
        for (int i = 0; i < 2; ++i) {
            const __m512d value = _mm512_permutex2var_pd(low, pick.row[i], high);
            sum[i] = _mm512_add_pd(
                sum[i], (__m512d)_mm512_ternarylogic_epi64((__m512i)value, pick.sign[i],
                                                           _mm512_set1_epi64(INT64_MIN), 0x78));
        }
    }
};

}  // namespace
}  // namespace fastproj::cpu
