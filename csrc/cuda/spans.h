// How a program finds its work: consecutive elements of one row at a time.

#pragma once

#include "cuda/block.h"
#include "cuda/table.h"

namespace epi::cuda {

struct Span {
  const int64_t* row;  // [kColumns]
  int64_t row_index;
  int64_t begin, end;  // elements of the row; begin is a multiple of kChunk

  template <class T>
  EPI_KERNEL T* pointer(Column column) const {
    T* p = reinterpret_cast<T*>(row[column]);
#if defined(__CUDA_ARCH__)
    // An address from a table could be of any memory: say which, or accesses stay generic.
    __builtin_assume(__isGlobal(p));
#endif
    return p;
  }
  EPI_KERNEL bool has(Flag flag) const { return (row[kFlags] & flag) != 0; }
};

// Calls visit(span) for every span of a program; all threads of the block see the same spans.
template <class Visit>
EPI_KERNEL void for_each_span(const Work& work, int64_t program, const Visit& visit) {
  const int64_t* bounds = work.programs + 2 * program;
  const int64_t last_row = bounds[2], last_end = bounds[3];
  int64_t begin = bounds[1];
  for (int64_t r = bounds[0]; r < last_row || (r == last_row && begin < last_end); ++r) {
    const int64_t* row = work.rows + r * kColumns;
    const int64_t end = r == last_row ? last_end : row[kNumel];
    visit(Span{row, r, begin, end});
    begin = 0;
  }
}

}  // namespace epi::cuda
