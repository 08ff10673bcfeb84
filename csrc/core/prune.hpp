// prune: relevance, GSP, QCSP and their intersection on one image. The rows are scanned once, and the products of the
// matching are handed on; QCSP packs the tokens anew, in the order that saves it most.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "gsp.hpp"
#include "mask_intersect.hpp"
#include "qcsp.hpp"
#include "query_relevance.hpp"
#include "schedule.hpp"

namespace script::cpu {

// How GSP's tokens and QCSP's ranking become one set.
enum class Combine { kIntersect, kRestrict, kUnion };

inline Combine combine_of(const std::string& name) {
  if (name == "union") return Combine::kUnion;
  return name == "restrict" ? Combine::kRestrict : Combine::kIntersect;
}

struct PruneOptions {
  bool negate = false;
  double gsp_drop = 0.25;
  double oversample = 2.0;
  Combine combine = Combine::kIntersect;
  double floor = 0.0;  // of the relevance
  double power = 1.0;  // of the relevance above the floor
  Reduce reduce = Reduce::kMean;
  GspOptions gsp;

  // Tokens that QCSP ranks.
  int64_t ranked(int64_t n, int64_t keep) const {
    return combine == Combine::kIntersect ? ranking_size(n, keep, oversample) : keep;
  }
  // Tokens that GSP leaves, and the rounds it takes. A union gives it half of the budget, in as many rounds as needed.
  int64_t survivors(int64_t n, int64_t keep) const {
    return combine == Combine::kUnion ? union_share(keep) : gsp_keep(n, gsp_drop);
  }
  GspOptions rounds_to(int64_t n, int64_t keep) const {
    GspOptions graph = gsp;
    if (combine == Combine::kUnion) graph.rounds = std::max(gsp.rounds, rounds_needed(n, union_share(keep)));
    return graph;
  }
};

// All that the mask keeps, which are at most k, filled up from the ranking, ascending. ranking: k distinct indices.
inline void mask_union(const int64_t* ranking, const Truth* mask, int64_t n, int64_t k, int64_t* out) {
  int64_t taken = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (mask[i] != 0) out[taken++] = i;
  }
  for (int64_t p = 0; taken < k; ++p) {
    if (mask[ranking[p]] == 0) out[taken++] = ranking[p];
  }
  std::sort(out, out + k);
}

// The columns of TokenView::checkered. In raster order of an odd width the squares of one colour are every other token.
inline int64_t checkered_columns(const std::string& split, const std::optional<int64_t>& grid_width) {
  return split == "checker" && grid_width.has_value() && *grid_width % 2 == 0 ? *grid_width : 0;
}

// What an image is pruned by, both in one order. `aligned`: the tokens in the query's space, where `tokens` are not in
// it.
struct PruneInput {
  TokenView tokens;
  std::optional<TokenView> aligned;
  std::optional<Query> query;
};

// Writes `keep` token indices in ascending order.
inline void prune(const PruneInput& input, int64_t keep, const PruneOptions& options, int64_t* kept,
                  const Parallel& parallel) {
  const int64_t n = input.tokens.count;
  const auto against_query = [&](const TokenView& space, Scratch& to) {
    return scan_against(space, *input.query, options.negate, options.reduce, to, parallel);
  };
  const bool shared = input.query.has_value() && !input.aligned.has_value();
  Image image(input.tokens, parallel, [&](Scratch& to) {
    return shared ? against_query(input.tokens, to) : scan_rows(input.tokens, nullptr, to, parallel);
  });

  float* relevance = image.scratch.take<float>(n, 1.0f);
  const uint8_t* bad_aligned = nullptr;
  if (shared) {
    min_max(image.rows, n, relevance, options.floor);
  } else if (input.query.has_value()) {
    const RowTable in_query_space = against_query(*input.aligned, image.scratch);
    min_max(in_query_space, n, relevance, options.floor);
    bad_aligned = in_query_space.bad;
  }
  if (options.power != 1.0) {
    const float power = static_cast<float>(options.power);
    for (int64_t i = 0; i < n; ++i) relevance[i] = std::pow(relevance[i], power);
  }

  Truth* survives = image.scratch.take<Truth>(n, 1);
  const int64_t survivors = options.survivors(n, keep);
  if (survivors < n) {
    image.keep_products();
    float* score = image.scratch.take<float>(n);
    gsp_scanned(image, survivors, options.rounds_to(n, keep), survives, score);
  }

  uint8_t* tier = image.scratch.take<uint8_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    tier[i] = options.combine == Combine::kRestrict && !survives[i] ? 1 : 0;
    if (bad_aligned != nullptr && bad_aligned[i]) tier[i] = kNoTier;
  }
  const int64_t ranked = options.ranked(n, keep);
  const Picks ranking{image.scratch.take<int64_t>(ranked), image.scratch.take<float>(ranked)};
  rank_tokens(image, {relevance}, tier, ranked, ranking);

  if (options.combine == Combine::kUnion) {
    mask_union(ranking.indices, survives, n, keep, kept);
  } else if (options.combine == Combine::kRestrict) {
    std::copy(ranking.indices, ranking.indices + keep, kept);
    std::sort(kept, kept + keep);
  } else {
    mask_intersect(ranking.indices, 1, ranked, survives, 1, keep, kept);
  }
  if (input.tokens.checkered == 0) return;
  for (int64_t i = 0; i < keep; ++i) kept[i] = input.tokens.place(kept[i]);
  std::sort(kept, kept + keep);
}

struct PruneBatch {
  TokenBatch tokens;
  std::optional<TokenBatch> aligned;
  std::optional<QueryBatch> query;

  // See TokenView::checkered.
  void checker(int64_t columns) {
    tokens.first.checkered = columns;
    if (aligned.has_value()) aligned->first.checkered = columns;
  }
};

// A batch: `keep` indices per image.
inline void prune(const PruneBatch& batch, int64_t keep, const PruneOptions& options, int64_t* kept,
                  const Threads& threads) {
  for_each_image(batch.tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    PruneInput input{batch.tokens[b], std::nullopt, std::nullopt};
    if (batch.aligned.has_value()) input.aligned = (*batch.aligned)[b];
    if (batch.query.has_value()) input.query = (*batch.query)[b];
    prune(input, keep, options, kept + b * keep, parallel);
  });
}

}  // namespace script::cpu
