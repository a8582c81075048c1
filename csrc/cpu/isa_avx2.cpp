// AVX2 + FMA + F16C.
#include "simd_avx2.hpp"
// clang-format off
#include "dense.hpp"
#include "lookup.hpp"
#include "sjlt.hpp"
// clang-format on

namespace fastproj::cpu {
namespace {

// vpermps looks up 8 floats: the signed sums of four rows whose first sign is +. With u = w ^ (w >>
// 1) bits 4s..4s+2 of u say where the signs of the four rows change, and bit 4s of w is the first
// sign.
struct SignSums {
    static constexpr int kEntries = 8;
    static constexpr int kMaxBatch = 8;

    // Products by +-1 round nothing.
    static void build(float g0, float g1, float g2, float g3, float* table) {
        const __m256 s1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
        const __m256 s2 = _mm256_setr_ps(1, -1, -1, 1, 1, -1, -1, 1);
        const __m256 s3 = _mm256_setr_ps(1, -1, -1, 1, -1, 1, 1, -1);
        const auto all = [](float g) { return _mm256_set1_ps(g); };
        const __m256 low = _mm256_fmadd_ps(all(g1), s1, all(g0));
        const __m256 high = _mm256_fmadd_ps(all(g3), s3, _mm256_mul_ps(all(g2), s2));
        _mm256_store_ps(table, _mm256_add_ps(low, high));
    }

    template <int kBatch, int kVectors>
    static void accumulate(const Simd::U* words, const float* tables,
                           Simd::F acc[kBatch][kVectors]) {
        const __m256 sign_bit = _mm256_set1_ps(-0.0f);
        __m256i sign[kVectors], change[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            sign[v] = (__m256i)words[v];
            change[v] = _mm256_xor_si256(sign[v], _mm256_srli_epi32(sign[v], 1));
        }
        for (int step = 0; step < 8; ++step) {
            for (int v = 0; v < kVectors; ++v) {
                const __m256 first =
                    _mm256_and_ps((__m256)_mm256_slli_epi32(sign[v], 31 - 4 * step), sign_bit);
                const __m256i index = _mm256_srli_epi32(change[v], 4 * step);
                for (int b = 0; b < kBatch; ++b) {
                    const __m256 table = _mm256_load_ps(tables + b * kEntries);
                    acc[b][v] +=
                        (Simd::F)_mm256_xor_ps(_mm256_permutevar8x32_ps(table, index), first);
                }
            }
            tables += kBatch * kEntries;
        }
    }

    // How many vectors of columns a step takes for this many batch rows: 16 registers in all.
    static constexpr int vectors_for(int batch) { return batch <= 2 ? 4 : batch <= 4 ? 2 : 1; }
};

}  // namespace

KernelTable kernels_avx2() { return with_sjlt_kernels(lookup_kernels<SignSums>()); }

}  // namespace fastproj::cpu
