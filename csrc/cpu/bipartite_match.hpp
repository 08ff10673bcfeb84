// bipartite_match: what every source token sees of the destination tokens, without a similarity matrix in memory.
#pragma once

#include <limits>

#include "tokens.hpp"

namespace script::cpu {

// One entry per source token.
struct MatchResult {
  float* best;
  int32_t* match;
  int32_t* degree;
  float* mean;
  float* density;
  // The results from entry `i` on.
  MatchResult at(int64_t i) const { return {best + i, match + i, degree + i, mean + i, density + i}; }
};

namespace detail {

inline void reset(MatchLanes& lanes) {
  for (int l = 0; l < kGroup; ++l) {
    lanes.best[l] = -std::numeric_limits<float>::infinity();
    lanes.best_column[l] = -1;
    lanes.above[l] = 0;
    lanes.above_sum[l] = lanes.sum[l] = 0.0f;
  }
}

}  // namespace detail

// Sources and destinations by position in `packed`: destinations stand first, at 0..destinations, sources after them.
// `match` gets the token index of the best destination.
inline void match_packed(const PackedTokens& packed, int64_t destinations, float threshold, const MatchResult& result,
                         const Parallel& parallel) {
  const int64_t sources = packed.count() - destinations;
  if (destinations == 0) {
    for (int64_t s = 0; s < sources; ++s) {
      result.best[s] = result.mean[s] = result.density[s] = 0.0f;
      result.degree[s] = 0;
      result.match[s] = -1;
    }
    return;
  }
  constexpr int64_t kBlock = 48;  // sources that share one reading of the destinations
  Scratch scratch;
  float* scale = scratch.take<float>(ceil_div(destinations, kPanel) * kPanel, 0.0f);
  for (int64_t j = 0; j < destinations; ++j) scale[j] = packed.inverse_norm(j);
  parallel(ceil_div(sources, kBlock), 1, [&](int64_t begin, int64_t end) {
    Scratch local;
    float* buffer = local.take<float>(packed.row_buffer_size(kBlock));
    float* tile = local.take<float>(kBlock * kPanel);
    MatchLanes* lanes = local.take<MatchLanes>(kBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      const int m = static_cast<int>(std::min(kBlock, sources - first));
      int32_t positions[kBlock];
      const float* rows[kBlock];
      for (int s = 0; s < m; ++s) {
        positions[s] = static_cast<int32_t>(destinations + first + s);
        detail::reset(lanes[s]);
      }
      packed.rows(positions, m, buffer, rows);
      for (int64_t start = 0; start < destinations; start += kPanel) {
        const int columns = static_cast<int>(std::min<int64_t>(kPanel, destinations - start));
        packed.multiply(rows, m, packed.panel(start / kPanel), static_cast<int>(ceil_div(columns, kGroup)), tile);
        for (int s = 0; s < m; ++s) {
          simd().match(tile + s * kPanel, packed.inverse_norm(positions[s]), scale + start, columns,
                       static_cast<int32_t>(start), threshold, lanes + s);
        }
      }
      for (int s = 0; s < m; ++s) {
        float best = lanes[s].best[0], above_sum = 0.0f, sum = 0.0f;
        int32_t column = lanes[s].best_column[0], above = 0;
        for (int l = 0; l < kGroup; ++l) {
          const int32_t c = lanes[s].best_column[l];
          if (c >= 0 && (lanes[s].best[l] > best || (lanes[s].best[l] == best && c < column))) {
            best = lanes[s].best[l];
            column = c;
          }
          above += lanes[s].above[l];
          above_sum += lanes[s].above_sum[l];
          sum += lanes[s].sum[l];
        }
        const int64_t out = first + s;
        result.best[out] = best;
        result.match[out] = static_cast<int32_t>(packed.token(column));
        result.degree[out] = above;
        result.mean[out] = above > 0 ? above_sum / static_cast<float>(above) : 0.0f;
        result.density[out] = sum / static_cast<float>(destinations);
      }
    }
  });
}

// Destinations first, then sources: the order of positions that match_packed expects. `survivors` (ascending token
// indices, null: all) alternate between sources (even places) and destinations (odd).
inline void split_tokens(const int32_t* survivors, int64_t count, int32_t* ids) {
  const int64_t destinations = count / 2;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t token = survivors == nullptr ? static_cast<int32_t>(i) : survivors[i];
    ids[i % 2 == 1 ? i / 2 : destinations + i / 2] = token;
  }
}

// One image.
inline void bipartite_match(const TokenView& tokens, float threshold, const MatchResult& result, const Parallel& parallel) {
  Scratch scratch;
  const RowTable table = scan_rows(tokens, nullptr, scratch, parallel);
  int32_t* ids = scratch.take<int32_t>(tokens.count);
  split_tokens(nullptr, tokens.count, ids);
  const PackedTokens packed(tokens, table, ids, tokens.count, scratch, parallel);
  match_packed(packed, tokens.count / 2, threshold, result, parallel);
}

}  // namespace script::cpu
