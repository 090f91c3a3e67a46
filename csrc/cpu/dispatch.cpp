// Which instruction sets this processor has, of those the kernels are written for.

#include "cpu/kernels.h"

namespace epi {

const Kernels* kernels(int64_t isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case 2:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")
                 ? &kAvx512Kernels
                 : nullptr;
    case 1:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt")
                 ? &kAvx2Kernels
                 : nullptr;
  }
#endif
  return isa == 0 ? &kPlainKernels : nullptr;
}

}  // namespace epi
