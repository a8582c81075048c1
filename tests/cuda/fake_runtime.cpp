// csrc/cuda/launch.cu on a machine without a GPU: a stand-in for the CUDA runtime and the driver
// that knows, for each thread, whether a context is bound. As documented: cudaSetDevice binds the
// primary context, cudaGetDevice does not; kernels and their attributes bind the one of the current
// device; cuTensorMapEncodeTiled fails where none is bound. What may load a kernel is refused, as
// in a stream capture, unless the thread has relaxed its mode. Writes down the calls in their
// order. A C interface for ctypes (tests/cuda/test_context.py).
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "cuda/launch.hpp"
#include "cuda/simple.hpp"

namespace {

constexpr int kOld = 7;  // a device of compute capability 7.5; all others are of 9.0

thread_local int device = 0;  // of the thread
thread_local int bound = -1;  // whose context is bound to the thread
thread_local std::string calls;
thread_local bool shows_shared = false;
thread_local int allowed = 0;  // shared memory of the kernel that was last prepared
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
// What asking for a kernel's attributes answers, the next time and later.
thread_local cudaError_t loading[2] = {cudaSuccess, cudaSuccess};

cudaError_t note(const std::string& call) {
    calls += call + "\n";
    return cudaSuccess;
}

// Of a call that may load a kernel.
cudaError_t may_load() {
    bound = device;
    return mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

CUresult encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    note("encode on " + std::to_string(bound));
    return bound < 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* out) {
    *out = device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int chosen) {
    device = bound = chosen;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 2;
    return cudaSuccess;
}
// Before 13.0 a macro of the headers gives it a suffix, here too.
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int which) {
    *properties = cudaDeviceProp{};
    std::strcpy(properties->name, "stand-in");
    properties->major = which == kOld ? 7 : 9;
    properties->minor = which == kOld ? 5 : 0;
    properties->multiProcessorCount = 132;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    if (const cudaError_t refused = may_load()) return refused;
    attributes->maxThreadsPerBlock = 1024;
    const cudaError_t answer = loading[0];
    loading[0] = loading[1];
    return answer;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
    allowed = value;
    return may_load();
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
    if (const cudaError_t refused = may_load()) return refused;
    if (config->dynamicSmemBytes > static_cast<std::size_t>(allowed)) return cudaErrorInvalidValue;
    if (shows_shared) {
        note("shared memory " + std::to_string(config->dynamicSmemBytes) + " of " +
             std::to_string(allowed));
    }
    return note("launch on " + std::to_string(bound));
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
    std::swap(mode, *other);
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorUnknown"; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *entry = reinterpret_cast<void*>(&encode);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

}  // extern "C"

namespace fastproj::cuda {

// Kernels that never run: all that a launch needs of them.
namespace {
const char code = 0;
Kernel any_kernel() {
    Kernel kernel;
    kernel.entry = &code;
    kernel.threads = 1024;
    kernel.columns = 256;
    return kernel;
}
}  // namespace
Kernel find_sm90_rademacher(const KernelKey&) { return any_kernel(); }
Kernel find_sm90_rademacher_split(const KernelKey&) { return any_kernel(); }
Kernel find_sm90_gaussian(const KernelKey&) { return any_kernel(); }
Kernel find_sm90_gaussian_split(const KernelKey&) { return any_kernel(); }
Kernel find_sm80_rademacher(const KernelKey&) { return any_kernel(); }
Kernel find_sm80_rademacher_split(const KernelKey&) { return any_kernel(); }
Kernel find_sm80_gaussian(const KernelKey&) { return any_kernel(); }
Kernel find_sm80_gaussian_split(const KernelKey&) { return any_kernel(); }
Kernel simple_kernel(SimpleKernel, Kind) { return any_kernel(); }
Kernel transpose_kernel(Kind, int) { return any_kernel(); }
const void* sjlt_f32_kernel(const SjltKey&) { return &code; }
const void* sjlt_bf16_kernel(const SjltKey&) { return &code; }
const void* sjlt_f16_kernel(const SjltKey&) { return &code; }
const void* sjlt_f64_kernel(const SjltKey&) { return &code; }
Kernel sjlt_transpose_kernel(bool) { return any_kernel(); }
Kernel sjlt_matrix_kernel() { return any_kernel(); }

}  // namespace fastproj::cuda

// Whether the calling thread can load its next kernel and later ones: 0, or what goes wrong.
extern "C" void fake_loading(int next, int later) {
    loading[0] = static_cast<cudaError_t>(next);
    loading[1] = static_cast<cudaError_t>(later);
}

// One call of the calling thread on `where`; `text` gets its trace, or what it threw. Ends with the
// device that the thread is left with.
extern "C" int fake_call(const char* what, int dtype, int where, char* text, int length) {
    using namespace fastproj;
    using namespace fastproj::cuda;
    calls.clear();
    int code = 0;
    try {
        const std::string name = what;
        shows_shared = name.rfind("sjlt", 0) == 0;
        if (name == "project" || shows_shared) {
            ProjectCall call{};
            if (shows_shared) {
                call.key.kind = Kind::kSjlt;
                call.key.block_log2 = name == "sjlt large" ? 10 : 6;
            }
            call.grads = reinterpret_cast<const void*>(std::uintptr_t{256});
            call.dtype = static_cast<Dtype>(dtype);
            call.batch = call.cols = 64;
            call.rows = call.stride_b = call.out_stride_b = 512;
            call.out = reinterpret_cast<void*>(std::uintptr_t{256});
            project(where, nullptr, call, nullptr, std::int64_t{1} << 40);
        } else if (name == "project_transpose") {
            TransposeCall call{};
            call.dtype = static_cast<Dtype>(dtype);
            call.batch = call.cols = call.rows = 64;
            project_transpose(where, nullptr, call);
        } else if (name == "matrix") {
            MatrixCall call{};
            call.rows = call.cols = 64;
            matrix(where, nullptr, call);
        } else {
            throw std::invalid_argument("no such call: " + name);
        }
    } catch (const std::exception& error) {
        note(error.what());
        code = 1;
    }
    if (mode != cudaStreamCaptureModeGlobal) note("the capture mode stays changed");
    note("left on " + std::to_string(device));
    std::snprintf(text, length, "%s", calls.c_str());
    return code;
}
