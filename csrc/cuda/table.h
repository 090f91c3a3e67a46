// What the launches hand to the kernels: the columns of the device tables and the plain structs that
// kernels take by value. No CUDA header: the host emulation in python_tests reads this too.

#pragma once

#include <cstdint>

namespace epi::cuda {

// Columns and flags of a table row (epi_kernels/backends/table.py).
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
  kSkipped = 512,  // found_inf was not 0: the step leaves the row alone; prepare_body.h sets it
  kAligned = 256,  // every tensor the kernel reads or writes starts on 16 bytes (backends/cuda.py)
};

// Spans start at multiples of this many elements of a tensor, so they own whole mask bytes, and keep
// the alignment of the tensor's first element.
constexpr int64_t kChunk = 4096;
constexpr int kSampleBlock = 64;  // SAMPLE_BLOCK of reference/threshold.py
constexpr int kThreads = 256;     // a block; a power of two, for the reductions
constexpr int kWarp = 32;
constexpr int kMaxBins = 2048;  // of a histogram, the column of keys above it left out

// The work: program p handles the elements from programs[p] to programs[p + 1], in row order.
struct Work {
  const int64_t* rows;      // [n, kColumns]
  const int64_t* programs;  // [n_programs + 1, 2]: row, element in the row
  int64_t n_programs;
};

// Statistics of the part of one layer that one program saw.
struct StatsPartial {
  float minimum, maximum;  // over finite u
  int64_t nonfinite;
  double sum, sum_of_squares;  // 0 unless moments are asked for
};

// Where partials go: the run r of a layer's consecutive rows, seen by program p, has slot p + r.
struct StatsOut {
  const int64_t* runs;     // [n]: the run of each row
  StatsPartial* partials;  // [n_programs + n_runs]
  bool moments;
};

// Which of the 48 combinations a step launch is for, and which source holds its kernels. 4-bit states have no
// importance beside them.
enum class Weights : int { kFloat32, kBfloat16, kCorrected };
enum class Stored : int { kFloat32, kBfloat16, kInt8, kInt4 };
enum class Importance : int { kShared, kFloat32, kBfloat16, kInt8 };
enum class StepSource { kFloats, kCodes, kCorrected };
constexpr int kStepKinds = 48;
struct StepKind {
  Weights param;
  Stored state;
  Importance importance;
  bool stats;

  StepSource source() const {
    if (param == Weights::kCorrected) return StepSource::kCorrected;
    const bool codes = state == Stored::kInt8 || state == Stored::kInt4 || importance == Importance::kInt8;
    return codes ? StepSource::kCodes : StepSource::kFloats;
  }
};

constexpr int kHyperColumns = 4;  // lr, beta1, beta2, eps

// Before a step: eps and step_size of `scalars`, kRngKey and kFlags of `rows` are written, `step` goes on.
struct PrepareArgs {
  int64_t* rows;        // [n, kColumns]; kRngKey holds the parameter's rng_id
  float* scalars;       // [n, 9]
  const double* hyper;  // [n, kHyperColumns]
  int64_t n_rows;
  uint32_t mixed_seed;
  const float* grad_scale;  // [1] or nullptr
  float* grad_multiplier;   // [1], written where there is a grad_scale
  const float* found_inf;   // [1] or nullptr
};

struct StepArgs {
  Work work;
  const float* scalars;  // [n, 9]
  StatsOut stats;        // read where StepKind::stats
  bool stochastic_rounding;
  const float* grad_multiplier;  // [1]; nullptr: the gradient is taken as it is
};

struct StatsArgs {
  Work work;
  StatsOut stats;
};

struct MergeArgs {
  const int64_t* run_slots;  // [n_runs, 3]: layer, first slot, slot after the last
  int64_t n_runs;
  const StatsPartial* partials;
  bool moments;
  float* minimum;       // [layers]
  float* maximum;       // [layers]
  int64_t* nonfinite;   // [layers]
  double* moment_sums;  // [layers, 2]
};

struct CountArgs {
  Work work;
  const float* shift;  // [layers]
  const float* scale;  // [layers]
  float keep_factor;
  int64_t n_layers;
  const int64_t* domain;     // [layers]
  const int64_t* lo;         // [domains] key
  const int64_t* hi;         // [domains] key, exclusive
  const int64_t* bin_shift;  // [domains]
  const bool* done;          // [domains]
  int64_t bins;
  int64_t sample_stride;
  float* bounds;       // [layers, 4] scratch: lo, lo where isolated, hi, hi where isolated
  int64_t* histogram;  // [domains, bins + 1]
};

struct SelectArgs {
  Work work;
  const float* shift;       // [layers]
  const float* scale;       // [layers]
  const float* thresholds;  // [layers]
  float keep_factor;
  bool positive_only;
  int64_t n_layers;
  float* bounds;   // [layers, 2] scratch: bound on u, bound where isolated
  int64_t* drift;  // [layers, 3]: isolated, entered, released
};

}  // namespace epi::cuda
