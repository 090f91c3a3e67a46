// Stage 3, threshold: the k-th largest score of every domain, over a table that holds all elements
// with state. The brackets and the proof are those of KthSearch (epi_kernels/reference/threshold.py).

#pragma once

#include <cstdint>

#include "cpu/stages.h"

namespace epi {

struct SearchProblem {
  int64_t layers, domains;
  const int64_t* domain;      // [layers]
  const int64_t* zeros;       // [layers]: eligible elements without state, whose u is 0
  const int64_t* n_elements;  // [domains]: all eligible ones
  const int64_t* k;           // [domains]
  int64_t floor, end;         // every finite score's key lies in [floor, end)
  int64_t bins;               // of a histogram, a power of two
  int64_t sample_from;        // sample where there are so many elements or more
};

struct SearchResult {
  float* threshold;   // [domains]: +inf where k is 0
  int64_t* count_ge;  // [domains]: finite elements with score >= threshold
};

void find_thresholds(const Kernels&, const Table&, const LayerTerms&, const SearchProblem&,
                     const SearchResult&);

}  // namespace epi
