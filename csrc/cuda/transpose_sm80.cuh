// The adjoint with mma.sync: out[b, p] = scale * sum over k of y[b, k] R[p, k].
//
// Here k is summed over, so R itself is operand A. Its fragments are made as in the projection, 8
// rows x 8 columns to a register of the warp, then turned by movmatrix. A block of 8 warps makes
// 512 rows, 64 a warp, for BLOCK_B samples, 64 columns at a time.
#pragma once

#include "fragments.cuh"

namespace fastproj::cuda {

constexpr int kThreadsTranspose = 256;

template <Kind kKind, int kTermCount>
struct ConfigTranspose {
    static constexpr int kTerms = kTermCount;
    static constexpr int kBlockB = 32;
    static constexpr int kTermBytes = kBlockB * 128;  // y [samples, 64 columns]
    static constexpr int kTileBytes = kTermBytes * kTerms;
    static constexpr int kWordBytes = kKind == Kind::kRademacher ? 4 * 64 * 4 * 4 : 0;
    static constexpr int kTable = kKind == Kind::kGaussian ? kTableSpace : 0;
    static constexpr int kRawBytes = kBlockB * 64 * 4;  // y as it is, 32 bits an element
    static constexpr int kSharedBytes = kTable + 2 * (kTileBytes + kWordBytes) + kRawBytes;
    static_assert(kSharedBytes <= 99 * 1024, "more shared memory than a block of sm_86 can have");
    static constexpr int kFoldSteps = kTerms == 3 ? 1 : 8;  // of 64 columns
};

template <Kind kKind, int kTermCount>
FASTPROJ_DEVICE void transpose80(const TransposeParams& p) {
    using C = ConfigTranspose<kKind, kTermCount>;
    constexpr int kPairs = C::kBlockB / 16;
    const int thread = threadIdx.x;
    const int lane = thread & 31;
    const int warp = thread >> 5;
    const std::uint32_t base = shared_base();
    const std::uint32_t table = table_address(base);
    const std::uint32_t tiles = base + C::kTable;
    const std::uint32_t word_base = tiles + 2 * C::kTileBytes;
    const std::uint32_t raw = word_base + 2 * C::kWordBytes + thread * 16;  // this thread's 8
    constexpr int kHalf = kThreadsTranspose * 16;
    if constexpr (kKind == Kind::kGaussian) fill_table<Bf16>(table, thread, kThreadsTranspose);
    const bool wide = p.input == static_cast<std::int32_t>(Dtype::kF32);
    const std::int64_t step_b = p.y_stride_b * (wide ? 4 : 2),
                       step_k = p.y_stride_k * (wide ? 4 : 2);
    auto place = [&](int b, int k) {
        return reinterpret_cast<std::uintptr_t>(p.y) +
               static_cast<std::uintptr_t>(b * step_b + k * step_k);
    };
    const std::uintptr_t last = wide ? 0 : place(p.batch - 1, p.cols - 1);
    const std::uint32_t lane_row = ((lane >> 4) * 8 + (lane & 7)) * 128;
    const std::uint32_t lane_piece = (((lane >> 3) & 1) ^ (lane & 7)) << 4;

    const std::int64_t items = p.panels * p.batch_tiles;
    for (std::int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const int first_sample = static_cast<int>(index % p.batch_tiles) * C::kBlockB;
        const std::int64_t panel = p.first_panel + index / p.batch_tiles;
        const std::int64_t block = kKind == Kind::kRademacher ? panel : panel * 16;
        GeneratorKey key;
        key.key0 = static_cast<std::uint32_t>(p.seed);
        key.key1 = static_cast<std::uint32_t>(p.seed >> 32);
        key.counter2 = counter2(kKind, block, lane & 3);
        key.stream = p.stream;
        key.sign_mask = p.sign_mask;
        key.table = table | lane * 4;
        float acc[4][2 * kPairs][4], sum[4][2 * kPairs][4];
        clear_sums(acc);
        clear_sums(sum);

        __syncthreads();  // the last item's readers are done; the table is written
        const int steps = (p.cols + 63) / 64;
        const int n = thread >> 3, c = thread & 7;
        auto fill = [&](int step) {
            const int b = first_sample + n;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int k = step * 64 + c * 8 + e;
                copy_element(raw + (e >> 2) * kHalf + (e & 3) * 4, place(b, k),
                             b < p.batch && k < p.cols, last);
            }
            copy_async_commit();
        };
        fill(0);
        for (int step = 0; step < steps; ++step) {
            // Each thread brings 8 elements of y, on their way since the last step, and, for
            // Rademacher, the words of one (column, lane).
            const int buffer = step & 1;
            const std::uint32_t tile = tiles + buffer * C::kTileBytes;
            const std::uint32_t words_at = word_base + buffer * C::kWordBytes;
            {
                std::uint32_t x[8], out[C::kTerms][4];
                copy_async_wait<0>();
                load_shared_32<kHalf>(raw, x);
                if (!wide) {
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        const std::uint32_t odd = place(first_sample + n, c * 8 + e) >> 1 & 1;
                        const std::uint32_t bits = x[e] >> (16 * odd) & 0xffffu;
                        x[e] = p.input == static_cast<std::int32_t>(Dtype::kBf16)
                                   ? bits << 16
                                   : float_bits(half_to_float(bits));
                    }
                }
                split_floats<C::kTerms>(x, out);
                const std::uint32_t to = tile + n * 128 + ((c ^ (n & 7)) << 4);
#pragma unroll
                for (int t = 0; t < C::kTerms; ++t) {
                    store_shared(to + t * C::kTermBytes, out[t][0], out[t][1], out[t][2],
                                 out[t][3]);
                }
            }
            if constexpr (kKind == Kind::kRademacher) {
                const Words words = column_words(key, counter0(panel), step * 64 + (thread >> 2));
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    store_shared(words_at + j * 1024 + thread * 4, words.w[j]);
                }
            }
            __syncthreads();
            if (step + 1 < steps) fill(step + 1);

#pragma unroll
            for (int k = 0; k < 4; ++k) {  // 16 columns
                std::uint32_t a[4][4];     // four 16-row tiles
#pragma unroll
                for (int h = 0; h < 2; ++h) {  // 8 columns
                    const int local = k * 16 + h * 8 + (lane >> 2);
                    if constexpr (kKind == Kind::kRademacher) {
                        // Rows 64 * warp ...: half of word warp / 2.
                        const std::uint32_t word = load_shared(words_at + (warp >> 1) * 1024 +
                                                               (local * 4 + (lane & 3)) * 4) >>
                                                   (8 * (warp & 1));
#pragma unroll
                        for (int g = 0; g < 8; ++g) {
                            a[g >> 1][2 * h + (g & 1)] =
                                transpose_8x8(rademacher_pair<Bf16>(word, g, key.sign_mask));
                        }
                    } else {
#pragma unroll
                        for (int q = 0; q < 2; ++q) {
                            // Opaque: a lookup must not move before the barrier.
                            const Words words = column_words(key, counter0(block) + warp * 2 + q,
                                                             opaque(step * 64 + local));
#pragma unroll
                            for (int j = 0; j < 4; ++j) {
                                a[2 * q + (j >> 1)][2 * h + (j & 1)] = transpose_8x8(
                                    gaussian_pair(words.w[j], key.table, key.sign_mask));
                            }
                        }
                    }
                }
#pragma unroll
                for (int t = C::kTerms - 1; t >= 0; --t) {
                    const std::uint32_t from =
                        tile + t * C::kTermBytes + lane_row + (lane_piece ^ (k << 5));
#pragma unroll
                    for (int n = 0; n < kPairs; ++n) {
                        std::uint32_t y[4];
                        load_matrix_x4(y, from + n * 16 * 128);
#pragma unroll
                        for (int m = 0; m < 4; ++m) {
                            mma_m16n8k16<Bf16>(acc[m][2 * n], a[m], y[0], y[1]);
                            mma_m16n8k16<Bf16>(acc[m][2 * n + 1], a[m], y[2], y[3]);
                        }
                    }
                }
            }
            if ((step + 1) % C::kFoldSteps == 0) fold_sums(sum, acc);
        }
        fold_sums(sum, acc);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
            for (int n = 0; n < 2 * kPairs; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {  // D: rows of R down, samples across
                    const std::int64_t row = panel * kPanelRows + warp * 64 + m * 16 + (lane >> 2) +
                                             8 * (i >> 1) - p.row_offset;
                    const int b = first_sample + n * 8 + 2 * (lane & 3) + (i & 1);
                    if (row < 0 || row >= p.rows || b >= p.batch) continue;
                    write_global(
                        static_cast<float*>(p.out) + b * p.out_stride_b + row * p.out_stride_p,
                        static_cast<float>(p.scale) * sum[m][n][i]);
                }
            }
        }
    }
}

template <Kind kKind, int kTerms>
FASTPROJ_KERNEL(kThreadsTranspose)
transpose_sm80_kernel(FASTPROJ_GRID_CONSTANT TransposeParams p) {
    transpose80<kKind, kTerms>(p);
}

}  // namespace fastproj::cuda
