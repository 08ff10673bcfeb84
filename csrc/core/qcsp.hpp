// qcsp: greedy MAP of the kernel L = diag(r) S diag(r), straight from the tokens; L is never formed.
#pragma once

#include "greedy.hpp"
#include "image.hpp"
#include "order.hpp"

namespace script::cpu {

// What the entries of L are made of, by position; all 0 at holes.
struct TokenWeights {
  float* weight;     // r / |x|
  float* relevance;  // 0 for a zero row
  float* square;     // the raw product of the row with itself
  PivotWeights pivot(int64_t position) const { return {weight[position], relevance[position], square[position]}; }
  ColumnWeights columns(int64_t position) const { return {weight + position, relevance + position, square + position}; }
};

// Entries of L by position: raw products times r_i / |x_i| * r_j / |x_j|, but r_i r_j for equal rows: a norm rounds in
// its own way, and what is left of a token that equals a pick has to be nothing. Products that the bipartite matching
// has already taken are read from its tile.
class TokenSource {
 public:
  // `tile` may be null.
  TokenSource(const PackedTokens& tokens, const TokenWeights& weights, const MatchTile* tile, Scratch& scratch)
      : tokens_(tokens), weights_(weights), tile_(tile) {
    if (tile == nullptr) return;
    offset_ = scratch.take<int32_t>(tokens.positions(), 0);  // a hole has weight 0, whatever it reads
    for (int64_t p = 0; p < tokens.positions(); ++p) {
      if (tokens.token(p) != kHole) offset_[p] = tile->offset(tokens.token(p));
    }
  }

  int64_t row_work() const { return tokens_.width(); }

  // The rows of up to k pivots.
  class Rows {
   public:
    Rows(int64_t k, Scratch& scratch) : pivots_(scratch.take<int32_t>(k)), rows_(scratch.take<const float*>(k)) {}

    void append(const TokenSource& source, const int32_t* pivots, int m, Scratch& scratch) {
      std::copy_n(pivots, m, pivots_ + count_);
      source.tokens_.rows(pivots, m, scratch.take<float>(source.tokens_.row_buffer_size(m)), rows_ + count_);
      count_ += m;
    }

    void panel(const TokenSource& source, int64_t p, int64_t first, int m, float* out) const {
      const PackedTokens& tokens = source.tokens_;
      const int32_t* others = tokens.tokens(p * kPanel);
      const int groups = groups_of(tokens.columns(p));
      float known[kPanel * kPanel], products[kPanel * kPanel];
      const float* raw[kPanel];  // each pivot's products with the panel
      const float* unknown[kPanel];
      int members[kPanel];
      int count = 0;
      for (int a = 0; a < m; ++a) {
        const int32_t pivot = tokens.token(pivots_[first + a]);
        if (source.tile_ != nullptr && MatchTile::knows(pivot, others[0])) {
          float* row = known + a * kPanel;
          const float* products_of = source.tile_->row(pivot);
          const int32_t* offset = source.offset_ + p * kPanel;
#pragma GCC unroll 8
          for (int c = 0; c < kPanel; ++c) row[c] = products_of[offset[c]];
          raw[a] = row;
        } else {
          members[count] = a;
          unknown[count++] = rows_[first + a];
        }
      }
      tokens.multiply(unknown, count, tokens.panel(p), groups, products);
      for (int u = 0; u < count; ++u) raw[members[u]] = products + u * kPanel;
      const ColumnWeights columns = source.weights_.columns(p * kPanel);
      for (int a = 0; a < m; ++a) {
        const PivotWeights pivot = source.weights_.pivot(pivots_[first + a]);
        simd().weigh_products(raw[a], pivot, columns, groups * kGroup, out + a * kPanel);
      }
    }

   private:
    int32_t* pivots_;
    const float** rows_;
    int64_t count_ = 0;
  };

  class Pool {
   public:
    Pool(const TokenSource& source, const int32_t* positions, int count, Scratch& scratch) : tokens_(source.tokens_) {
      panel_ = scratch.take<float>(tokens_.panel_size());
      tokens_.rows(positions, count, scratch.take<float>(tokens_.row_buffer_size(count)), rows_);
      tokens_.pack_rows(rows_, count, panel_);
      for (int c = 0; c < kPanel; ++c) {
        const PivotWeights own = c < count ? source.weights_.pivot(positions[c]) : PivotWeights{};
        weight_[c] = own.weight;
        relevance_[c] = own.relevance;
        square_[c] = own.square;
      }
    }

    void rows(const int* members, int m, float* out) const {
      const float* pointers[kPanel];
      for (int a = 0; a < m; ++a) pointers[a] = rows_[members[a]];
      tokens_.multiply(pointers, m, panel_, kPanel / kGroup, out);
      for (int a = 0; a < m; ++a) {
        float* row = out + a * kPanel;
        const int c = members[a];
        simd().weigh_products(row, {weight_[c], relevance_[c], square_[c]}, {weight_, relevance_, square_}, kPanel,
                              row);
      }
    }

