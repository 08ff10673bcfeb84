#include "cpu/prune.hpp"

#include <torch/csrc/stable/library.h>

#include "common/op_checks.hpp"
#include "common/torch_cpu.hpp"

namespace script {
namespace {

Tensor prune(const Tensor& tokens, const std::optional<Tensor>& query, int64_t keep,
             const std::optional<Tensor>& aligned, const std::optional<Tensor>& query_mask, bool negate,
             double gsp_drop, double oversample, const std::string& combine, double threshold, double gamma,
             int64_t min_degree, int64_t rounds) {
  check_prune(tokens, query, keep, aligned, query_mask, gsp_drop, oversample, combine, threshold, gamma, min_degree,
              rounds);
  const int64_t batch = tokens.size(0), n = tokens.size(1);
  Tensor out = empty_cpu({batch, keep}, ScalarType::Long);
  int64_t* kept = out.mutable_data_ptr<int64_t>();
  const cpu::GspOptions gsp = cpu::gsp_options(threshold, gamma, min_degree, rounds);
  const cpu::PruneOptions options = cpu::prune_options(n, keep, gsp_drop, oversample, combine == "restrict", gsp);
  std::optional<QueryRows> rows;
  if (query.has_value()) rows.emplace(*query, query_mask);
  for_each_image(batch, [&](int64_t b, const cpu::Parallel& parallel) {
    std::optional<cpu::Query> image_query;
    if (rows.has_value()) image_query = rows->image(b);
    std::optional<cpu::TokenView> image_aligned;
    if (aligned.has_value()) image_aligned = image_view(*aligned, b);
    cpu::prune(image_view(tokens, b), image_aligned, image_query, negate, options, kept + b * keep, parallel);
  });
  return out;
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) { m.impl("prune", TORCH_BOX(&script::prune)); }
