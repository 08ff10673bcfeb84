// Exact greedy choice by residuals that only fall, by candidate pools. Greedy MAP of a DPP (diagonally pivoted Cholesky
// stopped after k pivots) is one such choice, farthest points first another; what a pick does to the residuals of the
// others is the business of a factor, Cholesky or Nearest.
//
// Residuals only fall. So the residuals are kept exact for a pool of the kPanel best candidates only; while
// the pool's best is ahead of the best candidate outside it, as that stood when the pool was chosen, it is the best of
// all. When it no longer is, a new pool is chosen, and the new pivots are applied, all at once (a matrix product
// instead of a pass per pivot), to the panels that may hold a member of it: what a residual was before is an upper
// bound. Chen et al. 2018 give the row-by-row form; picks here satisfy the same rule at every step.
//
// `Factor` holds the residuals: see cholesky.hpp. `Source` supplies kernel entries K by position:
//   row_work(): multiply-adds per entry
//   Source::Rows(k, scratch) takes pivots with append(source, pivots, m, scratch); then .panel(source, p, first, m,
//   out): out[a][c] = K(pivot first + a, p * kPanel + c) Source::Pool(source, positions, count, scratch), then
//   .rows(members, m, out): out[a][c] = K(positions[members[a]], positions[c])
// Positions come in whole panels; entries at a hole are 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "packed.hpp"
#include "parallel.hpp"
#include "simd/simd.hpp"
#include "workspace.hpp"

namespace script::cpu {

inline constexpr uint8_t kNoTier = 254;    // bad tokens: no pivot, picked last
inline constexpr uint8_t kHoleTier = 255;  // positions without a token

// k picks in greedy order, with the residual of each at its pick.
struct Picks {
  int64_t* indices = nullptr;
  float* gains = nullptr;
  Picks at(int64_t i) const { return {indices + i, gains + i}; }
};

struct GreedyProblem {
  int64_t positions = 0;            // a multiple of kPanel
  const float* diagonal = nullptr;  // K_ii, or what else the residuals start from
  const int32_t* ids = nullptr;     // position -> token index; ties go to the lowest index
  const float* priority = nullptr;  // order of the picks past the rank, descending, then by index
  const uint8_t* tier = nullptr;    // 0, 1, kNoTier or kHoleTier: a tier is used up before the next one starts
  int32_t first = -1;               // the position of a pick that the caller makes before all others, or -1
};

// The numbers of picks from which on, and up to which, a choice may stop.
struct Pause {
  int64_t from = 0, until = 0;
};

namespace detail {

struct Candidate {
  float residual;
  int32_t id;
  int32_t position;
  // "comes before": larger residual, then lower index.
  bool operator<(const Candidate& other) const {
    return residual > other.residual || (residual == other.residual && id < other.id);
  }
};

// Takes what is left of a tier by priority, then index. Returns the new number of picks.
inline int64_t take_by_priority(const GreedyProblem& problem, uint8_t tier, int64_t k, int64_t picked, float* residual,
                                const Picks& picks) {
  Scratch scratch;
  Candidate* rest = scratch.take<Candidate>(problem.positions);
  int64_t size = 0;
  for (int64_t p = 0; p < problem.positions; ++p) {
    // A bad token has no tier, no residual and no priority: its index alone orders it.
    if (problem.tier[p] != tier || (tier != kNoTier && residual[p] < 0.0f)) continue;
    rest[size++] = Candidate{tier == kNoTier ? 0.0f : problem.priority[p], problem.ids[p], static_cast<int32_t>(p)};
  }
  const int64_t take = std::min(size, k - picked);
  std::partial_sort(rest, rest + take, rest + size);
  for (int64_t i = 0; i < take; ++i) {
    residual[rest[i].position] = -1.0f;
    picks.indices[picked] = rest[i].id;
    picks.gains[picked++] = 0.0f;
  }
  return picked;
}

// The pivots so far, and residuals and Cholesky rows of all positions, panel by panel as up to date as they had to be.
template <typename Source, typename Factor>
class Panels {
 public:
  Panels(const Source& source, const GreedyProblem& problem, Factor& factor, int64_t k, Scratch& scratch,
         const Parallel& parallel)
      : source_(source),
        problem_(problem),
        parallel_(parallel),
        count_(problem.positions / kPanel),
        pivot_rows_(k, scratch),
        factor_(factor),
        bound_(scratch.take<float>(pad_to_panel(count_), -1.0f)),
        unseen_(scratch.take<float>(pad_to_panel(count_))),
        late_(scratch.take<int32_t>(count_)) {
    for (int64_t p = 0; p < problem.positions; ++p) {
      if (problem.tier[p] >= kNoTier) continue;
      factor_.residual[p] = std::max(problem.diagonal[p], 0.0f);
      bound_[p / kPanel] = std::max(bound_[p / kPanel], factor_.residual[p]);
    }
  }

