// The order in which greedy MAP holds its tokens: those with a chance to be picked share panels, and the others' panels
// can wait. Ties are settled by token index, so that no result depends on it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace script::cpu {

// 0 for the largest values of K_ii to kSteps - 1 for the smallest.
struct FallingSteps {
  static constexpr int kSteps = 64;
  const float* value;
  float largest;
  int operator()(int64_t i) const {
    const float x = value[i];
    return std::isfinite(x) && x > 0.0f ? kSteps - 1 - static_cast<int>(x / largest * (kSteps - 1)) : kSteps - 1;
  }
};

// Writes the tokens first, first + stride, ... below n by steps of their value, in order within a step (a counting
// sort: exact order would cost more than it brings). Returns whether that is the order they had.
inline bool order_tokens(const FallingSteps& step, int64_t first, int64_t stride, int64_t n, int32_t* ids) {
  int64_t start[FallingSteps::kSteps + 1] = {};
  for (int64_t i = first; i < n; i += stride) ++start[step(i) + 1];
  for (int s = 0; s < FallingSteps::kSteps; ++s) start[s + 1] += start[s];
  bool in_order = true;
  int64_t before = 0;
  for (int64_t i = first; i < n; i += stride, ++before) {
    const int64_t p = start[step(i)]++;
    ids[p] = static_cast<int32_t>(i);
    in_order = in_order && p == before;
  }
  return in_order;
}

}  // namespace script::cpu
