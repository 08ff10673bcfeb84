// Threads of our own, for callers that bring none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "parallel.hpp"
#include "simd/simd.hpp"
#include "thread_account.hpp"

namespace script::cpu {

inline constexpr int64_t kLongerThanAStart = 16;

// Threads that live for one loop: a piece has to outlast the start of its thread by far. A loop within a piece runs in
// line. The first exception, by pieces, is thrown when all have ended. `always`: also while that does not pay.
inline Threads loop_threads(int64_t limit, bool always = false) {
  static thread_local bool inside_loop = false;
  const auto parallel = [limit, always](int64_t count, int64_t work, const Body& body) {
    const int64_t grain = grain_for(work, kLongerThanAStart * simd().thread_work);
    const int64_t pieces = inside_loop ? 1 : std::min(limit, ceil_div(count, grain));
    if (pieces <= 1) return serial(count, work, body);
    const auto split = [&](const Body& piece_of_body) {
      std::vector<std::exception_ptr> errors(static_cast<size_t>(pieces));
      const auto run = [&](int64_t piece) {
        inside_loop = true;
        try {
          piece_of_body(count * piece / pieces, count * (piece + 1) / pieces);
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
      } catch (
          ...) {  // no more threads, or no memory for one: this one does the rest, and those that run are waited for
      }
      run(0);
      for (; next < pieces; ++next) run(next);
      for (std::thread& other : others) other.join();
      for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
      }
    };
    if (always) return split(body);
    split_if_it_pays(count, body, split);
  };
  return {limit, parallel};
}

}  // namespace script::cpu
