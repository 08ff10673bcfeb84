// dpp_map: greedy MAP on a ready kernel matrix.
#pragma once

#include "greedy.hpp"

namespace script::cpu {

// One image's kernel, strides in elements. Entries that are not finite count as 0.
struct KernelView {
  const float* data = nullptr;
  int64_t count = 0;
  int64_t row_stride = 0, column_stride = 1;

  float diagonal(int64_t i) const { return data[i * (row_stride + column_stride)]; }

  // A panel of row i, zero padded.
  void row(int64_t i, int64_t panel, float* out) const {
    const int64_t start = panel * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, count - start);
    const float* x = data + i * row_stride + start * column_stride;
    if (column_stride == 1) {
      simd().finite_row(x, columns, out);
    } else {
      for (int64_t c = 0; c < columns; ++c) out[c] = x[c * column_stride];
      simd().finite_row(out, columns, out);
    }
    for (int64_t c = columns; c < kPanel; ++c) out[c] = 0.0f;
  }
};

// One image, panel by panel: a panel's best residual is an upper bound for as long as later pivots have not been
// applied to it. The panel of largest bound is brought up to date, with all pivots it lacks at once, until it is one
// that lacks none: its best token is then the best of all. Rows of a ready kernel cost nothing, so no more is asked of
// a panel than that; greedy_map is for rows that cost a matrix product. Past the rank picks go by K_ii, which stands in
// for the relevance that a bare kernel does not tell.
inline void dpp_map(const KernelView& kernel, int64_t k, int64_t* indices, float* gains) {
  Scratch scratch;
  const int64_t n = kernel.count, positions = pad_to_panel(n), panels = positions / kPanel;
  int32_t* ids = scratch.take<int32_t>(positions, kHole);
  float* diagonal = scratch.take<float>(positions, 0.0f);
  uint8_t* tier = scratch.take<uint8_t>(positions, kHoleTier);
  for (int64_t i = 0; i < n; ++i) {
    const float x = kernel.diagonal(i);
    ids[i] = static_cast<int32_t>(i);
    tier[i] = std::isfinite(x) ? 0 : kNoTier;
    diagonal[i] = std::isfinite(x) ? x : 0.0f;
  }
  const GreedyProblem problem{positions, diagonal, ids, diagonal, tier};

  float* residual = scratch.take<float>(positions, -1.0f);
  float* bound = scratch.take<float>(panels);
  int64_t* applied = scratch.take<int64_t>(panels, 0);
  float largest = 0.0f;
  for (int64_t p = 0; p < n; ++p) {
    if (tier[p] == 0) residual[p] = std::max(diagonal[p], 0.0f);
    largest = std::max(largest, residual[p]);
  }
  const auto best_of = [&](int64_t p) { return simd().argmax(residual + p * kPanel, kPanel); };
  for (int64_t p = 0; p < panels; ++p) bound[p] = residual[p * kPanel + best_of(p)];

  const detail::CholeskyRows rows{scratch.take<float>(positions * k), k};
  float* columns = scratch.take<float>(k * k);  // [pivot][earlier pivots]: the factor of the pivots themselves
  float* inverse = scratch.take<float>(k);
  float* entries = scratch.take<float>(kPanel * kPanel);
  int64_t picked = 0;
  while (picked < k) {
    const int64_t p = simd().argmax(bound, panels);
    if (applied[p] < picked) {
      const int64_t done = applied[p];
      const int m = static_cast<int>(std::min<int64_t>(kPanel, picked - done));
      const float* pointers[kPanel];
      for (int a = 0; a < m; ++a) {
        pointers[a] = columns + (done + a) * k;
        kernel.row(indices[done + a], p, entries + a * kPanel);
      }
      simd().project(pointers, m, rows.panel(p), done, entries);
      simd().solve(entries, m, columns + done * k + done, k, inverse + done, rows.panel(p) + done * kPanel,
                   residual + p * kPanel);
      applied[p] += m;
      bound[p] = residual[p * kPanel + best_of(p)];
      continue;
    }
    const int64_t best = p * kPanel + best_of(p);
    const float gain = bound[p];
    if (gain <= kRankTolerance * largest) break;  // a taken or bad token stands at -1
    rows.column(best, picked, columns + picked * k);
    inverse[picked] = 1.0f / std::sqrt(gain);
    residual[best] = -1.0f;
    bound[p] = residual[p * kPanel + best_of(p)];
    indices[picked] = best;
    gains[picked++] = gain;
  }
  picked = detail::take_by_priority(problem, 0, k, picked, residual, indices, gains);
  detail::take_by_priority(problem, kNoTier, k, picked, residual, indices, gains);
}

}  // namespace script::cpu
