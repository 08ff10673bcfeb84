// Run-time dispatch over SIMD levels.
//
// The inner loops live in level.cpp and what it includes, compiled once per level of levels.cmake with that level's
// compiler flags; everything else is compiled for the baseline only. Callers take the table of the best level the CPU
// has from simd(). SCRIPT_KERNELS_SIMD=<level> in the environment lowers it (never raises it).
//
// Layout shared by all loops: tokens stand in panels of kPanel columns, panel[depth][kPanel], 64-byte aligned and zero
// padded, so that column j of a panel always takes the same arithmetic whatever its neighbours are. That is what makes
// exact duplicates tie bit for bit and an item's result independent of the batch and of the number of threads.
#pragma once

#include <cstdint>

namespace script::cpu {

inline constexpr int kPanel = 64;       // columns of a panel
inline constexpr int kCoordinates = 6;  // of a point that `closest` looks at
inline constexpr int kGroup = 16;       // columns a kernel may skip at once at the end of the last panel

struct RowStats {
  uint32_t amax_bits;  // largest |x| as float bits; >= 0x7f800000 when the row holds NaN or Inf
  float sum_squares;
  float dot;  // with the second row, 0 without one
};

// What one source token has seen so far of the destinations, one slot per lane.
struct MatchLanes {
  alignas(64) float best[kGroup];
  alignas(64) float above_sum[kGroup];  // sum of the similarities >= threshold
  alignas(64) float sum[kGroup];
  alignas(64) int32_t best_column[kGroup];
  alignas(64) int32_t above[kGroup];  // how many similarities >= threshold
};

// What turns raw products into kernel entries r_i r_j cos(x_i, x_j).
struct PivotWeights {
  float weight;     // relevance / norm
  float relevance;  // 0 for a zero row
  float square;     // raw product of the row with itself
};
struct ColumnWeights {
  const float* weight;
  const float* relevance;
  const float* square;
};

struct Taken {
  int32_t column;
  float left;  // the largest residual after it
};

struct Closest {
  int64_t point;
  float distance;  // squared
};

struct SimdOps {
  const char* name;
  int64_t thread_work;  // multiply-adds that are worth a thread: 20 to 60 us of one core

  void (*widen_bf16)(const uint16_t* x, int64_t n, float* out);
  void (*widen_f16)(const uint16_t* x, int64_t n, float* out);
  RowStats (*row_stats)(const float* x, const float* y, int64_t n);  // y may be null
  void (*scale_row)(const float* x, float scale, int64_t n, float* out);

  // out[d][c] = rows[c][d] for c < count, zero for count <= c < kPanel.
  void (*transpose)(const float* const* rows, int count, int64_t depth, float* out);
  // The same as gemm reads it: panel[d][c] in an order that is the level's own.
  void (*pack)(const float* const* rows, int count, int64_t depth, float* panel);
  // The same, and square[c] = the product of column c with itself, bit for bit as gemm takes it; or as gemm_bf16 does,
  // for rows of pairs.
  void (*pack_squares)(const float* const* rows, int count, int64_t depth, float* panel, float* square);
  void (*pack_squares_bf16)(const float* const* rows, int count, int64_t depth, float* panel, float* square);
  // c[r][0..16*groups) = sum_d a[r][d] * panel[d][.]: chunks of 128 steps, summed in order. c is [rows][kPanel].
  void (*gemm)(const float* const* a, int rows, const float* panel, int groups, int64_t depth, float* c);

  // The same on bf16 rows of even length and panels of pairs, with fp32 sums: `pack` on pairs as 32-bit words makes
  // them. Null where the CPU has no bf16 dot product.
  void (*gemm_bf16)(const uint16_t* const* a, int rows, const uint16_t* panel, int groups, int64_t depth, float* c);

  // x . y of n values, or of n pairs of bf16, summed in any order: off by no more than n / 8 + 64 roundings would take
  // it, each of 2^-24 of the product of their norms.
  float (*dot)(const float* x, const float* y, int64_t n);
  float (*dot_bf16)(const float* x, const float* y, int64_t n);

  // Kernel entries of one pivot with the columns c < count, a multiple of kGroup, from the raw products; 0 up to
  // kPanel. raw[c] * (pivot.weight * weight[c]); where raw[c] is the square of either side, the rows are equal as far
  // as fp32 can tell, and it is relevance times relevance.
  void (*weigh_products)(const float* raw, const PivotWeights& pivot, const ColumnWeights& columns, int count,
                         float* out);

  // Folds columns [0, columns) of a panel of raw products into the source's lanes; similarity = raw * source_weight *
  // weight[c].
  void (*match)(const float* raw, float source_weight, const float* weight, int columns, int32_t first_column,
                float threshold, MatchLanes* lanes);

  // g[r][c] -= sum_d a[r][d] * rows[d][c] for all columns of a panel, one chain of multiply-adds in the order of d:
  // taking the depth in pieces gives the same bits.
  void (*project)(const float* const* a, int count, const float* rows, int64_t depth, float* g);
  // Cholesky rows of `m` new pivots on one panel of columns. entries[a][kPanel]: kernel entries of pivot a (not finite
  // counts as 0); factor[a]: its column of the Cholesky rows, done + a values; rows[done][kPanel]: the rows so far.
  // Writes rows[done + a] = (entries[a] - sum_s factor[a][s] rows[s]) * inverse_diagonal[a], in project's chains, and
  // takes their squares off `residual`, one after the other, clamped at 0; a column with a negative one (taken) keeps
  // it. Returns the largest residual of the panel.
  float (*extend)(const float* const* entries, int m, const float* const* factor, const float* inverse_diagonal,
                  int64_t done, float* rows, float* residual);
  // Lowers each residual of a panel to offset - slope * the largest of the m > 0 entries of its column, and that to 0
  // at least; a column with a negative one (taken) keeps it. entries[a][kPanel], as of `extend`. Returns the largest.
  float (*lower)(const float* const* entries, int m, const float* offset, const float* slope, float* residual);
  // Of the points c < n with coordinates x[a][c], the one closest to point `own` of those farther than `beyond` (a
  // squared distance), of equals the lowest; `own` itself if there is none. n is a multiple of kGroup.
  Closest (*closest)(const float* const* x, int64_t n, int64_t own, float beyond);
  // Lowest index of the largest of n > 0 values, none of them NaN; n is a multiple of kGroup.
  int64_t (*argmax)(const float* x, int64_t n);
  // Takes the largest residual of a panel, of equals the one of lowest id; it then stands at -1. ids are distinct
  // there.
  Taken (*take)(float* residual, const int32_t* ids);
};

// The levels that are built for this kind of processor.
extern const SimdOps kOps_baseline;
#if defined(__x86_64__)
extern const SimdOps kOps_avx2, kOps_avx512, kOps_avx512_bf16;
#elif defined(__aarch64__)
extern const SimdOps kOps_neon_bf16;
#endif

// The table for this CPU.
const SimdOps& simd();

}  // namespace script::cpu
