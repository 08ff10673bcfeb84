#include "cpu/gsp.hpp"

#include <torch/csrc/stable/library.h>

#include "common/op_checks.hpp"
#include "common/torch_cpu.hpp"

namespace script {
namespace {

std::tuple<Tensor, Tensor> gsp(const Tensor& tokens, int64_t keep, double threshold, double gamma, int64_t min_degree,
                               int64_t rounds) {
  check_gsp(tokens, keep, threshold, gamma, min_degree, rounds);
  const int64_t batch = tokens.size(0), n = tokens.size(1);
  Tensor mask = empty_cpu({batch, n}, ScalarType::Bool);
  Tensor redundancy = empty_cpu({batch, n}, ScalarType::Float);
  bool* mask_data = mask.mutable_data_ptr<bool>();
  float* redundancy_data = redundancy.mutable_data_ptr<float>();
  const cpu::GspOptions options = cpu::gsp_options(threshold, gamma, min_degree, rounds);
  for_each_image(batch, [&](int64_t b, const cpu::Parallel& parallel) {
    cpu::gsp(image_view(tokens, b), keep, options, mask_data + b * n, redundancy_data + b * n, parallel);
  });
  return {mask, redundancy};
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) { m.impl("gsp", TORCH_BOX(&script::gsp)); }
