// The scheduler of the emulated CUDA runtime. Built without a sanitizer's instrumentation, whatever the kernels are
// built with, so that its own bookkeeping is no data race; EMULATION_ASAN and EMULATION_TSAN name the sanitizer to tell
// of fibers.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#ifdef EMULATION_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#endif

// The bounds of all __shared__ variables, set by the linker. Weak: a kernel may have none.
extern "C" char __start_emulated_shared __attribute__((weak));
extern "C" char __stop_emulated_shared __attribute__((weak));

namespace emulation {
namespace {

constexpr size_t kStackBytes = size_t{128} << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarp = 32;
constexpr int kFailed = 70;

// An address that stands for one meeting of threads: the arrivals release it, the departures acquire it.
using Meeting = uint64_t;

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* sanitizer_state = nullptr;
  uint3 index = {};
  unsigned rank = 0;
  State state = State::kReady;
  // What it waits for.
  const char* name = "";
  int line = 0;
  unsigned lanes = 0;
  uint64_t value = 0;
  bool orders_memory = false;
  Meeting* meeting = nullptr;
  BlockOp block_op = BlockOp::kSync;
  // What it is given.
  uint64_t brought[kWarp] = {};
  int barrier_result = 0;
};

struct Scheduler {
  ucontext_t context;
  void* sanitizer_state = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  Schedule schedule;
  std::mt19937 random;
};

Scheduler scheduler;
std::deque<Fiber> fibers;  // never moved: a context may hold pointers into itself
unsigned block_threads = 0;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
cudaLaunchConfig_t config;
uint3 block = {};
std::deque<Meeting> meetings;
Meeting* barrier_meeting = nullptr;
Meeting* end_meeting = nullptr;
unsigned arrived = 0;  // at the block's barrier

Meeting* new_meeting() { return &meetings.emplace_back(0); }

void order_before(Meeting* meeting) {
#ifdef EMULATION_TSAN
  __tsan_release(meeting);
#else
  (void)meeting;
#endif
}

void order_after(Meeting* meeting) {
#ifdef EMULATION_TSAN
  __tsan_acquire(meeting);
#else
  (void)meeting;
#endif
}

void switch_to_scheduler(Fiber& from, bool leaving) {
  (void)leaving;
#ifdef EMULATION_ASAN
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from.sanitizer_state, scheduler.stack_bottom,
                                 scheduler.stack_size);
#endif
#ifdef EMULATION_TSAN
  __tsan_switch_to_fiber(scheduler.sanitizer_state, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&from.context, &scheduler.context);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(from.sanitizer_state, nullptr, nullptr);
#endif
}

void switch_to_fiber(Fiber& to) {
  running = &to;
#ifdef EMULATION_ASAN
  void* saved = nullptr;
  __sanitizer_start_switch_fiber(&saved, to.stack, kStackBytes);
#endif
#ifdef EMULATION_TSAN
  __tsan_switch_to_fiber(to.sanitizer_state, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&scheduler.context, &to.context);
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
  running = nullptr;
}

void fiber_main() {
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack_bottom, &scheduler.stack_size);
#endif
  (*body)();
  running->state = State::kDone;
  order_before(end_meeting);
  switch_to_scheduler(*running, true);
}

void start_fibers() {
  for (unsigned rank = 0; rank < block_threads; ++rank) {
    if (rank == fibers.size()) {
      Fiber& fresh = fibers.emplace_back();
      fresh.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (fresh.stack == MAP_FAILED) fail("no memory for a fiber's stack");
    }
    Fiber& fiber = fibers[rank];
    const dim3 size = config.blockDim;
    fiber.rank = rank;
    fiber.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
    fiber.state = State::kReady;
    fiber.sanitizer_state = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#ifdef EMULATION_TSAN
    fiber.sanitizer_state = __tsan_create_fiber(0);
#endif
  }
}

void end_fibers() {
  order_after(end_meeting);
#ifdef EMULATION_TSAN
  for (unsigned rank = 0; rank < block_threads; ++rank) __tsan_destroy_fiber(fibers[rank].sanitizer_state);
#endif
}

// Lets the block pass its barrier if everybody stands at it.
bool open_barrier() {
  if (++arrived < block_threads) return false;
  const Fiber& first = fibers[0];
  int count = 0;
  for (unsigned rank = 0; rank < block_threads; ++rank) {
    const Fiber& fiber = fibers[rank];
    if (fiber.line != first.line || fiber.block_op != first.block_op)
      fail("divergent barrier: thread %u waits at line %d, thread 0 at line %d", rank, fiber.line, first.line);
    count += fiber.value != 0;
  }
  const int threads = static_cast<int>(block_threads);
  const int results[] = {0, count, count == threads, count > 0};
  for (unsigned rank = 0; rank < block_threads; ++rank) {
    fibers[rank].barrier_result = results[static_cast<int>(first.block_op)];
    fibers[rank].state = State::kReady;
  }
  barrier_meeting = nullptr;
  arrived = 0;
  return true;
}

// Lets the lanes of the warp of `caller` pass the primitive that it waits for, if all of them stand at it.
bool open_warp(const Fiber& caller) {
  const unsigned first = caller.rank / kWarp * kWarp;
  const unsigned lanes = caller.lanes;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1u)) continue;
    if (first + lane >= block_threads)
      fail("%s at line %d names lane %u, which does not exist", caller.name, caller.line, lane);
    const Fiber& other = fibers[first + lane];
    if (other.state == State::kDone)
      fail("%s at line %d waits for lane %u, which has ended", caller.name, caller.line, lane);
    if (other.state != State::kInWarp) return false;
    if (other.lanes != lanes || other.line != caller.line)
      fail("divergent warp: lane %u is at %s of line %d (lanes %08x), lane %u at %s of line %d (lanes %08x)", lane,
           other.name, other.line, other.lanes, caller.rank % kWarp, caller.name, caller.line, lanes);
  }
  uint64_t brought[kWarp] = {};
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (lanes >> lane & 1u) brought[lane] = fibers[first + lane].value;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1u)) continue;
    Fiber& fiber = fibers[first + lane];
    std::copy(brought, brought + kWarp, fiber.brought);
    fiber.state = State::kReady;
  }
  return true;
}

