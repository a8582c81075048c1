// Kernels that write a tile of R as numbers and multiply with it: Gaussian, float64, the adjoint
// and blocks of R itself. Expects a Simd vocabulary before; local to the translation unit.
#pragma once

#include <type_traits>

#include "load.hpp"
#include "words.hpp"

namespace fastproj::cpu {
namespace {

constexpr int kPartRows = 128;  // rows expanded at a time: one word of each Rademacher call
constexpr int kParts = kGroupRows / kPartRows;

template <class T>
using Vector = std::conditional_t<std::is_same_v<T, double>, Simd::D, Simd::F>;
template <class T>
constexpr int kVectorLanes = Simd::kBytes / static_cast<int>(sizeof(T));

inline void store_entries(Simd::F entries, float* to) { *reinterpret_cast<Simd::F*>(to) = entries; }
inline void store_entries(Simd::F entries, double* to) {
    for (int i = 0; i < Simd::kLanes; ++i) to[i] = entries[i];
}

// Expands tile[r, c] = R[group * 512 + part * 128 + r, strip column c] for a strip of kStripVectors
// vectors of columns, part by part in order.
template <int kStripVectors>
class Expander {
  public:
    static constexpr int kCols = kStripVectors * Simd::kLanes;

    Expander(Kind kind, ColumnWords& words) : kind_(kind), words_(words) {}

    template <class T>
    void expand(std::int64_t group, int part, int first_vector, T* tile) {
        if (kind_ == Kind::kRademacher) {
            if (part == 0) {
                words_.set_block(group);
                for (std::uint32_t lane = 0; lane < 4; ++lane) {
                    for (int v = 0; v < kStripVectors; ++v) {
                        words_.get(lane, first_vector + v, held_[v][lane]);
                    }
                }
            }
            for (int v = 0; v < kStripVectors; ++v) {
                for (int lane = 0; lane < 4; ++lane) {
                    const Simd::U word = held_[v][lane][part];
                    T* to = tile + v * Simd::kLanes + 2 * lane * kCols;
                    for (int i = 0; i < 16; ++i) {
                        store_entries(Simd::sign(word, i), to + 8 * i * kCols);
                        store_entries(Simd::sign(word, i + 16), to + (8 * i + 1) * kCols);
                    }
                }
            }
            return;
        }
        for (int sub = 0; sub < 4; ++sub) {
            words_.set_block(group * 16 + part * 4 + sub);
            for (int v = 0; v < kStripVectors; ++v) {
                for (std::uint32_t lane = 0; lane < 4; ++lane) {
                    Simd::U w[4];
                    words_.get(lane, first_vector + v, w);
                    T* to =
                        tile + v * Simd::kLanes + (sub * 32 + 2 * static_cast<int>(lane)) * kCols;
                    for (int j = 0; j < 4; ++j) {
                        Simd::F even, odd;
                        Simd::gauss(w[j], even, odd);
                        store_entries(even, to + 8 * j * kCols);
                        store_entries(odd, to + (8 * j + 1) * kCols);
                    }
                }
            }
        }
    }

  private:
    Kind kind_;
    ColumnWords& words_;
    Simd::U held_[kStripVectors][4][4];
};

// Hands out aligned pieces of one scratch allocation.
class Arena {
  public:
    explicit Arena(void* base) : at_(static_cast<char*>(base)) {}
    template <class T>
    T* take(std::size_t count) {
        T* here = reinterpret_cast<T*>(at_);
        at_ += (count * sizeof(T) + 63) / 64 * 64;
        return here;
    }

