// qcsp: greedy MAP of the kernel L = diag(r) S diag(r) or one of its kin, straight from the tokens; L is never formed.
#pragma once

#include <cmath>
#include <cstdint>

#include "cholesky.hpp"
#include "greedy.hpp"
#include "image.hpp"
#include "token_source.hpp"

namespace script::cpu {

// K = diag(|r|^power) S diag(|r|^power) + ridge I; with raw rows S is X X^T and no table of cosines.
struct QcspOptions {
  double power = 1.0;
  bool normalize = true;
  double ridge = 0.0;
  bool plain() const { return power == 1.0 && normalize && ridge == 0.0; }
};

namespace detail {

// K_ij is weight_i weight_j cos(x_i, x_j), and ridge more where i = j; all in units of 2^(2 exponent).
struct KernelScale {
  float* weight;
  float ridge;
  int exponent;
};

// 0 for exponents that leave squares well inside fp32, like those of rows.
inline int far_exponent(double exponent) { return std::fabs(exponent) <= 30.0 ? 0 : static_cast<int>(exponent); }

// Of `usable` relevances, which may have any finite values.
inline KernelScale scale_kernel(const RowTable& table, const float* usable, const uint8_t* tier, int64_t n,
                                const QcspOptions& options, Scratch& scratch) {
  KernelScale kernel{scratch.take<float>(n), 0.0f, 0};
  if (options.plain()) {
    float largest = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      if (table.inverse_norm[i] != 0.0f) largest = std::max(largest, std::fabs(usable[i]));  // a zero row has K_ii = 0
    }
    const float scale = power_of_two_scale(largest);
    for (int64_t i = 0; i < n; ++i) kernel.weight[i] = table.inverse_norm[i] == 0.0f ? 0.0f : usable[i] * scale;
    kernel.exponent = -std::ilogb(scale);
    return kernel;
  }
  // By logarithms: a power of a large relevance, times a large norm, is more than a double holds.
  double* logarithm = scratch.take<double>(n);
  double largest = std::log2(options.ridge) / 2.0;
  for (int64_t i = 0; i < n; ++i) {
    logarithm[i] = -INFINITY;
    if (table.inverse_norm[i] == 0.0f || tier[i] == kNoTier) continue;
    logarithm[i] = options.power == 0.0 ? 0.0 : options.power * std::log2(std::fabs(static_cast<double>(usable[i])));
    if (!options.normalize) logarithm[i] -= std::log2(static_cast<double>(table.inverse_norm[i]) * table.scale[i]);
    largest = std::max(largest, logarithm[i]);
  }
  kernel.exponent = std::isfinite(largest) ? far_exponent(largest) : 0;
  for (int64_t i = 0; i < n; ++i) kernel.weight[i] = static_cast<float>(std::exp2(logarithm[i] - kernel.exponent));
  kernel.ridge = static_cast<float>(std::ldexp(options.ridge, -2 * kernel.exponent));
  return kernel;
}

}  // namespace detail

// Ranks k tokens of an image, taking the products that its tile has. tier[token] is 0, 1 or kNoTier.
inline void rank_tokens(const Image& image, const Relevance& relevance, const uint8_t* tier, int64_t k,
                        const Picks& picks, const QcspOptions& options = {}) {
  Scratch scratch;
  const RowTable& table = image.rows;
  const int64_t n = image.tokens.count;
  float* usable = scratch.take<float>(n);  // relevance, 0 for a bad token
  uint8_t* tiers = scratch.take<uint8_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    const float r = relevance[i];
    const bool bad = tier[i] == kNoTier || table.bad[i] || !std::isfinite(r);
    tiers[i] = bad ? kNoTier : tier[i];
    usable[i] = bad ? 0.0f : r;
  }
  const detail::KernelScale kernel = detail::scale_kernel(table, usable, tiers, n, options, scratch);
  float* value = scratch.take<float>(n);  // K_ii
  for (int64_t i = 0; i < n; ++i) value[i] = kernel.weight[i] * kernel.weight[i] + kernel.ridge;

  const PlacedTokens placed(image, {kernel.weight, value, usable, tiers}, scratch);
  Cholesky factor(placed.problem().positions, k, scratch);
  greedy_map(placed.source(), placed.problem(), factor, k, picks, image.parallel);
  // The square of a relevance may be more than fp32 holds: a gain is at most its largest number.
  for (int64_t t = 0; t < k && kernel.exponent != 0; ++t) {
    picks.gains[t] = saturate(std::ldexp(static_cast<double>(picks.gains[t]), 2 * kernel.exponent));
  }
}

// One image: k picks in greedy order.
inline void qcsp(const TokenView& tokens, const Relevance& relevance, int64_t k, const Picks& picks,
                 const Parallel& parallel, const QcspOptions& options = {}) {
  Image image(tokens, parallel);
  const uint8_t* tier = image.scratch.take<uint8_t>(tokens.count, 0);
  rank_tokens(image, relevance, tier, k, picks, options);
}

// A batch: k picks per image.
inline void qcsp(const TokenBatch& tokens, const ValueBatch<float>& relevance, int64_t k, const Picks& picks,
                 const Threads& threads, const QcspOptions& options = {}) {
  for_each_image(tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    qcsp(tokens[b], {relevance[b], relevance.stride}, k, picks.at(b * k), parallel, options);
  });
}

}  // namespace script::cpu
