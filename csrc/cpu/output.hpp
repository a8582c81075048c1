// Numbers out: sums and entries of R as the elements of a tensor. Included by the operations; local
// to each.
#pragma once

#include <cstring>
#include <stdexcept>

#include "../call.hpp"

namespace fastproj::cpu {
namespace {

// out[row, col + i] = value(i, what is there), for i < count.
template <class T, class Value>
void store(const View& out, std::int64_t row, std::int64_t col, std::int64_t count,
           const Value& value) {
    const std::int64_t step = out.stride[1];
    T* to = static_cast<T*>(out.data) + row * out.stride[0] + col * step;
    if (step == 1) {  // apart, so that it becomes vectors
        for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(value(i, to[i]));
    } else {
        for (std::int64_t i = 0; i < count; ++i, to += step) *to = static_cast<T>(value(i, *to));
    }
}

// out[row, col + i] = scale * sums[i], or that much more. A result is float32 or float64.
inline void store_sums(const View& out, std::int64_t row, std::int64_t col, std::int64_t count,
                       const double* sums, const Call& call) {
    const double scale = call.scale;
    const auto set = [=](std::int64_t i, double) { return scale * sums[i]; };
    const auto add = [=](std::int64_t i, double before) { return before + scale * sums[i]; };
    if (out.dtype == Dtype::kF64) {
        call.accumulate ? store<double>(out, row, col, count, add)
                        : store<double>(out, row, col, count, set);
    } else {
        call.accumulate ? store<float>(out, row, col, count, add)
                        : store<float>(out, row, col, count, set);
    }
}

inline std::uint16_t bfloat16_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Only entries of R are ever stored as float16: 0, +-1 and bf16 values from 2^-10 to 4, all exact.
inline std::uint16_t float16_bits(float entry) {
    std::uint32_t bits;
    std::memcpy(&bits, &entry, sizeof bits);
    if (entry == 0.0f) return 0;
    return static_cast<std::uint16_t>((bits >> 16 & 0x8000u) |
                                      (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
}

// out[row, col + i] = entries[i]
inline void store_entries(const View& out, std::int64_t row, std::int64_t col, std::int64_t count,
                          const float* entries) {
    const auto plain = [=](std::int64_t i, auto) { return entries[i]; };
    const auto bf16 = [=](std::int64_t i, auto) { return bfloat16_bits(entries[i]); };
    const auto f16 = [=](std::int64_t i, auto) { return float16_bits(entries[i]); };
    switch (out.dtype) {
        case Dtype::kF32:
            return store<float>(out, row, col, count, plain);
        case Dtype::kF64:
            return store<double>(out, row, col, count, plain);
        case Dtype::kBf16:
            return store<std::uint16_t>(out, row, col, count, bf16);
        case Dtype::kF16:
            return store<std::uint16_t>(out, row, col, count, f16);
        case Dtype::kI8:
            return store<std::int8_t>(out, row, col, count, plain);
    }
    throw std::invalid_argument("fastproj._cpu: unknown output dtype");
}

}  // namespace
}  // namespace fastproj::cpu
