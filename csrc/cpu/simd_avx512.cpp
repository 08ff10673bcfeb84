// AVX-512 (F, BW, DQ, VL).
#define SCRIPT_SIMD_FLOATS 16
#define SCRIPT_SIMD_ROWS 6
#define SCRIPT_SIMD_VECTORS 4
#include "simd_kernels.hpp"

namespace script::cpu {
extern const SimdOps kAvx512Ops;
const SimdOps kAvx512Ops = make_ops("avx512");
}  // namespace script::cpu
