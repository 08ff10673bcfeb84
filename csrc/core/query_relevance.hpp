// query_relevance: mean or largest cosine of each token with the query vectors, min-max per image.
#pragma once

#include <string>

#include "packed.hpp"
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

// How a token's cosines with the query vectors become one number.
enum class Reduce { kMean, kMax };

inline Reduce reduce_of(const std::string& name) { return name == "max" ? Reduce::kMax : Reduce::kMean; }

// Gives a table the largest cosine of each row with the query vectors that count, its sign flipped by `negate`; 0 where
// none counts. The vectors go through in panels of unit rows.
inline void largest_cosines(const TokenView& tokens, const Query& query, bool negate, RowTable& table, Scratch& scratch,
                            const Parallel& parallel) {
  constexpr float kNone = -2.0f;  // below any cosine
  const int64_t width = tokens.width;
  table.cosine = scratch.take<float>(tokens.count, kNone);
  Scratch of_query;
  float* unit = of_query.take<float>(kPanel * width);
  float* panel = of_query.take<float>(kPanel * width);
  int64_t next = 0;
  for (;;) {
    const float* rows[kPanel];
    int count = 0;
    for (; next < query.vectors.count && count < kPanel; ++next) {
      if (query.mask != nullptr && query.mask[next * query.mask_stride] == 0) continue;
      float* row = unit + count * width;
      const float* x = query.vectors.row(next, row);
      double squares = 0.0;
      for (int64_t d = 0; d < width; ++d) squares += static_cast<double>(x[d]) * x[d];
      const bool usable = squares > 0.0 && std::isfinite(squares);
      const double inverse = usable ? 1.0 / std::sqrt(squares) : 0.0;
      for (int64_t d = 0; d < width; ++d) row[d] = usable ? static_cast<float>(x[d] * inverse) : 0.0f;
      rows[count++] = row;
    }
    if (count == 0) break;
    simd().pack(rows, count, width, panel);
    const int groups = groups_of(count);
    parallel(ceil_div(tokens.count, kPanel), kPanel * kPanel * width, [&](int64_t begin, int64_t end) {
      Scratch local;
      float* buffers = local.take<float>(kPanel * width);
      float* products = local.take<float>(kPanel * kPanel);
      for (int64_t i = begin * kPanel; i < std::min(end * kPanel, tokens.count); i += kPanel) {
        const float* x[kPanel];
        const int m = static_cast<int>(std::min<int64_t>(kPanel, tokens.count - i));
        for (int a = 0; a < m; ++a) {
          float* buffer = buffers + a * width;
          x[a] = tokens.row(i + a, buffer);
          const float scale = table.scale[i + a];
          if (scale == 1.0f) continue;
          simd().scale_row(x[a], scale, width, buffer);
          x[a] = buffer;
        }
        simd().gemm(x, m, panel, groups, width, products);
        for (int a = 0; a < m; ++a) {
          const float inverse = table.inverse_norm[i + a];
          float& top = table.cosine[i + a];
          for (int c = 0; c < count; ++c)
            top = std::max(top, inverse == 0.0f ? 0.0f : products[a * kPanel + c] * inverse);
        }
      }
    });
  }
  for (int64_t i = 0; i < tokens.count; ++i) {
    const float top = table.cosine[i];
    table.cosine[i] = top == kNone ? 0.0f : negate ? -top : top;
  }
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

// The rows of an image with what their cosines reduce to.
inline RowTable scan_against(const TokenView& tokens, const Query& query, bool negate, Reduce reduce, Scratch& scratch,
                             const Parallel& parallel) {
  if (reduce == Reduce::kMax) {
    RowTable table = scan_rows(tokens, nullptr, scratch, parallel);
    largest_cosines(tokens, query, negate, table, scratch, parallel);
    return table;
  }
  float* direction = scratch.take<float>(tokens.width);
  mean_direction(query, negate, direction);
  return scan_rows(tokens, direction, scratch, parallel);
}

// One image: relevance is count contiguous values.
inline void query_relevance(const TokenView& tokens, const Query& query, bool negate, Reduce reduce, float* relevance,
                            const Parallel& parallel) {
  Scratch scratch;
  min_max(scan_against(tokens, query, negate, reduce, scratch, parallel), tokens.count, relevance);
}

// A batch: N values per image.
inline void query_relevance(const TokenBatch& tokens, const QueryBatch& query, bool negate, Reduce reduce,
                            float* relevance, const Threads& threads) {
  for_each_image(tokens.count, threads, [&](int64_t b, const Parallel& parallel) {
    query_relevance(tokens[b], query[b], negate, reduce, relevance + b * tokens.first.count, parallel);
  });
}

}  // namespace script::cpu
