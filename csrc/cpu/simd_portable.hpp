// Vector vocabulary in plain C++ (GCC and Clang vector extensions): SSE2, NEON or scalar code, as
// the compiler's baseline has it.
#pragma once

#include <cstring>

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

    // Sums of a chunk of 16 columns; add_chunk adds row i ^ flip of a packed chunk (spec.hpp) to
    // column i, with its sign.
    struct Chunk {
        float sum[kSjltChunk];
    };
    static Chunk load_chunk(const float* sums) {
        Chunk chunk;
        std::memcpy(chunk.sum, sums, sizeof chunk.sum);
        return chunk;
    }
    static void store_chunk(const Chunk& chunk, float* sums) {
        std::memcpy(sums, chunk.sum, sizeof chunk.sum);
    }
    static void add_chunk(const float* rows, const std::uint32_t* at, Chunk& chunk) {
        const std::uint32_t packed = *at;
        for (std::uint32_t i = 0; i < kSjltChunk; ++i) {
            const float value = rows[sjlt_row(packed, i)];
            chunk.sum[i] += sjlt_negative(packed, i) != 0 ? -value : value;
        }
    }

    // to[4 i + j] = words[j][i]
    static void interleave(const U words[4], std::uint32_t* to) {
        for (int i = 0; i < kLanes; ++i) {
            for (int j = 0; j < 4; ++j) to[4 * i + j] = words[j][i];
        }
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
