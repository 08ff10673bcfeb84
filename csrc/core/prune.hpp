// prune: relevance, GSP, QCSP and their intersection on one image. The rows are scanned once, and the products of the
// matching are handed on; QCSP packs the tokens anew, in the order that saves it most.
#pragma once

#include <optional>

#include "gsp.hpp"
#include "mask_intersect.hpp"
#include "qcsp.hpp"
#include "query_relevance.hpp"
#include "schedule.hpp"

namespace script::cpu {

struct PruneOptions {
  bool negate = false;
  double gsp_drop = 0.25;
  double oversample = 2.0;
  bool restrict = false;
  double floor = 0.0;  // of the relevance
  GspOptions gsp;

  // Tokens that QCSP ranks.
  int64_t ranked(int64_t n, int64_t keep) const { return restrict ? keep : ranking_size(n, keep, oversample); }
};

// What an image is pruned by. `aligned`: the tokens in the query's space, where `tokens` are not in it.
struct PruneInput {
  TokenView tokens;
  std::optional<TokenView> aligned;
  std::optional<Query> query;
};

// Writes `keep` token indices in ascending order.
inline void prune(const PruneInput& input, int64_t keep, const PruneOptions& options, int64_t* kept,
                  const Parallel& parallel) {
  Scratch scratch;
  const int64_t n = input.tokens.count;
  float* direction = nullptr;
  if (input.query.has_value()) {
    direction = scratch.take<float>(input.query->vectors.width);
    mean_direction(*input.query, options.negate, direction);
  }
  const bool shared = direction != nullptr && !input.aligned.has_value();
  Image image(input.tokens, parallel, shared ? direction : nullptr);

  float* relevance = image.scratch.take<float>(n, 1.0f);
  const uint8_t* bad_aligned = nullptr;
  if (shared) {
    min_max(image.rows, n, relevance, options.floor);
  } else if (direction != nullptr) {
    const RowTable in_query_space = scan_rows(*input.aligned, direction, image.scratch, parallel);
    min_max(in_query_space, n, relevance, options.floor);
    bad_aligned = in_query_space.bad;
  }

  Truth* survives = image.scratch.take<Truth>(n, 1);
  const int64_t survivors = gsp_keep(n, options.gsp_drop);
  if (survivors < n) {
    image.keep_products();
    float* score = image.scratch.take<float>(n);
    gsp_scanned(image, survivors, options.gsp, survives, score);
  }

  uint8_t* tier = image.scratch.take<uint8_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    tier[i] = options.restrict && !survives[i] ? 1 : 0;
    if (bad_aligned != nullptr && bad_aligned[i]) tier[i] = kNoTier;
  }
  const int64_t ranked = options.ranked(n, keep);
  const Picks ranking{image.scratch.take<int64_t>(ranked), image.scratch.take<float>(ranked)};
  rank_tokens(image, {relevance}, tier, ranked, ranking);

  if (options.restrict) {
    std::copy(ranking.indices, ranking.indices + keep, kept);
    std::sort(kept, kept + keep);
  } else {
    mask_intersect(ranking.indices, 1, ranked, survives, 1, keep, kept);
  }
}

struct PruneBatch {
  TokenBatch tokens;
  std::optional<TokenBatch> aligned;
  std::optional<QueryBatch> query;
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
