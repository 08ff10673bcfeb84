// Small kernels that show what the emulation executes and what it catches: `primitives NAME ORDER SEED`. A sound kernel
// checks its own result and prints "ok"; a faulty one is named for its fault and must not get that far everywhere.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kThreads = 96;

void expect(bool condition, const char* what) {
  if (!condition) emulation::fail("%s does not hold", what);
}
#define EXPECT(condition) expect(condition, #condition)

template <typename Kernel, typename... Arguments>
void run(Kernel kernel, int blocks, int threads, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  EXPECT(cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess);
}

__global__ void shuffles_kernel() {
  const int lane = threadIdx.x % 32;
  EXPECT(__shfl_sync(kFull, lane * 10, 7) == 70);
  EXPECT(__shfl_sync(kFull, lane, 3, 8) == lane / 8 * 8 + 3);
  EXPECT(__shfl_up_sync(kFull, lane, 2) == (lane < 2 ? lane : lane - 2));
  EXPECT(__shfl_up_sync(kFull, lane, 2, 16) == (lane % 16 < 2 ? lane : lane - 2));
  EXPECT(__shfl_down_sync(kFull, lane, 5) == (lane > 26 ? lane : lane + 5));
  EXPECT(__shfl_xor_sync(kFull, lane * 0.5, 9) == (lane ^ 9) * 0.5);
  if (lane % 2 == 0) EXPECT(__shfl_down_sync(0x55555555u, lane, 2) == (lane > 29 ? lane : lane + 2));
}

__global__ void votes_kernel() {
  const int lane = threadIdx.x % 32;
  EXPECT(__ballot_sync(kFull, lane % 3 == 0) == 0x49249249u);
  EXPECT(__any_sync(kFull, lane == 31));
  EXPECT(!__any_sync(kFull, lane == 32));
  EXPECT(!__all_sync(kFull, lane != 31));
  if (lane < 8) EXPECT(__ballot_sync(0xffu, lane > 5) == 0xc0u);
}

__global__ void barriers_kernel(int* out) {
  __shared__ int values[kThreads];
  const int thread = threadIdx.x;
  values[thread] = thread + static_cast<int>(blockIdx.x);
  EXPECT(__syncthreads_count(thread % 3 == 0) == kThreads / 3);
  EXPECT(__syncthreads_or(thread == 5));
  EXPECT(!__syncthreads_and(thread != 5));
  for (int half = kThreads / 2; half >= 3; half /= 2) {
    if (thread < half) values[thread] += values[thread + half];
    __syncthreads();
  }
  if (thread == 0) out[blockIdx.x] = values[0] + values[1] + values[2];
}

__global__ void atomics_kernel(unsigned* sums, unsigned long long* bits) {
  const unsigned thread = threadIdx.x + blockIdx.x * blockDim.x;
  atomicAdd(&sums[0], thread);
  atomicMax(&sums[1], thread);
  atomicMin(&sums[2], thread);
  atomicOr(bits, 1ull << (thread % 64));
  if (atomicCAS(&sums[3], 0u, 1u) == 0u) atomicAdd(&sums[4], 1u);
}

__global__ void warp_exchange_kernel(int skip_sync) {
  __shared__ int values[kThreads];
  const int thread = threadIdx.x;
  values[thread] = thread;
  if (skip_sync == 0) __syncwarp();
  EXPECT(values[thread ^ 1] == (thread ^ 1));
}

__global__ void missing_barrier_kernel() {
  __shared__ int values[kThreads];
  const int thread = threadIdx.x;
  values[thread] = thread;
  // A shuffle meets the whole warp but orders no memory, and the neighbour may be of another warp.
  __shfl_sync(kFull, thread, 0);
  EXPECT(values[kThreads - 1 - thread] == kThreads - 1 - thread);
}

// Each thread reads what the thread before it wrote: right when threads happen to run in ascending order.
__global__ void hidden_race_kernel() {
  __shared__ int values[kThreads];
  const int thread = threadIdx.x;
  values[thread] = thread;
  if (thread > 0) EXPECT(values[thread - 1] == thread - 1);
}

