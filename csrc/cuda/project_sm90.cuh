// Projection on sm_90a: wgmma with A = R transposed, generated in registers, and G tiles in shared
// memory.
//
// A block is one producer warpgroup (produce_sm90.cuh) and two consumer warpgroups, persistent over
// work items. The producer fills a ring of stages. A consumer owns kTiles x 64 columns; while the
// tensor cores work on one tile it generates the fragments of the other.
#pragma once

#include "produce_sm90.cuh"

namespace fastproj::cuda {

#if FASTPROJ_SM90A

template <class C>
FASTPROJ_DEVICE void consume90(const ProjectParams& p, std::uint32_t tiles, std::uint32_t full,
                               std::uint32_t empty, std::uint32_t table, int item_step,
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

    // Lane i releases a tile in the i-th block that it was copied to. Other lanes release none.
    const std::uint32_t remote_empty =
        remote_address(empty, p.tile_cluster == 2 ? lane & 1 : cluster_rank());
    // Whether a descriptor is the sum of one base and a constant.
    constexpr bool kFixed = C::kUnroll && C::kPanels == 1;
    const std::uint64_t tiles_descriptor = wgmma_descriptor(tiles);

    Ring<C::kUnroll ? C::kPanels : C::kStages> ring;
    for (int index = first_item; index < p.items; index += item_step) {
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
            wgmma_sums(acc[m]);
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
        // Hands a stage back to the producers of all blocks that it was copied to; its products
        // must be done.
        auto release = [&](std::uint32_t stage, bool go) {
            barrier_arrive_remote(remote_empty + stage * 8, go && lane < p.tile_cluster);
        };

        Generator<C::kind, typename C::Op, C::kTiles> generator;
        std::uint32_t a[2][4][4];  // fragments: one set in use by the tensor cores
#pragma unroll
        for (int m = 0; m < C::kTiles; ++m) {
            generator.start(key, m, p.first_panel + item.first, column + m * 64);
        }
        for (int period = item.first; period < item.last; period += C::kFoldPanels) {
            const int end =
                C::kFoldPanels == 1 ? period + 1 : min(period + C::kFoldPanels, item.last);
            std::uint32_t last = 0;  // the stage that is still to be released
            for (int panel = period; panel < end; ++panel) {
                const std::uint32_t absolute = p.first_panel + panel;
#pragma unroll C::kUnrollStages
                for (int s = 0; s < C::kPanelStages; ++s) {
                    const std::uint32_t stage =
                        C::kUnroll ? ring.place * C::kPanelStages + s : ring.place;
                    const std::uint64_t descriptor =
                        tiles_descriptor + stage * (C::kStageBytes >> 4);
#pragma unroll
                    for (int sub = 0; sub < C::kSubtiles; ++sub) {
                        const int group = s * C::kSubtiles + sub;
                        // Where sums start afresh; nothing is in flight there.
                        const bool first = C::kFoldStages   ? sub == 0
                                           : C::kFoldGroups ? group == 0
                                                            : panel == period && group == 0;
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
                            generator.fragments(key, m, group & 1, group, absolute, column + m * 64,
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
                            // The next panel's words, one part behind each of the last products:
                            // all at once, the tensor cores would run dry.
                            const int part =
                                (group - 8) * C::kTiles + m + decltype(generator)::kParts;
                            if (decltype(generator)::kParts > 0 && part >= 0) {
                                generator.prepare(key, part, absolute + 1, column);
                            }
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
                generator.turn();
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
    const std::uint32_t full = tiles + C::kStages * C::kStageBytes + C::kRawStages * C::kRawBytes;
    const std::uint32_t empty = full + C::kStages * 8;
    if (threadIdx.x == 0) {
        const bool direct = p.loader == static_cast<std::int32_t>(Loader::kTma) &&
                            p.input != static_cast<std::int32_t>(Dtype::kF32);
        for (int s = 0; s < C::kStages; ++s) {
            barrier_init(full + s * 8, direct ? 1 : 128);
            barrier_init(empty + s * 8, 8 * p.tile_cluster);  // consumer warps
        }
        const std::uint32_t raw_full = empty + C::kStages * 8;
        for (int s = 0; s < C::kRawStages; ++s) {
            barrier_init(raw_full + s * 8, 1);
            barrier_init(raw_full + (C::kRawStages + s) * 8, 4 * p.cluster);  // producer warps
        }
        barrier_init_fence();
    }
    if constexpr (C::kind == Kind::kGaussian) {
        fill_table<typename C::Op>(table, threadIdx.x, kThreads90);
    }
    __syncthreads();
    if (p.cluster == 2) cluster_sync();

    // The blocks of a cluster take neighbouring column tiles of the same rows and samples.
    if (threadIdx.x < 128) {
        registers_decrease<C::kProducerRegisters>();
        produce90<C>(map, p, tiles, full, empty, Stages<C>(p, blockIdx.x, gridDim.x));
    } else {
        registers_increase<C::kConsumerRegisters>();
        consume90<C>(p, tiles, full, empty, table, gridDim.x, blockIdx.x);
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

// For the lists in kernels.hpp: returns the kernel if it is the one that `key` names.
#define FASTPROJ_CASE90(kKind, kernel, Op, terms, block_b, tiles)     \
    if (key == KernelKey{kKind, Op::kIsBf16, terms, block_b}) {       \
        return kernel_of<Config90<kKind, Op, terms, block_b, tiles>>( \
            &kernel<Op, terms, block_b, tiles>, kThreads90);          \
    }
#define FASTPROJ_RADEMACHER90(...) \
    FASTPROJ_CASE90(Kind::kRademacher, project_rademacher_sm90_kernel, __VA_ARGS__)
#define FASTPROJ_GAUSSIAN90(...) \
    FASTPROJ_CASE90(Kind::kGaussian, project_gaussian_sm90_kernel, __VA_ARGS__)

}  // namespace fastproj::cuda
