// The inner loops, compiled once per SIMD level by simd_<level>.cpp with that level's flags.
//
// Everything here has internal linkage and calls nothing from the standard library: a template or inline function
// instantiated in a file with AVX-512 flags could otherwise be the copy the linker keeps for every CPU.
//
// Set by the including file: SCRIPT_SIMD_FLOATS (vector length), SCRIPT_SIMD_ROWS x SCRIPT_SIMD_VECTORS (the register
// tile of a matrix product), SCRIPT_SIMD_BF16 (the CPU has bf16 dot products).
#pragma once

#if defined(__F16C__) || defined(SCRIPT_SIMD_BF16)
#include <immintrin.h>
#endif

#include "simd.hpp"

namespace script::cpu {
namespace {

constexpr int kFloats = SCRIPT_SIMD_FLOATS;
constexpr int kRows = SCRIPT_SIMD_ROWS;
constexpr int kVectors = SCRIPT_SIMD_VECTORS;
constexpr int kGroupVectors = kGroup / kFloats;
constexpr int kPanelVectors = kPanel / kFloats;
// Steps summed in registers before they join the total: short chains round less, and a panel's chunk stays in L1.
constexpr int64_t kChunk = 128;

typedef float Vec __attribute__((vector_size(kFloats * 4)));
typedef int32_t Int __attribute__((vector_size(kFloats * 4)));
typedef uint32_t Uint __attribute__((vector_size(kFloats * 4)));

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename V, typename T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
inline Vec splat(float x) { return x - Vec{}; }
inline Vec bits_to_float(Uint x) { return load<Vec>(&x); }
inline Uint float_to_bits(Vec x) { return load<Uint>(&x); }
inline float bits_to_float(uint32_t x) {
  float f;
  __builtin_memcpy(&f, &x, 4);
  return f;
}
inline uint32_t float_to_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
inline float sum_lanes(Vec v) {
  float total = 0;
  for (int i = 0; i < kFloats; ++i) total += v[i];
  return total;
}

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

void finite_row(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_to_bits(x[i]);
    out[i] = bits_to_float((bits & 0x7f800000u) == 0x7f800000u ? 0u : bits);
  }
}

// ---- packing ----------------------------------------------------------------------------------------------------

// Swaps the off-diagonal blocks of size kHalf of a square of lanes; the stages 1, 2, 4, ... transpose it.
template <int kHalf>
inline void swap_blocks(Vec (&v)[kFloats]) {
  Int low, high;
  for (int l = 0; l < kFloats; ++l) {
    low[l] = (l & kHalf) ? kFloats + l - kHalf : l;
    high[l] = (l & kHalf) ? kFloats + l : l + kHalf;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; ++i) {
    if (i & kHalf) continue;
    const Vec a = v[i], b = v[i + kHalf];
    v[i] = __builtin_shuffle(a, b, low);
    v[i + kHalf] = __builtin_shuffle(a, b, high);
  }
}

inline void transpose(Vec (&v)[kFloats]) {
  swap_blocks<1>(v);
  swap_blocks<2>(v);
  if constexpr (kFloats > 4) swap_blocks<4>(v);
  if constexpr (kFloats > 8) swap_blocks<8>(v);
}

// Moves 32-bit words as they are: fp32 values, or pairs of bf16.
// Steps of one block of rows before the next: as many streams as rows are read at a time, each far enough for the
// hardware to see it.
constexpr int64_t kPackChunk = 512;

void pack(const float* const* rows, int count, int64_t depth, float* panel) {
  const int blocks = (count + kFloats - 1) / kFloats;
  const int64_t whole = depth - depth % kFloats;
  for (int64_t start = 0; start < whole; start += kPackChunk) {
    const int64_t end = whole - start < kPackChunk ? whole : start + kPackChunk;
    for (int block = 0; block < kPanelVectors; ++block) {
      for (int64_t d = start; d < end; d += kFloats) {
        Vec v[kFloats] = {};
        if (block < blocks) {
#pragma GCC unroll 16
          for (int r = 0; r < kFloats; ++r) {
            if (block * kFloats + r < count) v[r] = load<Vec>(rows[block * kFloats + r] + d);
          }
          transpose(v);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kFloats; ++r) store(panel + (d + r) * kPanel + block * kFloats, v[r]);
      }
    }
  }
  for (int64_t d = whole; d < depth; ++d) {
    for (int c = 0; c < kPanel; ++c) panel[d * kPanel + c] = 0;
    for (int c = 0; c < count; ++c) __builtin_memcpy(panel + d * kPanel + c, rows[c] + d, 4);
  }
}

// ---- matrix products --------------------------------------------------------------------------------------------

// A register tile of M rows x V vectors over `depth` steps, written to c or added to it.
template <int M, int V>
inline void multiply_tile(const float* const* a, int64_t start, const float* panel, int64_t depth, bool add, float* c) {
  Vec sum[M][V] = {};
  const float* rows[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) rows[r] = a[r] + start;
  for (int64_t d = 0; d < depth; ++d) {
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load<Vec>(panel + d * kPanel + v * kFloats);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const Vec x = splat(rows[r][d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += x * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* p = c + r * kPanel + v * kFloats;
      store(p, add ? load<Vec>(p) + sum[r][v] : sum[r][v]);
    }
  }
}

// The same with c -= a * panel in one chain: the sums start from c, not from zero.
template <int M, int V>
inline void project_tile(const float* const* a, int64_t start, const float* panel, int64_t depth, float* c) {
  Vec sum[M][V];
  const float* rows[M];
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
    rows[r] = a[r] + start;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = load<Vec>(c + r * kPanel + v * kFloats);
  }
  for (int64_t d = 0; d < depth; ++d) {
    Vec b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load<Vec>(panel + d * kPanel + v * kFloats);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      const Vec x = splat(rows[r][d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] -= x * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * kPanel + v * kFloats, sum[r][v]);
  }
}

// Calls tile<M, V>() for a run-time number of rows and vectors.
template <template <int, int> class Tile, int M = kRows, int V = kVectors, typename... Args>
inline void dispatch_tile(int rows, int vectors, Args... args) {
  if (rows < M) {
    if constexpr (M > 1) dispatch_tile<Tile, M - 1, V>(rows, vectors, args...);
  } else if (vectors < V) {
    if constexpr (V > 1) dispatch_tile<Tile, M, V - 1>(rows, vectors, args...);
  } else {
    Tile<M, V>::run(args...);
  }
}

template <int M, int V>
struct FloatTile {
  static void run(const float* const* a, int64_t start, const float* panel, int64_t depth, bool add, float* c) {
    multiply_tile<M, V>(a, start, panel, depth, add, c);
  }
};

template <int M, int V>
struct ProjectTile {
  static void run(const float* const* a, int64_t start, const float* panel, int64_t depth, bool, float* c) {
    project_tile<M, V>(a, start, panel, depth, c);
  }
};

// Walks the chunks of the depth and, inside one, the register tiles: the panel's chunk is read from L1 by all rows.
template <template <int, int> class Tile, int kWord, typename Element>
inline void multiply(const Element* const* a, int rows, const Element* panel, int groups, int64_t depth, float* c) {
  for (int64_t start = 0; start < depth; start += kChunk) {
    const int64_t steps = depth - start < kChunk ? depth - start : kChunk;
    const Element* chunk = panel + start * kPanel * kWord;
    for (int r = 0; r < rows; r += kRows) {
      const int m = rows - r < kRows ? rows - r : kRows;
      for (int v = 0; v < groups * kGroupVectors; v += kVectors) {
        const int left = groups * kGroupVectors - v;
        dispatch_tile<Tile>(m, left < kVectors ? left : kVectors, a + r, start * kWord, chunk + v * kFloats * kWord,
                            steps, start > 0, c + r * kPanel + v * kFloats);
      }
    }
  }
}

void gemm(const float* const* a, int rows, const float* panel, int groups, int64_t depth, float* c) {
  multiply<FloatTile, 1>(a, rows, panel, groups, depth, c);
}

void project(const float* const* a, int count, const float* rows, int64_t depth, float* g) {
  multiply<ProjectTile, 1>(a, count, rows, kPanel / kGroup, depth, g);
}

#if defined(SCRIPT_SIMD_BF16)

// One step is a pair of bf16 values; rows and panels are even and zero padded.
template <int M, int V>
struct Bf16Tile {
  static void run(const uint16_t* const* a, int64_t start, const uint16_t* panel, int64_t depth, bool add, float* c) {
    __m512 sum[M][V];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    const uint16_t* rows[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) rows[r] = a[r] + start;
    for (int64_t d = 0; d < depth; ++d) {
      __m512bh b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) b[v] = load<__m512bh>(panel + d * kPanel * 2 + v * 32);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, rows[r] + 2 * d, 4);
        const __m512i both = _mm512_set1_epi32(pair);
        const __m512bh x = load<__m512bh>(&both);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, b[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* p = c + r * kPanel + v * 16;
        _mm512_storeu_ps(p, add ? _mm512_add_ps(_mm512_loadu_ps(p), sum[r][v]) : sum[r][v]);
      }
    }
  }
};

