// Argument checks on stable-ABI tensors: one function per op that throws before any work, looking at the arguments in
// the order of the schema. For both devices; what needs a tensor's values (cu_seqlens) is checked on the CPU only. The
// message names the argument, what was expected and what came: "keep: expected 1 <= keep <= N = 16, got 17".
// script_kernels/checks.py says the same.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/schedule.hpp"

// SCRIPT_CHECK(condition, "keep", "keep >= 1", keep): what came may be given in several parts.
#define SCRIPT_CHECK(condition, argument, expected, ...)                               \
  do {                                                                                 \
    if (!(condition)) script::fail((argument), (expected), script::text(__VA_ARGS__)); \
  } while (false)

namespace script {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  ((stream << parts), ...);
  return stream.str();
}

[[noreturn]] inline void fail(const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::runtime_error(argument + ": expected " + expected + ", got " + got);
}

// "(2, 16, 64)", "(5,)", "()": as Python prints it.
inline std::string shape_text(const Tensor& tensor) {
  std::string out = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) out += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  return out + (tensor.dim() == 1 ? ",)" : ")");
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// No dimension of any argument is larger. Positions and counts are then exact in int32 and fp32, and a view of stride
// 0, which may claim any size without having it, cannot ask for work without end.
inline constexpr int64_t kMostSize = int64_t{1} << 24;

inline void check_sizes(const Tensor& tensor, const char* argument) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    SCRIPT_CHECK(tensor.size(d) <= kMostSize, argument, text("sizes up to ", kMostSize), shape_text(tensor));
  }
}

inline void check_dtype(const Tensor& tensor, const char* argument, ScalarType dtype) {
  check_sizes(tensor, argument);
  SCRIPT_CHECK(tensor.scalar_type() == dtype, argument, dtype_text(dtype), dtype_text(tensor.scalar_type()));
}

inline void check_floating(const Tensor& tensor, const char* argument) {
  check_sizes(tensor, argument);
  const ScalarType dtype = tensor.scalar_type();
  SCRIPT_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, argument,
               "float32, bfloat16 or float16", dtype_text(dtype));
}

// `tensor` must be where `tokens` (the op's first tensor) is.
inline void check_device(const Tensor& tensor, const char* argument, const Tensor& like, const char* like_argument) {
  const bool same = tensor.is_cpu() == like.is_cpu() && tensor.is_cuda() == like.is_cuda() &&
                    (!tensor.is_cuda() || tensor.get_device_index() == like.get_device_index());
  SCRIPT_CHECK(same, argument, text("the device of ", like_argument), "another device");
}

// A dimension that may be anything.
inline constexpr int64_t kAny = -1;

// The shape is `shape`, written as `expected` in the message.
inline void check_shape(const Tensor& tensor, const char* argument, std::initializer_list<int64_t> shape,
                        const std::string& expected) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    same = same && (size == kAny || tensor.size(d) == size);
    ++d;
  }
  SCRIPT_CHECK(same, argument, "shape " + expected, shape_text(tensor));
}

inline void check_finite(double value, const char* argument) {
  SCRIPT_CHECK(std::isfinite(value), argument, "a finite number", value);
}

// (B, N, D), floating, D >= 1.
inline void check_tokens(const Tensor& tokens) {
  SCRIPT_CHECK(tokens.dim() == 3 && tokens.size(2) >= 1, "tokens", "shape (B, N, D) with D >= 1", shape_text(tokens));
  check_floating(tokens, "tokens");
}

// (batch or 1, Q >= 1, width), and its mask (batch or 1, Q). `space` is the tensor that the query is compared with.
inline void check_query(const Tensor& query, const std::optional<Tensor>& query_mask, int64_t batch,
                        const Tensor& tokens, int64_t width) {
  const bool good = query.dim() == 3 && (query.size(0) == batch || query.size(0) == 1) && query.size(1) >= 1 &&
                    query.size(2) == width;
  SCRIPT_CHECK(good, "query", text("shape (", batch, " or 1, Q >= 1, ", width, ")"), shape_text(query));
  check_dtype(query, "query", tokens.scalar_type());
  check_device(query, "query", tokens, "tokens");
  if (!query_mask.has_value()) return;
  const bool mask_good = query_mask->dim() == 2 && (query_mask->size(0) == batch || query_mask->size(0) == 1) &&
                         query_mask->size(1) == query.size(1);
  SCRIPT_CHECK(mask_good, "query_mask", text("shape (", batch, " or 1, ", query.size(1), ")"), shape_text(*query_mask));
  check_dtype(*query_mask, "query_mask", ScalarType::Bool);
  check_device(*query_mask, "query_mask", tokens, "tokens");
}

