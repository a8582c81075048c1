// Launches, with their device and capture guards, tensor maps and checks. See launch.hpp.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>

#include "launch.hpp"
#include "simple.hpp"

namespace fastproj::cuda {

static_assert(sizeof(CUtensorMap) == 128, "as TensorMap in device.cuh");

namespace {

void check(cudaError_t code, const std::string& what) {
    if (code != cudaSuccess) {
        throw std::runtime_error("fastproj._cuda: " + what + " failed: " + cudaGetErrorName(code) +
                                 ", " + cudaGetErrorString(code));
    }
}

// Binds the device's primary context to the calling thread; the device that the thread had is
// current again at the end. The driver's own calls (cuTensorMapEncodeTiled) need a context that is
// bound, and only cudaSetDevice is sure to bind one: a thread that has not used CUDA yet reads
// device 0 from cudaGetDevice and has no context.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : device_(device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    }
    ~DeviceGuard() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int device_, before_ = 0;
};

// What asks for a kernel's attributes, or launches it, may load it, which a stream capture would
// refuse.
class RelaxedCapture {
  public:
    RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver is found at run time: the module loads where there is none.
EncodeTiled encode_tiled() {
    static const EncodeTiled found = []() {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                               cudaEnableDefault, &result),
              "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
#else
        check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result),
              "cudaGetDriverEntryPoint(cuTensorMapEncodeTiled)");
#endif
        if (entry == nullptr || result != cudaDriverEntryPointSuccess) {
            throw std::runtime_error(
                "fastproj._cuda: this driver has no cuTensorMapEncodeTiled; update it to one for "
                "CUDA 12 or newer");
        }
        return reinterpret_cast<EncodeTiled>(entry);
    }();
    return found;
}

CUtensorMap encode(const BoxSource& source) {
    CUtensorMap map{};
    if (source.base == nullptr) return map;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(source.rows),
                                 static_cast<cuuint64_t>(source.batch)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(source.stride_bytes)};
    const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(source.box_samples)};
    const cuuint32_t steps[2] = {1, 1};
    // Zero fill and no arithmetic: the bits may be bf16, fp16 or fp32.
    const bool wide = source.element_bytes == 4;
    const CUresult code = encode_tiled()(
        &map, wide ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
        const_cast<void*>(source.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        wide ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) {
        throw std::runtime_error("fastproj._cuda: cuTensorMapEncodeTiled failed with code " +
                                 std::to_string(static_cast<int>(code)) + " for grads [" +
                                 std::to_string(source.batch) + ", " + std::to_string(source.rows) +
                                 "] with a row stride of " + std::to_string(source.stride_bytes) +
                                 " bytes");
    }
    return map;
}

const void* find_sjlt_kernel(const SjltKey& key) {
    switch (key.dtype) {
        case Dtype::kF32:
            return sjlt_f32_kernel(key);
        case Dtype::kBf16:
            return sjlt_bf16_kernel(key);
        case Dtype::kF16:
            return sjlt_f16_kernel(key);
        default:
            return sjlt_f64_kernel(key);
    }
}

class CudaLauncher {
  public:
    CudaLauncher(int device, void* cuda_stream)
        : info(device_info(device)),
          guard_(device),
          cuda_stream_(static_cast<cudaStream_t>(cuda_stream)) {}

    const DeviceInfo info;

    Kernel find(Variant variant, const KernelKey& key) { return find_kernel(variant, key); }

