// Vectors of the SIMD level at hand, and how a register tile is chosen: see level.cpp.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <utility>  // index sequences: types only

#include "simd.hpp"

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define SCRIPT_SIMD_BF16
#endif

// Unrolls the loop that follows, of at most n turns.
#define SCRIPT_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define SCRIPT_UNROLL(n) SCRIPT_PRAGMA(unroll n)
#else
#define SCRIPT_UNROLL(n) SCRIPT_PRAGMA(GCC unroll n)
#endif

namespace script::cpu {
namespace {

constexpr int kFloats = SCRIPT_SIMD_FLOATS;
constexpr int kRows = SCRIPT_SIMD_ROWS;
constexpr int kVectors = SCRIPT_SIMD_VECTORS;
constexpr int kGroupVectors = kGroup / kFloats;
constexpr int kPanelVectors = kPanel / kFloats;
constexpr int kStrip = kVectors * kFloats;  // columns of a register tile
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

// sum + x * y and sum - x * y, rounded once where the level has an instruction for it. Written out: left to themselves,
// compilers take chains of them apart as they think best for a processor, and equal rows would not have equal products.
#if defined(__AVX512F__)
inline Vec multiply_add(Vec sum, Vec x, Vec y) { return _mm512_fmadd_ps(x, y, sum); }
inline Vec multiply_subtract(Vec sum, Vec x, Vec y) { return _mm512_fnmadd_ps(x, y, sum); }
#elif defined(__FMA__)
inline Vec multiply_add(Vec sum, Vec x, Vec y) { return _mm256_fmadd_ps(x, y, sum); }
inline Vec multiply_subtract(Vec sum, Vec x, Vec y) { return _mm256_fnmadd_ps(x, y, sum); }
#elif defined(__aarch64__)
inline Vec multiply_add(Vec sum, Vec x, Vec y) { return vfmaq_f32(sum, x, y); }
inline Vec multiply_subtract(Vec sum, Vec x, Vec y) { return vfmsq_f32(sum, x, y); }
#else
inline Vec multiply_add(Vec sum, Vec x, Vec y) { return sum + x * y; }
inline Vec multiply_subtract(Vec sum, Vec x, Vec y) { return sum - x * y; }
#endif
#if defined(__FMA__) || defined(__aarch64__)
inline float multiply_add(float sum, float x, float y) { return __builtin_fmaf(x, y, sum); }
#else
inline float multiply_add(float sum, float x, float y) { return sum + x * y; }
#endif
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

inline Int lane_numbers() {
  Int lane;
  for (int l = 0; l < kFloats; ++l) lane[l] = l;
  return lane;
}

// The lanes of a and, from kFloats on, of b, in the order that is given.
template <int... kLanes, typename V>
[[gnu::always_inline]] inline V pick_lanes(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kLanes...);
#else
  return __builtin_shuffle(a, b, Int{kLanes...});
#endif
}

// Every lane gets the one that stands kHalf further on, or before.
template <int kHalf, typename V, int... kLanes>
[[gnu::always_inline]] inline V swap_lanes(V v, std::integer_sequence<int, kLanes...>) {
  return pick_lanes<(kLanes ^ kHalf)...>(v, v);
}

using AllLanes = std::make_integer_sequence<int, kFloats>;

// Folds the lanes of a vector into each other.
template <int kHalf, typename V, typename Fold>
[[gnu::always_inline]] inline V fold_lanes(V v, Fold fold) {
  v = fold(v, swap_lanes<kHalf>(v, AllLanes{}));
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

// Whether a register tile is narrower than a panel, and goes over it in several strips.
constexpr bool kNarrow = kVectors < kPanelVectors;
constexpr int64_t kLine = 64;  // bytes

// Rows of the next register tile when `left` are still to go: as even as they come, since a tile of a row or two waits
// for its own sums: eight rows are 4 and 4, not 6 and 2. Three rows of four vectors wait for their loads instead.
// Where a tile spans a panel, its sums are many enough, and fewer tiles are as good or better.
inline int tile_rows(int left) {
  if (!kNarrow) return left < kRows ? left : kRows;
  if (kVectors > 2 && left == kRows + 1) return kRows;
  const int tiles = (left + kRows - 1) / kRows;
  return (left + tiles - 1) / tiles;
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

}  // namespace
}  // namespace script::cpu
