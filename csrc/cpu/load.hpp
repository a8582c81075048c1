// Reads gradients of any dtype and stride, from one piece or several, as a panel of 512 numbers.
// Included by each instruction set's translation unit; everything here is local to it.
#pragma once

#include <cstring>

#include "kernels.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastproj::cpu {
namespace {

inline float float_from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float x) { return x; }

struct BFloat16 {
    std::uint16_t bits;
};
inline float to_float(BFloat16 x) {
    return float_from_bits(static_cast<std::uint32_t>(x.bits) << 16);
}

struct Float16 {
    std::uint16_t bits;
};
inline float to_float(Float16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
    __fp16 half;
    std::memcpy(&half, &x.bits, sizeof half);
    return half;
#else
    const std::uint32_t sign = (x.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // inf and NaN, the payload kept
        return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    }
    // Shifted into place the exponent is 112 too small; multiplying by 2^112 also makes
    // subnormals right.
    const float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
    std::uint32_t bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    return float_from_bits(sign | bits);
#endif
}

template <class T, class From>
void copy_rows(const From* from, std::int64_t stride, int n, T* to) {
    if (stride == 1) {
        for (int i = 0; i < n; ++i) to[i] = static_cast<T>(to_float(from[i]));
    } else {
        for (int i = 0; i < n; ++i) to[i] = static_cast<T>(to_float(from[i * stride]));
    }
}

#if defined(__F16C__)
// The compiler makes vectors of the other conversions, not of this one.
inline void copy_rows(const Float16* from, std::int64_t stride, int n, float* to) {
    int i = 0;
    for (; stride == 1 && i + 8 <= n; i += 8) {
        _mm256_storeu_ps(
            to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
    for (; i < n; ++i) to[i] = to_float(from[i * stride]);
}
#endif

inline void copy_rows(const double* from, std::int64_t stride, int n, double* to) {
    for (int i = 0; i < n; ++i) to[i] = from[i * stride];
}

inline void load_rows(const View& piece, std::int64_t b, std::int64_t row, int n, double* to) {
    // The double kernel is only ever given float64 input: see project.cpp.
    const std::int64_t at = b * piece.stride[0] + row * piece.stride[1];
    copy_rows(static_cast<const double*>(piece.data) + at, piece.stride[1], n, to);
}

inline void load_rows(const View& piece, std::int64_t b, std::int64_t row, int n, float* to) {
    const std::int64_t at = b * piece.stride[0] + row * piece.stride[1];
    switch (piece.dtype) {
        case Dtype::kBf16:
            copy_rows(static_cast<const BFloat16*>(piece.data) + at, piece.stride[1], n, to);
            return;
        case Dtype::kF16:
            copy_rows(static_cast<const Float16*>(piece.data) + at, piece.stride[1], n, to);
            return;
        default:
            copy_rows(static_cast<const float*>(piece.data) + at, piece.stride[1], n, to);
            return;
    }
}

// The last piece that begins at or before an input row, by bisection.
inline int piece_of(const Source& source, std::int64_t row) {
    int lo = 0;
    for (int hi = source.num_pieces; hi - lo > 1;) {
        const int mid = (lo + hi) / 2;
        (source.piece_begin[mid] <= row ? lo : hi) = mid;
    }
    return lo;
}

// Rows of a sample as they lie in memory, side by side in one piece; null where they don't.
struct RawRows {
    const char* at;
    Dtype dtype;
    std::int64_t bytes;
};
inline RawRows raw_rows(const Source& source, std::int64_t b, std::int64_t row_begin,
                        std::int64_t count) {
    const std::int64_t first = row_begin - source.row_offset;
    if (first < 0 || first + count > source.rows) return {};
    const int at = piece_of(source, first);
    const View& piece = source.pieces[at];
    if (piece.stride[1] != 1 || first + count > source.piece_begin[at + 1]) return {};
    const std::int64_t item = piece.dtype == Dtype::kF64 ? 8 : piece.dtype == Dtype::kF32 ? 4 : 2;
    return {static_cast<const char*>(piece.data) +
                (b * piece.stride[0] + first - source.piece_begin[at]) * item,
            piece.dtype, count * item};
}

// to[0..count) = matrix rows row_begin .. of batch element b; zeros where the input has no such
// row.
template <class T>
void load_span(const Source& source, std::int64_t b, std::int64_t row_begin, std::int64_t count,
               T* to) {
    const std::int64_t first = row_begin - source.row_offset;  // input row of to[0]
    std::int64_t row = first < 0 ? 0 : first;
    const std::int64_t last = first + count < source.rows ? first + count : source.rows;
    if (last - row < count) std::memset(to, 0, static_cast<std::size_t>(count) * sizeof(T));
    if (row >= last) return;
    int lo = piece_of(source, row);
    for (; row < last; ++lo) {
        const std::int64_t end =
            source.piece_begin[lo + 1] < last ? source.piece_begin[lo + 1] : last;
        if (end <= row) continue;  // an empty piece
        load_rows(source.pieces[lo], b, row - source.piece_begin[lo], static_cast<int>(end - row),
                  to + (row - first));
        row = end;
    }
}

// to[0..512) = the rows of batch element b in this panel.
template <class T>
void load_panel(const Source& source, std::int64_t b, std::int64_t panel, T* to) {
    load_span(source, b, panel * kPanelRows, kPanelRows, to);
}

}  // namespace
}  // namespace fastproj::cpu
