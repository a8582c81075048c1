#include "dispatch.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define FASTPROJ_X86 1
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastproj::cpu {

namespace {

// ---- What the machine can do ------------------------------------------------------------------

#if defined(FASTPROJ_X86) && defined(FASTPROJ_HAVE_AMX)
std::string amx_unavailable() {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 ||
        (edx & kTile) == 0) {
        return "this processor lacks AMX-TILE and AMX-BF16";
    }
#if defined(__linux__) && defined(__x86_64__)
    // Linux gives a process the 8 KiB of tile state only when asked: ARCH_REQ_XCOMP_PERM,
    // XFEATURE_XTILEDATA. Threads inherit it.
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted ? "" : "the operating system refuses AMX tile state (needs Linux 5.16)";
#else
    return "AMX is used on Linux only";
#endif
}
#endif

template <class T>
struct FreeAligned {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
template <class T>
using AlignedArray = std::unique_ptr<T[], FreeAligned<T>>;

template <class T>
AlignedArray<T> allocate_aligned(std::size_t count) {
    return AlignedArray<T>(static_cast<T*>(
        ::operator new[](std::max<std::size_t>(count, 1) * sizeof(T), std::align_val_t{64})));
}

// ---- Threads ----------------------------------------------------------------------------------

// Runs task(i, worker) for i < tasks on up to num_threads threads, the calling one included.
// Threads live for one call: nothing spins beside torch's own pool, and a fork leaves nothing
// behind.
template <class Task>
void parallel_for(std::int64_t tasks, int num_threads, const Task& task) {
    std::atomic<std::int64_t> next{0};
    const auto work = [&](int worker) {
        for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            task(i, worker);
        }
    };
    std::vector<std::thread> threads;
    const std::int64_t helpers = std::min<std::int64_t>(num_threads, tasks) - 1;
    try {
        for (std::int64_t t = 1; t <= helpers; ++t) {
            threads.emplace_back(work, static_cast<int>(t));
        }
    } catch (const std::system_error&) {
        // No more threads to be had: those there are, and this one, do the work.
    }
    work(0);
    for (auto& thread : threads) thread.join();
}

// A thread costs some 20 us to start: give each at least ten times that.
int threads_for(double operations, int num_threads) {
    constexpr double kOperationsPerThread = 2e7;
    return static_cast<int>(std::clamp(operations / kOperationsPerThread, 1.0,
                                       static_cast<double>(std::max(num_threads, 1))));
}

// ---- Numbers in and out -----------------------------------------------------------------------

std::uint16_t bfloat16_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Only entries of R are ever stored as float16: +-1 and bf16 values between 2^-10 and 4, all exact.
std::uint16_t float16_bits(float entry) {
    std::uint32_t bits;
    std::memcpy(&bits, &entry, sizeof bits);
    return static_cast<std::uint16_t>((bits >> 16 & 0x8000u) |
                                      (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
}

void store_entry(const Output& out, std::int64_t at, float entry) {
    switch (out.dtype) {
        case DType::kFloat32:
            static_cast<float*>(out.data)[at] = entry;
            return;
        case DType::kFloat64:
            static_cast<double*>(out.data)[at] = entry;
            return;
        case DType::kBFloat16:
            static_cast<std::uint16_t*>(out.data)[at] = bfloat16_bits(entry);
            return;
        case DType::kFloat16:
            static_cast<std::uint16_t*>(out.data)[at] = float16_bits(entry);
            return;
        case DType::kInt8:
            static_cast<std::int8_t*>(out.data)[at] = static_cast<std::int8_t>(entry);
            return;
    }
    throw std::invalid_argument("fastproj._cpu: unknown output dtype");
}

template <class T>
void write_sum(T* to, double sum, double scale, bool accumulate) {
    *to = static_cast<T>(accumulate ? static_cast<double>(*to) + scale * sum : scale * sum);
}

KernelTable kernels_for(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return kernels_portable();
#if defined(FASTPROJ_HAVE_AVX2)
        case Isa::kAvx2:
            return kernels_avx2();
#endif
#if defined(FASTPROJ_HAVE_AVX512)
        case Isa::kAvx512:
            return kernels_avx512();
#endif
#if defined(FASTPROJ_HAVE_AMX)
        case Isa::kAmx:
            return kernels_amx();
#endif
        default:
            throw std::invalid_argument("fastproj._cpu: instruction set not compiled in");
    }
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return "portable";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAmx:
            return "amx";
    }
    throw std::invalid_argument("fastproj._cpu: unknown instruction set");
}

std::string isa_unavailable(Isa isa) {
    const std::string not_built = "this build of fastproj has no code for it";
    (void)not_built;
    switch (isa) {
        case Isa::kPortable:
            return "";
        case Isa::kAvx2:
#if defined(FASTPROJ_X86) && defined(FASTPROJ_HAVE_AVX2)
            if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
                return "this processor lacks AVX2 and FMA";
            }
            return "";
#else
            return not_built;
#endif
        case Isa::kAvx512:
#if defined(FASTPROJ_X86) && defined(FASTPROJ_HAVE_AVX512)
            if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
                !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
                return "this processor lacks AVX-512 F, BW, DQ and VL";
            }
            return "";
#else
            return not_built;
#endif
        case Isa::kAmx:
#if defined(FASTPROJ_X86) && defined(FASTPROJ_HAVE_AMX)
            if (!isa_unavailable(Isa::kAvx512).empty()) return isa_unavailable(Isa::kAvx512);
            if (!__builtin_cpu_supports("avx512vbmi")) return "this processor lacks AVX-512 VBMI";
            return amx_unavailable();
#else
            return not_built;
#endif
    }
    throw std::invalid_argument("fastproj._cpu: unknown instruction set");
}