   private:
    const PackedTokens& tokens_;
    float* panel_;
    const float* rows_[kPanel];
    float weight_[kPanel], relevance_[kPanel], square_[kPanel];
  };

 private:
  const PackedTokens& tokens_;
  TokenWeights weights_;
  const MatchTile* tile_;
  int32_t* offset_ = nullptr;  // per position
};

// A value per token of one image, `stride` elements apart.
struct Relevance {
  const float* data = nullptr;
  int64_t stride = 1;
  float operator[](int64_t i) const { return data[i * stride]; }
};

// Ranks k tokens of an image, taking the products that its tile has. tier[token] is 0, 1 or kNoTier.
inline void rank_tokens(const Image& image, const Relevance& relevance, const uint8_t* tier, int64_t k,
                        const Picks& picks) {
  Scratch scratch;
  const RowTable& table = image.rows;
  const MatchTile* tile = image.tile ? &*image.tile : nullptr;
  const int64_t n = image.tokens.count;
  float* usable = scratch.take<float>(n);  // relevance, 0 for a bad token
  uint8_t* tiers = scratch.take<uint8_t>(n);
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float r = relevance[i];
    const bool bad = tier[i] == kNoTier || table.bad[i] || !std::isfinite(r);
    tiers[i] = bad ? kNoTier : tier[i];
    usable[i] = bad ? 0.0f : r;
    if (table.inverse_norm[i] != 0.0f) largest = std::max(largest, std::fabs(usable[i]));  // a zero row has K_ii = 0
  }
  // Far from 1, relevance is rescaled by a power of two (exact), like the rows: its squares then neither vanish nor
  // overflow.
  const float scale = power_of_two_scale(largest);
  float* value = scratch.take<float>(n);  // K_ii
  float largest_value = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float r = usable[i] * scale;
    value[i] = table.inverse_norm[i] == 0.0f ? 0.0f : r * r;
    largest_value = std::max(largest_value, value[i]);
  }

  // With a tile, tokens of one parity share panels: what it knows of a panel, it then knows of all of it.
  const FallingSteps steps{value, largest_value};
  const int64_t second = tile == nullptr ? pad_to_panel(n) : pad_to_panel(n / 2);
  const int64_t positions = tile == nullptr ? second : second + pad_to_panel(n - n / 2);
  int32_t* ids = scratch.take<int32_t>(positions, kHole);
  if (tile == nullptr) {
    order_tokens(steps, 0, 1, n, ids);
  } else {
    order_tokens(steps, 1, 2, n, ids);
    order_tokens(steps, 0, 2, n, ids + second);
  }
  float* square = scratch.take<float>(positions);
  const PackedTokens packed(image.tokens, table, ids, positions, positions, scratch, image.parallel, square);

  const TokenWeights weights{scratch.take<float>(positions, 0.0f), scratch.take<float>(positions, 0.0f), square};
  float* diagonal = scratch.take<float>(positions, 0.0f);
  float* priority = scratch.take<float>(positions, 0.0f);
  uint8_t* position_tier = scratch.take<uint8_t>(positions, kHoleTier);
  for (int64_t p = 0; p < positions; ++p) {
    const int32_t token = ids[p];
    if (token == kHole) continue;
    if (table.inverse_norm[token] != 0.0f) {
      weights.relevance[p] = usable[token] * scale;
      weights.weight[p] = static_cast<float>(weights.relevance[p] / std::sqrt(static_cast<double>(square[p])));
    }
    diagonal[p] = value[token];
    priority[p] = usable[token];
    position_tier[p] = tiers[token];
  }
  const GreedyProblem problem{positions, diagonal, ids, priority, position_tier};
  greedy_map(TokenSource(packed, weights, tile, scratch), problem, k, picks, image.parallel);
  // The square of a relevance may be more than fp32 holds: a gain is at most its largest number.
  for (int64_t t = 0; t < k && scale != 1.0f; ++t) picks.gains[t] = saturate(picks.gains[t] / scale / scale);
}

// One image: k picks in greedy order.
inline void qcsp(const TokenView& tokens, const Relevance& relevance, int64_t k, const Picks& picks,
                 const Parallel& parallel) {
  Image image(tokens, parallel);
  const uint8_t* tier = image.scratch.take<uint8_t>(tokens.count, 0);
  rank_tokens(image, relevance, tier, k, picks);
}

// A batch: k picks per image.
inline void qcsp(const TokenBatch& tokens, const ValueBatch<float>& relevance, int64_t k, const Picks& picks,
                 const Threads& threads) {
  for_each_image(tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    qcsp(tokens[b], {relevance[b], relevance.stride}, k, picks.at(b * k), parallel);
  });
}

}  // namespace script::cpu
