// Which kernel, which tiles and how many splits a call gets: a pure, printable function of the
// device and of the call's shape. No autotuner.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "params.hpp"
#include "sjlt_plan.hpp"

namespace fastproj::cuda {

enum class Variant : int { kAuto = 0, kSimple = 1, kSm80 = 2, kSm90 = 3 };

inline const char* variant_name(Variant variant) {
    switch (variant) {
        case Variant::kSimple:
            return "simple";
        case Variant::kSm80:
            return "sm80";
        case Variant::kSm90:
            return "sm90";
        default:
            return "auto";
    }
}

inline const char* loader_name(Loader loader) {
    switch (loader) {
        case Loader::kTma:
            return "tma";
        case Loader::kCpAsync:
            return "cp.async";
        case Loader::kVector:
            return "registers, 16-byte loads";
        case Loader::kElements:
            return "cp.async, one element at a time";
        case Loader::kWords:
            return "cp.async, 4 bytes at a time";
        default:
            return "registers, one element at a time";
    }
}

struct DeviceInfo {
    int major = 0, minor = 0;
    int multiprocessors = 0;
    bool sm90a = false;  // code for sm_90a was compiled in and runs here
};

// A call with its tensors: G [batch, rows] of one piece, and the result [batch, cols].
struct ProjectCall : Call {
    const void* grads = nullptr;
    Dtype dtype = Dtype::kF32;
    std::int64_t batch = 0, rows = 0;
    std::int64_t stride_b = 0, stride_p = 1;
    void* out = nullptr;  // float, or double when grads is
    std::int64_t cols = 0;
    std::int64_t out_stride_b = 0, out_stride_k = 1;
    Variant variant = Variant::kAuto;
};

// out [batch, rows] = scale * y [batch, cols] @ R[row_offset : row_offset + rows, :cols].T
struct TransposeCall : Call {
    const void* y = nullptr;
    Dtype dtype = Dtype::kF32;
    std::int64_t batch = 0, cols = 0, y_stride_b = 0, y_stride_k = 1;
    void* out = nullptr;  // float, or double when y is
    std::int64_t rows = 0, out_stride_b = 0, out_stride_p = 1;
    Variant variant = Variant::kAuto;
};

// The tensors of a call, as every kernel for it takes them.
template <class Params>
void take_tensors(Params& p, const ProjectCall& call) {
    p.grads = call.grads;
    p.grads_stride_b = call.stride_b;
    p.grads_stride_p = call.stride_p;
    p.rows = static_cast<decltype(p.rows)>(call.rows);
    p.batch = static_cast<std::int32_t>(call.batch);
    p.cols = static_cast<std::int32_t>(call.cols);
}

template <class Params>
void take_tensors(Params& p, const TransposeCall& call) {
    p.y = call.y;
    p.y_stride_b = call.y_stride_b;
    p.y_stride_k = call.y_stride_k;
    p.out = call.out;
    p.out_stride_b = call.out_stride_b;
    p.out_stride_p = call.out_stride_p;
    p.rows = call.rows;
    p.row_offset = call.row_offset;
    p.scale = call.scale;
    p.seed = call.key.seed;
    p.stream = call.key.stream;
    p.batch = static_cast<std::int32_t>(call.batch);
    p.cols = static_cast<std::int32_t>(call.cols);
    p.input = static_cast<std::int32_t>(call.dtype);
}

struct Plan {
    Variant variant = Variant::kAuto;
    KernelKey key{};
    SjltPlan sjlt{};  // kind sjlt only, in place of key
    Loader loader = Loader::kScalar;
    int cluster = 1;
    std::int64_t row_chunk = 0;        // rows of P in one launch
    std::int64_t batch_chunk = 0;      // samples in one launch
    std::int64_t col_chunk = 0;        // columns in one launch
    int splits = 1;                    // of the rows of a launch
    std::int64_t workspace_row = 0;    // elements of one row of the workspace
    std::int64_t workspace_bytes = 0;  // 0: the kernel writes the result itself
};

// Absolute rows are cut here, so that offsets within a launch fit in 32 bits and the high word of
// the block number is constant.
constexpr std::int64_t kLaunchRows = std::int64_t{1} << 30;
constexpr std::int64_t kWorkspaceLimit = std::int64_t{48} << 20;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The number of splits of the panels: the smallest that minimises the time of the busiest
// multiprocessor. It depends on P and K, never on B, because a row's result must not depend on the
// batch that it is in.
inline int choose_splits(Kind kind, std::int64_t panels, std::int64_t cols, int multiprocessors) {
    constexpr std::int64_t kOverhead = 3;  // panels: pipeline fill, epilogue, share of the sum
    // Samples of the largest tile: their partial sums must fit in the workspace.
    const std::int64_t least_samples = kind == Kind::kRademacher ? 64 : 128;
    const std::int64_t tiles = ceil_div(cols, kSplitColumns);
    const std::int64_t row_bytes = ceil_div(cols, 64) * 64 * 4;
    const std::int64_t most = std::min<std::int64_t>(
        {panels, 4 * static_cast<std::int64_t>(multiprocessors),
         std::max<std::int64_t>(1, kWorkspaceLimit / (row_bytes * least_samples))});
    std::int64_t best = 1, best_cost = -1;
    for (std::int64_t splits = 1; splits <= most; ++splits) {
        const std::int64_t waves = ceil_div(tiles * splits, multiprocessors);
        const std::int64_t cost = waves * (ceil_div(panels, splits) + kOverhead);
        if (best_cost < 0 || cost < best_cost) {
            best = splits;
            best_cost = cost;
        }
        if (splits > 1 && tiles * splits > 8 * static_cast<std::int64_t>(multiprocessors)) break;
    }
    return static_cast<int>(best);
}

// The BLOCK_B whose tiles take the least time. Costs are clocks per k16 step and 64 columns of one
// multiprocessor's quarter: the larger of tensor-core time and issue slots (csrc/cuda/README.md).
inline int choose_block_b(Variant variant, Kind kind, int terms, std::int64_t batch) {
    struct Choice {
        int block_b, cost;
    };
    Choice choices[3] = {{0, 0}, {0, 0}, {0, 0}};
    if (variant == Variant::kSm90) {
        if (kind == Kind::kRademacher) {
            if (terms == 1) {  // of 16-bit G; a producer that converts fp32 makes 16 and 32 dearer
                choices[0] = {16, 14}, choices[1] = {32, 17}, choices[2] = {64, 33};
            } else if (terms == 2) {  // 16 samples: issue slots, the producer's included
                choices[0] = {16, 20}, choices[1] = {32, 33}, choices[2] = {64, 65};
            } else {
                choices[0] = {16, 25}, choices[1] = {32, 49};
            }
        } else if (terms == 1) {
            choices[0] = {32, 67}, choices[1] = {128, 80};
        } else {
            choices[0] = {64, terms == 2 ? 75 : 97};
        }
    } else {
        if (kind == Kind::kRademacher) {
            if (terms == 1) {
                choices[0] = {16, 33}, choices[1] = {32, 65}, choices[2] = {64, 129};
                if (batch <= 16) choices[1] = choices[2] = {0, 0};
            } else if (terms == 2) {
                choices[0] = {32, 129};
            } else {
                choices[0] = {16, 97}, choices[1] = {32, 193};
            }
        } else if (terms == 1) {
            choices[0] = {32, 150}, choices[1] = {64, 160};
        } else {
            choices[0] = {32, 190};
        }
    }
    int best = 0;
    std::int64_t best_cost = 0;
    for (const Choice& choice : choices) {
        if (choice.block_b == 0) continue;
        const std::int64_t cost = ceil_div(batch, choice.block_b) * choice.cost;
        // Equal time: the larger tile reads less of G.
        if (best == 0 || cost <= best_cost) {
            best = choice.block_b;
            best_cost = cost;
        }
    }
    return best;
}

// Panels that rows [offset, offset + rows) touch.
inline std::int64_t panels_of(std::int64_t offset, std::int64_t rows) {
    return ceil_div(offset + rows, kPanelRows) - offset / kPanelRows;
}

// The fewest launches whose partial sums fit in the workspace, of equal size to a tile.
inline void cut_batch(Plan& plan, std::int64_t batch, std::int64_t tile, int bytes) {
    const std::int64_t row_bytes = plan.workspace_row * bytes * plan.splits;
    const std::int64_t tiles = std::max<std::int64_t>(1, ceil_div(batch, tile));
    const std::int64_t fits = std::max<std::int64_t>(1, kWorkspaceLimit / (row_bytes * tile));
    plan.batch_chunk = std::min(batch, ceil_div(tiles, ceil_div(tiles, fits)) * tile);
    plan.workspace_bytes = plan.batch_chunk * row_bytes;
}

// Blocks of one launch: persistent, and as many as are resident at once or there is work for.
inline int launch_blocks(const DeviceInfo& device, const Plan& plan, const Kernel& kernel,
                         std::int64_t batch, std::int64_t cols, int splits) {
    const std::int64_t items =
        ceil_div(cols, kernel.columns) * splits * ceil_div(batch, plan.key.block_b);
    const std::int64_t resident = device.multiprocessors / plan.cluster * plan.cluster;
    // Two blocks of the smaller kernels fit on a multiprocessor.
    const int each = plan.variant == Variant::kSm90 ? 1 : 2;
    return static_cast<int>(std::min(items, each * resident));
}

// Columns are counted in 32 bits, with room for the last tile.
inline void check_columns(std::int64_t cols) {
    constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 1024;
    if (cols > kMost) {
        throw std::invalid_argument("the cuda backend: received proj_dim=" + std::to_string(cols) +
                                    "; expected at most " + std::to_string(kMost) +
                                    ", or backend=\"triton\"");
    }
}

// Tiles of rows of a launch of kind sjlt.
inline std::int64_t sjlt_tiles_of(const ProjectCall& call) {
    const std::int64_t rows = std::min(call.rows, kLaunchRows - call.row_offset % kLaunchRows);
    const std::int64_t width = std::int64_t{1} << call.key.block_log2;
    return ceil_div(call.row_offset + rows, width) - call.row_offset / width;
}

// One family of kernels for every device: what `variant` asks for changes nothing.
inline Plan plan_project_sjlt(const DeviceInfo& device, const ProjectCall& call) {
    Plan plan;
    plan.variant = Variant::kSm80;
    plan.row_chunk = std::min(call.rows, kLaunchRows);
    plan.col_chunk = std::min<std::int64_t>(call.cols, kSjltColumnsAtOnce);
    plan.sjlt = plan_sjlt(call.dtype, call.batch, plan.col_chunk, call.key.block_log2,
                          shared_limit(device.major, device.minor));
    plan.splits = sjlt_splits(sjlt_tiles_of(call), plan.row_chunk, plan.col_chunk,
                              device.multiprocessors, kWorkspaceLimit);
    // Pieces start at multiples of 16 rows of R.
    const int bytes = element_bytes(call.dtype);
    const auto base = reinterpret_cast<std::uintptr_t>(call.grads);
    const bool dense = call.stride_p == 1 || call.rows == 1;
    auto aligned = [&](int piece) {
        return dense && (call.batch == 1 || call.stride_b * bytes % piece == 0) &&
               (base - call.row_offset % 16 * bytes) % piece == 0;
    };
    if (aligned(16)) {
        plan.loader = plan.sjlt.key.staged ? Loader::kCpAsync : Loader::kVector;
    } else {
        plan.loader = plan.sjlt.key.staged && aligned(4) ? Loader::kWords : Loader::kScalar;
    }
    plan.workspace_row = plan.col_chunk;
    plan.batch_chunk = std::min<std::int64_t>(call.batch, std::int64_t{1} << 16);
    cut_batch(plan, plan.batch_chunk, plan.sjlt.key.batch, call.dtype == Dtype::kF64 ? 8 : 4);
    return plan;
}

inline Plan plan_project(const DeviceInfo& device, const ProjectCall& call) {
    check_columns(call.cols);
    if (call.key.kind == Kind::kSjlt) return plan_project_sjlt(device, call);
    Plan plan;
    const bool sixteen = call.dtype == Dtype::kBf16 || call.dtype == Dtype::kF16;
    const Variant best = device.sm90a ? Variant::kSm90 : Variant::kSm80;
    plan.variant = call.variant == Variant::kAuto ? best : call.variant;
    if (call.dtype == Dtype::kF64) plan.variant = Variant::kSimple;
    if (plan.variant == Variant::kSm90 && !device.sm90a) {
        throw std::runtime_error(
            "project: variant sm90 was asked for, but this device or build has no sm_90a code");
    }
    plan.row_chunk = std::min(call.rows, kLaunchRows);
    const std::int64_t shift = call.row_offset % kPanelRows;
    const std::int64_t panels =
        panels_of(shift, std::min(call.rows, kLaunchRows - call.row_offset % kLaunchRows));
    plan.splits = choose_splits(call.key.kind, panels, call.cols, device.multiprocessors);

    if (plan.variant == Variant::kSimple) {
        plan.key = {call.key.kind, false, 0, 8};
        plan.col_chunk = std::min<std::int64_t>(call.cols, 1 << 16);
        plan.workspace_row = plan.col_chunk;
        plan.splits = std::min<std::int64_t>(
            plan.splits, std::max<std::int64_t>(1, kWorkspaceLimit / (plan.col_chunk * 8 * 8)));
        cut_batch(plan, call.batch, 8, 8);
        return plan;
    }

    const int terms = sixteen ? 1 : call.terms;
    plan.key = {call.key.kind, call.dtype != Dtype::kF16, terms,
                choose_block_b(plan.variant, call.key.kind, terms, call.batch)};

    // The copy engine needs an aligned tensor. The other 16-byte loads need aligned addresses of
    // the rows whose numbers in R are multiples of 8 (fp32: 4).
    const int bytes = element_bytes(call.dtype);
    const auto base = reinterpret_cast<std::uintptr_t>(call.grads);
    const bool row_stride =
        call.batch == 1 || (call.stride_b > 0 && call.stride_b * bytes % 16 == 0 &&
                            call.stride_b < (std::int64_t{1} << 38));
    const bool dense = call.stride_p == 1 || call.rows == 1;
    const bool pieces = dense && row_stride && (base - shift * bytes) % 16 == 0;
    // The driver defines tensors whose rows don't overlap.
    const bool apart = call.batch == 1 || call.stride_b >= call.rows;
    const bool tensor = dense && row_stride && apart && base % 16 == 0;
    if (plan.variant == Variant::kSm90) {
        plan.loader = tensor ? Loader::kTma : Loader::kElements;
    } else if (sixteen && pieces) {
        plan.loader = Loader::kCpAsync;
    } else if (pieces) {
        plan.loader = Loader::kVector;
    } else {
        plan.loader = Loader::kScalar;
    }

    const std::int64_t columns =
        plan.variant == Variant::kSm90 && plan.key.block_b == 128 ? 128 : kSplitColumns;
    if (plan.loader == Loader::kTma && ceil_div(call.cols, columns) % 2 == 0 &&
        device.multiprocessors > 1) {
        plan.cluster = 2;
    }

    plan.batch_chunk = std::min<std::int64_t>(call.batch, std::int64_t{1} << 16);
    plan.col_chunk = call.cols;
    if (plan.splits > 1) {
        plan.workspace_row = ceil_div(call.cols, 64) * 64;
        cut_batch(plan, plan.batch_chunk, plan.key.block_b, 4);
    }
    return plan;
}

}  // namespace fastproj::cuda
