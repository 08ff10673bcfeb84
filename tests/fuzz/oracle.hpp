// The ops' promises in double, written from their definitions and not from the cores.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bytes.hpp"

namespace fuzz {

// A promise, and where it is looked at: put into words only where it is broken.
struct Promise {
  const char* what;
  int64_t image = -1, place = -1;
  Promise(const char* what_) : what(what_) {}  // NOLINT: a promise of the whole call
  Promise(const char* what_, int64_t image_, int64_t place_) : what(what_), image(image_), place(place_) {}
};

inline Promise at(const char* promise, int64_t image, int64_t place) { return {promise, image, place}; }

// Ends the program: what the fuzzer takes for a crash.
inline void require(bool condition, const Promise& promise) {
  if (condition) return;
  std::fprintf(stderr, "broken: %s", promise.what);
  if (promise.image >= 0) {
    std::fprintf(stderr, " (image %lld, place %lld)", static_cast<long long>(promise.image),
                 static_cast<long long>(promise.place));
  }
  std::fprintf(stderr, "\n");
  std::abort();
}

constexpr double kTolerance = 1e-5;  // of the certificate, as a share of the largest K_ii
constexpr double kCosine = 4e-6;     // of a cosine

using Rows = std::vector<std::vector<double>>;

inline double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0.0;
  for (size_t d = 0; d < x.size(); ++d) sum += x[d] * y[d];
  return sum;
}

// The rows of an image with norm 1; zero and bad rows are zero.
struct Units {
  Rows rows;
  std::vector<double> norms;
  std::vector<bool> bad;

  Units(const Matrix& m, int64_t b, int64_t begin, int64_t end);
  Units(const Matrix& m, int64_t b) : Units(m, b, 0, m.batch.first.count) {}
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  bool zero(int64_t i) const { return dot(rows[static_cast<size_t>(i)], rows[static_cast<size_t>(i)]) == 0.0; }
};

using Kernel = std::vector<std::vector<double>>;

// r_i r_j cos(x_i, x_j); `r` is 0 where a token is bad.
Kernel kernel_of(const Units& units, const std::vector<double>& r);

void require_distinct(const int64_t* picks, int64_t k, int64_t n, int64_t image);

// Every pick is the best of its tier, step by step, and its gain (may be null) is the residual variance that it had.
// The kernel is in units of 2^exponent, the gains are not.
void certify(const Kernel& kernel, const std::vector<int>& tier, const int64_t* picks, const float* gains, int64_t k,
             int64_t image, int exponent = 0);

// Past the rank (from the first gain of 0 on) tokens go by `priority`, of equals the lowest first; bad ones last.
void require_fallback(const std::vector<double>& priority, const std::vector<bool>& bad, const int64_t* picks,
                      const float* gains, int64_t k, int64_t image);

}  // namespace fuzz
