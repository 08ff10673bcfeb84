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
  int64_t keep = 0;      // 1 <= keep <= tokens
  int64_t gsp_keep = 0;  // tokens that GSP keeps
  int64_t ranked = 0;    // tokens that QCSP ranks
  bool restrict = false;
  GspOptions gsp;
};

inline PruneOptions prune_options(int64_t n, int64_t keep, double gsp_drop, double oversample, bool restrict,
                                  const GspOptions& gsp) {
  return {keep, gsp_keep(n, gsp_drop), restrict ? keep : ranking_size(n, keep, oversample), restrict, gsp};
}

// Writes options.keep token indices in ascending order. `aligned`: the tokens in the query's space, where `tokens` are
// not in it.
inline void prune(const TokenView& tokens, const std::optional<TokenView>& aligned, const std::optional<Query>& query,
                  bool negate, const PruneOptions& options, int64_t* kept, const Parallel& parallel) {
  Scratch scratch;
  const int64_t n = tokens.count;
  float* direction = nullptr;
  if (query.has_value()) {
    direction = scratch.take<float>(query->vectors.width);
    mean_direction(*query, negate, direction);
  }
  const bool shared = direction != nullptr && !aligned.has_value();
  const RowTable table = scan_rows(tokens, shared ? direction : nullptr, scratch, parallel);

  float* relevance = scratch.take<float>(n, 1.0f);
  const uint8_t* bad_aligned = nullptr;
  if (shared) {
    min_max(table, n, relevance);
  } else if (direction != nullptr) {
    const RowTable in_query_space = scan_rows(*aligned, direction, scratch, parallel);
    min_max(in_query_space, n, relevance);
    bad_aligned = in_query_space.bad;
  }

  bool* survives = scratch.take<bool>(n, true);
  std::optional<MatchTile> tile;
  if (options.gsp_keep < n) {
    if (MatchTile::fits(n)) tile.emplace(n, scratch);
    float* score = scratch.take<float>(n);
    gsp_scanned(tokens, table, options.gsp_keep, options.gsp, tile ? &*tile : nullptr, survives, score, parallel);
  }

  uint8_t* tier = scratch.take<uint8_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    tier[i] = options.restrict && !survives[i] ? 1 : 0;
    if (bad_aligned != nullptr && bad_aligned[i]) tier[i] = kNoTier;
  }
  int64_t* ranking = scratch.take<int64_t>(options.ranked);
  float* gains = scratch.take<float>(options.ranked);
  rank_tokens(tokens, table, tile ? &*tile : nullptr, relevance, 1, tier, options.ranked, ranking, gains, parallel);

  if (options.restrict) {
    std::copy(ranking, ranking + options.keep, kept);
    std::sort(kept, kept + options.keep);
  } else {
    mask_intersect(ranking, 1, options.ranked, survives, 1, options.keep, kept);
  }
}

}  // namespace script::cpu
