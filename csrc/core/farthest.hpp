// The token farthest from its nearest neighbour, exactly: where max_min starts. Every token has a nearest neighbour
// among N, but few have to be known: one neighbour that is near enough puts a token behind the best, for good.
//
// So a few tokens meet all others, for a best that is known. Tokens that those few see alike are often near each other:
// each meets the one that seems nearest, and where that tells how far a token is, there is little left to do but to let
// the most promising meet all others. Where it does not, the tokens that are alive meet each other only: blocks of
// columns, packed, that rows of other tokens pass by, each product serving both sides. Whatever falls behind leaves, on
// either side, and tokens still alive take the places of columns that left. What outlives this is promising enough to
// meet all others. A bound may come from anywhere, as long as it is one; the best is what panels tell, and what a
// cosine is there does not depend on where it was computed, so that neither the order nor the number of threads shows
// in the result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "greedy.hpp"
#include "nearest.hpp"

namespace script::cpu {

// By position, and its residual against all others; -1 without tokens.
struct Farthest {
  int32_t position = -1;
  float residual = -1.0f;
};

namespace detail {

// Positions, first in first out; what is not taken out for good may be put back.
class Ring {
 public:
  Ring(int64_t capacity, Scratch& scratch) : items_(scratch.take<int32_t>(capacity)), capacity_(capacity) {}
  int64_t size() const { return size_; }
  void push(int32_t at) { items_[(head_ + size_++) % capacity_] = at; }
  int32_t pop() {
    const int32_t at = items_[head_];
    head_ = (head_ + 1) % capacity_;
    --size_;
    return at;
  }

 private:
  int32_t* items_;
  int64_t capacity_, head_ = 0, size_ = 0;
};

class FarthestSearch {
 public:
  FarthestSearch(const PlacedTokens& placed, const Nearest& factor, const Parallel& parallel, Scratch& scratch)
      : source_(placed.source()),
        problem_(placed.problem()),
        factor_(factor),
        parallel_(parallel),
        bound_(scratch.take<float>(problem_.positions, -1.0f)),
        looked_(scratch.take<float>(problem_.positions, -1.0f)),
        promising_(scratch.take<Candidate>(problem_.positions)),
        live_(problem_.positions, scratch) {
    for (float*& cosines : seen_) cosines = scratch.take<float>(problem_.positions, kNoCosine);
  }

  Farthest run() {
    start();
    expected_ = expected_best();
    meet_lookalikes();
    bool more = meet_promising();
    for (int round = 1; round < kRounds && alike_ && more; ++round) more = meet_promising();
    if (more) {
      meet_each_other();
      while (meet_promising()) continue;
    }
    return {best_.position, best_.residual};
  }

 private:
  static constexpr float kNoCosine = -2.0f;     // below any
  static constexpr int kFirst = kCoordinates;   // rows of a register tile
  static constexpr int kRounds = 8;             // of promising tokens, where lookalikes tell how far they are
  static constexpr int64_t kWindow = 1024;      // positions that lookalikes are looked for among
  static constexpr int kRefill = kGroup;        // columns that leave before others take their places
  static constexpr int64_t kRows = 2 * kPanel;  // rows that pass before columns leave, at least

  struct Block {
    int32_t position[kPanel];
    int64_t to_meet[kPanel];  // of the ring that passes by
    alignas(64) float offset[kPanel] = {}, slope[kPanel] = {}, residual[kPanel];
    int size = 0;
    Block() { std::fill_n(residual, kPanel, -1.0f); }
  };

  void add(Block& block, int32_t at, float residual, int64_t to_meet) const {
    block.position[block.size] = at;
    block.to_meet[block.size] = to_meet;
    block.offset[block.size] = factor_.offset[at];
    block.slope[block.size] = factor_.slope[at];
    block.residual[block.size++] = residual;
  }

  bool may_win(int32_t at) const { return Candidate{bound_[at], problem_.ids[at], at} < best_; }

  bool is_token(int64_t p) const { return problem_.tier[p] == 0; }

