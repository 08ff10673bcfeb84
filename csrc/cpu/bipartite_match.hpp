// bipartite_match: what every source token sees of the destination tokens, without a similarity matrix in memory.
#pragma once

#include <algorithm>
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

// How positions are shared out: destinations stand in whole panels from 0 on, sources in whole panels behind them.
struct Split {
  int64_t destinations = 0;  // tokens
  int64_t first_source = 0;  // position
  int64_t sources = 0;       // positions from there on, up to the last token
  int64_t positions() const { return first_source + pad_to_panel(sources); }
};

// Tokens alternate between sources (even) and destinations (odd).
inline Split split_of(int64_t count) { return {count / 2, pad_to_panel(count / 2), count - count / 2}; }

inline void split_tokens(int64_t count, int32_t* ids) {
  const Split split = split_of(count);
  std::fill(ids, ids + split.positions(), kHole);
  for (int64_t i = 0; i < count; ++i) ids[(i % 2 == 1 ? 0 : split.first_source) + i / 2] = static_cast<int32_t>(i);
}

// The raw products of all sources of a split of n tokens with all destinations, kept for the stages after the matching.
// In both orders: by destination panel [source][kPanel], and by source panel [destination][kPanel].
class MatchTile {
 public:
  // Above this the tile is not kept (N > 2896), and products are taken again where they are needed.
  static constexpr int64_t kLimitBytes = int64_t{64} << 20;

  static bool fits(int64_t n) { return 2 * size(split_of(n)) * int64_t{sizeof(float)} <= kLimitBytes; }

  MatchTile(int64_t n, Scratch& scratch)
      : split_(split_of(n)), rows_(pad_to_panel(split_.sources)), columns_(split_.first_source) {
    by_destination_ = scratch.take<float>(size(split_));
    by_source_ = scratch.take<float>(size(split_));
  }

  // Where the products of source `s` with destination panel `p` go; those of the next sources follow.
  float* entry(int64_t s, int64_t p) const { return by_destination_ + (p * rows_ + s) * kPanel; }

  // Fills the second order from the first.
  void transpose(const Parallel& parallel) {
    parallel(rows_ / kPanel, grain_for(8 * columns_ * kPanel), [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        const int count = static_cast<int>(std::min<int64_t>(kPanel, split_.sources - q * kPanel));
        for (int64_t p = 0; p < columns_ / kPanel; ++p) {
          const float* rows[kPanel];
          for (int r = 0; r < count; ++r) rows[r] = entry(q * kPanel + r, p);
          simd().pack(rows, count, kPanel, by_source_ + (q * columns_ + p * kPanel) * kPanel);
        }
      }
    });
  }

  // Whether it has the products of two tokens: those of unlike parity.
  static bool knows(int32_t token, int32_t other) { return token % 2 != other % 2; }

  // The product of `token` with a token of the other parity stands at row(token)[offset(other)].
  const float* row(int32_t token) const {
    return token % 2 == 0 ? entry(token / 2, 0) : by_source_ + (token / 2) * kPanel;
  }
  int32_t offset(int32_t other) const {
    const int64_t i = other / 2, stride = other % 2 == 0 ? columns_ : rows_;
    return static_cast<int32_t>(i / kPanel * stride * kPanel + i % kPanel);
  }

 private:
  static int64_t size(const Split& split) { return pad_to_panel(split.sources) * split.first_source; }

  Split split_;
  int64_t rows_, columns_;
  float* by_destination_;
  float* by_source_;
};

// Later rounds, with the tile of the first: `survivors` (ascending) alternate again, and each side stands by the
// tokens' parity, in whole panels, so that what the tile knows of a panel it knows of all of it.
inline Split split_by_parity(const int32_t* survivors, int64_t count, int32_t* ids) {
  Split split;
  int64_t next = 0;
  for (const int side : {1, 0}) {
    for (const int parity : {0, 1}) {
      next = pad_to_panel(next);
      for (int64_t i = side; i < count; i += 2) {
        if (survivors[i] % 2 == parity) ids[next++] = survivors[i];
      }
      std::fill(ids + next, ids + pad_to_panel(next), kHole);
    }
    if (side == 1) split.first_source = pad_to_panel(next);
  }
  split.destinations = count / 2;
  split.sources = next - split.first_source;
  return split;
}

