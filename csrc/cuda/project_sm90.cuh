// Projection on sm_90a: wgmma with A = R transposed, generated in registers, and G tiles in shared
// memory.
//
// A block is one producer warpgroup and two consumer warpgroups, persistent over work items. The
// producer fills a ring of stages: by bulk tensor copies (16-bit G, aligned), multicast to the two
// blocks of a cluster that share G; or through registers (fp32 split into bf16 terms, and anything
// unaligned). A consumer owns kTiles x 64 columns; while the tensor cores work on one tile it
// generates the fragments of the other.
#pragma once

#include "fragments.cuh"

namespace fastproj::cuda {

constexpr int kThreads90 = 384;

// A full unrolled 512-row unit gives constant shifts and descriptor offsets; the Gaussian body is
// too long.
template <Kind kKind, class OpType, int kTermCount, int BLOCK_B, int kTileCount>
struct Config90 {
    using Op = OpType;
    static constexpr Kind kind = kKind;
    static constexpr int kTerms = kTermCount;
    static constexpr int kBlockB = BLOCK_B;
    static constexpr int kTiles = kTileCount;         // 64-column tiles of one consumer
    static constexpr int kColumns = 2 * 64 * kTiles;  // of the block
    // 64-row tiles in a stage.
    static constexpr int kSubtiles = BLOCK_B >= 64 ? 1 : kTerms > 1 ? 2 : 64 / BLOCK_B;
    static constexpr int kStageRows = 64 * kSubtiles;
    static constexpr int kUnitStages = kBlockRows / kStageRows;
    static constexpr int kTileBytes = BLOCK_B * 128;
    static constexpr int kTermBytes = kTileBytes * kSubtiles;
    static constexpr int kStageBytes = kTermBytes * kTerms;
    // Rademacher: the loop over a unit's stages is unrolled and the ring holds whole units, so a
    // stage's place in the unit fixes its address. The Gaussian body is too long for that; its ring
    // counts stages.
    static constexpr bool kUnroll = kKind == Kind::kRademacher;
    static constexpr int kUnitBytes = kStageBytes * kUnitStages;
    static constexpr int kUnits =  // in the ring
        kTerms > 1 || kUnitBytes > 48 * 1024 ? 1 : 96 * 1024 / kUnitBytes;
    static constexpr int kStages = kUnroll ? kUnits * kUnitStages : kTerms == 3 ? 5 : 6;
    // One tile alternates between two sets of fragments: registers that a product in flight reads
    // must not be written, and in a rolled loop both sets would be the same registers.
    static constexpr int kUnrollStages = kUnroll       ? kUnitStages
                                         : kTerms == 3 ? 4
                                         : kTiles == 1 ? 2
                                                       : 1;
    static constexpr int kTable = kKind == Kind::kGaussian ? kTableSpace : 0;
    static constexpr int kSharedBytes = kTable + kStages * kStageBytes + 2 * kStages * 8;
    // Chunks of 8 elements that a producer thread moves per stage.
    static constexpr int kChunks = BLOCK_B * kStageRows / 8 / 128;
    // Rows that one accumulator adds up before it is folded into a second one. The tensor cores
    // cut, they do not round; three terms promise fp32, so they are folded often.
    static constexpr int kFoldRows = kTerms == 1 ? 2048 : kTerms == 2 ? 1024 : 64;
    static constexpr int kFoldUnits = kFoldRows < kBlockRows ? 1 : kFoldRows / kBlockRows;
    static constexpr bool kFoldGroups = kFoldRows == 64;
    // A rolled loop over stages that folds must drain in each: the compiler follows products in
    // flight through straight code only.
    static constexpr bool kFoldStages = kFoldGroups && !kUnroll;
    // The block starts with 168 registers a thread; what the producers give up the consumers can
    // have.
    static constexpr int kProducerRegisters = 88;
    static constexpr int kConsumerRegisters = 208;
    static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= kThreads90 * 168,
                  "the consumers would wait for registers forever");
    static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block can have");
    static_assert(BLOCK_B % 16 == 0 && kStages >= 2, "tile shape");
};

// Position in a ring of kCount places.
template <int kCount>
struct Ring {
    std::uint32_t place = 0, parity = 0;
    FASTPROJ_DEVICE void advance() {
        if (++place == kCount) {
            place = 0;
            parity ^= 1;
        }
    }
};

