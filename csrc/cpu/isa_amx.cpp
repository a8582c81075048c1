// AMX-BF16 on top of AVX-512 and its VBMI. A float32 is 1, 2 or 3 bf16 terms (medium, high,
// highest). Each term of each batch row is a row of its own ("term row") in a plain bf16 x bf16 ->
// fp32 matrix product. Over a chunk of four panels, the sums of a batch row's terms are added in
// fp32, smallest terms first. Chunks are added in double. The order is always the same, so a row's
// result does not depend on the rows that it is stacked with.
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
constexpr int kPanelSteps = kPanelRows / kStepRows;
constexpr int kChunkPanels = 4;  // panels that one fp32 tile adds up
constexpr int kChunkSteps = kChunkPanels * kPanelSteps;
constexpr int kTileA = 6, kTileB = 7, kTileShortA = 5;
constexpr int kLanes = Simd::kLanes;

// ---- Instructions. Written out because GCC 12's intrinsics declare no memory operands. -------

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
constexpr std::uint32_t kTinyRow = (127 - 64) << 23;  // bits of 2^-64
constexpr float kTinyRowFactor = 0x1p96f;

constexpr std::uint32_t kLargestBf16 = 0x7f7f0000, kLargestFloat = 0x7f7fffff,
                        kInfinity = 0x7f800000;

inline __m512i truncate_to_bf16(__m512i bits) {
    return _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

inline __m512i magnitude_bits(__m512i bits) {
    return _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
}

// Round to nearest even; infinity beyond the largest bf16.
inline __m512i round_to_bf16(__m512i bits) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return truncate_to_bf16(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))));
}

// The bf16 terms of 16 finite floats, as float bits whose low halves count as zeros. Three are the
// float, exactly; of fewer the last is rounded, or truncated where `huge`.
template <int kTerms>
void split(__m512 x, __mmask16 huge, __m512i terms[kTerms]) {
    for (int t = 0; t < kTerms; ++t) {
        const __m512i bits = _mm512_castps_si512(x);
        if (t + 1 == kTerms) {
            terms[t] = kTerms == 3 ? bits : _mm512_mask_mov_epi32(round_to_bf16(bits), huge, bits);
        } else {
            terms[t] = truncate_to_bf16(bits);
            x = _mm512_sub_ps(x, _mm512_castsi512_ps(terms[t]));
        }
    }
}

// The same for all floats: rounding takes none that is finite to infinity; infinities and NaN are
// their own first term.
template <int kTerms>
void split_any(__m512 x, __m512i terms[kTerms]) {
    const __m512i bits = _mm512_castps_si512(x), magnitude = magnitude_bits(bits);
    const auto beyond = [&](std::uint32_t limit) {
        return _mm512_cmpgt_epu32_mask(magnitude, _mm512_set1_epi32(static_cast<int>(limit)));
    };
    const __mmask16 special = beyond(kLargestFloat);
    split<kTerms>(_mm512_mask_mov_ps(x, special, _mm512_setzero_ps()), beyond(kLargestBf16), terms);
    terms[0] = _mm512_mask_mov_epi32(terms[0], special, bits);
    terms[0] = _mm512_mask_mov_epi32(terms[0], beyond(kInfinity), _mm512_set1_epi32(0x7fc00000));
}

// Packs one chunk of one batch row, kTerms term rows of bf16. tile_row(t, step) says where the 32
// of term t and a step go. Returns what the sums must be multiplied by.
template <int kTerms, class TileRow>
double pack_row(const float* g, int steps, const TileRow& tile_row) {
    __m512i magnitudes = _mm512_setzero_si512();
    for (int i = 0; i < steps * kStepRows; i += kLanes) {
        magnitudes = _mm512_max_epu32(magnitudes, magnitude_bits(_mm512_loadu_si512(g + i)));
    }
    const std::uint32_t largest = _mm512_reduce_max_epu32(magnitudes);
    const float factor = largest < kTinyRow ? kTinyRowFactor : 1.0f;
    const bool any = largest > kLargestBf16;
    const __m512i odd_halves =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    for (int step = 0; step < steps; ++step) {
        __m512i terms[2][kTerms];
        for (int half = 0; half < 2; ++half) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(g + step * kStepRows + half * kLanes),
                                           _mm512_set1_ps(factor));
            any ? split_any<kTerms>(x, terms[half]) : split<kTerms>(x, 0, terms[half]);
        }
        for (int t = 0; t < kTerms; ++t) {
            _mm512_store_si512(tile_row(t, step),
                               _mm512_permutex2var_epi16(terms[0][t], odd_halves, terms[1][t]));
        }
    }
    return 1.0 / static_cast<double>(factor);
}

