// max_min: farthest points first. Each pick is the token of largest relevance * distance to the nearest pick, the
// distance being 1 - cosine. In the terms of Nearest, both offset and slope are the relevance.
#pragma once

#include <algorithm>
#include <cstdint>

#include "farthest.hpp"
#include "greedy.hpp"
#include "nearest.hpp"

namespace script::cpu {

// One image: k picks in greedy order, and the relevance times distance of each at its pick, that of the first being its
// distance to the nearest other token. `relevance` without data: 1 for all; negative ones count as 0.
inline void max_min(const TokenView& tokens, const Relevance& relevance, int64_t k, const Picks& picks,
                    const Parallel& parallel) {
  Image image(tokens, parallel);
  Scratch& scratch = image.scratch;
  const int64_t n = tokens.count;
  uint8_t* tier = scratch.take<uint8_t>(n);
  tiers_of(image.rows, relevance, n, tier);
  float* weight = scratch.take<float>(n, 1.0f);
  float scale = 1.0f;
  if (relevance.data != nullptr) {
    float largest = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = tier[i] == 0 ? std::max(relevance[i], 0.0f) : 0.0f;
      largest = std::max(largest, weight[i]);
    }
    scale = power_of_two_scale(largest);
    for (int64_t i = 0; i < n; ++i) weight[i] *= scale;
  }
  Farthest start;
  nearest_picks(image, {weight, weight, tier}, k, picks, [&](const PlacedTokens& placed, const Nearest& factor) {
    start = farthest(placed, factor, parallel);
    return start.position;
  });
  if (start.position >= 0 && k > 0) picks.gains[0] = start.residual;
  for (int64_t t = 0; t < k && scale != 1.0f; ++t)
    picks.gains[t] = saturate(static_cast<double>(picks.gains[t]) / scale);
}

// A batch: k picks per image.
inline void max_min(const TokenBatch& tokens, const ValueBatch<float>& relevance, int64_t k, const Picks& picks,
                    const Threads& threads) {
  for_each_image(tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    const Relevance own{relevance.data == nullptr ? nullptr : relevance[b], relevance.stride};
    max_min(tokens[b], own, k, picks.at(b * k), parallel);
  });
}

}  // namespace script::cpu