void gemm_bf16(const uint16_t* const* a, int rows, const uint16_t* panel, int groups, int64_t depth, float* c) {
  multiply<Bf16Tile, 2>(a, rows, panel, groups, depth / 2, c);
}

#endif

void scale_products(const float* raw, float row_weight, const float* weight, int columns, float* out) {
  for (int c = 0; c < columns; ++c) out[c] = raw[c] * (row_weight * weight[c]);
  for (int c = columns; c < kPanel; ++c) out[c] = 0.0f;
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

// ---- greedy MAP -------------------------------------------------------------------------------------------------

// A taken column (negative residual) keeps its mark; rounding below zero, or NaN, counts as explained.
inline Vec lower_residual(Vec residual, Vec explained) {
  return residual < Vec{} ? residual : max(residual - explained, Vec{});
}

inline Vec zero_unless_finite(Vec x) {
  const Uint exponent = float_to_bits(x) & 0x7f800000u;
  return bits_to_float(exponent == 0x7f800000u ? Uint{} : float_to_bits(x));
}

constexpr int64_t kAhead = 16;

// M new rows on V vectors of columns, from `column` on. The triangle among the new rows is solved in registers.
template <int M, int V>
struct ExtendTile {
  static void run(const float* const* entries, const float* const* factor, const float* inverse_diagonal, int64_t done,
                  float* rows, float* residual, int column) {
    Vec sum[M][V];
    const float* a[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      a[r] = factor[r];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = zero_unless_finite(load<Vec>(entries[r] + column + v * kFloats));
    }
    for (int64_t d = 0; d < done; ++d) {
      Vec b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        b[v] = load<Vec>(rows + d * kPanel + column + v * kFloats);
      }
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) {
        const Vec x = splat(a[r][d]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] -= x * b[v];
      }
    }
    Vec left[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) left[v] = load<Vec>(residual + column + v * kFloats);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < r; ++q) {
        const Vec x = splat(a[r][done + q]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] -= x * sum[q][v];
      }
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[r][v] *= inverse_diagonal[r];
        store(rows + (done + r) * kPanel + column + v * kFloats, sum[r][v]);
        left[v] = lower_residual(left[v], sum[r][v] * sum[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(residual + column + v * kFloats, left[v]);
  }
};

