// Plays the CUDA kernels on the CPU: the bodies of csrc/cuda as they are, one system thread a CUDA
// thread, a barrier for __syncthreads, shared memory full of garbage when a block starts.

#include <algorithm>
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/launch.h"
#include "cuda/mask_body.h"
#include "cuda/prepare_body.h"
#include "cuda/step_types.h"

namespace epi::cuda {
namespace {

int threads_of_a_block = 8;

// Where the threads of one group meet.
struct GroupPlace {
  std::barrier<> barrier{kGroup};
  uint32_t values[kGroup];
};

struct HostBlock {
  int thread_, threads_;
  int64_t index_;
  std::barrier<>* barrier;
  GroupPlace* group;

  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int64_t index() const { return index_; }
  void sync() const { barrier->arrive_and_wait(); }
  uint32_t group_max(uint32_t value) const {
    group->values[thread_ % kGroup] = value;
    group->barrier.arrive_and_wait();
    const uint32_t largest = *std::max_element(group->values, group->values + kGroup);
    group->barrier.arrive_and_wait();  // all have read: the place may be used again
    return largest;
  }
  void add(uint32_t* shared, uint32_t value) const { __atomic_fetch_add(shared, value, __ATOMIC_RELAXED); }
  void add(int64_t* global, int64_t value) const { __atomic_fetch_add(global, value, __ATOMIC_RELAXED); }
};

// body(block, shared) for every block of a launch.
template <class Shared, class Body>
void run(int64_t blocks, const Body& body) {
  const int threads = threads_of_a_block;
  std::barrier<> barrier(threads);
  std::vector<Shared> shared(kThreads);
  const auto groups = std::make_unique<GroupPlace[]>((threads + kGroup - 1) / kGroup);
  auto thread_main = [&](int thread) {
    for (int64_t index = 0; index < blocks; ++index) {
      barrier.arrive_and_wait();
      if (thread == 0) memset(static_cast<void*>(shared.data()), 0xAB, shared.size() * sizeof(Shared));
      barrier.arrive_and_wait();
      body(HostBlock{thread, threads, index, &barrier, &groups[thread / kGroup]}, shared.data());
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 1; thread < threads; ++thread) pool.emplace_back(thread_main, thread);
  thread_main(0);
  for (auto& thread : pool) thread.join();
}

template <StepSource kSource>
int launch_step_of(const StepArgs& args, const StepKind& kind) {
  with_step_types<kSource>(kind, [&]<class P, class S, class U>(StepTypes<P, S, U>) {
    run<StatsPartial>(args.work.n_programs, [&](const HostBlock& block, StatsPartial* shared) {
      if (kind.stats) {
        step_stats_program<P, S, U>(args, block, shared);
      } else {
        step_program<P, S, U>(args, block);
      }
    });
  });
  return 0;
}

}  // namespace

int launch_prepare(const PrepareArgs& args, void*) {
  for (int64_t r = 0; r < args.n_rows; ++r) prepare_row(args, r);
  return 0;
}

int launch_step(const StepArgs& args, const StepKind& kind, void*) {
  return launch_step_of<StepSource::kFloats>(args, kind);
}

int launch_step_codes(const StepArgs& args, const StepKind& kind, void*) {
  return launch_step_of<StepSource::kCodes>(args, kind);
}

int launch_step_corrected(const StepArgs& args, const StepKind& kind, void*) {
  return launch_step_of<StepSource::kCorrected>(args, kind);
}

int launch_stats(const StatsArgs& args, void*) {
  run<StatsPartial>(args.work.n_programs, [&](const HostBlock& block, StatsPartial* shared) {
    stats_program(args, block, shared);
  });
  return 0;
}

int launch_merge(const MergeArgs& args, void*) {
  run<StatsPartial>(args.n_runs,
                    [&](const HostBlock& block, StatsPartial* shared) { merge_run(args, block, shared); });
  return 0;
}

int launch_count(const CountArgs& args, void*) {
  for (int64_t i = 0; i < 4 * args.n_layers; ++i) count_bound(args, i);
  run<CountShared>(args.work.n_programs,
                   [&](const HostBlock& block, CountShared* shared) { count_program(args, block, shared); });
  return 0;
}

int launch_select(const SelectArgs& args, void*) {
  for (int64_t i = 0; i < 2 * args.n_layers; ++i) select_bound(args, i);
  run<SelectShared>(args.work.n_programs, [&](const HostBlock& block, SelectShared* shared) {
    select_program(args, block, shared);
  });
  return 0;
}

}  // namespace epi::cuda

// What bindings_cuda.cpp takes from libraries that are not here.
extern "C" {
void emulate_threads(int threads) {
  epi::cuda::threads_of_a_block = threads;
}
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
const char* cudaGetErrorString(int) {
  return "no error is emulated";
}
}
