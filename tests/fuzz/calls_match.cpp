// query_relevance, bipartite_match, gsp and mask_intersect.
#include <set>

#include "calls_all.hpp"
#include "core/gsp.hpp"
#include "core/mask_intersect.hpp"
#include "core/query_relevance.hpp"

namespace fuzz {
namespace {

// ---- query_relevance ------------------------------------------------------------------------------------------------

class QueryRelevance : public Call {
 public:
  explicit QueryRelevance(Bytes& in) : shape_(in, 0), query_(in, shape_), negate_(in.one_in(2)) {
    tokens_ = matrix(in, shape_.dtype, shape_.images, shape_.count, shape_.width);
    reduce_ = reduce_from(in);
    output(relevance_, shape_.images * shape_.count);
  }
  void run(const cpu::Threads& threads) override {
    cpu::query_relevance(tokens_.batch, query_.batch(), negate_, reduce_, relevance_.data(), threads);
  }
  void check() const override {
    for (int64_t b = 0; b < shape_.images; ++b) {
      const Units tokens(tokens_, b);
      const float* got = relevance_.data() + b * shape_.count;
      const std::vector<double> score = query_.scores(tokens, b, negate_, reduce_);
      double low = INFINITY, high = -INFINITY;
      int64_t first = -1;
      bool alike = true;  // row for row: of parallel rows the cosines are equal but for their rounding
      for (size_t i = 0; i < score.size(); ++i) {
        if (tokens.bad[i]) continue;
        const int64_t row = static_cast<int64_t>(i);
        first = first < 0 ? row : first;
        for (int64_t d = 0; d < shape_.width; ++d) alike = alike && tokens_.at(b, row, d) == tokens_.at(b, first, d);
        low = std::min(low, score[i]);
        high = std::max(high, score[i]);
      }
      const double spread = high - low;
      for (size_t i = 0; i < score.size(); ++i) {
        const int64_t place = static_cast<int64_t>(i);
        require(got[i] >= 0.0f && got[i] <= 1.0f, at("a relevance in [0, 1]", b, place));
        if (tokens.bad[i]) {
          require(got[i] == 0.0f, at("relevance 0 of a bad token", b, place));
        } else if (alike) {
          require(got[i] == 1.0f, at("relevance 1 where all are alike", b, place));
        } else if (spread > 1e-5) {
          const double exact = (score[i] - low) / spread;
          require(std::fabs(got[i] - exact) <= 2 * kCosine / spread + 1e-6, at("the relevance", b, place));
        }
      }
    }
  }

 private:
  Shape shape_;
  QueryInput query_;
  bool negate_;
  cpu::Reduce reduce_;
  Matrix tokens_;
  std::vector<float> relevance_;
};

// ---- bipartite_match and gsp ----------------------------------------------------------------------------------------

// What a source sees, as an interval where a cosine is too near the threshold to tell.
struct Seen {
  double best = -INFINITY, density = 0.0, near_sum = 0.0;
  int64_t degree = 0, degree_at_most = 0;
  bool clear() const { return degree == degree_at_most; }
  double mean() const { return degree > 0 ? near_sum / static_cast<double>(degree) : 0.0; }
};

Seen look(const Units& tokens, int64_t source, const std::vector<int64_t>& destinations, double threshold) {
  Seen seen;
  for (const int64_t j : destinations) {
    const double s = dot(tokens.rows[static_cast<size_t>(source)], tokens.rows[static_cast<size_t>(j)]);
    seen.best = std::max(seen.best, s);
    seen.density += s / static_cast<double>(destinations.size());
    seen.degree_at_most += s >= threshold - kCosine;
    if (s < threshold + kCosine) continue;
    ++seen.degree;
    seen.near_sum += s;
  }
  return seen;
}

class BipartiteMatch : public Call {
 public:
  explicit BipartiteMatch(Bytes& in) : shape_(in, 0), threshold_(in.number(0.2)) {
    tokens_ = matrix(in, shape_.dtype, shape_.images, shape_.count, shape_.width);
    const int64_t size = shape_.images * sources();
    output(best_, size);
    output(match_, size);
    output(degree_, size);
    output(mean_, size);
    output(density_, size);
  }
  void run(const cpu::Threads& threads) override {
    cpu::bipartite_match(tokens_.batch, threshold_,
                         {best_.data(), match_.data(), degree_.data(), mean_.data(), density_.data()}, threads);
  }
  void check() const override {
    for (int64_t b = 0; b < shape_.images; ++b) {
      const Units tokens(tokens_, b);
      std::vector<int64_t> destinations;
      for (int64_t j = 1; j < shape_.count; j += 2) destinations.push_back(j);
      for (int64_t s = 0; s < sources(); ++s) {
        const size_t i = static_cast<size_t>(b * sources() + s);
        if (destinations.empty()) {
          require(best_[i] == 0 && match_[i] == -1 && degree_[i] == 0 && mean_[i] == 0 && density_[i] == 0,
                  at("nothing seen of nothing", b, s));
          continue;
        }
        const Seen seen = look(tokens, 2 * s, destinations, threshold_);
        require(std::fabs(best_[i] - seen.best) <= kCosine, at("the best similarity", b, s));
        require(match_[i] % 2 == 1 && match_[i] < shape_.count, at("the match is a destination", b, s));
        const double of_match =
            dot(tokens.rows[static_cast<size_t>(2 * s)], tokens.rows[static_cast<size_t>(match_[i])]);
        require(std::fabs(of_match - seen.best) <= 2 * kCosine, at("the match is the best", b, s));
        require(seen.degree <= degree_[i] && degree_[i] <= seen.degree_at_most, at("the degree", b, s));
        require(std::fabs(density_[i] - seen.density) <= kCosine, at("the density", b, s));
        if (seen.clear()) require(std::fabs(mean_[i] - seen.mean()) <= kCosine, at("the mean", b, s));
      }
    }
  }

