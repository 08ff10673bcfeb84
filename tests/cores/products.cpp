// What the greedy choice builds on, for the SIMD level in use: a product has the same bits whichever row, column and
// tile it stands in, it is one chain of multiply-adds, and the square that packing takes of a row is its product with
// itself; a Cholesky row has the same bits however many are made at a time. Prints how often each does not hold.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "simd/simd.hpp"

using namespace script::cpu;

namespace {

#if defined(__aarch64__)
constexpr bool kFused = true;  // at every level
#else
constexpr bool kFused = false;
#endif

std::mt19937 source(1);
float normal() { return std::normal_distribution<float>()(source); }
int64_t below(int64_t n) { return static_cast<int64_t>(source() % static_cast<uint64_t>(n)); }
bool differ(float x, float y) { return std::memcmp(&x, &y, sizeof x) != 0; }

std::vector<float> normals(int64_t n, float scale = 1.0f) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& x : values) x = scale * normal();
  return values;
}

// One row of another times a panel of equal columns.
void products(long& position, long& chain, long& square) {
  const int rows = 1 + static_cast<int>(below(20));
  const int64_t depth = 1 + below(300);
  const std::vector<float> x = normals(depth), y = normals(depth);
  std::vector<const float*> left(static_cast<size_t>(rows), x.data()), right(kPanel, y.data());
  std::vector<float> panel(static_cast<size_t>(depth * kPanel)), out(static_cast<size_t>(rows * kPanel));
  float squares[kPanel];
  simd().pack_squares(right.data(), kPanel, depth, panel.data(), squares);
  for (int groups = 1; groups <= kPanel / kGroup; ++groups) {
    simd().gemm(left.data(), rows, panel.data(), groups, depth, out.data());
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < groups * kGroup; ++c) position += differ(out[static_cast<size_t>(r * kPanel + c)], out[0]);
    }
  }
  float sum = 0.0f, part = 0.0f;
  for (int64_t d = 0; d < depth; ++d) {
    const size_t at = static_cast<size_t>(d);
    part = kFused || std::strcmp(simd().name, "baseline") != 0 ? std::fmaf(x[at], y[at], part) : part + x[at] * y[at];
    if ((d + 1) % 128 == 0 || d + 1 == depth) {
      sum = d < 128 ? part : sum + part;
      part = 0.0f;
    }
  }
  chain += differ(out[0], sum);
  std::fill(left.begin(), left.end(), y.data());
  simd().gemm(left.data(), rows, panel.data(), kPanel / kGroup, depth, out.data());
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < kPanel; ++c) square += differ(out[static_cast<size_t>(r * kPanel + c)], squares[c]);
  }
}

// Rows of equal columns, made one by one and in pieces of any size.
void cholesky(long& position, long& pieces) {
  const int64_t count = 1 + below(20), done = below(30);
  const std::vector<float> earlier = normals(done, 0.3f), factor = normals(count * 64, 0.3f), entry = normals(count);
  const std::vector<float> inverse = normals(count);
  std::vector<float> rows[2], residual[2];
  for (const int way : {0, 1}) {
    rows[way].resize(static_cast<size_t>((done + count) * kPanel));
    residual[way].assign(kPanel, 500.0f);
    for (int64_t i = 0; i < done * kPanel; ++i) {
      rows[way][static_cast<size_t>(i)] = earlier[static_cast<size_t>(i / kPanel)];
    }
    for (int64_t first = 0; first < count;) {
      const int m = static_cast<int>(way == 0 ? 1 : 1 + below(count - first));
      std::vector<std::vector<float>> entries;
      std::vector<const float*> kernel, columns;
      for (int a = 0; a < m; ++a) entries.emplace_back(kPanel, entry[static_cast<size_t>(first + a)]);
      for (int a = 0; a < m; ++a) {
        kernel.push_back(entries[static_cast<size_t>(a)].data());
        columns.push_back(factor.data() + (first + a) * 64);
      }
      simd().extend(kernel.data(), m, columns.data(), inverse.data() + first, done + first, rows[way].data(),
                    residual[way].data());
      first += m;
    }
  }
  for (size_t i = 0; i < rows[0].size(); ++i) {
    position += differ(rows[1][i], rows[1][i / kPanel * kPanel]);
    pieces += differ(rows[0][i], rows[1][i]);
  }
  for (size_t c = 0; c < kPanel; ++c) {
    position += differ(residual[1][c], residual[1][0]);
    pieces += differ(residual[0][c], residual[1][c]);
  }
}

}  // namespace

int main() {
  long position = 0, chain = 0, square = 0, pieces = 0;
  for (int i = 0; i < 200; ++i) {
    products(position, chain, square);
    cholesky(position, pieces);
  }
  std::printf("%s: position %ld, chain %ld, square %ld, pieces %ld\n", simd().name, position, chain, square, pieces);
  return position + chain + square + pieces != 0;
}
