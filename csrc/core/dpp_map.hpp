// dpp_map: greedy MAP on a ready kernel matrix.
#pragma once

#include "cholesky.hpp"
#include "greedy.hpp"
#include "order.hpp"

namespace script::cpu {

// One image's kernel, strides in elements. Entries that are not finite count as 0.
struct KernelView {
  const float* data = nullptr;
  int64_t count = 0;
  int64_t row_stride = 0, column_stride = 1;

  float diagonal(int64_t i) const { return data[i * (row_stride + column_stride)]; }

  // Row i at the tokens of a panel, zero at holes: in place where they stand side by side, else in `buffer`.
  const float* row(int64_t i, const int32_t* tokens, bool in_order, float* buffer) const {
    const float* x = data + i * row_stride;
    if (in_order && column_stride == 1 && tokens[kPanel - 1] != kHole) return x + tokens[0];
    if (tokens[kPanel - 1] == kHole) {
      for (int c = 0; c < kPanel; ++c) buffer[c] = tokens[c] == kHole ? 0.0f : x[tokens[c] * column_stride];
    } else {
#pragma GCC unroll 8
      for (int c = 0; c < kPanel; ++c) buffer[c] = x[tokens[c] * column_stride];
    }
    return buffer;
  }

  // Fetches row i: what follows takes it in another order than the hardware expects.
  void fetch_row(int64_t i) const {
    const float* x = data + i * row_stride;
    for (int64_t j = 0; column_stride == 1 && j < count; j += kLineFloats) __builtin_prefetch(x + j);
  }
  static constexpr int64_t kLineFloats = 16;
};

namespace detail {

// Below kOrderedFrom Cholesky entries a gathered kernel row costs what the order saves.
inline constexpr int64_t kOrderedFrom = int64_t{1} << 16;
// From here on rows of the kernel are not near any more when one panel after the other asks for a piece of them.
inline constexpr int64_t kGatheredFrom = int64_t{1} << 21;

// Several panels claim the same largest residual: one that is not up to date goes first, else the one with the lowest
// token of that residual.
inline int64_t first_of_equals(const float* bound, const int64_t* applied, int64_t picked, const float* residual,
                               const int32_t* ids, int64_t panels, float top) {
  int64_t first = -1;
  int32_t lowest = std::numeric_limits<int32_t>::max();
  for (int64_t p = 0; p < panels; ++p) {
    if (bound[p] != top) continue;
    if (applied[p] < picked) return p;
    for (int64_t c = p * kPanel; c < (p + 1) * kPanel; ++c) {
      if (residual[c] == top && ids[c] < lowest) {
        lowest = ids[c];
        first = p;
      }
    }
  }
  return first;
}

}  // namespace detail

// One image, panel by panel: a panel's best residual is an upper bound for as long as later pivots have not been
// applied to it. The panel of largest bound is brought up to date, with all pivots it lacks at once, until it is one
// that lacks none: its best token is then the best of all. Where there is much to do, tokens stand by falling K_ii, so
// that panels without a candidate wait. Rows of a ready kernel cost nothing, so no more is asked of a panel than that;
// greedy_map is for rows that cost a matrix product. Past the rank picks go by K_ii, which stands in for the relevance
// that a bare kernel does not tell.
inline void dpp_map(const KernelView& kernel, int64_t k, const Picks& picks) {
  Scratch scratch;
  const int64_t n = kernel.count, positions = pad_to_panel(n), panels = positions / kPanel;
  float* of_token = scratch.take<float>(n);
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    of_token[i] = kernel.diagonal(i);
    if (std::isfinite(of_token[i])) largest = std::max(largest, of_token[i]);
  }
  int32_t* ids = scratch.take<int32_t>(positions, kHole);
  bool in_order = true;
  if (n * k >= detail::kOrderedFrom) {
    in_order = order_tokens({of_token, largest}, 0, 1, n, ids);
  } else {
    for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(i);
  }
  float* diagonal = scratch.take<float>(positions, 0.0f);
  Cholesky factor(positions, k, scratch);
  float* residual = factor.residual;
  uint8_t* tier = scratch.take<uint8_t>(positions, kHoleTier);
  for (int64_t p = 0; p < n; ++p) {
    const float x = of_token[ids[p]];
    tier[p] = std::isfinite(x) ? 0 : kNoTier;
    diagonal[p] = std::isfinite(x) ? x : 0.0f;
    if (tier[p] == 0) residual[p] = std::max(x, 0.0f);
  }
  const GreedyProblem problem{positions, diagonal, ids, diagonal, tier};

