#include "oracle.hpp"

namespace fuzz {

Units::Units(const Matrix& m, int64_t b, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    std::vector<double> row(static_cast<size_t>(m.batch.first.width));
    bool finite = true;
    for (size_t d = 0; d < row.size(); ++d) {
      row[d] = m.at(b, i, static_cast<int64_t>(d));
      finite = finite && std::isfinite(row[d]);
    }
    const double norm = finite ? std::sqrt(dot(row, row)) : 0.0;
    for (double& x : row) x = norm > 0.0 ? x / norm : 0.0;
    rows.push_back(row);
    norms.push_back(norm);
    bad.push_back(!finite);
  }
}

Kernel kernel_of(const Units& units, const std::vector<double>& r) {
  const size_t n = units.rows.size();
  Kernel kernel(n, std::vector<double>(n));
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j <= i; ++j) kernel[i][j] = kernel[j][i] = r[i] * r[j] * dot(units.rows[i], units.rows[j]);
  }
  return kernel;
}

void require_distinct(const int64_t* picks, int64_t k, int64_t n, int64_t image) {
  std::vector<bool> seen(static_cast<size_t>(n));
  for (int64_t t = 0; t < k; ++t) {
    require(0 <= picks[t] && picks[t] < n, at("an index in range", image, t));
    require(!seen[static_cast<size_t>(picks[t])], at("distinct indices", image, t));
    seen[static_cast<size_t>(picks[t])] = true;
  }
}

namespace {

// The part of a token's residual that hangs on digits of K which float32 does not hold. The residual is v' K v, where v
// is 1 at the token and less its weights in the picks at these; errors of 2^-22 sqrt(K_ii K_jj), four roundings, in
// every K_ij move it by 2^-22 (sum |v_i| sqrt(K_ii))^2. Where picks are nearly dependent the weights grow.
double rounding(const Kernel& kernel, const std::vector<size_t>& picks, const Rows& factor, size_t token) {
  std::vector<double> weights(factor.size());
  double sum = std::sqrt(std::max(kernel[token][token], 0.0));
  for (size_t s = factor.size(); s-- > 0;) {
    double rest = factor[s][token];
    for (size_t t = s + 1; t < factor.size(); ++t) rest -= factor[s][picks[t]] * weights[t];
    weights[s] = rest / factor[s][picks[s]];
    sum += std::fabs(weights[s]) * std::sqrt(kernel[picks[s]][picks[s]]);
  }
  return std::ldexp(sum * sum, -22);
}

}  // namespace

void certify(const Kernel& kernel, const std::vector<int>& tier, const int64_t* picks, const float* gains, int64_t k,
             int64_t image, int exponent) {
  const size_t n = kernel.size();
  std::vector<double> residual(n);
  std::vector<bool> taken(n);
  Rows factor;
  std::vector<size_t> pivots;
  double scale = 0.0;
  for (size_t i = 0; i < n; ++i) {
    residual[i] = std::max(kernel[i][i], 0.0);
    scale = std::max(scale, residual[i]);
  }
  for (int64_t t = 0; t < k; ++t) {
    const size_t pick = static_cast<size_t>(picks[t]);
    int first = 3;
    for (size_t i = 0; i < n; ++i) first = taken[i] ? first : std::min(first, tier[i]);
    require(tier[pick] == first, at("a pick of the tier whose turn it is", image, t));
    const double enough = residual[pick] + kTolerance * scale;
    for (size_t i = 0; i < n; ++i) {
      if (taken[i] || tier[i] != first || residual[i] <= enough) continue;
      const double either = rounding(kernel, pivots, factor, pick) + rounding(kernel, pivots, factor, i);
      require(residual[i] <= residual[pick] + either, at("the certificate", image, t));
    }
    if (gains != nullptr) {
      const long double largest = std::numeric_limits<float>::max();
      const long double exact = std::min(std::ldexp(static_cast<long double>(residual[pick]), exponent), largest);
      const long double error = std::fabs(gains[t] - exact);
      const auto within = [&](double bound) {
        return error <= std::ldexp(static_cast<long double>(bound), exponent) + 1e-44L;
      };
      require(within(kTolerance * scale) || within(rounding(kernel, pivots, factor, pick)),
              at("the gain of a pick", image, t));
    }
    taken[pick] = true;
    if (residual[pick] <= 1e-7 * scale) continue;
    std::vector<double> row(n);
    const double root = std::sqrt(residual[pick]);
    for (size_t j = 0; j < n; ++j) {
      double sum = kernel[pick][j];
      for (const std::vector<double>& f : factor) sum -= f[pick] * f[j];
      row[j] = sum / root;
    }
    for (size_t j = 0; j < n; ++j) residual[j] = std::max(residual[j] - row[j] * row[j], 0.0);
    factor.push_back(row);
    pivots.push_back(pick);
  }
}

void require_fallback(const std::vector<double>& priority, const std::vector<bool>& bad, const int64_t* picks,
                      const float* gains, int64_t k, int64_t image) {
  int64_t rank = 0;
  while (rank < k && gains[rank] != 0.0f) ++rank;
  for (int64_t t = rank; t < k; ++t) require(gains[t] == 0.0f, at("no gain past the rank", image, t));
  for (int64_t t = rank + 1; t < k; ++t) {
    const size_t before = static_cast<size_t>(picks[t - 1]), after = static_cast<size_t>(picks[t]);
    const bool good = bad[before] != bad[after]                            ? bad[after]
                      : bad[before] || priority[before] == priority[after] ? before < after
                                                                           : priority[before] > priority[after];
    require(good, at("the order past the rank", image, t));
  }
}

}  // namespace fuzz
