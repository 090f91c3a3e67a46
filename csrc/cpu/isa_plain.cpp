// The stages in portable C++: every processor, and the only path where there is no AVX2.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EPI_ISA plain
#include "cpu/codes_plain.h"
#include "cpu/isa.h"

namespace epi {
constinit const Kernels kPlainKernels = plain::stages("plain");
}
