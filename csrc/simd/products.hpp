// Packing and matrix products: see level.cpp.
#pragma once

#include "vectors.hpp"

namespace script::cpu {
namespace {

// ---- packing ----------------------------------------------------------------------------------------------------

// Swaps the off-diagonal blocks of size kHalf of a square of lanes; the stages 1, 2, 4, ... transpose it.
template <int kHalf, int... kLanes>
inline void swap_blocks(Vec (&v)[kFloats], std::integer_sequence<int, kLanes...>) {
  SCRIPT_UNROLL(16)
  for (int i = 0; i < kFloats; ++i) {
    if (i & kHalf) continue;
    const Vec a = v[i], b = v[i + kHalf];
    v[i] = pick_lanes<((kLanes & kHalf) ? kFloats + kLanes - kHalf : kLanes)...>(a, b);
    v[i + kHalf] = pick_lanes<((kLanes & kHalf) ? kFloats + kLanes : kLanes + kHalf)...>(a, b);
  }
}

inline void transpose(Vec (&v)[kFloats]) {
  swap_blocks<1>(v, AllLanes{});
  swap_blocks<2>(v, AllLanes{});
  if constexpr (kFloats > 4) swap_blocks<4>(v, AllLanes{});
  if constexpr (kFloats > 8) swap_blocks<8>(v, AllLanes{});
}

// Steps of one block of rows before the next: as many streams as rows are read at a time, each far enough for the
// hardware to see it.
constexpr int64_t kPackChunk = 512;

constexpr int kLineVectors = kLine / 4 / kFloats;  // of a line of the panel
// How far ahead of them the panel's lines are fetched: often the caches have them no more, and a store waits for that.
constexpr int64_t kStepsToStore = 64;

struct NoSquares {
  static constexpr bool kWanted = false;
  static Vec add(Vec sum, Vec) { return sum; }
};
struct FloatSquares {
  static constexpr bool kWanted = true;
  static Vec add(Vec sum, Vec x) { return multiply_add(sum, x, x); }  // as a register tile takes it
};

// Where a vector of the panel's columns stands, of step d. As a register tile reads it: chunk after chunk of the depth,
// in a chunk strip after strip of columns, so that what a tile reads stands in one piece.
struct Strips {
  static int64_t at(int64_t d, int vector, int64_t depth) {
    const int64_t start = d - d % kChunk, steps = depth - start < kChunk ? depth - start : kChunk;
    return start * kPanel + vector / kVectors * steps * kStrip + (d - start) * kStrip + vector % kVectors * kFloats;
  }
};
// Step after step.
struct Steps {
  static int64_t at(int64_t d, int vector, int64_t) { return d * kPanel + vector * kFloats; }
};

// Moves 32-bit words as they are: fp32 values, or pairs of bf16. Squares, if wanted, are summed on the way, in the
// steps and chunks of a register tile.
template <typename Layout, typename Squares>
inline void pack_columns(const float* const* rows, int count, int64_t depth, float* panel, float* square) {
  const int blocks = (count + kFloats - 1) / kFloats;
  const int64_t whole = depth - depth % kFloats;
  Vec total[kPanelVectors] = {}, chunk[kPanelVectors] = {};
  for (int64_t start = 0; start < whole; start += kPackChunk) {
    const int64_t end = whole - start < kPackChunk ? whole : start + kPackChunk;
    for (int block = 0; block < kPanelVectors; ++block) {
      Vec sum = {};
      for (int64_t d = start; d < end; d += kFloats) {
        Vec v[kFloats] = {};
        if (block < blocks) {
          SCRIPT_UNROLL(16)
          for (int r = 0; r < kFloats; ++r) {
            if (block * kFloats + r < count) v[r] = load<Vec>(rows[block * kFloats + r] + d);
          }
          transpose(v);
        }
        float* out = panel + Layout::at(d, block, depth);
        const int64_t step = Layout::at(d + 1, block, depth) - Layout::at(d, block, depth);  // in one chunk
        if (block % kLineVectors == 0) {
          const float* ahead = out + kStepsToStore * step;
          SCRIPT_UNROLL(16)
          for (int r = 0; r < kFloats; ++r) __builtin_prefetch(ahead + r * step, 1, 2);
        }
        SCRIPT_UNROLL(16)
        for (int r = 0; r < kFloats; ++r) store(out + r * step, v[r]);
        if constexpr (Squares::kWanted) {
          SCRIPT_UNROLL(16)
          for (int r = 0; r < kFloats; ++r) sum = Squares::add(sum, v[r]);
          if ((d + kFloats) % kChunk == 0) {
            total[block] += sum;
            sum = Vec{};
          }
        }
      }
      chunk[block] = sum;  // not all of a chunk: only at the end
    }
  }
  for (int64_t d = whole; d < depth; ++d) {
    for (int v = 0; v < kPanelVectors; ++v) {
      float* out = panel + Layout::at(d, v, depth);
      store(out, Vec{});
      for (int c = v * kFloats; c < count && c < (v + 1) * kFloats; ++c) {
        __builtin_memcpy(out + c - v * kFloats, rows[c] + d, 4);
      }
      chunk[v] = Squares::add(chunk[v], load<Vec>(out));
    }
  }
  if constexpr (Squares::kWanted) {
    for (int v = 0; v < kPanelVectors; ++v) store(square + v * kFloats, total[v] + chunk[v]);
  }
}

void pack(const float* const* rows, int count, int64_t depth, float* panel) {
  pack_columns<Strips, NoSquares>(rows, count, depth, panel, nullptr);
}

void transpose_rows(const float* const* rows, int count, int64_t depth, float* out) {
  pack_columns<Steps, NoSquares>(rows, count, depth, out, nullptr);
}

void pack_squares(const float* const* rows, int count, int64_t depth, float* panel, float* square) {
  pack_columns<Strips, FloatSquares>(rows, count, depth, panel, square);
}

#if defined(SCRIPT_SIMD_BF16)

// sum += the products of 32-bit pairs of bf16, lane by lane: one processor rounds each of the two products into the sum
// in turn, another their sum, and both take denormals for zero.
#if defined(__aarch64__)
inline Vec add_pairs(Vec sum, Int a, Int b) { return vbfdotq_f32(sum, load<bfloat16x8_t>(&a), load<bfloat16x8_t>(&b)); }
#else
inline Vec add_pairs(Vec sum, Int a, Int b) { return _mm512_dpbf16_ps(sum, load<__m512bh>(&a), load<__m512bh>(&b)); }
#endif

struct Bf16Squares {
  static constexpr bool kWanted = true;
  static Vec add(Vec sum, Vec x) { return add_pairs(sum, load<Int>(&x), load<Int>(&x)); }
};

void pack_squares_bf16(const float* const* rows, int count, int64_t depth, float* panel, float* square) {
  pack_columns<Strips, Bf16Squares>(rows, count, depth, panel, square);
}

#endif

// ---- matrix products --------------------------------------------------------------------------------------------

// Writes a register tile to c, or adds it there.
template <int M, int V>
[[gnu::always_inline]] inline void store_tile(const Vec (&sum)[M][V], bool add, float* c) {
  SCRIPT_UNROLL(8)
  for (int r = 0; r < M; ++r) {
    SCRIPT_UNROLL(4)
    for (int v = 0; v < V; ++v) {
      float* p = c + r * kPanel + v * kFloats;
      store(p, add ? load<Vec>(p) + sum[r][v] : sum[r][v]);
    }
  }
}

// A register tile of M rows x V vectors of a strip over `depth` steps, written to c or added to it. Meanwhile as many
// lines from `next` on, if it is not null, are fetched into L2.
template <int M, int V>
struct FloatTile {
  static void run(const float* const* a, int64_t start, const float* strip, int64_t depth, bool add, const char* next,
                  float* c) {
    Vec sum[M][V] = {};
    const float* rows[M];
    SCRIPT_UNROLL(8)
    for (int r = 0; r < M; ++r) rows[r] = a[r] + start;
    for (int64_t d = 0; d < depth; ++d) {
      if (next != nullptr) __builtin_prefetch(next + d * kLine, 0, 2);
      Vec b[V];
      SCRIPT_UNROLL(4)
      for (int v = 0; v < V; ++v) b[v] = load<Vec>(strip + d * kStrip + v * kFloats);
      SCRIPT_UNROLL(8)
      for (int r = 0; r < M; ++r) {
        const Vec x = splat(rows[r][d]);
        SCRIPT_UNROLL(4)
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(sum[r][v], x, b[v]);
      }
    }
    store_tile(sum, add, c);
  }
};

// Walks the chunks of the depth and, inside one, the register tiles: the panel's chunk stays near while all rows read
// it. The first tiles fetch the next chunk, a line a step: panels of large images come from memory, and the hardware
// does not see far enough ahead.
template <template <int, int> class Tile, int kWord, typename Element>
inline void multiply(const Element* const* a, int rows, const Element* panel, int groups, int64_t depth, float* c) {
  for (int64_t start = 0; start < depth; start += kChunk) {
    const int64_t steps = depth - start < kChunk ? depth - start : kChunk;
    const Element* chunk = panel + start * kPanel * kWord;
    const char* next = reinterpret_cast<const char*>(chunk + steps * kPanel * kWord);
    int64_t fetched = 0;  // lines of the next chunk
    for (int r = 0, m = 0; r < rows; r += m) {
      m = tile_rows(rows - r);
      for (int v = 0; v < groups * kGroupVectors; v += kVectors) {
        const int vectors = groups * kGroupVectors - v, strip = v / kVectors;
        const bool fetch = fetched * kLine < steps * kPanel * 4;
        dispatch_tile<Tile>(m, vectors < kVectors ? vectors : kVectors, a + r, start * kWord,
                            chunk + strip * steps * kStrip * kWord, steps, start > 0,
                            fetch ? next + fetched * kLine : nullptr, c + r * kPanel + v * kFloats);
        fetched += steps;
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
  static void run(const uint16_t* const* a, int64_t start, const uint16_t* strip, int64_t depth, bool add,
                  const char* next, float* c) {
    Vec sum[M][V] = {};
    const uint16_t* rows[M];
    SCRIPT_UNROLL(8)
    for (int r = 0; r < M; ++r) rows[r] = a[r] + start;
    for (int64_t d = 0; d < depth; ++d) {
      if (next != nullptr) __builtin_prefetch(next + d * kLine, 0, 2);
      Int b[V];
      SCRIPT_UNROLL(4)
      for (int v = 0; v < V; ++v) b[v] = load<Int>(strip + (d * kStrip + v * kFloats) * 2);
      SCRIPT_UNROLL(8)
      for (int r = 0; r < M; ++r) {
        const Int x = Int{} + load<int32_t>(rows[r] + 2 * d);
        SCRIPT_UNROLL(4)
        for (int v = 0; v < V; ++v) sum[r][v] = add_pairs(sum[r][v], x, b[v]);
      }
    }
    store_tile(sum, add, c);
  }
};

void gemm_bf16(const uint16_t* const* a, int rows, const uint16_t* panel, int groups, int64_t depth, float* c) {
  multiply<Bf16Tile, 2>(a, rows, panel, groups, depth / 2, c);
}

#endif

// In as many sums as the order leaves room for.
template <typename Add>
inline float dot_of_words(const float* x, const float* y, int64_t n, Add add) {
  constexpr int kSums = 4;
  Vec sum[kSums] = {};
  int64_t d = 0;
  for (; d + kSums * kFloats <= n; d += kSums * kFloats) {
    SCRIPT_UNROLL(4)
    for (int s = 0; s < kSums; ++s) {
      sum[s] = add(sum[s], load<Vec>(x + d + s * kFloats), load<Vec>(y + d + s * kFloats));
    }
  }
  for (; d < n; d += kFloats) {
    const int64_t left = n - d < kFloats ? n - d : kFloats;
    float a[kFloats] = {}, b[kFloats] = {};
    __builtin_memcpy(a, x + d, static_cast<uint64_t>(left) * 4);
    __builtin_memcpy(b, y + d, static_cast<uint64_t>(left) * 4);
    sum[0] = add(sum[0], load<Vec>(a), load<Vec>(b));
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

float dot(const float* x, const float* y, int64_t n) {
  return dot_of_words(x, y, n, [](Vec sum, Vec a, Vec b) { return multiply_add(sum, a, b); });
}

#if defined(SCRIPT_SIMD_BF16)

float dot_bf16(const float* x, const float* y, int64_t n) {
  return dot_of_words(x, y, n, [](Vec sum, Vec a, Vec b) { return add_pairs(sum, load<Int>(&a), load<Int>(&b)); });
}

#endif

void weigh_products(const float* raw, const PivotWeights& pivot, const ColumnWeights& columns, int count, float* out) {
  for (int c = 0; c < count; c += kFloats) {
    const Vec x = load<Vec>(raw + c);
    const Int equal = (x == splat(pivot.square)) & (x == load<Vec>(columns.square + c));
    const Vec product = x * (load<Vec>(columns.weight + c) * pivot.weight);
    store(out + c, equal ? load<Vec>(columns.relevance + c) * pivot.relevance : product);
  }
  for (int c = count; c < kPanel; ++c) out[c] = 0.0f;
}

}  // namespace
}  // namespace script::cpu