// ---- Gaussian entries -------------------------------------------------------------------------

// The 512 magnitudes for vpermb, which every processor with AMX has and Intel runs in one operation
// (vpermi2w in three): by byte, by code bits 1, 14 and 13, by code bits 12 to 7.
struct GaussBytes {
    alignas(64) std::uint8_t table[2][2][2][2][64];
};
constexpr GaussBytes kGaussBytes = [] {
    GaussBytes bytes{};
    for (int byte = 0; byte < 2; ++byte) {
        for (int i = 0; i < 512; ++i) {
            bytes.table[byte][i & 1][i >> 8][i >> 7 & 1][i >> 1 & 63] =
                static_cast<std::uint8_t>(kGaussTable[i] >> 8 * byte);
        }
    }
    return bytes;
}();

// Simd::gauss_bf16 of x and y.
inline void gauss_bf16_pair(__m512i& x, __m512i& y) {
    const __m512i odd_bytes = _mm512_set1_epi16(static_cast<short>(0xff00));
    const auto interleave = [&](__m512i odd, __m512i even) {           // bytes
        return _mm512_ternarylogic_epi32(odd_bytes, odd, even, 0xCA);  // a ? b : c
    };
    const __m512i index = interleave(_mm512_slli_epi16(x, 1), _mm512_srli_epi16(y, 7));
    const __mmask64 bit1 =
        _mm512_test_epi8_mask(interleave(_mm512_slli_epi16(x, 8), y), _mm512_set1_epi8(1 << 1));
    const __mmask64 bit13 = _mm512_test_epi8_mask(index, _mm512_set1_epi8(1 << 6));
    const __mmask64 bit14 = _mm512_movepi8_mask(index);
    const auto look_up = [&](const std::uint8_t (&table)[2][2][2][64]) {
        const auto at = [&](int i, int j, int k) {
            return _mm512_permutexvar_epi8(index, _mm512_load_si512(table[i][j][k]));
        };
        const auto of_bit1 = [&](int j, int k) {
            return _mm512_mask_mov_epi8(at(0, j, k), bit1, at(1, j, k));
        };
        return _mm512_mask_mov_epi8(_mm512_mask_mov_epi8(of_bit1(0, 0), bit13, of_bit1(0, 1)),
                                    bit14,
                                    _mm512_mask_mov_epi8(of_bit1(1, 0), bit13, of_bit1(1, 1)));
    };
    const __m512i low = look_up(kGaussBytes.table[0]), high = look_up(kGaussBytes.table[1]);
    const __m512i sign = _mm512_set1_epi16(INT16_MIN);
    const auto or_sign = [&](__m512i code, __m512i magnitude) {
        return _mm512_ternarylogic_epi32(code, sign, magnitude, 0xEA);  // (a & b) | c
    };
    x = or_sign(x, interleave(high, _mm512_srli_epi16(low, 8)));
    y = or_sign(y, interleave(_mm512_slli_epi16(high, 8), low));
}

// ---- Tiles of R -------------------------------------------------------------------------------

// The panels and vectors of columns that one block of term rows goes through: all panels of a
// chunk for kStrips vectors, then for the next ones.
struct Range {
    std::int64_t panel_begin;
    int panels;
    int vectors;
};

// Makes the tiles of R in the order of a Range, kStrips tiles of 32 rows a step.
template <Kind kKind, int kStrips>
class TileMaker {
  public:
    TileMaker(ColumnWords& words, const Range& range) : words_(words), range_(range) {
        if constexpr (kKind == Kind::kRademacher) {
            words_.set_block(range_.panel_begin);
            for (int i = 0; i < kFetches; ++i) fetch(i);
        }
    }

    // Part kPart of kParts of the next step's. After the last step it begins again. In small parts
    // the work goes beside the products: what comes in one piece waits until they are through.
    template <int kPart, int kParts>
    void make(char* tiles) {
        if constexpr (kPart == 0) begin_step();
        if constexpr (kKind == Kind::kRademacher) {
            make_rademacher<kPart, kParts>(tiles);
        } else {
            make_gaussian<kPart, kParts>(tiles);
        }
        if constexpr (kPart + 1 == kParts) end_step();
    }

  private:
    static constexpr int kFetches = 4 * kStrips;  // a lane of a vector each
    static constexpr int kFetchEvery = kPanelSteps / kFetches;
    using Words = Simd::U[kStrips][4][4];

