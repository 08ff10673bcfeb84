// _core: facts about the build, and the C++ cores on NumPy arrays, for runtimes without torch.
//
// script_kernels/numpy.py has checked every argument; arrays come with strides that are whole elements. A call runs on
// `threads` threads, the calling one among them, with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "core/bipartite_match.hpp"
#include "core/dpp_map.hpp"
#include "core/gsp.hpp"
#include "core/loop_threads.hpp"
#include "core/mask_intersect.hpp"
#include "core/max_min.hpp"
#include "core/mmr.hpp"
#include "core/prune.hpp"
#include "core/prune_varlen.hpp"
#include "core/qcsp.hpp"
#include "core/query_relevance.hpp"
#include "simd/simd.hpp"

namespace py = pybind11;
namespace cpu = script::cpu;

namespace {

template <typename T>
using Array = py::array_t<T, 0>;

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", SCRIPT_COMPILER},
      {"simd", cpu::simd().name},
      {"cuda_archs", SCRIPT_CUDA_ARCHS},
      {"torch", SCRIPT_TORCH},
  };
}

// ---- the GIL ----------------------------------------------------------------------------------------------------

// Lets go of the GIL for as long as it lives. A daemon thread that wants it back when the interpreter is ending is told
// to end, up to Python 3.13 by unwinding its stack, which a destructor cannot let through (pybind11's would abort the
// process), and which would let go of arrays without the GIL. So it stays here, as it does from Python 3.14 on.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// ---- views ------------------------------------------------------------------------------------------------------

// A (T, D) array, or the first image of a (B, N, D) one. bf16 comes as uint16.
cpu::TokenView rows_of(const py::array& array) {
  const py::ssize_t d = array.ndim() - 2, size = array.itemsize();
  cpu::TokenView view{array.data(),       cpu::DType::kFloat32,    array.shape(d),
                      array.shape(d + 1), array.strides(d) / size, array.strides(d + 1) / size};
  if (array.dtype().kind() == 'u') view.dtype = cpu::DType::kBFloat16;
  if (array.dtype().kind() == 'f' && size == 2) view.dtype = cpu::DType::kFloat16;
  return view;
}

// A (B, N, D) array; a batch of 1 serves every image.
cpu::TokenBatch batch_of(const py::array& array) {
  return {rows_of(array), array.shape(0), array.shape(0) == 1 ? 0 : array.strides(0) / array.itemsize()};
}

template <typename T>
cpu::ValueBatch<T> values_of(const Array<T>& array) {
  const py::ssize_t size = sizeof(T);
  return {array.data(), array.shape(0) == 1 ? 0 : array.strides(0) / size, array.strides(1) / size};
}

cpu::ValueBatch<cpu::Truth> truths_of(const py::array& mask) {
  return {static_cast<const cpu::Truth*>(mask.data()), mask.shape(0) == 1 ? 0 : mask.strides(0), mask.strides(1)};
}

cpu::QueryBatch query_of(const py::array& query, const std::optional<Array<bool>>& mask) {
  cpu::QueryBatch batch{batch_of(query), {}};
  if (mask.has_value()) batch.mask = truths_of(*mask);
  return batch;
}

// ---- ops --------------------------------------------------------------------------------------------------------

Array<float> query_relevance(const py::array& tokens, const py::array& query,
                             const std::optional<Array<bool>>& query_mask, bool negate, const std::string& reduce,
                             int64_t threads) {
  Array<float> out({tokens.shape(0), tokens.shape(1)});
  float* relevance = out.mutable_data();
  const cpu::TokenBatch batch = batch_of(tokens);
  const cpu::QueryBatch queries = query_of(query, query_mask);
  const cpu::Reduce how = cpu::reduce_of(reduce);
  WithoutGil release;
  cpu::query_relevance(batch, queries, negate, how, relevance, cpu::loop_threads(threads));
  return out;
}

