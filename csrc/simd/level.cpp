// The inner loops of one SIMD level: this file is compiled once per level of levels.cmake, with that level's flags and
// its name in SCRIPT_SIMD_LEVEL. The instruction set that the flags allow decides on the vectors and on the register
// tile of a matrix product.
//
// Everything here has internal linkage and calls nothing from the standard library: a template or inline function
// instantiated in a file with AVX-512 flags could otherwise be the copy the linker keeps for every CPU.
#if defined(__AVX512F__)
#define SCRIPT_SIMD_FLOATS 16
#define SCRIPT_SIMD_ROWS 6
#define SCRIPT_SIMD_VECTORS 4
#elif defined(__AVX2__)
#define SCRIPT_SIMD_FLOATS 8
#define SCRIPT_SIMD_ROWS 6
#define SCRIPT_SIMD_VECTORS 2
#elif defined(__aarch64__)  // 32 registers: 24 sums, the vectors of a step, and its factors
#define SCRIPT_SIMD_FLOATS 4
#define SCRIPT_SIMD_ROWS 6
#define SCRIPT_SIMD_VECTORS 4
#else  // SSE2, or what the compiler makes of vectors of four
#define SCRIPT_SIMD_FLOATS 4
#define SCRIPT_SIMD_ROWS 6
#define SCRIPT_SIMD_VECTORS 2
#endif

#include "greedy.hpp"
#include "match.hpp"
#include "products.hpp"
#include "rows.hpp"

#define SCRIPT_TEXT(x) #x
#define SCRIPT_NAME(x) SCRIPT_TEXT(x)
#define SCRIPT_JOIN(a, b) a##b
#define SCRIPT_TABLE(level) SCRIPT_JOIN(kOps_, level)

namespace script::cpu {
namespace {

constexpr SimdOps make_ops() {
  SimdOps ops{};
  ops.name = SCRIPT_NAME(SCRIPT_SIMD_LEVEL);
  ops.thread_work = 2'000'000;
  ops.widen_bf16 = widen_bf16;
  ops.widen_f16 = widen_f16;
  ops.row_stats = row_stats;
  ops.scale_row = scale_row;
  ops.pack = pack;
  ops.pack_squares = pack_squares;
  ops.transpose = transpose_rows;
  ops.gemm = gemm;
  ops.dot = dot;
#if defined(SCRIPT_SIMD_BF16)
  ops.gemm_bf16 = gemm_bf16;
  ops.dot_bf16 = dot_bf16;
  ops.pack_squares_bf16 = pack_squares_bf16;
#endif
  ops.weigh_products = weigh_products;
  ops.match = match;
  ops.project = project;
  ops.extend = extend;
  ops.lower = lower;
  ops.closest = closest;
  ops.argmax = argmax;
  ops.take = take;
  return ops;
}

}  // namespace

extern const SimdOps SCRIPT_TABLE(SCRIPT_SIMD_LEVEL);
const SimdOps SCRIPT_TABLE(SCRIPT_SIMD_LEVEL) = make_ops();

}  // namespace script::cpu
