// What all vector vocabularies have. Each includes this; everything here is local to the
// translation unit.
#pragma once

#include "kernels.hpp"

namespace fastproj::cpu {
namespace {

template <int kVectorBytes>
struct Vectors {
    static constexpr int kBytes = kVectorBytes;
    static constexpr int kLanes = kBytes / 4;
    typedef std::uint32_t U __attribute__((vector_size(kBytes)));
    typedef std::uint64_t W __attribute__((vector_size(kBytes)));
    typedef float F __attribute__((vector_size(kBytes)));
    typedef double D __attribute__((vector_size(kBytes)));

    template <class V>
    static V xor3(V a, V b, V c) {
        return a ^ b ^ c;
    }
    // +1 where bit `position` of the word is 0, -1 where it is 1.
    static F sign(U word, int position) {
        return (F)((word << (31 - position) & 0x80000000u) | 0x3f800000u);
    }
};

// The sums of a chunk of 16 columns. A packed chunk (spec.hpp) is unpacked once and then added for
// any number of samples: `rows` are the 16 that it reads.
template <class T>
struct Chunk;

}  // namespace
}  // namespace fastproj::cpu