    // Rademacher: panel_ and vector_ are one panel ahead. A step makes tiles of the words at hand
    // and fetches some of the panel to come, so that the work is even.
    void begin_step() {
        if constexpr (kKind == Kind::kRademacher) {
            if (step_ > 0) return;
            fetched_ ^= 1;
            next_panel();
            words_.set_block(range_.panel_begin + panel_);
        } else {
            words_.set_block((range_.panel_begin + panel_) * kPanelSteps + step_);
        }
    }

    void end_step() {
        step_ = (step_ + 1) % kPanelSteps;
        if (kKind == Kind::kGaussian && step_ == 0) next_panel();
    }

    void next_panel() {
        if (++panel_ < range_.panels) return;
        panel_ = 0;
        vector_ = vector_ + kStrips < range_.vectors ? vector_ + kStrips : 0;
    }

    template <int kPart, int kParts>
    void make_rademacher(char* tiles) {
        const Words& words = words_of_[fetched_ ^ 1];
        const int j = step_ / 4, first_bit = step_ % 4 * 4;
        const __m512i sign_bits = _mm512_set1_epi32(static_cast<int>(0x80008000u));
        const __m512i ones = _mm512_set1_epi32(0x3f803f80);
        constexpr int kCells = kTileRows * kStrips;
#pragma GCC unroll 64
        for (int i = kCells * kPart / kParts; i < kCells * (kPart + 1) / kParts; ++i) {
            const int bit = i / (4 * kStrips), strip = i / 4 % kStrips, lane = i % 4;
            // A shift by a vector is one micro-operation on Intel, by a register's low word two.
            const __m512i count = _mm512_set1_epi32(15 - first_bit - bit);
            const __m512i moved = _mm512_sllv_epi32((__m512i)words[strip][lane][j], count);
            store_cells((Simd::U)_mm512_ternarylogic_epi32(moved, sign_bits, ones,
                                                           0x6A),  // (a & b) ^ c
                        tiles, strip, 4 * bit + lane);
        }
        if constexpr (kPart == kParts / 2) {
            if (step_ % kFetchEvery == kFetchEvery / 2) fetch(step_ / kFetchEvery);
        }
    }

    template <int kPart, int kParts>
    void make_gaussian(char* tiles) {
        constexpr int kPairs = kTileRows / 2 * kStrips;
#pragma GCC unroll 32
        for (int i = kPairs * kPart / kParts; i < kPairs * (kPart + 1) / kParts; ++i) {
            const int strip = i / (kTileRows / 2), row = i % (kTileRows / 2) * 2;
            Simd::U(&w)[4][4] = words_of_[0][strip];
            if (row == 0) words_.get_all(vector_ + strip, w);
            auto x = (__m512i)w[row % 4][row / 4], y = (__m512i)w[row % 4 + 1][row / 4];
            gauss_bf16_pair(x, y);
            store_cells((Simd::U)x, tiles, strip, row);
            store_cells((Simd::U)y, tiles, strip, row + 1);
        }
    }

    static void store_cells(Simd::U cells, char* tiles, int strip, int row) {
        _mm512_store_si512(tiles + strip * kTileBytes + row * 64, (__m512i)cells);
    }
    void fetch(int i) {
        const int strip = i / 4, lane = i % 4;
        words_.get<1>(static_cast<std::uint32_t>(lane), vector_ + strip,
                      &words_of_[fetched_][strip][lane]);
    }

    ColumnWords& words_;
    const Range range_;
    int panel_ = 0, vector_ = 0, step_ = 0;
    int fetched_ = 0;  // which words_of_ is being filled
    Words words_of_[2];
};

// ---- The product ------------------------------------------------------------------------------

template <int... kIndices, class F>
inline void unroll(std::integer_sequence<int, kIndices...>, F&& f) {
    (f(std::integral_constant<int, kIndices>{}), ...);
}

// Term tiles that share one generated tile of R. A multiple of three, so that the three terms of a
// batch row are in one block.
constexpr int kMaxBlockTiles = 6;

// Vectors of columns that share a load of term tiles: as many as there are registers for.
constexpr int strips_for(int block_tiles) {
    return block_tiles == 1 ? 4 : block_tiles <= 3 ? 2 : 1;
}

struct Block {
    const std::uint16_t* term_tiles;  // [step][tile][16 rows][32 bf16]
    int rows;                         // term rows; the last tile may have fewer than 16
    int terms;                        // term rows of one batch row
    const double* unscale;            // [rows / terms]
    double* acc;                      // [rows / terms, acc_ld]
    std::int64_t acc_ld;
};

