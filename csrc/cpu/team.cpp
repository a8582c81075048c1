#include "team.hpp"

#ifdef __linux__
#include <dlfcn.h>
#include <pthread.h>

#include <cfenv>
#endif

namespace fastproj::cpu {

#ifdef __linux__
namespace {

// The entry of the OpenMP runtime, of GNU's or of LLVM's, that compilers call for a parallel
// region.
using Parallel = void (*)(void (*)(void*), void*, unsigned num_threads, unsigned flags);

// Torch loads its runtime for all to see. Looked up, not linked: another copy of the library would
// have another pool, whose threads spin on the cores that this one's want.
Parallel find_parallel() {
    return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

// A fork has the pool's memory, but none of its threads: it would wait for them for ever.
bool forked = false;
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Share {
    void (*work)(void*);
    void* data;
    std::fenv_t environment;
};

// Threads of the pool may flush denormal numbers where the calling one doesn't, or the reverse.
void do_share(void* data) {
    const Share& share = *static_cast<const Share*>(data);
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&share.environment);
    share.work(share.data);
    std::fesetenv(&own);
}

}  // namespace

bool on_team(void (*work)(void*), void* data) {
    static const Parallel parallel = find_parallel();
    if (parallel == nullptr || forked || watching != 0) return false;
    Share share{work, data, {}};
    std::fegetenv(&share.environment);
    // 0: as many threads as torch's own regions have. Of fewer, libgomp would end the others, and
    // start them again in torch's next region.
    parallel(do_share, &share, 0, 0);
    return true;
}
#else
bool on_team(void (*)(void*), void*) { return false; }
#endif

}  // namespace fastproj::cpu
