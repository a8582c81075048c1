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
    constexpr std::int64_t kTasksPerThread = 4;
    constexpr std::int64_t kStoreEntries =
        2048;  // that a task adds up and stores, or those of one row
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
    const int batch_tile = static_cast<int>(std::clamp<std::int64_t>(batch, 1, kBatchTile));
    const auto tile_cols = static_cast<int>(std::min(turn_cols, kSlabCols));
    const int num_threads = threads_for(batch, rows, padded_dim, run.num_threads);
    const PerThread<char> scratch(kernels.project_scratch_bytes(batch_tile, tile_cols),
                                  num_threads);
    const std::int64_t segment_size = batch_tile * turn_cols;
    const std::int64_t tile_size = segments * segment_size;
    // Where segments and slabs are too few for the threads, batch tiles are done side by side.
    const std::int64_t tasks_of_tile = segments * ceil_div(turn_cols, kSlabCols);
    const std::int64_t tiles_at_once =
        std::clamp<std::int64_t>(std::min(ceil_div(kTasksPerThread * num_threads, tasks_of_tile),
                                          kWorkspaceCols * kBatchTile / tile_size),
                                 1, ceil_div(batch, batch_tile));
    const auto acc = allocate_aligned<double>(static_cast<std::size_t>(tiles_at_once * tile_size));

    for (std::int64_t col_begin = 0; col_begin < proj_dim; col_begin += turn_cols) {
        const std::int64_t cols = std::min(turn_cols, proj_dim - col_begin);
        const std::int64_t turn_slabs = ceil_div(cols, kSlabCols);
        const std::int64_t tile_tasks = segments * turn_slabs;
        for (std::int64_t begin = 0; begin < batch; begin += tiles_at_once * batch_tile) {
            const std::int64_t batch_here =
                std::min<std::int64_t>(tiles_at_once * batch_tile, batch - begin);
            const std::int64_t tasks = ceil_div(batch_here, batch_tile) * tile_tasks;
            // Slabs of one segment follow each other, so the segment's gradients are still in
            // cache.
            parallel_for(tasks, num_threads, [&](std::int64_t task, int worker) {
                const std::int64_t place = task / tile_tasks;  // of the batch tile
                const std::int64_t segment = task % tile_tasks / turn_slabs;
                const std::int64_t slab_begin = task % turn_slabs * kSlabCols;
                ProjectTile tile{};
                tile.source = &source;
                tile.key = call.key;
                tile.terms = call.terms;
                tile.batch_begin = begin + place * batch_tile;
                tile.batch =
                    static_cast<int>(std::min<std::int64_t>(batch_tile, batch - tile.batch_begin));
                tile.panel_begin = panels.begin + panels.count * segment / segments;
                tile.panel_end = panels.begin + panels.count * (segment + 1) / segments;
                tile.col_begin = static_cast<std::uint32_t>(col_begin + slab_begin);
                tile.cols = static_cast<int>(std::min(kSlabCols, cols - slab_begin));
                tile.acc = acc.get() + place * tile_size + segment * segment_size + slab_begin;
                tile.acc_ld = turn_cols;
                tile.scratch = scratch[worker];
                const std::int64_t padded = ceil_div(tile.cols, kColumnPad) * kColumnPad;
                for (int b = 0; b < tile.batch; ++b) {
                    std::fill_n(tile.acc + b * tile.acc_ld, padded, 0.0);
                }
                kernel(tile);
            });
            // Single rows of few columns would take less time than it takes to share them out.
            const std::int64_t rows_of_task =
                std::max<std::int64_t>(1, kStoreEntries / (cols * segments));
            parallel_for(ceil_div(batch_here, rows_of_task), num_threads, [&](std::int64_t i, int) {
                const std::int64_t end = std::min(batch_here, (i + 1) * rows_of_task);
                for (std::int64_t b = i * rows_of_task; b < end; ++b) {
                    double* sums =
                        acc.get() + b / batch_tile * tile_size + b % batch_tile * turn_cols;
                    for (std::int64_t s = 1; s < segments; ++s) {
                        const double* more = sums + s * segment_size;
                        for (std::int64_t k = 0; k < cols; ++k) sums[k] += more[k];
                    }
                    store_sums(out, begin + b, col_begin, cols, sums, call);
                }
            });
        }
    }
}

}  // namespace fastproj::cpu
