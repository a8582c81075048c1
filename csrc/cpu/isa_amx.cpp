// AMX-BF16 on top of AVX-512. A float32 is 1, 2 or 3 bf16 terms (medium, high, highest); each term
// of each batch row is a row of its own ("term row") in a plain bf16 x bf16 -> fp32 matrix product,
// and the terms are added up in double. So a row's result does not depend on what it is stacked
// with.
#include "simd_avx512.hpp"
// clang-format off
#include "dense.hpp"

#include <utility>
// clang-format on

namespace fastproj::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 1024;  // 16 rows of 64 bytes
constexpr int kStepRows = 32;     // rows of R that one tile holds, two to a 32-bit cell
constexpr int kGroupSteps = kGroupRows / kStepRows;
constexpr int kChunkGroups = 4;  // groups that one fp32 tile adds up
constexpr int kChunkSteps = kChunkGroups * kGroupSteps;
constexpr int kTileA = 6, kTileB = 7, kTileShortA = 5;
constexpr int kMaxTermTiles = 6;  // term tiles that share one generated tile of R
constexpr int kLanes = Simd::kLanes;

// ---- Instructions. Written out because GCC 12's intrinsics declare no memory operands.
// ------------

struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {};
    std::uint8_t rows[16] = {};
};

inline void load_config(const TileConfig& config) {
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int kTile>
inline void load_tile(const void* from) {  // rows 64 bytes apart
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(std::int64_t{64}), "i"(kTile)
                 : "memory");
}
template <int kTile>
inline void store_tile(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(std::int64_t{64}), "i"(kTile)
                 : "memory");
}
template <int kTile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kC, int kA, int kB>
inline void multiply_tiles() {  // C += A * B
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// ---- Gradients as term rows -------------------------------------------------------------------

// Tiles flush subnormals. A row whose largest value in the chunk is below 2^-64 is multiplied by
// 2^96 first, exactly; in any other row what a flush can drop is below 2^-62 of the largest value.
constexpr float kTinyRow = 0x1p-64f;
constexpr float kTinyRowFactor = 0x1p96f;

inline __m512i truncate_to_bf16(__m512i bits) {
    return _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

// Round to nearest even, but never from a finite number to infinity: there, truncate.
inline __m512i round_to_bf16(__m512i bits) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        truncate_to_bf16(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
    const __m512i magnitude = _mm512_and_si512(rounded, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 overflow = _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    return _mm512_mask_mov_epi32(rounded, overflow, truncate_to_bf16(bits));
}

// The bf16 terms of 16 floats, as float bits whose low halves are zero; their sum is the float,
// exactly with three. Infinities and NaN are their own first term.
template <int kTerms>
void split(__m512 x, __m512i terms[kTerms]) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __mmask16 finite = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    const __mmask16 nan = _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    const __m512i first = kTerms == 1 ? round_to_bf16(bits) : truncate_to_bf16(bits);
    terms[0] = _mm512_mask_mov_epi32(first, nan, _mm512_set1_epi32(0x7fc00000));
    __m512 rest = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(first));
    for (int t = 1; t < kTerms; ++t) {
        const __m512i rest_bits = _mm512_castps_si512(rest);
        terms[t] = t + 1 == kTerms ? round_to_bf16(rest_bits) : truncate_to_bf16(rest_bits);
        rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(terms[t]));
    }
}

// Packs one chunk of one batch row as kTerms term rows of tiles [tile][step][16 rows][32 bf16].
// Returns what the sums must be multiplied by.
template <int kTerms>
double pack_row(const float* g, int steps, int first_term_row, std::uint16_t* tiles) {
    float largest = 0.0f;
    for (int i = 0; i < steps * kStepRows; ++i) {
        const float magnitude = g[i] < 0 ? -g[i] : g[i];
        largest = magnitude > largest ? magnitude : largest;  // false for NaN
    }
    const float factor = largest < kTinyRow ? kTinyRowFactor : 1.0f;
    for (int step = 0; step < steps; ++step) {
        for (int half = 0; half < 2; ++half) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(g + step * kStepRows + half * kLanes),
                                           _mm512_set1_ps(factor));
            __m512i terms[kTerms];
            split<kTerms>(x, terms);
            for (int t = 0; t < kTerms; ++t) {
                const int row = first_term_row + t;
                std::uint16_t* to =
                    tiles + ((row / kTileRows * kChunkSteps + step) * kTileRows + row % kTileRows) *
                                kStepRows;
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half * kLanes),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(terms[t], 16)));
            }
        }
    }
    return 1.0 / static_cast<double>(factor);
}

