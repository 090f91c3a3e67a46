// Stage 2, stats: what one thread saw, and the fixed order in which a block and then all programs
// combine it (epi_kernels/reference/stats.py). No float atomics: two runs agree to the bit.

#pragma once

#include "cuda/nibbles.h"
#include "cuda/spans.h"

namespace epi::cuda {

EPI_KERNEL StatsPartial empty_stats() {
  return {math::float_of(0x7F800000u), math::float_of(0xFF800000u), 0, 0.0, 0.0};
}

EPI_KERNEL void include(StatsPartial& stats, float u, bool moments) {
  if (!math::is_finite(u)) {
    ++stats.nonfinite;
    return;
  }
  stats.minimum = u < stats.minimum ? u : stats.minimum;
  stats.maximum = u > stats.maximum ? u : stats.maximum;
  if (moments) {
    const double wide = u;
    stats.sum += wide;
    stats.sum_of_squares += wide * wide;
  }
}

EPI_KERNEL StatsPartial merge(const StatsPartial& a, const StatsPartial& b) {
  return {b.minimum < a.minimum ? b.minimum : a.minimum, b.maximum > a.maximum ? b.maximum : a.maximum,
          a.nonfinite + b.nonfinite, a.sum + b.sum, a.sum_of_squares + b.sum_of_squares};
}

// The block's total, valid in thread 0. `shared`: [threads].
template <class Block>
EPI_KERNEL StatsPartial reduce(const Block& block, StatsPartial* shared, const StatsPartial& mine) {
  shared[block.thread()] = mine;
  for (int half = block.threads() / 2; half > 0; half /= 2) {
    block.sync();
    if (block.thread() < half) {
      shared[block.thread()] = merge(shared[block.thread()], shared[block.thread() + half]);
    }
  }
  const StatsPartial total = shared[block.thread()];
  block.sync();  // shared may be filled again
  return total;
}

// Collects over the spans of a program; one partial for each run of rows of one layer.
template <class Block>
struct StatsCollector {
  const Block& block;
  const StatsOut& out;
  int64_t program;
  StatsPartial* shared;  // [threads]
  int64_t run = -1;      // none yet
  StatsPartial mine = empty_stats();

  EPI_KERNEL void enter(const Span& span) {
    const int64_t next = out.runs[span.row_index];
    if (next == run) return;
    flush();
    run = next;
    mine = empty_stats();
  }
  EPI_KERNEL void include(float u) { cuda::include(mine, u, out.moments); }
  EPI_KERNEL void flush() {
    if (run < 0) return;
    const StatsPartial total = reduce(block, shared, mine);
    if (block.thread() == 0) out.partials[program + run] = total;
  }
};

EPI_KERNEL Column u_column(const Span& span) {
  return span.row[kImportance] != 0 ? kImportance : kExpAvgSq;
}
EPI_KERNEL const uint8_t* u_scales(const Span& span) {
  return span.pointer<const uint8_t>(span.row[kImportance] != 0 ? kImportanceScale : kExpAvgSqScale);
}

// [begin, end) of one row's u, as stored.
template <class T, class Block>
EPI_KERNEL void stats_span(const Span& span, const Block& block, StatsCollector<Block>& collector) {
  constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  const T* u = span.pointer<const T>(u_column(span));
  const uint8_t* scales = u_scales(span);
  int64_t begin = span.begin;
  if (span.has(kAligned)) {
    const int64_t whole = (span.end - begin) / kWidth;
    for (int64_t i = block.thread(); i < whole; i += block.threads()) {
      const int64_t start = begin + i * kWidth;
      const auto x = values<false>(load<T, kWidth, true>(u + start), load_scale<T>(scales, start));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) collector.include(x.v[j]);
    }
    begin += whole * kWidth;
  }
  for (int64_t i = begin + block.thread(); i < span.end; i += block.threads()) {
    collector.include(values<false>(load<T, 1, false>(u + i), load_scale<T>(scales, i)).v[0]);
  }
}

// The same of 4-bit codes, eight elements at a time.
template <class Block>
EPI_KERNEL void stats_nibbles(const Span& span, const Block& block, StatsCollector<Block>& collector) {
  const auto* u = span.pointer<const Nibbles>(kExpAvgSq);
  const uint8_t* scales = span.pointer<const uint8_t>(kExpAvgSqScale);
  for (int64_t start = span.begin + 8 * block.thread(); start < span.end; start += 8 * block.threads()) {
    const int count = span.end - start < 8 ? static_cast<int>(span.end - start) : 8;
    const auto x = squares(load_nibbles<8, false>(u, start, count), scale_at(scales, start));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < count) collector.include(x.v[j]);
    }
  }
}

// shared: [threads]
template <class Block>
EPI_KERNEL void stats_program(const StatsArgs& args, const Block& block, StatsPartial* shared) {
  StatsCollector<Block> collector{block, args.stats, block.index(), shared};
  for_each_span(args.work, block.index(), [&](const Span& span) {
    collector.enter(span);
    if (span.has(kUInt4)) {
      stats_nibbles(span, block, collector);
    } else if (span.has(kUInt8)) {
      stats_span<uint8_t>(span, block, collector);
    } else if (span.has(kUBf16)) {
      stats_span<uint16_t>(span, block, collector);
    } else {
      stats_span<float>(span, block, collector);
    }
  });
  collector.flush();
}

// One block a run: its partials, in slot order, into its layer's row.
template <class Block>
EPI_KERNEL void merge_run(const MergeArgs& args, const Block& block, StatsPartial* shared) {
  const int64_t* slots = args.run_slots + 3 * block.index();
  const int64_t layer = slots[0];
  if (layer < 0) return;
  StatsPartial mine = empty_stats();
  for (int64_t i = slots[1] + block.thread(); i < slots[2]; i += block.threads()) {
    mine = merge(mine, args.partials[i]);
  }
  const StatsPartial total = reduce(block, shared, mine);
  if (block.thread() != 0) return;
  if (total.minimum < args.minimum[layer]) args.minimum[layer] = total.minimum;
  if (total.maximum > args.maximum[layer]) args.maximum[layer] = total.maximum;
  args.nonfinite[layer] += total.nonfinite;
  if (args.moments) {
    args.moment_sums[2 * layer] += total.sum;
    args.moment_sums[2 * layer + 1] += total.sum_of_squares;
  }
}

}  // namespace epi::cuda
