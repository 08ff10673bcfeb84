#include "cpu/qcsp.hpp"

#include <torch/csrc/stable/library.h>

#include "common/op_checks.hpp"
#include "common/torch_cpu.hpp"

namespace script {
namespace {

std::tuple<Tensor, Tensor> qcsp(const Tensor& tokens, const Tensor& relevance, int64_t k) {
  check_qcsp(tokens, relevance, k);
  const int64_t batch = tokens.size(0);
  Tensor indices = empty_cpu({batch, k}, ScalarType::Long);
  Tensor gains = empty_cpu({batch, k}, ScalarType::Float);
  const float* relevance_data = relevance.const_data_ptr<float>();
  int64_t* indices_data = indices.mutable_data_ptr<int64_t>();
  float* gains_data = gains.mutable_data_ptr<float>();
  for_each_image(batch, [&](int64_t b, const cpu::Parallel& parallel) {
    cpu::qcsp(image_view(tokens, b), relevance_data + b * relevance.stride(0), relevance.stride(1), k,
              indices_data + b * k, gains_data + b * k, parallel);
  });
  return {indices, gains};
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) { m.impl("qcsp", TORCH_BOX(&script::qcsp)); }
