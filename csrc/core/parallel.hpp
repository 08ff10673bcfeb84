// How a core asks for threads without knowing whose they are, and the loop over the images of a batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "simd/simd.hpp"

namespace script::cpu {

// The grain for items of `work` multiply-adds each (moving a value counts as a few): a thread gets milliseconds of work
// or none. A shared machine may take a core away for that long, and whoever splits waits for the slowest. Images of a
// batch are shared out before this.
inline int64_t grain_for(int64_t work) { return std::max<int64_t>(1, simd().thread_work / std::max<int64_t>(1, work)); }

// Runs body(begin, end) over [0, count) in pieces of at least `grain`, maybe in parallel; nested calls run in line.
// Bodies write disjoint outputs and their results do not depend on where the pieces end.
using Parallel = std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

inline void serial(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (count > 0) body(0, count);
}

// Somebody's threads, with what they may be given.
struct Threads {
  int64_t count = 1;
  Parallel parallel = serial;
};

// body(b) for each item of a batch.
template <class Body>
void for_each_item(int64_t batch, const Threads& threads, const Body& body) {
  threads.parallel(batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b);
  });
}

// body(b, parallel) for each image: threads go to the images where there are enough of them, else into one image after
// the other. The bits do not depend on it.
template <class Body>
void for_each_image(int64_t batch, const Threads& threads, const Body& body) {
  if (2 * batch > threads.count && batch > 1) {
    for_each_item(batch, threads, [&](int64_t b) { body(b, serial); });
  } else {
    for (int64_t b = 0; b < batch; ++b) body(b, threads.parallel);
  }
}

}  // namespace script::cpu
