// Tiles, rings and registers of the sm_90a projection.
#pragma once

#include "fragments.cuh"

namespace fastproj::cuda {

constexpr int kThreads90 = 384;
template <int kA, int kB>
constexpr int kLeast = kA < kB ? kA : kB;

// Rademacher: a whole panel is unrolled, which gives constant shifts and descriptor offsets. The
// Gaussian body is too long for that.
template <Kind kKind, class OpType, int kTermCount, int BLOCK_B, int kTileCount>
struct Config90 {
    using Op = OpType;
    static constexpr Kind kind = kKind;
    static constexpr int kTerms = kTermCount;
    static constexpr int kBlockB = BLOCK_B;
    static constexpr int kTiles = kTileCount;         // 64-column tiles of one consumer
    static constexpr int kColumns = 2 * 64 * kTiles;  // of the block
    // 64-row tiles in a stage.
    static constexpr int kSubtiles = BLOCK_B >= 64 ? 1 : kTerms > 1 ? 2 : 64 / BLOCK_B;
    static constexpr int kStageRows = 64 * kSubtiles;
    static constexpr int kPanelStages = kPanelRows / kStageRows;
    static constexpr int kTileBytes = BLOCK_B * 128;
    static constexpr int kTermBytes = kTileBytes * kSubtiles;
    static constexpr int kStageBytes = kTermBytes * kTerms;
    // Where it is unrolled, the ring holds whole panels, so a stage's place in the panel fixes its
    // address. Elsewhere the ring counts stages.
    static constexpr bool kUnroll = kKind == Kind::kRademacher;
    static constexpr int kPanelBytes = kStageBytes * kPanelStages;
    static constexpr int kPanels =  // in the ring
        kTerms > 1 || kPanelBytes > 48 * 1024 ? 1 : 96 * 1024 / kPanelBytes;
    static constexpr int kStages = kUnroll ? kPanels * kPanelStages : kTerms == 3 ? 5 : 6;
    // One tile alternates between two sets of fragments: registers that a product in flight reads
    // must not be written, and in a rolled loop both sets would be the same registers.
    static constexpr int kUnrollStages = kUnroll       ? kPanelStages
                                         : kTerms == 3 ? 4
                                         : kTiles == 1 ? 2
                                                       : 1;
    static constexpr int kTable = kKind == Kind::kGaussian ? kTableSpace : 0;
    // A second ring, of G as it is, where G is not copied straight into tiles. Each element has 32
    // bits, so 64 rows of a sample have 256 bytes. It is as deep as there is room, up to 6 stages.
    static constexpr int kRawBytes = BLOCK_B * kStageRows * 4;
    static constexpr int kRoom = 227 * 1024 - kTable - kStages * (kStageBytes + 2 * 8);
    static constexpr int kRawStages = kLeast<6, kRoom / (kRawBytes + 2 * 8)>;
    static constexpr int kSharedBytes =
        kTable + kStages * (kStageBytes + 2 * 8) + kRawStages * (kRawBytes + 2 * 8);
    // Chunks of 8 elements that a producer thread converts per stage.
    static constexpr int kChunks = BLOCK_B * kStageRows / 8 / 128;
    // Rows that one accumulator adds up before it is folded into a second one. The tensor cores
    // cut and do not round. Three terms promise the error of fp32, so they are folded often.
    static constexpr int kFoldRows = kTerms == 1 ? 2048 : kTerms == 2 ? 1024 : 64;
    static constexpr int kFoldPanels = kFoldRows < kPanelRows ? 1 : kFoldRows / kPanelRows;
    static constexpr bool kFoldGroups = kFoldRows == 64;
    // A rolled loop over stages that folds must drain in each: the compiler follows products in
    // flight through straight code only.
    static constexpr bool kFoldStages = kFoldGroups && !kUnroll;
    // The block starts with 168 registers a thread. The consumers get what the producers give up.
    static constexpr int kProducerRegisters = 88;
    static constexpr int kConsumerRegisters = 208;
    static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= kThreads90 * 168,
                  "the consumers would wait for registers forever");
    static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block can have");
    static_assert(BLOCK_B % 16 == 0 && kStages >= 2 && kRawStages >= 2, "tile shape");
};

// Position in a ring of kCount places.
template <int kCount>
struct Ring {
    std::uint32_t place = 0, parity = 0;
    FASTPROJ_DEVICE void advance() {
        if (++place == kCount) {
            place = 0;
            parity ^= 1;
        }
    }
};

}  // namespace fastproj::cuda
