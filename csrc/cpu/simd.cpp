#include "simd.hpp"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace script::cpu {

extern const SimdOps kBaselineOps;
#if defined(__x86_64__)
extern const SimdOps kAvx2Ops;
extern const SimdOps kAvx512Ops;
extern const SimdOps kAvx512Bf16Ops;
#endif

namespace {

constexpr const char* kLevels[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// The highest level the environment allows, as an index into kLevels.
int highest_level() {
  const char* wanted = std::getenv("SCRIPT_KERNELS_SIMD");
  if (wanted == nullptr || *wanted == '\0') return 3;
  for (int level = 0; level < 4; ++level) {
    if (std::strcmp(wanted, kLevels[level]) == 0) return level;
  }
  throw std::invalid_argument(std::string("SCRIPT_KERNELS_SIMD: expected baseline, avx2, avx512 or avx512_bf16, got ") +
                              wanted);
}

const SimdOps* choose() {
  [[maybe_unused]] const int highest = highest_level();
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && highest >= 3) return &kAvx512Bf16Ops;
  if (avx512 && highest >= 2) return &kAvx512Ops;
  if (avx2 && highest >= 1) return &kAvx2Ops;
#endif
  return &kBaselineOps;
}

}  // namespace

const SimdOps& simd() {
  static const SimdOps* ops = choose();
  return *ops;
}

}  // namespace script::cpu
