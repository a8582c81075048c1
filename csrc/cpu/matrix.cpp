#include "machine.hpp"
#include "operations.hpp"
#include "output.hpp"
#include "parallel.hpp"

namespace fastproj::cpu {

void matrix(const View& out, const Call& call, std::int64_t col_offset, const Run& run) {
    if (call.key.kind == Kind::kSjlt) return matrix_sjlt(out, call, col_offset, run);
    const std::int64_t rows = out.shape[0], cols = out.shape[1];
    const Panels panels(call.row_offset, rows);
    const std::int64_t strips = ceil_div(cols, kColumnPad);
    const KernelTable kernels = kernels_for(run.isa);
    const int num_threads =
        threads_for(0, panels.count * kPanelRows, strips * kColumnPad, run.num_threads);
    const PerThread<float> tiles(static_cast<std::size_t>(kPanelRows) * kColumnPad, num_threads);
    const PerThread<char> scratch(kernels.matrix_scratch_bytes(), num_threads);
    parallel_for(panels.count * strips, num_threads, [&](std::int64_t task, int worker) {
        const std::int64_t col = task % strips * kColumnPad;
        MatrixTile tile{};
        tile.key = call.key;
        tile.panel = panels.begin + task / strips;
        tile.col_begin = static_cast<std::uint32_t>(col_offset + col);
        tile.tile = tiles[worker];
        tile.scratch = scratch[worker];
        kernels.matrix(tile);
        const std::int64_t first = tile.panel * kPanelRows - call.row_offset;
        const std::int64_t end = std::min<std::int64_t>(first + kPanelRows, rows);
        const std::int64_t width = std::min<std::int64_t>(kColumnPad, cols - col);
        for (std::int64_t r = std::max<std::int64_t>(first, 0); r < end; ++r) {
            store_entries(out, r, col, width, tile.tile + (r - first) * kColumnPad);
        }
    });
}

}  // namespace fastproj::cpu