// Folds the lanes of a vector into each other.
template <int kHalf, typename V, typename Fold>
inline V fold_lanes(V v, Fold fold) {
  Int other;
  for (int l = 0; l < kFloats; ++l) other[l] = l ^ kHalf;
  v = fold(v, __builtin_shuffle(v, other));
  if constexpr (kHalf > 1) v = fold_lanes<kHalf / 2>(v, fold);
  return v;
}

// In every lane: the largest of all lanes, or the lowest.
inline Vec largest_lane(Vec v) {
  return fold_lanes<kFloats / 2>(v, [](Vec a, Vec b) { return max(a, b); });
}
inline Int lowest_lane(Int v) {
  return fold_lanes<kFloats / 2>(v, [](Int a, Int b) { return a < b ? a : b; });
}

float extend(const float* const* entries, int m, const float* const* factor, const float* inverse_diagonal,
             int64_t done, float* rows, float* residual) {
  for (int r = 0; r < m; r += kRows) {
    for (int c = 0; c < kPanelVectors; c += kVectors) {
      dispatch_tile<ExtendTile>(m - r, kVectors, entries + r, factor + r, inverse_diagonal + r, done + r, rows,
                                residual, c * kFloats);
    }
  }
  Vec top = load<Vec>(residual);
#pragma GCC unroll 16
  for (int v = 1; v < kPanelVectors; ++v) top = max(load<Vec>(residual + v * kFloats), top);
  return largest_lane(top)[0];
}

int64_t argmax(const float* x, int64_t n) {
  Vec top = load<Vec>(x);
  for (int64_t i = kFloats; i < n; i += kFloats) top = max(load<Vec>(x + i), top);
  top = largest_lane(top);
  Int lane;
  for (int l = 0; l < kFloats; ++l) lane[l] = l;
  Int first = Int{} + static_cast<int32_t>(n);
  for (int64_t i = n - kFloats; i >= 0; i -= kFloats) {
    first = load<Vec>(x + i) == top ? lane + static_cast<int32_t>(i) : first;
  }
  return lowest_lane(first)[0];
}

Taken take(float* residual, const int32_t* ids) {
  Vec value[kPanelVectors];
  Vec top = load<Vec>(residual);
#pragma GCC unroll 16
  for (int v = 0; v < kPanelVectors; ++v) {
    value[v] = load<Vec>(residual + v * kFloats);
    top = max(value[v], top);
  }
  top = largest_lane(top);
  Int lane;
  for (int l = 0; l < kFloats; ++l) lane[l] = l;
  Int first = Int{} + INT32_MAX;
#pragma GCC unroll 16
  for (int v = 0; v < kPanelVectors; ++v) {
    const Int id = load<Int>(ids + v * kFloats);
    first = (value[v] == top) & (id < first) ? id : first;
  }
  first = lowest_lane(first);
  Vec left = splat(-1.0f);
  Int column{};
#pragma GCC unroll 16
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

constexpr SimdOps make_ops(const char* name) {
  SimdOps ops{};
  ops.name = name;
  ops.widen_bf16 = widen_bf16;
  ops.widen_f16 = widen_f16;
  ops.row_stats = row_stats;
  ops.scale_row = scale_row;
  ops.finite_row = finite_row;
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
