// What the CPU ops need to hand stable-ABI tensors to the torch-free cores: views, outputs and torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <exception>
#include <optional>

#include "cpu/parallel.hpp"
#include "cpu/query_relevance.hpp"
#include "cpu/tokens.hpp"

namespace script {

// The core's name of a floating dtype; the checks have let through no other.
inline cpu::DType core_dtype(const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return cpu::DType::kFloat16;
    default:
      return cpu::DType::kFloat32;
  }
}

// Rows [begin, end) of a (T, D) tensor.
inline cpu::TokenView rows_view(const torch::stable::Tensor& rows, int64_t begin, int64_t end) {
  cpu::TokenView view;
  view.dtype = core_dtype(rows);
  view.count = end - begin;
  view.width = rows.size(1);
  view.row_stride = rows.stride(0);
  view.column_stride = rows.stride(1);
  const int64_t offset = begin * view.row_stride * static_cast<int64_t>(rows.element_size());
  view.data = static_cast<const char*>(rows.const_data_ptr()) + offset;
  return view;
}

// Image b of a (B, N, D) tensor; a batch of 1 serves every b.
inline cpu::TokenView image_view(const torch::stable::Tensor& images, int64_t b) {
  cpu::TokenView view;
  view.dtype = core_dtype(images);
  view.count = images.size(1);
  view.width = images.size(2);
  view.row_stride = images.stride(1);
  view.column_stride = images.stride(2);
  const int64_t image = images.size(0) == 1 ? 0 : b;
  const int64_t offset = image * images.stride(0) * static_cast<int64_t>(images.element_size());
  view.data = static_cast<const char*>(images.const_data_ptr()) + offset;
  return view;
}

// A query (B or 1, Q, C) and its mask, by image.
class QueryRows {
 public:
  QueryRows(const torch::stable::Tensor& query, const std::optional<torch::stable::Tensor>& mask)
      : query_(query), mask_(mask) {}

  cpu::Query image(int64_t b) const {
    cpu::Query query;
    query.vectors = image_view(query_, b);
    if (mask_.has_value()) {
      query.mask = mask_->const_data_ptr<bool>() + (mask_->size(0) == 1 ? 0 : b) * mask_->stride(0);
      query.mask_stride = mask_->stride(1);
    }
    return query;
  }

 private:
  const torch::stable::Tensor& query_;
  const std::optional<torch::stable::Tensor>& mask_;
};

// A new contiguous tensor, uninitialised.
inline torch::stable::Tensor empty_cpu(std::initializer_list<int64_t> shape, torch::headeronly::ScalarType dtype) {
  return torch::stable::empty({shape.begin(), shape.size()}, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// cpu::Parallel on torch's pool. The pool's C interface turns an exception into a status code and loses it, so the
// first one is carried around it.
inline void torch_parallel(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// body(b) for each item of the batch, in parallel.
template <class Body>
void for_each_item(int64_t batch, const Body& body) {
  torch_parallel(batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b);
  });
}

// body(b, parallel) for each image: threads go to the images where there are enough of them, else into one image after
// the other. The bits do not depend on it.
template <class Body>
void for_each_image(int64_t batch, const Body& body) {
  if (2 * batch > static_cast<int64_t>(torch::stable::get_num_threads()) && batch > 1) {
    for_each_item(batch, [&](int64_t b) { body(b, cpu::serial); });
  } else {
    for (int64_t b = 0; b < batch; ++b) body(b, torch_parallel);
  }
}

}  // namespace script
