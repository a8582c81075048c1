#include "machine.hpp"

#include <stdexcept>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define FASTPROJ_X86 1
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastproj::cpu {

#if defined(FASTPROJ_X86) && defined(FASTPROJ_HAVE_AMX)
static std::string amx_unavailable() {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 ||
        (edx & kTile) == 0) {
        return "this processor lacks AMX-TILE and AMX-BF16";
    }
#if defined(__linux__) && defined(__x86_64__)
    // Linux gives a process the 8 KiB of tile state only when asked: ARCH_REQ_XCOMP_PERM,
    // XFEATURE_XTILEDATA. Threads inherit it.
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted ? "" : "the operating system refuses AMX tile state (needs Linux 5.16)";
#else
    return "AMX is used on Linux only";
#endif
}
#endif

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
    }
    throw std::invalid_argument("fastproj._cpu: unknown instruction set");
}

std::string isa_unavailable(Isa isa) {
    const std::string not_built = "this build of fastproj has no code for it";
    (void)not_built;
    switch (isa) {
        case Isa::kPortable:
            return "";
        case Isa::kAvx2:
#if defined(FASTPROJ_X86) && defined(FASTPROJ_HAVE_AVX2)
            if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
                return "this processor lacks AVX2 and FMA";
            }
            return "";
#else
            return not_built;
#endif
        case Isa::kAvx512:
#if defined(FASTPROJ_X86) && defined(FASTPROJ_HAVE_AVX512)
            if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
                !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
                return "this processor lacks AVX-512 F, BW, DQ and VL";
            }
            return "";
#else
            return not_built;
#endif
        case Isa::kAmx:
#if defined(FASTPROJ_X86) && defined(FASTPROJ_HAVE_AMX)
            if (!isa_unavailable(Isa::kAvx512).empty()) return isa_unavailable(Isa::kAvx512);
            if (!__builtin_cpu_supports("avx512vbmi")) return "this processor lacks AVX-512 VBMI";
            return amx_unavailable();
#else
            return not_built;
#endif
    }
    throw std::invalid_argument("fastproj._cpu: unknown instruction set");
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
        default:
            throw std::invalid_argument("fastproj._cpu: instruction set not compiled in");
    }
}

}  // namespace fastproj::cpu
