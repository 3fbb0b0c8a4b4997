// Selection of the best compilation of the kernels that the machine can execute.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace trm {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

const Kernels* kernels(const char* name) {
#if defined(__x86_64__)
    // These builtins also check the operating system, which must save the wide registers.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!std::strcmp(name, "avx512")) {
        const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        return has_avx512 && has_avx2 ? &avx512::table : nullptr;
    }
    if (!std::strcmp(name, "avx2")) return has_avx2 ? &avx2::table : nullptr;
#endif
    return std::strcmp(name, "portable") ? nullptr : &portable::table;
}

const Kernels* kernels() {
    const char* chosen = std::getenv(kInstructionSetVariable);
    if (chosen && *chosen) return kernels(chosen);
    for (const char* name : kInstructionSets) {
        if (const Kernels* found = kernels(name)) return found;
    }
    return nullptr;
}

}  // namespace trm