  private:
    char* at_;
};

constexpr int pad_columns(int cols) { return (cols + kColumnPad - 1) / kColumnPad * kColumnPad; }

constexpr int kStripVectors = 2;
constexpr int kStripCols = kStripVectors * Simd::kLanes;
static_assert(kColumnPad % kStripCols == 0);

// partial[b, :] += sum over r of g[b, r] * tile[r, :], for kBatch rows and one strip.
template <class T, int kBatch>
void multiply_part(const T* tile, const T* g, T* partial) {
    constexpr int kVectors = kStripCols / kVectorLanes<T>;
    using V = Vector<T>;
    V acc[kBatch][kVectors];
    for (int b = 0; b < kBatch; ++b) {
        for (int v = 0; v < kVectors; ++v)
            acc[b][v] = reinterpret_cast<V*>(partial)[b * kVectors + v];
    }
    for (int r = 0; r < kPartRows; ++r) {
        V row[kVectors];
        for (int v = 0; v < kVectors; ++v)
            row[v] = reinterpret_cast<const V*>(tile)[r * kVectors + v];
        for (int b = 0; b < kBatch; ++b) {
            const T x = g[b * kGroupRows + r];
            for (int v = 0; v < kVectors; ++v) acc[b][v] += row[v] * x;
        }
    }
    for (int b = 0; b < kBatch; ++b) {
        for (int v = 0; v < kVectors; ++v)
            reinterpret_cast<V*>(partial)[b * kVectors + v] = acc[b][v];
    }
}

inline std::size_t dense_scratch_bytes(int batch, int cols) {
    const std::size_t per_row = (kGroupRows + kStripCols) * sizeof(double);
    return ColumnWords::bytes(pad_columns(cols)) + static_cast<std::size_t>(batch) * per_row +
           static_cast<std::size_t>(kPartRows) * kStripCols * sizeof(double) + 4 * 64;
}

// Sums 512 rows in T before they are added to the double accumulator.
template <class T>
void project_dense(const ProjectTile& tile) {
    Arena arena(tile.scratch);
    const int cols = pad_columns(tile.cols);
    ColumnWords words(tile.key, tile.col_begin, cols, arena.take<char>(ColumnWords::bytes(cols)));
    T* g = arena.take<T>(static_cast<std::size_t>(tile.batch) * kGroupRows);
    T* partial = arena.take<T>(static_cast<std::size_t>(tile.batch) * kStripCols);
    T* entries = arena.take<T>(static_cast<std::size_t>(kPartRows) * kStripCols);
    Expander<kStripVectors> expander(tile.key.kind, words);

    for (std::int64_t group = tile.group_begin; group < tile.group_end; ++group) {
        for (int b = 0; b < tile.batch; ++b) {
            load_group(*tile.source, tile.batch_begin + b, group, g + b * kGroupRows);
        }
        for (int c = 0; c < cols; c += kStripCols) {
            std::memset(partial, 0, static_cast<std::size_t>(tile.batch) * kStripCols * sizeof(T));
            for (int part = 0; part < kParts; ++part) {
                expander.expand(group, part, c / Simd::kLanes, entries);
                const T* x = g + part * kPartRows;
                constexpr int kFull = Simd::kDenseBatch / static_cast<int>(sizeof(T) / 4);
                int b = 0;
                for (; b + kFull <= tile.batch; b += kFull) {
                    multiply_part<T, kFull>(entries, x + b * kGroupRows, partial + b * kStripCols);
                }
                for (; b + 2 <= tile.batch; b += 2) {
                    multiply_part<T, 2>(entries, x + b * kGroupRows, partial + b * kStripCols);
                }
                for (; b < tile.batch; ++b) {
                    multiply_part<T, 1>(entries, x + b * kGroupRows, partial + b * kStripCols);
                }
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

// The adjoint. Dot products run along columns: kDotVectors vectors at a time in T, then in double.
constexpr int kDotCols = 4 * kColumnPad;
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

template <class T>
void transpose_dense(const TransposeTile& tile) {
    using V = Vector<T>;
    constexpr int kVectors = kColumnPad / kVectorLanes<T>;
    constexpr int kRows = 4;
    std::memset(tile.out, 0, static_cast<std::size_t>(tile.batch) * kGroupRows * sizeof(double));
    for (std::int64_t c = 0; c < tile.cols; c += kColumnPad) {
        Arena arena(tile.scratch);
        ColumnWords words(tile.key, static_cast<std::uint32_t>(c), kColumnPad,
                          arena.take<char>(ColumnWords::bytes(kColumnPad)));
        T* entries = arena.take<T>(static_cast<std::size_t>(kPartRows) * kColumnPad);
        Expander<kDotStripVectors> expander(tile.key.kind, words);
        for (int part = 0; part < kParts; ++part) {
            expander.expand(tile.group, part, 0, entries);
            for (int b = 0; b < tile.batch; ++b) {
                V y[kVectors];
                std::memcpy(y, static_cast<const T*>(tile.y) + b * tile.y_ld + c, sizeof y);
                double* out = tile.out + b * kGroupRows + part * kPartRows;
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

inline std::size_t matrix_scratch_bytes() { return ColumnWords::bytes(kColumnPad) + 64; }

inline void matrix_dense(const MatrixTile& tile) {
    ColumnWords words(tile.key, tile.col_begin, kColumnPad, tile.scratch);
    Expander<kDotStripVectors> expander(tile.key.kind, words);
    for (int part = 0; part < kParts; ++part) {
        expander.expand(tile.group, part, 0, tile.tile + part * kPartRows * kColumnPad);
    }
}

// The table of a set that has nothing but these kernels.
inline KernelTable dense_kernels() {
    KernelTable table{};
    table.project_scratch_bytes = dense_scratch_bytes;
    table.rademacher_f32 = project_dense<float>;
    table.gaussian_f32 = project_dense<float>;
    table.project_f64 = project_dense<double>;
    table.transpose_scratch_bytes = transpose_scratch_bytes;
    table.transpose_f32 = transpose_dense<float>;
    table.transpose_f64 = transpose_dense<double>;
    table.matrix_scratch_bytes = matrix_scratch_bytes;
    table.matrix = matrix_dense;
    return table;
}

}  // namespace
}  // namespace fastproj::cpu
