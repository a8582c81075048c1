// Projection with mma.sync: sm_80 and everything later.
//
// A block of 8 warps owns 256 columns, 32 a warp, and streams tiles of G through a ring in shared
// memory. Aligned 16-bit G comes by asynchronous copies. All other G comes by asynchronous copies
// of the elements as they are, which are converted a stage later: fp32 into bf16 terms, and
// anything unaligned. No register waits for memory, because loads into registers would share a
// scoreboard, and a wait for one is a wait for all. Each warp generates its fragments of R
// transposed (operand A) in registers, and reads G transposed (operand B) with ldmatrix.
#pragma once

#include "fragments.cuh"

namespace fastproj::cuda {

constexpr int kThreads80 = 256;

template <Kind kKind, class OpType, int kTermCount, int BLOCK_B>
struct Config80 {
    using Op = OpType;
    static constexpr Kind kind = kKind;
    static constexpr int kTerms = kTermCount;
    static constexpr int kBlockB = BLOCK_B;
    static constexpr int kTiles = 2;  // 16-column tiles of a warp
    static constexpr int kColumns = 8 * 16 * kTiles;
    static constexpr int kSubtiles = BLOCK_B < 64 && kTerms == 1 ? 64 / BLOCK_B : 1;
    static constexpr int kStageRows = 64 * kSubtiles;
    static constexpr int kPanelStages = kPanelRows / kStageRows;
    static constexpr int kTileBytes = BLOCK_B * 128;
    static constexpr int kTermBytes = kTileBytes * kSubtiles;
    static constexpr int kStageBytes = kTermBytes * kTerms;
    static constexpr int kStages = kTerms == 1 ? 4 : 2;
    static constexpr int kTable = kKind == Kind::kGaussian ? kTableSpace : 0;
    static constexpr int kPieces = BLOCK_B * kStageRows / 8;  // chunks of 8 elements in a stage
    static constexpr int kChunks = (kPieces + kThreads80 - 1) / kThreads80;  // of one thread
    // Elements as they are, 32 bits each, lie behind two stages of tiles: with four there is room.
    static constexpr int kRawBytes = kChunks * kThreads80 * 32;
    static constexpr int kRingBytes = kStages * kStageBytes + (kTerms == 1 ? 0 : kRawBytes);
    static constexpr int kSharedBytes = kTable + kRingBytes;
    static constexpr int kFoldRows = kTerms == 1 ? 2048 : kTerms == 2 ? 1024 : 64;
    // Stages that share a word of the generator, unrolled so that shifts are constant.
    static constexpr int kSpan = kStageRows < 128 ? 2 : 1;
    static_assert(2 * kStageBytes + kRawBytes <= kRingBytes, "room for what is converted");
    static_assert(kSharedBytes <= 99 * 1024, "more shared memory than a block of sm_86 can have");
};

// Moves the tiles of G: a thread's chunk j is part of sample(j) in subtile(j). An asynchronous copy
// moves 8 rows, 16 bytes of a swizzled row of 128.
template <class C>
struct Feeder80 {
    const ProjectParams& p;
    std::uint32_t tiles;
    int b, row, thread;    // first sample and first row of the item
    bool async;            // straight into tiles
    std::uint32_t slots;   // of the ring of tiles
    std::uint32_t halves;  // see store_chunk

    FASTPROJ_DEVICE Feeder80(const ProjectParams& params, std::uint32_t at, const WorkItem& item)
        : p(params),
          tiles(at),
          b(item.batch_tile * C::kBlockB),
          row(item.first * kPanelRows - params.row_shift),
          thread(threadIdx.x),
          async(params.loader == static_cast<std::int32_t>(Loader::kCpAsync)),
          slots(async ? C::kStages : 2),
          halves(0x5410) {
        if (params.input == static_cast<std::int32_t>(Dtype::kF32)) return;
        // The same for all chunks: their samples and rows differ by even numbers.
        const std::uint32_t step = static_cast<std::uint32_t>(params.grads_stride_p);
        halves = element_halves(
            params.grads,
            sample(0) * static_cast<std::uint32_t>(params.grads_stride_b) - params.row_shift * step,
            step);
    }