// 1 <= count <= limit; `limit_name` is how the message calls the limit.
inline void check_count(int64_t count, const char* argument, int64_t limit, const char* limit_name) {
  SCRIPT_CHECK(1 <= count && count <= limit, argument, text("1 <= ", argument, " <= ", limit_name, " = ", limit),
               count);
}

// Raises unless the name is one of "mean" and "max".
inline void check_reduce(const std::string& reduce) {
  SCRIPT_CHECK(reduce == "mean" || reduce == "max", "reduce", "'mean' or 'max'", "'", reduce, "'");
}

// A larger power would leave nothing but the largest relevance.
inline constexpr double kMostPower = 64.0;

inline void check_power(double power) {
  SCRIPT_CHECK(0.0 <= power && power <= kMostPower, "power", text("0 <= power <= ", kMostPower), power);
}

inline void check_gsp_parameters(double threshold, double gamma, int64_t min_degree, int64_t rounds) {
  check_finite(threshold, "threshold");
  check_finite(gamma, "gamma");
  SCRIPT_CHECK(min_degree >= 0, "min_degree", "min_degree >= 0", min_degree);
  SCRIPT_CHECK(rounds >= 1, "rounds", "rounds >= 1", rounds);
  SCRIPT_CHECK(rounds <= cpu::kMostRounds, "rounds", text("rounds <= ", cpu::kMostRounds), rounds);
}

// Whether n tokens can alternate as asked between GSP's sources and destinations.
inline void check_split(int64_t n, const std::string& split, const std::optional<int64_t>& grid_width) {
  SCRIPT_CHECK(split == "raster" || split == "checker", "split", "'raster' or 'checker'", "'", split, "'");
  if (split == "raster") {
    if (!grid_width.has_value()) return;
    SCRIPT_CHECK(false, "grid_width", "it with split='checker' only", *grid_width, " with 'raster'");
  }
  SCRIPT_CHECK(grid_width.has_value(), "grid_width", "the tokens of a row of the grid with split='checker'", "None");
  SCRIPT_CHECK(*grid_width >= 1, "grid_width", "grid_width >= 1", *grid_width);
  SCRIPT_CHECK(n % *grid_width == 0, "grid_width", text("a divisor of N = ", n, ", the tokens of whole rows"),
               *grid_width);
}

// What `prune` and `prune_varlen` share.
inline void check_prune_parameters(double gsp_drop, double oversample, const std::string& combine, double floor,
                                   double power, const std::string& reduce) {
  SCRIPT_CHECK(0.0 <= gsp_drop && gsp_drop < 1.0, "gsp_drop", "0 <= gsp_drop < 1", gsp_drop);
  SCRIPT_CHECK(std::isfinite(oversample) && oversample >= 1.0, "oversample", "a finite number >= 1", oversample);
  SCRIPT_CHECK(combine == "intersect" || combine == "restrict" || combine == "union", "combine",
               "'intersect', 'restrict' or 'union'", "'", combine, "'");
  SCRIPT_CHECK(0.0 <= floor && floor <= 1.0, "floor", "0 <= floor <= 1", floor);
  check_power(power);
  check_reduce(reduce);
}

inline void check_reachable(int64_t n, int64_t keep, int64_t rounds, const std::string& asked) {
  if (cpu::rounds_suffice(n, keep, rounds)) return;
  const int64_t needed = cpu::rounds_needed(n, keep);
  const std::string way = needed <= cpu::kMostRounds ? text("; needs rounds >= ", needed)
                                                     : text(", nor with any rounds <= ", cpu::kMostRounds);
  throw std::runtime_error(text(asked, " of N = ", n, " tokens cannot be reached with rounds = ", rounds,
                                " (a round drops at most half)", way));
}

