// The ops on the CPU: checks, outputs and views of stable-ABI tensors, torch's threads, and the registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/bipartite_match.hpp"
#include "core/dpp_map.hpp"
#include "core/gsp.hpp"
#include "core/mask_intersect.hpp"
#include "core/max_min.hpp"
#include "core/mmr.hpp"
#include "core/prune.hpp"
#include "core/prune_varlen.hpp"
#include "core/qcsp.hpp"
#include "core/query_relevance.hpp"
#include "core/shared_loop.hpp"
#include "faces/torch_checks.hpp"

namespace script {
namespace {

// ---- views ------------------------------------------------------------------------------------------------------

// The core's name of a floating dtype; the checks have let through no other.
cpu::DType core_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case ScalarType::Half:
      return cpu::DType::kFloat16;
    default:
      return cpu::DType::kFloat32;
  }
}

// A (T, D) tensor, or the first image of a (B, N, D) one.
cpu::TokenView rows_of(const Tensor& tensor) {
  const int64_t d = tensor.dim() - 2;
  return {tensor.const_data_ptr(), core_dtype(tensor), tensor.size(d),
          tensor.size(d + 1),      tensor.stride(d),   tensor.stride(d + 1)};
}

// A (B, N, D) tensor; a batch of 1 serves every image.
cpu::TokenBatch batch_of(const Tensor& tensor) {
  return {rows_of(tensor), tensor.size(0), tensor.size(0) == 1 ? 0 : tensor.stride(0)};
}

template <typename T>
cpu::ValueBatch<T> values_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.size(0) == 1 ? 0 : tensor.stride(0), tensor.stride(1)};
}

cpu::ValueBatch<cpu::Truth> truths_of(const Tensor& mask) {
  return {static_cast<const cpu::Truth*>(mask.const_data_ptr()), mask.size(0) == 1 ? 0 : mask.stride(0),
          mask.stride(1)};
}

cpu::QueryBatch query_of(const Tensor& query, const std::optional<Tensor>& mask) {
  cpu::QueryBatch batch{batch_of(query), {}};
  if (mask.has_value()) batch.mask = truths_of(*mask);
  return batch;
}

// A new contiguous tensor, uninitialised.
Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty({shape.begin(), shape.size()}, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// ---- strings ----------------------------------------------------------------------------------------------------

// A string argument, which the boxed kernel owns. Asked for a std::string, the stable ABI of torch 2.10 to 2.13 at
// least copies the text to one that nobody frees.
class OwnedString {
 public:
  explicit OwnedString(StringHandle handle) : handle_(handle) {}
  ~OwnedString() { torch_delete_string(handle_); }
  OwnedString(const OwnedString&) = delete;
  OwnedString& operator=(const OwnedString&) = delete;

  std::string text() const {
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    return {data, length};
  }

 private:
  StringHandle handle_;
};

// ---- threads ----------------------------------------------------------------------------------------------------

// cpu::Parallel on torch's pool.
void parallel(int64_t count, int64_t work, const cpu::Body& body) {
  const auto run = [](int64_t threads, const auto& share) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) share();
    });
  };
  cpu::share_loop(count, work, cpu::simd().thread_work, torch::stable::get_num_threads(), body, run);
}

// OpenMP's threads do not survive a fork, and a child that asks for them waits for ever, as in torch's own ops. So a
// child of a process that has called an op works alone.
cpu::Threads threads() {
  static const pid_t first_caller = getpid();
  if (getpid() != first_caller) return {};
  return {static_cast<int64_t>(torch::stable::get_num_threads()), parallel};
}

// ---- ops --------------------------------------------------------------------------------------------------------

