// What the bindings see of the CUDA side: no CUDA headers, no torch, raw pointers and the handle of
// a CUDA stream. Every function throws std::runtime_error with the failing call and its place. None
// synchronises or allocates.
#pragma once

#include <string>
#include <vector>

#include "run.hpp"

namespace fastproj::cuda {

struct Gpu {
    std::string name;
    DeviceInfo info;
    std::string problem;  // why our code can't run there, or empty
};

// How many GPUs; 0, with the reason in `problem`, on a machine without one or without a driver.
int count_gpus(std::string& problem);
// What one GPU is. The first time, it makes a context there, which takes hundreds of megabytes.
const Gpu& gpu_at(int device);

// Toolkit that compiled this, e.g. 13000.
int toolkit_version();
// Architectures compiled in, e.g. "80, 90".
std::string compiled_architectures();

DeviceInfo device_info(int device);
Kernel find_kernel(Variant variant, const KernelKey& key);

// `cuda_stream` is a cudaStream_t of `device`.
void project(int device, void* cuda_stream, const ProjectCall& call, void* workspace,
             std::int64_t workspace_bytes);
void project_transpose(int device, void* cuda_stream, const TransposeCall& call);
void matrix(int device, void* cuda_stream, const MatrixCall& call);

}  // namespace fastproj::cuda
