// Stands in for simd(): dispatch.cpp is compiled with that name changed to detected_simd.
#include "levels.hpp"

#include <atomic>
#include <cstring>

#include "simd/simd.hpp"

namespace script::cpu {

const SimdOps& detected_simd();

namespace {

const SimdOps* const kAll[] = {
    &kOps_baseline,
#if defined(__x86_64__)
    &kOps_avx2,
    &kOps_avx512,
    &kOps_avx512_bf16,
#elif defined(__aarch64__)
    &kOps_neon_bf16,
#endif
};
SimdOps current = kOps_baseline;

// ---- counting -----------------------------------------------------------------------------------------------------

SimdOps counted;
std::atomic<int64_t> multiply_adds, columns;

void add(int64_t work) { multiply_adds.fetch_add(work, std::memory_order_relaxed); }
void pass(int64_t work) { columns.fetch_add(work, std::memory_order_relaxed); }

SimdOps with_counts(const SimdOps& ops) {
  counted = ops;
  SimdOps out = ops;
  out.row_stats = [](const float* x, const float* y, int64_t n) {
    add(y == nullptr ? n : 2 * n);
    return counted.row_stats(x, y, n);
  };
  out.pack = [](const float* const* rows, int count, int64_t depth, float* panel) {
    pass(depth * kPanel);
    counted.pack(rows, count, depth, panel);
  };
  out.pack_squares = [](const float* const* rows, int count, int64_t depth, float* panel, float* square) {
    pass(depth * kPanel);
    add(count * depth);
    counted.pack_squares(rows, count, depth, panel, square);
  };
  out.gemm = [](const float* const* a, int rows, const float* panel, int groups, int64_t depth, float* c) {
    add(int64_t{rows} * groups * kGroup * depth);
    counted.gemm(a, rows, panel, groups, depth, c);
  };
  if (ops.gemm_bf16 != nullptr) {
    out.pack_squares_bf16 = [](const float* const* rows, int count, int64_t depth, float* panel, float* square) {
      pass(depth * kPanel);
      add(2 * count * depth);
      counted.pack_squares_bf16(rows, count, depth, panel, square);
    };
    out.gemm_bf16 = [](const uint16_t* const* a, int rows, const uint16_t* panel, int groups, int64_t depth, float* c) {
      add(int64_t{rows} * groups * kGroup * depth);
      counted.gemm_bf16(a, rows, panel, groups, depth, c);
    };
  }
  out.dot = [](const float* x, const float* y, int64_t n) {
    add(n);
    return counted.dot(x, y, n);
  };
  out.weigh_products = [](const float* raw, const PivotWeights& pivot, const ColumnWeights& weights, int count,
                          float* entries) {
    pass(kPanel);
    counted.weigh_products(raw, pivot, weights, count, entries);
  };
  out.match = [](const float* raw, float source_weight, const float* weight, int count, int32_t first, float threshold,
                 MatchLanes* lanes) {
    pass(count);
    counted.match(raw, source_weight, weight, count, first, threshold, lanes);
  };
  out.project = [](const float* const* a, int count, const float* rows, int64_t depth, float* g) {
    add(count * depth * kPanel);
    counted.project(a, count, rows, depth, g);
  };
  out.extend = [](const float* const* entries, int m, const float* const* factor, const float* inverse_diagonal,
                  int64_t done, float* rows, float* residual) {
    add(m * (done + m) * kPanel);
    return counted.extend(entries, m, factor, inverse_diagonal, done, rows, residual);
  };
  out.closest = [](const float* const* x, int64_t n, int64_t own, float beyond) {
    pass(kCoordinates * n);
    return counted.closest(x, n, own, beyond);
  };
  out.argmax = [](const float* x, int64_t n) {
    pass(n);
    return counted.argmax(x, n);
  };
  out.take = [](float* residual, const int32_t* ids) {
    pass(kPanel);
    return counted.take(residual, ids);
  };
  return out;
}

}  // namespace

const SimdOps& simd() { return current; }

namespace levels {

int count() {
  int level = 0;
  while (std::strcmp(kAll[level]->name, detected_simd().name) != 0) ++level;
  return level + 1;
}

const char* name(int level) { return kAll[level]->name; }

void use(int level, int64_t thread_work) {
  current = *kAll[level];
  current.thread_work = thread_work;
}

void count_work(int level) {
  current = with_counts(*kAll[level]);
  reset();
}

void reset() { multiply_adds = columns = 0; }

Work work() { return {multiply_adds, columns}; }

}  // namespace levels
}  // namespace script::cpu
