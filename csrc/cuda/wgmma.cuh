// wgmma.mma_async m64nNk16 with A in registers and B (K-major, 128-byte swizzle) in shared memory.
// PTX wants every register by name; the macros below spell the lists.
#pragma once

#include <cstdint>

namespace fastproj::cuda {

// clang-format off
#define FP_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FP_NAMES_16 FP_NAMES_8 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define FP_NAMES_32 FP_NAMES_16 ", " "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FP_NAMES_64 FP_NAMES_32 ", " "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", " "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FP_REGS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FP_REGS_8(i) FP_REGS_4(i), FP_REGS_4(i + 4)
#define FP_REGS_16(i) FP_REGS_8(i), FP_REGS_8(i + 8)
#define FP_REGS_32(i) FP_REGS_16(i), FP_REGS_16(i + 16)
#define FP_REGS_64(i) FP_REGS_32(i), FP_REGS_32(i + 32)

// a0..a3, the descriptor and the predicate follow the `count` accumulators.
#define FP_WGMMA(n, count, type, a0, a1, a2, a3, b, p)                                      \
    asm volatile(                                                                           \
        "{\n.reg .pred keep;\nsetp.ne.b32 keep, %" p ", 0;\n"                               \
        "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" FP_NAMES_##count \
        "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b ", keep, 1, 1, 0;\n}"                 \
        : FP_REGS_##count(0)                                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(keep_sum))
#define FP_WGMMA_OF(type)                                                  \
    if constexpr (N == 16) {                                               \
        FP_WGMMA("16", 8, type, "8", "9", "10", "11", "12", "13");         \
    } else if constexpr (N == 32) {                                        \
        FP_WGMMA("32", 16, type, "16", "17", "18", "19", "20", "21");      \
    } else if constexpr (N == 64) {                                        \
        FP_WGMMA("64", 32, type, "32", "33", "34", "35", "36", "37");      \
    } else {                                                               \
        FP_WGMMA("128", 64, type, "64", "65", "66", "67", "68", "69");     \
    }
// clang-format on

// Descriptor of a K-major operand in rows of 128 bytes, 128-byte swizzle. Low word: address >> 4,
// leading offset 1 (unused in this layout). High word: 1024 bytes from one group of 8 rows to the
// next, layout 1 (128-byte swizzle).
FASTPROJ_DEVICE std::uint64_t wgmma_descriptor(std::uint32_t address) {
    const std::uint32_t low = ((address & 0x3ffffu) >> 4) | 1u << 16;
    return static_cast<std::uint64_t>((1024u >> 4) | 1u << 30) << 32 | low;
}
// The operand `bytes` further on. The sum never carries out of the low word; saying so helps the
// compiler, except where all descriptors are one base plus constants.
template <bool kFixed>
FASTPROJ_DEVICE std::uint64_t wgmma_advance(std::uint64_t descriptor, int bytes) {
    if constexpr (kFixed) return descriptor + (bytes >> 4);
    const std::uint32_t low = static_cast<std::uint32_t>(descriptor) + (bytes >> 4);
    return descriptor >> 32 << 32 | low;
}

// d [64, N] = (keep_sum ? d : 0) + a [64, 16] @ b [16, N]. Asynchronous: see wgmma_wait.
template <class Op, int N>
FASTPROJ_DEVICE void wgmma_m64k16(float (&d)[N / 2], const std::uint32_t (&a)[4],
                                  std::uint64_t descriptor, std::int32_t keep_sum) {
    static_assert(N == 16 || N == 32 || N == 64 || N == 128,
                  "no instruction is written for this N");
    if constexpr (Op::kIsBf16) {
        FP_WGMMA_OF("bf16")
    } else {
        FP_WGMMA_OF("f16")
    }
}

#undef FP_WGMMA
#undef FP_WGMMA_OF
#undef FP_NAMES_8
#undef FP_NAMES_16
#undef FP_NAMES_32
#undef FP_NAMES_64
#undef FP_REGS_4
#undef FP_REGS_8
#undef FP_REGS_16
#undef FP_REGS_32
#undef FP_REGS_64

}  // namespace fastproj::cuda
