// prune_varlen: prune on segments of any length that stand behind each other in one packed (T, D) tensor.
#pragma once

#include <optional>
#include <vector>

#include "prune.hpp"

namespace script::cpu {

struct PackedPrune {
  TokenView tokens;
  std::optional<TokenView> aligned;
  std::optional<QueryBatch> query;  // by segment
};

// Segment s is rows starts[s] to starts[s + 1], of which keep[s] are kept: their indices into the packed tokens,
// segment after segment.
inline void prune_varlen(const PackedPrune& packed, const std::vector<int64_t>& starts,
                         const std::vector<int64_t>& keep, const PruneOptions& options, int64_t* kept,
                         const Threads& threads) {
  std::vector<int64_t> offset(keep.size() + 1, 0);
  for (size_t s = 0; s < keep.size(); ++s) offset[s + 1] = offset[s] + keep[s];
  for_each_image(static_cast<int64_t>(keep.size()), threads, [&](int64_t s, const Parallel& parallel) {
    const int64_t begin = starts[s], end = starts[s + 1];
    if (begin == end) return;
    PruneInput input{packed.tokens.rows(begin, end), std::nullopt, std::nullopt};
    if (packed.aligned.has_value()) input.aligned = packed.aligned->rows(begin, end);
    if (packed.query.has_value()) input.query = (*packed.query)[s];
    int64_t* out = kept + offset[s];
    prune(input, keep[s], options, out, parallel);
    for (int64_t i = 0; i < keep[s]; ++i) out[i] += begin;
  });
}

}  // namespace script::cpu
