// Which instruction sets this build and this machine have, and the kernels of each.
#pragma once

#include <string>

#include "kernels.hpp"

namespace fastproj::cpu {

const char* isa_name(Isa isa);

// Why an instruction set can't be used ("" when it can): not compiled in, or the processor or the
// operating system lacks something, by name.
std::string isa_unavailable(Isa isa);

// Throws std::invalid_argument for a set that isn't compiled in.
KernelTable kernels_for(Isa isa);

}  // namespace fastproj::cpu
