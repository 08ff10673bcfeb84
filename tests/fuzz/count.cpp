// How much work an op does, counted in the inner loops: count OP N WIDTH K ROUNDS KIND prints multiply-adds and the
// columns that other loops pass over. KIND is what the tokens are: spread, alike (equal rows), near (rows that differ
// by rounding errors), apart (one entry each, WIDTH of them all, so orthogonal or equal), pairs (spread, and every
// token once more, with a little noise, as far away as can be), or clusters (of 12, that noise sets apart). WIDTH is
// ignored by dpp_map, whose kernel is a function of the distance j - i.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bytes.hpp"
#include "core/dpp_map.hpp"
#include "core/max_min.hpp"
#include "core/mmr.hpp"
#include "core/prune.hpp"
#include "levels.hpp"

namespace {

namespace cpu = script::cpu;

std::vector<float> tokens_of(const std::string& kind, int64_t n, int64_t width) {
  std::vector<float> out(static_cast<size_t>(n * width));
  fuzz::Random random(1);
  for (int64_t i = 0; i < n * width; ++i) {
    const float any = static_cast<float>(random.next() % 4096) / 2048.0f - 1.0f;
    const float common = std::cos(static_cast<float>(i % width));
    float& x = out[static_cast<size_t>(i)];
    x = kind == "spread" || kind == "pairs" || kind == "clusters" ? any
        : kind == "alike"                                         ? common
                                                                  : common * (1.0f + 1e-7f * any);
    if (kind == "apart") x = i % width == i / width % width ? 1.0f : 0.0f;
  }
  for (int64_t i = n / 12 * width; i < n * width && kind == "clusters"; ++i) {
    float& x = out[static_cast<size_t>(i)];
    x = out[static_cast<size_t>(i % (n / 12 * width))] + 0.3f * x;
  }
  for (int64_t i = 0; i < n / 2 * width && kind == "pairs"; ++i) {
    float& other = out[static_cast<size_t>((n - 1 - i / width) * width + i % width)];
    other = out[static_cast<size_t>(i)] + 0.01f * other;
  }
  return out;
}

// K_ij by j - i alone, in memory of 2 n - 1 entries.
std::vector<float> kernel_of(const std::string& kind, int64_t n) {
  std::vector<float> out(static_cast<size_t>(2 * n - 1));
  for (int64_t i = 0; i < 2 * n - 1; ++i) {
    const double distance = std::fabs(static_cast<double>(i - (n - 1)));
    out[static_cast<size_t>(i)] = kind == "alike" ? 1.0f : static_cast<float>(std::exp(-distance / 3.0));
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  const std::string op = argv[1], kind = argv[6];
  const int64_t n = std::atoll(argv[2]), width = std::atoll(argv[3]), k = std::atoll(argv[4]);
  const cpu::GspOptions gsp{0.2f, 1.0f, 4, std::atoll(argv[5])};
  cpu::levels::count_work(cpu::levels::count() - 1);
  const size_t size = static_cast<size_t>(n);
  std::vector<float> values(size, 1.0f), more(size), others(size);
  std::vector<int32_t> match(size), degree(size);
  std::vector<uint8_t> mask(size);
  std::vector<int64_t> picks(size);
  if (op == "dpp_map") {
    const std::vector<float> kernel = kernel_of(kind, n);
    cpu::dpp_map({kernel.data() + n - 1, n, -1, 1}, k, {picks.data(), values.data()});
  } else {
    const std::vector<float> data = tokens_of(kind, n, width);
    const cpu::TokenView tokens{data.data(), cpu::DType::kFloat32, n, width, width, 1};
    const cpu::Query query{tokens.rows(0, 2), nullptr, 0};
    if (op == "query_relevance")
      cpu::query_relevance(tokens, query, false, cpu::Reduce::kMean, values.data(), cpu::serial);
    if (op == "bipartite_match") {
      cpu::bipartite_match(tokens, 0.2f, {values.data(), match.data(), degree.data(), more.data(), others.data()},
                           cpu::serial);
    }
    if (op == "gsp") cpu::gsp(tokens, k, gsp, mask.data(), more.data(), cpu::serial);
    if (op == "qcsp") cpu::qcsp(tokens, {values.data()}, k, {picks.data(), more.data()}, cpu::serial);
    if (op == "max_min") cpu::max_min(tokens, {}, k, {picks.data(), more.data()}, cpu::serial);
    if (op == "mmr") cpu::mmr(tokens, {values.data()}, k, 0.5, {picks.data(), more.data()}, cpu::serial);
    if (op == "prune") {
      cpu::PruneOptions options;
      options.gsp = gsp;
      cpu::prune(cpu::PruneInput{tokens, std::nullopt, query}, k, options, picks.data(), cpu::serial);
    }
  }
  const cpu::levels::Work work = cpu::levels::work();
  std::printf("%lld %lld\n", static_cast<long long>(work.multiply_adds), static_cast<long long>(work.columns));
  return 0;
}
