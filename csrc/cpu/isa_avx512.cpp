// AVX-512 F, BW, DQ, VL.
#include "simd_avx512.hpp"
// clang-format off
#include "dense.hpp"
#include "lookup.hpp"
#include "sjlt.hpp"
// clang-format on

namespace fastproj::cpu {
namespace {

// vpermps looks up 16 floats: all signed sums of four rows.
struct SignSums {
    static constexpr int kEntries = 16;
    static constexpr int kMaxBatch = 4;

    // Products by +-1 round nothing, and take their gradient from memory as they multiply.
    static void build(float g0, float g1, float g2, float g3, float* table) {
        const auto signs = [](__mmask16 negative) {
            const __m512 one = _mm512_set1_ps(1.0f);
            return _mm512_mask_xor_ps(one, negative, one, _mm512_set1_ps(-0.0f));
        };
        const auto all = [](float g) { return _mm512_set1_ps(g); };
        const __m512 low =
            _mm512_fmadd_ps(all(g1), signs(0xCCCC), _mm512_mul_ps(all(g0), signs(0xAAAA)));
        const __m512 high =
            _mm512_fmadd_ps(all(g3), signs(0xFF00), _mm512_mul_ps(all(g2), signs(0xF0F0)));
        _mm512_store_ps(table, _mm512_add_ps(low, high));
    }

    template <int kBatch, int kVectors>
    static void accumulate(const Simd::U* words, const float* tables,
                           Simd::F acc[kBatch][kVectors]) {
        const __m512 one = _mm512_set1_ps(1.0f);
        __m512i index[kVectors];
        for (int v = 0; v < kVectors; ++v) index[v] = (__m512i)words[v];
        for (int step = 0; step < kSteps; ++step) {
            for (int b = 0; b < kBatch; ++b) {
                const __m512 table = _mm512_load_ps(tables + b * kEntries);
                for (int v = 0; v < kVectors; ++v) {
                    const __m512 sum = _mm512_permutexvar_ps(index[v], table);
                    const __m512 so_far = (__m512)acc[b][v];
                    acc[b][v] = (Simd::F)((b * kVectors + v) % 8 % 3 == 1
                                              ? _mm512_fmadd_ps(sum, one, so_far)
                                              : _mm512_add_ps(so_far, sum));
                }
            }
            for (int v = 0; v < kVectors; ++v) index[v] = _mm512_srli_epi32(index[v], 4);
            tables += kBatch * kEntries;
        }
    }

    static constexpr int vectors_for(int) { return 4; }
};

}  // namespace

KernelTable kernels_avx512() { return with_sjlt_kernels(lookup_kernels<SignSums>()); }

}  // namespace fastproj::cpu