// P is cut into segments and K into slabs by rules that look at P and K alone, so the order of
// every sum is the same whatever the batch, the number of threads and the machine's load.
void project(const std::vector<Piece>& pieces, DType dtype, std::int64_t batch,
             std::int64_t row_offset, const MatrixKey& key, std::int64_t proj_dim, double scale,
             bool accumulate, Precision precision, const Output& out, const Run& run) {
    constexpr std::int64_t kSlabCols = 2048;  // tables of signed sums are built once a slab
    constexpr std::int64_t kBatchTile = 64;   // batch rows that share generated words
    constexpr std::int64_t kMaxSegments = 64;
    constexpr std::int64_t kMinGroups = 8;  // groups of 512 rows in a segment
    constexpr std::int64_t kWorkspaceCols = std::int64_t{32 << 20} / 8 / kBatchTile;  // 32 MiB

    std::vector<std::int64_t> piece_begin(1, 0);
    for (const Piece& piece : pieces) piece_begin.push_back(piece_begin.back() + piece.rows);
    const std::int64_t rows = piece_begin.back();
    const Source source{
        pieces.data(), piece_begin.data(), static_cast<int>(pieces.size()), dtype, batch,
        rows,          row_offset};

    const std::int64_t group_begin = row_offset / kGroupRows;
    const std::int64_t groups = ceil_div(row_offset + rows, kGroupRows) - group_begin;
    const std::int64_t padded_dim = ceil_div(proj_dim, kColumnPad) * kColumnPad;
    const std::int64_t segments = std::clamp<std::int64_t>(
        std::min(kWorkspaceCols / padded_dim, groups / kMinGroups), 1, kMaxSegments);
    // Columns beyond the workspace's width are done in turns of whole slabs.
    const std::int64_t turn_cols =
        std::min(padded_dim, std::max(kSlabCols, kWorkspaceCols / kSlabCols * kSlabCols));

    const KernelTable kernels = kernels_for(run.isa);
    const auto kernel = dtype == DType::kFloat64        ? kernels.project_f64
                        : key.kind == Kind::kRademacher ? kernels.rademacher_f32
                                                        : kernels.gaussian_f32;
    const int batch_tile = static_cast<int>(std::min(batch, kBatchTile));
    const std::int64_t tile_cols = std::min(turn_cols, kSlabCols);
    const double operations = static_cast<double>(rows) * static_cast<double>(padded_dim) *
                              (8.0 + static_cast<double>(batch));
    const int num_threads = threads_for(operations, run.num_threads);

    const std::size_t scratch_bytes =
        ceil_div(static_cast<std::int64_t>(
                     kernels.project_scratch_bytes(batch_tile, static_cast<int>(tile_cols))),
                 64) *
        64;
    const auto scratch =
        allocate_aligned<char>(scratch_bytes * static_cast<std::size_t>(num_threads));
    const std::int64_t segment_size = batch_tile * turn_cols;
    const auto acc = allocate_aligned<double>(static_cast<std::size_t>(segments * segment_size));

    for (std::int64_t col_begin = 0; col_begin < proj_dim; col_begin += turn_cols) {
        const std::int64_t cols = std::min(turn_cols, proj_dim - col_begin);
        const std::int64_t turn_slabs = ceil_div(cols, kSlabCols);
        for (std::int64_t batch_begin = 0; batch_begin < batch; batch_begin += batch_tile) {
            const auto rows_here =
                static_cast<int>(std::min<std::int64_t>(batch_tile, batch - batch_begin));
            // Slabs of one segment follow each other, so the segment's gradients are still in
            // cache.
            parallel_for(segments * turn_slabs, num_threads, [&](std::int64_t task, int worker) {
                const std::int64_t segment = task / turn_slabs;
                const std::int64_t slab_begin = task % turn_slabs * kSlabCols;
                ProjectTile tile{};
                tile.source = &source;
                tile.key = key;
                tile.precision = precision;
                tile.batch_begin = batch_begin;
                tile.batch = rows_here;
                tile.group_begin = group_begin + groups * segment / segments;
                tile.group_end = group_begin + groups * (segment + 1) / segments;
                tile.col_begin = static_cast<std::uint32_t>(col_begin + slab_begin);
                tile.cols = static_cast<int>(std::min(kSlabCols, cols - slab_begin));
                tile.acc = acc.get() + segment * segment_size + slab_begin;
                tile.acc_ld = turn_cols;
                tile.scratch = scratch.get() + scratch_bytes * static_cast<std::size_t>(worker);
                const std::int64_t padded = ceil_div(tile.cols, kColumnPad) * kColumnPad;
                for (int b = 0; b < tile.batch; ++b) {
                    std::fill_n(tile.acc + b * tile.acc_ld, padded, 0.0);
                }
                kernel(tile);
            });
            parallel_for(rows_here, num_threads, [&](std::int64_t b, int) {
                double* sums = acc.get() + b * turn_cols;
                for (std::int64_t s = 1; s < segments; ++s) {
                    const double* more = sums + s * segment_size;
                    for (std::int64_t k = 0; k < cols; ++k) sums[k] += more[k];
                }
                const std::int64_t row_at = (batch_begin + b) * out.stride_row;
                for (std::int64_t k = 0; k < cols; ++k) {
                    const std::int64_t at = row_at + (col_begin + k) * out.stride_col;
                    if (out.dtype == DType::kFloat64) {
                        write_sum(static_cast<double*>(out.data) + at, sums[k], scale, accumulate);
                    } else {
                        write_sum(static_cast<float*>(out.data) + at, sums[k], scale, accumulate);
                    }
                }
            });
        }
    }
}

