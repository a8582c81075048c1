// A small CUDA machine on the host, for the kernels of csrc/cuda: every thread is a fiber, every
// instruction of device.cuh a function here, written from the PTX ISA (sections 9.7.14 mma, 9.7.15
// wgmma, 9.7.9.25 async copies, 9.7.13 mbarrier). It is adversarial where the hardware is free to
// be: threads run in a random order, asynchronous copies and products happen as late as the program
// allows, their destinations hold NaN until then, and shared memory starts as NaN. What the
// hardware would not forgive is an error: an access out of bounds or misaligned, ordinary stores
// that a tensor core reads without a proxy fence, warps that diverge at a warp-wide instruction, a
// deadlock.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#define FASTPROJ_DEVICE inline
#define FASTPROJ_KERNEL(threads) void
#define FASTPROJ_GRID_CONSTANT const
#define FASTPROJ_SM90A 1
#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define gridDim (::emulator::grid_size())

namespace emulator {

// Switching between fibers. On x86-64 by hand: ucontext costs two system calls a switch.
#if defined(__x86_64__)
struct Context {
    void* stack_pointer = nullptr;
};
extern "C" void fastproj_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl fastproj_emulator_switch
.hidden fastproj_emulator_switch
.type fastproj_emulator_switch, @function
fastproj_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fastproj_emulator_switch, . - fastproj_emulator_switch
)");
inline void switch_context(Context& from, Context& to) {
    fastproj_emulator_switch(&from.stack_pointer, to.stack_pointer);
}
inline void make_context(Context& context, std::vector<char>& stack, void (*entry)()) {
    auto top = reinterpret_cast<std::uintptr_t>(stack.data() + stack.size()) & ~std::uintptr_t{15};
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;  // where `entry` would return to
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;  // the saved registers
    context.stack_pointer = slot;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, std::vector<char>& stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.data();
    context.uc_stack.ss_size = stack.size();
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

constexpr std::uint32_t kSharedStart = 1024;  // the first KiB of the window is the system's

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Barrier {
    std::uint32_t count = 0, pending = 0, parity = 0;
    std::int64_t bytes = 0;
    std::vector<int> waiting;  // fibers
};

struct Product {  // one wgmma of one lane: all registers are read and written when it completes
    const std::uint32_t* a;
    float* d;
    std::uint64_t descriptor;
    int n;
    bool keep, bf16;
};

struct Copy {  // one cp.async of one thread: `bytes` read of `size` written
    std::uint32_t to;
    const void* from;
    std::uint32_t size, bytes;
};

struct Fiber {
    Context context;
    std::vector<char> stack;
    int block = 0;   // within the cluster
    int thread = 0;  // within the block
    enum { kReady, kBlocked, kDone } state = kReady;
    const char* where = "";
    bool stored = false;  // to shared memory, since the last proxy fence
    std::vector<std::uint64_t> stores8, reads16, loads16;  // addresses, where traffic is counted
    std::deque<std::vector<Copy>> copies{1};
    std::deque<std::vector<Product>> products{1};
    std::string error;
};

struct WarpPoint {  // lanes that have arrived at a warp-wide instruction
    const char* name = nullptr;
    int arrived = 0;
    void* argument[32] = {};
};

struct Block {
    std::vector<unsigned char> shared;
    std::map<std::uint32_t, Barrier> barriers;
    std::vector<WarpPoint> warps;
    int at_sync = 0, threads = 0;
    Index index;
};

struct Transfer {  // a bulk copy under way
    std::function<void()> finish;
};

// Of 8-byte stores to shared memory, by 16 lanes at once, and of 16-byte reads of it and 16-byte
// loads from global memory, by 8.
struct Traffic {
    // 1 wavefront an access to shared memory where no two lanes share a bank
    std::int64_t stores = 0, store_wavefronts = 0, reads = 0, read_wavefronts = 0;
    std::int64_t loads = 0, sectors = 0;  // of 32 bytes: 4 a load where all of each is used
};

struct Machine {
    std::mt19937 random{1};
    bool count_traffic = false;
    Traffic traffic;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Block> blocks;
    std::vector<int> ready;
    std::vector<Transfer> transfers;
    int at_cluster_sync = 0;
    int current = -1;
    Context scheduler;
    Index grid;
    std::function<void()> body;
    bool truncate = true;  // tensor cores cut what they add, else their sums are rounded once
};

inline Machine& machine() {
    static Machine m;
    return m;
}
inline Fiber& fiber() { return *machine().fibers[machine().current]; }
inline Block& block() { return machine().blocks[fiber().block]; }
inline Index thread_index() { return Index{static_cast<unsigned>(fiber().thread), 0, 0}; }
inline Index block_index() { return block().index; }
inline Index grid_size() { return machine().grid; }

inline void switch_out() {
    Machine& m = machine();
    Fiber& f = fiber();
    switch_context(f.context, m.scheduler);
}
inline void block_here(const char* where) {
    fiber().state = Fiber::kBlocked;
    fiber().where = where;
    switch_out();
}
inline void wake(int id) {
    Fiber& f = *machine().fibers[id];
    if (f.state == Fiber::kBlocked) {
        f.state = Fiber::kReady;
        machine().ready.push_back(id);
    }
}
inline void yield() {
    Machine& m = machine();
    m.ready.push_back(m.current);
    switch_out();
}

inline void fiber_main() {
    Fiber& f = fiber();
    try {
        machine().body();
    } catch (const std::exception& e) {
        f.error = e.what();
    }
    f.state = Fiber::kDone;
    for (;;) switch_out();
}

inline void finish_transfer(std::size_t which) {
    Machine& m = machine();
    const Transfer t = m.transfers[which];
    m.transfers.erase(m.transfers.begin() + static_cast<std::ptrdiff_t>(which));
    t.finish();
}

// Counts what the fibers recorded: the n-th access of one lane goes with the n-th of the others.
inline void add_traffic(Machine& m) {
    auto each = [&m](std::vector<std::uint64_t> Fiber::* list, std::size_t lanes, auto&& act) {
        for (std::size_t first = 0; first < m.fibers.size(); first += lanes) {
            for (std::size_t n = 0; n < ((*m.fibers[first]).*list).size(); ++n) {
                std::set<std::uint64_t> addresses;
                for (std::size_t lane = 0; lane < lanes; ++lane) {
                    const auto& own = (*m.fibers[first + lane]).*list;
                    if (n < own.size()) addresses.insert(own[n]);
                }
                act(addresses);
            }
        }
    };
    auto wavefronts = [](const std::set<std::uint64_t>& addresses, std::uint64_t bytes) {
        std::map<std::uint64_t, std::int64_t> banks;  // of that many bytes
        std::int64_t most = 0;
        for (std::uint64_t address : addresses) {
            most = std::max(most, ++banks[address % 128 / bytes]);
        }
        return most;
    };
    each(&Fiber::stores8, 16, [&](const std::set<std::uint64_t>& addresses) {
        ++m.traffic.stores;
        m.traffic.store_wavefronts += wavefronts(addresses, 8);
    });
    each(&Fiber::reads16, 8, [&](const std::set<std::uint64_t>& addresses) {
        ++m.traffic.reads;
        m.traffic.read_wavefronts += wavefronts(addresses, 16);
    });
    each(&Fiber::loads16, 8, [&m](const std::set<std::uint64_t>& addresses) {
        std::set<std::uint64_t> sectors;
        for (std::uint64_t address : addresses) sectors.insert(address / 32);
        ++m.traffic.loads;
        m.traffic.sectors += static_cast<std::int64_t>(sectors.size());
    });
}

// Runs `body` for all threads of a grid; blocks of a cluster run together, clusters one after
// another.
inline void launch(int grid, int cluster, int threads, int shared_bytes,
                   std::function<void()> body) {
    Machine& m = machine();
    if (grid % cluster != 0) fail("launch: the grid is no multiple of the cluster");
    m.body = std::move(body);
    m.grid = Index{static_cast<unsigned>(grid), 1, 1};
    for (int first = 0; first < grid; first += cluster) {
        m.fibers.clear();
        m.blocks.assign(cluster, Block{});
        m.ready.clear();
        m.transfers.clear();
        m.at_cluster_sync = 0;
        for (int b = 0; b < cluster; ++b) {
            Block& blk = m.blocks[b];
            blk.shared.assign(kSharedStart + shared_bytes, 0xff);
            blk.warps.resize((threads + 31) / 32);
            blk.threads = threads;
            blk.index = Index{static_cast<unsigned>(first + b), 0, 0};
            for (int t = 0; t < threads; ++t) {
                auto f = std::make_unique<Fiber>();
                f->stack.resize(128 * 1024);
                f->block = b;
                f->thread = t;
                make_context(f->context, f->stack, fiber_main);
                m.ready.push_back(static_cast<int>(m.fibers.size()));
                m.fibers.push_back(std::move(f));
            }
        }
        std::size_t done = 0;
        while (done < m.fibers.size()) {
            if (!m.transfers.empty() && (m.ready.empty() || m.random() % 16 == 0)) {
                finish_transfer(m.random() % m.transfers.size());
                continue;
            }
            if (m.ready.empty()) {
                std::map<std::string, int> places;
                for (auto& f : m.fibers) {
                    if (f->state == Fiber::kBlocked) {
                        ++places[std::to_string(f->block) + "/warp " +
                                 std::to_string(f->thread / 32) + " at " + f->where];
                    }
                }
                std::string text = "deadlock:";
                for (auto& [place, count] : places) {
                    text += " " + std::to_string(count) + " threads of " + place + ";";
                }
                fail(text);
            }
            // Mostly in order (cheap and lock-step), sometimes any fiber.
            const std::size_t pick = m.random() % 4 == 0 ? m.random() % m.ready.size() : 0;
            std::swap(m.ready[pick], m.ready.back());
            m.current = m.ready.back();
            m.ready.pop_back();
            switch_context(m.scheduler, fiber().context);
            Fiber& f = fiber();
            if (f.state == Fiber::kDone) {
                if (!f.error.empty()) {
                    fail("block " + std::to_string(m.blocks[f.block].index.x) + ", thread " +
                         std::to_string(f.thread) + ": " + f.error);
                }
                ++done;
            }
        }
        if (!m.transfers.empty()) fail("a bulk copy was under way when its cluster ended");
        for (auto& f : m.fibers) {
            for (auto& group : f->products) {
                if (!group.empty()) fail("a wgmma was under way when its thread ended");
            }
        }
        if (m.count_traffic) add_traffic(m);
    }
    m.fibers.clear();
    m.blocks.clear();
}

// ---------------------------------------------------------------------------------- memory

inline unsigned char* shared_at(int in_block, std::uint32_t address, std::uint32_t bytes) {
    Block& b = machine().blocks[in_block];
    if (address % bytes != 0) fail("misaligned shared address " + std::to_string(address));
    if (address < kSharedStart || address + bytes > b.shared.size()) {
        fail("shared address " + std::to_string(address) + " is out of bounds");
    }
    return b.shared.data() + address;
}
inline unsigned char* shared_at(std::uint32_t address, std::uint32_t bytes) {
    return shared_at(fiber().block, address, bytes);
}

// ---------------------------------------------------------------------------------- meeting points

// The last of the 32 lanes to arrive runs `act` over all lanes' arguments; `name` must agree.
inline void warp_wide(const char* name, void* argument, const std::function<void(void**)>& act) {
    Fiber& f = fiber();
    Block& b = block();
    WarpPoint& point = b.warps[f.thread / 32];
    if (point.arrived != 0 && std::strcmp(point.name, name) != 0) {
        fail(std::string("a warp diverged: ") + name + " and " + point.name);
    }
    point.name = name;
    point.argument[f.thread % 32] = argument;
    if (++point.arrived < 32) {
        block_here(name);
        return;
    }
    point.arrived = 0;
    act(point.argument);
    const int first = machine().current - f.thread % 32;
    for (int lane = 0; lane < 32; ++lane) wake(first + lane);
}

inline void complete_phase(Barrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.parity ^= 1;
    barrier.pending = barrier.count;
    for (int id : barrier.waiting) wake(id);
    barrier.waiting.clear();
}
inline Barrier& barrier_at(int in_block, std::uint32_t address) {
    auto found = machine().blocks[in_block].barriers.find(address);
    if (found == machine().blocks[in_block].barriers.end()) {
        fail("no barrier was initialised at " + std::to_string(address));
    }
    return found->second;
}
inline void arrive(int in_block, std::uint32_t address) {
    Barrier& barrier = barrier_at(in_block, address);
    if (barrier.pending == 0) fail("more arrivals at a barrier than it expects");
    --barrier.pending;
    complete_phase(barrier);
}

// ---------------------------------------------------------------------------------- numbers

// All values of a 16-bit type.
inline const float* values(bool bf16) {
    static const auto tables = []() {
        std::vector<float> table(2 << 16);
        for (std::uint32_t bits = 0; bits < 1u << 16; ++bits) {
            const std::uint32_t wide = bits << 16;
            std::memcpy(&table[bits], &wide, 4);
            const std::uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023;
            const double size =
                exponent == 0    ? std::ldexp(fraction, -24)
                : exponent == 31 ? (fraction ? std::nan("") : INFINITY)
                                 : std::ldexp(1024.0 + fraction, static_cast<int>(exponent) - 25);
            table[(1 << 16) + bits] = static_cast<float>(bits >> 15 ? -size : size);
        }
        return table;
    }();
    return tables.data() + (bf16 ? 0 : 1 << 16);
}
inline float value_of(std::uint32_t bits, bool bf16) { return values(bf16)[bits & 0xffff]; }
// The exponent of a value, at least that of its type's smallest normal one.
inline int exponent_of(float x, int least) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
    return exponent < least ? least : exponent;
}
// A factor of 16 products.
struct Factor {
    float value = 0.0f;
    int exponent = -126;
};
inline Factor factor_of(std::uint32_t bits, bool bf16) {
    const float value = value_of(bits, bf16);
    return {value, exponent_of(value, bf16 ? -126 : -14)};
}
// How many products a tensor core adds at once, and how many bits it keeps below the largest
// exponent. tests/tensor_cores.py is the same in NumPy and says where it is from.
struct Adder {
    int products, bits;
};
constexpr Adder kAmpere{8, 24}, kHopper{16, 25};

