// _core: facts about the build, and the C++ cores on NumPy arrays, for runtimes without torch.
//
// script_kernels/numpy.py has checked every argument; arrays come with strides that are whole elements. The images of a
// batch run one after the other on the calling thread, with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>

#include "cpu/gsp.hpp"
#include "cpu/mask_intersect.hpp"
#include "cpu/prune.hpp"
#include "cpu/qcsp.hpp"
#include "cpu/query_relevance.hpp"
#include "cpu/simd.hpp"

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

// A (B, N, D) array; a batch of 1 serves every image. bf16 comes as uint16.
class Images {
 public:
  explicit Images(const py::array& array)
      : data_(static_cast<const char*>(array.data())),
        image_stride_(array.shape(0) == 1 ? 0 : array.strides(0)),
        view_{nullptr,
              cpu::DType::kFloat32,
              array.shape(1),
              array.shape(2),
              array.strides(1) / array.itemsize(),
              array.strides(2) / array.itemsize()} {
    if (array.dtype().kind() == 'u') view_.dtype = cpu::DType::kBFloat16;
    if (array.dtype().kind() == 'f' && array.itemsize() == 2) view_.dtype = cpu::DType::kFloat16;
  }
  cpu::TokenView operator[](int64_t b) const {
    cpu::TokenView view = view_;
    view.data = data_ + b * image_stride_;
    return view;
  }

 private:
  const char* data_;
  int64_t image_stride_;
  cpu::TokenView view_;
};

// A (B, N) array; a batch of 1 serves every image.
template <typename T>
class Rows {
 public:
  explicit Rows(const Array<T>& array)
      : stride(array.strides(1) / static_cast<int64_t>(sizeof(T))),
        data_(array.data()),
        image_stride_(array.shape(0) == 1 ? 0 : array.strides(0) / static_cast<int64_t>(sizeof(T))) {}
  const T* operator[](int64_t b) const { return data_ + b * image_stride_; }

  int64_t stride;

 private:
  const T* data_;
  int64_t image_stride_;
};

class Queries {
 public:
  Queries(const py::array& query, const std::optional<Array<bool>>& mask) : vectors_(query) {
    if (mask.has_value()) mask_.emplace(*mask);
  }
  cpu::Query operator[](int64_t b) const {
    cpu::Query query{vectors_[b], nullptr, 0};
    if (mask_.has_value()) {
      query.mask = (*mask_)[b];
      query.mask_stride = mask_->stride;
    }
    return query;
  }

 private:
  Images vectors_;
  std::optional<Rows<bool>> mask_;
};

Array<float> query_relevance(const py::array& tokens, const py::array& query,
                             const std::optional<Array<bool>>& query_mask, bool negate) {
  const int64_t batch = tokens.shape(0), n = tokens.shape(1);
  Array<float> out({batch, n});
  float* relevance = out.mutable_data();
  const Images images(tokens);
  const Queries queries(query, query_mask);
  py::gil_scoped_release release;
  for (int64_t b = 0; b < batch; ++b) {
    cpu::query_relevance(images[b], queries[b], negate, relevance + b * n, cpu::serial);
  }
  return out;
}

std::pair<Array<bool>, Array<float>> gsp(const py::array& tokens, int64_t keep, double threshold, double gamma,
                                         int64_t min_degree, int64_t rounds) {
  const int64_t batch = tokens.shape(0), n = tokens.shape(1);
  Array<bool> mask({batch, n});
  Array<float> redundancy({batch, n});
  bool* mask_data = mask.mutable_data();
  float* redundancy_data = redundancy.mutable_data();
  const Images images(tokens);
  py::gil_scoped_release release;
  for (int64_t b = 0; b < batch; ++b) {
    cpu::gsp(images[b], keep, cpu::gsp_options(threshold, gamma, min_degree, rounds), mask_data + b * n,
             redundancy_data + b * n, cpu::serial);
  }
  return {mask, redundancy};
}

std::pair<Array<int64_t>, Array<float>> qcsp(const py::array& tokens, const Array<float>& relevance, int64_t k) {
  const int64_t batch = tokens.shape(0);
  Array<int64_t> indices({batch, k});
  Array<float> gains({batch, k});
  int64_t* indices_data = indices.mutable_data();
  float* gains_data = gains.mutable_data();
  const Images images(tokens);
  const Rows<float> weights(relevance);
  py::gil_scoped_release release;
  for (int64_t b = 0; b < batch; ++b) {
    cpu::qcsp(images[b], weights[b], weights.stride, k, indices_data + b * k, gains_data + b * k, cpu::serial);
  }
  return {indices, gains};
}

Array<int64_t> mask_intersect(const Array<int64_t>& ranking, const Array<bool>& mask, int64_t k) {
  const int64_t batch = ranking.shape(0), length = ranking.shape(1), n = mask.shape(1);
  Array<int64_t> out({batch, k});
  int64_t* kept = out.mutable_data();
  const Rows<int64_t> rankings(ranking);
  const Rows<bool> masks(mask);
  py::gil_scoped_release release;
  for (int64_t b = 0; b < batch; ++b) {
    cpu::check_ranking(rankings[b], rankings.stride, length, n);
    cpu::mask_intersect(rankings[b], rankings.stride, length, masks[b], masks.stride, k, kept + b * k);
  }
  return out;
}

Array<int64_t> prune(const py::array& tokens, const std::optional<py::array>& query, int64_t keep,
                     const std::optional<py::array>& aligned, const std::optional<Array<bool>>& query_mask, bool negate,
                     double gsp_drop, double oversample, bool restrict, double threshold, double gamma,
                     int64_t min_degree, int64_t rounds) {
  const int64_t batch = tokens.shape(0), n = tokens.shape(1);
  Array<int64_t> out({batch, keep});
  int64_t* kept = out.mutable_data();
  const Images images(tokens);
  std::optional<Queries> queries;
  if (query.has_value()) queries.emplace(*query, query_mask);
  std::optional<Images> aligned_images;
  if (aligned.has_value()) aligned_images.emplace(*aligned);
  const cpu::PruneOptions options = cpu::prune_options(n, keep, gsp_drop, oversample, restrict,
                                                       cpu::gsp_options(threshold, gamma, min_degree, rounds));
  py::gil_scoped_release release;
  for (int64_t b = 0; b < batch; ++b) {
    std::optional<cpu::Query> image_query;
    if (queries.has_value()) image_query = (*queries)[b];
    std::optional<cpu::TokenView> image_aligned;
    if (aligned_images.has_value()) image_aligned = (*aligned_images)[b];
    cpu::prune(images[b], image_aligned, image_query, negate, options, kept + b * keep, cpu::serial);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build facts, and the CPU cores of the ops on NumPy arrays; script_kernels.numpy is their public face.";
  m.def("build_info", &build_info,
        "compiler, torch built against, SIMD level in use on this CPU, CUDA architectures of the build (empty: none).");
  m.def("query_relevance", &query_relevance);
  m.def("gsp", &gsp);
  m.def("qcsp", &qcsp);
  m.def("mask_intersect", &mask_intersect);
  m.def("prune", &prune);
}