// Room that split_by_parity needs for `count` survivors.
inline int64_t split_by_parity_size(int64_t count) { return count + 4 * kPanel; }

// One entry of `result` per source position. `match` gets the token index of the best destination (of equals, the first
// in the order of positions). `fill` (may be null) is given the products of a whole first split; `known` (may be null)
// has them for a later one, made by split_by_parity.
inline void match_packed(const PackedTokens& packed, const Split& split, float threshold, const MatchResult& result,
                         MatchTile* fill, const MatchTile* known, const Parallel& parallel) {
  const int64_t sources = split.sources;
  if (split.destinations == 0) {
    for (int64_t s = 0; s < sources; ++s) {
      result.best[s] = result.mean[s] = result.density[s] = 0.0f;
      result.degree[s] = 0;
      result.match[s] = -1;
    }
    return;
  }
  constexpr int64_t kBlock = 48;  // sources that share one reading of the destinations
  Scratch scratch;
  float* scale = scratch.take<float>(split.first_source);
  for (int64_t j = 0; j < split.first_source; ++j) scale[j] = packed.inverse_norm(j);
  const int64_t grain = grain_for(kBlock * split.destinations * packed.width());
  parallel(ceil_div(sources, kBlock), grain, [&](int64_t begin, int64_t end) {
    Scratch local;
    float* buffer = local.take<float>(packed.row_buffer_size(kBlock));
    float* own = local.take<float>(kBlock * kPanel);
    MatchLanes* lanes = local.take<MatchLanes>(kBlock);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      const int m = static_cast<int>(std::min(kBlock, sources - first));
      int32_t positions[kBlock];
      const float* rows[kBlock];
      for (int s = 0; s < m; ++s) {
        positions[s] = static_cast<int32_t>(split.first_source + first + s);
        detail::reset(lanes[s]);
      }
      packed.rows(positions, m, buffer, rows);
      for (int64_t p = 0; p * kPanel < split.first_source; ++p) {
        const int columns = packed.columns(p);
        float* products = fill == nullptr ? own : fill->entry(first, p);
        if (known == nullptr) {
          packed.multiply(rows, m, packed.panel(p), groups_of(columns), products);
        } else {
          const int32_t* others = packed.tokens(p * kPanel);
          for (int s = 0; s < m; ++s) {
            const int32_t token = packed.token(positions[s]);
            if (token == kHole) continue;
            int run = 0;  // sources in a row that share the panel's parity: their products are not known
            while (s + run < m && packed.token(positions[s + run]) != kHole &&
                   packed.token(positions[s + run]) % 2 == others[0] % 2) {
              ++run;
            }
            if (run > 0) {
              packed.multiply(rows + s, run, packed.panel(p), groups_of(columns), products + s * kPanel);
              s += run - 1;
            } else {
              const float* row = known->row(token);
              for (int c = 0; c < columns; ++c) products[s * kPanel + c] = row[known->offset(others[c])];
            }
          }
        }
        for (int s = 0; s < m; ++s) {
          simd().match(products + s * kPanel, packed.inverse_norm(positions[s]), scale + p * kPanel, columns,
                       static_cast<int32_t>(p * kPanel), threshold, lanes + s);
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
        result.match[out] = packed.token(column);
        result.degree[out] = above;
        result.mean[out] = above > 0 ? above_sum / static_cast<float>(above) : 0.0f;
        result.density[out] = sum / static_cast<float>(split.destinations);
      }
    }
  });
  if (fill != nullptr) fill->transpose(parallel);
}

// One image.
inline void bipartite_match(const TokenView& tokens, float threshold, const MatchResult& result,
                            const Parallel& parallel) {
  Scratch scratch;
  const RowTable table = scan_rows(tokens, nullptr, scratch, parallel);
  const Split split = split_of(tokens.count);
  int32_t* ids = scratch.take<int32_t>(split.positions());
  split_tokens(tokens.count, ids);
  const PackedTokens packed(tokens, table, ids, split.positions(), split.first_source, scratch, parallel);
  match_packed(packed, split, threshold, result, nullptr, nullptr, parallel);
}

}  // namespace script::cpu
