// mask_intersect on CUDA: checks, device, stream, launch and registration.
#include "cuda/mask_intersect.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "faces/torch_checks.hpp"

namespace script {
namespace {

void check_launch(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here: PyTorch's next check must not report it again
  throw std::runtime_error(text("mask_intersect: launch failed: ", cudaGetErrorString(status)));
}

Tensor mask_intersect_cuda(const Tensor& ranking, const Tensor& mask, int64_t k) {
  check_mask_intersect(ranking, mask, k);
  const int32_t device = ranking.get_device_index();
  // Puts the caller's device back when it goes out of scope.
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(ranking, {ranking.size(0), k});

  cuda::MaskIntersectArgs args = {};
  args.ranking = static_cast<const int64_t*>(ranking.const_data_ptr());
  args.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  args.out = static_cast<int64_t*>(out.mutable_data_ptr());
  args.tokens = mask.size(1);
  args.length = ranking.size(1);
  args.keep = k;
  for (int dim = 0; dim < 2; ++dim) {
    args.ranking_stride[dim] = ranking.stride(dim);
    args.mask_stride[dim] = mask.stride(dim);
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  check_launch(cuda::launch_mask_intersect(args, ranking.size(0), static_cast<cudaStream_t>(stream)));
  return out;
}

}  // namespace
}  // namespace script

STABLE_TORCH_LIBRARY_IMPL(script, CUDA, ops) { ops.impl("mask_intersect", TORCH_BOX(&script::mask_intersect_cuda)); }