// Whether GSP gets to what prune asks of it; `argument` is how the message calls `keep`.
inline void check_drop_reachable(int64_t n, const std::string& argument, int64_t keep, const std::string& combine,
                                 double gsp_drop, int64_t rounds) {
  if (combine == "union") {
    const int64_t share = cpu::union_share(keep);
    const int64_t most = std::max(rounds, std::min(cpu::rounds_needed(n, share), cpu::kMostRounds));
    check_reachable(n, share, most, text(argument, ": the half of ", keep, " that GSP keeps in a union, ", share, ","));
    return;
  }
  const int64_t kept = cpu::gsp_keep(n, gsp_drop);
  check_reachable(n, kept, rounds, text("gsp_drop: ", gsp_drop, " keeps ", kept, ", which"));
}

inline void check_query_relevance(const Tensor& tokens, const Tensor& query, const std::optional<Tensor>& query_mask,
                                  const std::string& reduce) {
  check_tokens(tokens);
  check_query(query, query_mask, tokens.size(0), tokens, tokens.size(2));
  check_reduce(reduce);
}

inline void check_bipartite_match(const Tensor& tokens, double threshold) {
  check_tokens(tokens);
  check_finite(threshold, "threshold");
}

inline void check_gsp(const Tensor& tokens, int64_t keep, double threshold, double gamma, int64_t min_degree,
                      int64_t rounds) {
  check_tokens(tokens);
  check_count(keep, "keep", tokens.size(1), "N");
  check_gsp_parameters(threshold, gamma, min_degree, rounds);
  check_reachable(tokens.size(1), keep, rounds, text("keep: ", keep));
}

inline void check_dpp_map(const Tensor& kernel, int64_t k) {
  const bool square = kernel.dim() == 3 && kernel.size(1) == kernel.size(2);
  SCRIPT_CHECK(square, "kernel", "shape (B, N, N)", shape_text(kernel));
  check_dtype(kernel, "kernel", ScalarType::Float);
  check_count(k, "k", kernel.size(1), "N");
}

// Tokens, a relevance for each, and how many to pick: what all rankings from tokens take.
inline void check_ranked(const Tensor& tokens, const std::optional<Tensor>& relevance, int64_t k) {
  check_tokens(tokens);
  if (relevance.has_value()) {
    check_shape(*relevance, "relevance", {tokens.size(0), tokens.size(1)},
                text("(", tokens.size(0), ", ", tokens.size(1), ")"));
    check_dtype(*relevance, "relevance", ScalarType::Float);
    check_device(*relevance, "relevance", tokens, "tokens");
  }
  check_count(k, "k", tokens.size(1), "N");
}

inline void check_qcsp(const Tensor& tokens, const Tensor& relevance, int64_t k, double power, double ridge) {
  check_ranked(tokens, relevance, k);
  check_power(power);
  SCRIPT_CHECK(std::isfinite(ridge) && ridge >= 0.0, "ridge", "a finite number >= 0", ridge);
}

inline void check_mmr(const Tensor& tokens, const Tensor& relevance, int64_t k, double balance) {
  check_ranked(tokens, relevance, k);
  SCRIPT_CHECK(0.0 <= balance && balance <= 1.0, "balance", "0 <= balance <= 1", balance);
}

inline void check_mask_intersect(const Tensor& ranking, const Tensor& mask, int64_t k) {
  check_shape(ranking, "ranking", {kAny, kAny}, "(B, P)");
  check_dtype(ranking, "ranking", ScalarType::Long);
  check_shape(mask, "mask", {ranking.size(0), kAny}, text("(", ranking.size(0), ", N)"));
  check_dtype(mask, "mask", ScalarType::Bool);
  check_device(mask, "mask", ranking, "ranking");
  SCRIPT_CHECK(ranking.size(1) <= mask.size(1), "ranking", text("P <= N = ", mask.size(1)), "P = ", ranking.size(1));
  check_count(k, "k", ranking.size(1), "P");
}

