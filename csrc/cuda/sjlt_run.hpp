// Launches of kind sjlt: fills in their parameter structs. run.hpp calls these functions.
#pragma once

#include "plan.hpp"

namespace fastproj::cuda {

// Partial sums of one range of rows, samples and columns, to the workspace.
template <class Launcher>
void launch_sjlt(Launcher& launcher, const Plan& plan, const ProjectCall& call,
                 std::int64_t first_col, int splits, void* workspace) {
    const std::uint32_t log2 = call.key.block_log2;
    SjltParams p{};
    take_tensors(p, call);
    p.dst = workspace;
    p.dst_stride_b = plan.workspace_row;
    p.dst_stride_split = plan.workspace_row * call.batch;
    p.first_tile = call.row_offset >> log2;
    p.seed = call.key.seed;
    p.stream = call.key.stream;
    p.block_log2 = log2;
    p.first_col = static_cast<std::uint32_t>(first_col);
    p.row_shift = static_cast<std::int32_t>(call.row_offset - (p.first_tile << log2));
    p.tiles = static_cast<std::int32_t>(sjlt_tiles_of(call));
    p.splits = splits;
    p.col_tiles = static_cast<std::int32_t>(ceil_div(call.cols, plan.sjlt.columns));
    p.batch_tiles = static_cast<std::int32_t>(ceil_div(call.batch, plan.sjlt.key.batch));
    p.threads = plan.sjlt.threads;
    p.stage_tiles = plan.sjlt.stage_tiles;
    p.stages = plan.sjlt.stages;
    p.piece = plan.loader == Loader::kScalar ? 0 : plan.loader == Loader::kWords ? 4 : 16;
    launcher.project_sjlt(plan.sjlt, p);
}

template <class Launcher>
void transpose_sjlt(Launcher& launcher, const TransposeCall& call) {
    SjltTransposeParams p{};
    take_tensors(p, call);
    p.first_chunk = call.row_offset / 16;
    p.chunks = ceil_div(call.row_offset + p.rows, 16) - p.first_chunk;
    p.block_log2 = call.key.block_log2;
    p.batch_tiles = static_cast<std::int32_t>(ceil_div(p.batch, 4));
    launcher.transpose_sjlt(call.dtype == Dtype::kF64, p);
}

}  // namespace fastproj::cuda
