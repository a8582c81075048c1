// Bare loops of wgmma with A from registers, and how many clusters of two blocks a GPU holds at
// once.
//
// The tensor cores of one multiprocessor take 64 x N x 16 products in N / 2 clocks, if published
// rates hold for A from registers too. A loop here is the consumer's of csrc/cuda/project_sm90.cuh
// without barriers and Philox: two warpgroups, two tiles each, four products in a group; `made`
// writes the 16 registers of a tile anew each time, by a shift and a logic operation.
//
//   nvcc -std=c++17 -O3 -I csrc -gencode=arch=compute_90a,code=sm_90a bench/wgmma_rate.cu -o rate
//   ./rate DEVICE SHARED_BYTES      one line of JSON
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/wgmma.cuh"

namespace fastproj::cuda {

constexpr int kRateThreads = 256;  // two warpgroups
constexpr int kTurns = 2048;       // of the loop
constexpr int kUnroll = 8;         // pairs of tiles in a turn: shifts are constants
constexpr int kProducts = 2 * kUnroll * 4;

template <int N, bool kMade>
__global__ void __launch_bounds__(kRateThreads, 1)
    rate_kernel(std::uint32_t mask, int turns, long long* clocks, float* sink) {
#if FASTPROJ_SM90A
    const std::uint32_t base = shared_base();
    for (int i = threadIdx.x; i < N * 128 / 4; i += kRateThreads) store_shared(base + 4 * i, 0);
    fence_proxy_async();
    const std::uint64_t descriptor = wgmma_descriptor(base);
    float acc[2][N / 2];
    std::uint32_t a[2][4][4];
    std::uint32_t word = opaque(threadIdx.x * 0x9e3779b9u);
    for (int m = 0; m < 2; ++m) {
        for (int i = 0; i < N / 2; ++i) acc[m][i] = 0.0f;
        for (int i = 0; i < 16; ++i) a[m][i / 4][i % 4] = word * (32 * m + 2 * i + 3);
    }
    __syncthreads();
    const long long start = clock64();
    int turn = 0;
    do {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                wgmma_wait<1>();  // this tile's last products; the other's run
                if constexpr (kMade) {
                    word = word * 0x9e3779b9u + mask;  // another one for each tile
#pragma unroll
                    for (int i = 0; i < 16; ++i) {
                        a[m][i / 4][i % 4] = and_xor(word << i, mask, 0x3f803f80u);
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    wgmma_m64k16<Bf16, N>(acc[m], a[m][k], wgmma_advance<true>(descriptor, 32 * k),
                                          1);
                }
                wgmma_commit();
            }
        }
    } while (++turn < turns);
    wgmma_wait<0>();
    __syncthreads();
    const long long stop = clock64();
    if (threadIdx.x == 0) clocks[blockIdx.x] = stop - start;
    float sum = 0.0f;
    for (int m = 0; m < 2; ++m) {
        for (int i = 0; i < N / 2; ++i) sum += acc[m][i];
    }
    sink[blockIdx.x * kRateThreads + threadIdx.x] = sum;
#endif
}

__global__ void __launch_bounds__(384, 1) cluster_kernel() {}

void check(cudaError_t code, const char* what) {
    if (code == cudaSuccess) return;
    std::fprintf(stderr, "%s failed: %s, %s\n", what, cudaGetErrorName(code),
                 cudaGetErrorString(code));
    std::exit(1);
}

struct Buffers {
    int blocks;
    long long* clocks;
    float* sink;
};

// Clocks of a multiprocessor for one product of 64 x N x 16.
template <int N, bool kMade>
double rate(const Buffers& buffers) {
    for (int i = 0; i < 2; ++i) {  // the first warms up
        rate_kernel<N, kMade><<<buffers.blocks, kRateThreads, N * 128>>>(
            0x80008000u, kTurns, buffers.clocks, buffers.sink);
        check(cudaGetLastError(), "launch");
    }
    check(cudaDeviceSynchronize(), "rate_kernel");
    std::vector<long long> clocks(buffers.blocks);
    check(cudaMemcpy(clocks.data(), buffers.clocks, clocks.size() * sizeof(long long),
                     cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    std::nth_element(clocks.begin(), clocks.begin() + clocks.size() / 2, clocks.end());
    return static_cast<double>(clocks[clocks.size() / 2]) / (2.0 * kTurns * kProducts);
}

int clusters(int shared_bytes) {
    check(cudaFuncSetAttribute(cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes),
          "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 2;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(2);
    config.blockDim = dim3(384);
    config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    check(cudaOccupancyMaxActiveClusters(&count, cluster_kernel, &config),
          "cudaOccupancyMaxActiveClusters");
    return count;
}

}  // namespace fastproj::cuda

int main(int argc, char** argv) {
    using namespace fastproj::cuda;
    const int device = argc > 1 ? std::atoi(argv[1]) : 0;
    const int shared_bytes = argc > 2 ? std::atoi(argv[2]) : 227 * 1024;
    check(cudaSetDevice(device), "cudaSetDevice");
    Buffers buffers{};
    check(cudaDeviceGetAttribute(&buffers.blocks, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    check(cudaMalloc(&buffers.clocks, buffers.blocks * sizeof(long long)), "cudaMalloc");
    check(cudaMalloc(&buffers.sink, buffers.blocks * kRateThreads * sizeof(float)), "cudaMalloc");
    std::printf(
        "{\"multiprocessors\": %d, \"clusters\": %d, "
        "\"bare\": {\"16\": %.3f, \"32\": %.3f, \"64\": %.3f}, "
        "\"made\": {\"16\": %.3f, \"32\": %.3f, \"64\": %.3f}}\n",
        buffers.blocks, clusters(shared_bytes), rate<16, false>(buffers), rate<32, false>(buffers),
        rate<64, false>(buffers), rate<16, true>(buffers), rate<32, true>(buffers),
        rate<64, true>(buffers));
    return 0;
}
