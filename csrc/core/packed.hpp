// Tokens packed into panels, and the raw products of rows with panels.
#pragma once

#include <cstring>

#include "tokens.hpp"

namespace script::cpu {

inline int64_t pad_to_panel(int64_t n) { return ceil_div(n, kPanel) * kPanel; }
inline int groups_of(int columns) { return (columns + kGroup - 1) / kGroup; }

inline constexpr int32_t kHole = -1;  // a position without a token
inline constexpr int kMostRows = 96;  // of one product with a panel

// Rows and panels of one image, in the order of `ids` (position -> token). `positions` is a multiple of kPanel; holes
// fill a panel up behind its tokens. bf16 tokens stay bf16 where the CPU multiplies them; everything else is fp32. Only
// the first `packed` positions, whole panels, can be asked for as panels; rows can be had of all.
class PackedTokens {
 public:
  // `squares` (may be null) gets the raw product of each packed position with itself.
  PackedTokens(const TokenView& tokens, const RowTable& table, const int32_t* ids, int64_t positions, int64_t packed,
               Scratch& scratch, const Parallel& parallel, float* squares = nullptr)
      : tokens_(tokens), table_(table), ids_(ids), positions_(positions), bf16_(uses_bf16(tokens.dtype)) {
    depth_ = bf16_ ? (tokens_.width + 1) / 2 : tokens_.width;  // in 32-bit words
    zero_row_ = scratch.take<float>(depth_, 0.0f);
    panels_ = scratch.take<float>(packed / kPanel * panel_size());
    parallel(packed / kPanel, 8 * panel_size(), [&](int64_t begin, int64_t end) {
      Scratch local;
      float* buffer = local.take<float>(row_buffer_size(kPanel));
      for (int64_t p = begin; p < end; ++p) {
        int32_t members[kPanel];
        const float* pointers[kPanel];
        const int count = columns(p);
        for (int c = 0; c < count; ++c) members[c] = static_cast<int32_t>(p * kPanel + c);
        rows(members, count, buffer, pointers);
        float* panel = panels_ + p * panel_size();
        if (squares == nullptr) {
          pack_rows(pointers, count, panel);
        } else {
          const auto pack = bf16_ ? simd().pack_squares_bf16 : simd().pack_squares;
          pack(pointers, count, depth_, panel, squares + p * kPanel);
        }
      }
    });
  }

  static bool uses_bf16(DType dtype) { return dtype == DType::kBFloat16 && simd().gemm_bf16 != nullptr; }

  int64_t positions() const { return positions_; }
  int64_t width() const { return tokens_.width; }
  // Columns of a panel that hold a token; they come first.
  int columns(int64_t p) const {
    int count = kPanel;
    while (count > 0 && ids_[p * kPanel + count - 1] == kHole) --count;
    return count;
  }
  int64_t panel_size() const { return depth_ * kPanel; }
  const float* panel(int64_t p) const { return panels_ + p * panel_size(); }
  int32_t token(int64_t position) const { return ids_[position]; }
  const int32_t* tokens(int64_t position) const { return ids_ + position; }
  float inverse_norm(int64_t position) const {
    return ids_[position] == kHole ? 0.0f : table_.inverse_norm[ids_[position]];
  }

  // Floats that `rows` may need to hold converted rows.
  int64_t row_buffer_size(int64_t rows) const { return rows * (depth_ + 1) + tokens_.width; }

  // Pointers to the rows at `members` (positions), converted into `buffer` where needed, as 32-bit words: fp32 or pairs
  // of bf16. A hole has a zero row.
  void rows(const int32_t* members, int64_t count, float* buffer, const float** out) const {
    float* widened = buffer;
    float* next = buffer + tokens_.width;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = ids_[members[r]];
      if (i == kHole || table_.inverse_norm[i] == 0.0f) {
        out[r] = zero_row_;
      } else if (bf16_) {
        out[r] = bf16_row(i, widened, next);
      } else {
        const float* x = tokens_.row(i, next);
        if (table_.scale[i] != 1.0f) {
          simd().scale_row(x, table_.scale[i], tokens_.width, next);
          x = next;
        }
        out[r] = x;
      }
      if (out[r] == next) next += depth_;
    }
  }

  // A panel of up to kPanel rows, as given by rows().
  void pack_rows(const float* const* rows, int count, float* panel) const { simd().pack(rows, count, depth_, panel); }

  // out[r][c] = x_r . x_c, raw, for up to kMostRows rows as given by rows() and the first 16 * groups columns of a
  // packed panel.
  void multiply(const float* const* rows, int count, const float* panel, int groups, float* out) const {
    if (bf16_) {
      const uint16_t* pointers[kMostRows];
      for (int r = 0; r < count; ++r) pointers[r] = reinterpret_cast<const uint16_t*>(rows[r]);
      simd().gemm_bf16(pointers, count, reinterpret_cast<const uint16_t*>(panel), groups, depth_ * 2, out);
    } else {
      simd().gemm(rows, count, panel, groups, depth_, out);
    }
  }

  // x . y of two rows as given by rows(), as good as `multiply`, but not its bits.
  float dot(const float* x, const float* y) const { return (bf16_ ? simd().dot_bf16 : simd().dot)(x, y, depth_); }

 private:
  const float* bf16_row(int64_t i, float* widened, float* out) const {
    const uint16_t* x = static_cast<const uint16_t*>(tokens_.data) + tokens_.place(i) * tokens_.row_stride;
    const bool in_place = tokens_.column_stride == 1 && tokens_.width % 2 == 0 && table_.scale[i] == 1.0f;
    if (in_place) return reinterpret_cast<const float*>(x);  // read as 16-bit values by the kernels
    uint16_t* y = reinterpret_cast<uint16_t*>(out);
    const float* row = tokens_.row(i, widened);
    if (table_.scale[i] != 1.0f) {
      simd().scale_row(row, table_.scale[i], tokens_.width, widened);
    }
    for (int64_t d = 0; d < tokens_.width; ++d) {
      uint32_t bits;
      std::memcpy(&bits, widened + d, 4);
      y[d] = static_cast<uint16_t>(bits >> 16);  // exact: the value was bf16 and the scale a power of two
    }
    if (tokens_.width % 2 != 0) y[tokens_.width] = 0;
    return out;
  }

  TokenView tokens_;
  RowTable table_;
  const int32_t* ids_;
  int64_t positions_;
  bool bf16_;
  int64_t depth_;
  const float* zero_row_;
  float* panels_;
};

}  // namespace script::cpu
