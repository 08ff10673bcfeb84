#include "cpu/bipartite_match.hpp"

#include <torch/csrc/stable/library.h>

#include "common/op_checks.hpp"
#include "common/torch_cpu.hpp"

namespace script {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_match(const Tensor& tokens, double threshold) {
  check_bipartite_match(tokens, threshold);
  const int64_t batch = tokens.size(0), sources = (tokens.size(1) + 1) / 2;
  Tensor best = empty_cpu({batch, sources}, ScalarType::Float);
  Tensor match = empty_cpu({batch, sources}, ScalarType::Int);
  Tensor degree = empty_cpu({batch, sources}, ScalarType::Int);
  Tensor mean = empty_cpu({batch, sources}, ScalarType::Float);
  Tensor density = empty_cpu({batch, sources}, ScalarType::Float);
  const cpu::MatchResult all{best.mutable_data_ptr<float>(), match.mutable_data_ptr<int32_t>(),
                             degree.mutable_data_ptr<int32_t>(), mean.mutable_data_ptr<float>(),
                             density.mutable_data_ptr<float>()};
  for_each_image(batch, [&](int64_t b, const cpu::Parallel& parallel) {
    cpu::bipartite_match(image_view(tokens, b), cpu::saturate(threshold), all.at(b * sources), parallel);
  });
  return {best, match, degree, mean, density};
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) { m.impl("bipartite_match", TORCH_BOX(&script::bipartite_match)); }
