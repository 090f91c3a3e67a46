// What the drivers and the kernels of one instruction set say to each other. Plain data and function
// pointers only: nothing here may compile to code that differs with the instruction set.

#pragma once

#include <cstdint>

namespace epi {

// Columns and flags of the pointer table (epi_kernels/backends/table.py).
enum Column {
  kParam,
  kGrad,
  kExpAvg,
  kExpAvgSq,
  kImportance,
  kIsolationMask,
  kPersistentMask,
  kNumel,
  kLayer,
  kRngKey,
  kIndexOffset,
  kFlags,
  kExpAvgScale,
  kExpAvgSqScale,
  kImportanceScale,
  kStep,
  kWeightCorrection,
  kIndexRun,
  kIndexStride,
  kColumns,
};
enum Flag : int64_t {
  kParamBf16 = 1,
  kStateBf16 = 2,
  kImportanceBf16 = 4,
  kUBf16 = 8,
  kMaximize = 16,
  kStateInt8 = 32,
  kImportanceInt8 = 64,
  kUInt8 = 128,
  kStateInt4 = 2048,
  kUInt4 = 8192,
  kCorrectionInt8 = 1024,
};

using TableRow = const int64_t*;  // [kColumns]

constexpr int64_t kBlock = 512;   // elements; ranges start at multiples of it, so they own mask bytes
constexpr int kSampleBlock = 64;  // SAMPLE_BLOCK of reference/threshold.py

struct StatsPartial {
  float minimum, maximum;  // over finite u
  int64_t nonfinite;
  double sum, sum_of_squares;  // only when moments are asked for
};

struct StepArguments {
  const float* scalars;  // [9] of this row
  bool stochastic_rounding;
  bool has_grad_multiplier;
  float grad_multiplier;
  bool moments;
  StatsPartial* stats;  // nullptr: none wanted
};

// Keys of elements inside a bracket, noted while they are counted; more than there is room for are
// dropped and said to be.
struct KeyBuffer {
  uint32_t* keys;
  int64_t size, capacity;
  bool overflowed;
};

struct CountArguments {
  float shift, scale, keep_factor;  // score terms of the layer
  float lo_bound[2], hi_bound[2];   // bracket as bounds on u; [1]: for isolated elements
  uint32_t lo;                      // key
  int bin_shift;
  int64_t sample_stride;
  int64_t last_bin;    // the column of keys >= hi
  int64_t* histogram;  // [last_bin + 1], this thread's own
  KeyBuffer* noted;    // nullptr: only counted
};

struct SelectArguments {
  float bound[2];  // on u; [1]: for isolated elements
  bool by_old_bit;
  int64_t drift[3];  // isolated, entered, released: added to
};

// One instruction set. Ranges [start, stop) of one row; start is a multiple of kBlock.
struct Kernels {
  const char* name;
  void (*step)(TableRow, int64_t start, int64_t stop, const StepArguments&);
  void (*stats)(TableRow, int64_t start, int64_t stop, bool moments, StatsPartial*);
  void (*count)(TableRow, int64_t start, int64_t stop, const CountArguments&);
  void (*select)(TableRow, int64_t start, int64_t stop, SelectArguments&);
  // bounds on u, searched with the same score the kernels compute
  float (*u_bound_of_key)(float shift, float scale, float keep_factor, bool isolated, int64_t key);
  float (*u_bound_of_selection)(float shift, float scale, float keep_factor, bool isolated, float threshold,
                                bool positive_only);
};

extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// 0 plain, 1 avx2, 2 avx512; nullptr where this processor lacks it.
const Kernels* kernels(int64_t isa);

}  // namespace epi
