// Arguments of the cores from bytes: sizes, strides and values of any pattern, in memory exactly as large as the views
// on it need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "core/tokens.hpp"

namespace fuzz {

namespace cpu = script::cpu;

// Bytes in order; zeros behind the end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  int64_t below(int64_t n) { return byte() % n; }
  bool one_in(int n) { return byte() % n == static_cast<uint8_t>(n - 1); }
  template <typename T>
  T bits() {
    unsigned char raw[sizeof(T)];
    for (unsigned char& b : raw) b = byte();
    T value;
    std::memcpy(&value, raw, sizeof value);
    return value;
  }
  // A finite number, mostly a usual one.
  double number(double usual) {
    constexpr double kSome[] = {0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-3, 1e300, -1e300, 1e-300, 3.4e38, 50.0};
    const int64_t choice = below(24);
    if (choice < 12) return kSome[choice];
    if (choice > 12) return usual;
    const double any = bits<double>();
    return std::isfinite(any) ? any : usual;
  }
  uint8_t peek(size_t i) const { return size_ == at_ ? 0 : data_[at_ + i % (size_ - at_)]; }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t next() {  // xorshift*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 32);
  }

 private:
  uint64_t state_;
};

// ---- elements -------------------------------------------------------------------------------------------------------

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float sign = (h & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline size_t size_of(cpu::DType dtype) { return dtype == cpu::DType::kFloat32 ? 4 : 2; }

inline double element(const void* data, cpu::DType dtype, int64_t i) {
  if (dtype == cpu::DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t word = static_cast<const uint16_t*>(data)[i];
  return dtype == cpu::DType::kFloat16 ? half_to_float(word) : from_bits(static_cast<uint32_t>(word) << 16);
}

// An ordinary value of magnitude 2^-5 to 1, as the bits of the dtype.
inline uint32_t ordinary(cpu::DType dtype, uint32_t random) {
  const uint32_t sign = random >> 31, step = random >> 26 & 3, mantissa = random & 0x7fffff;
  if (dtype == cpu::DType::kFloat16) return sign << 15 | (11 + step) << 10 | mantissa >> 13;
  const uint32_t bits = sign << 31 | (123 + step) << 23 | mantissa;
  return dtype == cpu::DType::kBFloat16 ? bits >> 16 : bits;
}

inline uint32_t special(cpu::DType dtype, uint32_t random) {
  constexpr uint32_t kFloat[] = {0, 0x80000000, 0x3f800000, 0xbf800000, 0x7fc00000, 0xff800001, 0x7f800000, 0xff800000,
                                 1, 0x807fffff, 0x00800000, 0x7f7fffff, 0xff7fffff, 0x5f000000, 0x20000000, 0x3f800001};
  constexpr uint32_t kHalf[] = {0,      0x8000, 0x3c00, 0xbc00, 0x7e00, 0xfc01, 0x7c00, 0xfc00,
                                0x0001, 0x83ff, 0x0400, 0x7bff, 0xfbff, 0x5c00, 0x1000, 0x3c01};
  if (dtype == cpu::DType::kFloat16) return kHalf[random % 16];
  return kFloat[random % 16] >> (dtype == cpu::DType::kBFloat16 ? 16 : 0);
}

// `count` elements of a dtype in one of several styles, `width` of them a row.
inline std::vector<char> elements(Bytes& in, cpu::DType dtype, int64_t count, int64_t width) {
  const size_t size = size_of(dtype);
  std::vector<char> out(static_cast<size_t>(count) * size);
  const int64_t style = in.below(8), seed = in.byte();
  Random random(static_cast<uint64_t>(seed));
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    const size_t first = static_cast<size_t>(i) * size;
    switch (style) {
      case 0:  // the input's bytes, over and over
        for (size_t b = 0; b < size; ++b) bits |= static_cast<uint32_t>(in.peek(first + b)) << 8 * b;
        break;
      case 1:  // any bits
        bits = random.next();
        break;
      case 2:  // special values
        bits = special(dtype, random.next());
        break;
      case 3:  // few distinct rows
        bits = ordinary(dtype, Random(static_cast<uint64_t>(seed + i % width * 7 + i / width % 3 * 1000)).next());
        break;
      case 4:  // ordinary, and here and there a special one
        bits = random.next() % 61 == 0 ? special(dtype, random.next()) : ordinary(dtype, random.next());
        break;
      case 5:  // special rows by the input's bytes
        bits = special(dtype, in.peek(static_cast<size_t>(i / width)));
        break;
      default:
        bits = ordinary(dtype, random.next());
    }
    std::memcpy(out.data() + first, &bits, size);
  }
  return out;
}

// ---- views ----------------------------------------------------------------------------------------------------------

struct Extent {
  int64_t lowest = 0, highest = 0;
  bool empty = false;
  void add(int64_t count, int64_t stride) {
    empty = empty || count == 0;
    (stride < 0 ? lowest : highest) += (count - 1) * stride;
  }
  int64_t elements() const { return empty ? 0 : highest - lowest + 1; }
};

// (images, count, width) of a floating dtype.
struct Matrix {
  std::vector<char> memory;
  cpu::TokenBatch batch;

  double at(int64_t b, int64_t i, int64_t d) const {
    const cpu::TokenView& v = batch.first;
    return element(v.data, v.dtype, b * batch.image_stride + i * v.row_stride + d * v.column_stride);
  }
};

inline Matrix matrix(Bytes& in, cpu::DType dtype, int64_t images, int64_t count, int64_t width) {
  Matrix m;
  int64_t column = 1, row = width, image = count * width;
  switch (in.below(12)) {
    case 0:
      row = width + in.below(5);
      image = row * count;
      break;
    case 1:
      column = 2;
      row = 2 * width + 1;
      image = row * count;
      break;
    case 2:
      column = count;
      row = 1;
      break;
    case 3:
      row = -width;
      break;
    case 4:
      column = -1;
      image = -image;
      break;
    case 5:
      row = 0;
      break;
    case 6:
      column = 0;
      row = 1;
      image = count;
      break;
    case 7:
      row = 1;  // rows that overlap
      image = in.below(7) - 3;
      break;
    default:
      break;
  }
  if (in.one_in(8)) image = 0;
  Extent extent;
  extent.add(images, image);
  extent.add(count, row);
  extent.add(width, column);
  m.memory = elements(in, dtype, extent.elements(), width);
  const int64_t first = extent.empty ? 0 : -extent.lowest * static_cast<int64_t>(size_of(dtype));
  m.batch = {{m.memory.data() + first, dtype, count, width, row, column}, images, image};
  return m;
}

// (images, count) values, by way of a matrix of one column in the same memory.
template <typename T>
struct Values {
  std::vector<T> memory;
  cpu::ValueBatch<T> batch;
  T at(int64_t b, int64_t i) const { return batch[b][i * batch.stride]; }
};

template <typename T, typename Fill>
Values<T> values(Bytes& in, int64_t images, int64_t count, const Fill& fill) {
  Values<T> v;
  int64_t stride = 1, image = count;
  switch (in.below(8)) {
    case 0:
      stride = 3;
      image = 3 * count;
      break;
    case 1:
      stride = -1;
      break;
    case 2:
      stride = images;
      image = 1;
      break;
    case 3:
      image = 0;
      break;
    default:
      break;
  }
  Extent extent;
  extent.add(images, image);
  extent.add(count, stride);
  v.memory.resize(static_cast<size_t>(extent.elements()));
  T* first = v.memory.data() - (extent.empty ? 0 : extent.lowest);
  v.batch = {first, image, stride};
  for (int64_t b = 0; b < images; ++b) {
    for (int64_t i = 0; i < count; ++i) first[b * image + i * stride] = fill(b, i);
  }
  return v;
}

}  // namespace fuzz
