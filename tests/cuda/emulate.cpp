// The kernels of csrc/cuda on the host: the same planning, parameters and kernel source as on a
// GPU, run by the machine of emulator.hpp. A C interface for ctypes (tests/cuda/emulation.py).
#include <cstring>
#include <string>
#include <type_traits>

#include "cuda/project_sm80.cuh"
#include "cuda/project_sm90.cuh"
#include "cuda/run.hpp"
#include "cuda/simple.cuh"
#include "cuda/sjlt.cuh"
#include "cuda/transpose_sm80.cuh"

namespace {

using namespace fastproj;
using namespace fastproj::cuda;

using Entry80 = void (*)(const ProjectParams);
using Entry90 = void (*)(const TensorMap, const ProjectParams);

struct Emulated : Kernel {
    Entry80 entry80 = nullptr;
    Entry90 entry90 = nullptr;
};

bool same(const KernelKey& a, const KernelKey& b) {
    return a.kind == b.kind && a.bf16 == b.bf16 && a.terms == b.terms && a.block_b == b.block_b;
}

Emulated find_emulated(Variant variant, const KernelKey& key) {
    Emulated kernel;
    auto fill = [&](auto config, int threads) {
        using C = decltype(config);
        kernel.threads = threads;
        kernel.shared_bytes = C::kSharedBytes;
        kernel.columns = C::kColumns;
        kernel.stages = C::kStages;
        kernel.fold_rows = C::kFoldRows;
    };
#define CASE90(kind, Name, Op, terms, block_b, tiles)                                  \
    if (variant == Variant::kSm90 && same(key, {kind, Op::kIsBf16, terms, block_b})) { \
        fill(Config90<kind, Op, terms, block_b, tiles>{}, kThreads90);                 \
        kernel.entry90 = &project_##Name##_sm90_kernel<Op, terms, block_b, tiles>;     \
    }
#define CASE80(kind, Name, Op, terms, block_b)                                         \
    if (variant == Variant::kSm80 && same(key, {kind, Op::kIsBf16, terms, block_b})) { \
        fill(Config80<kind, Op, terms, block_b>{}, kThreads80);                        \
        kernel.entry80 = &project_##Name##_sm80_kernel<Op, terms, block_b>;            \
    }
#define RADEMACHER90(...) CASE90(Kind::kRademacher, rademacher, __VA_ARGS__)
#define GAUSSIAN90(...) CASE90(Kind::kGaussian, gaussian, __VA_ARGS__)
#define RADEMACHER80(...) CASE80(Kind::kRademacher, rademacher, __VA_ARGS__)
#define GAUSSIAN80(...) CASE80(Kind::kGaussian, gaussian, __VA_ARGS__)
    FASTPROJ_SM90_RADEMACHER(RADEMACHER90)
    FASTPROJ_SM90_RADEMACHER_SPLIT(RADEMACHER90)
    FASTPROJ_SM90_GAUSSIAN(GAUSSIAN90)
    FASTPROJ_SM90_GAUSSIAN_SPLIT(GAUSSIAN90)
    FASTPROJ_SM80_RADEMACHER(RADEMACHER80)
    FASTPROJ_SM80_RADEMACHER_SPLIT(RADEMACHER80)
    FASTPROJ_SM80_GAUSSIAN(GAUSSIAN80)
    FASTPROJ_SM80_GAUSSIAN_SPLIT(GAUSSIAN80)
    if (kernel.threads == 0) throw std::logic_error("the plan names a kernel that is not compiled");
    return kernel;
}

struct EmulatedLauncher {
    KernelKey key{};
    Variant variant = Variant::kAuto;
    Plan last{};

