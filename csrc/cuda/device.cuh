// The instructions that the kernels use, one function each. Under FASTPROJ_EMULATE the same names
// come from tests/cuda/emulator.hpp, so the kernels' own source runs on the host.
#pragma once

#include <cstdint>

#include "params.hpp"

#if defined(FASTPROJ_EMULATE)
#include "emulator.hpp"
#else

#define FASTPROJ_DEVICE __device__ __forceinline__
#define FASTPROJ_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FASTPROJ_GRID_CONSTANT const __grid_constant__

// wgmma and setmaxnreg exist in code for sm_90a only; elsewhere those kernels are empty, and their
// launch bound (1 thread instead of 384) tells the host so.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTPROJ_SM90A 1
#else
#define FASTPROJ_SM90A 0
#endif

namespace fastproj::cuda {

// Operand types of the tensor cores. kOne is the bits of 1.0.
struct Bf16 {
    static constexpr bool kIsBf16 = true;
    static constexpr std::uint32_t kOne = 0x3f80;
};
struct F16 {
    static constexpr bool kIsBf16 = false;
    static constexpr std::uint32_t kOne = 0x3c00;
};

// The driver's CUtensorMap.
struct alignas(128) TensorMap {
    std::uint64_t opaque[16];
};

// ------------------------------------------------------------------------------- bits and numbers

// (a & b) ^ c, kept whole: from an expression the compiler may make two instructions.
FASTPROJ_DEVICE std::uint32_t and_xor(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    std::uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
// (a & b) | c
FASTPROJ_DEVICE std::uint32_t and_or(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    std::uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
// Four bytes of {a, b}, each named by four bits of `selector`, the lowest first; a's are 0 to 3.
FASTPROJ_DEVICE std::uint32_t pick_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    return __byte_perm(a, b, selector);
}
// Low halves of a and b -> {a, b}; high halves -> {a, b}.
FASTPROJ_DEVICE std::uint32_t pack_low(std::uint32_t a, std::uint32_t b) {
    return pick_bytes(a, b, 0x5410);
}
FASTPROJ_DEVICE std::uint32_t pack_high(std::uint32_t a, std::uint32_t b) {
    return pick_bytes(a, b, 0x7632);
}
FASTPROJ_DEVICE std::uint32_t float_bits(float x) { return __float_as_uint(x); }
FASTPROJ_DEVICE float bits_float(std::uint32_t x) { return __uint_as_float(x); }
FASTPROJ_DEVICE double words_double(std::uint32_t low, std::uint32_t high) {
    return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}
// {lo, hi} rounded to nearest.
FASTPROJ_DEVICE std::uint32_t round_bf16x2(float lo, float hi) {
    std::uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
FASTPROJ_DEVICE float half_to_float(std::uint32_t bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(static_cast<std::uint16_t>(bits)));
    return r;
}
FASTPROJ_DEVICE std::uint32_t float_to_half(float x) {
    std::uint16_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
// A value that the compiler can't see through: stops it from hoisting what is derived from it.
FASTPROJ_DEVICE std::uint32_t opaque(std::uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
FASTPROJ_DEVICE std::uintptr_t opaque_address(std::uintptr_t x) {
    asm volatile("" : "+l"(x));
    return x;
}

// ------------------------------------------------------------------------------- shared memory

// Offset of the dynamic shared memory in the shared window; 1024-byte aligned.
FASTPROJ_DEVICE std::uint32_t shared_base() {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_bytes));
}
FASTPROJ_DEVICE void store_shared(std::uint32_t address, std::uint32_t x, std::uint32_t y,
                                  std::uint32_t z, std::uint32_t w) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x), "r"(y), "r"(z),
                 "r"(w)
                 : "memory");
}
FASTPROJ_DEVICE void store_shared(std::uint32_t address, std::uint32_t x, std::uint32_t y) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
FASTPROJ_DEVICE void store_shared(std::uint32_t address, std::uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
FASTPROJ_DEVICE std::uint32_t load_shared(std::uint32_t address) {
    std::uint32_t r;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
    return r;
}
// 8 and 16 bytes.
FASTPROJ_DEVICE void load_shared_8(std::uint32_t address, std::uint32_t& x, std::uint32_t& y) {
    asm("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(address) : "memory");
}
FASTPROJ_DEVICE void load_shared_16(std::uint32_t address, std::uint32_t& x, std::uint32_t& y,
                                    std::uint32_t& z, std::uint32_t& w) {
    asm("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
        : "r"(address)
        : "memory");
}
// 16 bytes at `address` and 16 at `address` + kApart.
template <int kApart>
FASTPROJ_DEVICE void load_shared_32(std::uint32_t address, std::uint32_t (&r)[8]) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
                 : "r"(address), "n"(kApart)
                 : "memory");
}
// A read of constant contents (the Gaussian table): not volatile, so that it can be scheduled
// freely.
FASTPROJ_DEVICE std::uint32_t load_shared_u16(std::uint32_t address) {
    std::uint16_t r;
    asm("ld.shared.u16 %0, [%1];" : "=h"(r) : "r"(address));
    return r;
}
FASTPROJ_DEVICE void store_shared_f64(std::uint32_t address, double x) {
    asm volatile("st.shared.f64 [%0], %1;" ::"r"(address), "d"(x) : "memory");
}
FASTPROJ_DEVICE double load_shared_f64(std::uint32_t address) {
    double r;
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(r) : "r"(address) : "memory");
    return r;
}

