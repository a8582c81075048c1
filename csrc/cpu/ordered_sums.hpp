// Sums over segments that threads make in any order, added in the order of the segments. Included
// by the operations; local to each.
#pragma once

#include <mutex>
#include <utility>

#include "parallel.hpp"

namespace fastproj::cpu {
namespace {

// Sums of `units` parts of an output, each the sum over `segments` of P. A segment that is ready
// before its turn waits; no thread does. Threads take segments in order, so a few buffers are alive
// at a time, and they are used again: fresh memory costs more than the sums themselves.
class OrderedSums {
  public:
    using Buffer = std::unique_ptr<double[], FreeAligned<double>>;

    OrderedSums(std::int64_t units, std::int64_t segments, std::int64_t count)
        : segments_(segments),
          count_(static_cast<std::size_t>(count)),
          units_(static_cast<std::size_t>(units)),
          ready_(static_cast<std::size_t>(units * segments)) {}

    // A buffer of `count` numbers, not initialised.
    Buffer take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (unused_.empty()) {
            unused_.reserve(++buffers_);  // so that giving one back never fails
            return allocate_aligned<double>(count_);
        }
        Buffer buffer = std::move(unused_.back());
        unused_.pop_back();
        return buffer;
    }

    void give(Buffer buffer) {
        const std::lock_guard<std::mutex> lock(mutex_);
        unused_.push_back(std::move(buffer));
    }

    // Returns the unit's whole sum to the caller that completes it, null to all others.
    Buffer add(std::int64_t unit, std::int64_t segment, Buffer buffer) {
        Unit& to = units_[static_cast<std::size_t>(unit)];
        Buffer* ready = &ready_[static_cast<std::size_t>(unit * segments_)];
        std::unique_lock<std::mutex> lock(mutex_);
        ready[segment] = std::move(buffer);
        if (to.busy) return nullptr;  // whoever adds to this unit now will take it
        to.busy = true;
        while (to.added < segments_ && ready[to.added] != nullptr) {
            Buffer next = std::move(ready[to.added]);
            ++to.added;
            if (to.sum == nullptr) {
                to.sum = std::move(next);
                continue;
            }
            lock.unlock();
            double* sum = to.sum.get();
            for (std::size_t i = 0; i < count_; ++i) sum[i] += next[i];
            lock.lock();
            unused_.push_back(std::move(next));
        }
        to.busy = false;
        return to.added == segments_ ? std::move(to.sum) : nullptr;
    }

  private:
    struct Unit {
        Buffer sum;  // over the first `added` segments
        std::int64_t added = 0;
        bool busy = false;
    };

    const std::int64_t segments_;
    const std::size_t count_;
    std::mutex mutex_;  // of all that follows, except the sum of a busy unit
    std::vector<Unit> units_;
    std::vector<Buffer> ready_, unused_;
    std::size_t buffers_ = 0;
};

}  // namespace
}  // namespace fastproj::cpu
