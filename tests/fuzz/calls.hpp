// One call of an op from bytes: arguments, outputs, and what the outputs must be.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bytes.hpp"
#include "core/parallel.hpp"

namespace fuzz {

class Call {
 public:
  virtual ~Call() = default;
  // Writes the outputs. May throw what the op throws on bad values.
  virtual void run(const cpu::Threads& threads) = 0;
  // Whether a call has to be refused, and the promises on the outputs of one that was not.
  virtual bool refused() const { return false; }
  virtual void check() const = 0;

  // Every byte of the outputs.
  void fill(unsigned char byte) {
    for (const Block& block : outputs_) std::fill_n(block.data, block.size, static_cast<char>(byte));
  }
  std::vector<char> outputs() const {
    std::vector<char> all;
    for (const Block& block : outputs_) all.insert(all.end(), block.data, block.data + block.size);
    return all;
  }

 protected:
  template <typename T>
  std::vector<T>& output(std::vector<T>& out, int64_t count) {
    out.resize(static_cast<size_t>(count));
    outputs_.push_back({reinterpret_cast<char*>(out.data()), out.size() * sizeof(T)});
    return out;
  }

 private:
  struct Block {
    char* data;
    size_t size;
  };
  std::vector<Block> outputs_;
};

inline const std::vector<std::string>& op_names() {
  static const std::vector<std::string> names{"query_relevance", "bipartite_match", "gsp",          "dpp_map", "qcsp",
                                              "mask_intersect",  "prune",           "prune_varlen", "max_min", "mmr"};
  return names;
}

// The call of an op (its place in op_names) that the bytes stand for.
std::unique_ptr<Call> make_call(size_t op, Bytes& in);

}  // namespace fuzz