__global__ void unwritten_shared_kernel() {
  __shared__ int sum;
  atomicAdd(&sum, 1);
  __syncthreads();
  EXPECT(sum == kThreads);
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void ended_lane_kernel() {
  if (threadIdx.x % 32 == 9) return;
  __ballot_sync(kFull, 1);
}

__global__ void foreign_lane_kernel() { __ballot_sync(0xffff0000u, 1); }

__global__ void divergent_warp_kernel() {
  if (threadIdx.x % 2 == 0) {
    __shfl_sync(kFull, 1, 0);
  } else {
    __shfl_sync(kFull, 2, 0);
  }
}

__global__ void deadlock_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else if (threadIdx.x % 32 < 16)
    __syncwarp();
  else
    __syncthreads();
}

__global__ void outside_shared_kernel(int distance) {
  __shared__ int values[kThreads];
  *(values + threadIdx.x + distance) = 1;
}

__global__ void outside_global_kernel(int* out) { out[threadIdx.x + 1] = 1; }

void barriers() {
  int out[3] = {};
  run(barriers_kernel, 3, kThreads, static_cast<int*>(out));
  for (int block = 0; block < 3; ++block) EXPECT(out[block] == kThreads * (kThreads - 1) / 2 + kThreads * block);
}

void atomics() {
  unsigned sums[5] = {0, 0, 1000, 0, 0};
  unsigned long long bits = 0;
  run(atomics_kernel, 2, kThreads, static_cast<unsigned*>(sums), &bits);
  EXPECT(sums[0] == 192 * 191 / 2 && sums[1] == 191 && sums[2] == 0 && sums[3] == 1 && sums[4] == 1);
  EXPECT(bits == ~0ull);
}

void refused_launch() {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(1025);
  EXPECT(cudaLaunchKernelEx(&config, votes_kernel) == cudaErrorInvalidConfiguration);
}

void outside_global() {
  const auto out = std::make_unique<int[]>(kThreads);
  run(outside_global_kernel, 1, kThreads, out.get());
}

const std::map<std::string, void (*)()> kPrograms = {
    {"shuffles", [] { run(shuffles_kernel, 2, kThreads); }},
    {"votes", [] { run(votes_kernel, 2, kThreads); }},
    {"barriers", barriers},
    {"atomics", atomics},
    {"warp_exchange", [] { run(warp_exchange_kernel, 2, kThreads, 0); }},
    {"refused_launch", refused_launch},
    {"missing_syncwarp", [] { run(warp_exchange_kernel, 1, kThreads, 1); }},
    {"missing_barrier", [] { run(missing_barrier_kernel, 1, kThreads); }},
    {"hidden_race", [] { run(hidden_race_kernel, 1, kThreads); }},
    {"unwritten_shared", [] { run(unwritten_shared_kernel, 1, kThreads); }},
    {"divergent_barrier", [] { run(divergent_barrier_kernel, 1, kThreads); }},
    {"two_barriers", [] { run(two_barriers_kernel, 1, kThreads); }},
    {"ended_lane", [] { run(ended_lane_kernel, 1, kThreads); }},
    {"foreign_lane", [] { run(foreign_lane_kernel, 1, kThreads); }},
    {"divergent_warp", [] { run(divergent_warp_kernel, 1, kThreads); }},
    {"deadlock", [] { run(deadlock_kernel, 1, kThreads); }},
    {"outside_shared", [] { run(outside_shared_kernel, 1, kThreads, 1); }},
    {"outside_global", outside_global},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) emulation::fail("usage: primitives NAME ORDER SEED");
  emulation::set_schedule(
      {static_cast<emulation::Order>(std::atoi(argv[2])), static_cast<unsigned>(std::atoi(argv[3]))});
  kPrograms.at(argv[1])();
  std::puts("ok");
}
