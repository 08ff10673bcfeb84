// Threads of our own, for callers that bring none.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#include "shared_loop.hpp"
#include "simd/simd.hpp"

namespace script::cpu {

// Pieces that are worth one of somebody's standing threads, for one that has to be started.
inline constexpr int64_t kLongerThanAStart = 80;

// Threads that live for one loop: each has to outlast its start by far. A loop within a loop runs in line. `always`:
// also while that does not pay.
inline Threads loop_threads(int64_t limit, bool always = false) {
  static thread_local bool inside_loop = false;
  const auto parallel = [limit, always](int64_t count, int64_t work, const Body& body) {
    const auto run = [](int64_t threads, const auto& share) {
      const auto inside = [&] {
        inside_loop = true;
        share();
        inside_loop = false;
      };
      std::vector<std::thread> others;
      others.reserve(static_cast<size_t>(threads - 1));
      try {
        while (static_cast<int64_t>(others.size()) < threads - 1) others.emplace_back(inside);
      } catch (...) {  // no more threads, or no memory for one: those that run do the rest
      }
      inside();
      for (std::thread& other : others) other.join();
    };
    share_loop(count, work, kLongerThanAStart * simd().thread_work, inside_loop ? 1 : limit, body, run, always);
  };
  return {limit, parallel};
}

}  // namespace script::cpu