#if FASTPROJ_SM90A

template <class C>
FASTPROJ_DEVICE void produce90(const TensorMap& map, const ProjectParams& p, std::uint32_t tiles,
                               std::uint32_t full, std::uint32_t empty, int items, int item_step,
                               int first_item) {
    const int thread = threadIdx.x;  // the producer is warpgroup 0
    Ring<C::kStages> ring;
    if (p.loader == static_cast<std::int32_t>(Loader::kTma)) {
        if (thread != 0) return;  // project90 brings the warp together again
        prefetch_tensor_map(&map);
        const int rank = p.cluster == 2 ? static_cast<int>(cluster_rank()) : 0;
        const int share =
            C::kBlockB / p.cluster;  // samples that this block fetches for the cluster
        for (int index = first_item; index < items; index += item_step) {
            const WorkItem item = WorkItem::at(p, index);
            const int b = item.batch_tile * C::kBlockB + rank * share;
            for (int unit = item.first; unit < item.last; ++unit) {
                int row = unit * kBlockRows - p.row_shift;
                for (int s = 0; s < C::kUnitStages; ++s) {
                    const std::uint32_t stage = tiles + ring.place * C::kStageBytes;
                    const std::uint32_t bar = full + ring.place * 8;
                    barrier_wait(empty + ring.place * 8, ring.parity ^ 1);
                    barrier_arrive_expect(bar, C::kStageBytes);
                    for (int sub = 0; sub < C::kSubtiles; ++sub) {
                        const std::uint32_t to = stage + sub * C::kTileBytes + rank * share * 128;
                        if (p.cluster == 2) {
                            copy_box_multicast(to, &map, row, b, bar, 3);
                        } else {
                            copy_box(to, &map, row, b, bar);
                        }
                        row += 64;
                    }
                    ring.advance();
                }
            }
        }
        return;
    }

    // Through registers. Each chunk is loaded again for a later one as soon as it is stored, so
    // kBatch chunks are always in flight.
    constexpr int kBatch = C::kTiles == 1 || C::kChunks == 2 ? 2 : 4;
    std::uint32_t raw[kBatch][8];
    const int c = thread & 7;
    auto sample = [&](int j) { return j * 16 % C::kBlockB + chunk_sample(thread >> 3); };
    auto subtile = [&](int j) { return j * 16 / C::kBlockB; };
    for (int index = first_item; index < items; index += item_step) {
        const WorkItem item = WorkItem::at(p, index);
        const int b = item.batch_tile * C::kBlockB;
        const int end = item.last * kBlockRows - p.row_shift;
        int row = item.first * kBlockRows - p.row_shift;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            load_chunk(p, b + sample(j), row + subtile(j) * 64 + c * 4, raw[j]);
        }
        for (; row < end; row += C::kStageRows) {
            const std::uint32_t stage = tiles + ring.place * C::kStageBytes;
            barrier_wait(empty + ring.place * 8, ring.parity ^ 1);
#pragma unroll
            for (int j = 0; j < C::kChunks; ++j) {
                store_chunk<typename C::Op, C::kTerms>(p, stage + subtile(j) * C::kTileBytes,
                                                       C::kTermBytes, sample(j), c,
                                                       raw[j % kBatch]);
                const int next = j + kBatch;
                const int at = next % C::kChunks;
                const int next_row = row + (next >= C::kChunks ? C::kStageRows : 0);
                if (next_row < end) {
                    load_chunk(p, b + sample(at), next_row + subtile(at) * 64 + c * 4,
                               raw[j % kBatch]);
                }
            }
            fence_proxy_async();
            barrier_arrive(full + ring.place * 8);
            ring.advance();
        }
    }
}

