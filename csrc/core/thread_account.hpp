// Whether threads pay. On a machine that others use, a core is taken away for milliseconds at a time, and a loop that
// was split waits for its slowest piece: then it takes longer than one thread would have, every time. So whoever
// splits loops keeps an account of what that saved and cost, and leaves it for a while when it costs.
#pragma once

#include <algorithm>
#include <atomic>
#include <ctime>

#include "parallel.hpp"

namespace script::cpu {

// The account of one thread that asks others for help. All times in seconds.
class ThreadAccount {
 public:
  // Whether a loop that starts now may be split.
  bool open(double now) const { return now >= closed_until_; }

  // A split loop took `took`; alone, it would have taken `alone`.
  void enter(double now, double alone, double took) {
    balance_ = std::min(balance_ + alone - took, kMost);
    if (balance_ >= kMost) pause_ = std::max(pause_ / 2.0, kShortest);
    if (balance_ > -kMost) return;
    // Every try costs about as much: the longer it has not paid, the rarer they are.
    closed_until_ = now + pause_;
    pause_ = std::min(4.0 * pause_, kLongest);
    balance_ = 0.0;
  }

 private:
  static constexpr double kMost = 1e-3;  // gains are not saved up past this; as large a debt closes the account
  static constexpr double kShortest = 0.02, kLongest = 1.28;
  double balance_ = 0.0;
  double closed_until_ = 0.0;
  double pause_ = kShortest;
};

namespace detail {

inline double seconds(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace detail

// Runs body over [0, count) by split(body), which may give pieces to other threads, as long as that pays.
//
// What the loop would have taken alone is what its pieces took of processors: a thread that waits for one takes
// nothing.
template <typename Split>
void split_if_it_pays(int64_t count, const Body& body, const Split& split) {
  thread_local ThreadAccount account;
  const double start = detail::seconds(CLOCK_MONOTONIC);
  if (!account.open(start)) return body(0, count);
  std::atomic<int64_t> alone{0};  // ns
  split([&](int64_t begin, int64_t end) {
    const double before = detail::seconds(CLOCK_THREAD_CPUTIME_ID);
    body(begin, end);
    alone += static_cast<int64_t>(1e9 * (detail::seconds(CLOCK_THREAD_CPUTIME_ID) - before));
  });
  const double now = detail::seconds(CLOCK_MONOTONIC);
  account.enter(now, 1e-9 * static_cast<double>(alone), now - start);
}

}  // namespace script::cpu
