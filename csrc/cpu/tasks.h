// Cuts a table into tasks and lets torch's threads take them one after the other.
//
// Where a tensor is cut depends on its size alone, so partial results combined in the order of the
// tasks are the same with any number of threads, and after a resume.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace epi {

// Elements a task, by the size of the tensor alone: small enough that a million elements keep every
// thread busy, and for larger tensors long enough for the hardware's prefetchers (Zen 4, two
// threads, 2e7 elements: passes of a refresh 8 % faster with 131072 than with 32768, no change above).
constexpr int64_t kChunk = 32768;
constexpr int64_t kLargeChunk = 131072;
constexpr int64_t kLargeTensor = int64_t{1} << 21;
static_assert(kChunk % kBlock == 0 && kLargeChunk % kBlock == 0);
// Partial results are kept for every task: beyond this many, tasks grow instead.
constexpr int64_t kMaxTasksOfOneTensor = 4096;
// Below this many elements waking a second thread takes longer than the work.
constexpr int64_t kSerialElements = 16384;

struct Table {
  const int64_t* rows;
  int64_t size;

  TableRow operator[](int64_t i) const { return rows + i * kColumns; }
};

struct Task {
  int64_t index;  // position among all tasks
  int64_t row, start, stop;
};

class Tasks {
 public:
  // `skip(row)`: rows that take no part.
  template <class Skip>
  Tasks(const Table& table, const Skip& skip) : table_(table), first_(table.size + 1, 0) {
    for (int64_t i = 0; i < table.size; ++i) {
      const int64_t n = skip(table[i]) ? 0 : table[i][kNumel];
      first_[i + 1] = first_[i] + (n + chunk(table[i]) - 1) / chunk(table[i]);
      elements_ += n;
    }
  }

  int64_t size() const { return first_.back(); }

  // Calls work(worker, task) for every task; workers are numbered from 0 to workers() - 1.
  template <class Work>
  void run(const Work& work) const {
    std::atomic<int64_t> next{0};
    auto take_tasks = [&](int64_t worker, int64_t) {
      int64_t row = 0;
      for (;;) {
        const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
        if (index >= size()) return;
        while (first_[row + 1] <= index) ++row;  // indices only grow
        const int64_t pace = chunk(table_[row]), n = table_[row][kNumel];
        const int64_t start = (index - first_[row]) * pace;
        work(worker, Task{index, row, start, start + pace < n ? start + pace : n});
      }
    };
    if (workers() <= 1) {
      take_tasks(0, 1);
    } else {
      torch::stable::parallel_for(0, workers(), 1, take_tasks);
    }
  }

  int64_t workers() const {
    if (elements_ <= kSerialElements) return 1;
    const int64_t threads = torch::stable::get_num_threads();
    return threads < size() ? threads : size();
  }

 private:
  static int64_t chunk(TableRow row) {
    const int64_t n = row[kNumel], least = n < kLargeTensor ? kChunk : kLargeChunk;
    const int64_t most = least * kMaxTasksOfOneTensor;
    return least * (n <= most ? 1 : (n + most - 1) / most);
  }

  Table table_;
  std::vector<int64_t> first_;  // [rows + 1]: the first task of each row
  int64_t elements_ = 0;
};

}  // namespace epi