// ---- Tiles of R -------------------------------------------------------------------------------

// Makes the tiles of R for kStrips vectors of columns, one step of 32 rows after the other, always
// one ahead of the tile products so that the two overlap.
template <Kind kKind, int kStrips>
class TileMaker {
  public:
    TileMaker(ColumnWords& words, int first_vector) : words_(words), first_vector_(first_vector) {}

    // Ready to make the tiles of the first step of this group.
    void start(std::int64_t group) {
        if constexpr (kKind == Kind::kRademacher) {
            words_.set_block(group);
            for (int call = 0; call < kCalls; ++call) fetch(call);
        }
        group_ = group;
    }

    // Tiles of `step` of the current group, steps 0..15 of one group after the other.
    void make(int step, char* tiles) {
        if constexpr (kKind == Kind::kRademacher) {
            make_rademacher(step, tiles);
        } else {
            make_gaussian(step, tiles);
        }
        if (step + 1 == kGroupSteps) ++group_;
    }

  private:
    static constexpr int kCalls = 4 * kStrips;

    void make_rademacher(int step, char* tiles) {
        if (step == 0) {
            std::memcpy(now_, next_, sizeof now_);
            words_.set_block(group_ + 1);
        }
        const int j = step / 4, first_bit = step % 4 * 4;
        const __m512i sign_bits = _mm512_set1_epi32(static_cast<int>(0x80008000u));
        const __m512i ones = _mm512_set1_epi32(0x3f803f80);
        for (int bit = 0; bit < 4; ++bit) {
            // A shift by a vector is one micro-operation on Intel, by a register's low word two.
            const __m512i count = _mm512_set1_epi32(15 - first_bit - bit);
            for (int strip = 0; strip < kStrips; ++strip) {
                for (int lane = 0; lane < 4; ++lane) {
                    const __m512i moved = _mm512_sllv_epi32((__m512i)now_[strip][lane][j], count);
                    store_cells((Simd::U)_mm512_ternarylogic_epi32(moved, sign_bits, ones,
                                                                   0x6A),  // (a & b) ^ c
                                tiles, strip, 4 * bit + lane);
                }
            }
        }
        // The next group's words, a few calls a step.
        for (int call = step * kCalls / kGroupSteps; call < (step + 1) * kCalls / kGroupSteps;
             ++call) {
            fetch(call);
        }
    }

    void make_gaussian(int step, char* tiles) {
        words_.set_block(group_ * kGroupSteps + step);
        for (int strip = 0; strip < kStrips; ++strip) {
            Simd::U w[4][4];
            words_.get_all(first_vector_ + strip, w);
            for (int i = 0; i < kTileRows; ++i) {
                store_cells(Simd::gauss_bf16(w[i % 4][i / 4]), tiles, strip, i);
            }
        }
    }

    static void store_cells(Simd::U cells, char* tiles, int strip, int row) {
        _mm512_store_si512(tiles + strip * kTileBytes + row * 64, (__m512i)cells);
    }
    void fetch(int call) {
        words_.get<1>(static_cast<std::uint32_t>(call % 4), first_vector_ + call / 4,
                      &next_[call / 4][call % 4]);
    }

    ColumnWords& words_;
    int first_vector_;
    std::int64_t group_ = 0;
    Simd::U now_[kStrips][4][4], next_[kStrips][4][4];
};

// ---- The product ------------------------------------------------------------------------------

template <int... kIndices, class F>
inline void unroll(std::integer_sequence<int, kIndices...>, F&& f) {
    (f(std::integral_constant<int, kIndices>{}), ...);
}

struct Chunk {
    const std::uint16_t* term_tiles;  // of the first term tile in this block
    std::int64_t group_begin;
    int groups;
    float* sums;  // out: [kTermTiles][kStrips] tiles of 16 x 16
};

