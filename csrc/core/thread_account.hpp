// Whether threads pay. On a machine that others use, a core is taken away for milliseconds at a time, and a loop that
// was split waits for its slowest piece: then it takes longer than one thread would have, every time. So whoever
// splits loops keeps an account of what that saved and cost, and leaves it for a while when it costs.
#pragma once

#include <algorithm>

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
    closed_until_ = now + std::clamp(-kRatio * balance_, pause_, kLongestOfAll);
    pause_ = std::min(4.0 * pause_, kLongest);
    balance_ = 0.0;
  }

 private:
  static constexpr double kMost = 1e-3;  // gains are not saved up past this; as large a debt closes the account
  static constexpr double kShortest = 0.02, kLongest = 1.28;
  // After one loop that lost much: its loss is a twentieth of the pause, but a process that was stopped for an hour is
  // not to wait for a day.
  static constexpr double kRatio = 20.0, kLongestOfAll = 10.0;
  double balance_ = 0.0;
  double closed_until_ = 0.0;
  double pause_ = kShortest;
};

}  // namespace script::cpu