// acc += the sums of all terms for kStrips vectors of columns; sums is [tile][strip][16][16].
template <int kStrips>
void add_up(const Block& block, const float* sums, int first_vector) {
    for (int b = 0; b < block.rows / block.terms; ++b) {
        double* acc = block.acc + b * block.acc_ld + first_vector * kLanes;
        const __m512d unscale = _mm512_set1_pd(block.unscale[b]);
        for (int strip = 0; strip < kStrips; ++strip) {
            const auto term = [&](int t) {
                const int row = b * block.terms + t;
                return _mm512_load_ps(
                    sums +
                    ((row / kTileRows * kStrips + strip) * kTileRows + row % kTileRows) * kLanes);
            };
            __m512 sum = term(block.terms - 1);
            for (int t = block.terms - 2; t >= 0; --t) sum = _mm512_add_ps(term(t), sum);
            for (int half = 0; half < 2; ++half) {
                double* to = acc + strip * kLanes + half * 8;
                const __m256 part =
                    half == 0 ? _mm512_castps512_ps256(sum) : _mm512_extractf32x8_ps(sum, 1);
                _mm512_storeu_pd(
                    to, _mm512_fmadd_pd(_mm512_cvtps_pd(part), unscale, _mm512_loadu_pd(to)));
            }
        }
    }
}

// acc += term rows x R. With kShort the last term tile has a register of its own, of fewer rows.
template <Kind kKind, int kTiles, int kStrips, bool kShort>
void multiply_chunk(const Block& block, ColumnWords& words, const Range& range) {
    static_assert(kTiles * kStrips <= (kShort ? kTileShortA : kTileA));
    constexpr auto tiles = std::make_integer_sequence<int, kTiles>();
    constexpr auto strips = std::make_integer_sequence<int, kStrips>();
    // Tiles of R are made three steps before their products: a tile load can't take its rows from
    // stores that have not reached the cache.
    constexpr int kAhead = 3, kRing = 4;
    alignas(64) char made[kRing][kStrips * kTileBytes];
    alignas(64) float sums[kTiles * kStrips * kTileRows * kLanes];
    TileMaker<kKind, kStrips> maker(words, range);
    for (int step = 0; step < kAhead; ++step) maker.template make<0, 1>(made[step]);
    const int steps = range.panels * kPanelSteps;
    for (int v = 0; v < range.vectors; v += kStrips) {
        unroll(tiles,
               [&](auto m) { unroll(strips, [&](auto s) { zero_tile<m * kStrips + s>(); }); });
        const std::uint16_t* a = block.term_tiles;
        for (int step = 0; step < steps; ++step) {
            const char* ready = made[step % kRing];
            char* next = made[(step + kAhead) % kRing];
            unroll(strips, [&](auto s) {
                load_tile<kTileB>(ready + s * kTileBytes);
                unroll(tiles, [&](auto m) {
                    constexpr int kA = kShort && m + 1 == kTiles ? kTileShortA : kTileA;
                    load_tile<kA>(a + m * (kTileBytes / 2));
                    multiply_tiles<m * kStrips + s, kA, kTileB>();
                    maker.template make<s * kTiles + m, kStrips * kTiles>(next);
                });
            });
            a += kTiles * (kTileBytes / 2);
        }
        unroll(tiles, [&](auto m) {
            unroll(strips, [&](auto s) {
                store_tile<m * kStrips + s>(sums + (m * kStrips + s) * kTileRows * kLanes);
            });
        });
        add_up<kStrips>(block, sums, v);
    }
}

template <Kind kKind, int kTiles>
void multiply_block(const Block& block, ColumnWords& words, const Range& range) {
    constexpr int kStrips = strips_for(kTiles);
    if constexpr (kTiles * kStrips <= kTileShortA) {
        if (block.rows < kTiles * kTileRows) {
            multiply_chunk<kKind, kTiles, kStrips, true>(block, words, range);
            return;
        }
    }
    multiply_chunk<kKind, kTiles, kStrips, false>(block, words, range);
}

using MultiplyBlock = void (*)(const Block&, ColumnWords&, const Range&);

template <Kind kKind, int... kIndices>
MultiplyBlock multiply_block_for(int tiles, std::integer_sequence<int, kIndices...>) {
    static constexpr MultiplyBlock table[] = {multiply_block<kKind, kIndices + 1>...};
    return table[tiles - 1];
}

