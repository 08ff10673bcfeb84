// A pivoted Cholesky factor by panels of columns, each as far along as somebody needed it: the one update that greedy
// MAP makes, whether the kernel's entries are there or have to be computed.
//
// It is one of the factors of greedy.hpp: residuals by position, and what each panel and each pool needs to bring them
// up to date.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd/simd.hpp"
#include "workspace.hpp"

namespace script::cpu {

struct Cholesky {
  // Residuals at or below this fraction of the largest K_ii count as zero: the rank is exhausted. A token equal to the
  // first pick is left with at most 11 half-ulps of its K_jj (one rounding of K_ij = r_i r_j, half of that of K_ii,
  // root, division and product, all of it squared, and K_jj's own), 6.6e-7: below it, whatever the relevances.
  static constexpr float kRankTolerance = 1e-6f;
  static float exhausted_at(float largest) { return kRankTolerance * largest; }

  float* rows;              // row t of panel p at rows[(p * k + t) * kPanel]
  float* columns;           // [pivot][k]: of pivot t, its entries in the rows 0 to t - 1
  float* inverse_diagonal;  // of pivot t: 1 / its entry in row t
  float* residual;          // per position: the variance left, -1 for a hole, a taken or a bad token
  int64_t* applied;         // per panel: the pivots that its rows and residuals know of
  int64_t k;

  Cholesky(int64_t positions, int64_t pivots, Scratch& scratch)
      : rows(scratch.take<float>(positions * pivots)),
        columns(scratch.take<float>(pivots * pivots)),
        inverse_diagonal(scratch.take<float>(pivots)),
        residual(scratch.take<float>(positions, -1.0f)),
        applied(scratch.take<int64_t>(positions / kPanel, 0)),
        k(pivots) {}

  // Multiply-adds that one more entry of a panel takes.
  int64_t entry_work(int64_t pivots) const { return pivots; }
  float* panel(int64_t p) const { return rows + p * k * kPanel; }
  float* column(int64_t pivot) const { return columns + pivot * k; }
  // The first t entries of a position's column; its panel is up to date that far.
  void read_column(int64_t position, int64_t t, float* out) const {
    const float* x = panel(position / kPanel) + position % kPanel;
    for (int64_t s = 0; s < t; ++s) out[s] = x[s * kPanel];
  }

  // Applies to panel p the next of the `pivots` that it lacks, at most kPanel of them, and returns its largest
  // residual. entries(first, m, out) points out[a] to the kernel entries of pivot first + a at the panel's columns.
  template <typename Entries>
  float extend(int64_t p, int64_t pivots, const Entries& entries) {
    const int64_t done = applied[p];
    const int m = static_cast<int>(std::min<int64_t>(kPanel, pivots - done));
    const float* kernel[kPanel];
    const float* factor[kPanel];
    entries(done, m, kernel);
    for (int a = 0; a < m; ++a) factor[a] = column(done + a);
    applied[p] += m;
    return simd().extend(kernel, m, factor, inverse_diagonal + done, done, panel(p), residual + p * kPanel);
  }

  // Up to kPanel positions, `done` pivots on, whose residuals the caller keeps exact pivot by pivot.
  class Members {
   public:
    Members(Cholesky& factor, const int32_t* positions, int count, int64_t done, Scratch& scratch)
        : factor_(factor), done_(done), rows_(scratch.take<float>(kPanel * kPanel)) {
      float* columns = scratch.take<float>(kPanel * std::max<int64_t>(done, 1));
      earlier_panel_ = scratch.take<float>(kPanel * std::max<int64_t>(done, 1));
      for (int c = 0; c < count; ++c) {
        earlier_[c] = columns + c * done;
        factor.read_column(positions[c], done, columns + c * done);
      }
      simd().transpose(earlier_, count, done, earlier_panel_);
    }

    // Takes what the pivots before explain off the kernel rows of m members.
    void condition(const int* members, int m, float* entries) const {
      const float* pointers[kPanel];
      for (int a = 0; a < m; ++a) pointers[a] = earlier_[members[a]];
      simd().project(pointers, m, earlier_panel_, done_, entries);
    }

    // Makes a member the next pivot: its residual becomes -1, the others' fall. entries: its row, conditioned.
    void take(int member, const float* entries, float* residual) {
      const int64_t pivot = done_ + taken_;
      float* column = factor_.column(pivot);
      std::copy_n(earlier_[member], done_, column);
      for (int b = 0; b < taken_; ++b) column[done_ + b] = rows_[b * kPanel + member];
      float& inverse_diagonal = factor_.inverse_diagonal[pivot];
      inverse_diagonal = 1.0f / std::sqrt(residual[member]);
      residual[member] = -1.0f;
      const float* factor = column + done_;
      simd().extend(&entries, 1, &factor, &inverse_diagonal, taken_++, rows_, residual);
    }

   private:
    Cholesky& factor_;
    int64_t done_;
    int taken_ = 0;
    const float* earlier_[kPanel];  // the members' columns of the rows before
    float* earlier_panel_;          // the same as a panel, [done][kPanel]
    float* rows_;                   // [pivot taken here][kPanel]
  };
};

}  // namespace script::cpu
