// Statistics and conversions of rows: see level.cpp.
#pragma once

#include "vectors.hpp"

namespace script::cpu {
namespace {

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
#elif defined(__aarch64__)
  for (; i + 4 <= n; i += 4) vst1q_f32(out + i, vcvt_f32_f16(load<float16x4_t>(x + i)));
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
    SCRIPT_UNROLL(4)
    for (int c = 0; c < kChains; ++c) {
      const Vec v = load<Vec>(x + i + c * kFloats);
      const Uint a = float_to_bits(v) & magnitude;
      amax[c] = a > amax[c] ? a : amax[c];
      squares[c] = multiply_add(squares[c], v, v);
      if (y != nullptr) products[c] = multiply_add(products[c], v, load<Vec>(y + i + c * kFloats));
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
    stats.sum_squares = multiply_add(stats.sum_squares, x[i], x[i]);
    if (y != nullptr) stats.dot = multiply_add(stats.dot, x[i], y[i]);
  }
  return stats;
}

void scale_row(const float* x, float scale, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale;
}

}  // namespace
}  // namespace script::cpu