// `aligned` is looked at only with a query.
inline void check_prune(const Tensor& tokens, const std::optional<Tensor>& query, int64_t keep,
                        const std::optional<Tensor>& aligned, const std::optional<Tensor>& query_mask, double gsp_drop,
                        double oversample, const std::string& combine, double threshold, double gamma,
                        int64_t min_degree, int64_t rounds, double floor, double power, const std::string& reduce) {
  check_tokens(tokens);
  const int64_t batch = tokens.size(0), n = tokens.size(1);
  check_count(keep, "keep", n, "N");
  if (query.has_value()) {
    if (aligned.has_value()) {
      SCRIPT_CHECK(aligned->dim() == 3 && aligned->size(0) == batch && aligned->size(1) == n && aligned->size(2) >= 1,
                   "aligned", text("shape (", batch, ", ", n, ", C) with C >= 1"), shape_text(*aligned));
      check_dtype(*aligned, "aligned", tokens.scalar_type());
      check_device(*aligned, "aligned", tokens, "tokens");
    }
    check_query(*query, query_mask, batch, tokens, aligned.has_value() ? aligned->size(2) : tokens.size(2));
  }
  check_prune_parameters(gsp_drop, oversample, combine, floor, power, reduce);
  check_gsp_parameters(threshold, gamma, min_degree, rounds);
  check_drop_reachable(n, "keep", keep, combine, gsp_drop, rounds);
}

// Everything that can be told without the values of cu_seqlens.
inline void check_prune_varlen(const Tensor& tokens, const Tensor& cu_seqlens, const std::optional<Tensor>& query,
                               const std::vector<int64_t>& keep, const std::optional<Tensor>& aligned, double gsp_drop,
                               double oversample, const std::string& combine, double threshold, double gamma,
                               int64_t min_degree, int64_t rounds, double floor, double power,
                               const std::string& reduce) {
  SCRIPT_CHECK(tokens.dim() == 2 && tokens.size(1) >= 1, "tokens", "shape (T, D) with D >= 1", shape_text(tokens));
  check_floating(tokens, "tokens");
  SCRIPT_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens", "shape (S + 1,)",
               shape_text(cu_seqlens));
  check_dtype(cu_seqlens, "cu_seqlens", ScalarType::Int);
  check_device(cu_seqlens, "cu_seqlens", tokens, "tokens");
  const int64_t segments = cu_seqlens.size(0) - 1;
  SCRIPT_CHECK(static_cast<int64_t>(keep.size()) == segments, "keep", text("one count per segment, S = ", segments),
               keep.size(), " counts");
  if (query.has_value()) {
    if (aligned.has_value()) {
      SCRIPT_CHECK(aligned->dim() == 2 && aligned->size(0) == tokens.size(0) && aligned->size(1) >= 1, "aligned",
                   text("shape (", tokens.size(0), ", C) with C >= 1"), shape_text(*aligned));
      check_dtype(*aligned, "aligned", tokens.scalar_type());
      check_device(*aligned, "aligned", tokens, "tokens");
    }
    check_query(*query, std::nullopt, segments, tokens, aligned.has_value() ? aligned->size(1) : tokens.size(1));
  }
  check_prune_parameters(gsp_drop, oversample, combine, floor, power, reduce);
  check_gsp_parameters(threshold, gamma, min_degree, rounds);
}

// The values of cu_seqlens (on the CPU, S + 1 of them, `stride` apart) against the tokens and `keep`: returns them
// widened.
inline std::vector<int64_t> check_segments(const int32_t* cu_seqlens, int64_t stride, int64_t total,
                                           const std::vector<int64_t>& keep, const std::string& combine,
                                           double gsp_drop, int64_t rounds) {
  std::vector<int64_t> starts(keep.size() + 1);
  for (size_t s = 0; s < starts.size(); ++s) starts[s] = cu_seqlens[static_cast<int64_t>(s) * stride];
  SCRIPT_CHECK(starts.front() == 0, "cu_seqlens", "a start at 0", starts.front());
  for (size_t s = 1; s < starts.size(); ++s) {
    SCRIPT_CHECK(starts[s - 1] <= starts[s], "cu_seqlens", "ascending values", starts[s], " after ", starts[s - 1]);
  }
  SCRIPT_CHECK(starts.back() == total, "cu_seqlens", text("an end at T = ", total), starts.back());
  for (size_t s = 0; s < keep.size(); ++s) {
    const int64_t length = starts[s + 1] - starts[s];
    const std::string name = text("keep[", s, "]");
    if (length == 0) {
      SCRIPT_CHECK(keep[s] == 0, name, "0 for an empty segment", keep[s]);
      continue;
    }
    SCRIPT_CHECK(1 <= keep[s] && keep[s] <= length, name, text("1 <= ", name, " <= ", length, ", the segment's length"),
                 keep[s]);
    check_drop_reachable(length, name, keep[s], combine, gsp_drop, rounds);
  }
  return starts;
}

}  // namespace script
