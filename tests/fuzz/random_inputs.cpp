// A main for the fuzz target without a fuzzer: <op> COUNT [SEED] tries COUNT random inputs; <op> 0 FILE tries those
// of a file, a line each in hexadecimal digits. An input that breaks a promise is printed in these digits.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
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
  long tried = count;
  std::ifstream file(argc > 2 && count == 0 ? argv[2] : "");
  for (std::string line; std::getline(file, line); ++tried) {
    input.clear();
    for (size_t at = 0; at + 1 < line.size(); at += 2) {
      input.push_back(static_cast<uint8_t>(std::stoul(line.substr(at, 2), nullptr, 16)));
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld\n", tried);
  return 0;
}
