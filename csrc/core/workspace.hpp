// Scratch memory that survives from call to call: the page faults of fresh memory cost as much as the arithmetic at the
// usual sizes. One arena per thread, used as a stack.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace script::cpu {

class Arena {
 public:
  static constexpr size_t kAlign = 64;
  // What a thread keeps between calls, in one block; a larger call gives the rest back when it ends.
  static constexpr size_t kKept = size_t{64} << 20;

  static Arena& local() {
    thread_local Arena arena;
    return arena;
  }

  ~Arena() {
    for (const Block& block : blocks_) std::free(block.data);
  }

  void* take(size_t bytes) {
    bytes = (bytes + kAlign - 1) / kAlign * kAlign;
    while (current_ < blocks_.size() && used_ + bytes > blocks_[current_].size) {
      ++current_;
      used_ = 0;
    }
    if (current_ == blocks_.size()) {
      blocks_.reserve(current_ + 1);  // first, so that a block once allocated has a place
      blocks_.push_back(allocate(std::max(bytes, blocks_.empty() ? settled_ : 0)));
    }
    void* p = blocks_[current_].data + used_;
    used_ += bytes;
    live_ += bytes;
    peak_ = std::max(peak_, live_);
    return p;
  }

 private:
  friend class Scratch;
  static constexpr size_t kBlock = size_t{4} << 20;
  static constexpr size_t kHugePage = size_t{2} << 20;
  struct Block {
    char* data;
    size_t size;
  };

  static Block allocate(size_t bytes) {
    const bool large = bytes > kBlock;
    const size_t align = large ? kHugePage : kAlign;
    const size_t size = large ? (bytes + align - 1) / align * align : kBlock;
    void* data = std::aligned_alloc(align, size);
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (large) madvise(data, size, MADV_HUGEPAGE);  // a wish: fewer page faults and TLB misses
#endif
    return {static_cast<char*>(data), size};
  }

  // Called when nothing is in use. What several blocks were needed for goes into one the next time: nothing is lost at
  // the ends of blocks, and the memory stays, whatever the order of sizes.
  void settle() {
    settled_ = std::min(peak_, kKept);
    const size_t kept = !blocks_.empty() && blocks_[0].size >= settled_ && blocks_[0].size <= kKept ? 1 : 0;
    if (blocks_.size() == kept) return;
    for (size_t b = kept; b < blocks_.size(); ++b) std::free(blocks_[b].data);
    blocks_.resize(kept);
  }

  std::vector<Block> blocks_;
  size_t current_ = 0;  // the block in use, and how much of it
  size_t used_ = 0;
  size_t live_ = 0, peak_ = 0;  // bytes in use: now, and the most so far
  size_t settled_ = 0;
};

// Takes memory from the thread's arena and gives it back, all at once, when it goes out of scope.
class Scratch {
 public:
  Scratch() : arena_(Arena::local()), current_(arena_.current_), used_(arena_.used_), live_(arena_.live_) {}
  ~Scratch() {
    arena_.current_ = current_;
    arena_.used_ = used_;
    arena_.live_ = live_;
    if (live_ == 0) arena_.settle();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Uninitialised, 64-byte aligned.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(arena_.take(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)));
  }
  template <typename T>
  T* take(int64_t count, T fill) {
    T* p = take<T>(count);
    for (int64_t i = 0; i < count; ++i) p[i] = fill;
    return p;
  }

 private:
  Arena& arena_;
  size_t current_, used_, live_;
};

}  // namespace script::cpu
