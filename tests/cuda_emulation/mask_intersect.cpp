// Runs the CUDA kernel of mask_intersect on the CPU: reads cases from standard input and writes each one's output.
//
//   input, per case: 10 int64 (order, seed, batch, tokens, length, keep, the strides of the ranking and of the mask),
//   then the ranking and the mask, each as its storage's length (int64) and its elements
//   output, per case: batch * keep int64
#include "../../csrc/cuda/mask_intersect.cuh"

#include <cstdio>
#include <memory>
#include <vector>

namespace {

template <typename T>
void read(T* values, size_t count) {
  if (std::fread(values, sizeof(T), count, stdin) != count) emulation::fail("the input ends inside a case");
}

// Exactly as large as the data, so that AddressSanitizer sees the first element outside.
template <typename T>
std::unique_ptr<T[]> read_array() {
  int64_t count = 0;
  read(&count, 1);
  auto values = std::make_unique<T[]>(count);
  read(values.get(), count);
  return values;
}

}  // namespace

int main() {
  int64_t header[10];
  while (std::fread(header, sizeof(int64_t), 10, stdin) == 10) {
    const auto [order, seed, batch, tokens, length, keep, ranking_image, ranking_entry, mask_image, mask_token] =
        header;
    const auto ranking = read_array<int64_t>();
    const auto mask = read_array<uint8_t>();
    const auto out = std::make_unique<int64_t[]>(batch * keep);
    std::fill_n(out.get(), batch * keep, int64_t{-1});

    emulation::set_schedule({static_cast<emulation::Order>(order), static_cast<unsigned>(seed)});
    const script::cuda::MaskIntersectArgs args = {
        ranking.get(),           mask.get(), out.get(), tokens, length, keep, {ranking_image, ranking_entry},
        {mask_image, mask_token}};
    if (script::cuda::launch_mask_intersect(args, batch, nullptr) != cudaSuccess)
      emulation::fail("the launch was refused");
    std::fwrite(out.get(), sizeof(int64_t), batch * keep, stdout);
  }
}