// c + the sum of 16 products: aligned, cut, added exactly, cut to fp32.
inline float tensor_sum(float c, const double (&product)[16], const int (&exponent)[16],
                        Adder adder) {
    double plain = c;
    for (double x : product) plain += x;
    if (!std::isfinite(plain) || !machine().truncate) return static_cast<float>(plain);
    for (int start = 0; start < 16; start += adder.products) {
        int largest = exponent_of(c, -126);
        for (int k = start; k < start + adder.products; ++k) {
            if (product[k] != 0.0 && exponent[k] > largest) largest = exponent[k];
        }
        const double scale = std::ldexp(1.0, adder.bits - largest);
        auto cut = [scale](double x) { return static_cast<std::int64_t>(x * scale); };
        std::int64_t kept = cut(c);
        for (int k = start; k < start + adder.products; ++k) kept += cut(product[k]);
        const double sum = static_cast<double>(kept) / scale;
        c = static_cast<float>(sum);
        if (std::fabs(sum) >= std::ldexp(1.0, 128)) return c;  // infinite
        if (std::fabs(static_cast<double>(c)) > std::fabs(sum)) c = std::nextafterf(c, 0.0f);
    }
    return c;
}

}  // namespace emulator

// ==================================================================================== device.cuh's
// names

namespace fastproj::cuda {

struct Bf16 {
    static constexpr bool kIsBf16 = true;
    static constexpr std::uint32_t kOne = 0x3f80;
};
struct F16 {
    static constexpr bool kIsBf16 = false;
    static constexpr std::uint32_t kOne = 0x3c00;
};

struct alignas(128) TensorMap {
    const unsigned char* base;
    std::int64_t rows, batch, stride_bytes;
    std::int32_t box_samples, element_bytes;
};

using std::fabs;
using std::min;
inline float fmaf(float a, float b, float c) { return std::fma(a, b, c); }
inline float fabsf(float a) { return std::fabs(a); }

inline std::uint32_t and_xor(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    return (a & b) ^ c;
}
inline std::uint32_t and_or(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    return (a & b) | c;
}
inline std::uint32_t pick_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
    std::uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
        r |= static_cast<std::uint32_t>(both >> (selector >> (4 * i) & 7) * 8 & 255) << (8 * i);
    }
    return r;
}
inline std::uint32_t pack_low(std::uint32_t a, std::uint32_t b) { return (a & 0xffff) | b << 16; }
inline std::uint32_t pack_high(std::uint32_t a, std::uint32_t b) {
    return a >> 16 | (b & 0xffff0000u);
}
inline std::uint32_t float_bits(float x) {
    std::uint32_t r;
    std::memcpy(&r, &x, 4);
    return r;
}
inline float bits_float(std::uint32_t x) {
    float r;
    std::memcpy(&r, &x, 4);
    return r;
}
inline double words_double(std::uint32_t low, std::uint32_t high) {
    const std::uint64_t bits = static_cast<std::uint64_t>(high) << 32 | low;
    double r;
    std::memcpy(&r, &bits, 8);
    return r;
}
inline std::uint32_t round_bf16(float x) {
    const std::uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline std::uint32_t round_bf16x2(float lo, float hi) {
    return round_bf16(lo) | round_bf16(hi) << 16;
}
inline float half_to_float(std::uint32_t bits) { return emulator::value_of(bits, false); }
inline std::uint32_t float_to_half(float x) {  // only for values that fp16 holds exactly
    const float size = std::fabs(x);
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // [0.5, 1)
    if (size == 0.0f) return 0;
    if (exponent < -13)
        return static_cast<std::uint32_t>(std::ldexp(size, 24)) | (x < 0 ? 0x8000u : 0u);
    const auto bits = static_cast<std::uint32_t>(std::ldexp(fraction, 11)) & 1023u;
    const std::uint32_t half = static_cast<std::uint32_t>(exponent + 14) << 10 | bits;
    if (half_to_float(half) != size) emulator::fail("float_to_half: not exact");
    return half | (x < 0 ? 0x8000u : 0u);
}
inline std::uint32_t opaque(std::uint32_t x) { return x; }
inline std::uintptr_t opaque_address(std::uintptr_t x) { return x; }

inline std::uint32_t shared_base() { return emulator::kSharedStart; }
inline void store_shared(std::uint32_t address, std::uint32_t x, std::uint32_t y, std::uint32_t z,
                         std::uint32_t w) {
    const std::uint32_t words[4] = {x, y, z, w};
    std::memcpy(emulator::shared_at(address, 16), words, 16);
    emulator::fiber().stored = true;
}
inline void store_shared(std::uint32_t address, std::uint32_t x, std::uint32_t y) {
    const std::uint32_t words[2] = {x, y};
    std::memcpy(emulator::shared_at(address, 8), words, 8);
    emulator::fiber().stored = true;
    if (emulator::machine().count_traffic) emulator::fiber().stores8.push_back(address);
}
inline void store_shared(std::uint32_t address, std::uint32_t x) {
    std::memcpy(emulator::shared_at(address, 4), &x, 4);
    emulator::fiber().stored = true;
}
inline std::uint32_t load_shared(std::uint32_t address) {
    std::uint32_t r;
    std::memcpy(&r, emulator::shared_at(address, 4), 4);
    return r;
}
inline void load_shared_8(std::uint32_t address, std::uint32_t& x, std::uint32_t& y) {
    std::uint32_t r[2];
    std::memcpy(r, emulator::shared_at(address, 8), 8);
    x = r[0], y = r[1];
}
inline void load_shared_16(std::uint32_t address, std::uint32_t& x, std::uint32_t& y,
                           std::uint32_t& z, std::uint32_t& w) {
    std::uint32_t r[4];
    std::memcpy(r, emulator::shared_at(address, 16), 16);
    x = r[0], y = r[1], z = r[2], w = r[3];
}
template <int kApart>
void load_shared_32(std::uint32_t address, std::uint32_t (&r)[8]) {
    for (int half = 0; half < 2; ++half) {
        std::memcpy(r + 4 * half, emulator::shared_at(address + kApart * half, 16), 16);
        if (emulator::machine().count_traffic) {
            emulator::fiber().reads16.push_back(address + kApart * half);
        }
    }
}
inline std::uint32_t load_shared_u16(std::uint32_t address) {
    std::uint16_t r;
    std::memcpy(&r, emulator::shared_at(address, 2), 2);
    return r;
}
inline void store_shared_f64(std::uint32_t address, double x) {
    std::memcpy(emulator::shared_at(address, 8), &x, 8);
}
inline double load_shared_f64(std::uint32_t address) {
    double r;
    std::memcpy(&r, emulator::shared_at(address, 8), 8);
    return r;
}

template <class T>
T load_global(const T* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T) != 0) emulator::fail("misaligned load");
    return *p;
}
template <class T>
T read_global(const T* p) {
    return load_global(p);
}
template <class T>
void write_global(T* p, T value) {
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T) != 0) emulator::fail("misaligned store");
    *p = value;
}