// sums = term rows x R over one chunk, for kTermTiles tiles of term rows and kStrips vectors of
// columns. With kShort the last term tile has a register of its own, of fewer rows.
template <Kind kKind, int kTermTiles, int kStrips, bool kShort>
void multiply_chunk(const Chunk& chunk, ColumnWords& words, int first_vector) {
    static_assert(kTermTiles * kStrips <= (kShort ? kTileShortA : kTileA));
    constexpr auto tiles = std::make_integer_sequence<int, kTermTiles>();
    constexpr auto strips = std::make_integer_sequence<int, kStrips>();
    alignas(64) char made[2][kStrips * kTileBytes];
    TileMaker<kKind, kStrips> maker(words, first_vector);
    maker.start(chunk.group_begin);
    maker.make(0, made[0]);
    unroll(tiles, [&](auto m) { unroll(strips, [&](auto s) { zero_tile<m * kStrips + s>(); }); });
    const int steps = chunk.groups * kGroupSteps;
    for (int step = 0; step < steps; ++step) {
        const char* ready = made[step & 1];
        const std::uint16_t* a = chunk.term_tiles + step * (kTileBytes / 2);
        unroll(strips, [&](auto s) {
            load_tile<kTileB>(ready + s * kTileBytes);
            unroll(tiles, [&](auto m) {
                constexpr int kA = kShort && m + 1 == kTermTiles ? kTileShortA : kTileA;
                load_tile<kA>(a + m * kChunkSteps * (kTileBytes / 2));
                multiply_tiles<m * kStrips + s, kA, kTileB>();
            });
        });
        if (step + 1 < steps) maker.make((step + 1) % kGroupSteps, made[(step + 1) & 1]);
    }
    unroll(tiles, [&](auto m) {
        unroll(strips, [&](auto s) {
            store_tile<m * kStrips + s>(chunk.sums + (m * kStrips + s) * kTileRows * kLanes);
        });
    });
}

// Vectors of columns that share a load of term tiles: as many as there are registers for.
constexpr int strips_for(int term_tiles) { return term_tiles == 1 ? 4 : term_tiles <= 3 ? 2 : 1; }

template <Kind kKind, int kTermTiles>
void multiply_block(const Chunk& chunk, ColumnWords& words, int first_vector, int last_rows) {
    constexpr int kStrips = strips_for(kTermTiles);
    if constexpr (kTermTiles * kStrips <= kTileShortA) {
        if (last_rows < kTileRows) {
            multiply_chunk<kKind, kTermTiles, kStrips, true>(chunk, words, first_vector);
            return;
        }
    }
    multiply_chunk<kKind, kTermTiles, kStrips, false>(chunk, words, first_vector);
}

using MultiplyBlock = void (*)(const Chunk&, ColumnWords&, int, int);

template <Kind kKind, int... kIndices>
MultiplyBlock multiply_block_for(int term_tiles, std::integer_sequence<int, kIndices...>) {
    static constexpr MultiplyBlock table[] = {multiply_block<kKind, kIndices + 1>...};
    return table[term_tiles - 1];
}

TileConfig config_for(int term_tiles, int last_rows) {
    TileConfig config;
    const int strips = strips_for(term_tiles);
    const bool has_short = term_tiles * strips <= kTileShortA && last_rows < kTileRows;
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes_per_row[tile] = 64;
        const bool last = tile / strips == term_tiles - 1 || tile == kTileShortA;
        config.rows[tile] =
            static_cast<std::uint8_t>(has_short && last && tile < kTileA ? last_rows : kTileRows);
    }
    return config;
}

constexpr int term_tiles_for(int term_rows) { return (term_rows + kTileRows - 1) / kTileRows; }

