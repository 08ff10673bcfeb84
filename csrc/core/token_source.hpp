// Kernel entries straight from the tokens, by position: what greedy MAP and its relatives read, and never hold whole.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

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

  // No more than the entry of two positions; where rows are long, less by some 5e-5 of the most that it could be. It
  // takes their product alone, not a panel's.
  float entry_at_least(int32_t p, int32_t q) const {
    Scratch scratch;
    const int32_t positions[] = {p, q};
    const float* rows[2];
    tokens_.rows(positions, 2, scratch.take<float>(tokens_.row_buffer_size(2)), rows);
    const PivotWeights x = weights_.pivot(p), y = weights_.pivot(q);
    // Roundings of a register tile, in chunks of up to 256 steps, and of the dot product, and a few of what follows.
    const float roundings = 512.0f + static_cast<float>(tokens_.width()) / 4.0f;
    return tokens_.dot(rows[0], rows[1]) * (x.weight * y.weight) - roundings * 0x1p-24f * x.relevance * y.relevance;
  }

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
    Pool(const TokenSource& source, const int32_t* positions, int count, Scratch& scratch)
        : tokens_(source.tokens_), count_(count) {
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
        const int c = members[a];
        weigh({weight_[c], relevance_[c], square_[c]}, kPanel, out + a * kPanel);
      }
    }

    // The same for any m <= kPanel positions instead of members, as far as the members' groups of columns go.
    void rows_of(const TokenSource& source, const int32_t* others, int m, float* out) const {
      Scratch scratch;
      const float* pointers[kPanel];
      tokens_.rows(others, m, scratch.take<float>(tokens_.row_buffer_size(m)), pointers);
      tokens_.multiply(pointers, m, panel_, groups_of(count_), out);
      for (int a = 0; a < m; ++a) {
        weigh(source.weights_.pivot(others[a]), groups_of(count_) * kGroup, out + a * kPanel);
      }
    }

   private:
    void weigh(const PivotWeights& row, int columns, float* out) const {
      simd().weigh_products(out, row, {weight_, relevance_, square_}, columns, out);
    }

    const PackedTokens& tokens_;
    int count_;
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

// What a ranking asks of each token, in token order.
struct TokenValues {
  const float* weight;    // entries are those of cosines times both tokens' weights
  const float* value;     // K_ii, or what else the residual starts from
  const float* priority;  // see GreedyProblem
  const uint8_t* tier;
};

// The tokens of an image in the order in which greedy MAP holds them, packed, with what is asked of them by position.
class PlacedTokens {
 public:
  PlacedTokens(const Image& image, const TokenValues& of, Scratch& scratch) {
    const MatchTile* tile = image.tile ? &*image.tile : nullptr;
    const int64_t n = image.tokens.count;
    float largest = 0.0f;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, of.value[i]);
    // With a tile, tokens of one parity share panels: what it knows of a panel, it then knows of all of it.
    const FallingSteps steps{of.value, largest};
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
    packed_.emplace(image.tokens, image.rows, ids, positions, positions, scratch, image.parallel, square);

    const TokenWeights weights{scratch.take<float>(positions, 0.0f), scratch.take<float>(positions, 0.0f), square};
    uint8_t* tier = scratch.take<uint8_t>(positions, kHoleTier);
    problem_ = {positions, nullptr, ids, nullptr, tier};
    for (int64_t p = 0; p < positions; ++p) {
      const int32_t token = ids[p];
      if (token == kHole) continue;
      if (image.rows.inverse_norm[token] != 0.0f) {
        weights.relevance[p] = of.weight[token];
        weights.weight[p] = static_cast<float>(of.weight[token] / std::sqrt(static_cast<double>(square[p])));
      }
      tier[p] = of.tier[token];
    }
    problem_.diagonal = at_positions(of.value, scratch);
    problem_.priority = at_positions(of.priority, scratch);
    source_.emplace(*packed_, weights, tile, scratch);
  }

  const TokenSource& source() const { return *source_; }
  const GreedyProblem& problem() const { return problem_; }

  // A value per token, by position; 0 at holes.
  float* at_positions(const float* of_token, Scratch& scratch) const {
    float* out = scratch.take<float>(problem_.positions, 0.0f);
    for (int64_t p = 0; p < problem_.positions; ++p) {
      if (problem_.ids[p] != kHole) out[p] = of_token[problem_.ids[p]];
    }
    return out;
  }

 private:
  GreedyProblem problem_;
  std::optional<PackedTokens> packed_;
  std::optional<TokenSource> source_;
};

}  // namespace script::cpu
