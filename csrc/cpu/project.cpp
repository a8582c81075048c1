#include "machine.hpp"
#include "operations.hpp"
#include "output.hpp"
#include "parallel.hpp"

namespace fastproj::cpu {

// P is cut into segments and K into slabs by rules that look at P and K alone, so the order of
// every sum is the same whatever the batch, the number of threads and the machine's load.
void project(const std::vector<View>& pieces, const View& out, const Call& call, const Run& run) {
    if (call.key.kind == Kind::kSjlt) return project_sjlt(pieces, out, call, run);
    constexpr std::int64_t kSlabCols = 2048;  // tables of signed sums are built once a slab
    constexpr std::int64_t kBatchTile = 64;   // batch rows that share generated words
    constexpr std::int64_t kMaxSegments = 64;
    constexpr std::int64_t kMinPanels = 8;  // in a segment
    constexpr std::int64_t kWorkspaceCols = std::int64_t{32 << 20} / 8 / kBatchTile;  // 32 MiB

    std::vector<std::int64_t> piece_begin(1, 0);
    for (const View& piece : pieces) piece_begin.push_back(piece_begin.back() + piece.shape[1]);
    const std::int64_t batch = out.shape[0], rows = piece_begin.back(), proj_dim = out.shape[1];
    const Source source{pieces.data(), piece_begin.data(), static_cast<int>(pieces.size()), rows,
                        call.row_offset};
    const Panels panels(call.row_offset, rows);
    const std::int64_t padded_dim = ceil_div(proj_dim, kColumnPad) * kColumnPad;
    const std::int64_t segments = std::clamp<std::int64_t>(
        std::min(kWorkspaceCols / padded_dim, panels.count / kMinPanels), 1, kMaxSegments);
    // Columns beyond the workspace's width are done in turns of whole slabs.
    const std::int64_t turn_cols =
        std::min(padded_dim, std::max(kSlabCols, kWorkspaceCols / kSlabCols * kSlabCols));

    const KernelTable kernels = kernels_for(run.isa);
    const auto kernel = pieces.front().dtype == Dtype::kF64  ? kernels.project_f64
                        : call.key.kind == Kind::kRademacher ? kernels.rademacher_f32
                                                             : kernels.gaussian_f32;
    const int batch_tile = static_cast<int>(std::min(batch, kBatchTile));
    const auto tile_cols = static_cast<int>(std::min(turn_cols, kSlabCols));
    const int num_threads = threads_for(batch, rows, padded_dim, run.num_threads);
    const PerThread<char> scratch(kernels.project_scratch_bytes(batch_tile, tile_cols),
                                  num_threads);
    const std::int64_t segment_size = batch_tile * turn_cols;
    const auto acc = allocate_aligned<double>(static_cast<std::size_t>(segments * segment_size));

    for (std::int64_t col_begin = 0; col_begin < proj_dim; col_begin += turn_cols) {
        const std::int64_t cols = std::min(turn_cols, proj_dim - col_begin);
        const std::int64_t turn_slabs = ceil_div(cols, kSlabCols);
        for (std::int64_t batch_begin = 0; batch_begin < batch; batch_begin += batch_tile) {
            const auto rows_here =
                static_cast<int>(std::min<std::int64_t>(batch_tile, batch - batch_begin));
            // Slabs of one segment follow each other, so the segment's gradients are still in
            // cache.
            parallel_for(segments * turn_slabs, num_threads, [&](std::int64_t task, int worker) {
                const std::int64_t segment = task / turn_slabs;
                const std::int64_t slab_begin = task % turn_slabs * kSlabCols;
                ProjectTile tile{};
                tile.source = &source;
                tile.key = call.key;
                tile.terms = call.terms;
                tile.batch_begin = batch_begin;
                tile.batch = rows_here;
                tile.panel_begin = panels.begin + panels.count * segment / segments;
                tile.panel_end = panels.begin + panels.count * (segment + 1) / segments;
                tile.col_begin = static_cast<std::uint32_t>(col_begin + slab_begin);
                tile.cols = static_cast<int>(std::min(kSlabCols, cols - slab_begin));
                tile.acc = acc.get() + segment * segment_size + slab_begin;
                tile.acc_ld = turn_cols;
                tile.scratch = scratch[worker];
                const std::int64_t padded = ceil_div(tile.cols, kColumnPad) * kColumnPad;
                for (int b = 0; b < tile.batch; ++b) {
                    std::fill_n(tile.acc + b * tile.acc_ld, padded, 0.0);
                }
                kernel(tile);
            });
            parallel_for(rows_here, num_threads, [&](std::int64_t b, int) {
                double* sums = acc.get() + b * turn_cols;
                for (std::int64_t s = 1; s < segments; ++s) {
                    const double* more = sums + s * segment_size;
                    for (std::int64_t k = 0; k < cols; ++k) sums[k] += more[k];
                }
                store_sums(out, batch_begin + b, col_begin, cols, sums, call);
            });
        }
    }
}

}  // namespace fastproj::cpu