void project_transpose(const Piece& y, DType dtype, std::int64_t batch, std::int64_t row_offset,
                       std::int64_t rows, const MatrixKey& key, double scale, const Output& out,
                       const Run& run) {
    constexpr std::int64_t kBatchTile = 64;
    const std::int64_t proj_dim = y.rows;
    const std::int64_t padded_dim = ceil_div(proj_dim, kColumnPad) * kColumnPad;
    const std::int64_t group_begin = row_offset / kGroupRows;
    const std::int64_t groups = ceil_div(row_offset + rows, kGroupRows) - group_begin;
    const KernelTable kernels = kernels_for(run.isa);
    const bool is_double = dtype == DType::kFloat64;
    const auto kernel = is_double ? kernels.transpose_f64 : kernels.transpose_f32;
    const auto batch_tile = static_cast<int>(std::min(batch, kBatchTile));
    const int num_threads =
        threads_for(static_cast<double>(rows) * static_cast<double>(padded_dim) *
                        (8.0 + static_cast<double>(batch)),
                    run.num_threads);
    const std::size_t scratch_bytes =
        ceil_div(static_cast<std::int64_t>(kernels.transpose_scratch_bytes()), 64) * 64;
    const auto scratch =
        allocate_aligned<char>(scratch_bytes * static_cast<std::size_t>(num_threads));
    const std::size_t sums_size = static_cast<std::size_t>(batch_tile) * kGroupRows;
    const auto sums = allocate_aligned<double>(sums_size * static_cast<std::size_t>(num_threads));
    const std::size_t item = is_double ? sizeof(double) : sizeof(float);
    const auto packed =
        allocate_aligned<char>(static_cast<std::size_t>(batch_tile * padded_dim) * item);

    for (std::int64_t batch_begin = 0; batch_begin < batch; batch_begin += batch_tile) {
        const auto rows_here =
            static_cast<int>(std::min<std::int64_t>(batch_tile, batch - batch_begin));
        std::memset(packed.get(), 0, static_cast<std::size_t>(batch_tile * padded_dim) * item);
        for (std::int64_t b = 0; b < rows_here; ++b) {
            for (std::int64_t k = 0; k < proj_dim; ++k) {
                const std::int64_t at = (batch_begin + b) * y.stride_batch + k * y.stride_row;
                std::memcpy(packed.get() + static_cast<std::size_t>(b * padded_dim + k) * item,
                            static_cast<const char*>(y.data) + at * static_cast<std::int64_t>(item),
                            item);
            }
        }
        parallel_for(groups, num_threads, [&](std::int64_t group, int worker) {
            TransposeTile tile{};
            tile.key = key;
            tile.y = packed.get();
            tile.y_ld = padded_dim;
            tile.batch = rows_here;
            tile.cols = proj_dim;
            tile.group = group_begin + group;
            tile.out = sums.get() + sums_size * static_cast<std::size_t>(worker);
            tile.scratch = scratch.get() + scratch_bytes * static_cast<std::size_t>(worker);
            kernel(tile);
            const std::int64_t first = tile.group * kGroupRows - row_offset;
            const std::int64_t begin = std::max<std::int64_t>(first, 0);
            const std::int64_t end = std::min<std::int64_t>(first + kGroupRows, rows);
            for (std::int64_t b = 0; b < rows_here; ++b) {
                for (std::int64_t r = begin; r < end; ++r) {
                    const double sum = tile.out[b * kGroupRows + (r - first)];
                    const std::int64_t at = (batch_begin + b) * out.stride_row + r * out.stride_col;
                    if (out.dtype == DType::kFloat64) {
                        write_sum(static_cast<double*>(out.data) + at, sum, scale, false);
                    } else {
                        write_sum(static_cast<float*>(out.data) + at, sum, scale, false);
                    }
                }
            }
        });
    }
}

