// A pivoted Cholesky factor by panels of columns, each as far along as somebody needed it: the one update that greedy
// MAP makes, whether the kernel's entries are there or have to be computed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd/simd.hpp"
#include "workspace.hpp"

namespace script::cpu {

struct Cholesky {
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
};

}  // namespace script::cpu
