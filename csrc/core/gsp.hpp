// gsp: drops the most redundant source tokens of a bipartite graph, in rounds.
#pragma once

#include <algorithm>

#include "bipartite_match.hpp"
#include "schedule.hpp"

namespace script::cpu {

struct GspOptions {
  float threshold = 0.2f;
  float gamma = 1.0f;
  int64_t min_degree = 4;
  int64_t rounds = 1;
};

inline GspOptions gsp_options(double threshold, double gamma, int64_t min_degree, int64_t rounds) {
  return {saturate(threshold), saturate(gamma), min_degree, rounds};
}

namespace detail {

// d exp(gamma (mu - tau)); thinly connected tokens count half of that plus half their density.
inline float redundancy(int32_t degree, float mean, float density, const GspOptions& options) {
  const float graph =
      degree == 0 ? 0.0f : static_cast<float>(degree) * std::exp(options.gamma * (mean - options.threshold));
  return degree >= options.min_degree ? graph : 0.5f * graph + 0.5f * density;
}

}  // namespace detail

// One image whose rows have been scanned. Keeps exactly `keep` tokens, which the caller has checked that the rounds can
// reach. mask and score: one entry per token; score is what a token had when last a source, else 0. The image's tile,
// if it has one, is given the products of the first round.
inline void gsp_scanned(Image& image, int64_t keep, const GspOptions& options, Truth* mask, float* score) {
  Scratch scratch;
  const int64_t n = image.tokens.count;
  MatchTile* tile = image.tile ? &*image.tile : nullptr;
  std::fill(mask, mask + n, Truth{1});
  std::fill(score, score + n, 0.0f);
  const int64_t room = split_by_parity_size(n);
  MatchResult result{scratch.take<float>(room), scratch.take<int32_t>(room), scratch.take<int32_t>(room),
                     scratch.take<float>(room), scratch.take<float>(room)};
  int32_t* candidates = scratch.take<int32_t>(n);
  int32_t* survivors = scratch.take<int32_t>(n);
  int32_t* ids = scratch.take<int32_t>(room);
  int64_t count = n;
  for (int64_t round = 0; round < options.rounds; ++round) {
    Scratch of_round;
    Split split = split_of(n);
    if (round == 0) {
      split_tokens(n, ids);
    } else {
      int64_t next = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (mask[i]) survivors[next++] = static_cast<int32_t>(i);
      }
      split = split_by_parity(survivors, count, ids);
    }
    const PackedTokens packed(image.tokens, image.rows, ids, split.positions(), split.first_source, of_round,
                              image.parallel);
    const TileUse use = round == 0 ? TileUse{tile, nullptr} : TileUse{nullptr, tile};
    match_packed(packed, split, options.threshold, result, use, image.parallel);
    int64_t sources = 0;
    for (int64_t s = 0; s < split.sources; ++s) {
      const int32_t token = ids[split.first_source + s];
      if (token == kHole) continue;
      score[token] = detail::redundancy(result.degree[s], result.mean[s], result.density[s], options);
      candidates[sources++] = token;
    }
    const int64_t drop = round_quota(count - keep, options.rounds - round);
    if (drop == 0) break;  // another round would score the same split
    // The most redundant go; between equals the lower index stays.
    std::nth_element(candidates, candidates + drop - 1, candidates + sources,
                     [&](int32_t a, int32_t b) { return score[a] > score[b] || (score[a] == score[b] && a > b); });
    for (int64_t i = 0; i < drop; ++i) mask[candidates[i]] = 0;
    count -= drop;
  }
}

// One image.
inline void gsp(const TokenView& tokens, int64_t keep, const GspOptions& options, Truth* mask, float* score,
                const Parallel& parallel) {
  Image image(tokens, parallel);
  if (options.rounds > 1) image.keep_products();
  gsp_scanned(image, keep, options, mask, score);
}

// A batch: N entries of mask and score per image.
inline void gsp(const TokenBatch& tokens, int64_t keep, const GspOptions& options, Truth* mask, float* score,
                const Threads& threads) {
  const int64_t n = tokens.first.count;
  for_each_image(tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    gsp(tokens[b], keep, options, mask + b * n, score + b * n, parallel);
  });
}

}  // namespace script::cpu
