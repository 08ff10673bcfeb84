// Threads of our own, for callers that bring none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include "parallel.hpp"

namespace script::cpu {

// Threads that live for one loop; no piece is worth one that would not outlast its start by far (see grain_for). A loop
// within a piece runs in line. The first exception, by pieces, is thrown when all have ended.
inline Threads loop_threads(int64_t limit) {
  static thread_local bool inside_loop = false;
  const auto parallel = [limit](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    const int64_t pieces = inside_loop ? 1 : std::min(limit, (count + grain - 1) / grain);
    if (pieces <= 1) return serial(count, grain, body);
    std::vector<std::exception_ptr> errors(static_cast<size_t>(pieces));
    const auto run = [&](int64_t piece) {
      inside_loop = true;
      try {
        body(count * piece / pieces, count * (piece + 1) / pieces);
      } catch (...) {
        errors[static_cast<size_t>(piece)] = std::current_exception();
      }
      inside_loop = false;
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(pieces - 1));
    int64_t next = 1;
    try {
      for (; next < pieces; ++next) others.emplace_back(run, next);
    } catch (...) {  // no more threads, or no memory for one: this one does the rest, and those that run are waited for
    }
    run(0);
    for (; next < pieces; ++next) run(next);
    for (std::thread& other : others) other.join();
    for (const std::exception_ptr& error : errors) {
      if (error) std::rethrow_exception(error);
    }
  };
  return {limit, parallel};
}

}  // namespace script::cpu
