// The steps of greedy MAP and its relatives: see level.cpp.
#pragma once

#include "vectors.hpp"

namespace script::cpu {
namespace {

// A taken column (negative residual) keeps its mark; rounding below zero, or NaN, counts as explained.
inline Vec lower_residual(Vec residual, Vec root) {
  return residual < Vec{} ? residual : max(multiply_subtract(residual, root, root), Vec{});
}

inline Vec zero_unless_finite(Vec x) {
  const Uint exponent = float_to_bits(x) & 0x7f800000u;
  return bits_to_float(exponent == 0x7f800000u ? Uint{} : float_to_bits(x));
}

constexpr int64_t kStepsAhead = 16;

// sum[r] -= sum_d a[r][d] * rows[d], one chain of multiply-adds per column in the order of d. `first`: of the tiles
// that pass over a panel's rows, this one fetches them, for itself and the others.
template <int M, int V>
[[gnu::always_inline]] inline void subtract_products(Vec (&sum)[M][V], const float* const* a, const float* rows,
                                                     int64_t depth, bool first) {
  const float* x[M];
  SCRIPT_UNROLL(8)
  for (int r = 0; r < M; ++r) x[r] = a[r];
  for (int64_t d = 0; d < depth; ++d) {
    if (kNarrow && first) {
      const char* ahead = reinterpret_cast<const char*>(rows + (d + kStepsAhead) * kPanel);
      SCRIPT_UNROLL(4)
      for (int64_t i = 0; i < kPanel * 4; i += kLine) __builtin_prefetch(ahead + i);
    }
    Vec b[V];
    SCRIPT_UNROLL(4)
    for (int v = 0; v < V; ++v) b[v] = load<Vec>(rows + d * kPanel + v * kFloats);
    SCRIPT_UNROLL(8)
    for (int r = 0; r < M; ++r) {
      const Vec factor = splat(x[r][d]);
      SCRIPT_UNROLL(4)
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_subtract(sum[r][v], factor, b[v]);
    }
  }
}

template <int M, int V>
struct ProjectTile {
  static void run(const float* const* a, const float* rows, int64_t depth, float* g) {
    Vec sum[M][V];
    SCRIPT_UNROLL(8)
    for (int r = 0; r < M; ++r) {
      SCRIPT_UNROLL(4)
      for (int v = 0; v < V; ++v) sum[r][v] = load<Vec>(g + r * kPanel + v * kFloats);
    }
    subtract_products(sum, a, rows, depth, false);
    SCRIPT_UNROLL(8)
    for (int r = 0; r < M; ++r) {
      SCRIPT_UNROLL(4)
      for (int v = 0; v < V; ++v) store(g + r * kPanel + v * kFloats, sum[r][v]);
    }
  }
};

void project(const float* const* a, int count, const float* rows, int64_t depth, float* g) {
  for (int r = 0, m = 0; r < count; r += m) {
    m = tile_rows(count - r);
    for (int c = 0; c < kPanel; c += kVectors * kFloats) {
      dispatch_tile<ProjectTile>(m, kVectors, a + r, rows + c, depth, g + r * kPanel + c);
    }
  }
}

// M new rows on V vectors of columns, from `column` on. The triangle among the new rows is solved in registers.
template <int M, int V>
struct ExtendTile {
  static void run(const float* const* entries, const float* const* factor, const float* inverse_diagonal, int64_t done,
                  float* rows, float* residual, int column) {
    Vec sum[M][V];
    SCRIPT_UNROLL(8)
    for (int r = 0; r < M; ++r) {
      SCRIPT_UNROLL(4)
      for (int v = 0; v < V; ++v) sum[r][v] = zero_unless_finite(load<Vec>(entries[r] + column + v * kFloats));
    }
    subtract_products(sum, factor, rows + column, done, column == 0);
    Vec left[V];
    SCRIPT_UNROLL(4)
    for (int v = 0; v < V; ++v) left[v] = load<Vec>(residual + column + v * kFloats);
    SCRIPT_UNROLL(8)
    for (int r = 0; r < M; ++r) {
      SCRIPT_UNROLL(8)
      for (int q = 0; q < r; ++q) {
        const Vec x = splat(factor[r][done + q]);
        SCRIPT_UNROLL(4)
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_subtract(sum[r][v], x, sum[q][v]);
      }
      SCRIPT_UNROLL(4)
      for (int v = 0; v < V; ++v) {
        sum[r][v] *= inverse_diagonal[r];
        store(rows + (done + r) * kPanel + column + v * kFloats, sum[r][v]);
        left[v] = lower_residual(left[v], sum[r][v]);
      }
    }
    SCRIPT_UNROLL(4)
    for (int v = 0; v < V; ++v) store(residual + column + v * kFloats, left[v]);
  }
};

float extend(const float* const* entries, int m, const float* const* factor, const float* inverse_diagonal,
             int64_t done, float* rows, float* residual) {
  for (int r = 0, tile = 0; r < m; r += tile) {
    tile = tile_rows(m - r);
    for (int c = 0; c < kPanelVectors; c += kVectors) {
      dispatch_tile<ExtendTile>(tile, kVectors, entries + r, factor + r, inverse_diagonal + r, done + r, rows, residual,
                                c * kFloats);
    }
  }
  Vec top = load<Vec>(residual);
  SCRIPT_UNROLL(16)
  for (int v = 1; v < kPanelVectors; ++v) top = max(load<Vec>(residual + v * kFloats), top);
  return largest_lane(top)[0];
}

float lower(const float* const* entries, int m, const float* offset, const float* slope, float* residual) {
  Vec top = splat(-1.0f);
  for (int c = 0; c < kPanel; c += kFloats) {
    Vec nearest = load<Vec>(entries[0] + c);
    for (int a = 1; a < m; ++a) nearest = max(load<Vec>(entries[a] + c), nearest);
    const Vec left = load<Vec>(residual + c);
    const Vec value = max(multiply_subtract(load<Vec>(offset + c), load<Vec>(slope + c), nearest), Vec{});
    const Vec lowered = value < left ? value : left;  // a taken column keeps its mark
    store(residual + c, lowered);
    top = max(lowered, top);
  }
  return largest_lane(top)[0];
}

Closest closest(const float* const* x, int64_t n, int64_t own, float beyond) {
  Vec least = splat(__FLT_MAX__);
  Int at = Int{} + static_cast<int32_t>(own);
  for (int64_t i = 0; i < n; i += kFloats) {
    Vec distance = {};
    SCRIPT_UNROLL(8)
    for (int a = 0; a < kCoordinates; ++a) {
      const Vec apart = load<Vec>(x[a] + i) - splat(x[a][own]);
      distance = multiply_add(distance, apart, apart);
    }
    const Int point = lane_numbers() + static_cast<int32_t>(i);
    const Int closer = (distance < least) & (distance > beyond) & (point != static_cast<int32_t>(own));
    least = closer ? distance : least;
    at = closer ? point : at;
  }
  const Vec first = fold_lanes<kFloats / 2>(least, [](Vec a, Vec b) { return a < b ? a : b; });
  return {lowest_lane(least == first ? at : Int{} + INT32_MAX)[0], first[0]};
}

int64_t argmax(const float* x, int64_t n) {
  Vec top = load<Vec>(x);
  for (int64_t i = kFloats; i < n; i += kFloats) top = max(load<Vec>(x + i), top);
  top = largest_lane(top);
  const Int lane = lane_numbers();
  Int first = Int{} + static_cast<int32_t>(n);
  for (int64_t i = n - kFloats; i >= 0; i -= kFloats) {
    first = load<Vec>(x + i) == top ? lane + static_cast<int32_t>(i) : first;
  }
  return lowest_lane(first)[0];
}

Taken take(float* residual, const int32_t* ids) {
  Vec value[kPanelVectors];
  Vec top = load<Vec>(residual);
  SCRIPT_UNROLL(16)
  for (int v = 0; v < kPanelVectors; ++v) {
    value[v] = load<Vec>(residual + v * kFloats);
    top = max(value[v], top);
  }
  top = largest_lane(top);
  const Int lane = lane_numbers();
  Int first = Int{} + INT32_MAX;
  SCRIPT_UNROLL(16)
  for (int v = 0; v < kPanelVectors; ++v) {
    const Int id = load<Int>(ids + v * kFloats);
    first = ((value[v] == top) & (id < first)) ? id : first;
  }
  first = lowest_lane(first);
  Vec left = splat(-1.0f);
  Int column{};
  SCRIPT_UNROLL(16)
  for (int v = 0; v < kPanelVectors; ++v) {
    const Int taken = load<Int>(ids + v * kFloats) == first;
    column |= taken & (lane + v * kFloats);
    value[v] = taken ? splat(-1.0f) : value[v];
    left = max(value[v], left);
    store(residual + v * kFloats, value[v]);
  }
  column = fold_lanes<kFloats / 2>(column, [](Int a, Int b) { return a | b; });
  return {column[0], largest_lane(left)[0]};
}

}  // namespace
}  // namespace script::cpu