  int64_t pivots() const { return pivots_; }
  Factor& factor() { return factor_; }

  // Adds m pivots, whose columns have been written.
  void append(const int32_t* positions, int m, Scratch& scratch) {
    pivot_rows_.append(source_, positions, m, scratch);
    pivots_ += m;
  }

  // The members left in `tier`, best first as far as `wanted`, by residuals that are up to date; returns how many.
  int64_t best_candidates(uint8_t tier, int64_t wanted, Candidate* heap) {
    // What the last of the candidates will have come down to when all is up to date, as far as the last search tells:
    // so that one round of updates is mostly enough.
    float expected = fall_;
    float first_worst = -1.0f;
    for (;;) {
      const int64_t size = look_for_candidates(tier, wanted, heap);
      const float worst = size == wanted ? heap[0].residual : 0.0f;
      if (first_worst < 0.0f) first_worst = worst;
      int64_t late = 0, due = 0;
      for (int64_t p = 0; p < count_; ++p) {
        if (factor_.applied[p] == pivots_ || bound_[p] < worst * expected) continue;
        due += bound_[p] >= worst;
        late_[late++] = static_cast<int32_t>(p);
      }
      if (due == 0) {
        // A first pivot on its own takes residuals down from where they start, which says nothing of the next. A guess;
        // but of few panels, one that need not be brought up to date is worth more than a search.
        const float guess = count_ < 16 ? 1.0f : 0.9f;
        fall_ = pivots_ == 1 ? guess : first_worst > 0.0f ? worst / first_worst : 1.0f;
        std::sort(heap, heap + size);
        return size;
      }
      bring_up_to_date(late);
      expected = 1.0f;
    }
  }

  // Whether waiting saves little, and could save more: hardly a panel waits, and few residuals are far behind. (A
  // cluster of tokens that is far behind comes back, all of it, when every cluster has its pick.)
  bool could_wait(int64_t pivots) const {
    const auto knows = [&](int64_t applied) { return applied >= pivots; };
    if (8 * std::count_if(factor_.applied, factor_.applied + count_, knows) < 7 * count_) return false;
    const float best = *std::max_element(bound_, bound_ + count_);
    const float* residual = factor_.residual;
    const auto behind = [&](float left) { return left >= 0.0f && left < 0.5f * best; };
    return 2 * std::count_if(residual, residual + problem_.positions, behind) < problem_.positions;
  }

  // Makes all residuals exact.
  void bring_all_up_to_date() {
    for (int64_t p = 0; p < count_; ++p) late_[p] = static_cast<int32_t>(p);
    bring_up_to_date(count_);
  }

 private:
  // The first `late` panels of late_.
  void bring_up_to_date(int64_t late) {
    const int64_t lag = pivots_ - factor_.applied[late_[0]];
    parallel_(late, lag * kPanel * (source_.row_work() + factor_.entry_work(pivots_)), [&](int64_t begin, int64_t end) {
      Scratch local;
      float* entries = local.take<float>(kPanel * kPanel);
      for (int64_t s = begin; s < end; ++s) bring_up_to_date(late_[s], entries);
    });
  }

