#include "cpu/mask_intersect.hpp"

#include <torch/csrc/stable/library.h>

#include "common/op_checks.hpp"
#include "common/torch_cpu.hpp"

namespace script {
namespace {

Tensor mask_intersect(const Tensor& ranking, const Tensor& mask, int64_t k) {
  check_mask_intersect(ranking, mask, k);
  const int64_t batch = ranking.size(0), length = ranking.size(1), n = mask.size(1);
  Tensor out = empty_cpu({batch, k}, ScalarType::Long);
  const int64_t* ranking_data = ranking.const_data_ptr<int64_t>();
  const bool* mask_data = mask.const_data_ptr<bool>();
  int64_t* out_data = out.mutable_data_ptr<int64_t>();
  const auto ranking_strides = ranking.strides();
  const auto mask_strides = mask.strides();
  for_each_item(batch, [&](int64_t b) {
    const int64_t* image_ranking = ranking_data + b * ranking_strides[0];
    cpu::check_ranking(image_ranking, ranking_strides[1], length, n);
    cpu::mask_intersect(image_ranking, ranking_strides[1], length, mask_data + b * mask_strides[0], mask_strides[1], k,
                        out_data + b * k);
  });
  return out;
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) { m.impl("mask_intersect", TORCH_BOX(&script::mask_intersect)); }
