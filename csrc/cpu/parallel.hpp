// How a core asks for threads without knowing whose they are: torch's pool for the ops, none by default.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "simd.hpp"

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

}  // namespace script::cpu
