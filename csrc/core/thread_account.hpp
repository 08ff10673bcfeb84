// Whether threads pay. On a machine that others use, a core is taken away for milliseconds at a time, and a loop that
// was split waits for its slowest piece: then it takes longer than one thread would have, every time. So whoever
// splits loops keeps an account of what that saved and cost, and leaves it for a while when it costs.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace script::cpu {

// What the loops of each place in the code take one thread, by the multiply-adds that they are said to do. Two threads'
// seconds of processors tell that only where each is as fast as alone; those on the two halves of one core are not.
class LoopRates {
 public:
  // Seconds of one thread; 0: not known.
  double alone(const void* place, double work) const {
    const Entry& entry = entries_[slot(place)];
    return entry.place == place ? entry.rate * work : 0.0;
  }

  // Whether a loop of the place is to run alone for once, so that this is known: only short ones, now and then.
  bool due(const void* place) const {
    const Entry& entry = entries_[slot(place)];
    return entry.place == place && entry.took < kShort && (entry.rate == 0.0 || entry.since >= kEvery);
  }

  // What a loop took one thread.
  void ran_alone(const void* place, double work, double seconds) {
    Entry& entry = of(place);
    const double rate = seconds / work;
    entry.rate += (entry.rate == 0.0 ? 1.0 : kWeight) * (rate - entry.rate);
    entry.since = 0;
    entry.took = seconds;
  }

  // What one took that was split.
  void ran_split(const void* place, double seconds) {
    Entry& entry = of(place);
    ++entry.since;
    entry.took = seconds;
  }

 private:
  static constexpr double kShort = 1e-3, kWeight = 0.25;
  static constexpr int64_t kEvery = 32;
  static constexpr size_t kEntries = 64;  // more than there are places
  struct Entry {
    const void* place = nullptr;
    double rate = 0.0, took = 0.0;
    int64_t since = 0;
  };

  static size_t slot(const void* place) {
    return reinterpret_cast<uintptr_t>(place) / alignof(std::max_align_t) % kEntries;
  }
  Entry& of(const void* place) {
    Entry& entry = entries_[slot(place)];
    if (entry.place != place) entry = Entry{place, 0.0, 0.0, 0};
    return entry;
  }

  std::array<Entry, kEntries> entries_;
};

// The account of one thread that asks others for help. All times in seconds. `place`: where in the code a loop is, or
// null for one whose items have no known work.
class ThreadAccount {
 public:
  // Whether a loop that starts now may be split.
  bool open(double now, const void* place) const {
    return now >= closed_until_ && !(place != nullptr && rates_.due(place));
  }

  // A loop was not split.
  void enter_alone(const void* place, double work, double took) {
    if (place != nullptr) rates_.ran_alone(place, work, took);
  }

  // A split loop took `took`, and all its threads together `busy` of processors: what it takes one thread, at most.
  void enter(double now, const void* place, double work, double busy, double took) {
    double alone = busy;
    if (place != nullptr) {
      const double known = rates_.alone(place, work);
      if (known > 0.0) alone = std::min(alone, known);
      rates_.ran_split(place, took);
    }
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
  LoopRates rates_;
  double balance_ = 0.0;
  double closed_until_ = 0.0;
  double pause_ = kShortest;
};

}  // namespace script::cpu