Tensor query_relevance(const Tensor& tokens, const Tensor& query, const std::optional<Tensor>& query_mask, bool negate,
                       StringHandle reduce_handle) {
  const std::string reduce = OwnedString(reduce_handle).text();
  check_query_relevance(tokens, query, query_mask, reduce);
  Tensor out = empty({tokens.size(0), tokens.size(1)}, ScalarType::Float);
  cpu::query_relevance(batch_of(tokens), query_of(query, query_mask), negate, cpu::reduce_of(reduce),
                       out.mutable_data_ptr<float>(), threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bipartite_match(const Tensor& tokens, double threshold) {
  check_bipartite_match(tokens, threshold);
  const int64_t batch = tokens.size(0), sources = tokens.size(1) - tokens.size(1) / 2;
  Tensor best = empty({batch, sources}, ScalarType::Float), match = empty({batch, sources}, ScalarType::Int);
  Tensor degree = empty({batch, sources}, ScalarType::Int), mean = empty({batch, sources}, ScalarType::Float);
  Tensor density = empty({batch, sources}, ScalarType::Float);
  const cpu::MatchResult result{best.mutable_data_ptr<float>(), match.mutable_data_ptr<int32_t>(),
                                degree.mutable_data_ptr<int32_t>(), mean.mutable_data_ptr<float>(),
                                density.mutable_data_ptr<float>()};
  cpu::bipartite_match(batch_of(tokens), threshold, result, threads());
  return {best, match, degree, mean, density};
}

std::tuple<Tensor, Tensor> gsp(const Tensor& tokens, int64_t keep, double threshold, double gamma, int64_t min_degree,
                               int64_t rounds) {
  check_gsp(tokens, keep, threshold, gamma, min_degree, rounds);
  Tensor mask = empty({tokens.size(0), tokens.size(1)}, ScalarType::Bool);
  Tensor redundancy = empty({tokens.size(0), tokens.size(1)}, ScalarType::Float);
  cpu::gsp(batch_of(tokens), keep, cpu::gsp_options(threshold, gamma, min_degree, rounds),
           static_cast<cpu::Truth*>(mask.mutable_data_ptr()), redundancy.mutable_data_ptr<float>(), threads());
  return {mask, redundancy};
}

// The k picks of each image.
struct PickTensors {
  Tensor indices, gains;
  PickTensors(int64_t batch, int64_t k)
      : indices(empty({batch, k}, ScalarType::Long)), gains(empty({batch, k}, ScalarType::Float)) {}
  cpu::Picks picks() { return {indices.mutable_data_ptr<int64_t>(), gains.mutable_data_ptr<float>()}; }
};

std::tuple<Tensor, Tensor> dpp_map(const Tensor& kernel, int64_t k) {
  check_dpp_map(kernel, k);
  const int64_t batch = kernel.size(0);
  PickTensors out(batch, k);
  const cpu::KernelView first{kernel.const_data_ptr<float>(), kernel.size(1), kernel.stride(1), kernel.stride(2)};
  cpu::dpp_map(first, kernel.stride(0), batch, k, out.picks(), threads());
  return {out.indices, out.gains};
}

std::tuple<Tensor, Tensor> qcsp(const Tensor& tokens, const Tensor& relevance, int64_t k, double power, bool normalize,
                                double ridge) {
  check_qcsp(tokens, relevance, k, power, ridge);
  PickTensors out(tokens.size(0), k);
  cpu::qcsp(batch_of(tokens), values_of<float>(relevance), k, out.picks(), threads(), {power, normalize, ridge});
  return {out.indices, out.gains};
}

std::tuple<Tensor, Tensor> max_min(const Tensor& tokens, const std::optional<Tensor>& relevance, int64_t k) {
  check_ranked(tokens, relevance, k);
  PickTensors out(tokens.size(0), k);
  const cpu::ValueBatch<float> values = relevance.has_value() ? values_of<float>(*relevance) : cpu::ValueBatch<float>{};
  cpu::max_min(batch_of(tokens), values, k, out.picks(), threads());
  return {out.indices, out.gains};
}

std::tuple<Tensor, Tensor> mmr(const Tensor& tokens, const Tensor& relevance, int64_t k, double balance) {
  check_mmr(tokens, relevance, k, balance);
  PickTensors out(tokens.size(0), k);
  cpu::mmr(batch_of(tokens), values_of<float>(relevance), k, balance, out.picks(), threads());
  return {out.indices, out.gains};
}

Tensor mask_intersect(const Tensor& ranking, const Tensor& mask, int64_t k) {
  check_mask_intersect(ranking, mask, k);
  const int64_t batch = ranking.size(0);
  Tensor out = empty({batch, k}, ScalarType::Long);
  cpu::mask_intersect(values_of<int64_t>(ranking), ranking.size(1), truths_of(mask), mask.size(1), batch, k,
                      out.mutable_data_ptr<int64_t>(), threads());
  return out;
}

Tensor prune(const Tensor& tokens, const std::optional<Tensor>& query, int64_t keep,
             const std::optional<Tensor>& aligned, const std::optional<Tensor>& query_mask, bool negate,
             double gsp_drop, double oversample, StringHandle combine_handle, double threshold, double gamma,
             int64_t min_degree, int64_t rounds, double floor, double power, StringHandle reduce_handle,
             StringHandle split_handle, std::optional<int64_t> grid_width) {
  const OwnedString owned(combine_handle), owned_reduce(reduce_handle), owned_split(split_handle);
  const std::string combine = owned.text(), reduce = owned_reduce.text(), split = owned_split.text();
  check_prune(tokens, query, keep, aligned, query_mask, gsp_drop, oversample, combine, threshold, gamma, min_degree,
              rounds, floor, power, reduce);
  check_split(tokens.size(1), split, grid_width);
  Tensor out = empty({tokens.size(0), keep}, ScalarType::Long);
  cpu::PruneBatch batch{batch_of(tokens), std::nullopt, std::nullopt};
  if (query.has_value()) batch.query = query_of(*query, query_mask);
  if (aligned.has_value()) batch.aligned = batch_of(*aligned);
  batch.checker(cpu::checkered_columns(split, grid_width));
  const cpu::GspOptions graph = cpu::gsp_options(threshold, gamma, min_degree, rounds);
  const cpu::PruneOptions options{
      negate, gsp_drop, oversample, cpu::combine_of(combine), floor, power, cpu::reduce_of(reduce), graph};
  cpu::prune(batch, keep, options, out.mutable_data_ptr<int64_t>(), threads());
  return out;
}

Tensor prune_varlen(const Tensor& tokens, const Tensor& cu_seqlens, const std::optional<Tensor>& query,
                    std::vector<int64_t> keep, const std::optional<Tensor>& aligned, bool negate, double gsp_drop,
                    double oversample, StringHandle combine_handle, double threshold, double gamma, int64_t min_degree,
                    int64_t rounds, double floor, double power, StringHandle reduce_handle) {
  const OwnedString owned(combine_handle), owned_reduce(reduce_handle);
  const std::string combine = owned.text(), reduce = owned_reduce.text();
  check_prune_varlen(tokens, cu_seqlens, query, keep, aligned, gsp_drop, oversample, combine, threshold, gamma,
                     min_degree, rounds, floor, power, reduce);
  const std::vector<int64_t> starts = check_segments(cu_seqlens.const_data_ptr<int32_t>(), cu_seqlens.stride(0),
                                                     tokens.size(0), keep, combine, gsp_drop, rounds);
  int64_t total = 0;
  for (const int64_t count : keep) total += count;
  Tensor out = empty({total}, ScalarType::Long);
  cpu::PackedPrune packed{rows_of(tokens), std::nullopt, std::nullopt};
  if (query.has_value()) packed.query = query_of(*query, std::nullopt);
  if (aligned.has_value()) packed.aligned = rows_of(*aligned);
  const cpu::GspOptions graph = cpu::gsp_options(threshold, gamma, min_degree, rounds);
  const cpu::PruneOptions options{
      negate, gsp_drop, oversample, cpu::combine_of(combine), floor, power, cpu::reduce_of(reduce), graph};
  cpu::prune_varlen(packed, starts, keep, options, out.mutable_data_ptr<int64_t>(), threads());
  return out;
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CPU, m) {
  m.impl("query_relevance", TORCH_BOX(&script::query_relevance));
  m.impl("bipartite_match", TORCH_BOX(&script::bipartite_match));
  m.impl("gsp", TORCH_BOX(&script::gsp));
  m.impl("dpp_map", TORCH_BOX(&script::dpp_map));
  m.impl("qcsp", TORCH_BOX(&script::qcsp));
  m.impl("max_min", TORCH_BOX(&script::max_min));
  m.impl("mmr", TORCH_BOX(&script::mmr));
  m.impl("mask_intersect", TORCH_BOX(&script::mask_intersect));
  m.impl("prune", TORCH_BOX(&script::prune));
  m.impl("prune_varlen", TORCH_BOX(&script::prune_varlen));
}