std::tuple<Array<float>, Array<int32_t>, Array<int32_t>, Array<float>, Array<float>> bipartite_match(
    const py::array& tokens, double threshold, int64_t threads) {
  const std::vector<py::ssize_t> shape{tokens.shape(0), tokens.shape(1) - tokens.shape(1) / 2};
  Array<float> best(shape), mean(shape), density(shape);
  Array<int32_t> match(shape), degree(shape);
  const cpu::MatchResult result{best.mutable_data(), match.mutable_data(), degree.mutable_data(), mean.mutable_data(),
                                density.mutable_data()};
  const cpu::TokenBatch batch = batch_of(tokens);
  {
    WithoutGil release;
    cpu::bipartite_match(batch, threshold, result, cpu::loop_threads(threads));
  }
  return {best, match, degree, mean, density};
}

std::tuple<Array<bool>, Array<float>> gsp(const py::array& tokens, int64_t keep, double threshold, double gamma,
                                          int64_t min_degree, int64_t rounds, int64_t threads) {
  Array<bool> mask({tokens.shape(0), tokens.shape(1)});
  Array<float> redundancy({tokens.shape(0), tokens.shape(1)});
  cpu::Truth* mask_data = reinterpret_cast<cpu::Truth*>(mask.mutable_data());
  float* redundancy_data = redundancy.mutable_data();
  const cpu::TokenBatch batch = batch_of(tokens);
  {
    WithoutGil release;
    cpu::gsp(batch, keep, cpu::gsp_options(threshold, gamma, min_degree, rounds), mask_data, redundancy_data,
             cpu::loop_threads(threads));
  }
  return {mask, redundancy};
}

std::tuple<Array<int64_t>, Array<float>> dpp_map(const Array<float>& kernel, int64_t k, int64_t threads) {
  const int64_t batch = kernel.shape(0), size = sizeof(float);
  Array<int64_t> indices({batch, k});
  Array<float> gains({batch, k});
  const cpu::Picks picks{indices.mutable_data(), gains.mutable_data()};
  const cpu::KernelView first{kernel.data(), kernel.shape(1), kernel.strides(1) / size, kernel.strides(2) / size};
  const int64_t image_stride = kernel.strides(0) / size;
  {
    WithoutGil release;
    cpu::dpp_map(first, image_stride, batch, k, picks, cpu::loop_threads(threads));
  }
  return {indices, gains};
}

// The k picks of each image by rank(tokens, picks, threads), without the GIL.
template <typename Rank>
std::tuple<Array<int64_t>, Array<float>> picks_of(const py::array& tokens, int64_t k, int64_t threads,
                                                  const Rank& rank) {
  Array<int64_t> indices({tokens.shape(0), static_cast<py::ssize_t>(k)});
  Array<float> gains({tokens.shape(0), static_cast<py::ssize_t>(k)});
  const cpu::Picks picks{indices.mutable_data(), gains.mutable_data()};
  const cpu::TokenBatch batch = batch_of(tokens);
  {
    WithoutGil release;
    rank(batch, picks, cpu::loop_threads(threads));
  }
  return {indices, gains};
}

std::tuple<Array<int64_t>, Array<float>> qcsp(const py::array& tokens, const Array<float>& relevance, int64_t k,
                                              double power, bool normalize, double ridge, int64_t threads) {
  const cpu::ValueBatch<float> values = values_of(relevance);
  return picks_of(tokens, k, threads, [&](const cpu::TokenBatch& batch, const cpu::Picks& picks, const auto& own) {
    cpu::qcsp(batch, values, k, picks, own, {power, normalize, ridge});
  });
}

std::tuple<Array<int64_t>, Array<float>> max_min(const py::array& tokens, const std::optional<Array<float>>& relevance,
                                                 int64_t k, int64_t threads) {
  const cpu::ValueBatch<float> values = relevance.has_value() ? values_of(*relevance) : cpu::ValueBatch<float>{};
  return picks_of(tokens, k, threads, [&](const cpu::TokenBatch& batch, const cpu::Picks& picks, const auto& own) {
    cpu::max_min(batch, values, k, picks, own);
  });
}

