#include "cpu/query_relevance.hpp"

#include <torch/csrc/stable/library.h>

#include "common/op_checks.hpp"
#include "common/torch_cpu.hpp"

namespace script {
namespace {

Tensor query_relevance(const Tensor& tokens, const Tensor& query, const std::optional<Tensor>& query_mask,
                       bool negate) {
  check_query_relevance(tokens, query, query_mask);
  const int64_t batch = tokens.size(0), n = tokens.size(1);
  Tensor out = empty_cpu({batch, n}, ScalarType::Float);
  const QueryRows rows(query, query_mask);
  float* relevance = out.mutable_data_ptr<float>();
  for_each_image(batch, [&](int64_t b, const cpu::Parallel& parallel) {
    cpu::query_relevance(image_view(tokens, b), rows.image(b), negate, relevance + b * n, parallel);
  });
  return out;
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) { m.impl("query_relevance", TORCH_BOX(&script::query_relevance)); }
