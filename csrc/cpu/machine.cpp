#include "machine.hpp"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastproj::cpu {
namespace {

#if defined(__x86_64__)
// What cpuid says, and xgetbv: which registers the operating system saves. Read here, because the
// answers of __builtin_cpu_supports come from the compiler's runtime library, and that of zig says
// no to everything.
class Processor {
  public:
    Processor() {
        unsigned eax, ebx, ecx, edx;
        if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return;
        ecx1_ = ecx;
        if (!(ecx1_ >> 27 & 1)) return;  // OSXSAVE: xgetbv is there
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        saved_ = low;
        if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) ebx7_ = ebx, ecx7_ = ecx, edx7_ = edx;
    }
    bool avx2() const {  // with FMA, F16C and BMI2
        return (saved_ & kYmm) == kYmm && has(ecx1_, 12) && has(ecx1_, 28) && has(ecx1_, 29) &&
               has(ebx7_, 5) && has(ebx7_, 8);
    }
    bool avx512() const {  // F, DQ, BW and VL
        return avx2() && (saved_ & kZmm) == kZmm && has(ebx7_, 16) && has(ebx7_, 17) &&
               has(ebx7_, 30) && has(ebx7_, 31);
    }
    bool avx512_vbmi() const { return avx512() && has(ecx7_, 1); }
    bool amx_bf16() const { return has(edx7_, 22) && has(edx7_, 24); }

  private:
    static constexpr unsigned kYmm = 0x06, kZmm = 0xe6;  // bits of XCR0
    static bool has(unsigned word, int bit) { return word >> bit & 1; }
    unsigned ecx1_ = 0, ebx7_ = 0, ecx7_ = 0, edx7_ = 0, saved_ = 0;
};

[[maybe_unused]] const Processor& processor() {
    static const Processor found;
    return found;
}

[[maybe_unused]] std::string amx_unavailable() {
    if (!processor().amx_bf16()) return "this processor lacks AMX-TILE and AMX-BF16";
#if defined(__linux__)
    // Linux gives a process the 8 KiB of tile state only when asked: ARCH_REQ_XCOMP_PERM,
    // XFEATURE_XTILEDATA. Threads inherit it.
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted ? "" : "the operating system refuses AMX tile state (needs Linux 5.16)";
#else
    return "AMX is used on Linux only";
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return "portable";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAmx:
            return "amx";
        case Isa::kNeon:
            return "neon";
    }
    throw std::invalid_argument("fastproj._cpu: unknown instruction set");
}

std::string isa_unavailable(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return "";
#if defined(FASTPROJ_HAVE_AVX2)
        case Isa::kAvx2:
            return processor().avx2() ? "" : "this processor lacks AVX2 and FMA";
#endif
#if defined(FASTPROJ_HAVE_AVX512)
        case Isa::kAvx512:
            return processor().avx512() ? "" : "this processor lacks AVX-512 F, BW, DQ and VL";
#endif
#if defined(FASTPROJ_HAVE_AMX)
        case Isa::kAmx:
            if (!processor().avx512()) return "this processor lacks AVX-512 F, BW, DQ and VL";
            if (!processor().avx512_vbmi()) return "this processor lacks AVX-512 VBMI";
            return amx_unavailable();
#endif
#if defined(FASTPROJ_HAVE_NEON)
        case Isa::kNeon:
            return "";
#endif
        default:
            return "this build of fastproj has no code for it";
    }
}

KernelTable kernels_for(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return kernels_portable();
#if defined(FASTPROJ_HAVE_AVX2)
        case Isa::kAvx2:
            return kernels_avx2();
#endif
#if defined(FASTPROJ_HAVE_AVX512)
        case Isa::kAvx512:
            return kernels_avx512();
#endif
#if defined(FASTPROJ_HAVE_AMX)
        case Isa::kAmx:
            return kernels_amx();
#endif
#if defined(FASTPROJ_HAVE_NEON)
        case Isa::kNeon:
            return kernels_neon();
#endif
        default:
            throw std::invalid_argument("fastproj._cpu: instruction set not compiled in");
    }
}

}  // namespace fastproj::cpu
