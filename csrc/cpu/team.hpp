// The threads of torch's own pool, where the process has one.
#pragma once

namespace fastproj::cpu {

// Calls work(data) on every thread of the pool at once, the calling one included, and returns true
// when all are done. Calls nothing and returns false where there is no pool to be had.
bool on_team(void (*work)(void*), void* data);

}  // namespace fastproj::cpu
