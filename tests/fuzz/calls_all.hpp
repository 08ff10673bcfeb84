// What the calls of several ops have in common.
#pragma once

#include "calls.hpp"
#include "core/gsp.hpp"
#include "core/query_relevance.hpp"
#include "oracle.hpp"

namespace fuzz {

struct Shape {
  cpu::DType dtype;
  int64_t images, count, width;

  // From `least` tokens on; mostly few, some of several panels.
  Shape(Bytes& in, int64_t least) {
    dtype = static_cast<cpu::DType>(in.below(3));
    const int64_t image = in.byte(), token = in.byte(), column = in.byte();
    images = image < 160 ? 1 : image % 4;
    count = least + (token < 190 ? token % 40 : (token - 190) * 4);
    width = 1 + (column < 220 ? column % 20 : (column - 220) * 8);
    width = std::max<int64_t>(1, std::min(width, 6000 / (count + 1)));
  }
};

// A query with or without a mask, shared by all images or not.
struct QueryInput {
  Matrix vectors;
  Values<cpu::Truth> mask;
  bool masked = false;

  QueryInput(Bytes& in, const Shape& shape) : QueryInput(in, shape.dtype, shape.images, shape.width) {}
  QueryInput(Bytes& in, cpu::DType dtype, int64_t images, int64_t width) {
    const int64_t count = 1 + in.below(5);
    masked = in.one_in(2);
    vectors = matrix(in, dtype, images, count, width);
    mask = values<cpu::Truth>(in, images, count, [&](int64_t, int64_t) { return in.byte(); });
  }
  cpu::QueryBatch batch() const { return {vectors.batch, masked ? mask.batch : cpu::ValueBatch<cpu::Truth>{}}; }

  // The mean or the largest cosine of each token with the query vectors that count; 0 where none does.
  std::vector<double> scores(const Units& tokens, int64_t b, bool negate, cpu::Reduce reduce) const {
    const Units query(vectors, b);
    std::vector<double> sum(tokens.rows.size()), top(tokens.rows.size(), -2.0);
    double used = 0.0;
    for (int64_t q = 0; q < query.count(); ++q) {
      if (masked && mask.at(b, q) == 0) continue;
      ++used;
      for (size_t i = 0; i < sum.size(); ++i) {
        const double cosine = dot(tokens.rows[i], query.rows[static_cast<size_t>(q)]);
        sum[i] += cosine;
        top[i] = std::max(top[i], cosine);
      }
    }
    std::vector<double>& out = reduce == cpu::Reduce::kMax && used > 0.0 ? top : sum;
    const double share = reduce == cpu::Reduce::kMax ? 1.0 : std::max(used, 1.0);
    for (double& score : out) score *= (negate ? -1.0 : 1.0) / share;
    return out;
  }
};

inline cpu::Reduce reduce_from(Bytes& in) { return in.one_in(2) ? cpu::Reduce::kMax : cpu::Reduce::kMean; }

// A power of a relevance, mostly 1.
inline double power_from(Bytes& in) {
  constexpr double kPowers[] = {1.0, 1.0, 1.0, 0.0, 0.5, 2.0, 7.3, 64.0};
  return kPowers[in.below(8)];
}

// The parameters of GSP.
struct Graph {
  double threshold, gamma;
  int64_t min_degree, rounds;

  explicit Graph(Bytes& in) : threshold(in.number(0.2)), gamma(in.number(1.0)) {
    constexpr int64_t kDegrees[] = {4, 0, 1, 17, std::numeric_limits<int64_t>::max()};
    min_degree = kDegrees[in.below(5)];
    const int64_t choice = in.byte();
    rounds = choice < 128 ? 1 : choice < 250 ? 1 + choice % 6 : cpu::kMostRounds;
  }
  cpu::GspOptions options() const { return cpu::gsp_options(threshold, gamma, min_degree, rounds); }
  // The count nearest to `keep` that the rounds reach, as the checks before every op demand it.
  int64_t reachable(int64_t n, int64_t keep) const {
    while (keep < n && !cpu::rounds_suffice(n, keep, rounds)) ++keep;
    return keep;
  }
};

std::unique_ptr<Call> make_match_call(size_t op, Bytes& in);
std::unique_ptr<Call> make_greedy_call(size_t op, Bytes& in);

}  // namespace fuzz