 private:
  int64_t sources() const { return shape_.count - shape_.count / 2; }
  Shape shape_;
  double threshold_;
  Matrix tokens_;
  std::vector<float> best_, mean_, density_;
  std::vector<int32_t> match_, degree_;
};

class Gsp : public Call {
 public:
  explicit Gsp(Bytes& in) : shape_(in, 1), graph_(in) {
    keep_ = graph_.reachable(shape_.count, 1 + in.byte() * shape_.count / 256);
    tokens_ = matrix(in, shape_.dtype, shape_.images, shape_.count, shape_.width);
    output(mask_, shape_.images * shape_.count);
    output(score_, shape_.images * shape_.count);
  }
  void run(const cpu::Threads& threads) override {
    cpu::gsp(tokens_.batch, keep_, graph_.options(), mask_.data(), score_.data(), threads);
  }
  void check() const override {
    for (int64_t b = 0; b < shape_.images; ++b) {
      const uint8_t* mask = mask_.data() + b * shape_.count;
      const float* score = score_.data() + b * shape_.count;
      int64_t kept = 0;
      for (int64_t i = 0; i < shape_.count; ++i) {
        require(mask[i] <= 1, at("a mask of 0 and 1", b, i));
        require(!std::isnan(score[i]), at("a score that is a number", b, i));
        kept += mask[i];
      }
      require(kept == keep_, at("exactly `keep` tokens kept", b, kept));
      if (graph_.rounds == 1) require_most_redundant(mask, score, b);
      follow(Units(tokens_, b), mask, score, b);
    }
  }

