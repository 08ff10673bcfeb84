// The level every CPU of the target has: SSE2 on x86-64, NEON on AArch64, through the compiler's vector types.
#define SCRIPT_SIMD_FLOATS 4
#define SCRIPT_SIMD_ROWS 6
#define SCRIPT_SIMD_VECTORS 2
#include "simd_kernels.hpp"

namespace script::cpu {
extern const SimdOps kBaselineOps;
const SimdOps kBaselineOps = make_ops("baseline");
}  // namespace script::cpu
