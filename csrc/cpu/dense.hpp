// Kernels that write a tile of R as numbers and multiply with it: Gaussian, float64, the adjoint
// and blocks of R itself. A Simd vocabulary must be included before. Everything here is local to
// the translation unit.
#pragma once

#include <type_traits>

#include "arena.hpp"
#include "load.hpp"
#include "words.hpp"

namespace fastproj::cpu {
namespace {

constexpr int kPartRows = 128;  // rows expanded at a time: one word of each Rademacher call
constexpr int kParts = kPanelRows / kPartRows;

template <class T>
using Vector = std::conditional_t<std::is_same_v<T, double>, Simd::D, Simd::F>;
template <class T>
constexpr int kVectorLanes = Simd::kBytes / static_cast<int>(sizeof(T));

inline void store_entries(Simd::F entries, float* to) { *reinterpret_cast<Simd::F*>(to) = entries; }
inline void store_entries(Simd::F entries, double* to) {
    for (int i = 0; i < Simd::kLanes; ++i) to[i] = entries[i];
}

// Expands tile[r, c] = R[panel * 512 + part * 128 + r, strip column c] for a strip of kStripVectors
// vectors of columns. One unit of this work is one word: rows 8i + 2 lane and the next, of one
// vector.
template <Kind kKind, int kStripVectors>
class Expander {
  public:
    static constexpr int kCols = kStripVectors * Simd::kLanes;
    static constexpr int kUnits = kStripVectors * 16 * 4;

    explicit Expander(ColumnWords& words) : words_(words) {}

    // Makes the random words of a part; parts 0 to 3 of a panel and strip come in order.
    void prepare(std::int64_t panel, int part, int first_vector) {
        part_ = part;
        if constexpr (kKind == Kind::kRademacher) {
            if (part != 0) return;  // one call holds the words of all four
            words_.set_block(panel);
            for (int v = 0; v < kStripVectors; ++v) words_.get_all(first_vector + v, held_[v][0]);
        } else {
            for (int sub = 0; sub < 4; ++sub) {
                words_.set_block(panel * 16 + part * 4 + sub);
                for (int v = 0; v < kStripVectors; ++v) {
                    words_.get_all(first_vector + v, held_[v][sub]);
                }
            }
        }
    }

    template <class T>
    void expand_unit(int unit, T* tile) const {
        const int v = unit / 64, i = unit % 64 / 4, lane = unit % 4;
        T* to = tile + v * Simd::kLanes + (8 * i + 2 * lane) * kCols;
        Simd::F even, odd;
        if constexpr (kKind == Kind::kRademacher) {
            even = Simd::sign(held_[v][0][lane][part_], i);
            odd = Simd::sign(held_[v][0][lane][part_], i + 16);
        } else {
            Simd::gauss(held_[v][i / 4][lane][i % 4], even, odd);
        }
        store_entries(even, to);
        store_entries(odd, to + kCols);
    }

    template <class T>
    void expand(T* tile) const {
        for (int unit = 0; unit < kUnits; ++unit) expand_unit(unit, tile);
    }

