// dpp_map, qcsp, prune, prune_varlen, max_min and mmr.
#include <set>

#include "calls_all.hpp"
#include "core/dpp_map.hpp"
#include "core/max_min.hpp"
#include "core/mmr.hpp"
#include "core/prune.hpp"
#include "core/prune_varlen.hpp"

namespace fuzz {
namespace {

// Above this the certificate in double would take most of the time.
bool small(int64_t n, int64_t k, int64_t width) { return n * (k * k + n * width) <= 1'500'000; }

// ---- dpp_map --------------------------------------------------------------------------------------------------------

class DppMap : public Call {
 public:
  explicit DppMap(Bytes& in) : images_(1 + in.byte() / 160), n_(1 + (in.one_in(8) ? in.byte() : in.below(48))) {
    k_ = 1 + in.byte() * n_ / 256;
    positive_ = in.one_in(2);
    if (positive_) {
      // A Gram matrix of few or many dimensions, in memory of its own.
      const int64_t width = 1 + in.below(24);
      kernel_.memory.resize(static_cast<size_t>(images_ * n_ * n_) * sizeof(float));
      float* out = reinterpret_cast<float*>(kernel_.memory.data());
      const Matrix rows = matrix(in, cpu::DType::kFloat32, images_, n_, width);
      const double scale = std::ldexp(1.0, static_cast<int>(in.byte()) / 4 - 32);
      for (int64_t b = 0; b < images_; ++b) {
        const Units units(rows, b);
        for (int64_t i = 0; i < n_; ++i) {
          for (int64_t j = 0; j < n_; ++j) {
            const double entry = dot(units.rows[static_cast<size_t>(i)], units.rows[static_cast<size_t>(j)]);
            out[(b * n_ + i) * n_ + j] = static_cast<float>(scale * entry);
          }
        }
      }
      kernel_.batch = {{out, cpu::DType::kFloat32, n_, n_, n_, 1}, images_, n_ * n_};
      if (in.one_in(2)) std::swap(kernel_.batch.first.row_stride, kernel_.batch.first.column_stride);
    } else {
      kernel_ = matrix(in, cpu::DType::kFloat32, images_, n_, n_);
    }
    output(indices_, images_ * k_);
    output(gains_, images_ * k_);
  }
  void run(const cpu::Threads& threads) override {
    const cpu::TokenView& v = kernel_.batch.first;
    const cpu::KernelView first{static_cast<const float*>(v.data), n_, v.row_stride, v.column_stride};
    cpu::dpp_map(first, kernel_.batch.image_stride, images_, k_, {indices_.data(), gains_.data()}, threads);
  }
  void check() const override {
    for (int64_t b = 0; b < images_; ++b) {
      const int64_t* picks = indices_.data() + b * k_;
      const float* gains = gains_.data() + b * k_;
      require_distinct(picks, k_, n_, b);
      std::vector<double> diagonal;
      std::vector<bool> bad;
      for (int64_t i = 0; i < n_; ++i) {
        diagonal.push_back(kernel_.at(b, i, i));
        bad.push_back(!std::isfinite(diagonal.back()));
      }
      for (int64_t t = 0; t < k_; ++t) require(gains[t] >= 0.0f && std::isfinite(gains[t]), at("a gain", b, t));
      require_fallback(diagonal, bad, picks, gains, k_, b);
      if (!positive_ || !small(n_, k_, 1)) continue;
      Kernel kernel(static_cast<size_t>(n_));
      for (int64_t i = 0; i < n_; ++i) {
        for (int64_t j = 0; j < n_; ++j) kernel[static_cast<size_t>(i)].push_back(kernel_.at(b, i, j));
      }
      certify(kernel, std::vector<int>(static_cast<size_t>(n_)), picks, gains, k_, b);
    }
  }

