// query_relevance: mean cosine of each token with the query vectors, min-max per image.
#pragma once

#include "tokens.hpp"

namespace script::cpu {

// A spread of cosines up to this is fp32 rounding: the row counts as constant.
inline constexpr float kConstantSpread = 1e-6f;

struct Query {
  TokenView vectors;
  const Truth* mask = nullptr;  // null: all vectors count
  int64_t mask_stride = 0;
};

struct QueryBatch {
  TokenBatch vectors;
  ValueBatch<Truth> mask;  // data null: all vectors count
  Query operator[](int64_t b) const { return {vectors[b], mask.data == nullptr ? nullptr : mask[b], mask.stride}; }
};

// The mean of the unit query vectors. A token's mean cosine is its cosine with that mean, so one product does for all
// queries. A zero or bad query vector contributes zero, a masked one is left out.
inline void mean_direction(const Query& query, bool negate, float* direction) {
  Scratch scratch;
  const int64_t width = query.vectors.width;
  double* sum = scratch.take<double>(width, 0.0);
  float* buffer = scratch.take<float>(width);
  int64_t used = 0;
  for (int64_t q = 0; q < query.vectors.count; ++q) {
    if (query.mask != nullptr && query.mask[q * query.mask_stride] == 0) continue;
    ++used;
    const float* x = query.vectors.row(q, buffer);
    double squares = 0.0;
    for (int64_t d = 0; d < width; ++d) squares += static_cast<double>(x[d]) * x[d];
    if (!(squares > 0.0) || !std::isfinite(squares)) continue;
    const double inverse = 1.0 / std::sqrt(squares);
    for (int64_t d = 0; d < width; ++d) sum[d] += x[d] * inverse;
  }
  const double scale = used == 0 ? 0.0 : (negate ? -1.0 : 1.0) / static_cast<double>(used);
  for (int64_t d = 0; d < width; ++d) direction[d] = static_cast<float>(sum[d] * scale);
}

// Min-max of the finite tokens' cosines, from `floor` to 1; 0 for bad tokens, 1 for all others where the cosines are
// constant.
inline void min_max(const RowTable& table, int64_t count, float* relevance, double floor = 0.0) {
  const float least = static_cast<float>(floor), rise = static_cast<float>(1.0 - floor);
  float low = INFINITY, high = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    if (table.bad[i]) continue;
    low = std::fmin(low, table.cosine[i]);
    high = std::fmax(high, table.cosine[i]);
  }
  const float spread = high - low;
  for (int64_t i = 0; i < count; ++i) {
    if (table.bad[i]) {
      relevance[i] = 0.0f;
    } else if (!(spread > kConstantSpread)) {
      relevance[i] = 1.0f;
    } else {
      relevance[i] = least + rise * ((table.cosine[i] - low) / spread);
    }
  }
}

// One image: relevance is count contiguous values.
inline void query_relevance(const TokenView& tokens, const Query& query, bool negate, float* relevance,
                            const Parallel& parallel) {
  Scratch scratch;
  float* direction = scratch.take<float>(tokens.width);
  mean_direction(query, negate, direction);
  min_max(scan_rows(tokens, direction, scratch, parallel), tokens.count, relevance);
}

// A batch: N values per image.
inline void query_relevance(const TokenBatch& tokens, const QueryBatch& query, bool negate, float* relevance,
                            const Threads& threads) {
  for_each_image(tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    query_relevance(tokens[b], query[b], negate, relevance + b * tokens.first.count, parallel);
  });
}

}  // namespace script::cpu
