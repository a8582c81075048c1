// fastproj._cuda: takes raw pointers, shapes, strides and a stream handle, and knows nothing of
// torch.
#include "../bindings.hpp"

#include "launch.hpp"

namespace py = pybind11;

namespace {

using namespace fastproj;
using namespace fastproj::cuda;

Variant variant_of(const std::string& name) {
    for (const Variant v : {Variant::kAuto, Variant::kSimple, Variant::kSm80, Variant::kSm90}) {
        if (name == variant_name(v)) return v;
    }
    throw py::value_error("variant: received '" + name + "'; expected auto, simple, sm80 or sm90");
}

ProjectCall project_call(const View& piece, const View& out, const Call& call,
                         const std::string& variant) {
    return {call,           piece.data,      piece.dtype,     piece.shape[0],
            piece.shape[1], piece.stride[0], piece.stride[1], out.data,
            out.shape[1],   out.stride[0],   out.stride[1],   variant_of(variant)};
}

py::dict plan_dict(const DeviceInfo& device, const ProjectCall& call) {
    const Plan plan = plan_project(device, call);
    py::dict facts;
    if (call.key.kind == Kind::kSjlt) {
        const SjltPlan& sjlt = plan.sjlt;
        facts["variant"] = "sjlt";
        facts["block"] = 1 << call.key.block_log2;
        facts["BLOCK_B"] = sjlt.key.batch;
        facts["BLOCK_K"] = sjlt.columns;
        facts["columns of a thread"] = 4 * sjlt.key.groups;
        facts["threads"] = sjlt.threads;
        facts["tiles per stage"] = sjlt.stage_tiles;
        facts["stages"] = sjlt.stages;
        facts["shared bytes"] = sjlt.shared_bytes;
        facts["tiles per fold"] = kSjltFold;
        facts["loader"] = loader_name(plan.loader);
    } else {
        facts["variant"] = variant_name(plan.variant);
        facts["terms"] = plan.key.terms;
        facts["BLOCK_B"] = plan.key.block_b;
    }
    if (plan.variant == Variant::kSimple) {
        facts["BLOCK_K"] = 64;
    } else if (call.key.kind != Kind::kSjlt) {
        const Kernel kernel = find_kernel(plan.variant, plan.key);
        facts["grid"] =
            launch_blocks(device, plan, kernel, plan.batch_chunk, call.cols, plan.splits);
        facts["BLOCK_K"] = kernel.columns;
        facts["stages"] = kernel.stages;
        facts["threads"] = kernel.threads;
        facts["shared bytes"] = kernel.shared_bytes;
        facts["rows per fold"] = kernel.fold_rows;
        facts["loader"] = loader_name(plan.loader);
        facts["cluster"] = plan.cluster;
    }
    facts["splits of P"] = plan.splits;
    facts["samples per launch"] = plan.batch_chunk;
    facts["workspace bytes"] = plan.workspace_bytes;
    return facts;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Random projection on NVIDIA GPUs. See fastproj/backends/cuda.py for the tensors.";
    m.attr("__version__") = FASTPROJ_VERSION;
    const py::call_guard<py::gil_scoped_release> unlocked;

    m.def(
        "count",
        []() {
            std::string problem;
            const int count = count_gpus(problem);
            return py::make_tuple(count, problem);
        },
        "How many GPUs there are, and why there is none where there is none.");
    m.def(
        "gpu",
        [](int device) {
            const Gpu& gpu = gpu_at(device);
            py::dict facts;
            facts["name"] = gpu.name;
            facts["arch"] = std::to_string(gpu.info.major) + std::to_string(gpu.info.minor);
            facts["multiprocessors"] = gpu.info.multiprocessors;
            facts["sm90a"] = gpu.info.sm90a;
            facts["problem"] = gpu.problem;
            return facts;
        },
        "What one GPU is, and why our code can't run there; makes a CUDA context on it.");
    m.def(
        "build",
        []() {
            py::dict facts;
            const int version = toolkit_version();
            facts["toolkit"] =
                std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
            facts["architectures"] = compiled_architectures();
            return facts;
        },
        "The toolkit and the architectures that this module was compiled with.");
    m.def(
        "plan",
        [](std::int64_t batch, std::int64_t rows, std::int64_t cols, int dtype, int kind, int terms,
           int arch, int multiprocessors, bool aligned, const std::string& variant,
           std::int64_t row_offset, std::uint32_t block_log2) {
            const DeviceInfo device{arch / 10, arch % 10, multiprocessors, arch == 90};
            // Only the address modulo 16 matters: an odd row stride stands for what is not aligned.
            const std::int64_t stride = aligned ? ceil_div(rows, 8) * 8 : rows | 1;
            const View piece{reinterpret_cast<void*>(256),
                             static_cast<Dtype>(dtype),
                             {batch, rows},
                             {stride, 1}};
            const View out{nullptr, Dtype::kF32, {batch, cols}, {cols, 1}};
            const Call call{
                {static_cast<Kind>(kind), 0, 0, block_log2}, row_offset, 1.0, false, terms};
            return plan_dict(device, project_call(piece, out, call, variant));
        },
        py::arg("batch"), py::arg("rows"), py::arg("cols"), py::arg("dtype"), py::arg("kind"),
        py::arg("terms"), py::arg("arch"), py::arg("multiprocessors"), py::arg("aligned") = true,
        py::arg("variant") = "auto", py::arg("row_offset") = 0, py::arg("block_log2") = 0,
        "What a call of this shape would use: a pure function, for any architecture.");
    m.def(
        "project_workspace",
        [](int device, const std::vector<View>& pieces, const View& out, Call call,
           const std::string& variant) {
            const DeviceInfo info = device_info(device);
            std::int64_t most = 0;
            for (const View& piece : pieces) {
                const ProjectCall one = project_call(piece, out, call, variant);
                most = std::max(most, plan_project(info, one).workspace_bytes);
                call.row_offset += one.rows;
            }
            return most;
        },
        "Bytes of workspace that project() needs for these pieces.");
    m.def(
        "project",
        [](int device, std::uintptr_t cuda_stream, const std::vector<View>& pieces, const View& out,
           Call call, const std::string& variant, std::uintptr_t workspace,
           std::int64_t workspace_bytes) {
            for (const View& piece : pieces) {
                const ProjectCall one = project_call(piece, out, call, variant);
                project(device, reinterpret_cast<void*>(cuda_stream), one,
                        reinterpret_cast<void*>(workspace), workspace_bytes);
                call.row_offset += one.rows;
                call.accumulate = true;
            }
        },
        unlocked, "out (+)= scale * G @ R on a stream: returns once the kernels are queued.");
    m.def(
        "project_transpose",
        [](int device, std::uintptr_t cuda_stream, const View& y, const View& out, const Call& call,
           const std::string& variant) {
            project_transpose(
                device, reinterpret_cast<void*>(cuda_stream),
                {call, y.data, y.dtype, y.shape[0], y.shape[1], y.stride[0], y.stride[1], out.data,
                 out.shape[1], out.stride[0], out.stride[1], variant_of(variant)});
        },
        unlocked, "out = scale * y @ R.T on a stream.");
    m.def(
        "matrix",
        [](int device, std::uintptr_t cuda_stream, const View& out, const Call& call,
           std::int64_t col_offset) {
            matrix(device, reinterpret_cast<void*>(cuda_stream),
                   {call, out.data, out.dtype, out.shape[0], out.shape[1], out.stride[0],
                    out.stride[1], col_offset});
        },
        unlocked, "A block of R on a stream.");
}
