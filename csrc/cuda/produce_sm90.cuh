// The producer warpgroup of the sm_90a projection: fills the ring of tiles that the consumers read.
//
// The copy engine copies 16-bit G with aligned rows straight into tiles (copy_tiles90). All other G
// goes through a second ring, of elements as they are, and threads convert it into tiles
// (convert90). The copy engine fills that ring where G is fp32 with aligned rows. Elsewhere
// asynchronous copies of one element each fill it, for any alignment and strides.
//
// Data in flight are thus on their way to shared memory, several stages ahead, and no register
// waits for them. Loads into registers would share a scoreboard: a wait for one is a wait for all,
// those of later stages included.
#pragma once

#include "config_sm90.cuh"

namespace fastproj::cuda {

#if FASTPROJ_SM90A

// The stages of all items of a block, one after another.
template <class C>
struct Stages {
    const ProjectParams& p;
    int index, step;              // the item, from one of this block to the next
    int b = 0, row = 0, end = 0;  // the item's first sample, the stage's first row, the item's end

    FASTPROJ_DEVICE Stages(const ProjectParams& params, int first, int stride)
        : p(params), index(first), step(stride) {
        enter();
    }
    FASTPROJ_DEVICE bool more() const { return index < p.items; }
    FASTPROJ_DEVICE void enter() {
        if (!more()) return;
        const WorkItem item = WorkItem::at(p, index);
        b = item.batch_tile * C::kBlockB;
        row = item.first * kPanelRows - p.row_shift;
        end = item.last * kPanelRows - p.row_shift;
    }
    FASTPROJ_DEVICE void advance() {
        row += C::kStageRows;
        if (row < end) return;
        index += step;
        enter();
    }
};

// One thread sends a stage on its way, `row_bytes` for 64 rows of a sample; in a cluster its half
// of it, to both blocks.
template <class C>
FASTPROJ_DEVICE void copy_stage(const TensorMap& map, const ProjectParams& p, std::uint32_t to,
                                int row_bytes, std::uint32_t barrier, const Stages<C>& at) {
    const bool pair = p.cluster == 2;
    const int first = pair ? static_cast<int>(cluster_rank()) * (C::kBlockB / 2) : 0;
    barrier_arrive_expect(barrier, C::kSubtiles * C::kBlockB * row_bytes);
    for (int sub = 0; sub < C::kSubtiles; ++sub) {
        const std::uint32_t place = to + (sub * C::kBlockB + first) * row_bytes;
        if (pair) {
            copy_box_multicast(place, &map, at.row + sub * 64, at.b + first, barrier, 3);
        } else {
            copy_box(place, &map, at.row + sub * 64, at.b, barrier);
        }
    }
}

template <class C>
FASTPROJ_DEVICE void copy_tiles90(const TensorMap& map, const ProjectParams& p, std::uint32_t tiles,
                                  std::uint32_t full, std::uint32_t empty, Stages<C> at) {
    Ring<C::kStages> ring;
    for (; at.more(); at.advance()) {
        barrier_wait(empty + ring.place * 8, ring.parity ^ 1);
        copy_stage<C>(map, p, tiles + ring.place * C::kStageBytes, 128, full + ring.place * 8, at);
        ring.advance();
    }
}

// Whether a kernel that multiplies in kTerms terms of Op gets fp32.
template <class C>
FASTPROJ_DEVICE bool is_wide(const ProjectParams& p) {
    if constexpr (!C::Op::kIsBf16) return false;
    return C::kTerms > 1 || p.input == static_cast<std::int32_t>(Dtype::kF32);
}

// Each lane copies one element at a time, 32 neighbours by a warp, into a word of its own: fp32, or
// the aligned word that holds the 16-bit element. Rows outside the piece and samples outside the
// batch become zeros. A warp copies the samples that it converts: of 16 those of chunk_sample(4 *
// warp + 0 .. 3), taken in their order. kEnd: the tensor may end in the middle of a word, whose
// second half must not be read.
template <class C, bool kEnd>
FASTPROJ_DEVICE void copy_elements(const ProjectParams& p, std::uint32_t to, int b, int row) {
    const int lane = threadIdx.x & 31, first = chunk_sample(threadIdx.x >> 5 << 2);
    const int bytes = is_wide<C>(p) ? 4 : 2;
    const std::int64_t step_b = p.grads_stride_b * bytes, step_p = p.grads_stride_p * bytes;
    const auto base = reinterpret_cast<std::uintptr_t>(p.grads);
    const std::uintptr_t last =
        base + static_cast<std::uintptr_t>((p.batch - 1) * step_b + (p.rows - 1) * step_p);
    to += (first * 64 + lane) * 4;
#pragma unroll
    for (int sub = 0; sub < C::kSubtiles; ++sub) {
        const int i = row + sub * 64 + lane;
        const auto rows = static_cast<std::uint32_t>(p.rows);
        const bool inside[2] = {static_cast<std::uint32_t>(i) < rows,
                                static_cast<std::uint32_t>(i + 32) < rows};
        std::uintptr_t from = base + static_cast<std::uintptr_t>((b + first) * step_b + i * step_p);
#pragma unroll 1  // unrolled, its addresses would spill
        for (int n = 0; n < C::kBlockB; n += 16) {
            // nvcc 13.5 would keep an address for each copy of the loop, and spill them.
            from = opaque_address(from);
#pragma unroll
            for (int s = 0; s < 4; ++s) {  // samples 0, 1, 4 and 5 further on
                const int sample = n + (s & 1) + (s >> 1) * 4;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const std::uintptr_t at =
                        from + static_cast<std::uintptr_t>(half * 32 * step_p);
                    const bool valid = inside[half] && b + first + sample < p.batch;
                    // As copy_element, which would compare addresses where no tensor ends.
                    const bool cut = kEnd && at == last && (at & 2) == 0;
                    copy_async_4(to + ((sub * C::kBlockB + sample) * 64 + half * 32) * 4,
                                 reinterpret_cast<const void*>(at & ~std::uintptr_t{3}),
                                 !valid ? 0
                                 : cut  ? 2
                                        : 4);
                }
                from += static_cast<std::uintptr_t>(step_b * (s == 3 ? 11 : s == 1 ? 3 : 1));
            }
        }
    }
}
template <class C>
FASTPROJ_DEVICE void copy_elements(const ProjectParams& p, std::uint32_t to, const Stages<C>& at) {
    const bool at_end = at.row + C::kStageRows >= p.rows || p.grads_stride_p == 0;
    if (!is_wide<C>(p) && at_end) {
        copy_elements<C, true>(p, to, at.b, at.row);
    } else {
        copy_elements<C, false>(p, to, at.b, at.row);
    }
}

