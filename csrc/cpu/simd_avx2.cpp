// AVX2 + FMA + F16C.
#define SCRIPT_SIMD_FLOATS 8
#define SCRIPT_SIMD_ROWS 6
#define SCRIPT_SIMD_VECTORS 2
#include "simd_kernels.hpp"

namespace script::cpu {
extern const SimdOps kAvx2Ops;
const SimdOps kAvx2Ops = make_ops("avx2");
}  // namespace script::cpu