// The meeting of a __syncwarp: that of a lane already waiting with the same lanes, or a new one.
Meeting* warp_meeting(const Fiber& caller, unsigned lanes) {
  const unsigned first = caller.rank / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp && first + lane < block_threads; ++lane) {
    const Fiber& other = fibers[first + lane];
    if (other.state == State::kInWarp && other.orders_memory && other.lanes == lanes && (lanes >> lane & 1u))
      return other.meeting;
  }
  return new_meeting();
}

[[noreturn]] void report_deadlock() {
  for (unsigned rank = 0; rank < block_threads; ++rank) {
    const Fiber& waiting = fibers[rank];
    if (waiting.state == State::kDone) continue;
    for (unsigned other = 0; other < block_threads; ++other)
      if (waiting.state == State::kAtBarrier && fibers[other].state == State::kDone)
        fail("divergent barrier: thread %u waits at line %d, thread %u has ended", rank, waiting.line, other);
    fail("deadlock: thread %u waits at %s of line %d", rank, waiting.name, waiting.line);
  }
  std::abort();
}

void run_block() {
  meetings.clear();
  barrier_meeting = nullptr;
  end_meeting = new_meeting();
  arrived = 0;
  // A pattern that is neither zero nor a small number: a kernel that reads what it has not written gives itself away.
  // No memset: AddressSanitizer would object to the red zones between the variables.
  for (volatile char* byte = &__start_emulated_shared; byte < &__stop_emulated_shared; ++byte) *byte = '\xcd';
  start_fibers();
  std::vector<unsigned> order(block_threads);
  std::iota(order.begin(), order.end(), 0u);
  if (scheduler.schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  for (unsigned done = 0; done < block_threads;) {
    if (scheduler.schedule.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), scheduler.random);
    bool progress = false;
    done = 0;
    for (unsigned rank : order) {
      if (fibers[rank].state == State::kReady) {
        switch_to_fiber(fibers[rank]);
        progress = true;
      }
      done += fibers[rank].state == State::kDone;
    }
    if (done < block_threads && !progress) report_deadlock();
  }
  end_fibers();
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("cuda emulation: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::fflush(nullptr);
  std::_Exit(kFailed);
}

void set_schedule(Schedule schedule) {
  scheduler.schedule = schedule;
  scheduler.random.seed(schedule.seed);
}

cudaError_t launch(const cudaLaunchConfig_t& launched, const std::function<void()>& thread_body) {
  const uint64_t threads = uint64_t{launched.blockDim.x} * launched.blockDim.y * launched.blockDim.z;
  const uint64_t blocks = uint64_t{launched.gridDim.x} * launched.gridDim.y * launched.gridDim.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0) return cudaErrorInvalidConfiguration;
  if (launched.dynamicSmemBytes != 0 || launched.numAttrs != 0)
    fail("launch attributes and dynamic shared memory are not emulated");
  if (running != nullptr) fail("a launch inside a kernel is not emulated");

  config = launched;
  body = &thread_body;
  block_threads = static_cast<unsigned>(threads);
#ifdef EMULATION_TSAN
  scheduler.sanitizer_state = __tsan_get_current_fiber();
#endif
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (scheduler.schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (scheduler.schedule.order == Order::kShuffled) std::shuffle(order.begin(), order.end(), scheduler.random);
  for (uint64_t rank : order) {
    const dim3 size = config.gridDim;
    block = {static_cast<unsigned>(rank % size.x), static_cast<unsigned>(rank / size.x % size.y),
             static_cast<unsigned>(rank / size.x / size.y)};
    run_block();
  }
  return cudaSuccess;
}

uint3 thread_index() { return running->index; }
uint3 block_index() { return block; }
uint3 block_size() { return {config.blockDim.x, config.blockDim.y, config.blockDim.z}; }
uint3 grid_size() { return {config.gridDim.x, config.gridDim.y, config.gridDim.z}; }
unsigned lane() { return running->rank % kWarp; }

int block_barrier(BlockOp op, int predicate, int line) {
  Fiber& self = *running;
  if (barrier_meeting == nullptr) barrier_meeting = new_meeting();
  Meeting* const meeting = barrier_meeting;
  self.name = "__syncthreads";
  self.block_op = op;
  self.value = predicate != 0;
  self.line = line;
  self.state = State::kAtBarrier;
  order_before(meeting);
  if (!open_barrier()) switch_to_scheduler(self, false);
  order_after(meeting);
  return self.barrier_result;
}

const uint64_t* warp_exchange(const char* name, unsigned lanes, uint64_t value, int line, bool orders_memory) {
  Fiber& self = *running;
  if (!(lanes >> lane() & 1u))
    fail("%s at line %d is called by lane %u, which its mask leaves out", name, line, lane());
  Meeting* const meeting = orders_memory ? warp_meeting(self, lanes) : nullptr;
  self.name = name;
  self.lanes = lanes;
  self.value = value;
  self.line = line;
  self.orders_memory = orders_memory;
  self.meeting = meeting;
  self.state = State::kInWarp;
  if (orders_memory) order_before(meeting);
  if (!open_warp(self)) switch_to_scheduler(self, false);
  if (orders_memory) order_after(meeting);
  return self.brought;
}

}  // namespace emulation
