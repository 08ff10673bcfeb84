// Token rows of any floating dtype and stride, and their statistics.
//
// A row is multiplied by a power of two where its largest magnitude is far from 1, which is exact and keeps squares and
// products inside fp32: cosines do not change, and neither 1e38 nor 1e-40 breaks one. A row that holds NaN or Inf
// ("bad") counts as a zero row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "parallel.hpp"
#include "simd/simd.hpp"
#include "workspace.hpp"

namespace script::cpu {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Strides in elements; they may be 0 or negative.
struct TokenView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t count = 0, width = 0;
  int64_t row_stride = 0, column_stride = 1;
  // Columns of a grid of tokens, an even number: in each of its odd rows, tokens 2 i and 2 i + 1 have changed places,
  // so that even ones are the squares of one colour of a checkerboard. 0: tokens as they come.
  int64_t checkered = 0;

  // Where in memory token i is; and the other way round.
  int64_t place(int64_t i) const { return checkered == 0 ? i : i ^ (i / checkered % 2); }

  // The same rows, `elements` further on in memory; of no rows there may be no memory.
  TokenView moved(int64_t elements) const {
    TokenView view = *this;
    if (data == nullptr) return view;
    view.data = static_cast<const char*>(data) + elements * (dtype == DType::kFloat32 ? 4 : 2);
    return view;
  }
  TokenView rows(int64_t begin, int64_t end) const {
    TokenView view = moved(begin * row_stride);
    view.count = end - begin;
    return view;
  }

  // Row i as contiguous fp32: the row itself where it is that already, else written to `buffer` (width floats).
  const float* row(int64_t i, float* buffer) const {
    const int64_t start = place(i) * row_stride;
    if (dtype == DType::kFloat32) {
      const float* x = static_cast<const float*>(data) + start;
      if (column_stride == 1) return x;
      for (int64_t d = 0; d < width; ++d) buffer[d] = x[d * column_stride];
      return buffer;
    }
    const uint16_t* x = static_cast<const uint16_t*>(data) + start;
    const auto widen = dtype == DType::kBFloat16 ? simd().widen_bf16 : simd().widen_f16;
    if (column_stride == 1) {
      widen(x, width, buffer);
    } else {
      for (int64_t d = 0; d < width; ++d) widen(x + d * column_stride, 1, buffer + d);
    }
    return buffer;
  }
};

// The images of a batch, `image_stride` elements from one to the next: 0 where one serves all.
struct TokenBatch {
  TokenView first;
  int64_t count = 0, image_stride = 0;
  TokenView operator[](int64_t b) const { return first.moved(b * image_stride); }
};

// A value per token of each image: strides in elements.
template <typename T>
struct ValueBatch {
  const T* data = nullptr;
  int64_t image_stride = 0, stride = 1;
  const T* operator[](int64_t b) const { return data + b * image_stride; }
};

// A byte of a mask. Whoever views bytes as bools may bring others than 0 and 1, which a C++ bool must not hold: what is
// not 0 is true.
using Truth = uint8_t;

// Statistics of the rows, in token order.
struct RowTable {
  float* inverse_norm = nullptr;  // of the scaled row; 0 for a zero or bad row
  float* scale = nullptr;         // the power of two, 1 for ordinary rows
  uint8_t* bad = nullptr;
  float* cosine = nullptr;  // with the direction given to scan_rows, or null
};

// A parameter as fp32. Numbers beyond it become its largest: an infinity would make NaN of a product with 0.
inline float saturate(double x) {
  constexpr double largest = std::numeric_limits<float>::max();
  return static_cast<float>(std::min(std::max(x, -largest), largest));
}

// 1 for magnitudes within 2^+-30, else the normal power of two that brings the magnitude nearest to [1, 2).
inline float power_of_two_scale(float magnitude) {
  if (magnitude == 0.0f) return 1.0f;
  const int exponent = std::ilogb(magnitude);
  if (exponent >= -30 && exponent <= 30) return 1.0f;
  return std::ldexp(1.0f, exponent < -126 ? 126 : (exponent > 126 ? -126 : -exponent));
}

// One pass over the rows. `direction` (width floats, may be null): the cosine of each row with it, given that the
// direction is a mean of unit vectors (it is not normalised here).
inline RowTable scan_rows(const TokenView& tokens, const float* direction, Scratch& scratch, const Parallel& parallel) {
  RowTable table;
  table.inverse_norm = scratch.take<float>(tokens.count);
  table.scale = scratch.take<float>(tokens.count);
  table.bad = scratch.take<uint8_t>(tokens.count);
  if (direction != nullptr) table.cosine = scratch.take<float>(tokens.count);
  parallel(tokens.count, 4 * tokens.width, [&](int64_t begin, int64_t end) {
    Scratch local;
    float* buffer = local.take<float>(tokens.width);
    float* scaled = local.take<float>(tokens.width);
    for (int64_t i = begin; i < end; ++i) {
      const float* x = tokens.row(i, buffer);
      RowStats stats = simd().row_stats(x, direction, tokens.width);
      table.bad[i] = stats.amax_bits >= 0x7f800000u;
      float amax;
      std::memcpy(&amax, &stats.amax_bits, sizeof amax);
      table.scale[i] = table.bad[i] ? 1.0f : power_of_two_scale(amax);
      if (table.scale[i] != 1.0f) {
        simd().scale_row(x, table.scale[i], tokens.width, scaled);
        stats = simd().row_stats(scaled, direction, tokens.width);
      }
      const bool zero = table.bad[i] || stats.sum_squares == 0.0f;
      table.inverse_norm[i] = zero ? 0.0f : static_cast<float>(1.0 / std::sqrt(static_cast<double>(stats.sum_squares)));
      if (direction != nullptr) table.cosine[i] = zero ? 0.0f : stats.dot * table.inverse_norm[i];
    }
  });
  return table;
}

}  // namespace script::cpu