inline void copy_async(std::uint32_t to, const void* from, std::uint32_t size,
                       std::uint32_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(from) % size != 0) emulator::fail("misaligned cp.async");
    std::memset(emulator::shared_at(to, size), 0xff, size);
    emulator::fiber().copies.back().push_back({to, from, size, bytes});
    if (size == 16 && emulator::machine().count_traffic) {
        emulator::fiber().loads16.push_back(reinterpret_cast<std::uintptr_t>(from));
    }
}
inline void copy_async_16(std::uint32_t to, const void* from, bool valid) {
    copy_async(to, from, 16, valid ? 16 : 0);
}
inline void copy_async_4(std::uint32_t to, const void* from, int bytes) {
    copy_async(to, from, 4, static_cast<std::uint32_t>(bytes));
}
inline void copy_async_commit() { emulator::fiber().copies.emplace_back(); }
template <int kPending>
void copy_async_wait() {
    auto& groups = emulator::fiber().copies;
    while (groups.size() > kPending + 1) {  // the last one is still open
        for (const emulator::Copy& copy : groups.front()) {
            unsigned char* to = emulator::shared_at(copy.to, copy.size);
            std::memset(to, 0, copy.size);
            std::memcpy(to, copy.from, copy.bytes);
        }
        groups.pop_front();
    }
}