    void launch_sm90(const Kernel& kernel, int grid, int cluster, const BoxSource& source,
                     const ProjectParams& params) {
        CUtensorMap map = encode(source);
        ProjectParams p = params;
        void* arguments[] = {&map, &p};
        launch("project sm90", kernel, grid, cluster, arguments);
    }
    void launch_sm80(const Kernel& kernel, int grid, const ProjectParams& params) {
        one("project sm80", kernel, grid, params);
    }
    void project_simple(Kind kind, const SimpleParams& p) {
        const std::int64_t items =
            static_cast<std::int64_t>(p.col_tiles) * p.splits * p.batch_tiles;
        one("project simple", simple_kernel(SimpleKernel::kProject, kind), grid(items), p);
    }
    void reduce(bool simple, const ReduceParams& p) {
        const auto which = simple ? SimpleKernel::kReduceDouble : SimpleKernel::kReduceFloat;
        const std::int64_t count = static_cast<std::int64_t>(p.batch) * p.cols;
        one("reduce", simple_kernel(which, Kind::kRademacher), grid(ceil_div(count, 256)), p);
    }
    void project_sjlt(const SjltPlan& plan, const SjltParams& p) {
        const Kernel kernel{find_sjlt_kernel(plan.key), plan.threads, plan.shared_bytes};
        const std::int64_t items =
            static_cast<std::int64_t>(p.col_tiles) * p.splits * p.batch_tiles;
        // A kernel serves calls of many sizes, of other threads and in one capture too. So each
        // allows the most: none lowers what another is about to launch with.
        one("project sjlt", kernel, grid(items), p, shared_limit(info.major, info.minor));
    }
    void transpose_sjlt(bool in_double, const SjltTransposeParams& p) {
        one("project_transpose sjlt", sjlt_transpose_kernel(in_double),
            grid(ceil_div(p.chunks, 64) * p.batch_tiles), p);
    }
    void matrix(Kind kind, const MatrixParams& p) {
        if (kind == Kind::kSjlt) {
            return one("matrix sjlt", sjlt_matrix_kernel(), grid(ceil_div(p.cols * p.blocks, 256)),
                       p);
        }
        one("matrix", simple_kernel(SimpleKernel::kMatrix, kind),
            grid(ceil_div(p.cols, 64) * p.blocks), p);
    }
    void transpose80(Kind kind, int terms, const TransposeParams& p) {
        one("project_transpose sm80", transpose_kernel(kind, terms), grid(p.panels * p.batch_tiles),
            p);
    }
    void transpose_simple(Kind kind, const TransposeParams& p) {
        one("project_transpose simple", simple_kernel(SimpleKernel::kTranspose, kind),
            grid(p.panels * p.batch_tiles), p);
    }

  private:
    // Blocks take several items where there are more items than fill the device a few times.
    int grid(std::int64_t items) const {
        return static_cast<int>(
            std::min<std::int64_t>(items, std::int64_t{16} * info.multiprocessors));
    }
    template <class Params>
    void one(const char* what, const Kernel& kernel, int blocks, const Params& params,
             int allowed = 0) {
        Params p = params;
        void* arguments[] = {&p};
        launch(what, kernel, blocks, 0, arguments, allowed);
    }
    // cluster 0: a kernel that knows no clusters. allowed: bytes of shared memory that its launches
    // may have, where that is more than this one has; the attribute belongs to the kernel.
    void launch(const char* what, const Kernel& kernel, int blocks, int cluster, void** arguments,
                int allowed = 0) {
        const std::string where = std::string(what) + " (" + std::to_string(blocks) +
                                  " blocks of " + std::to_string(kernel.threads) + " threads, " +
                                  std::to_string(kernel.shared_bytes) + " bytes of shared memory)";
        if (kernel.entry == nullptr)
            throw std::logic_error(where + ": no such kernel was compiled");
        // Set even where the default would do: this loads the kernel, or else the launch does.
        RelaxedCapture relaxed;
        check(cudaFuncSetAttribute(kernel.entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   std::max(allowed, kernel.shared_bytes)),
              "setting the shared memory of " + where);
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
        config.dynamicSmemBytes = static_cast<std::size_t>(kernel.shared_bytes);
        config.stream = cuda_stream_;
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
        attribute.val.clusterDim.y = 1;
        attribute.val.clusterDim.z = 1;
        config.attrs = &attribute;
        config.numAttrs = cluster > 0 ? 1 : 0;
        check(cudaLaunchKernelExC(&config, kernel.entry, arguments), "launch of " + where);
    }

    DeviceGuard guard_;
    cudaStream_t cuda_stream_;
};

// Whether there is code of a kernel for the current GPU. Memory that is full says nothing of that,
// and is not to be remembered: it is thrown.
bool loads(const Kernel& kernel, cudaFuncAttributes& attributes) {
    const cudaError_t code = cudaFuncGetAttributes(&attributes, kernel.entry);
    cudaGetLastError();
    if (code == cudaErrorMemoryAllocation) check(code, "loading a kernel");
    return code == cudaSuccess;
}

