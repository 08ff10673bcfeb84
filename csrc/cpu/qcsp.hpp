// qcsp: greedy MAP of the kernel L = diag(r) S diag(r), straight from the tokens; L is never formed.
#pragma once

#include "bipartite_match.hpp"
#include "greedy.hpp"
#include "tokens.hpp"

namespace script::cpu {

// Entries of L by position: raw products scaled by r_i / |x_i| * r_j / |x_j|. Products that the bipartite matching has
// already taken are read from its tile.
class TokenSource {
 public:
  // weight[position] = r / |x|, 0 at holes. `tile` may be null.
  TokenSource(const PackedTokens& tokens, const float* weight, const MatchTile* tile)
      : tokens_(tokens), weight_(weight), tile_(tile) {}

  class Rows {
   public:
    Rows(const TokenSource& source, const int32_t* pivots, int m, Scratch& scratch)
        : source_(source), pivots_(pivots), m_(m) {
      source.tokens_.rows(pivots, m, scratch.take<float>(source.tokens_.row_buffer_size(m)), rows_);
    }

    void panel(int64_t p, float* out) const {
      const PackedTokens& tokens = source_.tokens_;
      float products[kPanel * kPanel];
      const float* raw[kPanel];  // each pivot's products with the panel
      const float* unknown[kPanel];
      int members[kPanel];
      int count = 0;
      for (int a = 0; a < m_; ++a) {
        raw[a] = source_.tile_ == nullptr ? nullptr : source_.tile_->products(pivots_[a], p);
        if (raw[a] == nullptr) {
          members[count] = a;
          unknown[count++] = rows_[a];
        }
      }
      const int groups = groups_of(tokens.columns(p));
      tokens.multiply(unknown, count, tokens.panel(p), groups, products);
      for (int u = 0; u < count; ++u) raw[members[u]] = products + u * kPanel;
      const float* weight = source_.weight_ + p * kPanel;
      for (int a = 0; a < m_; ++a) {
        simd().scale_products(raw[a], source_.weight_[pivots_[a]], weight, groups * kGroup, out + a * kPanel);
      }
    }

   private:
    const TokenSource& source_;
    const int32_t* pivots_;
    int m_;
    const float* rows_[kPanel];
  };

  class Pool {
   public:
    Pool(const TokenSource& source, const int32_t* positions, int count, Scratch& scratch) : tokens_(source.tokens_) {
      panel_ = scratch.take<float>(tokens_.panel_size());
      tokens_.rows(positions, count, scratch.take<float>(tokens_.row_buffer_size(count)), rows_);
      tokens_.pack_rows(rows_, count, panel_);
      for (int c = 0; c < kPanel; ++c) weight_[c] = c < count ? source.weight_[positions[c]] : 0.0f;
    }

    void rows(const int* members, int m, float* out) const {
      const float* pointers[kPanel];
      for (int a = 0; a < m; ++a) pointers[a] = rows_[members[a]];
      tokens_.multiply(pointers, m, panel_, kPanel / kGroup, out);
      for (int a = 0; a < m; ++a) {
        float* row = out + a * kPanel;
        simd().scale_products(row, weight_[members[a]], weight_, kPanel, row);
      }
    }

   private:
    const PackedTokens& tokens_;
    float* panel_;
    const float* rows_[kPanel];
    float weight_[kPanel];
  };

 private:
  const PackedTokens& tokens_;
  const float* weight_;
  const MatchTile* tile_;
};

// A relevance whose square is not finite makes its token bad.
inline bool usable_relevance(float r) { return std::isfinite(r * r); }

// Ranks k tokens of packed tokens. relevance, tier and the result speak of tokens, not positions: tier[token] is 0, 1
// or kNoTier. `tile` may be null.
inline void rank_tokens(const PackedTokens& packed, const RowTable& table, const int32_t* ids, const MatchTile* tile,
                        const float* relevance, int64_t relevance_stride, const uint8_t* tier, int64_t k,
                        int64_t* indices, float* gains, const Parallel& parallel) {
  Scratch scratch;
  const int64_t n = packed.positions();
  float* weight = scratch.take<float>(n);
  float* diagonal = scratch.take<float>(n);
  float* priority = scratch.take<float>(n);
  uint8_t* tiers = scratch.take<uint8_t>(n);
  float largest = 0.0f;
  for (int64_t p = 0; p < n; ++p) {
    const int32_t token = ids[p];
    tiers[p] = kHoleTier;
    priority[p] = 0.0f;
    if (token == kHole) continue;
    const float r = relevance[token * relevance_stride];
    const bool bad = tier[token] == kNoTier || table.bad[token] || !usable_relevance(r);
    tiers[p] = bad ? kNoTier : tier[token];
    priority[p] = bad ? 0.0f : r;
    largest = std::max(largest, std::fabs(priority[p]));
  }
  // Far from 1, relevance is rescaled by a power of two (exact), like the rows: its squares then neither vanish nor
  // overflow.
  const float scale = power_of_two_scale(largest);
  for (int64_t p = 0; p < n; ++p) {
    const float inverse_norm = packed.inverse_norm(p);
    const float r = priority[p] * scale;
    weight[p] = r * inverse_norm;
    diagonal[p] = inverse_norm == 0.0f ? 0.0f : r * r;
  }
  greedy_map(TokenSource(packed, weight, tile), GreedyProblem{n, diagonal, ids, priority, tiers}, k, indices, gains,
             parallel);
  for (int64_t t = 0; t < k && scale != 1.0f; ++t) gains[t] = gains[t] / scale / scale;
}

// One image: relevance (count values), k picks in greedy order and their gains.
inline void qcsp(const TokenView& tokens, const float* relevance, int64_t relevance_stride, int64_t k, int64_t* indices,
                 float* gains, const Parallel& parallel) {
  Scratch scratch;
  const RowTable table = scan_rows(tokens, nullptr, scratch, parallel);
  const int64_t positions = pad_to_panel(tokens.count);
  int32_t* ids = scratch.take<int32_t>(positions, kHole);
  for (int64_t i = 0; i < tokens.count; ++i) ids[i] = static_cast<int32_t>(i);
  const PackedTokens packed(tokens, table, ids, positions, positions, scratch, parallel);
  const uint8_t* tier = scratch.take<uint8_t>(tokens.count, 0);
  rank_tokens(packed, table, ids, nullptr, relevance, relevance_stride, tier, k, indices, gains, parallel);
}

}  // namespace script::cpu
