// Vector vocabulary in plain C++ (GCC and Clang vector extensions): SSE2, NEON or scalar code, as
// the compiler's baseline has it.
#pragma once

#include "kernels.hpp"

namespace fastproj::cpu {
namespace {

struct Simd {
    static constexpr int kBytes = 16;
    static constexpr int kLanes = 4;
    static constexpr int kDenseBatch = 4;
    static constexpr int kPhiloxLanes = 1;  // Philox lanes computed side by side
    using U = std::uint32_t __attribute__((vector_size(kBytes)));
    using F = float __attribute__((vector_size(kBytes)));
    using D = double __attribute__((vector_size(kBytes)));

    static U xor3(U a, U b, U c) { return a ^ b ^ c; }

    static void mul_hi_lo(U x, std::uint32_t m, U& hi, U& lo) {
        for (int i = 0; i < kLanes; ++i) {
            const std::uint64_t product = static_cast<std::uint64_t>(x[i]) * m;
            hi[i] = static_cast<std::uint32_t>(product >> 32);
            lo[i] = static_cast<std::uint32_t>(product);
        }
    }

    static void add_to_double(F x, double* acc) {
        for (int i = 0; i < kLanes; ++i) acc[i] += static_cast<double>(x[i]);
    }

    static F sign(U word, int position) {
        return (F)((word << (31 - position) & 0x80000000u) | 0x3f800000u);
    }

    static void gauss(U word, F& low, F& high) {
        U low_bits, high_bits;
        for (int i = 0; i < kLanes; ++i) {
            low_bits[i] = gaussian_bf16(word[i] & 0xffffu, kGaussTable) << 16;
            high_bits[i] = gaussian_bf16(word[i] >> 16, kGaussTable) << 16;
        }
        low = (F)low_bits;
        high = (F)high_bits;
    }
};

}  // namespace
}  // namespace fastproj::cpu