    FASTPROJ_DEVICE int sample(int j) const {
        return chunk_sample(j * 32 + (thread >> 3)) % C::kBlockB;
    }
    FASTPROJ_DEVICE int subtile(int j) const { return (j * 32 + (thread >> 3)) / C::kBlockB; }
    FASTPROJ_DEVICE bool mine(int j) const { return j * kThreads80 + thread < C::kPieces; }

    FASTPROJ_DEVICE void copy(int stage, int slot) const {
        const int c = thread & 7;
#pragma unroll
        for (int j = 0; j < C::kChunks; ++j) {
            if (!mine(j)) continue;
            const int n = sample(j);
            const int i = row + stage * C::kStageRows + subtile(j) * 64 + c * 8;
            const std::uint32_t to = tiles + slot * C::kStageBytes + subtile(j) * C::kTileBytes +
                                     n * 128 + ((c ^ (n & 7)) << 4);
            const bool inside = b + n < p.batch && i >= 0 && i + 8 <= p.rows;
            if (inside || b + n >= p.batch || i >= p.rows || i + 8 <= 0) {
                // An aligned address even where nothing is read: p.grads itself need not be.
                const auto base = reinterpret_cast<std::uintptr_t>(p.grads);
                const std::uintptr_t from = inside ? base + ((b + n) * p.grads_stride_b + i) * 2
                                                   : base & ~std::uintptr_t{15};
                copy_async_16(to, reinterpret_cast<const void*>(from), inside);
            } else {  // the piece straddles an end of the row
                const auto* from = static_cast<const std::uint16_t*>(p.grads);
                std::uint32_t edge[4] = {0, 0, 0, 0};
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    if (i + e < 0 || i + e >= p.rows) continue;
                    const std::uint32_t bits =
                        load_global(from + (b + n) * p.grads_stride_b + i + e);
                    edge[e >> 1] |= bits << (16 * (e & 1));
                }
                store_shared(to, edge[0], edge[1], edge[2], edge[3]);
            }
        }
    }
    // Where this thread's chunk j lies until it is converted; its second half is `kHalf` further
    // on.
    static constexpr int kHalf = kThreads80 * 16;
    FASTPROJ_DEVICE std::uint32_t raw(int j) const {
        return tiles + 2 * C::kStageBytes + j * 2 * kHalf + thread * 16;
    }
    // Rows i .. i + 3 and i + 32 .. i + 35 of a sample, for each chunk. Rows outside the piece and
    // samples outside the batch are zero.
    FASTPROJ_DEVICE void fill(int stage) const {
        const bool wide = p.input == static_cast<std::int32_t>(Dtype::kF32);
        const int bytes = wide ? 4 : 2;
        const std::int64_t step_b = p.grads_stride_b * bytes, step_p = p.grads_stride_p * bytes;
        const auto base = reinterpret_cast<std::uintptr_t>(p.grads);
        auto place = [&](int n, int i) {
            return base + static_cast<std::uintptr_t>(n * step_b + i * step_p);
        };
        const std::uintptr_t last = wide ? 0 : place(p.batch - 1, p.rows - 1);
#pragma unroll
        for (int j = 0; j < C::kChunks; ++j) {
            if (!mine(j)) continue;
            const int n = b + sample(j);
            const int i = row + stage * C::kStageRows + subtile(j) * 64 + (thread & 7) * 4;
            std::uintptr_t from = place(n, i);
            if (p.loader == static_cast<std::int32_t>(Loader::kVector) && n < p.batch && i >= 0 &&
                i + 36 <= p.rows) {
                copy_async_16(raw(j), reinterpret_cast<const void*>(from), true);
                copy_async_16(raw(j) + kHalf, reinterpret_cast<const void*>(from + 32 * 4), true);
                continue;
            }
            const std::uint32_t rows = n < p.batch ? p.rows : 0;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const bool valid = static_cast<std::uint32_t>(i + e + (e >> 2) * 28) < rows;
                copy_element(raw(j) + (e >> 2) * kHalf + (e & 3) * 4, from, valid, last);
                from += static_cast<std::uintptr_t>(e == 3 ? step_p * 29 : step_p);
            }
        }
    }
    // What fill() brought, into tiles: a thread reads what it copied.
    FASTPROJ_DEVICE void convert(int slot) const {
        copy_async_wait<0>();
#pragma unroll
        for (int j = 0; j < C::kChunks; ++j) {
            if (!mine(j)) continue;
            std::uint32_t x[8];
            load_shared_32<kHalf>(raw(j), x);
            store_chunk<typename C::Op, C::kTerms>(
                p, tiles + slot * C::kStageBytes + subtile(j) * C::kTileBytes, C::kTermBytes,
                sample(j), thread & 7, x, halves);
        }
    }
    // Before the loop over `stages`.
    FASTPROJ_DEVICE void start(int stages) {
        if (async) {
#pragma unroll
            for (int s = 0; s < C::kStages - 1; ++s) {
                if (s < stages) copy(s, s);
                copy_async_commit();
            }
        } else {
            fill(0);
            copy_async_commit();
            convert(0);
            if (stages > 1) fill(1);
            copy_async_commit();
        }
    }
    // Makes stage i readable and sets others on their way; the block is in step afterwards.
    FASTPROJ_DEVICE void step(int i, int stages) {
        if (async) copy_async_wait<C::kStages - 2>();
        __syncthreads();
        if (async) {
            const int next = i + C::kStages - 1;
            if (next < stages) copy(next, next % C::kStages);
        } else {
            if (i + 1 < stages) convert((i + 1) % 2);
            if (i + 2 < stages) fill(i + 2);
        }
        copy_async_commit();
        __syncwarp();
    }
};