void matrix(const MatrixKey& key, std::int64_t row_offset, std::int64_t rows,
            std::int64_t col_offset, std::int64_t cols, const Output& out, const Run& run) {
    const std::int64_t group_begin = row_offset / kGroupRows;
    const std::int64_t groups = ceil_div(row_offset + rows, kGroupRows) - group_begin;
    const std::int64_t strips = ceil_div(cols, kColumnPad);
    const KernelTable kernels = kernels_for(run.isa);
    const int num_threads = threads_for(
        8.0 * static_cast<double>(groups * kGroupRows) * static_cast<double>(strips * kColumnPad),
        run.num_threads);
    constexpr std::size_t kTile = static_cast<std::size_t>(kGroupRows) * kColumnPad;
    const auto tiles = allocate_aligned<float>(kTile * static_cast<std::size_t>(num_threads));
    const std::size_t scratch_bytes =
        ceil_div(static_cast<std::int64_t>(kernels.matrix_scratch_bytes()), 64) * 64;
    const auto scratch =
        allocate_aligned<char>(scratch_bytes * static_cast<std::size_t>(num_threads));
    parallel_for(groups * strips, num_threads, [&](std::int64_t task, int worker) {
        const std::int64_t col = task % strips * kColumnPad;
        MatrixTile tile{};
        tile.key = key;
        tile.group = group_begin + task / strips;
        tile.col_begin = static_cast<std::uint32_t>(col_offset + col);
        tile.tile = tiles.get() + kTile * static_cast<std::size_t>(worker);
        tile.scratch = scratch.get() + scratch_bytes * static_cast<std::size_t>(worker);
        kernels.matrix(tile);
        const std::int64_t first = tile.group * kGroupRows - row_offset;
        const std::int64_t end = std::min<std::int64_t>(first + kGroupRows, rows);
        const std::int64_t width = std::min<std::int64_t>(kColumnPad, cols - col);
        for (std::int64_t r = std::max<std::int64_t>(first, 0); r < end; ++r) {
            const float* from = tile.tile + (r - first) * kColumnPad;
            for (std::int64_t c = 0; c < width; ++c) {
                store_entry(out, r * out.stride_row + (col + c) * out.stride_col, from[c]);
            }
        }
    });
}

}  // namespace fastproj::cpu
