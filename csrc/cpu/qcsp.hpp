// qcsp: greedy MAP of the kernel L = diag(r) S diag(r), straight from the tokens; L is never formed.
#pragma once

#include "greedy.hpp"
#include "tokens.hpp"

namespace script::cpu {

// Entries of L by position: raw products scaled by r_i / |x_i| * r_j / |x_j|.
class TokenSource {
 public:
  // weight[position] = r / |x|, padded to whole panels with zeros.
  TokenSource(const PackedTokens& tokens, const float* weight) : tokens_(tokens), weight_(weight) {}

  void rows(const int32_t* pivots, int m, int64_t panel, float* out) const {
    Scratch scratch;
    float* buffer = scratch.take<float>(tokens_.row_buffer_size(m));
    const float* pointers[kPanel];
    tokens_.rows(pivots, m, buffer, pointers);
    const int64_t columns = std::min<int64_t>(kPanel, tokens_.count() - panel * kPanel);
    const int groups = static_cast<int>(ceil_div(columns, kGroup));
    tokens_.multiply(pointers, m, tokens_.panel(panel), groups, out);
    for (int a = 0; a < m; ++a) {
      const float w = weight_[pivots[a]];
      float* row = out + a * kPanel;
      for (int c = 0; c < groups * kGroup; ++c) row[c] *= w * weight_[panel * kPanel + c];
      for (int c = groups * kGroup; c < kPanel; ++c) row[c] = 0.0f;
    }
  }

  class Pool {
   public:
    explicit Pool(Scratch& scratch) : scratch_(scratch) {}
    void gather(const TokenSource& source, const int32_t* positions, int count) {
      tokens_ = &source.tokens_;
      float* buffer = scratch_.take<float>(tokens_->row_buffer_size(count));
      panel_ = scratch_.take<float>(tokens_->panel_size());
      tokens_->rows(positions, count, buffer, pointers_);
      tokens_->pack_rows(pointers_, count, panel_);
      for (int c = 0; c < kPanel; ++c) weight_[c] = c < count ? source.weight_[positions[c]] : 0.0f;
    }
    void rows(const int* members, int m, float* out) const {
      const float* pointers[kPanel];
      for (int a = 0; a < m; ++a) pointers[a] = pointers_[members[a]];
      tokens_->multiply(pointers, m, panel_, kPanel / kGroup, out);
      for (int a = 0; a < m; ++a) {
        for (int c = 0; c < kPanel; ++c) out[a * kPanel + c] *= weight_[members[a]] * weight_[c];
      }
    }

   private:
    Scratch& scratch_;
    const PackedTokens* tokens_ = nullptr;
    const float* pointers_[kPanel];
    float* panel_ = nullptr;
    float weight_[kPanel];
  };

 private:
  const PackedTokens& tokens_;
  const float* weight_;
};

// A relevance whose square is not finite makes its token bad.
inline bool usable_relevance(float r) { return std::isfinite(r * r); }

// Ranks k tokens of packed tokens. tier and the result speak of tokens, not positions: tier[token] is 0, 1 or kNoTier.
inline void rank_tokens(const PackedTokens& packed, const RowTable& table, const int32_t* ids, const float* relevance,
                        int64_t relevance_stride, const uint8_t* tier, int64_t k, int64_t* indices, float* gains,
                        const Parallel& parallel) {
  Scratch scratch;
  const int64_t n = packed.count();
  const int64_t padded = ceil_div(n, kPanel) * kPanel;
  float* weight = scratch.take<float>(padded, 0.0f);
  float* diagonal = scratch.take<float>(n);
  float* priority = scratch.take<float>(n);
  uint8_t* tiers = scratch.take<uint8_t>(n);
  float largest = 0.0f;
  for (int64_t p = 0; p < n; ++p) {
    const int32_t token = ids[p];
    const float r = relevance[token * relevance_stride];
    const bool bad = tier[token] == kNoTier || table.bad[token] || !usable_relevance(r);
    tiers[p] = bad ? kNoTier : tier[token];
    priority[p] = bad ? 0.0f : r;
    largest = std::max(largest, std::fabs(priority[p]));
  }
  // Far from 1, relevance is rescaled by a power of two (exact), like the rows: its squares then neither vanish nor overflow.
  const float scale = power_of_two_scale(largest);
  for (int64_t p = 0; p < n; ++p) {
    const float inverse_norm = packed.inverse_norm(p);
    const float r = priority[p] * scale;
    weight[p] = r * inverse_norm;
    diagonal[p] = inverse_norm == 0.0f ? 0.0f : r * r;
  }
  greedy_map(TokenSource(packed, weight), GreedyProblem{n, diagonal, ids, priority, tiers}, k, indices, gains, parallel);
  for (int64_t t = 0; t < k && scale != 1.0f; ++t) gains[t] = gains[t] / scale / scale;
}

// One image: relevance (count values), k picks in greedy order and their gains.
inline void qcsp(const TokenView& tokens, const float* relevance, int64_t relevance_stride, int64_t k, int64_t* indices,
                 float* gains, const Parallel& parallel) {
  Scratch scratch;
  const RowTable table = scan_rows(tokens, nullptr, scratch, parallel);
  int32_t* ids = scratch.take<int32_t>(tokens.count);
  for (int64_t i = 0; i < tokens.count; ++i) ids[i] = static_cast<int32_t>(i);
  const PackedTokens packed(tokens, table, ids, tokens.count, scratch, parallel);
  const uint8_t* tier = scratch.take<uint8_t>(tokens.count, 0);
  rank_tokens(packed, table, ids, relevance, relevance_stride, tier, k, indices, gains, parallel);
}

}  // namespace script::cpu
