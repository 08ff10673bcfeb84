// A factor of greedy.hpp (see cholesky.hpp) for rules that look at the pick nearest to a token: its residual is the
// least, over the picks, of offset - slope * cosine. That falls as picks are made, and there is nothing to carry along
// but the residual itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "token_source.hpp"

namespace script::cpu {

struct Nearest {
  static constexpr float kRankTolerance = -1.0f;  // a choice down to the last token: there is no rank to exhaust
  // Where residuals start from: larger than any, so that the first pick sets all.
  static constexpr float kUnset = std::numeric_limits<float>::max();

  const float* offset;  // per position
  const float* slope;
  float* residual;  // -1 for a hole, a taken or a bad token
  int64_t* applied;

  Nearest(const float* offsets, const float* slopes, const PlacedTokens& placed, Scratch& scratch)
      : offset(offsets),
        slope(slopes),
        residual(scratch.take<float>(placed.problem().positions, -1.0f)),
        applied(scratch.take<int64_t>(placed.problem().positions / kPanel, 0)) {}

  static int64_t entry_work(int64_t) { return 1; }

  template <typename Entries>
  float extend(int64_t p, int64_t pivots, const Entries& entries) {
    const int m = static_cast<int>(std::min<int64_t>(kPanel, pivots - applied[p]));
    const float* cosines[kPanel];
    entries(applied[p], m, cosines);
    applied[p] += m;
    return simd().lower(cosines, m, offset + p * kPanel, slope + p * kPanel, residual + p * kPanel);
  }

  class Members {
   public:
    Members(const Nearest& factor, const int32_t* positions, int count, int64_t, Scratch&) {
      for (int c = 0; c < count; ++c) {
        offset_[c] = factor.offset[positions[c]];
        slope_[c] = factor.slope[positions[c]];
      }
    }
    void condition(const int*, int, float*) const {}
    void take(int member, const float* cosines, float* residual) {
      residual[member] = -1.0f;
      simd().lower(&cosines, 1, offset_, slope_, residual);
    }

   private:
    alignas(64) float offset_[kPanel] = {};
    alignas(64) float slope_[kPanel] = {};
  };
};

// The problem of choosing from the first pick on, which the rules settle each in its own way.
inline GreedyProblem after_first(const PlacedTokens& placed, int32_t first, Scratch& scratch) {
  GreedyProblem problem = placed.problem();
  problem.diagonal = scratch.take<float>(problem.positions, Nearest::kUnset);
  problem.first = first;
  return problem;
}

// Tokens that may be picked, and the others: what is bad in itself, or in the value that came with it.
inline void tiers_of(const RowTable& table, const Relevance& values, int64_t n, uint8_t* tier) {
  for (int64_t i = 0; i < n; ++i) {
    const bool bad = table.bad[i] || (values.data != nullptr && !std::isfinite(values[i]));
    tier[i] = bad ? kNoTier : 0;
  }
}

}  // namespace script::cpu
