// What the greedy choice builds on, for the SIMD level in use: a product has the same bits whichever row, column and
// tile it stands in, it is one chain of multiply-adds, and the square that packing takes of a row is its product with
// itself; a Cholesky row has the same bits however many are made at a time; a product on its own is as near as it says,
// and the closest of points is the one that a loop finds. Prints how often each does not hold.
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

// A product on its own, of bf16 values where the level multiplies pairs of them too.
long near() {
  const int64_t depth = 1 + below(1500);
  std::vector<float> x = normals(depth), y = normals(depth);
  std::vector<uint16_t> a(static_cast<size_t>(depth + depth % 2)), b = a;
  double exact = 0.0, left = 0.0, right = 0.0;
  for (size_t d = 0; d < x.size(); ++d) {
    const auto cut = [](float& value, uint16_t& half) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      half = static_cast<uint16_t>(bits >> 16);
      bits &= 0xffff0000u;
      std::memcpy(&value, &bits, sizeof bits);
    };
    cut(x[d], a[d]);
    cut(y[d], b[d]);
    exact += static_cast<double>(x[d]) * y[d];
    left += static_cast<double>(x[d]) * x[d];
    right += static_cast<double>(y[d]) * y[d];
  }
  const double most = (static_cast<double>(depth) / 8 + 64) * 0x1p-24 * std::sqrt(left * right);
  const auto off = [&](float found) { return !(std::fabs(found - exact) <= most); };
  long failures = off(simd().dot(x.data(), y.data(), depth));
  if (simd().dot_bf16 != nullptr) {
    const std::vector<uint16_t>* pairs[] = {&a, &b};
    std::vector<float> words[2];
    for (const int side : {0, 1}) {
      words[side].resize(a.size() / 2);
      std::memcpy(words[side].data(), pairs[side]->data(), a.size() * sizeof a[0]);
    }
    failures += off(simd().dot_bf16(words[0].data(), words[1].data(), static_cast<int64_t>(words[0].size())));
  }
  return failures;
}

// Points on a grid, so that distances are exact, and often the same.
long closest() {
  const int64_t n = kGroup * (1 + below(20)), own = below(n);
  std::vector<std::vector<float>> x(kCoordinates, std::vector<float>(static_cast<size_t>(n)));
  const float* rows[kCoordinates];
  for (size_t a = 0; a < x.size(); ++a) {
    for (float& value : x[a]) value = static_cast<float>(below(4));
    rows[a] = x[a].data();
  }
  long failures = 0;
  for (float beyond = -1.0f; beyond < 60.0f;) {
    Closest wanted{own, 0.0f};
    for (int64_t c = 0; c < n; ++c) {
      float distance = 0.0f;
      for (const float* row : rows) distance += (row[c] - row[own]) * (row[c] - row[own]);
      if (c == own || distance <= beyond || (wanted.point != own && distance >= wanted.distance)) continue;
      wanted = {c, distance};
    }
    const Closest found = simd().closest(rows, n, own, beyond);
    failures += found.point != wanted.point || (found.point != own && found.distance != wanted.distance);
    beyond = wanted.point == own ? 60.0f : wanted.distance;
  }
  return failures;
}

}  // namespace

int main() {
  long position = 0, chain = 0, square = 0, pieces = 0, alone = 0, point = 0;
  for (int i = 0; i < 200; ++i) {
    products(position, chain, square);
    cholesky(position, pieces);
    alone += near();
    point += closest();
  }
  std::printf("%s: position %ld, chain %ld, square %ld, pieces %ld, alone %ld, point %ld\n", simd().name, position,
              chain, square, pieces, alone, point);
  return position + chain + square + pieces + alone + point != 0;
}
