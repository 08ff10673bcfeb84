// How the matching splits tokens into sources and destinations, and the products that later stages take from it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "packed.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace script::cpu {

// How positions are shared out: destinations stand in whole panels from 0 on, sources in whole panels behind them.
struct Split {
  int64_t destinations = 0;  // tokens
  int64_t first_source = 0;  // position
  int64_t sources = 0;       // positions from there on, up to the last token
  int64_t positions() const { return first_source + pad_to_panel(sources); }
};

// Tokens alternate between sources (even) and destinations (odd).
inline Split split_of(int64_t count) { return {count / 2, pad_to_panel(count / 2), count - count / 2}; }

inline void split_tokens(int64_t count, int32_t* ids) {
  const Split split = split_of(count);
  std::fill(ids, ids + split.positions(), kHole);
  for (int64_t i = 0; i < count; ++i) ids[(i % 2 == 1 ? 0 : split.first_source) + i / 2] = static_cast<int32_t>(i);
}

// The raw products of all sources of a split of n tokens with all destinations, kept for the stages after the matching.
// Laid out twice: by destination panel [source][kPanel], and by source panel [destination][kPanel].
class MatchTile {
 public:
  // Above this the tile is not kept (N > 5792), and products are taken again where they are needed.
  static constexpr int64_t kLimitBytes = int64_t{64} << 20;

  static bool fits(int64_t n) { return 2 * size(split_of(n)) * int64_t{sizeof(float)} <= kLimitBytes; }

  MatchTile(int64_t n, Scratch& scratch)
      : split_(split_of(n)), rows_(pad_to_panel(split_.sources)), columns_(split_.first_source) {
    by_destination_ = scratch.take<float>(size(split_));
    by_source_ = scratch.take<float>(size(split_));
  }

  // Where the products of source `s` with destination panel `p` go; those of the next sources follow.
  float* entry(int64_t s, int64_t p) const { return by_destination_ + (p * rows_ + s) * kPanel; }

  // Fills the second layout from the first.
  void transpose(const Parallel& parallel) {
    parallel(rows_ / kPanel, 8 * columns_ * kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        const int count = static_cast<int>(std::min<int64_t>(kPanel, split_.sources - q * kPanel));
        for (int64_t p = 0; p < columns_ / kPanel; ++p) {
          const float* rows[kPanel];
          for (int r = 0; r < count; ++r) rows[r] = entry(q * kPanel + r, p);
          simd().transpose(rows, count, kPanel, by_source_ + (q * columns_ + p * kPanel) * kPanel);
        }
      }
    });
  }

  // Whether it has the products of two tokens: those of unlike parity.
  static bool knows(int32_t token, int32_t other) { return token % 2 != other % 2; }

  // The product of `token` with a token of the other parity stands at row(token)[offset(other)].
  const float* row(int32_t token) const {
    return token % 2 == 0 ? entry(token / 2, 0) : by_source_ + (token / 2) * kPanel;
  }
  int32_t offset(int32_t other) const {
    const int64_t i = other / 2, stride = other % 2 == 0 ? columns_ : rows_;
    return static_cast<int32_t>(i / kPanel * stride * kPanel + i % kPanel);
  }

 private:
  static int64_t size(const Split& split) { return pad_to_panel(split.sources) * split.first_source; }

  Split split_;
  int64_t rows_, columns_;
  float* by_destination_;
  float* by_source_;
};

// Later rounds, with the tile of the first: `survivors` (ascending) alternate again, and each side stands by the
// tokens' parity, in whole panels, so that what the tile knows of a panel it knows of all of it.
inline Split split_by_parity(const int32_t* survivors, int64_t count, int32_t* ids) {
  Split split;
  int64_t next = 0;
  for (const int side : {1, 0}) {
    for (const int parity : {0, 1}) {
      next = pad_to_panel(next);
      for (int64_t i = side; i < count; i += 2) {
        if (survivors[i] % 2 == parity) ids[next++] = survivors[i];
      }
      std::fill(ids + next, ids + pad_to_panel(next), kHole);
    }
    if (side == 1) split.first_source = pad_to_panel(next);
  }
  split.destinations = count / 2;
  split.sources = next - split.first_source;
  return split;
}

// Room that split_by_parity needs for `count` survivors.
inline int64_t split_by_parity_size(int64_t count) { return count + 4 * kPanel; }

}  // namespace script::cpu
