// Scratch memory, handed out piece by piece. Included by each instruction set's translation unit;
// everything here is local to it.
#pragma once

#include <cstddef>

namespace fastproj::cpu {
namespace {

// Hands out aligned pieces of one scratch allocation.
class Arena {
  public:
    explicit Arena(void* base) : at_(static_cast<char*>(base)) {}
    template <class T>
    T* take(std::size_t count) {
        T* here = reinterpret_cast<T*>(at_);
        at_ += (count * sizeof(T) + 63) / 64 * 64;
        return here;
    }

  private:
    char* at_;
};

}  // namespace
}  // namespace fastproj::cpu