 private:
  int64_t images_, n_, k_ = 0;
  bool positive_ = false;
  Matrix kernel_;
  std::vector<int64_t> indices_;
  std::vector<float> gains_;
};

// ---- qcsp -----------------------------------------------------------------------------------------------------------

class Qcsp : public Call {
 public:
  explicit Qcsp(Bytes& in) : shape_(in, 1) {
    k_ = 1 + in.byte() * shape_.count / 256;
    tokens_ = matrix(in, shape_.dtype, shape_.images, shape_.count, shape_.width);
    const std::vector<char> bits = elements(in, cpu::DType::kFloat32, shape_.images * shape_.count, shape_.count);
    relevance_ = values<float>(in, shape_.images, shape_.count, [&](int64_t b, int64_t i) {
      return static_cast<float>(element(bits.data(), cpu::DType::kFloat32, b * shape_.count + i));
    });
    constexpr double kRidges[] = {0.0, 0.0, 0.0, 1.0, 1e-4, 1e-30, 1e30, 1e300};
    options_ = {power_from(in), !in.one_in(4), kRidges[in.below(8)]};
    output(indices_, shape_.images * k_);
    output(gains_, shape_.images * k_);
  }
  void run(const cpu::Threads& threads) override {
    cpu::qcsp(tokens_.batch, relevance_.batch, k_, {indices_.data(), gains_.data()}, threads, options_);
  }
  void check() const override {
    for (int64_t b = 0; b < shape_.images; ++b) {
      const int64_t* picks = indices_.data() + b * k_;
      const float* gains = gains_.data() + b * k_;
      require_distinct(picks, k_, shape_.count, b);
      const Units units(tokens_, b);
      std::vector<double> r;
      std::vector<bool> bad;
      std::vector<int> tier;
      for (int64_t i = 0; i < shape_.count; ++i) {
        const double value = relevance_.at(b, i);
        bad.push_back(units.bad[static_cast<size_t>(i)] || !std::isfinite(value));
        r.push_back(bad.back() ? 0.0 : value);
        tier.push_back(bad.back() ? 2 : 0);
      }
      // Weights by logarithms, in units of the largest: a power of a large one is more than a double holds.
      std::vector<double> weight(r.size(), -INFINITY);
      double largest = std::log2(options_.ridge) / 2.0;
      for (size_t i = 0; i < r.size(); ++i) {
        if (bad[i] || units.norms[i] == 0.0) continue;
        weight[i] = options_.power == 0.0 ? 0.0 : options_.power * std::log2(std::fabs(r[i]));
        if (!options_.normalize) weight[i] += std::log2(units.norms[i]);
        largest = std::max(largest, weight[i]);
      }
      const int exponent = std::isfinite(largest) ? static_cast<int>(largest) : 0;
      for (size_t i = 0; i < r.size(); ++i) {
        weight[i] = std::exp2(weight[i] - exponent) * (options_.plain() && r[i] < 0.0 ? -1.0 : 1.0);
      }
      // Where entries are denormal or less, a gain may be 0 before the rank is reached.
      if (!std::isfinite(largest) || exponent > -50) require_fallback(r, bad, picks, gains, k_, b);
      if (!small(shape_.count, k_, shape_.width)) continue;
      Kernel kernel = kernel_of(units, weight);
      for (size_t i = 0; i < r.size(); ++i) kernel[i][i] += bad[i] ? 0.0 : std::ldexp(options_.ridge, -2 * exponent);
      certify(kernel, tier, picks, gains, k_, b, 2 * exponent);
    }
  }

 private:
  Shape shape_;
  int64_t k_;
  cpu::QcspOptions options_;
  Matrix tokens_;
  Values<float> relevance_;
  std::vector<int64_t> indices_;
  std::vector<float> gains_;
};

// ---- max_min and mmr ------------------------------------------------------------------------------------------------

// Both take what qcsp takes.
class NearestPick : public Call {
 public:
  NearestPick(Bytes& in, bool marginal) : marginal_(marginal), shape_(in, 1) {
    k_ = 1 + in.byte() * shape_.count / 256;
    tokens_ = matrix(in, shape_.dtype, shape_.images, shape_.count, shape_.width);
    const std::vector<char> bits = elements(in, cpu::DType::kFloat32, shape_.images * shape_.count, shape_.count);
    relevance_ = values<float>(in, shape_.images, shape_.count, [&](int64_t b, int64_t i) {
      return static_cast<float>(element(bits.data(), cpu::DType::kFloat32, b * shape_.count + i));
    });
    constexpr double kBalances[] = {0.5, 0.0, 1.0, 0.01};
    balance_ = kBalances[in.below(4)];
    weighted_ = marginal || !in.one_in(3);
    output(indices_, shape_.images * k_);
    output(gains_, shape_.images * k_);
  }
  void run(const cpu::Threads& threads) override {
    const cpu::Picks picks{indices_.data(), gains_.data()};
    if (marginal_) {
      cpu::mmr(tokens_.batch, relevance_.batch, k_, balance_, picks, threads);
    } else {
      cpu::max_min(tokens_.batch, weighted_ ? relevance_.batch : cpu::ValueBatch<float>{}, k_, picks, threads);
    }
  }
  void check() const override {
    for (int64_t b = 0; b < shape_.images; ++b) check_image(b);
  }

