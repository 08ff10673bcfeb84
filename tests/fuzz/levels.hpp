// The SIMD levels of this CPU in one process: what simd() returns can be changed between calls.
#pragma once

#include <cstdint>

namespace script::cpu::levels {

int count();
const char* name(int level);
// `thread_work`: see SimdOps; 1 splits every loop that may be split.
void use(int level, int64_t thread_work);

// Multiply-adds and columns that the loops of the level in use have been asked for since reset(), by every thread.
struct Work {
  int64_t multiply_adds, columns;
};
void count_work(int level);
void reset();
Work work();

}  // namespace script::cpu::levels
