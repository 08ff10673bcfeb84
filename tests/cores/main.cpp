// The torch-free cores as a program of their own, for sanitizers and for other processors. `level` prints the SIMD
// level in use. Else it reads from standard input: int64 n, width, k, keep, dtype (0 fp32, 1 bf16, 2 fp16), then n *
// width elements and n relevances (fp32). Writes int64: the picks of qcsp (k), of dpp_map on the n x n kernel of the
// first core's products (k), of max_min (k), of mmr (k), of prune with the first two tokens as the query: "intersect"
// with two rounds of GSP (k), "restrict" (k), and "union" by the largest cosine (k); then n mask entries of gsp at
// `keep`.
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/dpp_map.hpp"
#include "core/max_min.hpp"
#include "core/mmr.hpp"
#include "core/prune.hpp"

namespace cpu = script::cpu;

namespace {

template <typename T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::abort();
  return values;
}

void write(const std::vector<int64_t>& values) { std::fwrite(values.data(), sizeof(int64_t), values.size(), stdout); }

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "level") == 0) return std::fputs(cpu::simd().name, stdout) < 0;
  const std::vector<int64_t> header = read<int64_t>(5);
  const int64_t n = header[0], width = header[1], k = header[2], keep = header[3];
  const auto dtype = static_cast<cpu::DType>(header[4]);
  const size_t size = dtype == cpu::DType::kFloat32 ? 4 : 2;
  // Exactly as large as the tokens: a read past the end is seen.
  const std::vector<char> data = read<char>(static_cast<size_t>(n * width) * size);
  std::vector<float> relevance = read<float>(static_cast<size_t>(n));
  relevance.push_back(1.0f);
  // Any other argument plants an overrun: one token more than there is.
  const cpu::TokenView tokens{data.data(), dtype, n + (argc > 1 ? 1 : 0), width, width, 1};

  std::vector<int64_t> picks(static_cast<size_t>(k));
  std::vector<float> gains(static_cast<size_t>(k));
  const cpu::Picks out{picks.data(), gains.data()};
  cpu::qcsp(tokens, {relevance.data()}, k, out, cpu::serial);
  write(picks);

  {
    cpu::Scratch scratch;
    const cpu::RowTable table = cpu::scan_rows(tokens, nullptr, scratch, cpu::serial);
    std::vector<float> kernel(static_cast<size_t>(n * n)), x(static_cast<size_t>(width)), y(x);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const float product = cpu::simd().row_stats(tokens.row(i, x.data()), tokens.row(j, y.data()), width).dot;
        const float scale = table.inverse_norm[i] * table.inverse_norm[j];
        kernel[static_cast<size_t>(i * n + j)] = product * scale * relevance[i] * relevance[j];
      }
    }
    cpu::dpp_map({kernel.data(), n, n, 1}, k, out);
    write(picks);
  }

  cpu::max_min(tokens, {relevance.data()}, k, out, cpu::serial);
  write(picks);
  cpu::mmr(tokens, {relevance.data()}, k, 0.5, out, cpu::serial);
  write(picks);

  const cpu::Query query{{data.data(), dtype, n < 2 ? n : 2, width, width, 1}, nullptr, 0};
  for (const auto combine : {cpu::Combine::kIntersect, cpu::Combine::kRestrict, cpu::Combine::kUnion}) {
    const auto reduce = combine == cpu::Combine::kUnion ? cpu::Reduce::kMax : cpu::Reduce::kMean;
    const cpu::GspOptions graph{0.2f, 1.0f, 4, 2};
    const cpu::PruneOptions options{false, n > 2 ? 0.5 : 0.0, 2.0, combine, 0.3, 1.0, reduce, graph};
    cpu::prune({tokens, std::nullopt, query}, k, options, picks.data(), cpu::serial);
    write(picks);
  }

  std::vector<char> mask(static_cast<size_t>(n));
  std::vector<float> score(static_cast<size_t>(n));
  cpu::gsp(tokens, keep, {}, reinterpret_cast<cpu::Truth*>(mask.data()), score.data(), cpu::serial);
  write(std::vector<int64_t>(mask.begin(), mask.end()));
  return 0;
}