 private:
  void check_image(int64_t b) const {
    const int64_t* picks = indices_.data() + b * k_;
    require_distinct(picks, k_, shape_.count, b);
    for (int64_t t = 0; t < k_; ++t) require(std::isfinite(gains_[static_cast<size_t>(b * k_ + t)]), at("gain", b, t));
    if (!small(shape_.count, k_, shape_.width)) return;
    const Units units(tokens_, b);
    const size_t n = static_cast<size_t>(shape_.count);
    const Kernel cosines = kernel_of(units, std::vector<double>(n, 1.0));
    std::vector<double> offset(n), slope(n), left(n);
    std::vector<bool> bad(n), taken(n);
    double low = INFINITY, high = -INFINITY, steepest = 0.0;
    for (size_t i = 0; i < n; ++i) {
      const double value = weighted_ ? relevance_.at(b, static_cast<int64_t>(i)) : 1.0;
      bad[i] = units.bad[i] || !std::isfinite(value);
      if (bad[i]) continue;
      offset[i] = marginal_ ? balance_ * value : std::max(value, 0.0);
      slope[i] = marginal_ ? 1.0 - balance_ : offset[i];
      steepest = std::max(steepest, slope[i]);
      low = std::min(low, offset[i]);
      high = std::max(high, offset[i]);
    }
    for (size_t i = 0; i < n; ++i) {
      double nearest = marginal_ ? 0.0 : -1.0;
      for (size_t j = 0; j < n && !marginal_; ++j)
        nearest = i == j || bad[j] ? nearest : std::max(nearest, cosines[i][j]);
      left[i] = offset[i] - slope[i] * nearest;
    }
    const double tolerance = kTolerance * (high - low + 2.0 * steepest);
    for (int64_t t = 0; t < k_; ++t) {
      const size_t pick = static_cast<size_t>(picks[t]);
      double best = -INFINITY;
      for (size_t i = 0; i < n; ++i) best = taken[i] || bad[i] ? best : std::max(best, left[i]);
      if (best == -INFINITY) {
        require(t == 0 || !bad[static_cast<size_t>(picks[t - 1])] || picks[t - 1] < picks[t], at("bad ones", b, t));
      } else {
        require(!bad[pick] && left[pick] >= best - tolerance, at("the certificate of the nearest pick", b, t));
      }
      taken[pick] = true;
      for (size_t i = 0; i < n; ++i) {
        const double fresh = offset[i] - slope[i] * cosines[i][pick];
        left[i] = t == 0 ? fresh : std::min(left[i], fresh);
      }
    }
  }

