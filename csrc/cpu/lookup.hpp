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

// The 8 signed sums of four rows whose first sign is +: bit s of n says whether the sign of row s +
// 1 differs from that of row s.
inline void build_half_table(float g0, float g1, float g2, float g3, float* table) {
    for (int n = 0; n < 8; ++n) {
        const int b1 = n & 1, b2 = b1 ^ (n >> 1 & 1), b3 = b2 ^ (n >> 2);
        table[n] = (g0 + (b1 ? -g1 : g1)) + ((b2 ? -g2 : g2) + (b3 ? -g3 : g3));
    }
}

// The tables of one panel for a block of batch rows, in the order that accumulate reads them:
// [word][step][batch row][entry].
template <class Policy>
void build_tables(const ProjectTile& tile, std::int64_t panel, int first, int batch, float* g,
                  float* tables) {
    for (int b = 0; b < batch; ++b) {
        load_panel(*tile.source, tile.batch_begin + first + b, panel, g);
        float* to = tables + b * Policy::kEntries;
        for (int j = 0; j < 4; ++j) {
            for (int lane = 0; lane < 4; ++lane) {
                for (int step = 0; step < kSteps; ++step) {
                    const float* x = g + field_row(j, lane, step);
                    Policy::build(x[0], x[8], x[16], x[24], to);
                    to += batch * Policy::kEntries;
                }
            }
        }
    }
}

// words: [word][vector] of one panel and strip, kLookupVectors to a word; adds up 128 sums of four
// rows in fp32 before they go to the double accumulators.
template <class Policy, int kBatch>
void accumulate_panel(const Simd::U* words, const float* tables, double* acc, std::int64_t acc_ld) {
    constexpr int kVectors = Policy::vectors_for(kBatch);
    static_assert(kLookupVectors % kVectors == 0);
    for (int v = 0; v < kLookupVectors; v += kVectors) {
        Simd::F sum[kBatch][kVectors];
        for (int b = 0; b < kBatch; ++b) {
            for (int i = 0; i < kVectors; ++i) sum[b][i] = Simd::F{};
        }
        for (int word = 0; word < kWordsPerPanel; ++word) {
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

using AccumulatePanel = void (*)(const Simd::U*, const float*, double*, std::int64_t);

template <class Policy, int... kBatches>
constexpr AccumulatePanel accumulate_panel_for(int batch, std::integer_sequence<int, kBatches...>) {
    constexpr AccumulatePanel table[] = {accumulate_panel<Policy, kBatches + 1>...};
    return table[batch - 1];
}

template <class Policy>
void project_lookup(const ProjectTile& tile) {
    Arena arena(tile.scratch);
    const int cols = pad_columns(tile.cols);
    ColumnWords columns(tile.key, tile.col_begin, cols, arena.take<char>(ColumnWords::bytes(cols)));
    float* tables = arena.take<float>(table_floats<Policy>(tile.batch));
    float* g = arena.take<float>(kPanelRows);
    constexpr std::integer_sequence sizes = std::make_integer_sequence<int, Policy::kMaxBatch>();

    for (std::int64_t panel = tile.panel_begin; panel < tile.panel_end; ++panel) {
        for (int b = 0; b < tile.batch; b += Policy::kMaxBatch) {
            const int n = tile.batch - b < Policy::kMaxBatch ? tile.batch - b : Policy::kMaxBatch;
            build_tables<Policy>(tile, panel, b, n, g, tables + table_floats<Policy>(b));
        }
        columns.set_block(panel);
        for (int c = 0; c < cols; c += kColumnPad) {
            Simd::U words[kWordsPerPanel][kLookupVectors];
            for (int v = 0; v < kLookupVectors; ++v) {
                Simd::U w[4][4];
                columns.get_all(c / Simd::kLanes + v, w);
                for (int lane = 0; lane < 4; ++lane) {
                    for (int j = 0; j < 4; ++j) words[j * 4 + lane][v] = w[lane][j];
                }
            }
            for (int b = 0; b < tile.batch; b += Policy::kMaxBatch) {
                const int n =
                    tile.batch - b < Policy::kMaxBatch ? tile.batch - b : Policy::kMaxBatch;
                accumulate_panel_for<Policy>(n, sizes)(words[0], tables + table_floats<Policy>(b),
                                                       tile.acc + b * tile.acc_ld + c, tile.acc_ld);
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
