// The inner loops, compiled once per SIMD level by simd_<level>.cpp with that level's flags.
//
// Everything here has internal linkage and calls nothing from the standard library: a template or inline function
// instantiated in a file with AVX-512 flags could otherwise be the copy the linker keeps for every CPU.
//
// Set by the including file: SCRIPT_SIMD_FLOATS (vector length), SCRIPT_SIMD_ROWS x SCRIPT_SIMD_VECTORS (the register
// tile of a matrix product), SCRIPT_SIMD_BF16 (the CPU has bf16 dot products).
#pragma once

#include "simd_greedy.hpp"
#include "simd_products.hpp"
#include "simd_vectors.hpp"

namespace script::cpu {
namespace {

// ---- rows -------------------------------------------------------------------------------------------------------

void widen_bf16(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    __builtin_memcpy(out + i, &bits, 4);
  }
}

void widen_f16(const uint16_t* x, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
#endif
  for (; i < n; ++i) {
    // The exponent is rebased by a multiplication, which also normalises denormals; Inf and NaN get theirs by hand.
    const uint32_t magnitude = static_cast<uint32_t>(x[i] & 0x7fffu) << 13;
    uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
    if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;
    out[i] = bits_to_float(bits | static_cast<uint32_t>(x[i] & 0x8000u) << 16);
  }
}

RowStats row_stats(const float* x, const float* y, int64_t n) {
  constexpr int kChains = 4;
  Uint amax[kChains] = {};
  Vec squares[kChains] = {}, products[kChains] = {};
  const Uint magnitude = Uint{} + 0x7fffffffu;
  int64_t i = 0;
  for (; i + kChains * kFloats <= n; i += kChains * kFloats) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const Vec v = load<Vec>(x + i + c * kFloats);
      const Uint a = float_to_bits(v) & magnitude;
      amax[c] = a > amax[c] ? a : amax[c];
      squares[c] += v * v;
      if (y != nullptr) products[c] += v * load<Vec>(y + i + c * kFloats);
    }
  }
  RowStats stats{0, sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])),
                 sum_lanes((products[0] + products[1]) + (products[2] + products[3]))};
  for (int c = 0; c < kChains; ++c) {
    for (int l = 0; l < kFloats; ++l) stats.amax_bits = amax[c][l] > stats.amax_bits ? amax[c][l] : stats.amax_bits;
  }
  for (; i < n; ++i) {
    const uint32_t a = float_to_bits(x[i]) & 0x7fffffffu;
    stats.amax_bits = a > stats.amax_bits ? a : stats.amax_bits;
    stats.sum_squares += x[i] * x[i];
    if (y != nullptr) stats.dot += x[i] * y[i];
  }
  return stats;
}

void scale_row(const float* x, float scale, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale;
}

// ---- bipartite matching -----------------------------------------------------------------------------------------

void match(const float* raw, float source_scale, const float* scale, int columns, int32_t first_column, float threshold,
           MatchLanes* lanes) {
  for (int g = 0; g * kGroup < columns; ++g) {
#pragma GCC unroll 4
    for (int v = 0; v < kGroupVectors; ++v) {
      const int at = g * kGroup + v * kFloats;
      const int slot = v * kFloats;
      Int lane;
      for (int l = 0; l < kFloats; ++l) lane[l] = l;
      const Int column = lane + at;
      const Int inside = column < columns;
      const Vec s = load<Vec>(raw + at) * (load<Vec>(scale + at) * source_scale);
      const Int above = (s >= threshold) & inside;
      const Vec best = load<Vec>(lanes->best + slot);
      const Int better = (s > best) & inside;
      store(lanes->best + slot, better ? s : best);
      store(lanes->best_column + slot, better ? column + first_column : load<Int>(lanes->best_column + slot));
      store(lanes->above + slot, load<Int>(lanes->above + slot) - above);
      store(lanes->above_sum + slot, load<Vec>(lanes->above_sum + slot) + (above ? s : Vec{}));
      store(lanes->sum + slot, load<Vec>(lanes->sum + slot) + (inside ? s : Vec{}));
    }
  }
}

constexpr SimdOps make_ops(const char* name) {
  SimdOps ops{};
  ops.name = name;
  ops.thread_work = int64_t{25'000'000} * kFloats;
  ops.widen_bf16 = widen_bf16;
  ops.widen_f16 = widen_f16;
  ops.row_stats = row_stats;
  ops.scale_row = scale_row;
  ops.pack = pack;
  ops.gemm = gemm;
#if defined(SCRIPT_SIMD_BF16)
  ops.gemm_bf16 = gemm_bf16;
#endif
  ops.scale_products = scale_products;
  ops.match = match;
  ops.project = project;
  ops.extend = extend;
  ops.argmax = argmax;
  ops.take = take;
  return ops;
}

}  // namespace
}  // namespace script::cpu