    Kernel find(Variant v, const KernelKey& k) {
        variant = v;
        key = k;
        return find_emulated(v, k);
    }
    void launch_sm90(const Kernel& kernel, int grid, int cluster, const BoxSource& source,
                     const ProjectParams& p) {
        const TensorMap map{static_cast<const unsigned char*>(source.base),
                            source.rows,
                            source.batch,
                            source.stride_bytes,
                            source.box_samples,
                            source.element_bytes};
        const Entry90 entry = find_emulated(variant, key).entry90;
        emulator::launch(grid, cluster, kernel.threads, kernel.shared_bytes,
                         [=]() { entry(map, p); });
    }
    void launch_sm80(const Kernel& kernel, int grid, const ProjectParams& p) {
        const Entry80 entry = find_emulated(variant, key).entry80;
        emulator::launch(grid, 1, kernel.threads, kernel.shared_bytes, [=]() { entry(p); });
    }
    void project_simple(Kind kind, const SimpleParams& p) {
        emulator::launch(3, 1, kThreadsSimple, kSimpleShared, [=]() {
            if (kind == Kind::kRademacher) return project_simple_kernel<Kind::kRademacher>(p);
            project_simple_kernel<Kind::kGaussian>(p);
        });
    }
    void project_sjlt(const SjltPlan& plan, const SjltParams& p) {
#define FASTPROJ_CASE(dtype, groups, batch, staged)                                 \
    if (plan.key == SjltKey{dtype, groups, batch, staged}) {                        \
        return emulator::launch(blocks, 1, plan.threads, plan.shared_bytes, [=]() { \
            fastproj::cuda::project_sjlt_kernel<dtype, groups, batch, staged>(p);   \
        });                                                                         \
    }
        const int blocks = 2;
        FASTPROJ_SJLT(FASTPROJ_CASE, Dtype::kF32)
        FASTPROJ_SJLT(FASTPROJ_CASE, Dtype::kBf16)
        FASTPROJ_SJLT(FASTPROJ_CASE, Dtype::kF16)
        FASTPROJ_SJLT_F64(FASTPROJ_CASE, Dtype::kF64)
#undef FASTPROJ_CASE
        throw std::logic_error("the plan names a kernel that is not compiled");
    }
    void transpose_sjlt(bool in_double, const SjltTransposeParams& p) {
        emulator::launch(2, 1, kThreadsSimple, kSjltTransposeShared, [=]() {
            if (in_double) return transpose_sjlt_kernel<double>(p);
            transpose_sjlt_kernel<float>(p);
        });
    }
    void reduce(bool simple, const ReduceParams& p) {
        emulator::launch(2, 1, kThreadsSimple, 0, [=]() {
            if (simple) return reduce_kernel<double>(p);
            reduce_kernel<float>(p);
        });
    }
    void matrix(Kind kind, const MatrixParams& p) {
        emulator::launch(3, 1, kThreadsSimple, 0, [=]() {
            if (kind == Kind::kSjlt) return matrix_sjlt(p);
            if (kind == Kind::kRademacher) return matrix_kernel<Kind::kRademacher>(p);
            matrix_kernel<Kind::kGaussian>(p);
        });
    }
    void transpose80(Kind kind, int terms, const TransposeParams& p) {
        auto go = [&](auto kind_tag, auto terms_tag) {
            constexpr Kind k = decltype(kind_tag)::value;
            constexpr int t = decltype(terms_tag)::value;
            emulator::launch(2, 1, kThreadsTranspose, ConfigTranspose<k, t>::kSharedBytes,
                             [=]() { transpose_sm80_kernel<k, t>(p); });
        };
        using R = std::integral_constant<Kind, Kind::kRademacher>;
        using G = std::integral_constant<Kind, Kind::kGaussian>;
        using One = std::integral_constant<int, 1>;
        using Three = std::integral_constant<int, 3>;
        if (kind == Kind::kRademacher) return terms == 1 ? go(R{}, One{}) : go(R{}, Three{});
        terms == 1 ? go(G{}, One{}) : go(G{}, Three{});
    }
    void transpose_simple(Kind kind, const TransposeParams& p) {
        auto go = [&](auto tag) {
            constexpr Kind k = decltype(tag)::value;
            emulator::launch(2, 1, kThreadsSimple, TransposeSimple<k>::kSharedBytes,
                             [=]() { transpose_simple_kernel<k>(p); });
        };
        if (kind == Kind::kRademacher) return go(std::integral_constant<Kind, Kind::kRademacher>{});
        go(std::integral_constant<Kind, Kind::kGaussian>{});
    }
};

template <class F>
int guarded(char* message, int length, F&& run) {
    try {
        run();
        return 0;
    } catch (const std::exception& e) {
        std::snprintf(message, length, "%s", e.what());
        return 1;
    }
}

}  // namespace

