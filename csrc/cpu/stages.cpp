#include "cpu/stages.h"

#include "math/adamw.h"

namespace epi {
namespace {

bool skip_none(TableRow) {
  return false;
}

// In the order of the tasks, whoever finished them first.
void merge(const Table& table, const Tasks& tasks, const std::vector<StatsPartial>& partials,
           const std::vector<int32_t>& row_of, const LayerStats& stats) {
  for (int64_t i = 0; i < tasks.size(); ++i) {
    const int64_t layer = table[row_of[i]][kLayer];
    if (layer < 0) continue;
    const StatsPartial& part = partials[i];
    float &minimum = stats.minimum[layer], &maximum = stats.maximum[layer];
    minimum = part.minimum < minimum ? part.minimum : minimum;
    maximum = part.maximum > maximum ? part.maximum : maximum;
    stats.nonfinite[layer] += part.nonfinite;
    if (stats.with_moments) {
      stats.moments[2 * layer] += part.sum;
      stats.moments[2 * layer + 1] += part.sum_of_squares;
    }
  }
}

// A thread's counts of one domain, added to the shared row when it goes on to another.
class WorkerHistogram {
 public:
  int64_t* of(int64_t domain, const Search& search) {
    if (domain != domain_) {
      flush(search);
      domain_ = domain;
    }
    return counts_.data();
  }
  void flush(const Search& search) {
    if (domain_ < 0) return;
    int64_t* shared = search.histogram + domain_ * search.columns;
    for (int64_t i = 0; i < search.columns; ++i) {
      if (counts_[i] != 0) __atomic_fetch_add(shared + i, counts_[i], __ATOMIC_RELAXED);
      counts_[i] = 0;
    }
  }
  void resize(int64_t columns) { counts_.assign(columns, 0); }

 private:
  int64_t domain_ = -1;
  std::vector<int64_t> counts_;
};

}  // namespace

void step(const Kernels& kernels, const Table& table, const float* scalars, StepArguments arguments,
          const LayerStats* stats) {
  const Tasks tasks(table, skip_none);
  const int64_t n = stats != nullptr ? tasks.size() : 0;
  std::vector<StatsPartial> partials(n);
  std::vector<int32_t> row_of(n);
  tasks.run([&](int64_t, const Task& task) {
    const TableRow row = table[task.row];
    StepArguments a = arguments;
    a.scalars = scalars + task.row * scalar::kStepScalars;
    a.stats = nullptr;
    if (stats != nullptr) {
      row_of[task.index] = static_cast<int32_t>(task.row);
      if (row[kLayer] >= 0) a.stats = &partials[task.index];
    }
    kernels.step(row, task.start, task.stop, a);
  });
  if (stats != nullptr) merge(table, tasks, partials, row_of, *stats);
}

void accumulate(const Kernels& kernels, const Table& table, const LayerStats& stats) {
  const Tasks tasks(table, skip_none);
  std::vector<StatsPartial> partials(tasks.size());
  std::vector<int32_t> row_of(tasks.size());
  tasks.run([&](int64_t, const Task& task) {
    row_of[task.index] = static_cast<int32_t>(task.row);
    kernels.stats(table[task.row], task.start, task.stop, stats.with_moments, &partials[task.index]);
  });
  merge(table, tasks, partials, row_of, stats);
}

void count(const Kernels& kernels, const Table& table, const LayerTerms& terms, const Search& search,
           int64_t sample_stride, std::vector<NotedKeys>* noted) {
  const Tasks tasks(table, [&](TableRow row) { return search.done[search.domain[row[kLayer]]]; });
  struct Worker {
    WorkerHistogram histogram;
    CountArguments arguments{};
    int64_t layer = -1;
  };
  std::vector<Worker> workers(tasks.workers());
  for (Worker& worker : workers) worker.histogram.resize(search.columns);
  tasks.run([&](int64_t id, const Task& task) {
    Worker& worker = workers[id];
    CountArguments& a = worker.arguments;
    const int64_t layer = table[task.row][kLayer], domain = search.domain[layer];
    if (layer != worker.layer) {
      worker.layer = layer;
      const int64_t lo = search.lo[domain], hi = search.hi[domain];
      a.shift = terms.shift[layer];
      a.scale = terms.scale[layer];
      a.keep_factor = terms.keep_factor;
      for (int isolated = 0; isolated < (a.keep_factor != 1.0f ? 2 : 1); ++isolated) {
        a.lo_bound[isolated] = kernels.u_bound_of_key(a.shift, a.scale, a.keep_factor, isolated != 0, lo);
        a.hi_bound[isolated] = kernels.u_bound_of_key(a.shift, a.scale, a.keep_factor, isolated != 0, hi);
      }
      a.lo = static_cast<uint32_t>(lo);
      a.bin_shift = static_cast<int>(search.bin_shift[domain]);
      a.sample_stride = sample_stride;
      a.last_bin = search.columns - 1;
    }
    a.histogram = worker.histogram.of(domain, search);
    if (noted == nullptr) {
      kernels.count(table[task.row], task.start, task.stop, a);
      return;
    }
    NotedKeys& own = (*noted)[id];
    if (own.runs.empty() || own.runs.back().domain != domain) own.runs.push_back({domain, own.size});
    KeyBuffer buffer{own.keys.get(), own.size, own.capacity, own.overflowed};
    a.noted = &buffer;
    kernels.count(table[task.row], task.start, task.stop, a);
    own.size = buffer.size;
    own.overflowed = buffer.overflowed;
  });
  for (Worker& worker : workers) worker.histogram.flush(search);
}

void select(const Kernels& kernels, const Table& table, const LayerTerms& terms, const float* thresholds,
            bool positive_only, int64_t* drift) {
  const Tasks tasks(table, skip_none);
  struct Worker {
    SelectArguments arguments{};
    int64_t layer = -1;
  };
  std::vector<Worker> workers(tasks.workers());
  tasks.run([&](int64_t id, const Task& task) {
    Worker& worker = workers[id];
    SelectArguments& a = worker.arguments;
    const int64_t layer = table[task.row][kLayer];
    if (layer != worker.layer) {
      worker.layer = layer;
      a.by_old_bit = terms.keep_factor != 1.0f;
      for (int isolated = 0; isolated < (a.by_old_bit ? 2 : 1); ++isolated) {
        a.bound[isolated] =
            kernels.u_bound_of_selection(terms.shift[layer], terms.scale[layer], terms.keep_factor,
                                         isolated != 0, thresholds[layer], positive_only);
      }
    }
    for (int64_t& n : a.drift) n = 0;
    kernels.select(table[task.row], task.start, task.stop, a);
    for (int i = 0; i < 3; ++i) {
      __atomic_fetch_add(drift + 3 * layer + i, a.drift[i], __ATOMIC_RELAXED);
    }
  });
}

}  // namespace epi
