// Stage 4, mask: writes the packed mask and counts what changed (epi_kernels/reference/mask.py).

#pragma once

#include "cuda/threshold_body.h"

namespace epi::cuda {

// One thread a bound: odd ones are for elements that are isolated now.
EPI_KERNEL void select_bound(const SelectArgs& args, int64_t index) {
  const int64_t layer = index / 2;
  const math::ScoreTerms terms{args.shift[layer], args.scale[layer], args.keep_factor};
  args.bounds[index] =
      math::u_bound_of_selection(terms, index % 2 != 0, args.thresholds[layer], args.positive_only);
}

EPI_KERNEL uint32_t count_bits(uint32_t byte) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__popc(byte));
#else
  return static_cast<uint32_t>(__builtin_popcount(byte));
#endif
}

struct SelectShared {
  uint32_t drift[3];
};

// Drift of the layer a program is in, flushed to the device when it enters another.
template <class Block>
struct LayerDrift {
  const SelectArgs& args;
  const Block& block;
  SelectShared* shared;
  int64_t layer = -1;
  uint32_t mine[3] = {0, 0, 0};

  EPI_KERNEL void enter(int64_t next) {
    if (next == layer) return;
    flush();
    layer = next;
  }
  EPI_KERNEL void flush() {
    if (layer < 0) return;
    if (block.thread() < 3) shared->drift[block.thread()] = 0;
    block.sync();
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (mine[i] != 0) block.add(&shared->drift[i], mine[i]);
      mine[i] = 0;
    }
    block.sync();
    if (block.thread() < 3 && shared->drift[block.thread()] != 0) {
      block.add(&args.drift[3 * layer + block.thread()], static_cast<int64_t>(shared->drift[block.thread()]));
    }
    block.sync();
  }
};

template <class Block>
EPI_KERNEL void select_span(const SelectArgs& args, const Span& span, LayerDrift<Block>& drift) {
  const float* bounds = args.bounds + 2 * span.row[kLayer];
  const float bound[2] = {bounds[0], bounds[1]};
  const float infinity = math::float_of(0x7F800000u);
  const bool selects = bound[0] < infinity || bound[1] < infinity;
  uint8_t* mask = span.pointer<uint8_t>(kIsolationMask);
  const uint8_t* persistent = span.pointer<const uint8_t>(kPersistentMask);

  const int64_t units = (span.end - span.begin + kUnit - 1) / kUnit;
  for (int64_t i = drift.block.thread(); i < units; i += drift.block.threads()) {
    const int64_t start = span.begin + i * kUnit;
    const uint32_t before = mask[start >> 3];
    uint32_t after = persistent != nullptr ? persistent[start >> 3] : 0;
    if (selects) {
      const Pack<float, kUnit> u = load_u(span, start);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float least = (before >> j & 1u) != 0 ? bound[1] : bound[0];
        if (u.v[j] >= least && u.v[j] < infinity) after |= 1u << j;
      }
    }
    mask[start >> 3] = static_cast<uint8_t>(after);
    drift.mine[0] += count_bits(after);
    drift.mine[1] += count_bits(after & ~before);
    drift.mine[2] += count_bits(before & ~after);
  }
}

template <class Block>
EPI_KERNEL void select_program(const SelectArgs& args, const Block& block, SelectShared* shared) {
  LayerDrift<Block> drift{args, block, shared};
  for_each_span(args.work, block.index(), [&](const Span& span) {
    drift.enter(span.row[kLayer]);
    select_span(args, span, drift);
  });
  drift.flush();
}

}  // namespace epi::cuda
