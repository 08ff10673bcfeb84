// _core: facts about the build, and the C++ cores on NumPy arrays, for runtimes without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/mask_intersect.hpp"
#include "cpu/simd.hpp"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", SCRIPT_COMPILER},
      {"simd", script::cpu::simd().name},
      {"cuda_archs", SCRIPT_CUDA_ARCHS},
      {"torch", SCRIPT_TORCH},
  };
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build facts, and the CPU cores of the ops on NumPy arrays.";
  m.def("build_info", &build_info,
        "compiler, torch built against, SIMD level in use on this CPU, CUDA architectures of the build (empty: none).");
}
