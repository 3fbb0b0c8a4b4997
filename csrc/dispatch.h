// The names of the instruction sets, and the environment variable that selects one.
#pragma once

#include "kernels.h"

namespace trm {

// Best first. A build or machine may not support all of them.
inline constexpr const char* kInstructionSets[] = {"avx512", "avx2", "portable"};

// Selects the instruction set that kernels() returns instead of the best one. If it is unsupported, kernels() returns
// null.
inline constexpr const char* kInstructionSetVariable = "TRM_NATIVE_ISA";

}  // namespace trm
