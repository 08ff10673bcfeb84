// How a core asks for threads without knowing whose they are: torch's pool for the ops, none by default.
#pragma once

#include <cstdint>
#include <functional>

namespace script::cpu {

// Runs body(begin, end) over [0, count) in pieces of at least `grain`, maybe in parallel; nested calls run in line.
// Bodies write disjoint outputs and their results do not depend on where the pieces end.
using Parallel = std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

inline void serial(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (count > 0) body(0, count);
}

}  // namespace script::cpu