template <class C>
FASTPROJ_DEVICE void consume90(const ProjectParams& p, std::uint32_t tiles, std::uint32_t full,
                               std::uint32_t empty, std::uint32_t table, int items, int item_step,
                               int first_item) {
    constexpr int kSums = C::kBlockB / 2;  // accumulators of one thread and tile
    const int thread = threadIdx.x - 128;
    const int lane = thread & 31;
    const int warpgroup = thread >> 7;
    const int warp = (thread >> 5) & 3;
    GeneratorKey key;
    key.key0 = p.key0;
    key.key1 = p.key1;
    key.counter2 = p.counter2 | (lane & 3);
    key.stream = p.stream;
    key.sign_mask = p.sign_mask;
    key.table = table | lane * 4;

    // Whether a descriptor is the sum of one base and a constant.
    constexpr bool kFixed = C::kUnroll && C::kUnits == 1;
    const std::uint64_t tiles_descriptor = wgmma_descriptor(tiles);

    Ring<C::kUnroll ? C::kUnits : C::kStages> ring;
    for (int index = first_item; index < items; index += item_step) {
        const WorkItem item = WorkItem::at(p, index);
        const int column =
            item.col_tile * C::kColumns + warpgroup * 64 * C::kTiles + warp * 16 + (lane >> 2);
        float acc[C::kTiles][kSums], sum[C::kTiles][kSums];
#pragma unroll
        for (int m = 0; m < C::kTiles; ++m) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) acc[m][i] = sum[m][i] = 0.0f;
        }
        auto fold = [&](int m) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                sum[m][i] += acc[m][i];
                if (!C::kFoldGroups) acc[m][i] = 0.0f;
            }
        };
        // Waits for both tiles, folds each as soon as it is done.
        auto drain = [&]() {
            if constexpr (C::kTiles == 2) {
                wgmma_wait<1>();
                fold(0);
            }
            wgmma_wait<0>();
            fold(C::kTiles - 1);
        };
        // Hands a stage back to the producers of the cluster; its products must be done. A lane for
        // each block; the others name one that exists and don't arrive.
        auto release = [&](std::uint32_t stage, bool go) {
            barrier_arrive_remote(empty + stage * 8, lane & (p.cluster - 1),
                                  go && lane < p.cluster);
        };

        Generator<C::kind, typename C::Op, C::kTiles> generator;
        std::uint32_t a[2][4][4];  // fragments: one set in use by the tensor cores
#pragma unroll
        for (int m = 0; m < C::kTiles; ++m) {
            generator.start(key, m, p.first_block + item.first, column + m * 64);
        }
        for (int period = item.first; period < item.last; period += C::kFoldUnits) {
            const int end =
                C::kFoldUnits == 1 ? period + 1 : min(period + C::kFoldUnits, item.last);
            std::uint32_t last = 0;  // the stage that is still to be released
            for (int unit = period; unit < end; ++unit) {
                const std::uint32_t block = p.first_block + unit;
#pragma unroll C::kUnrollStages
                for (int s = 0; s < C::kUnitStages; ++s) {
                    const std::uint32_t stage =
                        C::kUnroll ? ring.place * C::kUnitStages + s : ring.place;
                    const std::uint64_t descriptor =
                        tiles_descriptor + stage * (C::kStageBytes >> 4);
#pragma unroll
                    for (int sub = 0; sub < C::kSubtiles; ++sub) {
                        const int group = s * C::kSubtiles + sub;
                        // Where sums start afresh; nothing is in flight there.
                        const bool first = C::kFoldStages   ? sub == 0
                                           : C::kFoldGroups ? group == 0
                                                            : unit == period && group == 0;
                        const bool wait = !C::kFoldGroups || !first;
#pragma unroll
                        for (int m = 0; m < C::kTiles; ++m) {
                            const int buffer = C::kTiles == 2 ? m : group & 1;
                            // Two tiles: this one's fragments and sums are free once its last
                            // product is done; the other's product runs meanwhile.
                            if (C::kTiles == 2 && wait) {
                                wgmma_wait<1>();
                                if (C::kFoldGroups) fold(m);
                            }
                            generator.fragments(key, m, group & 1, group, block, column + m * 64,
                                                a[buffer]);
                            if (C::kTiles == 1 && wait) wgmma_wait<0>();
                            if (sub == 0 && m == C::kTiles - 1 && !C::kFoldStages) {
                                release(last, !first);
                            }
                            if (sub == 0 && m == 0) barrier_wait(full + stage * 8, ring.parity);
                            wgmma_fence();
#pragma unroll
                            for (int t = C::kTerms - 1; t >= 0; --t) {  // small terms first
#pragma unroll
                                for (int k = 0; k < 4; ++k) {
                                    const bool fresh =
                                        C::kFoldGroups && t == C::kTerms - 1 && k == 0;
                                    const int offset = t * C::kTermBytes + sub * C::kTileBytes;
                                    wgmma_m64k16<typename C::Op, C::kBlockB>(
                                        acc[m], a[buffer][k],
                                        wgmma_advance<kFixed>(descriptor, offset + 32 * k),
                                        fresh ? 0 : 1);
                                }
                            }
                            wgmma_commit();
                        }
                        if (group & 1) generator.advance();
                    }
                    last = stage;
                    if (C::kFoldStages) {
                        drain();
                        release(last, true);
                    }
                    if (!C::kUnroll) ring.advance();
                }
                // The next unit's words are made while the last products run.
#pragma unroll
                for (int m = 0; m < C::kTiles; ++m) {
                    generator.start(key, m, block + 1, column + m * 64);
                }
                if (C::kUnroll) ring.advance();
            }
            if (!C::kFoldStages) {
                drain();
                release(last, true);
            }
        }