  // The same by residuals as they stand, from the panels of largest bound. A heap only if as many as wanted are there.
  int64_t look_for_candidates(uint8_t tier, int64_t wanted, Candidate* heap) {
    const float* residual = factor_.residual;
    std::copy_n(bound_, pad_to_panel(count_), unseen_);
    int64_t size = 0;
    for (;;) {
      const int64_t panel = simd().argmax(unseen_, pad_to_panel(count_));
      if (unseen_[panel] < 0.0f || (size == wanted && unseen_[panel] < heap[0].residual)) return size;
      unseen_[panel] = -2.0f;
      for (int64_t p = panel * kPanel; p < (panel + 1) * kPanel; ++p) {
        if (residual[p] < 0.0f || problem_.tier[p] != tier) continue;
        if (size == wanted && residual[p] < heap[0].residual) continue;
        const Candidate candidate{residual[p], problem_.ids[p], static_cast<int32_t>(p)};
        if (size < wanted) {
          heap[size++] = candidate;
          if (size == wanted) std::make_heap(heap, heap + size);
        } else if (candidate < heap[0]) {
          std::pop_heap(heap, heap + size);
          heap[size - 1] = candidate;
          std::push_heap(heap, heap + size);
        }
      }
    }
  }

  void bring_up_to_date(int64_t p, float* entries) {
    const auto of_source = [&](int64_t first, int m, const float** out) {
      pivot_rows_.panel(source_, p, first, m, entries);
      for (int a = 0; a < m; ++a) out[a] = entries + a * kPanel;
    };
    while (factor_.applied[p] < pivots_) bound_[p] = factor_.extend(p, pivots_, of_source);
  }