  bool marginal_, weighted_ = true;
  double balance_ = 0.5;
  Shape shape_;
  int64_t k_;
  Matrix tokens_;
  Values<float> relevance_;
  std::vector<int64_t> indices_;
  std::vector<float> gains_;
};

// ---- prune ----------------------------------------------------------------------------------------------------------

cpu::PruneOptions prune_options(Bytes& in) {
  constexpr double kDrops[] = {0.25, 0.0, 0.5, 0.75, 0.999};
  constexpr double kOversample[] = {2.0, 1.0, 1.5, 7.0, 1e300};
  cpu::PruneOptions options;
  options.negate = in.one_in(2);
  constexpr cpu::Combine kCombines[] = {cpu::Combine::kIntersect, cpu::Combine::kRestrict};
  options.combine = kCombines[in.below(2)];
  options.gsp_drop = kDrops[in.below(5)];
  options.oversample = kOversample[in.below(5)];
  options.gsp = Graph(in).options();
  constexpr double kFloors[] = {0.0, 0.0, 0.3, 1.0};
  options.floor = kFloors[in.below(4)];
  return options;
}

// What came later, and so behind all else: inputs recorded before keep their meaning.
void later_options(Bytes& in, cpu::PruneOptions& options) {
  if (in.one_in(4)) options.combine = cpu::Combine::kUnion;
  options.power = power_from(in);
  options.reduce = reduce_from(in);
}

// Whether the rounds get an image of n tokens to what the options drop, which the checks before the op demand.
void make_reachable(cpu::PruneOptions& options, int64_t n) {
  if (cpu::rounds_suffice(n, cpu::gsp_keep(n, options.gsp_drop), options.gsp.rounds)) return;
  options.gsp_drop = 0.0;
}

// The stages by themselves, each from memory of its own.
std::vector<int64_t> by_stages(const cpu::PruneInput& input, int64_t keep, const cpu::PruneOptions& options,
                               int64_t image) {
  const int64_t n = input.tokens.count;
  const size_t size = static_cast<size_t>(n);
  std::vector<float> relevance(size, 1.0f), score(size);
  if (input.query.has_value()) {
    const cpu::TokenView& space = input.aligned.has_value() ? *input.aligned : input.tokens;
    cpu::query_relevance(space, *input.query, options.negate, options.reduce, relevance.data(), cpu::serial);
    std::vector<float> buffer(static_cast<size_t>(space.width));
    for (int64_t i = 0; i < n; ++i) {
      const float* row = space.row(i, buffer.data());
      const bool finite = std::all_of(row, row + space.width, [](float x) { return std::isfinite(x); });
      if (!finite) relevance[static_cast<size_t>(i)] = NAN;
    }
    // Where relevance tells good tokens apart, their least is 0; where it does not, it is 1 for all.
    if (std::find(relevance.begin(), relevance.end(), 0.0f) != relevance.end()) {
      const float least = static_cast<float>(options.floor), rise = static_cast<float>(1.0 - options.floor);
      for (float& r : relevance) r = least + rise * r;
    }
    for (float& r : relevance) r = std::isnan(r) ? r : std::pow(r, static_cast<float>(options.power));
  }
  const bool both = options.combine == cpu::Combine::kUnion;
  std::vector<uint8_t> survives(size, 1);
  const int64_t survivors = both ? keep - keep / 2 : cpu::gsp_keep(n, options.gsp_drop);
  cpu::GspOptions graph = options.gsp;
  while (both && !cpu::rounds_suffice(n, survivors, graph.rounds)) ++graph.rounds;
  if (survivors < n) cpu::gsp(input.tokens, survivors, graph, survives.data(), score.data(), cpu::serial);
  const int64_t ranked = both ? keep : options.ranked(n, keep);
  std::vector<int64_t> picks(static_cast<size_t>(ranked)), kept(static_cast<size_t>(keep));
  std::vector<float> gains(static_cast<size_t>(ranked));
  if (options.combine != cpu::Combine::kRestrict) {
    cpu::qcsp(input.tokens, {relevance.data()}, ranked, {picks.data(), gains.data()}, cpu::serial);
    if (both) {  // GSP's half, and the first of the ranking that are not in it
      std::set<int64_t> set;
      for (int64_t i = 0; i < n; ++i) {
        if (survives[static_cast<size_t>(i)] != 0) set.insert(i);
      }
      for (auto pick = picks.begin(); static_cast<int64_t>(set.size()) < keep; ++pick) set.insert(*pick);
      return {set.begin(), set.end()};
    }
    cpu::mask_intersect(picks.data(), 1, ranked, survives.data(), 1, keep, kept.data());
    return kept;
  }
  const cpu::Parallel alone = cpu::serial;
  const cpu::Image scanned(input.tokens, alone);
  std::vector<uint8_t> tier(size);
  std::vector<int> exact_tier(size);
  for (size_t i = 0; i < size; ++i) {
    tier[i] = !std::isfinite(relevance[i]) ? cpu::kNoTier : survives[i] ? 0 : 1;
    exact_tier[i] = tier[i] == cpu::kNoTier || scanned.rows.bad[i] ? 2 : tier[i];
  }
  cpu::rank_tokens(scanned, {relevance.data()}, tier.data(), keep, {picks.data(), gains.data()});
  for (int64_t t = 1; t < keep; ++t) {
    const int before = exact_tier[static_cast<size_t>(picks[static_cast<size_t>(t - 1)])];
    require(before <= exact_tier[static_cast<size_t>(picks[static_cast<size_t>(t)])], at("tiers in turn", image, t));
  }
  std::sort(picks.begin(), picks.end());
  return picks;
}

void require_kept(const int64_t* kept, int64_t keep, int64_t n, const std::vector<int64_t>& expected, int64_t image) {
  require_distinct(kept, keep, n, image);
  require(std::is_sorted(kept, kept + keep), at("ascending indices", image, 0));
  require(std::equal(expected.begin(), expected.end(), kept), at("what the stages give by themselves", image, 0));
}

class Prune : public Call {
 public:
  explicit Prune(Bytes& in) : shape_(in, 1), options_(prune_options(in)) {
    make_reachable(options_, shape_.count);
    keep_ = 1 + in.byte() * shape_.count / 256;
    const int64_t with = in.below(4);  // a query, and tokens in its space
    tokens_ = matrix(in, shape_.dtype, shape_.images, shape_.count, shape_.width);
    batch_.tokens = tokens_.batch;
    int64_t space = shape_.width;
    if (with >= 2) {
      space = 1 + in.below(12);
      aligned_ = matrix(in, shape_.dtype, shape_.images, shape_.count, space);
      batch_.aligned = aligned_.batch;
    }
    if (with % 2 == 1) {
      query_ = std::make_unique<QueryInput>(in, shape_.dtype, shape_.images, space);
      batch_.query = query_->batch();
    }
    later_options(in, options_);
    // Columns of a grid, of which there may be any number that divides its tokens.
    const int64_t columns = in.byte();
    if (columns > 0 && shape_.count % columns == 0) batch_.checker(cpu::checkered_columns("checker", columns));
    output(kept_, shape_.images * keep_);
  }
  void run(const cpu::Threads& threads) override { cpu::prune(batch_, keep_, options_, kept_.data(), threads); }
  void check() const override {
    for (int64_t b = 0; b < shape_.images; ++b) {
      cpu::PruneInput input{batch_.tokens[b], std::nullopt, std::nullopt};
      if (batch_.aligned.has_value()) input.aligned = (*batch_.aligned)[b];
      if (batch_.query.has_value()) input.query = (*batch_.query)[b];
      std::vector<int64_t> expected = by_stages(input, keep_, options_, b);
      // Back from pairs that changed places in odd rows of the grid.
      const int64_t columns = batch_.tokens.first.checkered;
      for (int64_t& i : expected) {
        if (columns != 0 && i / columns % 2 == 1) i += i % 2 == 0 ? 1 : -1;
      }
      std::sort(expected.begin(), expected.end());
      require_kept(kept_.data() + b * keep_, keep_, shape_.count, expected, b);
    }
  }

