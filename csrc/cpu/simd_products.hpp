// Packing and matrix products: see simd_kernels.hpp.
#pragma once

#include "simd_vectors.hpp"

namespace script::cpu {
namespace {

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

// Steps of one block of rows before the next: as many streams as rows are read at a time, each far enough for the
// hardware to see it.
constexpr int64_t kPackChunk = 512;

// Moves 32-bit words as they are: fp32 values, or pairs of bf16.
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
struct FloatTile {
  static void run(const float* const* a, int64_t start, const float* panel, int64_t depth, bool add, float* c) {
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

}  // namespace
}  // namespace script::cpu