TileConfig config_for(int block_tiles, int rows) {
    TileConfig config;
    const int strips = strips_for(block_tiles);
    const bool has_short = block_tiles * strips <= kTileShortA && rows < block_tiles * kTileRows;
    const int last_rows = rows - (block_tiles - 1) * kTileRows;
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes_per_row[tile] = 64;
        const bool last = tile / strips == block_tiles - 1 || tile == kTileShortA;
        config.rows[tile] =
            static_cast<std::uint8_t>(has_short && last && tile < kTileA ? last_rows : kTileRows);
    }
    return config;
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <Kind kKind, int kTerms>
void project_tiles(const ProjectTile& tile) {
    Arena arena(tile.scratch);
    const int cols = pad_columns(tile.cols);
    ColumnWords words(tile.key, tile.col_begin, cols, arena.take<char>(ColumnWords::bytes(cols)));
    const int term_rows = tile.batch * kTerms;
    const int term_tiles = ceil_div(term_rows, kTileRows);
    // Blocks of about the same size. With three terms, full ones: so no batch row's terms are torn
    // apart.
    const int block_tiles =
        kTerms == 3 ? kMaxBlockTiles : ceil_div(term_tiles, ceil_div(term_tiles, kMaxBlockTiles));
    const std::size_t packed = static_cast<std::size_t>(term_tiles) * kChunkSteps * kTileBytes / 2;
    auto* a = arena.take<std::uint16_t>(packed);
    float* g = arena.take<float>(kChunkPanels * kPanelRows);
    double* unscale = arena.take<double>(static_cast<std::size_t>(tile.batch));
    if (term_rows % kTileRows != 0) std::memset(a, 0, packed * sizeof *a);
    // [block][step][tile of the block][16 rows][32 bf16]: a block reads its tiles in order.
    const auto tile_row = [=](int term_row, int step) {
        const int t = term_row / kTileRows, first = t / block_tiles * block_tiles;
        const int here = term_tiles - first < block_tiles ? term_tiles - first : block_tiles;
        return a + ((first * kChunkSteps + step * here + t - first) * kTileRows +
                    term_row % kTileRows) *
                       kStepRows;
    };

    for (std::int64_t panel = tile.panel_begin; panel < tile.panel_end; panel += kChunkPanels) {
        const std::int64_t left = tile.panel_end - panel;
        const Range range{panel, static_cast<int>(left < kChunkPanels ? left : kChunkPanels),
                          cols / kLanes};
        for (int b = 0; b < tile.batch; ++b) {
            for (int i = 0; i < range.panels; ++i) {
                load_panel(*tile.source, tile.batch_begin + b, panel + i, g + i * kPanelRows);
            }
            unscale[b] = pack_row<kTerms>(g, range.panels * kPanelSteps, [=](int t, int step) {
                return tile_row(b * kTerms + t, step);
            });
        }
        for (int first = 0; first < term_tiles; first += block_tiles) {
            const int here = term_tiles - first < block_tiles ? term_tiles - first : block_tiles;
            const int first_row = first * kTileRows;
            const int rows =
                term_rows - first_row < here * kTileRows ? term_rows - first_row : here * kTileRows;
            const int b = first_row / kTerms;
            const Block block{tile_row(first_row, 0),     rows,       kTerms, unscale + b,
                              tile.acc + b * tile.acc_ld, tile.acc_ld};
            load_config(config_for(here, rows));
            multiply_block_for<kKind>(here, std::make_integer_sequence<int, kMaxBlockTiles>())(
                block, words, range);
        }
    }
    release_tiles();
}

// With three terms of fp32, sums of signs from tables (AVX-512) are as fast as tile products at 32
// samples and three times as fast at one.
template <Kind kKind>
void project_amx(const ProjectTile& tile) {
    const Dtype dtype = tile.source->pieces[0].dtype;
    if (dtype == Dtype::kBf16) {
        project_tiles<kKind, 1>(tile);  // exact
    } else if (dtype == Dtype::kF16) {
        project_tiles<kKind, 2>(tile);  // exact: 16 bits hold the 11 of float16
    } else if (tile.terms == 1) {
        project_tiles<kKind, 1>(tile);
    } else if (tile.terms == 2) {
        project_tiles<kKind, 2>(tile);
    } else if constexpr (kKind == Kind::kRademacher) {
        kernels_avx512().rademacher_f32(tile);
    } else {
        project_tiles<kKind, 3>(tile);
    }
}

std::size_t amx_scratch_bytes(int batch, int cols) {
    const auto term_tiles = static_cast<std::size_t>(ceil_div(3 * batch, kTileRows));
    const std::size_t amx = ColumnWords::bytes(pad_columns(cols)) +
                            term_tiles * kChunkSteps * kTileBytes +
                            kChunkPanels * kPanelRows * sizeof(float) +
                            static_cast<std::size_t>(batch) * sizeof(double) + 4 * 64;
    const std::size_t others = kernels_avx512().project_scratch_bytes(batch, cols);
    return amx > others ? amx : others;
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
