// Stage 1, step: the kernels and their launch; the work is in step_body.h. Three sources share them, so
// that they compile side by side: step.cu, step_codes.cu for what has 8-bit states, and step_corrected.cu for
// weights with corrections beside them.

#pragma once

#include "cuda/launch.h"
#include "cuda/step_types.h"

namespace epi::cuda {
namespace {

// Blocks a multiprocessor is to hold at least: as many as ptxas fits without spilling on sm_75 to
// sm_120 (nvcc 13.0); left to itself it spills some of these kernels. What is in flight then, 48 KiB
// and more a multiprocessor, is above latency times bandwidth of an H200 on paper; not measured.
// With codes or corrections a thread holds 16 elements of every tensor until it knows their block's maximum:
// 154 to 222 registers. Where tensors of several widths meet it holds up to 130. Blocks of half the size then
// leave less of a multiprocessor idle.
template <class P, class S, class U>
constexpr bool kStepLong = kStepWidth<P, S, U> == 16;
template <class P, class S, class U>
constexpr bool kStepPlain = !kOwn<U> && !kCorrected<P> && sizeof(P) == sizeof(S) && sizeof(P) > 1;
template <class P, class S, class U>
constexpr int kStepThreads = kStepPlain<P, S, U> ? kThreads : kThreads / 2;
template <class P, class S, class U>
constexpr int kStepBlocks = kStepPlain<P, S, U>  ? (sizeof(P) == 4 ? 3 : 2)
                            : kStepLong<P, S, U> ? 2
                                                 : 3;
template <class P, class S, class U>
constexpr int kStepStatsBlocks = kStepPlain<P, S, U> || kStepLong<P, S, U> ? 2 : 3;

template <class P, class S, class U>
__global__ void __launch_bounds__(kStepThreads<P, S, U>, kStepBlocks<P, S, U>)
    step_kernel(const StepArgs args) {
  step_program<P, S, U>(args, DeviceBlock{});
}

template <class P, class S, class U>
__global__ void __launch_bounds__(kStepThreads<P, S, U>, kStepStatsBlocks<P, S, U>)
    step_stats_kernel(const StepArgs args) {
  __shared__ StatsPartial shared[kStepThreads<P, S, U>];
  step_stats_program<P, S, U>(args, DeviceBlock{}, shared);
}

template <StepSource kSource>
int launch_step_of(const StepArgs& args, const StepKind& kind, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const auto programs = static_cast<unsigned>(args.work.n_programs);
  with_step_types<kSource>(kind, [&]<class P, class S, class U>(StepTypes<P, S, U>) {
    if (kind.stats) {
      step_stats_kernel<P, S, U><<<programs, kStepThreads<P, S, U>, 0, stream>>>(args);
    } else {
      step_kernel<P, S, U><<<programs, kStepThreads<P, S, U>, 0, stream>>>(args);
    }
  });
  return cudaGetLastError();
}

}  // namespace
}  // namespace epi::cuda