  const Source& source_;
  const GreedyProblem& problem_;
  const Parallel& parallel_;
  int64_t count_;
  int64_t pivots_ = 0;
  typename Source::Rows pivot_rows_;
  Factor& factor_;
  float* bound_;  // per panel: no residual in it is larger
  float* unseen_;
  int32_t* late_;
  float fall_ = 1.0f;
};

// The kPanel best candidates of a tier with the kernel among them, conditioned on the pivots before.
template <typename Source, typename Factor>
class Pool {
 public:
  Pool(const Source& source, Panels<Source, Factor>& panels, uint8_t tier, Scratch& scratch) {
    Candidate heap[kPanel + 1];
    const int64_t found = panels.best_candidates(tier, kPanel + 1, heap);
    size_ = static_cast<int>(std::min<int64_t>(found, kPanel));
    if (found > kPanel) outside_ = heap[kPanel];
    // In index order, so that the first of the largest residuals is the lowest index.
    std::sort(heap, heap + size_, [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
    for (int c = 0; c < kPanel; ++c) residual_[c] = -1.0f;
    for (int c = 0; c < size_; ++c) {
      residual_[c] = heap[c].residual;
      ids_[c] = heap[c].id;
      positions_[c] = heap[c].position;
    }
    if (size_ == 0) return;
    source_pool_.emplace(source, positions_, size_, scratch);
    members_.emplace(panels.factor(), positions_, size_, panels.pivots(), scratch);
    kernel_ = scratch.take<float>(kPanel * kPanel);
  }

  bool empty() const { return size_ == 0; }
  // The member of largest residual; only meaningful while one is left.
  int best() const { return static_cast<int>(simd().argmax(residual_, kPanel)); }
  float residual(int member) const { return residual_[member]; }
  int32_t id(int member) const { return ids_[member]; }
  int32_t position(int member) const { return positions_[member]; }
  // Whether the member comes before everything outside the pool.
  bool leads(int member) const {
    if (residual_[member] < 0.0f) return false;
    return Candidate{residual_[member], ids_[member], 0} < outside_;
  }

  // Makes the member the next pivot and conditions the others on it.
  void take(int member) {
    if (!known_[member]) compute_rows(member);
    members_->take(member, kernel_ + member * kPanel, residual_);
    taken_[taken_count_++] = positions_[member];
  }

  // The positions of the pivots taken.
  const int32_t* taken() const { return taken_; }
  int taken_count() const { return taken_count_; }

 private:
  static constexpr int kBatch = 4;  // rows that cost little more than one; of more, most would be guessed in vain

  // Kernel rows of the member and of the candidates most likely to be next, less what the applied pivots explain.
  void compute_rows(int member) {
    int members[kBatch] = {member};
    int m = 1;
    known_[member] = true;
    Candidate next[kPanel];
    int left = 0;
    for (int c = 0; c < size_; ++c) {
      if (!known_[c] && residual_[c] >= 0.0f) next[left++] = Candidate{residual_[c], ids_[c], c};
    }
    const int more = std::min(left, kBatch - 1);
    std::partial_sort(next, next + more, next + left);
    for (int i = 0; i < more; ++i) {
      members[m++] = next[i].position;
      known_[next[i].position] = true;
    }
    float entries[kBatch * kPanel];
    source_pool_->rows(members, m, entries);
    members_->condition(members, m, entries);
    for (int a = 0; a < m; ++a) std::copy_n(entries + a * kPanel, kPanel, kernel_ + members[a] * kPanel);
  }

  int taken_count_ = 0;
  int32_t taken_[kPanel];
  std::optional<typename Source::Pool> source_pool_;
  std::optional<typename Factor::Members> members_;
  int size_ = 0;
  Candidate outside_{-1.0f, std::numeric_limits<int32_t>::max(), -1};
  alignas(64) float residual_[kPanel];
  int32_t ids_[kPanel];
  int32_t positions_[kPanel];
  bool known_[kPanel] = {};
  float* kernel_ = nullptr;  // [member][kPanel], where known_
};

}  // namespace detail

// Writes k picks (no more than there are tokens) in greedy order and the residual of each at its pick (0 past the
// rank). Returns k, or fewer: in `pause`, where panels could wait if tokens changed places, it stops with all residuals
// exact.
template <typename Source, typename Factor>
int64_t greedy_map(const Source& source, const GreedyProblem& problem, Factor& factor, int64_t k, const Picks& picks,
                   const Parallel& parallel, const Pause& pause = {}) {
  Scratch scratch;
  detail::Panels<Source, Factor> panels(source, problem, factor, k, scratch, parallel);
  float* residual = factor.residual;
  int64_t picked = 0;
  if (problem.first >= 0 && k > 0) {
    picks.indices[picked] = problem.ids[problem.first];
    picks.gains[picked++] = residual[problem.first];
    residual[problem.first] = -1.0f;
    panels.append(&problem.first, 1, scratch);
  }
  float largest = 0.0f;
  for (uint8_t tier = 0; tier < 2 && picked < k; ++tier) {
    for (int64_t p = 0; p < problem.positions; ++p) {
      if (problem.tier[p] == tier) largest = std::max(largest, problem.diagonal[p]);
    }
    const float exhausted_at = Factor::exhausted_at(largest);
    bool exhausted = false;
    while (picked < k && !exhausted) {
      int32_t taken[kPanel];
      int count = 0;
      {
        Scratch pool_scratch;
        detail::Pool<Source, Factor> pool(source, panels, tier, pool_scratch);
        if (pool.empty()) break;
        while (picked < k) {
          const int member = pool.best();
          if (!pool.leads(member)) break;
          if (pool.residual(member) <= exhausted_at) {
            exhausted = true;
            break;
          }
          picks.indices[picked] = pool.id(member);
          picks.gains[picked++] = pool.residual(member);
          residual[pool.position(member)] = -1.0f;
          if (picked < k) pool.take(member);
        }
        count = pool.taken_count();
        std::copy_n(pool.taken(), count, taken);
      }
      panels.append(taken, count, scratch);  // outside the pool's scope: what it takes from `scratch` stays
      if (pause.from <= picked && picked < pause.until &&
          panels.could_wait(std::max(picked / 2, panels.pivots() - count))) {
        panels.bring_all_up_to_date();
        return picked;
      }
    }
    if (exhausted) picked = detail::take_by_priority(problem, tier, k, picked, residual, picks);
  }
  if (picked < k) detail::take_by_priority(problem, kNoTier, k, picked, residual, picks);
  return k;
}

}  // namespace script::cpu