template <Kind kKind, int kTerms>
void project_tiles(const ProjectTile& tile) {
    Arena arena(tile.scratch);
    const int cols = pad_columns(tile.cols);
    ColumnWords words(tile.key, tile.col_begin, cols, arena.take<char>(ColumnWords::bytes(cols)));
    const int term_rows = tile.batch * kTerms;
    const int term_tiles = term_tiles_for(term_rows);
    const std::size_t packed = static_cast<std::size_t>(term_tiles) * kChunkSteps * kTileBytes / 2;
    auto* a = arena.take<std::uint16_t>(packed);
    float* g = arena.take<float>(kChunkGroups * kGroupRows);
    float* sums = arena.take<float>(kMaxTermTiles * kTileRows * kLanes);
    double* unscale = arena.take<double>(static_cast<std::size_t>(tile.batch));
    if (term_rows % kTileRows != 0) std::memset(a, 0, packed * sizeof *a);

    for (std::int64_t group = tile.group_begin; group < tile.group_end; group += kChunkGroups) {
        const std::int64_t left = tile.group_end - group;
        const int groups = static_cast<int>(left < kChunkGroups ? left : kChunkGroups);
        for (int b = 0; b < tile.batch; ++b) {
            for (int i = 0; i < groups; ++i) {
                load_group(*tile.source, tile.batch_begin + b, group + i, g + i * kGroupRows);
            }
            unscale[b] = pack_row<kTerms>(g, groups * kGroupSteps, b * kTerms, a);
        }
        for (int first = 0; first < term_tiles; first += kMaxTermTiles) {
            const int here =
                term_tiles - first < kMaxTermTiles ? term_tiles - first : kMaxTermTiles;
            const int rows_here = term_rows - first * kTileRows < here * kTileRows
                                      ? term_rows - first * kTileRows
                                      : here * kTileRows;
            const int last_rows = rows_here - (here - 1) * kTileRows;
            const int strips = strips_for(here);
            const Chunk chunk{a + static_cast<std::ptrdiff_t>(first) * kChunkSteps * kTileBytes / 2,
                              group, groups, sums};
            const MultiplyBlock multiply =
                multiply_block_for<kKind>(here, std::make_integer_sequence<int, kMaxTermTiles>());
            load_config(config_for(here, last_rows));
            for (int v = 0; v < cols / kLanes; v += strips) {
                multiply(chunk, words, v, last_rows);
                for (int row = 0; row < rows_here; ++row) {
                    const int b = (first * kTileRows + row) / kTerms;
                    for (int s = 0; s < strips; ++s) {
                        const float* from =
                            sums +
                            ((row / kTileRows * strips + s) * kTileRows + row % kTileRows) * kLanes;
                        double* acc = tile.acc + b * tile.acc_ld + (v + s) * kLanes;
                        for (int i = 0; i < kLanes; ++i) {
                            acc[i] += static_cast<double>(from[i]) * unscale[b];
                        }
                    }
                }
            }
        }
    }
    release_tiles();
}

template <Kind kKind>
void project_amx(const ProjectTile& tile) {
    const DType dtype = tile.source->dtype;
    if (dtype == DType::kBFloat16) {
        project_tiles<kKind, 1>(tile);  // exact
    } else if (dtype == DType::kFloat16) {
        project_tiles<kKind, 2>(tile);  // exact: 16 bits hold the 11 of float16
    } else if (tile.precision == Precision::kMedium) {
        project_tiles<kKind, 1>(tile);
    } else if (tile.precision == Precision::kHigh) {
        project_tiles<kKind, 2>(tile);
    } else {
        project_tiles<kKind, 3>(tile);
    }
}

std::size_t amx_scratch_bytes(int batch, int cols) {
    const auto term_tiles = static_cast<std::size_t>(term_tiles_for(3 * batch));
    const std::size_t amx = ColumnWords::bytes(pad_columns(cols)) +
                            term_tiles * kChunkSteps * kTileBytes +
                            kChunkGroups * kGroupRows * sizeof(float) +
                            kMaxTermTiles * kTileRows * kLanes * sizeof(float) +
                            static_cast<std::size_t>(batch) * sizeof(double) + 5 * 64;
    const std::size_t dense = dense_scratch_bytes(batch, cols);  // float64
    return amx > dense ? amx : dense;
}

}  // namespace

KernelTable kernels_amx() {
    KernelTable table = kernels_avx512();
    table.project_scratch_bytes = amx_scratch_bytes;
    table.rademacher_f32 = project_amx<Kind::kRademacher>;
    table.gaussian_f32 = project_amx<Kind::kGaussian>;
    return table;
}

}  // namespace fastproj::cpu