template <class C, bool kBoxes>
FASTPROJ_DEVICE void convert90(const TensorMap& map, const ProjectParams& p, std::uint32_t tiles,
                               std::uint32_t full, std::uint32_t empty, Stages<C> next) {
    constexpr int kBatch = kLeast < C::kChunks, kBoxes ? 4 : 2 > ;  // chunks in registers at once
    const int thread = threadIdx.x, lane = thread & 31;
    const int c = thread & 7, first_sample = chunk_sample(thread >> 3);
    const std::uint32_t raw = tiles + C::kStages * C::kStageBytes;
    const std::uint32_t raw_full = empty + C::kStages * 8;
    const std::uint32_t raw_empty = raw_full + C::kRawStages * 8;
    const std::uint32_t remote_raw_empty = remote_address(raw_empty, lane & (p.cluster - 1));
    // Which halves of two words make a pair of 16-bit elements: where they are odd, the upper ones.
    // The same for all chunks of a thread: their samples and rows differ by even numbers.
    std::uint32_t halves = 0x5410;
    if (!kBoxes && !is_wide<C>(p)) {
        const std::uint32_t step = static_cast<std::uint32_t>(p.grads_stride_p);
        halves = element_halves(
            p.grads,
            first_sample * static_cast<std::uint32_t>(p.grads_stride_b) - p.row_shift * step, step);
    }

    Ring<C::kRawStages> filled, read;
    Ring<C::kStages> ring;
    int pending = 0;     // stages on their way
    auto fill = [&]() {  // sends the next one, kRawStages - 1 before it is read
        const std::uint32_t to = raw + filled.place * C::kRawBytes;
        if (next.more()) {
            if constexpr (!kBoxes) {
                copy_elements<C>(p, to, next);
            } else if (thread == 0) {
                barrier_wait(raw_empty + filled.place * 8, filled.parity ^ 1);
                copy_stage<C>(map, p, to, 256, raw_full + filled.place * 8, next);
            }
            next.advance();
            ++pending;
        }
        if constexpr (!kBoxes) copy_async_commit();
        filled.advance();
    };
#pragma unroll 1
    for (int s = 0; s < C::kRawStages - 1; ++s) fill();
#pragma unroll 1
    for (;;) {
        fill();
        if (pending == 0) break;
        --pending;
        if constexpr (kBoxes) {
            barrier_wait(raw_full + read.place * 8, read.parity);
        } else {
            copy_async_wait<C::kRawStages - 1>();
            __syncwarp();  // a warp reads what its lanes copied
        }
        const std::uint32_t from = raw + read.place * C::kRawBytes;
        const std::uint32_t to = tiles + ring.place * C::kStageBytes;
#pragma unroll
        for (int first = 0; first < C::kChunks; first += kBatch) {
            std::uint32_t x[kBatch][8];
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                const int j = first + k;
                load_shared_32<128>(from + (j * 16 + first_sample) * 256 + c * 16, x[k]);
            }
            if (first + kBatch == C::kChunks) {
                __syncwarp();
                if constexpr (kBoxes) {
                    barrier_arrive_remote(remote_raw_empty + read.place * 8, lane < p.cluster);
                }
            }
            if (first == 0) barrier_wait(empty + ring.place * 8, ring.parity ^ 1);
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                const int j = first + k;
                store_chunk<typename C::Op, C::kTerms>(
                    p, to + j * 16 / C::kBlockB * C::kTileBytes, C::kTermBytes,
                    j * 16 % C::kBlockB + first_sample, c, x[k], halves);
            }
        }
        // These threads have no loads in flight that the fence would wait for.
        fence_proxy_async();
        barrier_arrive(full + ring.place * 8);
        read.advance();
        ring.advance();
    }
}

template <class C>
FASTPROJ_DEVICE void produce90(const TensorMap& map, const ProjectParams& p, std::uint32_t tiles,
                               std::uint32_t full, std::uint32_t empty, const Stages<C>& stages) {
    const bool boxes = p.loader == static_cast<std::int32_t>(Loader::kTma);
    if (boxes && threadIdx.x == 0) prefetch_tensor_map(&map);  // the producer is warpgroup 0
    if (boxes && p.input != static_cast<std::int32_t>(Dtype::kF32)) {
        // project90 brings the warp together again.
        if (threadIdx.x == 0) copy_tiles90<C>(map, p, tiles, full, empty, stages);
    } else if (boxes) {
        if constexpr (C::Op::kIsBf16) convert90<C, true>(map, p, tiles, full, empty, stages);
    } else {
        convert90<C, false>(map, p, tiles, full, empty, stages);
    }
}

#endif  // FASTPROJ_SM90A

}  // namespace fastproj::cuda