 private:
  // In one round, by the scores given: the largest go, of equals the higher index.
  void require_most_redundant(const uint8_t* mask, const float* score, int64_t b) const {
    for (int64_t i = 0; i < shape_.count; i += 2) {
      for (int64_t j = 0; j < shape_.count; j += 2) {
        const bool first = score[i] > score[j] || (score[i] == score[j] && i > j);
        require(!first || mask[i] <= mask[j], at("the largest scores go", b, i));
      }
    }
  }
  // The rounds in double, as far as no cosine and no score is too near a limit to tell.
  void follow(const Units& tokens, const uint8_t* mask, const float* score, int64_t b) const {
    std::vector<int64_t> left;
    for (int64_t i = 0; i < shape_.count; ++i) left.push_back(i);
    for (int64_t round = 0; round < graph_.rounds; ++round) {
      const int64_t tokens_left = static_cast<int64_t>(left.size()), rounds_left = graph_.rounds - round;
      const int64_t drop = (tokens_left - keep_ + rounds_left - 1) / rounds_left;
      const bool last = drop == 0 || tokens_left - drop == keep_;
      std::vector<int64_t> destinations;
      for (size_t p = 1; p < left.size(); p += 2) destinations.push_back(left[p]);
      std::vector<std::pair<double, int64_t>> order;
      double slack = 1e-4;
      for (size_t p = 0; p < left.size(); p += 2) {
        const Seen seen = look(tokens, left[p], destinations, static_cast<double>(graph_.options().threshold));
        if (!seen.clear()) return;
        const double gamma = graph_.options().gamma;
        double rho = 0.0;
        if (seen.degree > 0)
          rho = static_cast<double>(seen.degree) * std::exp(gamma * (seen.mean() - graph_.options().threshold));
        if (seen.degree < graph_.min_degree) rho = 0.5 * rho + 0.5 * seen.density;
        if (!(std::fabs(rho) < 1e6) || std::fabs(gamma) > 20.0) return;
        slack = std::max(slack, 1e-4 * std::fabs(rho));
        order.emplace_back(-rho, -left[p]);
        if (last && (drop == 0 || !mask[left[p]])) {
          require(std::fabs(score[left[p]] - rho) <= 1e-4 * (1.0 + std::fabs(rho)), at("the score", b, left[p]));
        }
      }
      if (drop == 0) return;
      std::sort(order.begin(), order.end());
      // Clear only where the last to go leads the first to stay.
      const size_t cut = static_cast<size_t>(drop);
      if (cut < order.size() && order[cut].first - order[cut - 1].first <= slack) return;
      std::set<int64_t> gone;
      for (size_t i = 0; i < cut; ++i) {
        const int64_t token = -order[i].second;
        require(mask[token] == 0, at("the most redundant go", b, token));
        gone.insert(token);
      }
      std::vector<int64_t> next;
      for (const int64_t i : left) {
        if (gone.count(i) == 0) next.push_back(i);
      }
      left = next;
    }
    for (const int64_t i : left) require(mask[i] == 1, at("the others stay", b, i));
  }

  Shape shape_;
  Graph graph_;
  int64_t keep_;
  Matrix tokens_;
  std::vector<uint8_t> mask_;
  std::vector<float> score_;
};

// ---- mask_intersect -------------------------------------------------------------------------------------------------

class MaskIntersect : public Call {
 public:
  explicit MaskIntersect(Bytes& in) : images_(in.below(4)), n_(1 + in.byte()) {
    length_ = 1 + in.byte() * n_ / 256;
    k_ = 1 + in.byte() * length_ / 256;
    const bool malformed = in.one_in(4);
    const int64_t step = 1 + 2 * in.byte();
    ranking_ = values<int64_t>(in, images_, length_, [&](int64_t, int64_t p) -> int64_t {
      if (malformed && in.one_in(16)) return in.one_in(2) ? in.bits<int64_t>() : in.byte() - int64_t{8};
      // An order of all indices where the step shares no factor with n; else some come twice.
      return (p * step + 3) % n_;
    });
    mask_ = values<cpu::Truth>(in, images_, n_, [&](int64_t, int64_t) { return in.byte(); });
    output(kept_, images_ * k_);
  }
  void run(const cpu::Threads& threads) override {
    cpu::mask_intersect(ranking_.batch, length_, mask_.batch, n_, images_, k_, kept_.data(), threads);
  }
  bool refused() const override {
    for (int64_t b = 0; b < images_; ++b) {
      std::set<int64_t> seen;
      for (int64_t p = 0; p < length_; ++p) {
        const int64_t i = ranking_.at(b, p);
        if (i < 0 || i >= n_ || !seen.insert(i).second) return true;
      }
    }
    return false;
  }
  void check() const override {
    for (int64_t b = 0; b < images_; ++b) {
      std::vector<int64_t> expected;
      for (int pass = 1; pass >= 0; --pass) {
        for (int64_t p = 0; p < length_; ++p) {
          const int64_t i = ranking_.at(b, p);
          if ((mask_.at(b, i) != 0) == (pass == 1)) expected.push_back(i);
        }
      }
      expected.resize(static_cast<size_t>(k_));
      std::sort(expected.begin(), expected.end());
      require(std::equal(expected.begin(), expected.end(), kept_.begin() + b * k_), at("the intersection", b, 0));
    }
  }

 private:
  int64_t images_, n_, length_ = 0, k_ = 0;
  Values<int64_t> ranking_;
  Values<cpu::Truth> mask_;
  std::vector<int64_t> kept_;
};

}  // namespace

std::unique_ptr<Call> make_match_call(size_t op, Bytes& in) {
  if (op == 0) return std::make_unique<QueryRelevance>(in);
  if (op == 1) return std::make_unique<BipartiteMatch>(in);
  if (op == 2) return std::make_unique<Gsp>(in);
  return std::make_unique<MaskIntersect>(in);
}

}  // namespace fuzz
