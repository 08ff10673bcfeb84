// Exact greedy MAP of a DPP (diagonally pivoted Cholesky stopped after k pivots), by candidate pools.
//
// Residual variances only fall. So the residuals are kept exact for a pool of the kPanel best candidates only; while
// the pool's best is ahead of the best candidate outside it, as that stood when the pool was chosen, it is the best of
// all. When it no longer is, the new pivots are applied to every token at once (a matrix product instead of a pass per
// pivot) and a new pool is chosen. Chen et al. 2018 give the row-by-row form; picks here satisfy the same rule at every
// step.
//
// `Source` supplies kernel entries K by position:
//   Source::Rows(source, pivots, m, scratch), then .panel(p, out): out[a][c] = K(pivots[a], p * kPanel + c)
//   Source::Pool(source, positions, count, scratch), then .rows(members, m, out): out[a][c] =
//   K(positions[members[a]], positions[c])
// Positions come in whole panels; entries at a hole are 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "parallel.hpp"
#include "simd.hpp"
#include "tokens.hpp"
#include "workspace.hpp"

namespace script::cpu {

// Residuals at or below this fraction of the largest K_ii count as zero: the rank is exhausted.
inline constexpr float kRankTolerance = 1e-6f;

inline constexpr uint8_t kNoTier = 254;    // bad tokens: no pivot, picked last
inline constexpr uint8_t kHoleTier = 255;  // positions without a token

struct GreedyProblem {
  int64_t positions = 0;            // a multiple of kPanel
  const float* diagonal = nullptr;  // K_ii
  const int32_t* ids = nullptr;     // position -> token index; ties go to the lowest index
  const float* priority = nullptr;  // order of the picks past the rank, descending, then by index
  const uint8_t* tier = nullptr;    // 0, 1, kNoTier or kHoleTier: a tier is used up before the next one starts
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

// The members left in `tier`, best first as far as `wanted`; returns how many of them there are.
inline int64_t best_candidates(const GreedyProblem& problem, const float* residual, uint8_t tier, int64_t wanted,
                               Candidate* heap) {
  int64_t size = 0;
  for (int64_t p = 0; p < problem.positions; ++p) {
    if (residual[p] < 0.0f || problem.tier[p] != tier) continue;
    if (size == wanted && residual[p] < heap[0].residual) continue;
    const Candidate candidate{residual[p], problem.ids[p], static_cast<int32_t>(p)};
    if (size < wanted) {
      heap[size++] = candidate;
      std::push_heap(heap, heap + size);
    } else if (candidate < heap[0]) {
      std::pop_heap(heap, heap + size);
      heap[size - 1] = candidate;
      std::push_heap(heap, heap + size);
    }
  }
  std::sort_heap(heap, heap + size);
  return size;
}

// Takes what is left of a tier by priority, then index. Returns the new number of picks.
inline int64_t take_by_priority(const GreedyProblem& problem, uint8_t tier, int64_t k, int64_t picked, float* residual,
                                int64_t* indices, float* gains) {
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
    indices[picked] = rest[i].id;
    gains[picked++] = 0.0f;
  }
  return picked;
}

// Cholesky rows of all pivots so far at every position, by panels: row t of panel p at rows[(p * k + t) * kPanel].
struct CholeskyRows {
  float* data;
  int64_t k;
  float* panel(int64_t p) const { return data + p * k * kPanel; }
  // The first `t` entries of a position's column.
  void column(int64_t position, int64_t t, float* out) const {
    const float* x = panel(position / kPanel) + position % kPanel;
    for (int64_t s = 0; s < t; ++s) out[s] = x[s * kPanel];
  }
};

// The pivots taken from one pool, not yet applied outside it.
struct Pivots {
  int count = 0;
  int32_t positions[kPanel];
  float* factor;  // [kPanel][kPanel], lower triangle: the Cholesky factor of the pivots' conditional kernel
  alignas(64) float inverse_diagonal[kPanel];
};

// Brings rows and residuals of all positions up to date with the pivots; `done` pivots were applied before.
template <typename Source>
void apply_pivots(const Source& source, const GreedyProblem& problem, const Pivots& pivots, int64_t done,
                  CholeskyRows rows, float* residual, const Parallel& parallel) {
  Scratch scratch;
  const int m = pivots.count;
  const int64_t length = done + kPanel;
  float* columns = scratch.take<float>(m * length);
  const float* factor[kPanel];
  for (int a = 0; a < m; ++a) {
    float* column = columns + a * length;
    rows.column(pivots.positions[a], done, column);
    std::copy_n(pivots.factor + a * kPanel, a, column + done);
    factor[a] = column;
  }
  const typename Source::Rows pivot_rows(source, pivots.positions, m, scratch);
  parallel(problem.positions / kPanel, 4, [&](int64_t begin, int64_t end) {
    Scratch local;
    float* entries = local.take<float>(m * kPanel);
    const float* pointers[kPanel];
    for (int a = 0; a < m; ++a) pointers[a] = entries + a * kPanel;
    for (int64_t p = begin; p < end; ++p) {
      pivot_rows.panel(p, entries);
      simd().extend(pointers, m, factor, pivots.inverse_diagonal, done, rows.panel(p), residual + p * kPanel);
    }
  });
}

// The kPanel best candidates of a tier with the kernel among them, conditioned on the pivots applied so far.
template <typename Source>
class Pool {
 public:
  Pool(const Source& source, const GreedyProblem& problem, const float* residual, uint8_t tier, CholeskyRows rows,
       int64_t done, Scratch& scratch)
      : done_(done) {
    Candidate heap[kPanel + 1];
    const int64_t found = best_candidates(problem, residual, tier, kPanel + 1, heap);
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
    earlier_ = scratch.take<float>(kPanel * std::max<int64_t>(done, 1));
    earlier_panel_ = scratch.take<float>(kPanel * std::max<int64_t>(done, 1));
    kernel_ = scratch.take<float>(kPanel * kPanel);
    local_rows_ = scratch.take<float>(kPanel * kPanel);
    for (int c = 0; c < size_; ++c) {
      rows.column(positions_[c], done, earlier_ + c * done);
      earlier_rows_[c] = earlier_ + c * done;
    }
    simd().pack(earlier_rows_, size_, done, earlier_panel_);
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
  void take(int member, Pivots& pivots) {
    const int m = pivots.count;
    const float diagonal = std::sqrt(residual_[member]);
    float* factor = pivots.factor + m * kPanel;
    for (int b = 0; b < m; ++b) factor[b] = local_rows_[b * kPanel + member];
    factor[m] = diagonal;
    pivots.inverse_diagonal[m] = 1.0f / diagonal;
    pivots.positions[m] = positions_[member];
    residual_[member] = -1.0f;
    if (!known_[member]) compute_rows(member);
    const float* entries = kernel_ + member * kPanel;
    const float* column = factor;
    simd().extend(&entries, 1, &column, pivots.inverse_diagonal + m, m, local_rows_, residual_);
    ++pivots.count;
  }

 private:
  static constexpr int kBatch = 6;  // rows that cost little more than one: a register tile of the matrix product

  // Kernel rows of the member and of the candidates most likely to be next, less what the applied pivots explain.
  void compute_rows(int member) {
    int members[kBatch] = {member};
    int m = 1;
    known_[member] = true;
    Candidate order[kPanel];
    int left = 0;
    for (int c = 0; c < size_; ++c) {
      if (!known_[c] && residual_[c] >= 0.0f) order[left++] = Candidate{residual_[c], ids_[c], c};
    }
    const int more = std::min(left, kBatch - 1);
    std::partial_sort(order, order + more, order + left);
    for (int i = 0; i < more; ++i) {
      members[m++] = order[i].position;
      known_[order[i].position] = true;
    }
    float entries[kBatch * kPanel];
    source_pool_->rows(members, m, entries);
    const float* pointers[kBatch];
    for (int a = 0; a < m; ++a) pointers[a] = earlier_rows_[members[a]];
    simd().project(pointers, m, earlier_panel_, done_, entries);
    for (int a = 0; a < m; ++a) std::copy_n(entries + a * kPanel, kPanel, kernel_ + members[a] * kPanel);
  }

  int64_t done_;
  std::optional<typename Source::Pool> source_pool_;
  int size_ = 0;
  Candidate outside_{-1.0f, std::numeric_limits<int32_t>::max(), -1};
  alignas(64) float residual_[kPanel];
  int32_t ids_[kPanel];
  int32_t positions_[kPanel];
  bool known_[kPanel] = {};
  float* earlier_ = nullptr;        // [member][done]: the members' columns of the applied Cholesky rows
  float* earlier_panel_ = nullptr;  // the same as a panel, [done][kPanel]
  const float* earlier_rows_[kPanel];
  float* kernel_ = nullptr;      // [member][kPanel], where known_
  float* local_rows_ = nullptr;  // [pivot of this pool][kPanel]
};

}  // namespace detail

// Writes k picks (no more than there are tokens) in greedy order and the residual variance of each at its pick (0 past
// the rank).
template <typename Source>
void greedy_map(const Source& source, const GreedyProblem& problem, int64_t k, int64_t* indices, float* gains,
                const Parallel& parallel) {
  Scratch scratch;
  float* residual = scratch.take<float>(problem.positions, -1.0f);
  for (int64_t p = 0; p < problem.positions; ++p) {
    if (problem.tier[p] < kNoTier) residual[p] = std::max(problem.diagonal[p], 0.0f);
  }
  const detail::CholeskyRows rows{scratch.take<float>(problem.positions * k), k};
  detail::Pivots pivots;
  pivots.factor = scratch.take<float>(kPanel * kPanel);

  int64_t picked = 0;
  int64_t applied = 0;  // pivots whose rows stand in `rows`
  float largest = 0.0f;
  for (uint8_t tier = 0; tier < 2 && picked < k; ++tier) {
    for (int64_t p = 0; p < problem.positions; ++p) {
      if (problem.tier[p] == tier) largest = std::max(largest, problem.diagonal[p]);
    }
    const float exhausted_at = kRankTolerance * largest;
    bool exhausted = false;
    while (picked < k && !exhausted) {
      if (pivots.count > 0) {
        detail::apply_pivots(source, problem, pivots, applied, rows, residual, parallel);
        applied += pivots.count;
        pivots.count = 0;
      }
      Scratch pool_scratch;
      detail::Pool<Source> pool(source, problem, residual, tier, rows, applied, pool_scratch);
      if (pool.empty()) break;
      while (picked < k) {
        const int member = pool.best();
        if (!pool.leads(member)) break;
        if (pool.residual(member) <= exhausted_at) {
          exhausted = true;
          break;
        }
        indices[picked] = pool.id(member);
        gains[picked++] = pool.residual(member);
        residual[pool.position(member)] = -1.0f;
        if (picked < k) pool.take(member, pivots);
      }
    }
    if (exhausted) picked = detail::take_by_priority(problem, tier, k, picked, residual, indices, gains);
  }
  if (picked < k) detail::take_by_priority(problem, kNoTier, k, picked, residual, indices, gains);
}

}  // namespace script::cpu
