// Threads, and the memory that each works in. Included by the operations; local to each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "team.hpp"

namespace fastproj::cpu {
namespace {

constexpr std::size_t kAlignment = 64;

template <class T>
struct FreeAligned {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t{kAlignment}); }
};

template <class T>
std::unique_ptr<T[], FreeAligned<T>> allocate_aligned(std::size_t count) {
    return std::unique_ptr<T[], FreeAligned<T>>(static_cast<T*>(::operator new[](
        std::max<std::size_t>(count, 1) * sizeof(T), std::align_val_t{kAlignment})));
}

// `count` numbers for each thread, aligned; not initialised.
template <class T>
class PerThread {
  public:
    PerThread(std::size_t count, int num_threads)
        : count_((count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment / sizeof(T)),
          all_(allocate_aligned<T>(count_ * static_cast<std::size_t>(num_threads))) {}
    T* operator[](int worker) const {
        return all_.get() + count_ * static_cast<std::size_t>(worker);
    }

  private:
    std::size_t count_;
    std::unique_ptr<T[], FreeAligned<T>> all_;
};

// Runs task(i, worker) for i < tasks on up to num_threads threads, the calling one included: those
// of torch's pool. Its threads spin for a while after each operation of torch, and threads of our
// own would have to share their cores. Where there is no pool, threads live for one call.
template <class Task>
void parallel_for(std::int64_t tasks, int num_threads, const Task& task) {
    const std::int64_t workers = std::min<std::int64_t>(num_threads, tasks);
    std::atomic<std::int64_t> next{0};
    const auto work = [&](int worker) {
        for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            task(i, worker);
        }
    };
    if (workers <= 1) {
        work(0);
        return;
    }
    std::atomic<int> arrived{0};
    auto join_in = [&] {
        const int worker = arrived.fetch_add(1, std::memory_order_relaxed);
        if (worker < workers) work(worker);
    };
    using JoinIn = decltype(join_in);
    if (on_team([](void* data) { (*static_cast<JoinIn*>(data))(); }, &join_in)) return;
    std::vector<std::thread> threads;
    try {
        for (int worker = 1; worker < workers; ++worker) threads.emplace_back(work, worker);
    } catch (const std::system_error&) {
        // No more threads to be had: those there are, and this one, do the work.
    }
    work(0);
    for (auto& thread : threads) thread.join();
}

// For a product of [batch, rows] with R [rows, cols]; batch 0 for R alone. A thread costs some 20
// us to start: give each at least ten times that.
inline int threads_for(std::int64_t batch, std::int64_t rows, std::int64_t cols, int num_threads) {
    constexpr double kOperationsPerThread = 2e7;
    const double operations =
        static_cast<double>(rows) * static_cast<double>(cols) * (8.0 + static_cast<double>(batch));
    return static_cast<int>(std::clamp(operations / kOperationsPerThread, 1.0,
                                       static_cast<double>(std::max(num_threads, 1))));
}

}  // namespace
}  // namespace fastproj::cpu
