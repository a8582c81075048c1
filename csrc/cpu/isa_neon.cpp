// NEON.
#include "simd_neon.hpp"
// clang-format off
#include "dense.hpp"
#include "lookup.hpp"
#include "sjlt.hpp"
// clang-format on

namespace fastproj::cpu {
namespace {

// tbl looks up bytes in two registers: 8 floats, the signed sums of four rows whose first sign is
// +, as in isa_avx2.cpp. With u = w ^ (w >> 1) bits 4s..4s+2 of u say where the signs of the four
// rows change, and bit 4s of w is the first sign. (All 16 sums in four registers would save the
// sign, but such a tbl takes as long as four of one register.)
struct SignSums {
    static constexpr int kEntries = 8;
    static constexpr int kMaxBatch = 8;

    // Bit s of n says whether the sign of row s + 1 differs from that of row s.
    static void build(float g0, float g1, float g2, float g3, float* table) {
        for (int n = 0; n < kEntries; ++n) {
            const int b1 = n & 1, b2 = b1 ^ (n >> 1 & 1), b3 = b2 ^ (n >> 2);
            table[n] = (g0 + (b1 ? -g1 : g1)) + ((b2 ? -g2 : g2) + (b3 ? -g3 : g3));
        }
    }

    template <int kBatch, int kVectors>
    static void accumulate(const Simd::U* words, const float* tables,
                           Simd::F acc[kBatch][kVectors]) {
        uint32x4_t sign[kVectors], change[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            sign[v] = (uint32x4_t)words[v];
            change[v] = veorq_u32(sign[v], vshrq_n_u32(sign[v], 1));
        }
        for (int step = 0; step < kSteps; ++step) {
            for (int v = 0; v < kVectors; ++v) {
                const int32x4_t to_top = vdupq_n_s32(31 - 4 * step);
                const uint32x4_t first =
                    vandq_u32(vshlq_u32(sign[v], to_top), vdupq_n_u32(0x80000000u));
                const uint32x4_t entry = vandq_u32(vshlq_u32(change[v], vdupq_n_s32(-4 * step)),
                                                   vdupq_n_u32(kEntries - 1));
                const uint8x16_t bytes = table_bytes(entry);
                for (int b = 0; b < kBatch; ++b) {
                    const auto* table =
                        reinterpret_cast<const std::uint8_t*>(tables + b * kEntries);
                    const uint8x16x2_t sums = {{vld1q_u8(table), vld1q_u8(table + 16)}};
                    const auto sum = (uint32x4_t)vqtbl2q_u8(sums, bytes);
                    acc[b][v] += (Simd::F)veorq_u32(sum, first);
                }
            }
            tables += kBatch * kEntries;
        }
    }

    // How many vectors of columns a step takes for this many batch rows: 16 sums at most.
    static constexpr int vectors_for(int batch) { return batch <= 2 ? 8 : batch <= 4 ? 4 : 2; }
};

}  // namespace

KernelTable kernels_neon() { return with_sjlt_kernels(lookup_kernels<SignSums>()); }

}  // namespace fastproj::cpu