Gpu inspect(int device) {
    Gpu gpu;
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device),
          "cudaGetDeviceProperties(" + std::to_string(device) + ")");
    gpu.name = properties.name;
    gpu.info.major = properties.major;
    gpu.info.minor = properties.minor;
    gpu.info.multiprocessors = properties.multiProcessorCount;
    const std::string arch = std::to_string(gpu.info.major) + std::to_string(gpu.info.minor);
    if (gpu.info.major < 8) {
        gpu.problem = "fastproj._cuda takes GPUs from sm_80 on, " + gpu.name + " is sm_" + arch +
                      "; use backend=\"reference\"";
        return gpu;
    }
    DeviceGuard guard(device);
    RelaxedCapture relaxed;
    cudaFuncAttributes attributes{};
    const Kernel any = simple_kernel(SimpleKernel::kReduceFloat, Kind::kRademacher);
    if (!loads(any, attributes)) {
        gpu.problem = "fastproj._cuda was built for " + compiled_architectures() + ", " + gpu.name +
                      " is " + arch + "; reinstall with FASTPROJ_CUDA_ARCHS=" + arch;
        return gpu;
    }
    // Without code for sm_90a the kernel is empty and compiled for one thread (device.cuh).
    const Kernel ninety = find_sm90_rademacher(KernelKey{Kind::kRademacher, true, 1, 16});
    if (gpu.info.major == 9 && loads(ninety, attributes)) {
        gpu.info.sm90a = attributes.maxThreadsPerBlock >= ninety.threads;
    }
    return gpu;
}

}  // namespace

// Looked at once: properties and attributes cost more than a launch.
const Gpu& gpu_at(int device) {
    static std::mutex mutex;
    static std::vector<std::unique_ptr<Gpu>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    if (device >= static_cast<int>(known.size())) known.resize(device + 1);
    if (!known[device]) known[device] = std::make_unique<Gpu>(inspect(device));
    return *known[device];
}

int count_gpus(std::string& problem) {
    int count = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    problem.clear();
    if (code != cudaSuccess || count == 0) {
        cudaGetLastError();
        int driver = 0;
        if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
        auto release = [](int version) {
            return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
        };
        if (code == cudaErrorInsufficientDriver && driver != 0) {
            problem = "the driver is for CUDA " + release(driver) + ", this module for " +
                      release(CUDART_VERSION);
        } else if (driver == 0) {
            problem = "no NVIDIA driver";
        } else {
            problem = code == cudaSuccess ? "no GPU" : cudaGetErrorString(code);
        }
        return 0;
    }
    return count;
}

int toolkit_version() { return CUDART_VERSION; }

std::string compiled_architectures() {
#if defined(__CUDA_ARCH_LIST__)
    const int list[] = {__CUDA_ARCH_LIST__};
    std::string text;
    for (const int arch : list) text += (text.empty() ? "" : ", ") + std::to_string(arch / 10);
    return text;
#else
    return "unknown";
#endif
}

DeviceInfo device_info(int device) {
    const Gpu& gpu = gpu_at(device);
    if (!gpu.problem.empty()) throw std::runtime_error(gpu.problem);
    return gpu.info;
}

Kernel find_kernel(Variant variant, const KernelKey& key) {
    using Find = Kernel (*)(const KernelKey&);
    const Find sm90[] = {find_sm90_rademacher, find_sm90_rademacher_split, find_sm90_gaussian,
                         find_sm90_gaussian_split};
    const Find sm80[] = {find_sm80_rademacher, find_sm80_rademacher_split, find_sm80_gaussian,
                         find_sm80_gaussian_split};
    for (const Find find : variant == Variant::kSm90 ? sm90 : sm80) {
        const Kernel kernel = find(key);
        if (kernel.entry != nullptr) return kernel;
    }
    throw std::logic_error("fastproj._cuda: the plan names a kernel that is not compiled");
}

void project(int device, void* cuda_stream, const ProjectCall& call, void* workspace,
             std::int64_t workspace_bytes) {
    CudaLauncher launcher(device, cuda_stream);
    run_project(launcher, launcher.info, call, workspace, workspace_bytes);
}

void project_transpose(int device, void* cuda_stream, const TransposeCall& call) {
    CudaLauncher launcher(device, cuda_stream);
    run_transpose(launcher, call);
}

void matrix(int device, void* cuda_stream, const MatrixCall& call) {
    CudaLauncher launcher(device, cuda_stream);
    run_matrix(launcher, call);
}

}  // namespace fastproj::cuda
