// Rademacher projection by signed sums, which never expands R. Four gradients have 16 signed sums.
// Four bits of a random word pick one of them for each column. So one permutation and one addition
// do the work of four multiply-adds, all in fp32. A Simd vocabulary and dense.hpp must be included
// before. Everything here is local to the translation unit.
#pragma once

#include <utility>

#include "dense.hpp"

namespace fastproj::cpu {
namespace {

constexpr int kSteps = 8;              // four-bit fields of a word
constexpr int kWordsPerPanel = 4 * 4;  // four lanes, four words each

// The first of the four rows (8 apart) that field `step` of word j of a lane covers.
constexpr int field_row(int j, int lane, int step) {
    return 128 * j + 32 * (step & 3) + 2 * lane + (step >> 2);
}

// Columns that words are generated for at a time.
constexpr int kLookupVectors = kColumnPad / Simd::kLanes;

template <class Policy>
constexpr std::size_t table_floats(int batch) {
    return static_cast<std::size_t>(kWordsPerPanel) * kSteps * Policy::kEntries *
           static_cast<std::size_t>(batch);
}

template <class Policy>
std::size_t project_scratch_bytes(int batch, int cols) {
    const std::size_t lookup = ColumnWords::bytes(pad_columns(cols)) +
                               table_floats<Policy>(batch) * sizeof(float) +
                               kPanelRows * sizeof(float) + 3 * 64;
    const std::size_t dense = dense_scratch_bytes(batch, cols);
    return lookup > dense ? lookup : dense;
}

// The words of a panel that reach rows of the input: word j of each lane is for rows 128 j .. 128 j
// + 127. Sums over rows outside are zero, so leaving them out changes no bit.
struct WordRange {
    int begin;  // multiples of 4
    int end;
};

inline WordRange words_of(const Source& source, std::int64_t panel) {
    const std::int64_t first = source.row_offset - panel * kPanelRows;  // in the panel
    const std::int64_t last = first + source.rows;
    const std::int64_t begin = first > 0 ? first / 128 : 0;
    const std::int64_t end = last < kPanelRows ? (last + 127) / 128 : 4;
    return {static_cast<int>(begin) * 4, static_cast<int>(end) * 4};
}

// The tables of one panel for a block of batch rows, in the order that accumulate reads them:
// [word][step][batch row][entry]. Meanwhile the rows of the next block are prefetched: a panel of
// one sample is too short for the hardware to learn where the next one lies.
template <class Policy>
void build_tables(const ProjectTile& tile, std::int64_t panel, WordRange words, int first,
                  int batch, float* g, float* tables) {
    const Source& source = *tile.source;
    const std::int64_t from = panel * kPanelRows, last = source.row_offset + source.rows;
    const std::int64_t begin = from > source.row_offset ? from : source.row_offset;
    const std::int64_t end = from + kPanelRows < last ? from + kPanelRows : last;
    for (int b = 0; b < batch; ++b) {
        const std::int64_t sample = tile.batch_begin + first + b;
        load_panel(source, sample, panel, g);
        RawRows next{};
        if (first + b + batch < tile.batch)
            next = raw_rows(source, sample + batch, begin, end - begin);
        float* to = tables + (words.begin * kSteps * batch + b) * Policy::kEntries;
        for (int j = words.begin / 4; j < words.end / 4; ++j) {
            for (int lane = 0; lane < 4; ++lane) {
                for (int line = 0; line < 2 && next.bytes > 0; ++line) {
                    __builtin_prefetch(next.at);
                    next.at += 64;
                    next.bytes -= 64;
                }
                for (int step = 0; step < kSteps; ++step) {
                    const float* x = g + field_row(j, lane, step);
                    Policy::build(x[0], x[8], x[16], x[24], to);
                    to += batch * Policy::kEntries;
                }
            }
        }
    }
}

// words: [word][vector] of one panel and strip, kLookupVectors to a word, of which the first
// `vectors` are done, kVectors at a time; adds up 128 sums of four rows in fp32 before they go to
// the double accumulators.
template <class Policy, int kBatch, int kVectors>
void accumulate_panel(const Simd::U* words, int vectors, WordRange range, const float* tables,
                      double* acc, std::int64_t acc_ld) {
    static_assert(kLookupVectors % kVectors == 0);
    for (int v = 0; v < vectors; v += kVectors) {
        Simd::F sum[kBatch][kVectors];
        for (int b = 0; b < kBatch; ++b) {
            for (int i = 0; i < kVectors; ++i) sum[b][i] = Simd::F{};
        }
        for (int word = range.begin; word < range.end; ++word) {
            Policy::template accumulate<kBatch, kVectors>(
                words + word * kLookupVectors + v,
                tables + word * kSteps * kBatch * Policy::kEntries, sum);
        }
        for (int b = 0; b < kBatch; ++b) {
            for (int i = 0; i < kVectors; ++i) {
                Simd::add_to_double(sum[b][i], acc + b * acc_ld + (v + i) * Simd::kLanes);
            }
        }
    }
}

using AccumulatePanel = void (*)(const Simd::U*, int, WordRange, const float*, double*,
                                 std::int64_t);

template <class Policy, int... kBatches>
AccumulatePanel accumulate_panel_for(int batch, int vectors,
                                     std::integer_sequence<int, kBatches...>) {
    constexpr AccumulatePanel whole[] = {
        accumulate_panel<Policy, kBatches + 1, Policy::vectors_for(kBatches + 1)>...};
    constexpr AccumulatePanel narrow[] = {accumulate_panel<Policy, kBatches + 1, 1>...};
    return (vectors == kLookupVectors ? whole : narrow)[batch - 1];
}

template <class Policy>
void project_lookup(const ProjectTile& tile) {
    Arena arena(tile.scratch);
    const int cols = pad_columns(tile.cols);
    ColumnWords columns(tile.key, tile.col_begin, cols, arena.take<char>(ColumnWords::bytes(cols)));
    float* tables = arena.take<float>(table_floats<Policy>(tile.batch));
    float* g = arena.take<float>(kPanelRows);
    constexpr std::integer_sequence sizes = std::make_integer_sequence<int, Policy::kMaxBatch>();
    // Where half of a strip or less is wanted, as of the sides of factored gradients, it is alone.
    const int wanted = (tile.cols + Simd::kLanes - 1) / Simd::kLanes;
    const int vectors = 2 * wanted <= kLookupVectors ? wanted : kLookupVectors;

    for (std::int64_t panel = tile.panel_begin; panel < tile.panel_end; ++panel) {
        const WordRange range = words_of(*tile.source, panel);
        columns.set_block(panel);
        for (int c = 0; c < cols; c += kColumnPad) {
            Simd::U words[kWordsPerPanel][kLookupVectors];
            for (int v = 0; v < vectors; ++v) {
                Simd::U w[4][4];
                columns.get_all(c / Simd::kLanes + v, w);
                for (int lane = 0; lane < 4; ++lane) {
                    for (int j = 0; j < 4; ++j) words[j * 4 + lane][v] = w[lane][j];
                }
            }
            for (int b = 0; b < tile.batch; b += Policy::kMaxBatch) {
                const int n =
                    tile.batch - b < Policy::kMaxBatch ? tile.batch - b : Policy::kMaxBatch;
                // Tables that no other strip reads are built in one place, which stays in L1.
                float* here = tables + (cols > kColumnPad ? table_floats<Policy>(b) : 0);
                if (c == 0) build_tables<Policy>(tile, panel, range, b, n, g, here);
                accumulate_panel_for<Policy>(n, vectors, sizes)(
                    words[0], vectors, range, here, tile.acc + b * tile.acc_ld + c, tile.acc_ld);
            }
        }
    }
}

// The table of a set with signed sums.
template <class Policy>
KernelTable lookup_kernels() {
    KernelTable table = dense_kernels();
    table.project_scratch_bytes = project_scratch_bytes<Policy>;
    table.rademacher_f32 = project_lookup<Policy>;
    return table;
}

}  // namespace
}  // namespace fastproj::cpu
