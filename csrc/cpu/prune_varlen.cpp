#include "cpu/prune.hpp"

#include <torch/csrc/stable/library.h>

#include "common/op_checks.hpp"
#include "common/torch_cpu.hpp"

namespace script {
namespace {

Tensor prune_varlen(const Tensor& tokens, const Tensor& cu_seqlens, const std::optional<Tensor>& query,
                    std::vector<int64_t> keep, const std::optional<Tensor>& aligned, bool negate, double gsp_drop,
                    double oversample, const std::string& combine, double threshold, double gamma, int64_t min_degree,
                    int64_t rounds) {
  check_prune_varlen(tokens, cu_seqlens, query, keep, aligned, gsp_drop, oversample, combine, threshold, gamma,
                     min_degree, rounds);
  const std::vector<int64_t> starts = check_segments(cu_seqlens.const_data_ptr<int32_t>(), cu_seqlens.stride(0),
                                                     tokens.size(0), keep, gsp_drop, rounds);
  const int64_t segments = static_cast<int64_t>(keep.size());
  std::vector<int64_t> offsets(keep.size() + 1, 0);
  for (size_t s = 0; s < keep.size(); ++s) offsets[s + 1] = offsets[s] + keep[s];
  Tensor out = empty_cpu({offsets.back()}, ScalarType::Long);
  int64_t* kept = out.mutable_data_ptr<int64_t>();
  const cpu::GspOptions gsp = cpu::gsp_options(threshold, gamma, min_degree, rounds);
  std::optional<QueryRows> rows;
  const std::optional<Tensor> no_mask;
  if (query.has_value()) rows.emplace(*query, no_mask);
  for_each_image(segments, [&](int64_t s, const cpu::Parallel& parallel) {
    const int64_t begin = starts[s], end = starts[s + 1];
    if (begin == end) return;
    std::optional<cpu::Query> segment_query;
    if (rows.has_value()) segment_query = rows->image(s);
    std::optional<cpu::TokenView> segment_aligned;
    if (aligned.has_value()) segment_aligned = rows_view(*aligned, begin, end);
    const cpu::PruneOptions options =
        cpu::prune_options(end - begin, keep[s], gsp_drop, oversample, combine == "restrict", gsp);
    int64_t* segment_kept = kept + offsets[s];
    cpu::prune(rows_view(tokens, begin, end), segment_aligned, segment_query, negate, options, segment_kept, parallel);
    for (int64_t i = 0; i < keep[s]; ++i) segment_kept[i] += begin;
  });
  return out;
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) { m.impl("prune_varlen", TORCH_BOX(&script::prune_varlen)); }
