// Schemas and argument checks: the only Python-facing file of the CPU library.

// Importable as a Python module (epi_kernels._C); importing it registers the operators.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <string>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                               nullptr,               nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace {

// The widest instruction set this processor offers, of those the kernels are written for.
std::string cpu_capability() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return "avx512";
  }
  if (__builtin_cpu_supports("avx2")) {
    return "avx2";
  }
#endif
  return "plain";
}

}  // namespace

STABLE_TORCH_LIBRARY(epi_kernels, m) {
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(epi_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
