// mask_intersect: the first k members of a ranking, those that the mask keeps before the others, in ascending order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "parallel.hpp"
#include "tokens.hpp"
#include "workspace.hpp"

namespace script::cpu {

// Throws unless the `length` entries of one image's ranking are distinct and in [0, n).
inline void check_ranking(const int64_t* ranking, int64_t ranking_stride, int64_t length, int64_t n) {
  Scratch scratch;
  uint8_t* seen = scratch.take<uint8_t>(n, 0);
  for (int64_t p = 0; p < length; ++p) {
    const int64_t i = ranking[p * ranking_stride];
    const bool outside = i < 0 || i >= n;
    if (outside || seen[i]) {
      throw std::runtime_error("ranking: expected distinct indices in [0, N = " + std::to_string(n) + "), got " +
                               std::to_string(i) + (outside ? "" : " twice"));
    }
    seen[i] = 1;
  }
}

// One image, strides in elements. ranking: `length` distinct indices into the mask, best first; 1 <= k <= length; out:
// k values.
inline void mask_intersect(const int64_t* ranking, int64_t ranking_stride, int64_t length, const Truth* mask,
                           int64_t mask_stride, int64_t k, int64_t* out) {
  int64_t taken = 0;
  for (const bool kept : {true, false}) {
    for (int64_t p = 0; p < length && taken < k; ++p) {
      const int64_t i = ranking[p * ranking_stride];
      if ((mask[i * mask_stride] != 0) == kept) out[taken++] = i;
    }
  }
  std::sort(out, out + k);
}

// A batch of rankings of `length` entries and masks of n: k values of `out` per image. Throws what check_ranking
// throws.
inline void mask_intersect(const ValueBatch<int64_t>& ranking, int64_t length, const ValueBatch<Truth>& mask, int64_t n,
                           int64_t batch, int64_t k, int64_t* out, const Threads& threads) {
  for_each_item(batch, 8 * (length + n), threads, [&](int64_t b) {
    check_ranking(ranking[b], ranking.stride, length, n);
    mask_intersect(ranking[b], ranking.stride, length, mask[b], mask.stride, k, out + b * k);
  });
}

}  // namespace script::cpu
