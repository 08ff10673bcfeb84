// A main for the fuzz target without a fuzzer: <op> COUNT [SEED] tries COUNT random inputs; <op> FILE... tries files. A
// random input that breaks a promise is printed as hexadecimal digits, which `xxd -r -p` turns into a file.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerInitialize(int*, char*** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

std::vector<uint8_t> input;

void show(int) {
  for (const uint8_t byte : input) std::fprintf(stderr, "%02x", byte);
  std::fputc('\n', stderr);
  std::_Exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  LLVMFuzzerInitialize(&argc, &argv);
  const long count = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 0;
  std::mt19937_64 random(argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 0);
  std::signal(SIGABRT, show);
  for (long i = 0; i < count; ++i) {
    input.resize(16 + random() % 240);
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  for (int i = 1; count == 0 && i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    input.assign(std::istreambuf_iterator<char>(file), {});
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld\n", count == 0 ? argc - 1 : count);
  return 0;
}