  const SimdOps& ops = simd();
  const int64_t slots = ceil_div(panels, kGroup) * kGroup;
  float* bound = scratch.take<float>(slots, -1.0f);
  for (int64_t p = 0; p < panels; ++p) bound[p] = residual[p * kPanel + ops.argmax(residual + p * kPanel, kPanel)];
  float* buffer = scratch.take<float>(kPanel * kPanel);
  // The panels that have been asked for, and for each the first pivot after that: of it and those that follow, entries
  // are gathered for all these panels at once, while the row is near, to where the panel's Cholesky row will stand.
  const bool gathers = !in_order && n * k >= detail::kGatheredFrom;
  int32_t* asked = scratch.take<int32_t>(panels);
  int64_t* gathered_from = scratch.take<int64_t>(panels, k);
  int64_t asked_count = 0;
  const float exhausted_at = Cholesky::exhausted_at(largest);
  int64_t picked = 0;
  bool exhausted = false;
  for (int64_t p = ops.argmax(bound, slots); picked < k && !exhausted;) {
    // Stays with the leading panel until another one comes before it.
    float top = bound[p];
    bound[p] = -2.0f;
    int64_t next = ops.argmax(bound, slots);
    const float rival = bound[next];
    while (picked < k) {
      if (top < rival) break;
      if (factor.applied[p] < picked) {
        if (gathers && gathered_from[p] == k) {
          gathered_from[p] = picked;
          asked[asked_count++] = static_cast<int32_t>(p);
        }
        top = factor.extend(p, picked, [&](int64_t first, int m, const float** out) {
          for (int a = 0; a < m; ++a) {
            const int64_t pivot = first + a;
            out[a] = pivot >= gathered_from[p]
                         ? factor.panel(p) + pivot * kPanel
                         : kernel.row(picks.indices[pivot], ids + p * kPanel, in_order, buffer + a * kPanel);
          }
        });
        continue;
      }
      exhausted = top <= exhausted_at;  // a taken or bad token stands at -1
      if (exhausted) break;
      if (top == rival) {
        bound[p] = top;
        const int64_t first = detail::first_of_equals(bound, factor.applied, picked, residual, ids, panels, top);
        if (first != p) {
          next = first;
          break;
        }
        bound[p] = -2.0f;
      }
      const Taken taken = ops.take(residual + p * kPanel, ids + p * kPanel);
      const int64_t best = p * kPanel + taken.column;
      factor.read_column(best, picked, factor.column(picked));
      factor.inverse_diagonal[picked] = 1.0f / std::sqrt(top);
      picks.indices[picked] = ids[best];
      if (asked_count > 0) kernel.fetch_row(ids[best]);
      for (int64_t a = 0; a < asked_count; ++a) {
        kernel.row(ids[best], ids + asked[a] * kPanel, in_order, factor.panel(asked[a]) + picked * kPanel);
      }
      picks.gains[picked++] = top;
      top = taken.left;
    }
    bound[p] = top;
    p = next;
  }
  if (picked == k) return;
  picked = detail::take_by_priority(problem, 0, k, picked, residual, picks);
  detail::take_by_priority(problem, kNoTier, k, picked, residual, picks);
}

// A batch of kernels, `image_stride` elements apart: k picks per image.
inline void dpp_map(const KernelView& first, int64_t image_stride, int64_t batch, int64_t k, const Picks& picks,
                    const Threads& threads) {
  for_each_image(batch, threads, [&](int64_t b, const Parallel&) {
    KernelView kernel = first;
    kernel.data += b * image_stride;
    dpp_map(kernel, k, picks.at(b * k));
  });
}

}  // namespace script::cpu
