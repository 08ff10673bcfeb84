// bipartite_match: what every source token sees of the destination tokens, without a similarity matrix in memory.
#pragma once

#include <algorithm>
#include <limits>

#include "image.hpp"

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

// Where the products of a matching come from and go, besides the matrix product: `fill` (may be null) is given those of
// a whole first split; `known` (may be null) has them for a later one, made by split_by_parity.
struct TileUse {
  MatchTile* fill = nullptr;
  const MatchTile* known = nullptr;
};

namespace detail {

inline constexpr int kMatchBlock = kMostRows;  // sources that share one reading of the destinations

// A block of sources in a row: their rows, and their raw products with one destination panel after the other.
class SourceBlock {
 public:
  SourceBlock(const PackedTokens& packed, const TileUse& use, Scratch& scratch)
      : packed_(packed),
        use_(use),
        buffer_(scratch.take<float>(packed.row_buffer_size(kMatchBlock))),
        own_(scratch.take<float>(kMatchBlock * kPanel)) {}

  // Takes up the sources that stand at `position` and behind it; `first` is the number of the first among all sources.
  void start(int64_t first, int64_t position, int count) {
    first_ = first;
    count_ = count;
    for (int s = 0; s < count; ++s) positions_[s] = static_cast<int32_t>(position + s);
    packed_.rows(positions_, count, buffer_, rows_);
  }

  int count() const { return count_; }
  int32_t position(int s) const { return positions_[s]; }

  // [source][kPanel], valid until the next call.
  const float* products(int64_t p) {
    float* out = use_.fill == nullptr ? own_ : use_.fill->entry(first_, p);
    if (use_.known == nullptr) {
      packed_.multiply(rows_, count_, packed_.panel(p), groups_of(packed_.columns(p)), out);
    } else {
      look_up(p, out);
    }
    return out;
  }

 private:
  // The tile has the products with a panel of the other parity; those of the panel's own parity are taken.
  void look_up(int64_t p, float* out) {
    const int columns = packed_.columns(p);
    const int32_t* others = packed_.tokens(p * kPanel);
    for (int s = 0; s < count_; ++s) {
      const int32_t token = packed_.token(positions_[s]);
      if (token == kHole) continue;
      int run = 0;
      while (s + run < count_ && !known(positions_[s + run], others[0])) ++run;
      if (run > 0) {
        packed_.multiply(rows_ + s, run, packed_.panel(p), groups_of(columns), out + s * kPanel);
        s += run - 1;
      } else {
        const float* row = use_.known->row(token);
        for (int c = 0; c < columns; ++c) out[s * kPanel + c] = row[use_.known->offset(others[c])];
      }
    }
  }
  // A hole ends a run of sources as a known one does.
  bool known(int32_t position, int32_t other) const {
    return packed_.token(position) == kHole || MatchTile::knows(packed_.token(position), other);
  }

  const PackedTokens& packed_;
  TileUse use_;
  float* buffer_;
  float* own_;
  int64_t first_ = 0;
  int count_ = 0;
  int32_t positions_[kMatchBlock];
  const float* rows_[kMatchBlock];
};

inline void reset(MatchLanes& lanes) {
  for (int l = 0; l < kGroup; ++l) {
    lanes.best[l] = -std::numeric_limits<float>::infinity();
    lanes.best_column[l] = -1;
    lanes.above[l] = 0;
    lanes.above_sum[l] = lanes.sum[l] = 0.0f;
  }
}

// What the lanes of one source have seen of all `destinations`, lane after lane. Of equals the first position.
inline void fold(const MatchLanes& lanes, const PackedTokens& packed, int64_t destinations, const MatchResult& out) {
  float best = lanes.best[0], above_sum = 0.0f, sum = 0.0f;
  int32_t column = lanes.best_column[0], above = 0;
  for (int l = 0; l < kGroup; ++l) {
    const int32_t c = lanes.best_column[l];
    if (c >= 0 && (lanes.best[l] > best || (lanes.best[l] == best && c < column))) {
      best = lanes.best[l];
      column = c;
    }
    above += lanes.above[l];
    above_sum += lanes.above_sum[l];
    sum += lanes.sum[l];
  }
  *out.best = best;
  *out.match = packed.token(column);
  *out.degree = above;
  *out.mean = above > 0 ? above_sum / static_cast<float>(above) : 0.0f;
  *out.density = sum / static_cast<float>(destinations);
}

}  // namespace detail

// One entry of `result` per source position. `match` gets the token index of the best destination (of equals, the first
// in the order of positions).
inline void match_packed(const PackedTokens& packed, const Split& split, float threshold, const MatchResult& result,
                         const TileUse& use, const Parallel& parallel) {
  const int64_t sources = split.sources;
  if (split.destinations == 0) {
    for (int64_t s = 0; s < sources; ++s) {
      result.best[s] = result.mean[s] = result.density[s] = 0.0f;
      result.degree[s] = 0;
      result.match[s] = -1;
    }
    return;
  }
  constexpr int64_t kBlock = detail::kMatchBlock;
  Scratch scratch;
  float* weight = scratch.take<float>(split.first_source);
  for (int64_t j = 0; j < split.first_source; ++j) weight[j] = packed.inverse_norm(j);
  const int64_t work = kBlock * split.destinations * packed.width();
  parallel(ceil_div(sources, kBlock), work, [&](int64_t begin, int64_t end) {
    Scratch local;
    detail::SourceBlock block(packed, use, local);
    MatchLanes* lanes = local.take<MatchLanes>(kBlock);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kBlock;
      block.start(first, split.first_source + first, static_cast<int>(std::min(kBlock, sources - first)));
      for (int s = 0; s < block.count(); ++s) detail::reset(lanes[s]);
      for (int64_t p = 0; p * kPanel < split.first_source; ++p) {
        const float* products = block.products(p);
        for (int s = 0; s < block.count(); ++s) {
          simd().match(products + s * kPanel, packed.inverse_norm(block.position(s)), weight + p * kPanel,
                       packed.columns(p), static_cast<int32_t>(p * kPanel), threshold, lanes + s);
        }
      }
      for (int s = 0; s < block.count(); ++s) detail::fold(lanes[s], packed, split.destinations, result.at(first + s));
    }
  });
  if (use.fill != nullptr) use.fill->transpose(parallel);
}

// One image.
inline void bipartite_match(const TokenView& tokens, float threshold, const MatchResult& result,
                            const Parallel& parallel) {
  Image image(tokens, parallel);
  Scratch scratch;
  const Split split = split_of(tokens.count);
  int32_t* ids = scratch.take<int32_t>(split.positions());
  split_tokens(tokens.count, ids);
  const PackedTokens packed(image.tokens, image.rows, ids, split.positions(), split.first_source, scratch, parallel);
  match_packed(packed, split, threshold, result, {}, parallel);
}

// A batch: ceil(N / 2) entries of `result` per image.
inline void bipartite_match(const TokenBatch& tokens, double threshold, const MatchResult& result,
                            const Threads& threads) {
  const int64_t sources = tokens.first.count - tokens.first.count / 2;
  for_each_image(tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    bipartite_match(tokens[b], saturate(threshold), result.at(b * sources), parallel);
  });
}

}  // namespace script::cpu
