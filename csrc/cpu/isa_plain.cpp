// The stages in portable C++: every processor, and the only path where there is no AVX2.

#include <cmath>
#include <cstdint>
#include <cstring>

// everything that takes a vector by value is inlined: no call depends on how it is passed
#pragma GCC diagnostic ignored "-Wpsabi"
#define EPI_ISA plain
#include "cpu/vec_plain.h"
#include "cpu/isa.h"

namespace epi {
constinit const Kernels kPlainKernels = plain::stages("plain");
}
