// The fuzz target of every op: which one is the name of the program, `<op>` or `<op>.<anything>`.
//
// The first two bytes choose the SIMD level and the threads, the others are the call (see bytes.hpp). It runs twice, on
// outputs and workspaces filled with different bytes: all outputs must come out the same, so everything has been
// written and nothing depends on what was there. Then the promises of the op are checked in double.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "calls.hpp"
#include "core/loop_threads.hpp"
#include "core/workspace.hpp"
#include "levels.hpp"
#include "oracle.hpp"

namespace {

constexpr int64_t kDirty = 1 << 17;  // bytes of this thread's workspace, more than most inputs need
size_t op = 0;

// Whether the call was refused.
bool run(fuzz::Call& call, int64_t threads, unsigned char canary) {
  call.fill(canary);
  {
    script::cpu::Scratch scratch;
    std::memset(scratch.take<char>(kDirty), canary, kDirty);
  }
  try {
    call.run(fuzz::cpu::loop_threads(threads, true));
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char*** argv) {
  const char* slash = std::strrchr((*argv)[0], '/');
  const std::string program = slash == nullptr ? (*argv)[0] : slash + 1;
  const auto& names = fuzz::op_names();
  while (op < names.size() && names[op] != program.substr(0, program.find('.'))) ++op;
  if (op < names.size()) return 0;
  std::fprintf(stderr, "%s: expected the name of an op\n", program.c_str());
  std::exit(2);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace levels = script::cpu::levels;
  static const int level_count = levels::count();
  static const char* many = std::getenv("FUZZ_THREADS");
  fuzz::Bytes in(data, size);
  levels::use(static_cast<int>(in.below(level_count)), 1);
  // A thread costs as much as ten calls, so not at a byte that mutations make often.
  int64_t threads = in.byte() % 64 == 37 ? 2 : 1;
  if (many != nullptr) threads = std::atoi(many);

  const std::unique_ptr<fuzz::Call> call = fuzz::make_call(op, in);
  const bool refused = run(*call, 1, 0x5a);
  fuzz::require(refused == call->refused(), "refused exactly where it has to be");
  const std::vector<char> first = call->outputs();
  fuzz::require(run(*call, threads, 0xa5) == refused, "refused again");
  if (refused) return 0;
  fuzz::require(first == call->outputs(), "everything written, and the same again on any number of threads");
  call->check();
  return 0;
}
