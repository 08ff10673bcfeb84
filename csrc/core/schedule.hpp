// How many tokens each stage keeps: one place for the ops, their checks and the NumPy module. script_kernels/checks.py
// and reference.py compute the same numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace script::cpu {

// Tokens that GSP keeps of n when it drops the share `gsp_drop` of them.
inline int64_t gsp_keep(int64_t n, double gsp_drop) {
  return n - static_cast<int64_t>(std::floor(gsp_drop * static_cast<double>(n)));
}

// Tokens of `keep` that are GSP's in a union: half of them, rounded up.
inline int64_t union_share(int64_t keep) { return (keep + 1) / 2; }

// Length of the ranking that the intersection walks: min(n, ceil(oversample * keep)). An oversample that would overflow
// the integer asks for everything.
inline int64_t ranking_size(int64_t n, int64_t keep, double oversample) {
  const double wanted = std::ceil(oversample * static_cast<double>(keep));
  return wanted >= static_cast<double>(n) ? n : static_cast<int64_t>(wanted);
}

// What the next round drops when `left` tokens are still to go and `rounds_left` rounds, this one included, remain.
inline int64_t round_quota(int64_t left, int64_t rounds_left) { return left / rounds_left + (left % rounds_left != 0); }

// Whether `rounds` rounds get from n tokens to `keep`: no round may drop more than its source tokens.
inline bool rounds_suffice(int64_t n, int64_t keep, int64_t rounds) {
  int64_t left = n - keep;
  for (int64_t r = 0; r < rounds && left > 0; ++r) {
    const int64_t quota = round_quota(left, rounds - r);
    if (quota > (keep + left + 1) / 2) return false;
    left -= quota;
  }
  return left == 0;
}

// A round is a matching of all that is left. A hundred of them get to one token in a hundred; more would only be time.
inline constexpr int64_t kMostRounds = 100;

// The smallest number of rounds that suffices, for 1 <= keep <= n; kMostRounds + 1 if none that is allowed does.
inline int64_t rounds_needed(int64_t n, int64_t keep) {
  // The last round drops about left / rounds of at most 2 keep + 1 tokens, so fewer rounds than this cannot do.
  int64_t rounds = std::max<int64_t>(1, std::min((n - keep) / (keep + 2), kMostRounds + 1));
  while (rounds <= kMostRounds && !rounds_suffice(n, keep, rounds)) ++rounds;
  return rounds;
}

}  // namespace script::cpu