template <class C>
FASTPROJ_DEVICE void project80(const ProjectParams& p) {
    constexpr int kPairs = C::kBlockB / 16;  // ldmatrix.x4 of one k16 step, 16 samples each
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const std::uint32_t base = shared_base();
    const std::uint32_t table = table_address(base);
    const std::uint32_t tiles = base + C::kTable;
    if constexpr (C::kind == Kind::kGaussian) {
        fill_table<typename C::Op>(table, threadIdx.x, kThreads80);
    }
    GeneratorKey key;
    key.key0 = p.key0;
    key.key1 = p.key1;
    key.counter2 = p.counter2 | (lane & 3);
    key.stream = p.stream;
    key.sign_mask = p.sign_mask;
    key.table = table | lane * 4;

    // Row of G in shared memory that this lane names to ldmatrix: matrices 0 and 1 are samples 0-7,
    // rows 0-7 and 8-15 of P; 2 and 3 are samples 8-15. The 16-byte piece is swizzled by the
    // sample.
    const std::uint32_t lane_row = ((lane >> 4) * 8 + (lane & 7)) * 128;
    const std::uint32_t lane_piece = (((lane >> 3) & 1) ^ (lane & 7)) << 4;

    for (int index = blockIdx.x; index < p.items; index += gridDim.x) {
        const WorkItem item = WorkItem::at(p, index);
        const int column = item.col_tile * C::kColumns + warp * 16 * C::kTiles + (lane >> 2);
        const int stages = (item.last - item.first) * C::kPanelStages;
        float acc[C::kTiles][2 * kPairs][4], sum[C::kTiles][2 * kPairs][4];
        clear_sums(acc);
        clear_sums(sum);

        Feeder80<C> feeder(p, tiles, item);
        __syncthreads();  // the last item's readers are done; the table is written
        feeder.start(stages);

        Generator<C::kind, typename C::Op, C::kTiles> generator;
        for (int i = 0; i < stages; i += C::kSpan) {
            const int in_panel = i % C::kPanelStages;
            const std::uint32_t absolute = p.first_panel + item.first + i / C::kPanelStages;
            if (in_panel == 0) {
#pragma unroll
                for (int m = 0; m < C::kTiles; ++m)
                    generator.start(key, m, absolute, column + m * 16);
                if (C::kFoldRows > 64 && i / C::kPanelStages % (C::kFoldRows / kPanelRows) == 0)
                    fold_sums(sum, acc);
            }
#pragma unroll
            for (int s = 0; s < C::kSpan; ++s) {
                feeder.step(i + s, stages);
                const std::uint32_t stage =
                    tiles + ((i + s) & (feeder.slots - 1)) * C::kStageBytes + lane_row;
#pragma unroll
                for (int sub = 0; sub < C::kSubtiles; ++sub) {
                    const int half = (s * C::kSubtiles + sub) & 1;
                    const int group = (in_panel + s) * C::kSubtiles + sub;
                    std::uint32_t a[C::kTiles][4][4];
#pragma unroll
                    for (int m = 0; m < C::kTiles; ++m) {
                        generator.fragments(key, m, half, group, absolute, column + m * 16, a[m]);
                    }
#pragma unroll
                    for (int t = C::kTerms - 1; t >= 0; --t) {  // small terms first
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            const std::uint32_t from = stage + t * C::kTermBytes +
                                                       sub * C::kTileBytes +
                                                       (lane_piece ^ (k << 5));
#pragma unroll
                            for (int n = 0; n < kPairs; ++n) {
                                std::uint32_t g[4];
                                load_matrix_x4(g, from + n * 16 * 128);
#pragma unroll
                                for (int m = 0; m < C::kTiles; ++m) {
                                    mma_m16n8k16<typename C::Op>(acc[m][2 * n], a[m][k], g[0],
                                                                 g[1]);
                                    mma_m16n8k16<typename C::Op>(acc[m][2 * n + 1], a[m][k], g[2],
                                                                 g[3]);
                                }
                            }
                        }
                    }
                    if (half == 1) generator.advance();
                    if (C::kFoldRows == 64) fold_sums(sum, acc);
                }
            }
        }
        copy_async_wait<0>();
        fold_sums(sum, acc);
#pragma unroll
        for (int m = 0; m < C::kTiles; ++m) {
#pragma unroll
            for (int n = 0; n < 2 * kPairs; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {  // D: columns of R down, samples across
                    const int k = column + m * 16 + 8 * (i >> 1);
                    const int b = item.batch_tile * C::kBlockB + n * 8 + 2 * (lane & 3) + (i & 1);
                    store_result(p, item.split, b, k, sum[m][n][i]);
                }
            }
        }
    }
}