// ------------------------------------------------------------------------------- global memory

template <class T>
FASTPROJ_DEVICE T load_global(const T* p) {
    return __ldg(p);
}
template <class T>
FASTPROJ_DEVICE T read_global(const T* p) {
    return *p;
}
template <class T>
FASTPROJ_DEVICE void write_global(T* p, T value) {
    *p = value;
}

// 16 bytes to shared memory; zeros where `valid` is false (the address must still be legal).
FASTPROJ_DEVICE void copy_async_16(std::uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// An aligned word to shared memory, its first `bytes` bytes and zeros: 0, 2 or 4.
FASTPROJ_DEVICE void copy_async_4(std::uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}
FASTPROJ_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FASTPROJ_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ------------------------------------------------------------------------------- mma.sync

// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
FASTPROJ_DEVICE void load_matrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
// The transpose of an 8x8 matrix held one register a lane.
FASTPROJ_DEVICE std::uint32_t transpose_8x8(std::uint32_t a) {
    std::uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
    return r;
}
// d [16, 8] += a [16, 16] @ b [16, 8]
template <class Op>
FASTPROJ_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                  std::uint32_t b1) {
#define FP_MMA(type)                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (Op::kIsBf16) {
        FP_MMA("bf16");
    } else {
        FP_MMA("f16");
    }
#undef FP_MMA
}

// ------------------------------------------------------------------------------- sm_90

#if FASTPROJ_SM90A
FASTPROJ_DEVICE void barrier_init(std::uint32_t barrier, std::uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes the initialised barriers visible to the cluster and to the copy engine.
FASTPROJ_DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}
FASTPROJ_DEVICE void barrier_arrive(std::uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// What lies at `address` in block `rank` of the cluster.
FASTPROJ_DEVICE std::uint32_t remote_address(std::uint32_t address, std::uint32_t rank) {
    std::uint32_t r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
    return r;
}
// Arrives at a barrier of any block of the cluster, where `go`. Predicated: a branch between
// products in flight makes the compiler serialise them.
FASTPROJ_DEVICE void barrier_arrive_remote(std::uint32_t remote, bool go) {
    asm volatile(
        "{\n.reg .pred go;\nsetp.ne.b32 go, %1, 0;\n"
        "@go mbarrier.arrive.shared::cluster.b64 _, [%0];\n}" ::"r"(remote),
        "r"(static_cast<std::int32_t>(go))
        : "memory");
}
FASTPROJ_DEVICE void barrier_arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// Waits until the phase of the given parity has completed.
FASTPROJ_DEVICE void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nretry:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finish;\nbra retry;\nfinish:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
// Orders this thread's ordinary stores to shared memory before reads by the tensor cores.
FASTPROJ_DEVICE void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
FASTPROJ_DEVICE std::uint32_t cluster_rank() {
    std::uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
FASTPROJ_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

FASTPROJ_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// A box of the tensor, its first element at (x, y), to shared memory; bytes are counted on
// `barrier`.
FASTPROJ_DEVICE void copy_box(std::uint32_t to, const TensorMap* map, std::int32_t x,
                              std::int32_t y, std::uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
        "{%2, "
        "%3}], [%4];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier)
        : "memory");
}
// The same, to the same place in every block of the cluster that `mask` names.
FASTPROJ_DEVICE void copy_box_multicast(std::uint32_t to, const TensorMap* map, std::int32_t x,
                                        std::int32_t y, std::uint32_t barrier, std::uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(mask)
        : "memory");
}

template <int kRegisters>
FASTPROJ_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FASTPROJ_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
FASTPROJ_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTPROJ_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
FASTPROJ_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Sums as they are after a wait: what reads them can't move before it. (To the compiler a product
// wrote them when it was issued.)
template <int kCount>
FASTPROJ_DEVICE void wgmma_sums(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
#endif  // FASTPROJ_SM90A

}  // namespace fastproj::cuda

#if FASTPROJ_SM90A
#include "wgmma.cuh"
#endif
#endif  // FASTPROJ_EMULATE