  private:
    ColumnWords& words_;
    int part_ = 0;
    Simd::U held_[kStripVectors][kKind == Kind::kRademacher ? 1 : 4][4][4];
};

constexpr int pad_columns(int cols) { return (cols + kColumnPad - 1) / kColumnPad * kColumnPad; }

constexpr int kStripVectors = 2;
constexpr int kStripCols = kStripVectors * Simd::kLanes;
static_assert(kColumnPad % kStripCols == 0);

// partial[b, :] += sum over r of g[b, r] * tile[r, :], for kBatch rows and one strip. After every
// `every` rows (a power of two) fill() does a piece of other work that the processor can overlap.
template <class T, int kBatch, class Fill>
void multiply_part(const T* tile, const T* g, T* partial, int every, Fill&& fill) {
    constexpr int kVectors = kStripCols / kVectorLanes<T>;
    using V = Vector<T>;
    auto* sums = reinterpret_cast<V*>(partial);
    V acc[kBatch][kVectors];
    for (int b = 0; b < kBatch; ++b) {
        for (int v = 0; v < kVectors; ++v) acc[b][v] = sums[b * kVectors + v];
    }
    for (int r = 0; r < kPartRows; ++r) {
        V row[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            row[v] = reinterpret_cast<const V*>(tile)[r * kVectors + v];
        }
        for (int b = 0; b < kBatch; ++b) {
            const T x = g[b * kPanelRows + r];
            for (int v = 0; v < kVectors; ++v) acc[b][v] += row[v] * x;
        }
        if ((r & (every - 1)) == 0) fill();
    }
    for (int b = 0; b < kBatch; ++b) {
        for (int v = 0; v < kVectors; ++v) sums[b * kVectors + v] = acc[b][v];
    }
}

inline std::size_t dense_scratch_bytes(int batch, int cols) {
    const std::size_t per_row = (kPanelRows + kStripCols) * sizeof(double);
    return ColumnWords::bytes(pad_columns(cols)) + static_cast<std::size_t>(batch) * per_row +
           2 * static_cast<std::size_t>(kPartRows) * kStripCols * sizeof(double) + 5 * 64;
}

// Sums 512 rows in T before they are added to the double accumulator. While one part of 128 rows is
// multiplied, the next part is expanded between the multiplications, on ports that they leave idle.
template <class T, Kind kKind>
void project_dense(const ProjectTile& tile) {
    constexpr int kBatch = Simd::kDenseBatch / static_cast<int>(sizeof(T) / sizeof(float));
    using StripExpander = Expander<kKind, kStripVectors>;
    Arena arena(tile.scratch);
    const int cols = pad_columns(tile.cols);
    ColumnWords words(tile.key, tile.col_begin, cols, arena.take<char>(ColumnWords::bytes(cols)));
    T* g = arena.take<T>(static_cast<std::size_t>(tile.batch) * kPanelRows);
    T* partial = arena.take<T>(static_cast<std::size_t>(tile.batch) * kStripCols);
    T* now = arena.take<T>(static_cast<std::size_t>(kPartRows) * kStripCols);
    T* next = arena.take<T>(static_cast<std::size_t>(kPartRows) * kStripCols);
    StripExpander expander(words);
    // Units of expansion, kPartRows / every of them to a block of the batch.
    const int blocks = tile.batch / kBatch;
    const int every = blocks >= 4 ? 4 : blocks >= 2 ? 2 : 1;

    expander.prepare(tile.panel_begin, 0, 0);
    expander.expand(now);
    for (std::int64_t panel = tile.panel_begin; panel < tile.panel_end; ++panel) {
        for (int b = 0; b < tile.batch; ++b) {
            load_panel(*tile.source, tile.batch_begin + b, panel, g + b * kPanelRows);
        }
        for (int c = 0; c < cols; c += kStripCols) {
            std::memset(partial, 0, static_cast<std::size_t>(tile.batch) * kStripCols * sizeof(T));
            for (int part = 0; part < kParts; ++part) {
                if (part + 1 < kParts) {
                    expander.prepare(panel, part + 1, c / Simd::kLanes);
                } else if (c + kStripCols < cols) {
                    expander.prepare(panel, 0, c / Simd::kLanes + kStripVectors);
                } else {
                    expander.prepare(panel + 1, 0, 0);
                }
                int unit = 0;
                const auto fill = [&] {
                    if (unit < StripExpander::kUnits) expander.expand_unit(unit++, next);
                };
                const auto idle = [] {};
                const T* x = g + part * kPartRows;
                int b = 0;
                for (; b + kBatch <= tile.batch; b += kBatch) {
                    multiply_part<T, kBatch>(now, x + b * kPanelRows, partial + b * kStripCols,
                                             every, fill);
                }
                for (; b + 2 <= tile.batch; b += 2) {
                    multiply_part<T, 2>(now, x + b * kPanelRows, partial + b * kStripCols, every,
                                        idle);
                }
                for (; b < tile.batch; ++b) {
                    multiply_part<T, 1>(now, x + b * kPanelRows, partial + b * kStripCols, every,
                                        idle);
                }
                while (unit < StripExpander::kUnits) fill();
                T* const done = now;
                now = next;
                next = done;
            }
            for (int b = 0; b < tile.batch; ++b) {
                double* acc = tile.acc + b * tile.acc_ld + c;
                const T* sums = partial + b * kStripCols;
                if constexpr (std::is_same_v<T, float>) {
                    for (int i = 0; i < kStripCols; i += Simd::kLanes) {
                        Simd::add_to_double(*reinterpret_cast<const Simd::F*>(sums + i), acc + i);
                    }
                } else {
                    for (int i = 0; i < kStripCols; ++i) acc[i] += sums[i];
                }
            }
        }
    }
}

inline void project_dense_f64(const ProjectTile& tile) {
    if (tile.key.kind == Kind::kRademacher) {
        project_dense<double, Kind::kRademacher>(tile);
    } else {
        project_dense<double, Kind::kGaussian>(tile);
    }
}

// The adjoint. Dot products run along columns: kColumnPad at a time in T, then in double.
constexpr int kDotStripVectors = kColumnPad / Simd::kLanes;

inline std::size_t transpose_scratch_bytes() {
    return ColumnWords::bytes(kColumnPad) +
           static_cast<std::size_t>(kPartRows) * kColumnPad * sizeof(double) + 2 * 64;
}

template <class T>
double sum_lanes(Vector<T> v) {
    double sum = 0;
    for (int i = 0; i < kVectorLanes<T>; ++i) sum += static_cast<double>(v[i]);
    return sum;
}

template <class T, Kind kKind>
void transpose_tile(const TransposeTile& tile) {
    using V = Vector<T>;
    constexpr int kVectors = kColumnPad / kVectorLanes<T>;
    constexpr int kRows = 4;
    std::memset(tile.out, 0, static_cast<std::size_t>(tile.batch) * kPanelRows * sizeof(double));
    for (std::int64_t c = 0; c < tile.cols; c += kColumnPad) {
        Arena arena(tile.scratch);
        ColumnWords words(tile.key, static_cast<std::uint32_t>(c), kColumnPad,
                          arena.take<char>(ColumnWords::bytes(kColumnPad)));
        T* entries = arena.take<T>(static_cast<std::size_t>(kPartRows) * kColumnPad);
        Expander<kKind, kDotStripVectors> expander(words);
        for (int part = 0; part < kParts; ++part) {
            expander.prepare(tile.panel, part, 0);
            expander.expand(entries);
            for (int b = 0; b < tile.batch; ++b) {
                V y[kVectors];
                std::memcpy(y, static_cast<const T*>(tile.y) + b * tile.y_ld + c, sizeof y);
                double* out = tile.out + b * kPanelRows + part * kPartRows;
                for (int r = 0; r < kPartRows; r += kRows) {
                    for (int i = 0; i < kRows; ++i) {
                        const V* row = reinterpret_cast<const V*>(entries + (r + i) * kColumnPad);
                        V sum = row[0] * y[0];
                        for (int v = 1; v < kVectors; ++v) sum += row[v] * y[v];
                        out[r + i] += sum_lanes<T>(sum);
                    }
                }
            }
        }
    }
}

template <class T>
void transpose_dense(const TransposeTile& tile) {
    if (tile.key.kind == Kind::kRademacher) {
        transpose_tile<T, Kind::kRademacher>(tile);
    } else {
        transpose_tile<T, Kind::kGaussian>(tile);
    }
}

inline std::size_t matrix_scratch_bytes() { return ColumnWords::bytes(kColumnPad) + 64; }

template <Kind kKind>
void matrix_tile(const MatrixTile& tile) {
    ColumnWords words(tile.key, tile.col_begin, kColumnPad, tile.scratch);
    Expander<kKind, kDotStripVectors> expander(words);
    for (int part = 0; part < kParts; ++part) {
        expander.prepare(tile.panel, part, 0);
        expander.expand(tile.tile + part * kPartRows * kColumnPad);
    }
}

inline void matrix_dense(const MatrixTile& tile) {
    if (tile.key.kind == Kind::kRademacher) {
        matrix_tile<Kind::kRademacher>(tile);
    } else {
        matrix_tile<Kind::kGaussian>(tile);
    }
}

// The table of a set that has nothing but these kernels.
inline KernelTable dense_kernels() {
    KernelTable table{};
    table.project_scratch_bytes = dense_scratch_bytes;
    table.rademacher_f32 = project_dense<float, Kind::kRademacher>;
    table.gaussian_f32 = project_dense<float, Kind::kGaussian>;
    table.project_f64 = project_dense_f64;
    table.transpose_scratch_bytes = transpose_scratch_bytes;
    table.transpose_f32 = transpose_dense<float>;
    table.transpose_f64 = transpose_dense<double>;
    table.matrix_scratch_bytes = matrix_scratch_bytes;
    table.matrix = matrix_dense;
    return table;
}

}  // namespace
}  // namespace fastproj::cpu