inline void __syncthreads() {
    emulator::Block& b = emulator::block();
    if (++b.at_sync < b.threads) {
        emulator::block_here("__syncthreads");
        return;
    }
    b.at_sync = 0;
    auto& fibers = emulator::machine().fibers;
    for (std::size_t i = 0; i < fibers.size(); ++i) {
        if (fibers[i]->block == emulator::fiber().block &&
            std::strcmp(fibers[i]->where, "__syncthreads") == 0) {
            emulator::wake(static_cast<int>(i));
        }
    }
}

inline void __syncwarp() {
    emulator::warp_wide("__syncwarp", nullptr, [](void**) {});
}

// Section 9.7.14.5.15 (ldmatrix): lane l names row l % 8 of matrix l / 8, and gets elements 2 (l %
// 4) and the next of row l / 4 of each matrix.
inline void load_matrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
    struct Argument {
        std::uint32_t* r;
        std::uint32_t address;
    } argument{r, address};
    emulator::warp_wide("ldmatrix", &argument, [](void** all) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const auto* row = static_cast<Argument*>(all[8 * i + lane / 4]);
                std::memcpy(&static_cast<Argument*>(all[lane])->r[i],
                            emulator::shared_at(row->address, 16) + 4 * (lane % 4), 4);
            }
        }
    });
}
inline std::uint32_t transpose_8x8(std::uint32_t a) {
    struct Argument {
        std::uint32_t in, out;
    } argument{a, 0};
    emulator::warp_wide("movmatrix", &argument, [](void** all) {
        for (int lane = 0; lane < 32; ++lane) {
            std::uint32_t out = 0;
            for (int e = 0; e < 2; ++e) {
                const int row = 2 * (lane % 4) + e, column = lane / 4;  // in the source
                const std::uint32_t pair = static_cast<Argument*>(all[row * 4 + column / 2])->in;
                out |= ((pair >> (16 * (column & 1))) & 0xffff) << (16 * e);
            }
            static_cast<Argument*>(all[lane])->out = out;
        }
    });
    return argument.out;
}
// Section 9.7.14.5.8 (m16n8k16): A registers 0..3 are (row g, k 2t), (g + 8, 2t), (g, 2t + 8), (g +
// 8, 2t + 8); B registers are k 2t and 2t + 8 of column g; D is (g, 2t), (g, 2t + 1), (g + 8, 2t),
// (g + 8, 2t + 1).
template <class Op>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    struct Argument {
        float* d;
        const std::uint32_t* a;
        std::uint32_t b[2];
    } argument{d, a, {b0, b1}};
    emulator::warp_wide("mma", &argument, [](void** all) {
        emulator::Factor left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const auto* x = static_cast<Argument*>(all[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; ++r) {
                for (int e = 0; e < 2; ++e) {
                    left[g + 8 * (r & 1)][2 * t + 8 * (r >> 1) + e] =
                        emulator::factor_of(x->a[r] >> (16 * e), Op::kIsBf16);
                }
            }
            for (int r = 0; r < 2; ++r) {
                for (int e = 0; e < 2; ++e) {
                    right[2 * t + 8 * r + e][g] =
                        emulator::factor_of(x->b[r] >> (16 * e), Op::kIsBf16);
                }
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            auto* x = static_cast<Argument*>(all[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) {
                double product[16];
                int exponent[16];
                for (int k = 0; k < 16; ++k) {
                    const emulator::Factor& l = left[g + 8 * (i >> 1)][k];
                    const emulator::Factor& r = right[k][2 * t + (i & 1)];
                    product[k] = static_cast<double>(l.value) * r.value;
                    exponent[k] = l.exponent + r.exponent;
                }
                x->d[i] = emulator::tensor_sum(x->d[i], product, exponent, emulator::kAmpere);
            }
        }
    });
}

inline void barrier_init(std::uint32_t address, std::uint32_t count) {
    emulator::shared_at(address, 8);
    emulator::Barrier barrier;
    barrier.count = barrier.pending = count;
    emulator::block().barriers[address] = barrier;
}
inline void barrier_init_fence() {}
inline void barrier_arrive(std::uint32_t address) {
    if (emulator::fiber().stored) emulator::fail("arrival without a proxy fence after stores");
    emulator::arrive(emulator::fiber().block, address);
}
inline std::uint32_t remote_address(std::uint32_t address, std::uint32_t rank) {
    if (rank >= emulator::machine().blocks.size()) emulator::fail("no such block in the cluster");
    return rank << 24 | address;
}
inline void barrier_arrive_remote(std::uint32_t remote, bool go) {
    if (go) emulator::arrive(static_cast<int>(remote >> 24), remote & 0xffffff);
}
inline void barrier_arrive_expect(std::uint32_t address, std::uint32_t bytes) {
    emulator::barrier_at(emulator::fiber().block, address).bytes += bytes;
    emulator::arrive(emulator::fiber().block, address);
}
inline void barrier_wait(std::uint32_t address, std::uint32_t parity) {
    if (emulator::machine().random() % 4 == 0) emulator::yield();
    for (;;) {
        emulator::Barrier& barrier = emulator::barrier_at(emulator::fiber().block, address);
        if (barrier.parity != parity) return;
        barrier.waiting.push_back(emulator::machine().current);
        emulator::block_here("mbarrier wait");
    }
}
inline void fence_proxy_async() { emulator::fiber().stored = false; }
inline std::uint32_t cluster_rank() { return static_cast<std::uint32_t>(emulator::fiber().block); }
inline void cluster_sync() {
    emulator::Machine& m = emulator::machine();
    if (++m.at_cluster_sync < static_cast<int>(m.fibers.size())) {
        emulator::block_here("cluster sync");
        return;
    }
    m.at_cluster_sync = 0;
    for (std::size_t i = 0; i < m.fibers.size(); ++i) emulator::wake(static_cast<int>(i));
}

inline void prefetch_tensor_map(const TensorMap*) {}
// Section 9.7.9.25.5.2: a box of 64 rows x box_samples; what lies outside the tensor is zero. Of
// 16-bit elements with 128-byte swizzle, which exchanges address bits 4..6 with their exclusive or
// with bits 7..9; of 32-bit ones without.
inline void copy_box_multicast(std::uint32_t to, const TensorMap* map, std::int32_t x,
                               std::int32_t y, std::uint32_t barrier, std::uint16_t mask) {
    if (to % 128 != 0) emulator::fail("bulk copy to a misaligned address");
    for (std::size_t rank = 0; rank < emulator::machine().blocks.size(); ++rank) {
        if (!(mask >> rank & 1)) continue;
        const int size = map->element_bytes;
        const std::uint32_t bytes = map->box_samples * 64 * size;
        for (std::uint32_t at = 0; at < bytes; at += 16) {
            std::memset(emulator::shared_at(rank, to + at, 16), 0xff, 16);
        }
        emulator::machine().transfers.push_back({[=]() {
            for (std::int64_t s = 0; s < map->box_samples; ++s) {
                for (int e = 0; e < 64; ++e) {
                    std::uint32_t value = 0;
                    if (x + e >= 0 && x + e < map->rows && y + s < map->batch) {
                        std::memcpy(&value,
                                    map->base + (y + s) * map->stride_bytes + (x + e) * size, size);
                    }
                    std::uint32_t address = to + static_cast<std::uint32_t>((s * 64 + e) * size);
                    if (size == 2) address ^= (address >> 7 & 7) << 4;
                    std::memcpy(emulator::shared_at(rank, address, size), &value, size);
                }
            }
            emulator::Barrier& b = emulator::barrier_at(static_cast<int>(rank), barrier);
            b.bytes -= bytes;
            emulator::complete_phase(b);
        }});
    }
}
inline void copy_box(std::uint32_t to, const TensorMap* map, std::int32_t x, std::int32_t y,
                     std::uint32_t barrier) {
    copy_box_multicast(to, map, x, y, barrier,
                       static_cast<std::uint16_t>(1u << emulator::fiber().block));
}

template <int kCount>
void wgmma_sums(float (&)[kCount]) {}
template <int kRegisters>
void registers_decrease() {}
template <int kRegisters>
void registers_increase() {}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::fiber().products.emplace_back(); }
inline std::uint64_t wgmma_descriptor(std::uint32_t address) {
    const std::uint32_t low = ((address & 0x3ffffu) >> 4) | 1u << 16;
    return static_cast<std::uint64_t>((1024u >> 4) | 1u << 30) << 32 | low;
}
template <bool kFixed>
std::uint64_t wgmma_advance(std::uint64_t descriptor, int bytes) {
    return descriptor + (bytes >> 4);
}
template <class Op, int N>
void wgmma_m64k16(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint64_t descriptor,
                  std::int32_t keep_sum) {
    emulator::fiber().products.back().push_back({a, d, descriptor, N, keep_sum != 0, Op::kIsBf16});
}

