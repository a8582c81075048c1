// Every compiled instantiation, listed once. The translation units, find_kernel and the host
// emulation all read these lists. A kernel is named by (kind, operand type, terms, BLOCK_B). The
// last number of the sm_90a ones is how many 64-column tiles a consumer has.
#pragma once

#include "../spec.hpp"

// clang-format off
#define FASTPROJ_SM90_RADEMACHER(X) \
    X(Bf16, 1, 16, 2) \
    X(Bf16, 1, 32, 2) \
    X(Bf16, 1, 64, 2) \
    X(F16, 1, 16, 2) \
    X(F16, 1, 32, 2) \
    X(F16, 1, 64, 2)

#define FASTPROJ_SM90_RADEMACHER_SPLIT(X) \
    X(Bf16, 2, 16, 2) \
    X(Bf16, 2, 32, 2) \
    X(Bf16, 2, 64, 2) \
    X(Bf16, 3, 16, 2) \
    X(Bf16, 3, 32, 2)

#define FASTPROJ_SM90_GAUSSIAN(X) \
    X(Bf16, 1, 32, 2) \
    X(Bf16, 1, 128, 1) \
    X(F16, 1, 32, 2) \
    X(F16, 1, 128, 1)

#define FASTPROJ_SM90_GAUSSIAN_SPLIT(X) \
    X(Bf16, 2, 64, 2) \
    X(Bf16, 3, 64, 2)

#define FASTPROJ_SM80_RADEMACHER(X) \
    X(Bf16, 1, 16) \
    X(Bf16, 1, 32) \
    X(Bf16, 1, 64) \
    X(F16, 1, 16) \
    X(F16, 1, 32) \
    X(F16, 1, 64)

#define FASTPROJ_SM80_RADEMACHER_SPLIT(X) \
    X(Bf16, 2, 32) \
    X(Bf16, 3, 16) \
    X(Bf16, 3, 32)

#define FASTPROJ_SM80_GAUSSIAN(X) \
    X(Bf16, 1, 32) \
    X(Bf16, 1, 64) \
    X(F16, 1, 32) \
    X(F16, 1, 64)

#define FASTPROJ_SM80_GAUSSIAN_SPLIT(X) \
    X(Bf16, 2, 32) \
    X(Bf16, 3, 32)

// clang-format on

namespace fastproj::cuda {

struct KernelKey {
    Kind kind;
    bool bf16;  // operand type, else fp16
    int terms, block_b;
};

// A compiled kernel and what its launch needs.
struct Kernel {
    const void* entry = nullptr;
    int threads = 0;
    int shared_bytes = 0;
    int columns = 0;  // of R in one block
    int stages = 0;
    int fold_rows = 0;  // rows that one accumulator adds up
};

// One for each list, in the translation unit that compiles it; an empty Kernel when the key is not
// in the list.
Kernel find_sm90_rademacher(const KernelKey& key);
Kernel find_sm90_rademacher_split(const KernelKey& key);
Kernel find_sm90_gaussian(const KernelKey& key);
Kernel find_sm90_gaussian_split(const KernelKey& key);
Kernel find_sm80_rademacher(const KernelKey& key);
Kernel find_sm80_rademacher_split(const KernelKey& key);
Kernel find_sm80_gaussian(const KernelKey& key);
Kernel find_sm80_gaussian_split(const KernelKey& key);

Kernel transpose_kernel(Kind kind, int terms);  // the adjoint on tensor cores: 1 or 3 terms

inline bool operator==(const KernelKey& a, const KernelKey& b) {
    return a.kind == b.kind && a.bf16 == b.bf16 && a.terms == b.terms && a.block_b == b.block_b;
}

template <class Entry>
Kernel kernel_of(Entry* entry, int threads, int shared_bytes = 0) {
    return {reinterpret_cast<const void*>(entry), threads, shared_bytes};
}
// Of Config90 or Config80.
template <class C, class Entry>
Kernel kernel_of(Entry* entry, int threads) {
    return {reinterpret_cast<const void*>(entry),
            threads,
            C::kSharedBytes,
            C::kColumns,
            C::kStages,
            C::kFoldRows};
}

}  // namespace fastproj::cuda
