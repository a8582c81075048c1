// The operations of the sparse kind: how a problem is cut and shared out among threads.
#include "machine.hpp"
#include "operations.hpp"
#include "ordered_sums.hpp"
#include "output.hpp"
#include "parallel.hpp"

namespace fastproj::cpu {

namespace {

// Tiles of R that rows row_offset .. row_offset + rows touch.
struct SjltTiles {
    SjltTiles(const MatrixKey& key, std::int64_t row_offset, std::int64_t rows)
        : begin(row_offset >> key.block_log2),
          count(((row_offset + rows - 1) >> key.block_log2) + 1 - begin) {}
    const std::int64_t begin, count;
};

// What an addition costs beside a dense multiply-add, as the number of columns that threads_for
// expects.
std::int64_t equivalent_columns(const MatrixKey& key, std::int64_t cols) {
    return 6 * ceil_div(cols, std::int64_t{1} << key.block_log2);
}

}  // namespace

// P is cut into segments by a rule that looks at P and K alone, so the order of every sum is the
// same whatever the batch, the number of threads and the machine's load. Cuts of the batch and of
// the columns change no order.
void project_sjlt(const std::vector<View>& pieces, const View& out, const Call& call,
                  const Run& run) {
    constexpr std::int64_t kMaxCols = 1 << 18;  // of a unit
    constexpr std::int64_t kMaxSegments = 32, kMostSegmentCols = 1 << 20;
    constexpr std::int64_t kRowsPerColumn =
        16;                                  // in a segment, or its sums cost more than its rows
    constexpr std::int64_t kSums = 1 << 16;  // of a unit: 256 KiB of L2
    constexpr std::int64_t kMostSamples = 32, kFewSamples = 4;

    std::vector<std::int64_t> piece_begin(1, 0);
    for (const View& piece : pieces) piece_begin.push_back(piece_begin.back() + piece.shape[1]);
    const std::int64_t batch = out.shape[0], rows = piece_begin.back(), proj_dim = out.shape[1];
    const Source source{pieces.data(), piece_begin.data(), static_cast<int>(pieces.size()), rows,
                        call.row_offset};
    const SjltTiles tiles(call.key, call.row_offset, rows);
    const std::int64_t padded_dim = ceil_div(proj_dim, kColumnPad) * kColumnPad;
    const std::int64_t most_cols = std::min(padded_dim, kMaxCols);
    const std::int64_t wanted = std::min({rows / (kRowsPerColumn * padded_dim), tiles.count,
                                          kMostSegmentCols / most_cols, kMaxSegments});
    std::int64_t segments = 1;
    while (2 * segments <= wanted) segments *= 2;

    const KernelTable kernels = kernels_for(run.isa);
    const bool is_double = pieces.front().dtype == Dtype::kF64;
    const auto kernel = is_double ? kernels.sjlt_f64 : kernels.sjlt_f32;
    const int num_threads =
        threads_for(batch, rows, equivalent_columns(call.key, padded_dim), run.num_threads);
    // A unit is a batch tile by a slab of columns.
    const std::int64_t batch_tile =
        std::min(batch, std::clamp(kSums / most_cols, kFewSamples, kMostSamples));
    const std::int64_t batch_tiles = ceil_div(batch, batch_tile);
    // With few segments and samples, columns keep the threads busy.
    const std::int64_t slabs =
        std::max(std::clamp<std::int64_t>(2 * num_threads / (segments * batch_tiles), 1,
                                          ceil_div(padded_dim, 1024)),
                 ceil_div(padded_dim, kMaxCols));
    const std::int64_t slab_cols = ceil_div(ceil_div(padded_dim, slabs), kColumnPad) * kColumnPad;
    const std::int64_t slabs_used = ceil_div(padded_dim, slab_cols);
    const PerThread<char> scratch(
        kernels.sjlt_scratch_bytes(call.key, static_cast<int>(batch_tile), slab_cols), num_threads);
    OrderedSums sums(batch_tiles * slabs_used, segments, batch_tile * slab_cols);
    std::atomic<bool> exhausted{false};

    const auto work = [&](std::int64_t task, int worker) {
        const std::int64_t unit = task / segments, segment = task % segments;
        const std::int64_t col_begin = unit % slabs_used * slab_cols;
        OrderedSums::Buffer acc = sums.take();
        SjltTile tile{};
        tile.source = &source;
        tile.key = call.key;
        tile.batch_begin = unit / slabs_used * batch_tile;
        tile.batch = static_cast<int>(std::min(batch_tile, batch - tile.batch_begin));
        tile.tile_begin = tiles.begin + tiles.count * segment / segments;
        tile.tile_end = tiles.begin + tiles.count * (segment + 1) / segments;
        tile.col_begin = static_cast<std::uint32_t>(col_begin);
        tile.cols = static_cast<int>(std::min(slab_cols, padded_dim - col_begin));
        tile.acc = acc.get();
        tile.acc_ld = slab_cols;
        tile.scratch = scratch[worker];
        kernel(tile);
        acc = sums.add(unit, segment, std::move(acc));
        if (acc == nullptr) return;  // another segment of the unit is still to come
        for (int b = 0; b < tile.batch; ++b) {
            store_sums(out, tile.batch_begin + b, col_begin,
                       std::min<std::int64_t>(tile.cols, proj_dim - col_begin),
                       acc.get() + b * slab_cols, call);
        }
        sums.give(std::move(acc));
    };
    parallel_for(batch_tiles * slabs_used * segments, num_threads,
                 [&](std::int64_t task, int worker) {
                     try {
                         if (!exhausted) work(task, worker);
                     } catch (const std::bad_alloc&) {
                         exhausted = true;
                     }
                 });
    if (exhausted) throw std::bad_alloc();
}

void project_transpose_sjlt(const View& y, const View& out, const Call& call, const Run& run) {
    constexpr std::int64_t kSums = 1 << 18;  // of a thread, and numbers of y: 2 MiB
    const std::int64_t batch = y.shape[0], proj_dim = y.shape[1], rows = out.shape[1];
    const std::int64_t block = std::int64_t{1} << call.key.block_log2;
    const std::int64_t padded_dim = ceil_div(proj_dim, kSjltChunk) * kSjltChunk;
    const SjltTiles tiles(call.key, call.row_offset, rows);
    const KernelTable kernels = kernels_for(run.isa);
    const bool is_double = y.dtype == Dtype::kF64;
    const auto kernel = is_double ? kernels.sjlt_transpose_f64 : kernels.sjlt_transpose_f32;
    const std::int64_t batch_tile =
        std::clamp<std::int64_t>(kSums / std::max(block, padded_dim), 1, batch);
    const int num_threads =
        threads_for(batch, rows, equivalent_columns(call.key, padded_dim), run.num_threads);
    const PerThread<char> scratch(kernels.sjlt_scratch_bytes(call.key, 1, padded_dim), num_threads);
    const PerThread<double> sums(static_cast<std::size_t>(batch_tile * block), num_threads);
    const std::int64_t item = is_double ? sizeof(double) : sizeof(float);
    const auto packed_bytes = static_cast<std::size_t>(batch_tile * padded_dim * item);
    const auto packed = allocate_aligned<char>(packed_bytes);

    for (std::int64_t batch_begin = 0; batch_begin < batch; batch_begin += batch_tile) {
        const std::int64_t samples = std::min(batch_tile, batch - batch_begin);
        pack_batch(y, batch_begin, samples, padded_dim, packed.get());
        parallel_for(tiles.count, num_threads, [&](std::int64_t at, int worker) {
            SjltTransposeTile tile{};
            tile.key = call.key;
            tile.y = packed.get();
            tile.y_ld = padded_dim;
            tile.batch = static_cast<int>(samples);
            tile.cols = proj_dim;
            tile.tile = tiles.begin + at;
            tile.out = sums[worker];
            tile.scratch = scratch[worker];
            kernel(tile);
            const std::int64_t first = tile.tile * block - call.row_offset;
            const std::int64_t begin = std::max<std::int64_t>(first, 0);
            const std::int64_t end = std::min(first + block, rows);
            for (std::int64_t b = 0; b < samples; ++b) {
                store_sums(out, batch_begin + b, begin, end - begin,
                           tile.out + b * block + (begin - first), call);
            }
        });
    }
}

// 512 rows by 64 columns at a time, all zeros but for the one entry of each column in each tile.
void matrix_sjlt(const View& out, const Call& call, std::int64_t col_offset, const Run& run) {
    const std::int64_t rows = out.shape[0], cols = out.shape[1];
    const Panels panels(call.row_offset, rows);
    const std::int64_t strips = ceil_div(cols, kColumnPad);
    const int num_threads =
        threads_for(0, panels.count * kPanelRows, strips * kColumnPad, run.num_threads);
    const PerThread<float> entries(static_cast<std::size_t>(kPanelRows) * kColumnPad, num_threads);
    parallel_for(panels.count * strips, num_threads, [&](std::int64_t task, int worker) {
        const std::int64_t col = task % strips * kColumnPad;
        const std::int64_t width = std::min<std::int64_t>(kColumnPad, cols - col);
        const std::int64_t panel = (panels.begin + task / strips) * kPanelRows;
        float* to = entries[worker];
        std::fill_n(to, kPanelRows * kColumnPad, 0.0f);
        for (std::int64_t t = panel >> call.key.block_log2;
             t << call.key.block_log2 < panel + kPanelRows; ++t) {
            std::uint32_t packed = 0;
            for (std::int64_t c = 0; c < width; ++c) {
                const auto k = static_cast<std::uint32_t>(col_offset + col + c);
                const std::uint32_t i = k % kSjltChunk;
                if (c == 0 || i == 0) packed = sjlt_chunk(call.key, t, k);
                const std::int64_t row = (t << call.key.block_log2) + sjlt_row(packed, i) - panel;
                if (row < 0 || row >= kPanelRows) continue;
                to[row * kColumnPad + c] = sjlt_negative(packed, i) != 0 ? -1.0f : 1.0f;
            }
        }
        const std::int64_t first = panel - call.row_offset;
        const std::int64_t end = std::min<std::int64_t>(first + kPanelRows, rows);
        for (std::int64_t r = std::max<std::int64_t>(first, 0); r < end; ++r) {
            store_entries(out, r, col, width, to + (r - first) * kColumnPad);
        }
    });
}

}  // namespace fastproj::cpu