#pragma unroll
        for (int m = 0; m < C::kTiles; ++m) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) {  // D: columns of R down, samples across
                const int k = column + m * 64 + 8 * ((i >> 1) & 1);
                const int b =
                    item.batch_tile * C::kBlockB + 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
                store_result(p, item.split, b, k, sum[m][i]);
            }
        }
        __syncwarp();
    }
}

template <class C>
FASTPROJ_DEVICE void project90(const TensorMap& map, const ProjectParams& p) {
    const std::uint32_t base = shared_base();
    const std::uint32_t table = table_address(base);
    const std::uint32_t tiles = base + C::kTable;
    const std::uint32_t full = tiles + C::kStages * C::kStageBytes;
    const std::uint32_t empty = full + C::kStages * 8;
    if (threadIdx.x == 0) {
        const bool tma = p.loader == static_cast<std::int32_t>(Loader::kTma);
        for (int s = 0; s < C::kStages; ++s) {
            barrier_init(full + s * 8, tma ? 1 : 128);
            barrier_init(empty + s * 8, 8 * p.cluster);  // consumer warps of the cluster
        }
        barrier_init_fence();
    }
    if constexpr (C::kind == Kind::kGaussian) {
        fill_table<typename C::Op>(table, threadIdx.x, kThreads90);
    }
    __syncthreads();
    if (p.cluster == 2) cluster_sync();

    // The blocks of a cluster take neighbouring column tiles of the same rows and samples.
    const int items = p.col_tiles * p.splits * p.batch_tiles;
    if (threadIdx.x < 128) {
        registers_decrease<C::kProducerRegisters>();
        produce90<C>(map, p, tiles, full, empty, items, gridDim.x, blockIdx.x);
    } else {
        registers_increase<C::kConsumerRegisters>();
        consume90<C>(p, tiles, full, empty, table, items, gridDim.x, blockIdx.x);
    }
    __syncwarp();
    // No block may leave while the other still writes to its shared memory.
    if (p.cluster == 2) cluster_sync();
}

#endif  // FASTPROJ_SM90A

#if FASTPROJ_SM90A
#define FASTPROJ_KERNEL90 FASTPROJ_KERNEL(kThreads90)
#define FASTPROJ_BODY90(config) project90<config>(map, params)
#else
#define FASTPROJ_KERNEL90 FASTPROJ_KERNEL(1)
#define FASTPROJ_BODY90(config)
#endif

template <class Op, int kTerms, int BLOCK_B, int kTiles>
FASTPROJ_KERNEL90 project_rademacher_sm90_kernel(FASTPROJ_GRID_CONSTANT TensorMap map,
                                                 FASTPROJ_GRID_CONSTANT ProjectParams params) {
    using Config = Config90<Kind::kRademacher, Op, kTerms, BLOCK_B, kTiles>;
    FASTPROJ_BODY90(Config);
}

template <class Op, int kTerms, int BLOCK_B, int kTiles>
FASTPROJ_KERNEL90 project_gaussian_sm90_kernel(FASTPROJ_GRID_CONSTANT TensorMap map,
                                               FASTPROJ_GRID_CONSTANT ProjectParams params) {
    using Config = Config90<Kind::kGaussian, Op, kTerms, BLOCK_B, kTiles>;
    FASTPROJ_BODY90(Config);
}

}  // namespace fastproj::cuda
