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
  // A choice down to the last token, also of residual 0: there is no rank to exhaust.
  static float exhausted_at(float) { return -1.0f; }
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

// Tokens that may be picked, and the others: what is bad in itself, or in the value that came with it.
inline void tiers_of(const RowTable& table, const Relevance& values, int64_t n, uint8_t* tier) {
  for (int64_t i = 0; i < n; ++i) {
    const bool bad = table.bad[i] || (values.data != nullptr && !std::isfinite(values[i]));
    tier[i] = bad ? kNoTier : 0;
  }
}

// A rule by token: what it offers, and what a cosine of 1 to a pick takes off.
struct NearestRule {
  const float* offset;
  const float* slope;
  uint8_t* tier;  // 0 or kNoTier; used up
};

// Picks by the rule, all but the first of them, which first(placed, factor) chooses, as a position.
//
// Residuals part soon: a token with a near pick is not next for long. So after a while, unless panels wait already,
// tokens change places, the far ones to the front, and the panels of the others wait. A token's residual is all that
// has to move with it.
template <typename First>
void nearest_picks(const Image& image, const NearestRule& rule, int64_t k, const Picks& picks, const First& first) {
  constexpr int64_t kLeast = 48;  // picks to come that are worth a second packing
  Scratch scratch;
  const int64_t n = image.tokens.count;
  const float* ones = scratch.take<float>(n, 1.0f);
  float* residual = scratch.take<float>(n);
  int64_t picked = 0;
  {
    Scratch leg;
    const PlacedTokens placed(image, {ones, rule.offset, rule.offset, rule.tier}, leg);
    Nearest factor(placed.at_positions(rule.offset, leg), placed.at_positions(rule.slope, leg), placed, leg);
    GreedyProblem problem = placed.problem();
    problem.first = first(placed, factor);
    problem.diagonal = leg.take<float>(problem.positions, Nearest::kUnset);
    const Pause pause{k * 3 / 10, k - kLeast};
    picked = greedy_map(placed.source(), problem, factor, k, picks, image.parallel, pause);
    for (int64_t p = 0; p < problem.positions && picked < k; ++p) {
      if (problem.ids[p] != kHole) residual[problem.ids[p]] = factor.residual[p];
    }
  }
  if (picked == k) return;
  float least = Nearest::kUnset;
  for (int64_t i = 0; i < n; ++i) {
    if (rule.tier[i] != 0) continue;
    if (residual[i] < 0.0f) rule.tier[i] = kHoleTier;  // taken
    if (residual[i] >= 0.0f) least = std::min(least, residual[i]);
  }
  float* above = scratch.take<float>(n);
  for (int64_t i = 0; i < n; ++i) above[i] = std::max(residual[i] - least, 0.0f);
  const PlacedTokens placed(image, {ones, above, rule.offset, rule.tier}, scratch);
  Nearest factor(placed.at_positions(rule.offset, scratch), placed.at_positions(rule.slope, scratch), placed, scratch);
  GreedyProblem problem = placed.problem();
  problem.diagonal = placed.at_positions(residual, scratch);
  greedy_map(placed.source(), problem, factor, k - picked, picks.at(picked), image.parallel);
}

}  // namespace script::cpu