extern "C" {

struct EmulatedProject {
    const void* grads;
    std::int64_t batch, rows, stride_b, stride_p;
    void* out;
    std::int64_t cols, out_stride_b, out_stride_k;
    std::uint64_t seed;
    std::int64_t row_offset;
    double scale;
    std::int32_t dtype, kind, stream, accumulate, terms, variant, multiprocessors, order, truncate,
        arch, block_log2;
};

// Fills `plan_out` with: variant, block_b, loader, cluster, splits, batch_chunk, workspace_bytes;
// of kind sjlt also groups, samples of a block, staged, threads, stage_tiles, stages, shared bytes.
// Runs the kernels unless `plan_only`.
int emulated_project(const EmulatedProject* c, std::int64_t* plan_out, int plan_only, char* message,
                     int length) {
    return guarded(message, length, [&]() {
        ProjectCall call{};
        call.grads = c->grads;
        call.dtype = static_cast<Dtype>(c->dtype);
        call.batch = c->batch;
        call.rows = c->rows;
        call.stride_b = c->stride_b;
        call.stride_p = c->stride_p;
        call.out = c->out;
        call.cols = c->cols;
        call.out_stride_b = c->out_stride_b;
        call.out_stride_k = c->out_stride_k;
        call.key.kind = static_cast<Kind>(c->kind);
        call.key.seed = c->seed;
        call.key.stream = static_cast<std::uint32_t>(c->stream);
        call.key.block_log2 = static_cast<std::uint32_t>(c->block_log2);
        call.row_offset = c->row_offset;
        call.scale = c->scale;
        call.accumulate = c->accumulate != 0;
        call.terms = c->terms;
        call.variant = static_cast<Variant>(c->variant);
        const DeviceInfo device{c->arch / 10, c->arch % 10, c->multiprocessors, c->arch == 90};
        emulator::machine().random.seed(static_cast<unsigned>(c->order));
        emulator::machine().truncate = c->truncate != 0;
        const Plan plan = plan_project(device, call);
        const SjltPlan& sjlt = plan.sjlt;
        const std::int64_t facts[14] = {static_cast<std::int64_t>(plan.variant),
                                        plan.key.block_b,
                                        static_cast<std::int64_t>(plan.loader),
                                        plan.cluster,
                                        plan.splits,
                                        plan.batch_chunk,
                                        plan.workspace_bytes,
                                        sjlt.key.groups,
                                        sjlt.key.batch,
                                        sjlt.key.staged,
                                        sjlt.threads,
                                        sjlt.stage_tiles,
                                        sjlt.stages,
                                        sjlt.shared_bytes};
        std::memcpy(plan_out, facts, sizeof facts);
        if (plan_only != 0) return;
        std::vector<unsigned char> workspace(plan.workspace_bytes, 0xff);
        EmulatedLauncher launcher;
        run_project(launcher, device, call, workspace.data(),
                    static_cast<std::int64_t>(workspace.size()));
    });
}

// Dynamic shared memory, columns of a block and stages of one instantiation; zeros when there is
// none.
void emulated_kernel(int variant, int kind, int bf16, int terms, int block_b, std::int64_t* facts) {
    Kernel kernel;
    try {
        kernel = find_emulated(static_cast<Variant>(variant),
                               {static_cast<Kind>(kind), bf16 != 0, terms, block_b});
    } catch (const std::logic_error&) {
    }
    facts[0] = kernel.shared_bytes;
    facts[1] = kernel.columns;
    facts[2] = kernel.stages;
    facts[3] = kernel.fold_rows;
}

// Starts (or stops) counting; `facts`: what Traffic has, as counted so far.
void emulated_traffic(int count, std::int64_t* facts) {
    emulator::Machine& m = emulator::machine();
    facts[0] = m.traffic.stores;
    facts[1] = m.traffic.store_wavefronts;
    facts[2] = m.traffic.reads;
    facts[3] = m.traffic.read_wavefronts;
    facts[4] = m.traffic.loads;
    facts[5] = m.traffic.sectors;
    m.traffic = {};
    m.count_traffic = count != 0;
}

struct EmulatedTranspose {
    const void* y;
    std::int64_t batch, cols, y_stride_b, y_stride_k;
    void* out;
    std::int64_t rows, out_stride_b, out_stride_p;
    std::uint64_t seed;
    std::int64_t row_offset;
    double scale;
    std::int32_t dtype, kind, stream, terms, variant, order, block_log2;
};

int emulated_transpose(const EmulatedTranspose* c, char* message, int length) {
    return guarded(message, length, [&]() {
        TransposeCall call{};
        call.y = c->y;
        call.dtype = static_cast<Dtype>(c->dtype);
        call.batch = c->batch;
        call.cols = c->cols;
        call.y_stride_b = c->y_stride_b;
        call.y_stride_k = c->y_stride_k;
        call.out = c->out;
        call.rows = c->rows;
        call.out_stride_b = c->out_stride_b;
        call.out_stride_p = c->out_stride_p;
        call.key.kind = static_cast<Kind>(c->kind);
        call.key.seed = c->seed;
        call.key.stream = static_cast<std::uint32_t>(c->stream);
        call.key.block_log2 = static_cast<std::uint32_t>(c->block_log2);
        call.row_offset = c->row_offset;
        call.scale = c->scale;
        call.terms = c->terms;
        call.variant = static_cast<Variant>(c->variant);
        emulator::machine().random.seed(static_cast<unsigned>(c->order));
        EmulatedLauncher launcher;
        run_transpose(launcher, call);
    });
}

struct EmulatedMatrix {
    void* out;
    std::int64_t rows, cols, stride_n, stride_m;
    std::uint64_t seed;
    std::int64_t row_offset, col_offset;
    std::int32_t dtype, kind, stream, order, block_log2;
};

int emulated_matrix(const EmulatedMatrix* c, char* message, int length) {
    return guarded(message, length, [&]() {
        MatrixCall call{};
        call.out = c->out;
        call.dtype = static_cast<Dtype>(c->dtype);
        call.rows = c->rows;
        call.cols = c->cols;
        call.stride_n = c->stride_n;
        call.stride_m = c->stride_m;
        call.key.kind = static_cast<Kind>(c->kind);
        call.key.seed = c->seed;
        call.key.stream = static_cast<std::uint32_t>(c->stream);
        call.key.block_log2 = static_cast<std::uint32_t>(c->block_log2);
        call.row_offset = c->row_offset;
        call.col_offset = c->col_offset;
        emulator::machine().random.seed(static_cast<unsigned>(c->order));
        EmulatedLauncher launcher;
        run_matrix(launcher, call);
    });
}

}  // extern "C"
