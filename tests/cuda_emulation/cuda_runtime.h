// A CUDA runtime for tests: kernels compiled by a host compiler and executed on one CPU thread.
//
// Put this folder first on the include path and a kernel's `#include <cuda_runtime.h>` finds this file. Every CUDA
// thread is a fiber; blocks run one after another. A fiber runs until it meets a barrier or a warp primitive, so the
// order of fibers is chosen by the scheduler (Schedule) and repeats exactly.
//
// Emulated: 1-D to 3-D grids and blocks, static __shared__ variables (filled with garbage before every block),
// __syncthreads and its _count/_and/_or forms, __syncwarp, shuffles, votes, the common atomics, cudaLaunchKernelEx.
// Not emulated: dynamic shared memory, thread-block clusters, cooperative grids, inline PTX, textures, asynchronous
// copies, memory order between blocks, and progress inside a spin loop.
//
// Stricter than the hardware: every thread of a block must reach a barrier at the same source line, an early exit of
// some threads is an error there, and every lane a warp primitive names must be alive and call it at the same line. A
// violation or a deadlock prints a message and ends the process with status 70. Under ThreadSanitizer the fibers are
// threads to it, and only barriers and __syncwarp order them (shuffles and votes promise no memory order): a missing
// barrier is reported as a data race whatever the schedule.
//
// __shared__ variables must live in functions with internal linkage that are not templates: g++ leaves the others out
// of the section that is filled with garbage.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

struct cudaLaunchAttribute {};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {

enum class Order { kForward, kReverse, kShuffled };

struct Schedule {
  Order order = Order::kForward;
  unsigned seed = 0;
};

// The schedule of every later launch. A shuffled one goes on drawing from the same seed.
void set_schedule(Schedule schedule);

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread_body);

uint3 thread_index();
uint3 block_index();
uint3 block_size();
uint3 grid_size();

template <uint3 (*get)()>
struct Coordinates {
  struct {
    operator unsigned() const { return get().x; }
  } x;
  struct {
    operator unsigned() const { return get().y; }
  } y;
  struct {
    operator unsigned() const { return get().z; }
  } z;
};

enum class BlockOp { kSync, kCount, kAnd, kOr };
int block_barrier(BlockOp op, int predicate, int line);

// Waits for every lane of `lanes` at the same line and returns the 32 values they brought, valid until the next call.
const uint64_t* warp_exchange(const char* name, unsigned lanes, uint64_t value, int line, bool orders_memory);
unsigned lane();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <typename T>
T shuffle(const char* name, unsigned lanes, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* brought = warp_exchange(name, lanes, bits, line, false);
  if (!(lanes >> source & 1u)) fail("%s at line %d reads lane %d, which the mask leaves out", name, line, source);
  T result;
  std::memcpy(&result, &brought[source], sizeof(T));
  return result;
}

}  // namespace emulation

// Objects, not macros: cudaLaunchConfig_t has members of the same names.
inline constexpr emulation::Coordinates<emulation::thread_index> threadIdx;
inline constexpr emulation::Coordinates<emulation::block_index> blockIdx;
inline constexpr emulation::Coordinates<emulation::block_size> blockDim;
inline constexpr emulation::Coordinates<emulation::grid_size> gridDim;

using std::max;
using std::min;

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline void __syncthreads(int line = __builtin_LINE()) { emulation::block_barrier(emulation::BlockOp::kSync, 0, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return emulation::block_barrier(emulation::BlockOp::kCount, predicate, line);
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return emulation::block_barrier(emulation::BlockOp::kAnd, predicate, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return emulation::block_barrier(emulation::BlockOp::kOr, predicate, line);
}

inline void __syncwarp(unsigned lanes = 0xffffffffu, int line = __builtin_LINE()) {
  emulation::warp_exchange("__syncwarp", lanes, 0, line, true);
}

inline unsigned __ballot_sync(unsigned lanes, int predicate, int line = __builtin_LINE()) {
  const uint64_t* brought = emulation::warp_exchange("__ballot_sync", lanes, predicate != 0, line, false);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1u) votes |= static_cast<unsigned>(brought[lane]) << lane;
  return votes;
}
inline int __any_sync(unsigned lanes, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(lanes, predicate, line) != 0;
}
inline int __all_sync(unsigned lanes, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(lanes, predicate, line) == lanes;
}

// A lane whose source lies outside its segment of `width` lanes gets its own value back, as on the hardware.
template <typename T>
T __shfl_sync(unsigned lanes, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int segment = static_cast<int>(emulation::lane()) & ~(width - 1);
  return emulation::shuffle("__shfl_sync", lanes, value, segment + (source & (width - 1)), line);
}
template <typename T>
T __shfl_up_sync(unsigned lanes, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane - static_cast<int>(delta);
  return emulation::shuffle("__shfl_up_sync", lanes, value, source < (lane & ~(width - 1)) ? lane : source, line);
}
template <typename T>
T __shfl_down_sync(unsigned lanes, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane + static_cast<int>(delta);
  return emulation::shuffle("__shfl_down_sync", lanes, value, source > (lane | (width - 1)) ? lane : source, line);
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, int width = 32, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane ^ mask;
  return emulation::shuffle("__shfl_xor_sync", lanes, value, source > (lane | (width - 1)) ? lane : source, line);
}

template <typename T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicAnd(T* address, T value) {
  return __atomic_fetch_and(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicExch(T* address, T value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicCAS(T* address, T expected, T desired) {
  __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <typename T>
T atomicMax(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen < value &&
         !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <typename T>
T atomicMin(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < seen &&
         !__atomic_compare_exchange_n(address, &seen, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulation::launch(*config, [=] { kernel(arguments...); });
}
