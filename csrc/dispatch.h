// The names of the instruction sets, and the variable that chooses one of them.
#pragma once

#include "kernels.h"

namespace trm {

// Best first. Not every build and machine has each.
inline constexpr const char* kInstructionSets[] = {"avx512", "avx2", "portable"};

// Names the instruction set that kernels() gives, in place of the best. Where it names none that is here, kernels()
// gives null.
inline constexpr const char* kInstructionSetVariable = "TRM_NATIVE_ISA";

}  // namespace trm
