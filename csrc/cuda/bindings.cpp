// fastproj._cuda: raw pointers, shapes, strides and a stream handle in; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "launch.hpp"

namespace py = pybind11;

namespace {

using namespace fastproj;
using namespace fastproj::cuda;

using Key = std::tuple<int, std::uint64_t, std::uint32_t>;  // kind, seed, stream
// Address, rows, stride over samples, stride over rows.
using Piece = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;

Variant variant_of(const std::string& name) {
    for (const Variant v : {Variant::kAuto, Variant::kSimple, Variant::kSm80, Variant::kSm90}) {
        if (name == variant_name(v)) return v;
    }
    throw py::value_error("variant: received '" + name + "'; expected auto, simple, sm80 or sm90");
}

ProjectCall project_call(const Piece& piece, int dtype, std::int64_t batch, std::uintptr_t out,
                         std::int64_t cols, std::int64_t out_stride_b, std::int64_t out_stride_k,
                         const Key& key, std::int64_t row_offset, double scale, bool accumulate,
                         int terms, const std::string& variant) {
    ProjectCall call;
    call.grads = reinterpret_cast<const void*>(std::get<0>(piece));
    call.rows = std::get<1>(piece);
    call.stride_b = std::get<2>(piece);
    call.stride_p = std::get<3>(piece);
    call.dtype = static_cast<Dtype>(dtype);
    call.batch = batch;
    call.out = reinterpret_cast<void*>(out);
    call.cols = cols;
    call.out_stride_b = out_stride_b;
    call.out_stride_k = out_stride_k;
    call.kind = static_cast<Kind>(std::get<0>(key));
    call.seed = std::get<1>(key);
    call.stream = std::get<2>(key);
    call.row_offset = row_offset;
    call.scale = scale;
    call.accumulate = accumulate;
    call.terms = terms;
    call.variant = variant_of(variant);
    return call;
}

py::dict plan_dict(const DeviceInfo& device, const ProjectCall& call) {
    const Plan plan = plan_project(device, call);
    py::dict facts;
    facts["variant"] = variant_name(plan.variant);
    facts["terms"] = plan.key.terms;
    facts["BLOCK_B"] = plan.key.block_b;
    if (plan.variant == Variant::kSimple) {
        facts["BLOCK_K"] = 64;
    } else {
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
           std::int64_t row_offset) {
            DeviceInfo device{arch / 10, arch % 10, multiprocessors, arch == 90};
            // Only the address modulo 16 matters: an odd row stride stands for what is not aligned.
            const Piece piece{256, rows, aligned ? ceil_div(rows, 8) * 8 : rows | 1, 1};
            return plan_dict(device,
                             project_call(piece, dtype, batch, 0, cols, cols, 1, Key{kind, 0, 0},
                                          row_offset, 1.0, false, terms, variant));
        },
        py::arg("batch"), py::arg("rows"), py::arg("cols"), py::arg("dtype"), py::arg("kind"),
        py::arg("terms"), py::arg("arch"), py::arg("multiprocessors"), py::arg("aligned") = true,
        py::arg("variant") = "auto", py::arg("row_offset") = 0,
        "What a call of this shape would use: a pure function, for any architecture.");
    m.def(
        "project_workspace",
        [](int device, const std::vector<Piece>& pieces, int dtype, std::int64_t batch,
           std::int64_t cols, int kind, std::int64_t row_offset, int terms,
           const std::string& variant) {
            const DeviceInfo info = device_info(device);
            std::int64_t most = 0;
            for (const Piece& piece : pieces) {
                const ProjectCall call =
                    project_call(piece, dtype, batch, 0, cols, cols, 1, Key{kind, 0, 0}, row_offset,
                                 1.0, false, terms, variant);
                most = std::max(most, plan_project(info, call).workspace_bytes);
                row_offset += call.rows;
            }
            return most;
        },
        "Bytes of workspace that project() needs for these pieces.");
    m.def(
        "project",
        [](int device, std::uintptr_t stream, const std::vector<Piece>& pieces, int dtype,
           std::int64_t batch, std::uintptr_t out, std::int64_t cols, std::int64_t out_stride_b,
           std::int64_t out_stride_k, const Key& key, std::int64_t row_offset, double scale,
           bool accumulate, int terms, const std::string& variant, std::uintptr_t workspace,
           std::int64_t workspace_bytes) {
            for (const Piece& piece : pieces) {
                const ProjectCall call =
                    project_call(piece, dtype, batch, out, cols, out_stride_b, out_stride_k, key,
                                 row_offset, scale, accumulate, terms, variant);
                project(device, reinterpret_cast<void*>(stream), call,
                        reinterpret_cast<void*>(workspace), workspace_bytes);
                row_offset += call.rows;
                accumulate = true;
            }
        },
        py::call_guard<py::gil_scoped_release>(),
        "out (+)= scale * G @ R on a stream: returns once the kernels are queued.");
    m.def(
        "project_transpose",
        [](int device, std::uintptr_t stream, std::uintptr_t y, int dtype, std::int64_t batch,
           std::int64_t cols, std::int64_t y_stride_b, std::int64_t y_stride_k, std::uintptr_t out,
           std::int64_t rows, std::int64_t out_stride_b, std::int64_t out_stride_p, const Key& key,
           std::int64_t row_offset, double scale, int terms, const std::string& variant) {
            TransposeCall call;
            call.y = reinterpret_cast<const void*>(y);
            call.dtype = static_cast<Dtype>(dtype);
            call.batch = batch;
            call.cols = cols;
            call.y_stride_b = y_stride_b;
            call.y_stride_k = y_stride_k;
            call.out = reinterpret_cast<void*>(out);
            call.rows = rows;
            call.out_stride_b = out_stride_b;
            call.out_stride_p = out_stride_p;
            call.kind = static_cast<Kind>(std::get<0>(key));
            call.seed = std::get<1>(key);
            call.stream = std::get<2>(key);
            call.row_offset = row_offset;
            call.scale = scale;
            call.terms = terms;
            call.variant = variant_of(variant);
            project_transpose(device, reinterpret_cast<void*>(stream), call);
        },
        py::call_guard<py::gil_scoped_release>(), "out = scale * y @ R.T on a stream.");
    m.def(
        "matrix",
        [](int device, std::uintptr_t stream, std::uintptr_t out, int dtype, std::int64_t rows,
           std::int64_t cols, std::int64_t stride_n, std::int64_t stride_m, const Key& key,
           std::int64_t row_offset, std::int64_t col_offset) {
            MatrixCall call;
            call.out = reinterpret_cast<void*>(out);
            call.dtype = static_cast<Dtype>(dtype);
            call.rows = rows;
            call.cols = cols;
            call.stride_n = stride_n;
            call.stride_m = stride_m;
            call.kind = static_cast<Kind>(std::get<0>(key));
            call.seed = std::get<1>(key);
            call.stream = std::get<2>(key);
            call.row_offset = row_offset;
            call.col_offset = col_offset;
            matrix(device, reinterpret_cast<void*>(stream), call);
        },
        py::call_guard<py::gil_scoped_release>(), "A block of R on a stream.");
}