  // A few tokens that start far meet all others; of as many as start as far, some that are spread over them.
  void start() {
    float largest[kFirst];  // a heap, the least of them on top
    std::fill_n(largest, kFirst, 0.0f);
    for (int64_t p = 0; p < problem_.positions; ++p) {
      if (!is_token(p)) continue;
      bound_[p] = factor_.offset[p] + factor_.slope[p];  // alone, a token is as far from the others as can be
      if (bound_[p] <= largest[0]) continue;
      std::pop_heap(largest, largest + kFirst, std::greater<>());
      largest[kFirst - 1] = bound_[p];
      std::push_heap(largest, largest + kFirst, std::greater<>());
    }
    const auto starts_far = [&](int64_t p) { return is_token(p) && bound_[p] >= largest[0]; };
    int64_t far = 0, seen = 0;
    for (int64_t p = 0; p < problem_.positions; ++p) far += starts_far(p);
    const int64_t stride = std::max<int64_t>(1, far / kFirst);
    Block block;
    for (int64_t p = 0; p < problem_.positions && block.size < kFirst; ++p) {
      if (starts_far(p) && seen++ % stride == 0) add(block, static_cast<int32_t>(p), bound_[p], 0);
    }
    meet_all(block, seen_);
  }

  // Each token meets the one that the first few see most like it, unless another's lookalike it has been: as long as
  // bounds come down by that.
  void meet_lookalikes() {
    int32_t waiting[kPanel];
    int count = 0;
    int64_t down = 0, all = 0;
    for (int64_t p = 0; p < problem_.positions; ++p) {
      const int32_t at = static_cast<int32_t>(p);
      if (is_token(p) && looked_[p] < 0.0f && may_win(at)) waiting[count++] = at;
      if (count < kPanel) continue;
      down += meet_lookalikes(waiting, count);
      all += count;
      alike_ = 4 * down >= all;
      if (!alike_) return;
      count = 0;
    }
    if (alike_) meet_lookalikes(waiting, count);
  }

  // Up to kPanel tokens meet each a lookalike, the next of them. Returns how many bounds came down by a quarter.
  int meet_lookalikes(const int32_t* tokens, int count) {
    const int64_t positions = problem_.positions, window = std::min(kWindow, positions);
    int32_t others[kPanel];
    alignas(64) float cosines[kPanel] = {};
    parallel_(count, window * kFirst + 8 * source_.row_work(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int32_t at = tokens[c];
        const int64_t from = std::min(at / kWindow * kWindow, positions - window);
        const float* seen[kFirst];
        for (int a = 0; a < kFirst; ++a) seen[a] = seen_[a] + from;
        const Closest closest = simd().closest(seen, window, at - from, looked_[at]);
        looked_[at] = closest.distance;
        others[c] = static_cast<int32_t>(from + closest.point);
        const bool another = others[c] != at && is_token(others[c]);
        cosines[c] = another ? source_.entry_at_least(at, others[c]) : kNoCosine;
      }
    });
    Block left, right;
    for (int c = 0; c < count; ++c) {
      add(left, tokens[c], bound_[tokens[c]], 0);
      add(right, others[c], bound_[others[c]], 0);
    }
    lower(left, cosines, left.residual);
    lower(right, cosines, right.residual);
    int down = 0;
    for (int c = 0; c < count; ++c) {
      down += left.residual[c] < 0.75f * bound_[tokens[c]];
      bound_[tokens[c]] = std::min(bound_[tokens[c]], left.residual[c]);
      bound_[others[c]] = std::min(bound_[others[c]], right.residual[c]);
      looked_[others[c]] = std::max(looked_[others[c]], 0.0f);
    }
    return down;
  }

  // A few tokens of the largest bounds meet all others, a register tile or two, and more where there are more tokens to
  // leave behind; before, where it pays, they and those that come next meet a lookalike. False if there is nothing left
  // that may win.
  bool meet_promising() {
    int64_t alive = 0;
    for (int64_t p = 0; p < problem_.positions; ++p) {
      const int32_t at = static_cast<int32_t>(p);
      if (is_token(p) && may_win(at)) promising_[alive++] = {bound_[p], problem_.ids[p], at};
    }
    const int64_t most = kFirst * ((alike_ ? 1 : 2) + problem_.positions / kPanel / 16);
    int64_t size = std::min(alive, int64_t{kPanel});
    std::partial_sort(promising_, promising_ + size, promising_ + alive);
    if (alike_) {
      int32_t tokens[kPanel];
      for (int64_t a = 0; a < size; ++a) tokens[a] = promising_[a].position;
      meet_lookalikes(tokens, static_cast<int>(size));
      for (int64_t a = 0; a < size; ++a) promising_[a].residual = bound_[tokens[a]];
      std::sort(promising_, promising_ + size);
    }
    size = std::min(size, most);
    Block block;
    for (int64_t a = 0; a < size; ++a) add(block, promising_[a].position, promising_[a].residual, 0);
    meet_all(block);
    return size > 0;
  }

