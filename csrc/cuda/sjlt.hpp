// The kernels of kind sjlt, found by what they were compiled for; their sizes.
#pragma once

#include "kernels.hpp"
#include "params.hpp"

namespace fastproj::cuda {

// A thread keeps sums of 4 * groups columns for `batch` samples; tiles of G come through shared
// memory, or rows straight from L2 where not even two tiles fit there.
struct SjltKey {
    Dtype dtype;
    int groups, batch;
    bool staged;
};
inline bool operator==(const SjltKey& a, const SjltKey& b) {
    return a.dtype == b.dtype && a.groups == b.groups && a.batch == b.batch && a.staged == b.staged;
}

constexpr int kSjltThreads = 384;  // of a block, at most; a launch takes what its columns need

// The launch bound, which sets registers: 80 for 16 sums, else 168.
constexpr int sjlt_bound(Dtype dtype, int groups, int batch) {
    return groups * batch == 4 && dtype != Dtype::kF64 ? 768 : kSjltThreads;
}

// clang-format off
#define FASTPROJ_SJLT(X, dtype) \
    X(dtype, 4, 1, true) \
    X(dtype, 4, 2, true) \
    X(dtype, 4, 4, true) \
    X(dtype, 8, 1, true) \
    X(dtype, 8, 2, true) \
    X(dtype, 16, 1, true) \
    X(dtype, 4, 1, false) \
    X(dtype, 4, 2, false)

#define FASTPROJ_SJLT_F64(X, dtype) \
    X(dtype, 4, 1, true) \
    X(dtype, 4, 1, false)
// clang-format on

constexpr int kSjltFold = 256;  // tiles that one sum adds up before it goes to the workspace

// Tiles whose packed chunks are made at once, and bytes of one packed chunk.
constexpr int sjlt_table_tiles(int groups) { return 16 / groups; }
constexpr int sjlt_entry_bytes(Dtype dtype) {
    return dtype == Dtype::kBf16 || dtype == Dtype::kF16 ? 8 : 4;
}
// Two tables, and the permutations of two more.
constexpr int sjlt_table_bytes(const SjltKey& key, int threads) {
    return 8 * threads * sjlt_entry_bytes(key.dtype) +
           2 * (threads + sjlt_table_tiles(key.groups)) * 16;
}

// The entry of a kernel; null where none was compiled.
const void* sjlt_f32_kernel(const SjltKey& key);
const void* sjlt_bf16_kernel(const SjltKey& key);
const void* sjlt_f16_kernel(const SjltKey& key);
const void* sjlt_f64_kernel(const SjltKey& key);
Kernel sjlt_transpose_kernel(bool in_double);
Kernel sjlt_matrix_kernel();

}  // namespace fastproj::cuda
