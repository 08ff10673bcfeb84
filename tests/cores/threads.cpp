// Whether split loops are given up where they do not pay, and taken up again: the account of core/thread_account.hpp in
// simulated time. Each scenario is a minute of loops that take 10 ms alone. Prints, a line each: its name, the time
// that it took as a share of what it would have taken alone, and the share of loops that were split. Before that, of
// loops on eight threads in which several items fail: the item whose exception came out, 0 if it was not always the
// same, and how many items before it were done, 0 if that was not always all.
#include <cstdio>
#include <memory>

#include "core/loop_threads.hpp"

namespace cpu = script::cpu;

namespace {

constexpr double kAlone = 0.010, kMinute = 60.0;  // seconds

// took(now, i): what the i-th split loop takes, by `busy` seconds of processors.
template <typename Took>
void run(const char* name, const Took& took, double alone = kAlone, double busy = 0.0) {
  cpu::ThreadAccount account;
  double now = 1000.0;
  const double start = now;
  int64_t loops = 0, splits = 0;
  for (; now - start < kMinute * (alone / kAlone); ++loops) {
    constexpr double kWork = 1e6;
    if (!account.open(now, name)) {
      now += alone;
      account.enter_alone(name, kWork, alone);
      continue;
    }
    const double time = took(now - start, splits++);
    now += time;
    account.enter(now, name, kWork, busy > 0.0 ? busy : alone, time);
  }
  std::printf("%s %.4f %.4f\n", name, (now - start) / (static_cast<double>(loops) * alone),
              static_cast<double>(splits) / static_cast<double>(loops));
}

void fail() {
  constexpr int64_t kItems = 1000, kFirst = 300, kLoops = 300;
  const cpu::Threads threads = cpu::loop_threads(8, true);
  int64_t thrown = kFirst, done_before = kFirst;
  for (int64_t loop = 0; loop < kLoops; ++loop) {
    const std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[kItems]());
    try {
      threads.parallel(kItems, cpu::kWorthAThread, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (i >= kFirst && i % 10 == 0) throw i;
          ++done[static_cast<size_t>(i)];
        }
      });
      thrown = 0;
    } catch (int64_t item) {
      if (item != kFirst) thrown = 0;
    }
    for (size_t i = 0; i < kFirst; ++i) {
      if (done[i] != 1) done_before = 0;
    }
  }
  std::printf("failures %lld %lld\n", static_cast<long long>(thrown), static_cast<long long>(done_before));
}

}  // namespace

int main() {
  fail();
  run("quiet", [](double, int64_t) { return 0.55 * kAlone; });
  run("hiccups", [](double, int64_t i) { return i % 50 == 49 ? 1.5 * kAlone : 0.55 * kAlone; });
  run("busy", [](double, int64_t) { return 1.4 * kAlone; });
  // The other core is somebody else's for every second slice of time: half of the loops gain, the others lose.
  run("shared", [](double, int64_t i) { return i % 2 == 0 ? 0.55 * kAlone : 2.0 * kAlone; });
  run("long loops", [](double, int64_t) { return 1.4; }, 1.0);
  // Once, the process is stopped for an hour.
  run("stopped", [](double, int64_t i) { return i == 100 ? 3600.0 : 33.0; }, 60.0);
  run("then quiet", [](double now, int64_t) { return now < kMinute / 2 ? 1.4 * kAlone : 0.55 * kAlone; });
  // Threads on the two halves of one core: each takes twice as long, so that their seconds say that they gain.
  run("halves", [](double, int64_t) { return 45e-6; }, 40e-6, 80e-6);
  // Short loops that gain are only tried alone now and then.
  run("short", [](double, int64_t) { return 25e-6; }, 40e-6, 44e-6);
  // A loss of a tenth of a millisecond a loop is worth noticing, too.
  run("a little slower", [](double, int64_t) { return 1.01 * kAlone; });
}