std::tuple<Array<int64_t>, Array<float>> mmr(const py::array& tokens, const Array<float>& relevance, int64_t k,
                                             double balance, int64_t threads) {
  const cpu::ValueBatch<float> values = values_of(relevance);
  return picks_of(tokens, k, threads, [&](const cpu::TokenBatch& batch, const cpu::Picks& picks, const auto& own) {
    cpu::mmr(batch, values, k, balance, picks, own);
  });
}

Array<int64_t> mask_intersect(const Array<int64_t>& ranking, const Array<bool>& mask, int64_t k, int64_t threads) {
  const int64_t batch = ranking.shape(0), length = ranking.shape(1), n = mask.shape(1);
  Array<int64_t> out({batch, k});
  int64_t* kept = out.mutable_data();
  const cpu::ValueBatch<int64_t> rankings = values_of(ranking);
  const cpu::ValueBatch<cpu::Truth> masks = truths_of(mask);
  WithoutGil release;
  cpu::mask_intersect(rankings, length, masks, n, batch, k, kept, cpu::loop_threads(threads));
  return out;
}

// (negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor, power, reduce)
using PruneTuple =
    std::tuple<bool, double, double, std::string, double, double, int64_t, int64_t, double, double, std::string>;

cpu::PruneOptions options_of(const PruneTuple& given) {
  const auto& [negate, gsp_drop, oversample, combine, threshold, gamma, min_degree, rounds, floor, power, reduce] =
      given;
  const cpu::GspOptions graph = cpu::gsp_options(threshold, gamma, min_degree, rounds);
  return {negate, gsp_drop, oversample, cpu::combine_of(combine), floor, power, cpu::reduce_of(reduce), graph};
}

Array<int64_t> prune(const py::array& tokens, const std::optional<py::array>& query, int64_t keep,
                     const std::optional<py::array>& aligned, const std::optional<Array<bool>>& query_mask,
                     const PruneTuple& options, const std::string& split, const std::optional<int64_t>& grid_width,
                     int64_t threads) {
  Array<int64_t> out({tokens.shape(0), static_cast<py::ssize_t>(keep)});
  int64_t* kept = out.mutable_data();
  cpu::PruneBatch batch{batch_of(tokens), std::nullopt, std::nullopt};
  if (query.has_value()) batch.query = query_of(*query, query_mask);
  if (aligned.has_value()) batch.aligned = batch_of(*aligned);
  batch.checker(cpu::checkered_columns(split, grid_width));
  WithoutGil release;
  cpu::prune(batch, keep, options_of(options), kept, cpu::loop_threads(threads));
  return out;
}

Array<int64_t> prune_varlen(const py::array& tokens, const std::vector<int64_t>& starts,
                            const std::optional<py::array>& query, const std::vector<int64_t>& keep,
                            const std::optional<py::array>& aligned, const PruneTuple& options, int64_t threads) {
  int64_t total = 0;
  for (const int64_t count : keep) total += count;
  Array<int64_t> out(total);
  int64_t* kept = out.mutable_data();
  cpu::PackedPrune packed{rows_of(tokens), std::nullopt, std::nullopt};
  if (query.has_value()) packed.query = query_of(*query, std::nullopt);
  if (aligned.has_value()) packed.aligned = rows_of(*aligned);
  WithoutGil release;
  cpu::prune_varlen(packed, starts, keep, options_of(options), kept, cpu::loop_threads(threads));
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build facts, and the CPU cores of the ops on NumPy arrays; script_kernels.numpy is their public face.";
  m.def("build_info", &build_info,
        "compiler, torch built against, SIMD level in use on this CPU, CUDA architectures of the build (empty: none).");
  m.def("query_relevance", &query_relevance);
  m.def("bipartite_match", &bipartite_match);
  m.def("gsp", &gsp);
  m.def("dpp_map", &dpp_map);
  m.def("qcsp", &qcsp);
  m.def("max_min", &max_min);
  m.def("mmr", &mmr);
  m.def("mask_intersect", &mask_intersect);
  m.def("prune", &prune);
  m.def("prune_varlen", &prune_varlen);
}
