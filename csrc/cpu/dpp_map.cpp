#include "cpu/dpp_map.hpp"

#include <torch/csrc/stable/library.h>

#include "common/op_checks.hpp"
#include "common/torch_cpu.hpp"

namespace script {
namespace {

std::tuple<Tensor, Tensor> dpp_map(const Tensor& kernel, int64_t k) {
  check_dpp_map(kernel, k);
  const int64_t batch = kernel.size(0), n = kernel.size(1);
  Tensor indices = empty_cpu({batch, k}, ScalarType::Long);
  Tensor gains = empty_cpu({batch, k}, ScalarType::Float);
  const float* data = kernel.const_data_ptr<float>();
  int64_t* indices_data = indices.mutable_data_ptr<int64_t>();
  float* gains_data = gains.mutable_data_ptr<float>();
  for_each_image(batch, [&](int64_t b, const cpu::Parallel&) {
    const cpu::KernelView view{data + b * kernel.stride(0), n, kernel.stride(1), kernel.stride(2)};
    cpu::dpp_map(view, k, indices_data + b * k, gains_data + b * k);
  });
  return {indices, gains};
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) { m.impl("dpp_map", TORCH_BOX(&script::dpp_map)); }
