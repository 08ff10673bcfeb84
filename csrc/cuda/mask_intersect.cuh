// Intersection of a ranking with a mask, one thread block per image.
//
//   ranking (batch, length) int64, best first; mask (batch, tokens) bool; out (batch, keep) int64, ascending.
//   Chosen: the first `keep` ranking entries whose token is in the mask; if there are fewer, all of them and then the
//   first entries outside the mask.
//
// Two cuts describe the choice: an entry in the mask is chosen if it stands before `members`, one outside it if it
// stands before `others`. They cost one or two scans over the ranking; after that each entry is judged alone, so the
// tokens can be marked in a bitmap in shared memory, window after window for any number of tokens, and counting set
// bits puts them in ascending order without a sort.
//
// A valid ranking holds distinct tokens in [0, tokens). Any other is memory-safe and still gives `keep` distinct
// tokens: entries out of range are never chosen, and where repeats or such entries leave the choice short, the lowest
// tokens that are not yet chosen complete it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Tokens are marked in windows of 32 * SCRIPT_MASK_WINDOW_WORDS; tests shrink the window to see several of them.
#ifndef SCRIPT_MASK_WINDOW_WORDS
#define SCRIPT_MASK_WINDOW_WORDS 2048
#endif

namespace script::cuda {

struct MaskIntersectArgs {
  const int64_t* ranking;
  const uint8_t* mask;  // what is not 0 is true
  int64_t* out;
  int64_t tokens;
  int64_t length;
  int64_t keep;
  int64_t ranking_stride[2];  // in elements: image, entry
  int64_t mask_stride[2];     // in elements: image, token
};

namespace mask_intersect {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWindowWords = SCRIPT_MASK_WINDOW_WORDS;
constexpr int64_t kWindowTokens = int64_t{32} * kWindowWords;

enum class Entry { kMember, kOther, kInvalid };

struct Cuts {
  int64_t members;
  int64_t others;
};

struct Cut {
  int64_t position;  // one past the last entry wanted, or the ranking's length if there are fewer
  int64_t found;     // at least the number wanted, or all there are
};

// Exclusive prefix over the block, and the block's total.
struct BlockSum {
  int before;
  int total;
};

struct Image {
  const int64_t* ranking;
  const uint8_t* mask;  // what is not 0 is true
  int64_t* out;
};

static __device__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int below = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// Adds up warp totals with one barrier per call. The totals alternate between two buffers: a warp that is already in
// the next call must not overwrite what a slower warp is still reading.
class BlockScan {
 public:
  __device__ explicit BlockScan(int (*warp_totals)[kWarp]) : warp_totals_(warp_totals) {}

  // The sum of `value` over the threads before this one.
  __device__ BlockSum sum(int value) {
    const int inclusive = warp_inclusive_sum(value);
    return across_warps(inclusive - value, __shfl_sync(kFullWarp, inclusive, kWarp - 1));
  }

  // The number of threads before this one with `flag`.
  __device__ BlockSum count(bool flag) {
    const unsigned votes = __ballot_sync(kFullWarp, flag);
    const unsigned lower_lanes = (1u << (threadIdx.x % kWarp)) - 1;
    return across_warps(__popc(votes & lower_lanes), __popc(votes));
  }

 private:
  __device__ BlockSum across_warps(int before_in_warp, int warp_total) {
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    int* totals = warp_totals_[parity_];
    parity_ ^= 1;
    if (lane == 0) totals[warp] = warp_total;
    __syncthreads();
    const int warps = blockDim.x / kWarp;
    const int inclusive = warp_inclusive_sum(lane < warps ? totals[lane] : 0);
    const int total = __shfl_sync(kFullWarp, inclusive, kWarp - 1);
    const int through_warp = __shfl_sync(kFullWarp, inclusive, warp);
    return {through_warp - warp_total + before_in_warp, total};
  }

