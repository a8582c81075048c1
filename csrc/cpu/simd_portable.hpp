// Vector vocabulary in plain C++ (GCC and Clang vector extensions): SSE2, NEON or scalar code, as
// the compiler's baseline has it.
#pragma once

#include <cstring>
#include <type_traits>

#include "simd.hpp"

namespace fastproj::cpu {
namespace {

struct Simd : Vectors<16> {
    static constexpr int kDenseBatch = 4;
    static constexpr int kPhiloxLanes = 1;  // Philox lanes computed side by side

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

    // Numbers of 32 bits in 64-bit lanes; what is above them never matters.
    static W multiply(W x, std::uint32_t m) { return (x & 0xffffffffu) * m; }
    // to[4 i + j] = the low 32 bits of words[j][i]
    static void interleave(const W words[4], std::uint32_t* to) {
        for (int i = 0; i < kLanes / 2; ++i) {
            for (int j = 0; j < 4; ++j) to[4 * i + j] = static_cast<std::uint32_t>(words[j][i]);
        }
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

template <class T>
struct Chunk {
    using Bits = std::conditional_t<std::is_same_v<T, float>, std::uint32_t, std::uint64_t>;
    struct Pick {
        std::uint32_t flip;
        Bits sign[kSjltChunk];  // of each column, in the place of a number's sign
    };
    struct Unpack {
        Pick operator()(const std::uint32_t* packed) const {
            Pick pick{*packed & 15u, {}};
            for (std::uint32_t i = 0; i < kSjltChunk; ++i) {
                pick.sign[i] = Bits{sjlt_negative(*packed, i)} << (8 * sizeof(T) - 1);
            }
            return pick;
        }
    };

    T sum[kSjltChunk];

    void load(const T* from) { std::memcpy(sum, from, sizeof sum); }
    void store(T* to) const { std::memcpy(to, sum, sizeof sum); }
    void add(const T* rows, const Pick& pick) {
        for (std::uint32_t i = 0; i < kSjltChunk; ++i) {
            Bits bits;
            std::memcpy(&bits, rows + (i ^ pick.flip), sizeof bits);
            bits ^= pick.sign[i];
            T value;
            std::memcpy(&value, &bits, sizeof value);
            sum[i] += value;
        }
    }
};

}  // namespace
}  // namespace fastproj::cpu
