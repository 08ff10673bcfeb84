// max_min: farthest points first. Each pick is the token of largest relevance * distance to the nearest pick, the
// distance being 1 - cosine. In the terms of Nearest, both offset and slope are the relevance.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "greedy.hpp"
#include "nearest.hpp"

namespace script::cpu {

namespace detail {

// The token whose residual against all other tokens is largest, by position, and that residual; -1 without tokens.
struct Farthest {
  static constexpr float kNoCosine = -2.0f;  // below any
  static constexpr int64_t kStride = 4;      // panels that a block of rows meets before it is thinned out
  int32_t position = -1;
  float residual = -1.0f;
};

// What a block of rows has seen of the other tokens.
struct Block {
  int32_t position[kPanel];
  alignas(64) float top[kPanel];  // the largest cosine
  alignas(64) float offset[kPanel] = {}, slope[kPanel] = {}, residual[kPanel];
  int size = 0;

  void add(const Nearest& factor, int32_t at, float seen) {
    position[size] = at;
    top[size] = seen;
    offset[size] = factor.offset[at];
    slope[size++] = factor.slope[at];
  }
  void settle() {
    const float* tops = top;
    std::fill_n(residual, kPanel, Nearest::kUnset);
    simd().lower(&tops, 1, offset, slope, residual);
  }
};

// Lowers the bounds of panels begin to end by a block of rows, and tells the block what it sees there.
inline void meet(const PlacedTokens& placed, const Nearest& factor, Block& block, int64_t begin, int64_t end,
                 float* bound, const Parallel& parallel) {
  Scratch scratch;
  const uint8_t* tier = placed.problem().tier;
  TokenSource::Rows rows(kPanel, scratch);
  rows.append(placed.source(), block.position, block.size, scratch);
  float* tops = scratch.take<float>((end - begin) * kPanel);
  parallel(end - begin, grain_for(block.size * kPanel * placed.source().row_work()), [&](int64_t from, int64_t to) {
    Scratch local;
    float* cosines = local.take<float>(kPanel * kPanel);
    for (int64_t p = begin + from; p < begin + to; ++p) {
      const float* row[kPanel];
      rows.panel(placed.source(), p, 0, block.size, cosines);
      for (int a = 0; a < block.size; ++a) {
        float* x = cosines + a * kPanel;
        row[a] = x;
        if (block.position[a] / kPanel == p) x[block.position[a] % kPanel] = Farthest::kNoCosine;  // its own
        float top = Farthest::kNoCosine;
        for (int c = 0; c < kPanel; ++c) top = tier[p * kPanel + c] == 0 ? std::max(top, x[c]) : top;
        tops[(p - begin) * kPanel + a] = top;
      }
      simd().lower(row, block.size, factor.offset + p * kPanel, factor.slope + p * kPanel, bound + p * kPanel);
    }
  });
  for (int64_t p = 0; p < end - begin; ++p) {
    for (int a = 0; a < block.size; ++a) block.top[a] = std::max(block.top[a], tops[p * kPanel + a]);
  }
}

// Rows go in blocks, those of the largest bounds first; what a block sees lowers the bounds of the others, and a row is
// left as soon as its own bound falls behind the best so far. So few rows are needed, and few of them whole.
inline Farthest farthest(const PlacedTokens& placed, const Nearest& factor, const Parallel& parallel) {
  Scratch scratch;
  const GreedyProblem& problem = placed.problem();
  const int64_t positions = problem.positions, panels = positions / kPanel;
  float* bound = scratch.take<float>(positions, -1.0f);  // -1: known, or no token
  int64_t left = 0;
  for (int64_t p = 0; p < positions; ++p) {
    if (problem.tier[p] != 0) continue;
    bound[p] = Nearest::kUnset;
    ++left;
  }
  Candidate best{-1.0f, std::numeric_limits<int32_t>::max(), -1};
  Candidate* heap = scratch.take<Candidate>(positions);
  // The first block is spread over all tokens, and small: there is nothing yet that would thin it out.
  constexpr int64_t kFirst = 16;
  const int64_t stride = std::max<int64_t>(1, left / kFirst);
  for (bool start = true;; start = false) {
    int64_t size = 0, seen = 0;
    for (int64_t p = 0; p < positions; ++p) {
      const Candidate candidate{bound[p], problem.ids[p], static_cast<int32_t>(p)};
      if (bound[p] < 0.0f || !(candidate < best)) continue;
      if (!start || seen++ % stride == 0) heap[size++] = candidate;
    }
    if (size == 0) return {best.position, best.residual};
    const int64_t wanted = std::min<int64_t>(size, start ? kFirst : kPanel);
    std::partial_sort(heap, heap + wanted, heap + size);
    Block block;
    // Alone, a token is as far from the others as can be.
    for (int64_t a = 0; a < wanted; ++a) block.add(factor, heap[a].position, -1.0f);
    for (int64_t p = 0; p < panels && block.size > 0; p += Farthest::kStride) {
      meet(placed, factor, block, p, std::min(p + Farthest::kStride, panels), bound, parallel);
      block.settle();
      Block rest;
      for (int a = 0; a < block.size; ++a) {
        const int32_t at = block.position[a];
        bound[at] = std::min(bound[at], block.residual[a]);
        if (Candidate{bound[at], problem.ids[at], at} < best) rest.add(factor, at, block.top[a]);
      }
      block = rest;
    }
    block.settle();
    for (int a = 0; a < block.size; ++a) {
      const int32_t at = block.position[a];
      const Candidate known{block.residual[a], problem.ids[at], at};
      if (known < best) best = known;
      bound[at] = -1.0f;
    }
  }
}

}  // namespace detail

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
  const PlacedTokens placed(image, {scratch.take<float>(n, 1.0f), weight, weight, tier}, scratch);
  const float* slope = placed.at_positions(weight, scratch);
  Nearest factor(slope, slope, placed, scratch);
  const detail::Farthest first = detail::farthest(placed, factor, parallel);
  greedy_map(placed.source(), after_first(placed, first.position, scratch), factor, k, picks, parallel);
  if (first.position >= 0 && k > 0) picks.gains[0] = first.residual;
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
