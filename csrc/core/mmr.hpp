// mmr: maximal marginal relevance, greedily: the largest balance * relevance - (1 - balance) * largest cosine to the
// picks. In the terms of Nearest, offset - slope * cosine with slope 1 - balance.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "greedy.hpp"
#include "nearest.hpp"

namespace script::cpu {

// One image: k picks in greedy order, and the score of each at its pick; 0 for bad tokens.
inline void mmr(const TokenView& tokens, const Relevance& relevance, int64_t k, double balance, const Picks& picks,
                const Parallel& parallel) {
  Image image(tokens, parallel);
  Scratch& scratch = image.scratch;
  const int64_t n = tokens.count;
  uint8_t* tier = scratch.take<uint8_t>(n);
  tiers_of(image.rows, relevance, n, tier);
  double low = INFINITY, high = -INFINITY;
  int64_t first = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (tier[i] != 0) continue;
    const double r = relevance[i];
    low = std::min(low, r);
    if (first < 0 || (balance > 0.0 && r > high)) first = i;
    high = std::max(high, r);
  }
  // Residuals are not negative: they count from the score of a least relevant token that equals a pick. Relevances far
  // apart are brought nearer by a power of two.
  const double reach = first < 0 ? 0.0 : balance * (high - low);
  const int exponent = reach > 0x1p60 ? std::ilogb(reach) : 0;
  float* offset = scratch.take<float>(n, 0.0f);
  float* slope = scratch.take<float>(n, static_cast<float>(std::ldexp(1.0 - balance, -exponent)));
  for (int64_t i = 0; i < n; ++i) {
    if (tier[i] != 0) continue;
    offset[i] = static_cast<float>(std::ldexp(balance * (relevance[i] - low) + (1.0 - balance), -exponent));
  }
  nearest_picks(image, {offset, slope, tier}, k, picks, [&](const PlacedTokens& placed, const Nearest&) {
    const int32_t* ids = placed.problem().ids;
    const int64_t positions = placed.problem().positions;
    return first < 0 ? -1 : static_cast<int32_t>(std::find(ids, ids + positions, first) - ids);
  });
  for (int64_t t = 0; t < k; ++t) {
    const int64_t i = picks.indices[t];
    if (tier[i] == kNoTier) continue;
    const double above = std::ldexp(static_cast<double>(picks.gains[t]), exponent);
    picks.gains[t] = saturate(t == 0 ? balance * relevance[i] : above + balance * low - (1.0 - balance));
  }
}

// A batch: k picks per image.
inline void mmr(const TokenBatch& tokens, const ValueBatch<float>& relevance, int64_t k, double balance,
                const Picks& picks, const Threads& threads) {
  for_each_image(tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    mmr(tokens[b], {relevance[b], relevance.stride}, k, balance, picks.at(b * k), parallel);
  });
}

}  // namespace script::cpu
