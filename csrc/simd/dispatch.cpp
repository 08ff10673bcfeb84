// Which of the levels this CPU has, and which of them the environment allows.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simd.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace script::cpu {

namespace {

struct Level {
  const SimdOps* ops;
  bool present;  // on this CPU, with all levels below it
};

#if defined(__x86_64__)

// The registers that the operating system saves: bit 1 SSE, 2 AVX, 5 to 7 AVX-512.
uint32_t saved_registers() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// By CPUID alone: the names that the compilers' own detection knows differ from one to the other.
struct Cpu {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;
  Cpu() {
    constexpr uint32_t kFma = 1u << 12, kOsSaves = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
    constexpr uint32_t kAvx2 = 1u << 5, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    constexpr uint32_t kAvx512Bf16 = 1u << 5, kYmm = 0x06, kZmm = 0xe6;
    const auto all = [](uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; };
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !all(c, kFma | kOsSaves | kAvx | kF16c)) return;
    const uint32_t saved = saved_registers();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = all(b, kAvx2) && all(saved, kYmm);
    avx512 = avx2 && all(b, kAvx512) && all(saved, kZmm);
    if (!avx512 || a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    avx512_bf16 = all(a, kAvx512Bf16);
  }
};

#elif defined(__aarch64__)

bool has_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older system headers do not name
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}

#endif

const SimdOps* choose() {
#if defined(__x86_64__)
  const Cpu cpu;
  const Level levels[] = {
      {&kOps_baseline, true}, {&kOps_avx2, cpu.avx2}, {&kOps_avx512, cpu.avx512}, {&kOps_avx512_bf16, cpu.avx512_bf16}};
#elif defined(__aarch64__)
  const Level levels[] = {{&kOps_baseline, true}, {&kOps_neon_bf16, has_bf16()}};
#else
  const Level levels[] = {{&kOps_baseline, true}};
#endif
  constexpr size_t kCount = sizeof levels / sizeof levels[0];
  const char* wanted = std::getenv("SCRIPT_KERNELS_SIMD");
  const bool any = wanted == nullptr || *wanted == '\0';
  const SimdOps* best = nullptr;
  std::string names;
  for (size_t i = 0; i < kCount; ++i) {
    if (levels[i].present) best = levels[i].ops;
    if (!any && std::strcmp(wanted, levels[i].ops->name) == 0) return best;
    names += (i == 0 ? "" : (i + 1 == kCount ? " or " : ", ")) + std::string(levels[i].ops->name);
  }
  if (any) return best;
  throw std::invalid_argument("SCRIPT_KERNELS_SIMD: expected " + names + ", got " + wanted);
}

}  // namespace

const SimdOps& simd() {
  static const SimdOps* ops = choose();
  return *ops;
}

}  // namespace script::cpu
