// Runs compiled AMX code on processors without AMX: a SIGILL handler decodes the tile instructions
// that csrc/cpu/isa_amx.cpp uses and carries them out on a copy of the tile state per thread, by
// the Intel SDM's pseudocode, checking the shapes that the hardware would check. Slow, for tests
// only.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tiles {
    bool configured;
    std::uint16_t bytes_per_row[16];
    std::uint8_t rows[16];
    alignas(64) std::uint8_t data[8][16][64];
};
thread_local Tiles tiles;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "amx_emulator: %s\n", what);
    std::abort();
}

std::uint64_t general_register(const ucontext_t& context, int number) {
    static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<std::uint64_t>(context.uc_mcontext.gregs[kOrder[number]]);
}

float flush(float x) {  // DAZ and FTZ: subnormals become zero
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

float from_bf16(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return flush(x);
}

void check_tile(int tile) {
    if (!tiles.configured) fail("tile instruction before ldtilecfg");
    if (tile >= 8 || tiles.rows[tile] == 0 || tiles.bytes_per_row[tile] == 0) {
        fail("tile is not configured");
    }
}

// tdpbf16ps: two running sums a cell, even and odd halves, added at the end.
void multiply(int c, int a, int b) {
    check_tile(a), check_tile(b), check_tile(c);
    if (a == b || a == c || b == c) fail("tdpbf16ps: operands must be three tiles");
    const int rows = tiles.rows[c], cols = tiles.bytes_per_row[c] / 4;
    const int depth = tiles.bytes_per_row[a] / 4;
    if (tiles.rows[a] != rows || tiles.rows[b] != depth ||
        tiles.bytes_per_row[b] != tiles.bytes_per_row[c]) {
        fail("tdpbf16ps: shapes do not fit");
    }
    for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < cols; ++n) {
            float sum[2] = {0, 0};
            for (int k = 0; k < depth; ++k) {
                std::uint16_t left[2], right[2];
                std::memcpy(left, &tiles.data[a][m][4 * k], 4);
                std::memcpy(right, &tiles.data[b][k][4 * n], 4);
                for (int i = 0; i < 2; ++i) {
                    sum[i] = flush(__builtin_fmaf(from_bf16(left[i]), from_bf16(right[i]), sum[i]));
                }
            }
            float cell;
            std::memcpy(&cell, &tiles.data[c][m][4 * n], 4);
            cell = flush(flush(cell) + flush(sum[0] + sum[1]));
            std::memcpy(&tiles.data[c][m][4 * n], &cell, 4);
        }
    }
}

// Length of the instruction at `at` after carrying it out, 0 if it is none of ours.
int emulate(const std::uint8_t* at, const ucontext_t& context) {
    if (at[0] != 0xC4 || (at[1] & 0x1f) != 2) return 0;  // three-byte VEX, map 0F38
    const bool extend_reg = !(at[1] & 0x80), extend_index = !(at[1] & 0x40),
               extend_base = !(at[1] & 0x20);
    const int vvvv = ~(at[2] >> 3) & 15, prefix = at[2] & 3;  // prefix 0, 66, F3, F2
    const std::uint8_t opcode = at[3], modrm = at[4];
    const int mod = modrm >> 6, reg = (modrm >> 3 & 7) | (extend_reg ? 8 : 0), rm = modrm & 7;
    if (opcode == 0x5C && prefix == 2 && mod == 3) {
        multiply(reg, rm | (extend_base ? 8 : 0), vvvv);
        return 5;
    }
    if (opcode == 0x49 && mod == 3) {
        if (prefix == 0 && modrm == 0xC0) {
            std::memset(&tiles, 0, sizeof tiles);
            return 5;
        }
        if (prefix == 3 && rm == 0) {
            check_tile(reg);
            std::memset(tiles.data[reg], 0, sizeof tiles.data[reg]);
            return 5;
        }
        return 0;
    }
    if ((opcode != 0x49 && opcode != 0x4B) || mod == 3) return 0;
    int length = 5;
    std::uint64_t base = 0, stride = 0;
    if (rm == 4) {
        const std::uint8_t sib = at[length++];
        const int index = (sib >> 3 & 7) | (extend_index ? 8 : 0);
        const int base_register = (sib & 7) | (extend_base ? 8 : 0);
        if (index != 4) stride = general_register(context, index) << (sib >> 6);
        if ((sib & 7) == 5 && mod == 0) fail("address without a base register");
        base = general_register(context, base_register);
    } else if (mod == 0 && rm == 5) {
        std::int32_t displacement;
        std::memcpy(&displacement, at + length, 4);
        base = reinterpret_cast<std::uint64_t>(at) + 9 + static_cast<std::int64_t>(displacement);
        length += 4;
    } else {
        base = general_register(context, rm | (extend_base ? 8 : 0));
    }
    if (mod == 1) {
        base += static_cast<std::int64_t>(static_cast<std::int8_t>(at[length]));
        length += 1;
    } else if (mod == 2) {
        std::int32_t displacement;
        std::memcpy(&displacement, at + length, 4);
        base += static_cast<std::int64_t>(displacement);
        length += 4;
    }
    auto* memory = reinterpret_cast<std::uint8_t*>(base);
    if (opcode == 0x49) {
        if (prefix != 0) return 0;
        if (memory[0] != 1) fail("ldtilecfg: palette is not 1");
        std::memset(&tiles, 0, sizeof tiles);
        std::memcpy(tiles.bytes_per_row, memory + 16, sizeof tiles.bytes_per_row);
        std::memcpy(tiles.rows, memory + 48, sizeof tiles.rows);
        for (int t = 0; t < 16; ++t) {
            if (tiles.rows[t] > 16 || tiles.bytes_per_row[t] > 64 ||
                (t >= 8 && (tiles.rows[t] != 0 || tiles.bytes_per_row[t] != 0))) {
                fail("ldtilecfg: tile shape out of range");
            }
        }
        tiles.configured = true;
        return length;
    }
    check_tile(reg);
    for (int row = 0; row < tiles.rows[reg]; ++row) {
        std::uint8_t* line = memory + static_cast<std::uint64_t>(row) * stride;
        if (prefix == 2) {  // F3: tilestored
            std::memcpy(line, tiles.data[reg][row], tiles.bytes_per_row[reg]);
        } else {  // F2 tileloadd, 66 tileloaddt1
            std::memcpy(tiles.data[reg][row], line, tiles.bytes_per_row[reg]);
        }
    }
    return length;
}

void on_illegal_instruction(int, siginfo_t*, void* raw) {
    auto& context = *static_cast<ucontext_t*>(raw);
    auto& rip = context.uc_mcontext.gregs[REG_RIP];
    const int length = emulate(reinterpret_cast<const std::uint8_t*>(rip), context);
    if (length == 0) {
        signal(SIGILL, SIG_DFL);  // somebody else's: let it fault again
        return;
    }
    rip += length;
}

}  // namespace

extern "C" int install_amx_emulator() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    return sigaction(SIGILL, &action, nullptr);
}
