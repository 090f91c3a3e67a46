// The four stages over a table of parameters. Arguments are checked in bindings.cpp.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/tasks.h"

namespace epi {

// Rows of LayerStats (reference/stats.py).
struct LayerStats {
  float* minimum;
  float* maximum;
  int64_t* nonfinite;
  double* moments;  // [layers, 2]
  bool with_moments;
};

// Rows of ScoreTerms, with the hysteresis factor.
struct LayerTerms {
  const float* shift;
  const float* scale;
  float keep_factor;
};

// Rows of KthSearch (reference/threshold.py), one a domain.
struct Search {
  const int64_t* lo;
  const int64_t* hi;
  const int64_t* bin_shift;
  const bool* done;
  const int64_t* domain;  // [layers]
  int64_t* histogram;     // [domains, columns]
  int64_t columns;
};

// What one thread noted of the elements inside the brackets: runs of keys, each of one domain.
struct NotedKeys {
  struct Run {
    int64_t domain, first;
  };
  std::unique_ptr<uint32_t[]> keys;  // not initialised
  int64_t capacity = 0;
  std::vector<Run> runs;
  int64_t size = 0;
  bool overflowed = false;
};

// `arguments`: all but scalars and stats. `stats`: nullptr when no refresh follows.
void step(const Kernels&, const Table&, const float* scalars, StepArguments arguments,
          const LayerStats* stats);
void accumulate(const Kernels&, const Table&, const LayerStats&);
// `noted`: nullptr, or one a thread (torch's number of threads).
void count(const Kernels&, const Table&, const LayerTerms&, const Search&, int64_t sample_stride,
           std::vector<NotedKeys>* noted = nullptr);
void select(const Kernels&, const Table&, const LayerTerms&, const float* thresholds, bool positive_only,
            int64_t* drift);

}  // namespace epi