 private:
  Shape shape_;
  cpu::PruneOptions options_;
  int64_t keep_ = 0;
  Matrix tokens_, aligned_;
  std::unique_ptr<QueryInput> query_;
  cpu::PruneBatch batch_;
  std::vector<int64_t> kept_;
};

class PruneVarlen : public Call {
 public:
  explicit PruneVarlen(Bytes& in) : options_(prune_options(in)), starts_{0} {
    const auto dtype = static_cast<cpu::DType>(in.below(3));
    const int64_t segments = in.below(5), width = 1 + in.below(20), with = in.below(4);
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t length = in.one_in(4) ? in.byte() : in.below(24);
      make_reachable(options_, length);
      starts_.push_back(starts_.back() + length);
      keep_.push_back(length == 0 ? 0 : 1 + in.byte() * length / 256);
    }
    int64_t space = width, total = 0;
    tokens_ = matrix(in, dtype, 1, starts_.back(), width);
    packed_.tokens = tokens_.batch.first;
    if (with >= 2) {
      space = 1 + in.below(12);
      aligned_ = matrix(in, dtype, 1, starts_.back(), space);
      packed_.aligned = aligned_.batch.first;
    }
    if (with % 2 == 1) {
      query_ = std::make_unique<QueryInput>(in, dtype, segments, space);
      packed_.query = query_->batch();
    }
    later_options(in, options_);
    for (const int64_t k : keep_) total += k;
    output(kept_, total);
  }
  void run(const cpu::Threads& threads) override {
    cpu::prune_varlen(packed_, starts_, keep_, options_, kept_.data(), threads);
  }
  void check() const override {
    const int64_t* kept = kept_.data();
    for (size_t s = 0; s < keep_.size(); ++s) {
      const int64_t begin = starts_[s], end = starts_[s + 1], image = static_cast<int64_t>(s);
      if (begin == end) continue;
      cpu::PruneInput input{packed_.tokens.rows(begin, end), std::nullopt, std::nullopt};
      if (packed_.aligned.has_value()) input.aligned = packed_.aligned->rows(begin, end);
      if (packed_.query.has_value()) input.query = (*packed_.query)[image];
      std::vector<int64_t> own(kept, kept + keep_[s]);
      for (int64_t& i : own) i -= begin;
      require_kept(own.data(), keep_[s], end - begin, by_stages(input, keep_[s], options_, image), image);
      kept += keep_[s];
    }
  }

 private:
  cpu::PruneOptions options_;
  std::vector<int64_t> starts_, keep_;
  Matrix tokens_, aligned_;
  std::unique_ptr<QueryInput> query_;
  cpu::PackedPrune packed_;
  std::vector<int64_t> kept_;
};

}  // namespace

std::unique_ptr<Call> make_greedy_call(size_t op, Bytes& in) {
  if (op == 3) return std::make_unique<DppMap>(in);
  if (op == 4) return std::make_unique<Qcsp>(in);
  if (op == 6) return std::make_unique<Prune>(in);
  if (op >= 8) return std::make_unique<NearestPick>(in, op == 9);
  return std::make_unique<PruneVarlen>(in);
}

std::unique_ptr<Call> make_call(size_t op, Bytes& in) {
  return op == 3 || op == 4 || op >= 6 ? make_greedy_call(op, in) : make_match_call(op, in);
}

}  // namespace fuzz
