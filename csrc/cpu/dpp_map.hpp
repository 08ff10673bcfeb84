// dpp_map: greedy MAP on a ready kernel matrix.
#pragma once

#include "greedy.hpp"

namespace script::cpu {

// One image's kernel, strides in elements.
struct KernelView {
  const float* data = nullptr;
  int64_t count = 0;
  int64_t row_stride = 0, column_stride = 1;
  float at(int64_t i, int64_t j) const {
    const float x = data[i * row_stride + j * column_stride];
    return std::isfinite(x) ? x : 0.0f;
  }
};

class DenseSource {
 public:
  explicit DenseSource(const KernelView& kernel) : kernel_(kernel) {}

  // A panel of row i, zero padded, with 0 for what is not finite.
  void row(int64_t i, int64_t panel, float* out) const {
    const int64_t start = panel * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, kernel_.count - start);
    const float* x = kernel_.data + i * kernel_.row_stride + start * kernel_.column_stride;
    if (kernel_.column_stride == 1) {
      simd().finite_row(x, columns, out);
    } else {
      for (int64_t c = 0; c < columns; ++c) out[c] = x[c * kernel_.column_stride];
      simd().finite_row(out, columns, out);
    }
    for (int64_t c = columns; c < kPanel; ++c) out[c] = 0.0f;
  }

  class Rows {
   public:
    Rows(const DenseSource& source, const int32_t* pivots, int m, Scratch&) : source_(source), pivots_(pivots), m_(m) {}
    void panel(int64_t p, float* out) const {
      for (int a = 0; a < m_; ++a) source_.row(pivots_[a], p, out + a * kPanel);
    }

   private:
    const DenseSource& source_;
    const int32_t* pivots_;
    int m_;
  };

  class Pool {
   public:
    Pool(const DenseSource& source, const int32_t* positions, int count, Scratch&)
        : kernel_(source.kernel_), positions_(positions), count_(count) {}
    void rows(const int* members, int m, float* out) const {
      for (int a = 0; a < m; ++a) {
        for (int c = 0; c < kPanel; ++c) {
          out[a * kPanel + c] = c < count_ ? kernel_.at(positions_[members[a]], positions_[c]) : 0.0f;
        }
      }
    }

   private:
    KernelView kernel_;
    const int32_t* positions_;
    int count_;
  };

 private:
  KernelView kernel_;
};

namespace detail {

// Row by row, for small problems: every pivot is applied to every token at once. No tiers.
inline void greedy_map_by_rows(const DenseSource& source, const GreedyProblem& problem, int64_t k, int64_t* indices,
                               float* gains) {
  Scratch scratch;
  const int64_t panels = problem.positions / kPanel;
  float* residual = scratch.take<float>(problem.positions, -1.0f);
  float largest = 0.0f;
  for (int64_t p = 0; p < problem.positions; ++p) {
    if (problem.tier[p] != 0) continue;
    residual[p] = std::max(problem.diagonal[p], 0.0f);
    largest = std::max(largest, residual[p]);
  }
  const CholeskyRows rows{scratch.take<float>(problem.positions * k), k};
  float* pivot = scratch.take<float>(k);
  alignas(64) float entries[kPanel];
  int64_t picked = 0;
  while (picked < k) {
    const int64_t best = simd().argmax(residual, problem.positions);
    const float gain = residual[best];
    if (gain <= kRankTolerance * largest) break;  // a taken or bad token stands at -1
    rows.column(best, picked, pivot);
    residual[best] = -1.0f;
    const float inverse = 1.0f / std::sqrt(gain);
    for (int64_t p = 0; p < panels && picked + 1 < k; ++p) {
      source.row(best, p, entries);
      simd().step(entries, pivot, picked, inverse, rows.panel(p), residual + p * kPanel);
    }
    indices[picked] = best;
    gains[picked++] = gain;
  }
  picked = take_by_priority(problem, 0, k, picked, residual, indices, gains);
  take_by_priority(problem, kNoTier, k, picked, residual, indices, gains);
}

}  // namespace detail

// Up to this many Cholesky entries (512 KiB) the rows stay in the L2 cache and plain steps win over pools.
inline constexpr int64_t kByRowsLimit = 131072;

// One image. Past the rank picks go by K_ii, which stands in for the relevance a bare kernel does not tell.
inline void dpp_map(const KernelView& kernel, int64_t k, int64_t* indices, float* gains, const Parallel& parallel) {
  Scratch scratch;
  const int64_t n = kernel.count;
  const int64_t positions = pad_to_panel(n);
  int32_t* ids = scratch.take<int32_t>(positions, kHole);
  float* diagonal = scratch.take<float>(positions, 0.0f);
  uint8_t* tier = scratch.take<uint8_t>(positions, kHoleTier);
  for (int64_t i = 0; i < n; ++i) {
    const float x = kernel.data[i * (kernel.row_stride + kernel.column_stride)];
    ids[i] = static_cast<int32_t>(i);
    tier[i] = std::isfinite(x) ? 0 : kNoTier;
    diagonal[i] = std::isfinite(x) ? x : 0.0f;
  }
  const GreedyProblem problem{positions, diagonal, ids, diagonal, tier};
  const DenseSource source(kernel);
  if (n * k <= kByRowsLimit) {
    detail::greedy_map_by_rows(source, problem, k, indices, gains);
  } else {
    greedy_map(source, problem, k, indices, gains, parallel);
  }
}

}  // namespace script::cpu
