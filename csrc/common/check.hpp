// Argument checks on stable-ABI tensors. A failed check throws before any work is done; the message names the argument,
// what was expected and what came: "keep: expected 1 <= keep <= N = 16, got 17". script_kernels/checks.py says the
// same.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

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

inline void check_dtype(const Tensor& tensor, const char* argument, ScalarType dtype) {
  SCRIPT_CHECK(tensor.scalar_type() == dtype, argument, dtype_text(dtype), dtype_text(tensor.scalar_type()));
}

inline void check_floating(const Tensor& tensor, const char* argument) {
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

}  // namespace script
