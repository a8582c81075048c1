// From a call to launches: cuts the rows and the batch, fills in the parameter structs, sums the
// splits. The launcher is CUDA (launch.cu) or the host emulation (tests/cuda/emulate.cpp).
#pragma once

#include "plan.hpp"
#include "sjlt_run.hpp"

namespace fastproj::cuda {

// What the copy engine must know about its source, a matrix [batch, rows] of 16-bit elements, which
// it lays down as tiles, or 32-bit ones, which it lays down as they are.
struct BoxSource {
    const void* base;
    std::int64_t rows, batch, stride_bytes;
    int box_samples;    // a box is 64 rows x this
    int element_bytes;  // 2 or 4
};

constexpr std::uint32_t kSignMask = 0x80008000u;

inline void* at_byte(void* base, std::int64_t bytes) { return static_cast<char*>(base) + bytes; }

// One range of rows and samples, and of columns from `first_col` on.
template <class Launcher>
void run_range(Launcher& launcher, const DeviceInfo& device, const Plan& plan,
               const ProjectCall& call, std::int64_t first_col, void* workspace) {
    const bool simple = plan.variant == Variant::kSimple;
    const std::int64_t shift = call.row_offset % kPanelRows;
    const std::int64_t panels = panels_of(shift, call.rows);
    const bool sparse = call.key.kind == Kind::kSjlt;
    const int splits = static_cast<int>(
        std::min(std::int64_t{plan.splits}, sparse ? sjlt_tiles_of(call) : panels));
    const bool reduce = simple || sparse || splits > 1;

    if (sparse) {
        launch_sjlt(launcher, plan, call, first_col, splits, workspace);
    } else if (simple) {
        SimpleParams p{};
        take_tensors(p, call);
        p.dst = static_cast<double*>(workspace);
        p.dst_stride_b = plan.workspace_row;
        p.dst_stride_split = plan.workspace_row * call.batch;
        p.row_offset = call.row_offset;
        p.first_panel = call.row_offset / kPanelRows;
        p.panels = panels;
        p.seed = call.key.seed;
        p.stream = call.key.stream;
        p.first_col = static_cast<std::int32_t>(first_col);
        p.splits = splits;
        p.col_tiles = static_cast<std::int32_t>(ceil_div(call.cols, 64));
        p.batch_tiles = static_cast<std::int32_t>(ceil_div(call.batch, 8));
        p.input = static_cast<std::int32_t>(call.dtype);
        launcher.project_simple(call.key.kind, p);
    } else {
        const Kernel kernel = launcher.find(plan.variant, plan.key);
        ProjectParams p{};
        take_tensors(p, call);
        if (reduce) {
            p.dst = static_cast<float*>(workspace);
            p.dst_stride_k = 1;
            p.dst_stride_b = plan.workspace_row;
            p.dst_stride_split = plan.workspace_row * call.batch;
            p.scale = 1.0f;
        } else {
            p.dst = static_cast<float*>(call.out);
            p.dst_stride_k = call.out_stride_k;
            p.dst_stride_b = call.out_stride_b;
            p.scale = static_cast<float>(call.scale);
            p.accumulate = call.accumulate;
        }
        const std::int64_t panel = call.row_offset / kPanelRows;
        const std::int64_t block = call.key.kind == Kind::kRademacher ? panel : panel * 16;
        p.key0 = static_cast<std::uint32_t>(call.key.seed);
        p.key1 = static_cast<std::uint32_t>(call.key.seed >> 32);
        p.counter2 = counter2(call.key.kind, block, 0);
        p.stream = call.key.stream;
        p.first_panel = static_cast<std::uint32_t>(panel);
        p.row_shift = static_cast<std::int32_t>(shift);
        p.panels = static_cast<std::int32_t>(panels);
        p.splits = splits;
        p.col_tiles = static_cast<std::int32_t>(ceil_div(call.cols, kernel.columns));
        p.batch_tiles = static_cast<std::int32_t>(ceil_div(call.batch, plan.key.block_b));
        p.items = p.col_tiles * splits * p.batch_tiles;
        p.loader = static_cast<std::int32_t>(plan.loader);
        p.input = static_cast<std::int32_t>(call.dtype);
        p.cluster = plan.cluster;
        p.tile_cluster = call.dtype == Dtype::kF32 ? 1 : plan.cluster;
        p.sign_mask = kSignMask;
        const int blocks = launch_blocks(device, plan, kernel, call.batch, call.cols, splits);
        if (plan.variant == Variant::kSm90) {
            BoxSource source{};
            if (plan.loader == Loader::kTma) {
                const int bytes = element_bytes(call.dtype);
                source = {call.grads,
                          call.rows,
                          call.batch,
                          call.stride_b * bytes,
                          plan.key.block_b / plan.cluster,
                          bytes};
                if (call.batch == 1) source.stride_bytes = ceil_div(call.rows * bytes, 16) * 16;
            }
            launcher.launch_sm90(kernel, blocks, plan.cluster, source, p);
        } else {
            launcher.launch_sm80(kernel, blocks, p);
        }
    }
    if (reduce) {
        ReduceParams r{};
        r.partial = workspace;
        r.stride_b = plan.workspace_row;
        r.stride_split = plan.workspace_row * call.batch;
        r.out = call.out;
        r.out_stride_b = call.out_stride_b;
        r.out_stride_k = call.out_stride_k;
        r.scale = call.scale;
        r.splits = splits;
        r.batch = static_cast<std::int32_t>(call.batch);
        r.cols = static_cast<std::int32_t>(call.cols);
        r.accumulate = call.accumulate;
        r.out_dtype =
            static_cast<std::int32_t>(call.dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32);
        launcher.reduce(sparse ? call.dtype == Dtype::kF64 : simple, r);
    }
}

// out (+)= scale * G @ R[row_offset : row_offset + rows]. The workspace has plan.workspace_bytes.
template <class Launcher>
void run_project(Launcher& launcher, const DeviceInfo& device, const ProjectCall& whole,
                 void* workspace, std::int64_t workspace_bytes) {
    const Plan plan = plan_project(device, whole);
    if (workspace_bytes < plan.workspace_bytes) {
        throw std::invalid_argument("project: received a workspace of " +
                                    std::to_string(workspace_bytes) + " bytes; expected at least " +
                                    std::to_string(plan.workspace_bytes));
    }
    const int in = element_bytes(whole.dtype);
    const int out = whole.dtype == Dtype::kF64 ? 8 : 4;
    for (std::int64_t b = 0; b < whole.batch; b += plan.batch_chunk) {
        std::int64_t row = 0;
        while (row < whole.rows) {
            ProjectCall call = whole;
            const std::int64_t offset = whole.row_offset + row;
            call.rows = std::min(whole.rows - row, kLaunchRows - offset % kLaunchRows);
            call.batch = std::min(plan.batch_chunk, whole.batch - b);
            call.row_offset = offset;
            call.grads = static_cast<const char*>(whole.grads) +
                         (b * whole.stride_b + row * whole.stride_p) * in;
            call.out = at_byte(whole.out, b * whole.out_stride_b * out);
            call.accumulate = whole.accumulate || row > 0;
            // A cut can only keep or improve the alignment of the tile starts, but not that of the
            // base.
            Plan range = plan;
            if (row > 0 && plan.loader != Loader::kScalar && plan.loader != Loader::kElements) {
                ProjectCall probe = call;
                probe.batch = whole.batch;
                range.loader = plan_project(device, probe).loader;
                if (range.loader != Loader::kTma) range.cluster = 1;
            }
            for (std::int64_t col = 0; col < whole.cols; col += plan.col_chunk) {
                ProjectCall part = call;
                part.cols = std::min(plan.col_chunk, whole.cols - col);
                part.out = at_byte(call.out, col * whole.out_stride_k * out);
                run_range(launcher, device, range, part, col, workspace);
            }
            row += call.rows;
        }
    }
}

struct MatrixCall : Call {
    void* out = nullptr;
    Dtype dtype = Dtype::kF32;
    std::int64_t rows = 0, cols = 0, stride_n = 0, stride_m = 1;
    std::int64_t col_offset = 0;
};

template <class Launcher>
void run_matrix(Launcher& launcher, const MatrixCall& call) {
    const std::int64_t height =
        call.key.kind == Kind::kSjlt ? kSjltChunk : block_rows(call.key.kind);
    MatrixParams p{};
    p.out = call.out;
    p.stride_n = call.stride_n;
    p.stride_m = call.stride_m;
    p.rows = call.rows;
    p.cols = call.cols;
    p.row_offset = call.row_offset;
    p.first_block = call.row_offset / height;
    p.blocks = ceil_div(call.row_offset + call.rows, height) - p.first_block;
    p.seed = call.key.seed;
    p.stream = call.key.stream;
    p.col_offset = static_cast<std::uint32_t>(call.col_offset);
    p.out_dtype = static_cast<std::int32_t>(call.dtype);
    p.block_log2 = call.key.block_log2;
    launcher.matrix(call.key.kind, p);
}

template <class Launcher>
void run_transpose(Launcher& launcher, const TransposeCall& call) {
    check_columns(call.cols);
    if (call.key.kind == Kind::kSjlt) return transpose_sjlt(launcher, call);
    const bool simple = call.dtype == Dtype::kF64 || call.variant == Variant::kSimple;
    TransposeParams p{};
    take_tensors(p, call);
    p.first_panel = call.row_offset / kPanelRows;
    p.panels = panels_of(call.row_offset % kPanelRows, call.rows);
    p.sign_mask = kSignMask;
    p.batch_tiles = static_cast<std::int32_t>(ceil_div(call.batch, simple ? 8 : 32));
    p.out_dtype = static_cast<std::int32_t>(call.dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32);
    if (simple) {
        launcher.transpose_simple(call.key.kind, p);
    } else {
        // One term is exact for bf16; fp16 needs two, and gets the three of fp32.
        const int terms =
            call.dtype == Dtype::kBf16 || (call.dtype == Dtype::kF32 && call.terms == 1) ? 1 : 3;
        launcher.transpose80(call.key.kind, terms, p);
    }
}

}  // namespace fastproj::cuda
