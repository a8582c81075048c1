#include "machine.hpp"
#include "operations.hpp"
#include "output.hpp"
#include "parallel.hpp"

namespace fastproj::cpu {

void pack_batch(const View& y, std::int64_t batch_begin, std::int64_t samples,
                std::int64_t padded_dim, char* to) {
    const std::int64_t item = y.dtype == Dtype::kF64 ? sizeof(double) : sizeof(float);
    std::memset(to, 0, static_cast<std::size_t>(samples * padded_dim * item));
    for (std::int64_t b = 0; b < samples; ++b) {
        for (std::int64_t k = 0; k < y.shape[1]; ++k) {
            const std::int64_t at = (batch_begin + b) * y.stride[0] + k * y.stride[1];
            std::memcpy(to + (b * padded_dim + k) * item,
                        static_cast<const char*>(y.data) + at * item,
                        static_cast<std::size_t>(item));
        }
    }
}

void project_transpose(const View& y, const View& out, const Call& call, const Run& run) {
    if (call.key.kind == Kind::kSjlt) return project_transpose_sjlt(y, out, call, run);
    constexpr std::int64_t kBatchTile = 64;
    const std::int64_t batch = y.shape[0], proj_dim = y.shape[1], rows = out.shape[1];
    const std::int64_t padded_dim = ceil_div(proj_dim, kColumnPad) * kColumnPad;
    const Panels panels(call.row_offset, rows);
    const KernelTable kernels = kernels_for(run.isa);
    const bool is_double = y.dtype == Dtype::kF64;
    const auto kernel = is_double ? kernels.transpose_f64 : kernels.transpose_f32;
    const auto batch_tile = static_cast<int>(std::min(batch, kBatchTile));
    const int num_threads = threads_for(batch, rows, padded_dim, run.num_threads);
    const PerThread<char> scratch(kernels.transpose_scratch_bytes(), num_threads);
    const PerThread<double> sums(static_cast<std::size_t>(batch_tile) * kPanelRows, num_threads);
    const std::size_t item = is_double ? sizeof(double) : sizeof(float);
    const std::size_t packed_bytes = static_cast<std::size_t>(batch_tile * padded_dim) * item;
    const auto packed = allocate_aligned<char>(packed_bytes);

    for (std::int64_t batch_begin = 0; batch_begin < batch; batch_begin += batch_tile) {
        const auto rows_here =
            static_cast<int>(std::min<std::int64_t>(batch_tile, batch - batch_begin));
        pack_batch(y, batch_begin, rows_here, padded_dim, packed.get());
        parallel_for(panels.count, num_threads, [&](std::int64_t panel, int worker) {
            TransposeTile tile{};
            tile.key = call.key;
            tile.y = packed.get();
            tile.y_ld = padded_dim;
            tile.batch = rows_here;
            tile.cols = proj_dim;
            tile.panel = panels.begin + panel;
            tile.out = sums[worker];
            tile.scratch = scratch[worker];
            kernel(tile);
            const std::int64_t first = tile.panel * kPanelRows - call.row_offset;
            const std::int64_t begin = std::max<std::int64_t>(first, 0);
            const std::int64_t end = std::min<std::int64_t>(first + kPanelRows, rows);
            for (std::int64_t b = 0; b < rows_here; ++b) {
                store_sums(out, batch_begin + b, begin, end - begin,
                           tile.out + b * kPanelRows + (begin - first), call);
            }
        });
    }
}

}  // namespace fastproj::cpu
