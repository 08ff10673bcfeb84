// A loop that several threads work on, whoever they belong to.
#pragma once

#include <algorithm>
#include <atomic>
#include <ctime>
#include <exception>
#include <mutex>

#include "parallel.hpp"
#include "thread_account.hpp"

namespace script::cpu {

// Threads take chunks, one after the other, until none is left: who comes late, or is slow, has fewer of them.
class SharedLoop {
 public:
  SharedLoop(int64_t count, int64_t threads, const Body& body)
      : count_(count), chunk_(std::max<int64_t>(1, count / (kChunks * threads))), body_(body) {}

  // What each of the threads does.
  void work() noexcept {
    const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
    for (int64_t begin; (begin = next_.fetch_add(chunk_)) < count_;) {
      try {
        body_(begin, std::min(begin + chunk_, count_));
      } catch (...) {
        fail(begin);
      }
    }
    busy_ += static_cast<int64_t>(1e9 * (seconds(CLOCK_THREAD_CPUTIME_ID) - start));
  }

  // When all have ended: throws the first exception, in the order of the items.
  void end() const {
    if (error_) std::rethrow_exception(error_);
  }

  // Seconds of processors that all took together.
  double busy() const { return 1e-9 * static_cast<double>(busy_); }

  static double seconds(clockid_t clock) {
    timespec time{};
    clock_gettime(clock, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }

 private:
  static constexpr int64_t kChunks = 16;  // of a thread

  // No chunk is begun any more. What comes before this one has been.
  void fail(int64_t begin) {
    next_ = count_;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error_ && begin > failed_at_) return;
    error_ = std::current_exception();
    failed_at_ = begin;
  }

  const int64_t count_, chunk_;
  const Body& body_;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> busy_{0};  // ns
  std::mutex mutex_;
  std::exception_ptr error_;
  int64_t failed_at_ = 0;
};

// Runs the body over [0, count), of items of `work` multiply-adds, on as many threads, of `limit` at most, as there are
// `least` of them for each: run(threads, share) calls share() on so many, its own among them, and returns when all have
// ended. Where that has not paid lately, and not `always`, nobody else is asked.
template <typename Run>
void share_loop(int64_t count, int64_t work, int64_t least, int64_t limit, const Body& body, const Run& run,
                bool always = false) {
  thread_local ThreadAccount account;
  const int64_t threads = std::min(limit, ceil_div(count, grain_for(work, least)));
  if (threads <= 1) return serial(count, work, body);
  const void* place = work == kWorthAThread ? nullptr : &body.target_type();
  const double start = SharedLoop::seconds(CLOCK_MONOTONIC);
  const double total = static_cast<double>(count) * static_cast<double>(work);
  if (!always && !account.open(start, place)) {
    serial(count, work, body);
    return account.enter_alone(place, total, SharedLoop::seconds(CLOCK_MONOTONIC) - start);
  }
  SharedLoop loop(count, threads, body);
  run(threads, [&] { loop.work(); });
  const double now = SharedLoop::seconds(CLOCK_MONOTONIC);
  account.enter(now, place, total, loop.busy(), now - start);
  loop.end();
}

}  // namespace script::cpu