// Element (k, n) of operand B, K-major with 128-byte swizzle (section 9.7.15.5.1.2): groups of 8
// samples lie `stride offset` apart, samples 128 bytes, and the swizzle acts on the address.
inline emulator::Factor wgmma_element(std::uint64_t descriptor, int k, int n, bool bf16) {
    if (descriptor >> 62 != 1)
        emulator::fail("the descriptor's layout is not the 128-byte swizzle");
    if (descriptor >> 49 & 7) emulator::fail("the descriptor has a base offset");
    const std::uint32_t start = static_cast<std::uint32_t>(descriptor & 0x3fff) << 4;
    const std::uint32_t stride = static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    std::uint32_t address = start + (n / 8) * stride + (n % 8) * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    std::uint16_t bits;
    std::memcpy(&bits, emulator::shared_at(address, 2), 2);
    return emulator::factor_of(bits, bf16);
}
// Section 9.7.15.5.1.1: as m16n8k16, each warp 16 of the 64 rows; D register i is row g + 8 (i / 2
// % 2), column 8 (i / 4) + 2 t + i % 2.
template <int kPending>
void wgmma_wait() {
    emulator::warp_wide("wgmma.wait_group", &emulator::fiber(), [](void** all) {
        auto lane_fiber = [&](int lane) { return static_cast<emulator::Fiber*>(all[lane]); };
        auto& first = lane_fiber(0)->products;
        while (first.size() > kPending + 1) {
            for (std::size_t op = 0; op < first.front().size(); ++op) {
                const emulator::Product& shape = first.front()[op];
                emulator::Factor left[16][16];
                for (int lane = 0; lane < 32; ++lane) {
                    const auto& groups = lane_fiber(lane)->products;
                    if (groups.size() != first.size() ||
                        groups.front().size() != first.front().size() ||
                        groups.front()[op].descriptor != shape.descriptor) {
                        emulator::fail("the lanes of a warp issued different products");
                    }
                    const int g = lane / 4, t = lane % 4;
                    for (int r = 0; r < 4; ++r) {
                        for (int e = 0; e < 2; ++e) {
                            left[g + 8 * (r & 1)][2 * t + 8 * (r >> 1) + e] = emulator::factor_of(
                                groups.front()[op].a[r] >> (16 * e), shape.bf16);
                        }
                    }
                }
                std::vector<emulator::Factor> right(16 * shape.n);
                for (int k = 0; k < 16; ++k) {
                    for (int n = 0; n < shape.n; ++n) {
                        right[k * shape.n + n] = wgmma_element(shape.descriptor, k, n, shape.bf16);
                    }
                }
                for (int lane = 0; lane < 32; ++lane) {
                    const emulator::Product& product = lane_fiber(lane)->products.front()[op];
                    const int g = lane / 4, t = lane % 4;
                    for (int i = 0; i < shape.n / 2; ++i) {
                        const int row = g + 8 * (i / 2 % 2), n = 8 * (i / 4) + 2 * t + i % 2;
                        double term[16];
                        int exponent[16];
                        for (int k = 0; k < 16; ++k) {
                            const emulator::Factor& l = left[row][k];
                            const emulator::Factor& r = right[k * shape.n + n];
                            term[k] = static_cast<double>(l.value) * r.value;
                            exponent[k] = l.exponent + r.exponent;
                        }
                        product.d[i] = emulator::tensor_sum(product.keep ? product.d[i] : 0.0f,
                                                            term, exponent, emulator::kHopper);
                    }
                }
            }
            for (int lane = 0; lane < 32; ++lane) lane_fiber(lane)->products.pop_front();
        }
    });
}

}  // namespace fastproj::cuda
