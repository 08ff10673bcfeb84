// AVX-512 with the bf16 dot product.
#define SCRIPT_SIMD_FLOATS 16
#define SCRIPT_SIMD_ROWS 6
#define SCRIPT_SIMD_VECTORS 4
#define SCRIPT_SIMD_BF16 1
#include "simd_kernels.hpp"

namespace script::cpu {
extern const SimdOps kAvx512Bf16Ops;
const SimdOps kAvx512Bf16Ops = make_ops("avx512_bf16");
}  // namespace script::cpu