  // What the best will come to, as far as the bounds so far tell: were tokens' cosines drawn independently, that would
  // be where one token of n has nothing above it, and the bounds are what a part of the cosines left. A guess only:
  // what it hides from meet_each_other still meets all if it may win. Lookalikes are not drawn: it is asked before.
  float expected_best() const {
    Scratch scratch;
    float* bounds = scratch.take<float>(problem_.positions);
    int64_t n = 0;
    for (int64_t p = 0; p < problem_.positions; ++p) {
      if (is_token(p)) bounds[n++] = bound_[p];
    }
    const double met = static_cast<double>(met_) / static_cast<double>(problem_.positions * problem_.positions);
    const int64_t below = static_cast<int64_t>(static_cast<double>(n) * (1.0 - std::pow(n, -met)));
    std::nth_element(bounds, bounds + below, bounds + n);
    return bounds[below];
  }

  // Each product serves two tokens as long as both may win.
  void meet_each_other() {
    for (int64_t p = 0; p < problem_.positions; ++p) {
      if (is_token(p) && is_live(static_cast<int32_t>(p))) live_.push(static_cast<int32_t>(p));
    }
    // Where hardly anything falls behind, everything has to meet all; that is not to be done twice.
    int64_t most = problem_.positions * problem_.positions / 4;
    Block block;
    do {
      most -= kPanel * step(block);
    } while (block.size > 0 && most > 0);
  }

  bool is_live(int32_t at) const { return may_win(at) && bound_[at] >= expected_; }

  // The token has met all.
  void settle(int32_t at) {
    const Candidate known{bound_[at], problem_.ids[at], at};
    if (known < best_) best_ = known;
  }

  // Some rows of the ring pass by the block, after live tokens have taken its free columns. Returns how many rows met
  // it.
  int64_t step(Block& block) {
    leave(block);
    const int before = block.size;
    if (kPanel - before >= kRefill) {
      while (block.size < kPanel && live_.size() > 0) {
        const int32_t at = live_.pop();
        pass(block, 1);
        if (is_live(at)) add(block, at, bound_[at], 0);
      }
      for (int c = before; c < block.size; ++c) block.to_meet[c] = live_.size();
    }
    if (block.size == 0) return 0;
    Scratch scratch;
    const TokenSource::Pool pool(source_, block.position, block.size, scratch);
    // Half of what the new columns see of each other serves one side only: where others pass by, that is left.
    if (live_.size() < kPanel) meet(pool, block, block.position + before, block.size - before, before);
    for (int c = before; c < block.size; ++c) {
      block.residual[c] = std::min(block.residual[c], bound_[block.position[c]]);
    }
    const int64_t wanted = std::min(live_.size(), std::max(kRows, pad_to_panel(live_.size() / 16)));
    int32_t* rows = scratch.take<int32_t>(wanted);
    int64_t count = 0;
    for (int64_t i = 0; i < wanted; ++i) {
      const int32_t at = live_.pop();
      if (is_live(at)) rows[count++] = at;
    }
    pass(block, wanted);
    meet(pool, block, rows, count, -1);
    for (int64_t i = 0; i < count; ++i) live_.push(rows[i]);
    return block.size - before + count;
  }

  static void pass(Block& block, int64_t count) {
    for (int c = 0; c < block.size; ++c) block.to_meet[c] -= count;
  }

  // Columns leave that have fallen behind, or that the whole ring has passed.
  void leave(Block& block) {
    Block left;
    for (int c = 0; c < block.size; ++c) {
      const int32_t at = block.position[c];
      bound_[at] = block.residual[c];
      if (is_live(at) && block.to_meet[c] > 0) add(left, at, block.residual[c], block.to_meet[c]);
    }
    block = left;
  }

  // The block's members as rows, with all tokens as columns; a member leaves where it falls behind.
  void meet_all(Block& block, float* const* keep = nullptr) {
    const int64_t panels = problem_.positions / kPanel, step = std::max<int64_t>(2, panels / 16);
    for (int64_t p = 0; p < panels && block.size > 0; p += step) {
      meet_panels(block, p, std::min(p + step, panels), keep);
      Block left;
      for (int c = 0; c < block.size; ++c) {
        const int32_t at = block.position[c];
        bound_[at] = std::min(bound_[at], block.residual[c]);
        if (may_win(at)) add(left, at, bound_[at], 0);
      }
      block = left;
    }
    for (int c = 0; c < block.size; ++c) settle(block.position[c]);
  }

