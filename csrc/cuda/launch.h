// The launches: each returns a cudaError_t as int, 0 when the work is in the stream.

#pragma once

#include "cuda/table.h"

namespace epi::cuda {

int launch_prepare(const PrepareArgs& args, void* stream);
// Of the kinds of one StepSource each.
int launch_step(const StepArgs& args, const StepKind& kind, void* stream);
int launch_step_codes(const StepArgs& args, const StepKind& kind, void* stream);
int launch_step_corrected(const StepArgs& args, const StepKind& kind, void* stream);
int launch_stats(const StatsArgs& args, void* stream);
int launch_merge(const MergeArgs& args, void* stream);
int launch_count(const CountArgs& args, void* stream);
int launch_select(const SelectArgs& args, void* stream);

}  // namespace epi::cuda
