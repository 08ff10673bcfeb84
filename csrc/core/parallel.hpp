// How a core asks for threads without knowing whose they are, and the loop over the images of a batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

namespace script::cpu {

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a loop does with its items from `begin` up to `end`.
using Body = std::function<void(int64_t begin, int64_t end)>;

// Runs the body over [0, count), maybe in parallel, in pieces that are each worth a thread: an item takes `work`
// multiply-adds (moving a value counts as a few). Nested calls run in line. Bodies write disjoint outputs, and their
// results do not depend on where the pieces end.
using Parallel = std::function<void(int64_t count, int64_t work, const Body& body)>;

// The work of an item that is worth a thread by itself.
inline constexpr int64_t kWorthAThread = std::numeric_limits<int64_t>::max();

// Items that make a piece of `least` multiply-adds or more.
inline int64_t grain_for(int64_t work, int64_t least) {
  return work >= least ? 1 : ceil_div(least, std::max<int64_t>(1, work));
}

inline void serial(int64_t count, int64_t, const Body& body) {
  if (count > 0) body(0, count);
}

// Somebody's threads, with what they may be given.
struct Threads {
  int64_t count = 1;
  Parallel parallel = serial;
};

// body(b) for each item of a batch; `work`: see Parallel.
template <class OfItem>
void for_each_item(int64_t batch, int64_t work, const Threads& threads, const OfItem& body) {
  threads.parallel(batch, work, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b);
  });
}

// body(b, parallel) for each image: threads go to the images where there are enough of them, else into one image after
// the other. The bits do not depend on it.
template <class OfImage>
void for_each_image(int64_t batch, const Threads& threads, const OfImage& body) {
  if (2 * batch > threads.count && batch > 1) {
    for_each_item(batch, kWorthAThread, threads, [&](int64_t b) { body(b, serial); });
  } else {
    for (int64_t b = 0; b < batch; ++b) body(b, threads.parallel);
  }
}

}  // namespace script::cpu