  // What row a sees goes to keep[a] too, by position, unless that is null.
  void meet_panels(Block& block, int64_t first, int64_t last, float* const* keep) {
    Scratch scratch;
    TokenSource::Rows rows(kPanel, scratch);
    rows.append(source_, block.position, block.size, scratch);
    met_ += (last - first) * kPanel * block.size;
    float* tops = scratch.take<float>((last - first) * kPanel, kNoCosine);
    parallel_(last - first, block.size * kPanel * source_.row_work(), [&](int64_t begin, int64_t end) {
      Scratch local;
      float* cosines = local.take<float>(kPanel * kPanel);
      for (int64_t p = first + begin; p < first + end; ++p) {
        const float* row[kPanel];
        rows.panel(source_, p, 0, block.size, cosines);
        for (int a = 0; a < block.size; ++a) {
          float* x = cosines + a * kPanel;
          row[a] = x;
          if (block.position[a] / kPanel == p) x[block.position[a] % kPanel] = kNoCosine;  // its own
          for (int c = 0; c < kPanel; ++c) {
            if (problem_.tier[p * kPanel + c] != 0) x[c] = kNoCosine;
          }
          tops[(p - first) * kPanel + a] = x[simd().argmax(x, kPanel)];
          if (keep != nullptr) std::copy_n(x, kPanel, keep[a] + p * kPanel);
        }
        const int64_t at = p * kPanel;
        simd().lower(row, block.size, factor_.offset + at, factor_.slope + at, bound_ + at);
      }
    });
    for (int64_t p = 0; p < last - first; ++p) lower(block, tops + p * kPanel, block.residual);
  }

  // Lowers residuals by one cosine each.
  static void lower(const Block& block, const float* cosines, float* residual) {
    simd().lower(&cosines, 1, block.offset, block.slope, residual);
  }

  // Tokens as rows, with the block as columns; row a is column own + a itself unless `own` is negative.
  void meet(const TokenSource::Pool& pool, Block& block, const int32_t* rows, int64_t count, int own) const {
    if (count == 0) return;
    Scratch scratch;
    const int64_t batches = ceil_div(count, kPanel);
    float* lowered = scratch.take<float>(batches * kPanel);
    const int64_t work = kPanel * groups_of(block.size) * kGroup * source_.row_work();
    parallel_(batches, work, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int m = static_cast<int>(std::min<int64_t>(kPanel, count - b * kPanel));
        meet_batch(pool, block, rows + b * kPanel, m, own, lowered + b * kPanel);
      }
    });
    for (int64_t b = 0; b < batches; ++b) {
      for (int c = 0; c < block.size; ++c) block.residual[c] = std::min(block.residual[c], lowered[b * kPanel + c]);
    }
  }

  // m <= kPanel rows; what the block's residuals come to goes to `lowered`.
  void meet_batch(const TokenSource::Pool& pool, const Block& block, const int32_t* rows, int m, int own,
                  float* lowered) const {
    Scratch scratch;
    float* cosines = scratch.take<float>(kPanel * kPanel);
    const float* row[kPanel];
    pool.rows_of(source_, rows, m, cosines);
    for (int a = 0; a < m; ++a) {
      row[a] = cosines + a * kPanel;
      if (own >= 0) cosines[a * kPanel + own + a] = kNoCosine;
    }
    std::copy_n(block.residual, kPanel, lowered);
    simd().lower(row, m, block.offset, block.slope, lowered);
    Block side;
    alignas(64) float top[kPanel] = {};
    const int columns = groups_of(block.size) * kGroup;
    for (int a = 0; a < m; ++a) {
      float* x = cosines + a * kPanel;
      std::fill(x + block.size, x + columns, kNoCosine);
      top[a] = x[simd().argmax(x, columns)];
      add(side, rows[a], bound_[rows[a]], 0);
    }
    lower(side, top, side.residual);
    for (int a = 0; a < m; ++a) bound_[rows[a]] = side.residual[a];
  }

  const TokenSource& source_;
  const GreedyProblem& problem_;
  const Nearest& factor_;
  const Parallel& parallel_;
  float* bound_;         // per position: no residual is larger
  float* looked_;        // per position: how far away lookalikes have been met; -1 before
  float* seen_[kFirst];  // by position: the cosines of the first tokens that met all
  bool alike_ = false;   // whether it pays to meet lookalikes
  Candidate* promising_;
  Ring live_;  // but for the columns at hand
  float expected_ = 0.0f;
  int64_t met_ = 0;                                                 // products of the tokens that met all
  Candidate best_{-1.0f, std::numeric_limits<int32_t>::max(), -1};  // of the tokens that have met all
};

}  // namespace detail

inline Farthest farthest(const PlacedTokens& placed, const Nearest& factor, const Parallel& parallel) {
  Scratch scratch;
  return detail::FarthestSearch(placed, factor, parallel, scratch).run();
}

}  // namespace script::cpu
