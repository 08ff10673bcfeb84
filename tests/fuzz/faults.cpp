// Allocations and threads that fail: a call whose n-th allocation fails, for n = 1, 2, ... until it succeeds, says so
// and leaves nothing behind (LeakSanitizer looks at the end), and the call after it gives the same bits as ever.
// Prints how many allocations were made to fail. An argument plants a fault that must be seen: `leak` or `wrong`.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "calls.hpp"
#include "core/loop_threads.hpp"
#include "core/prune.hpp"
#include "levels.hpp"
#include "oracle.hpp"

namespace {

std::atomic<bool> armed{false};
std::atomic<int64_t> countdown{0}, failed{0}, threads_left{-1};

// Whether this allocation is the one.
bool fails() {
  if (!armed.load() || countdown.fetch_sub(1) != 1) return false;
  failed.fetch_add(1);
  return true;
}

}  // namespace

void* operator new(size_t size) {
  void* p = fails() ? nullptr : std::malloc(size > 0 ? size : 1);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

extern "C" {
void* __real_aligned_alloc(size_t align, size_t size);
void* __wrap_aligned_alloc(size_t align, size_t size) { return fails() ? nullptr : __real_aligned_alloc(align, size); }

// std::thread::_M_start_thread(std::unique_ptr<State>, void (*)()): the pointer comes by address and stays the
// caller's.
void __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(void*, void*,
                                                                                                  void (*)());
void __wrap__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(void* thread,
                                                                                                  void* state,
                                                                                                  void (*depend)()) {
  if (threads_left >= 0 && threads_left.fetch_sub(1) <= 0) {
    throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again), "planted");
  }
  __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(thread, state, depend);
}
}

namespace {

namespace cpu = script::cpu;
bool plant_leak = false, plant_wrong = false;

// A call of an op, on this thread's fresh arena: fails its allocations one after the other.
void fail_each(size_t op, const std::vector<uint8_t>& bytes, int64_t threads) {
  fuzz::Bytes in(bytes.data(), bytes.size());
  in.byte();
  const std::unique_ptr<fuzz::Call> call = fuzz::make_call(op, in);
  if (call->refused()) return;
  const cpu::Threads loops = cpu::loop_threads(threads, true);
  call->fill(0x5a);
  call->run(loops);
  const std::vector<char> expected = call->outputs();
  for (int64_t n = 1, done = 0; done == 0; ++n) {
    call->fill(0xa5);
    // A thread of its own, so that the arena is empty.
    std::thread([&] {
      countdown = n;
      armed = true;
      bool thrown = false;
      try {
        call->run(loops);
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      armed = false;
      done = countdown > 0;  // all allocations were asked for, and none was the one
      fuzz::require(!(done == 1 && thrown), "no failure that nobody planted");
      if (thrown && plant_leak) static_cast<void>(*new std::atomic<int>[4]);
      // A thread that could not be made is made up for, so a failed allocation need not end the call.
      if (!thrown) fuzz::require(call->outputs() == expected, "the same bits where nothing was thrown");
      call->fill(0xa5);
      call->run(loops);  // on the arena of the failed call
      if (plant_wrong) call->fill(1);
      fuzz::require(call->outputs() == expected, "the same bits after a failure");
    }).join();
  }
}

// Larger than a block of the arena, so that a call needs several.
void fail_each_block() {
  const int64_t n = 130, width = 9000, keep = 20;
  std::vector<float> tokens(static_cast<size_t>(n * width));
  fuzz::Random random(7);
  for (float& x : tokens) x = static_cast<float>(random.next() % 1000) - 500.0f;
  const cpu::TokenBatch batch{{tokens.data(), cpu::DType::kFloat32, n, width, width, 1}, 1, 0};
  const cpu::PruneOptions options;
  std::vector<int64_t> expected(static_cast<size_t>(keep)), kept(expected);
  cpu::prune({batch, std::nullopt, std::nullopt}, keep, options, expected.data(), cpu::loop_threads(1));
  for (int64_t i = 1, done = 0; done == 0; ++i) {
    std::thread([&] {
      countdown = i;
      armed = true;
      try {
        cpu::prune({batch, std::nullopt, std::nullopt}, keep, options, kept.data(), cpu::loop_threads(1));
      } catch (const std::bad_alloc&) {
      }
      armed = false;
      done = countdown > 0;
      if (done == 0) cpu::prune({batch, std::nullopt, std::nullopt}, keep, options, kept.data(), cpu::loop_threads(1));
      fuzz::require(kept == expected, "the same selection after a failure");
    }).join();
  }
}

void fail_threads() {
  const cpu::Threads threads = cpu::loop_threads(8, true);
  // Every piece is done, whichever thread cannot be had.
  for (int64_t available = 0; available < 8; ++available) {
    threads_left = available;
    std::atomic<int64_t> sum{0};
    threads.parallel(8, cpu::kWorthAThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum += i + 1;
    });
    threads_left = -1;
    fuzz::require(sum == 36, "all pieces, on fewer threads than wished for");
  }
  // The first exception by items reaches the caller, when all have ended; what comes after it need not begin.
  for (int64_t available = 0; available < 8; ++available) {
    threads_left = available;
    std::atomic<int64_t> ended{0};
    std::string text;
    try {
      threads.parallel(8, cpu::kWorthAThread, [&](int64_t begin, int64_t) {
        if (begin % 2 == 1) throw std::runtime_error(std::to_string(begin));
        std::this_thread::yield();
        ++ended;
      });
    } catch (const std::runtime_error& error) {
      text = error.what();
    }
    threads_left = -1;
    fuzz::require(text == "1", "the first exception, by items");
    fuzz::require(ended >= 1 && ended <= 4, "what came before has ended");
  }
  // A loop within a piece runs in line, also after an exception there.
  threads.parallel(2, cpu::kWorthAThread, [&](int64_t, int64_t) {
    const std::thread::id own = std::this_thread::get_id();
    threads.parallel(8, cpu::kWorthAThread, [&](int64_t, int64_t) {
      fuzz::require(std::this_thread::get_id() == own, "a loop within a piece in line");
    });
  });
}

}  // namespace

int main(int argc, char** argv) {
  plant_leak = argc > 1 && std::strcmp(argv[1], "leak") == 0;
  plant_wrong = argc > 1 && std::strcmp(argv[1], "wrong") == 0;
  fuzz::Random random(2026);
  std::string report;
  for (size_t op = 0; op < fuzz::op_names().size(); ++op) {
    failed = 0;
    for (int64_t input = 0; input < 12; ++input) {
      std::vector<uint8_t> bytes(200);
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next());
      cpu::levels::use(static_cast<int>(input % cpu::levels::count()), 1);
      fail_each(op, bytes, input % 3 == 0 ? 3 : 1);
    }
    report += fuzz::op_names()[op] + " " + std::to_string(failed) + "\n";
    if (plant_leak) return 0;  // LeakSanitizer's turn
  }
  failed = 0;
  fail_each_block();
  report += "blocks " + std::to_string(failed) + "\n";
  fail_threads();
  std::fputs(report.c_str(), stdout);
  return 0;
}