template <class Op, int kTerms, int BLOCK_B>
FASTPROJ_KERNEL(kThreads80)
project_rademacher_sm80_kernel(FASTPROJ_GRID_CONSTANT ProjectParams params) {
    project80<Config80<Kind::kRademacher, Op, kTerms, BLOCK_B>>(params);
}

template <class Op, int kTerms, int BLOCK_B>
FASTPROJ_KERNEL(kThreads80)
project_gaussian_sm80_kernel(FASTPROJ_GRID_CONSTANT ProjectParams params) {
    project80<Config80<Kind::kGaussian, Op, kTerms, BLOCK_B>>(params);
}

// For the lists in kernels.hpp: returns the kernel if it is the one that `key` names.
#define FASTPROJ_CASE80(kKind, kernel, Op, terms, block_b)                                 \
    if (key == KernelKey{kKind, Op::kIsBf16, terms, block_b}) {                            \
        return kernel_of<Config80<kKind, Op, terms, block_b>>(&kernel<Op, terms, block_b>, \
                                                              kThreads80);                 \
    }
#define FASTPROJ_RADEMACHER80(...) \
    FASTPROJ_CASE80(Kind::kRademacher, project_rademacher_sm80_kernel, __VA_ARGS__)
#define FASTPROJ_GAUSSIAN80(...) \
    FASTPROJ_CASE80(Kind::kGaussian, project_gaussian_sm80_kernel, __VA_ARGS__)

}  // namespace fastproj::cuda
