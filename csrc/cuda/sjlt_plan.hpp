// The configuration of a projection of kind sjlt: a pure function of the device and of the shape.
// Splits depend on the rows, the columns and the device. No other choice changes a sum's order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sjlt.hpp"

namespace fastproj::cuda {

struct SjltPlan {
    SjltKey key{};
    int threads = 0, columns = 0;     // of a block
    int stage_tiles = 0, stages = 0;  // of the ring; none where rows come straight from L2
    int shared_bytes = 0;
};

constexpr int kSjltColumnsAtOnce = 1 << 20;  // of one launch

// Shared memory that one block can have.
inline int shared_limit(int major, int minor) {
    const int arch = 10 * major + minor;
    if (arch == 80 || arch == 87) return 163 * 1024;
    return major == 9 || major == 10 ? 227 * 1024 : 99 * 1024;
}

// Clocks of one multiprocessor for a row of one sample: the slowest of instructions (128 lanes a
// clock), L2 (24 bytes a clock) and memory (13). Counts: csrc/cuda/README.md.
inline double sjlt_cost(const SjltKey& key, double entries, double col_tiles) {
    const bool sixteen = sjlt_entry_bytes(key.dtype) == 8;
    const double own = sixteen ? 14 : 18, shared = 15, hashing = 2.6;
    const double issue =
        entries * ((own + shared / key.batch) / 4 + hashing / key.batch) + 1.5 * col_tiles;
    const double bytes = element_bytes(key.dtype);
    const double slowest = std::max({issue / 128, bytes * col_tiles / 24, bytes / 13});
    return slowest + issue / 12800;  // of equals, the one with fewer instructions
}

// Sizes of one candidate; stages stay 0 where it does not fit.
inline SjltPlan sjlt_sizes(const SjltKey& key, std::int64_t cols, std::uint32_t block_log2,
                           int limit) {
    SjltPlan plan;
    plan.key = key;
    const std::int64_t wanted = (cols + 4 * key.groups - 1) / (4 * key.groups);
    plan.threads = static_cast<int>(
        std::max<std::int64_t>(64, std::min<std::int64_t>(kSjltThreads, (wanted + 31) / 32 * 32)));
    plan.columns = 4 * key.groups * plan.threads;
    const int tables = sjlt_table_bytes(key, plan.threads);
    plan.shared_bytes = tables;
    if (!key.staged) return plan;
    const std::int64_t tile = static_cast<std::int64_t>(element_bytes(key.dtype)) * key.batch
                              << block_log2;
    int count = sjlt_table_tiles(key.groups);
    while (count > 1 && count * tile > 16 * 1024) count /= 2;
    const std::int64_t stage = count * tile;
    if (2 * stage + tables > limit) return plan;
    plan.stage_tiles = count;
    plan.stages = 4 * stage + tables <= limit && stage <= 16 * 1024 ? 4 : 2;
    plan.shared_bytes = static_cast<int>(plan.stages * stage) + tables;
    return plan;
}

inline SjltPlan plan_sjlt(Dtype dtype, std::int64_t batch, std::int64_t cols,
                          std::uint32_t block_log2, int limit) {
    const SjltKey all[] = {
#define FASTPROJ_KEY(type, groups, samples, staged) {type, groups, samples, staged},
        FASTPROJ_SJLT(FASTPROJ_KEY, Dtype::kF32) FASTPROJ_SJLT(FASTPROJ_KEY, Dtype::kBf16)
            FASTPROJ_SJLT(FASTPROJ_KEY, Dtype::kF16) FASTPROJ_SJLT_F64(FASTPROJ_KEY, Dtype::kF64)
#undef FASTPROJ_KEY
    };
    const double entries =
        std::max(1.0, static_cast<double>(cols) / static_cast<double>(1 << block_log2));
    SjltPlan best;
    double least = 0;
    for (const bool staged : {true, false}) {  // straight from L2 only where nothing fits
        for (const SjltKey& key : all) {
            if (key.dtype != dtype || key.staged != staged) continue;
            const SjltPlan plan = sjlt_sizes(key, cols, block_log2, limit);
            if (staged && plan.stages == 0) continue;
            const auto col_tiles = static_cast<double>((cols + plan.columns - 1) / plan.columns);
            const auto tiles = static_cast<double>((batch + key.batch - 1) / key.batch);
            const double cost =
                tiles * key.batch * sjlt_cost(key, entries, staged ? col_tiles : entries);
            if (best.threads == 0 || cost < least) {
                best = plan;
                least = cost;
            }
        }
        if (best.threads != 0) break;
    }
    return best;
}

// How many splits `tiles` tiles of rows have: enough for about 1024 threads a multiprocessor with
// one sample. But partial sums must stay a small part of the bytes read of G (at least 16 rows a
// column), and those of 8 samples must fit into the workspace.
inline int sjlt_splits(std::int64_t tiles, std::int64_t rows, std::int64_t cols,
                       int multiprocessors, std::int64_t workspace) {
    const std::int64_t row_bytes = cols * 4;
    const std::int64_t fill =
        std::max<std::int64_t>(1, std::int64_t{16384} * multiprocessors / cols);
    const std::int64_t most =
        std::min<std::int64_t>({tiles, fill, std::max<std::int64_t>(1, rows / (16 * cols)),
                                std::max<std::int64_t>(1, workspace / (row_bytes * 8)), 4096});
    const std::int64_t each = (tiles + most - 1) / most;
    return static_cast<int>((tiles + each - 1) / each);
}

}  // namespace fastproj::cuda