  int (*warp_totals_)[kWarp];
  int parity_ = 0;
};

static __device__ Entry classify(const MaskIntersectArgs& args, const Image& image, int64_t token) {
  if (token < 0 || token >= args.tokens) return Entry::kInvalid;
  return image.mask[token * args.mask_stride[1]] != 0 ? Entry::kMember : Entry::kOther;
}

// Where the first `wanted` entries of class `entry` end.
static __device__ Cut find_cut(const MaskIntersectArgs& args, const Image& image, Entry entry, int64_t wanted,
                               BlockScan& scan, int64_t* position) {
  int64_t found = 0;
  for (int64_t start = 0; start < args.length && found < wanted; start += blockDim.x) {
    const int64_t place = start + threadIdx.x;
    const bool hit =
        place < args.length && classify(args, image, image.ranking[place * args.ranking_stride[1]]) == entry;
    const BlockSum hits = scan.count(hit);
    if (hit && found + hits.before == wanted - 1) *position = place + 1;
    found += hits.total;
  }
  __syncthreads();
  return {found >= wanted ? *position : args.length, found};
}

// Writes the chosen tokens in ascending order, and with them the lowest `missing` tokens that are not chosen. Returns
// the number of chosen tokens.
static __device__ int64_t write_ascending(const MaskIntersectArgs& args, const Image& image, const Cuts& cuts,
                                          int64_t missing, BlockScan& scan, unsigned* bitmap) {
  const int64_t last_cut = cuts.members > cuts.others ? cuts.members : cuts.others;
  int64_t chosen = 0;
  for (int64_t window = 0; window < args.tokens; window += kWindowTokens) {
    const int64_t left = (args.tokens - window + 31) / 32;
    const int words = left < kWindowWords ? static_cast<int>(left) : kWindowWords;
    for (int word = threadIdx.x; word < words; word += blockDim.x) bitmap[word] = 0;
    __syncthreads();

    for (int64_t place = threadIdx.x; place < last_cut; place += blockDim.x) {
      const int64_t token = image.ranking[place * args.ranking_stride[1]];
      if (token < window || token >= window + kWindowTokens) continue;
      const Entry entry = classify(args, image, token);
      const bool take =
          (entry == Entry::kMember && place < cuts.members) || (entry == Entry::kOther && place < cuts.others);
      if (take) atomicOr(&bitmap[(token - window) / 32], 1u << (token % 32));
    }
    __syncthreads();

    // Each word is cleared for the next window by the thread that reads it here: no barrier in between.
    for (int first = 0; first < words; first += blockDim.x) {
      const int word = first + threadIdx.x;
      unsigned bits = word < words ? bitmap[word] : 0;
      const BlockSum ones = scan.sum(__popc(bits));
      if (word < words) {
        const int64_t first_token = window + int64_t{32} * word;
        const int64_t chosen_before = chosen + ones.before;
        const int64_t added_before = min(first_token - chosen_before, missing);
        for (int64_t add = min(missing - added_before, int64_t{32} - __popc(bits)); add > 0; --add) bits |= bits + 1;
        for (int64_t* next = image.out + chosen_before + added_before; bits != 0; bits &= bits - 1)
          *next++ = first_token + __ffs(static_cast<int>(bits)) - 1;
      }
      chosen += ones.total;
    }
  }
  return chosen;
}

static __global__ void __launch_bounds__(kMaxThreads) select_kernel(MaskIntersectArgs args) {
  __shared__ unsigned bitmap[kWindowWords];
  __shared__ int warp_totals[2][kWarp];
  __shared__ int64_t position;

  const int64_t index = blockIdx.x;
  const Image image = {args.ranking + index * args.ranking_stride[0], args.mask + index * args.mask_stride[0],
                       args.out + index * args.keep};
  BlockScan scan(warp_totals);

  const Cut members = find_cut(args, image, Entry::kMember, args.keep, scan, &position);
  Cuts cuts = {members.position, 0};
  // Only a ranking with too few members needs the second scan, so nobody still reads `position` when it is written
  // again.
  if (members.found < args.keep)
    cuts.others = find_cut(args, image, Entry::kOther, args.keep - members.found, scan, &position).position;

  const int64_t chosen = write_ascending(args, image, cuts, 0, scan, bitmap);
  if (chosen < args.keep) write_ascending(args, image, cuts, args.keep - chosen, scan, bitmap);
}

}  // namespace mask_intersect

// Starts the kernel on `stream` of the current device. Needs 1 <= keep <= length <= tokens; batch may be 0.
static inline cudaError_t launch_mask_intersect(const MaskIntersectArgs& args, int64_t batch, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  if (batch > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t full_warps = (args.length + mask_intersect::kWarp - 1) / mask_intersect::kWarp * mask_intersect::kWarp;
  const int64_t threads = full_warps < mask_intersect::kMaxThreads ? full_warps : mask_intersect::kMaxThreads;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(batch));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, mask_intersect::select_kernel, args);
}

}  // namespace script::cuda
