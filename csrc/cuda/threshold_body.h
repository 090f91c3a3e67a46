// Stage 3, threshold: one counting pass (epi_kernels/reference/threshold.py). The bracket of keys is
// turned into bounds on u first, so that an element outside it costs no division.

#pragma once

#include "cuda/stats_body.h"
#include "math/score.h"

namespace epi::cuda {

constexpr int kUnit = 8;  // elements a thread reads at once: one mask byte

// u of the unit at `start`; NaN, which no bound lets pass, beyond the span's end.
template <class T>
EPI_KERNEL Pack<float, kUnit> load_unit(const Span& span, int64_t start) {
  const T* u = span.pointer<const T>(u_column(span)) + start;
  const int64_t count = span.end - start;
  const uint32_t scale = load_scale<T>(u_scales(span), start);
  if (span.has(kAligned) && count >= kUnit) return values<false>(load<T, kUnit, true>(u), scale);
  const int exist = count < kUnit ? static_cast<int>(count) : kUnit;
  Pack<float, kUnit> r = values<false>(load<T, kUnit, false>(u, exist), scale);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) r.v[j] = j < exist ? r.v[j] : math::float_of(0x7FC00000u);
  return r;
}

EPI_KERNEL Pack<float, kUnit> load_nibble_unit(const Span& span, int64_t start) {
  const int64_t left = span.end - start;
  const int count = left < kUnit ? static_cast<int>(left) : kUnit;
  const auto codes = load_nibbles<kUnit, false>(span.pointer<const Nibbles>(kExpAvgSq), start, count);
  auto r = squares(codes, scale_at(span.pointer<const uint8_t>(kExpAvgSqScale), start));
#pragma unroll
  for (int j = 0; j < kUnit; ++j) r.v[j] = j < count ? r.v[j] : math::float_of(0x7FC00000u);
  return r;
}

EPI_KERNEL Pack<float, kUnit> load_u(const Span& span, int64_t start) {
  if (span.has(kUInt4)) return load_nibble_unit(span, start);
  if (span.has(kUInt8)) return load_unit<uint8_t>(span, start);
  return span.has(kUBf16) ? load_unit<uint16_t>(span, start) : load_unit<float>(span, start);
}

// One thread a bound: `which` 0, 1: of lo; 2, 3: of hi; odd: for isolated elements.
EPI_KERNEL void count_bound(const CountArgs& args, int64_t index) {
  const int64_t layer = index / 4, which = index % 4, domain = args.domain[layer];
  if (args.done[domain]) return;
  const math::ScoreTerms terms{args.shift[layer], args.scale[layer], args.keep_factor};
  args.bounds[index] =
      math::u_bound_of_key(terms, which % 2 != 0, which < 2 ? args.lo[domain] : args.hi[domain]);
}

struct CountShared {
  uint32_t histogram[kMaxBins + 1];  // the last column in use counts keys at or above hi
};

// Counts of the domain a program is in, flushed to the device when it enters another.
template <class Block>
struct DomainHistogram {
  const CountArgs& args;
  const Block& block;
  CountShared* shared;
  int64_t domain = -1;
  uint32_t above = 0;

  EPI_KERNEL void enter(int64_t next) {
    if (next == domain) return;
    flush();
    for (int64_t i = block.thread(); i <= args.bins; i += block.threads()) shared->histogram[i] = 0;
    block.sync();
    domain = next;
    above = 0;
  }
  EPI_KERNEL void flush() {
    if (domain < 0) return;
    if (above != 0) block.add(&shared->histogram[args.bins], above);
    block.sync();
    int64_t* total = args.histogram + domain * (args.bins + 1);
    for (int64_t i = block.thread(); i <= args.bins; i += block.threads()) {
      const uint32_t count = shared->histogram[i];
      if (count != 0) block.add(&total[i], static_cast<int64_t>(count));
    }
    block.sync();
  }
};

template <class Block>
EPI_KERNEL void count_span(const CountArgs& args, const Span& span, DomainHistogram<Block>& counts) {
  const int64_t layer = span.row[kLayer], domain = counts.domain;
  const float* bounds = args.bounds + 4 * layer;
  const float lo_bound[2] = {bounds[0], bounds[1]}, hi_bound[2] = {bounds[2], bounds[3]};
  const math::ScoreTerms terms{args.shift[layer], args.scale[layer], args.keep_factor};
  const uint32_t lo = static_cast<uint32_t>(args.lo[domain]);
  const int bin_shift = static_cast<int>(args.bin_shift[domain]);
  const uint8_t* mask = args.keep_factor != 1.0f ? span.pointer<const uint8_t>(kIsolationMask) : nullptr;
  const float infinity = math::float_of(0x7F800000u);

  // every sample_stride-th block of kSampleBlock elements, counted from the row's first
  constexpr int64_t kUnits = kSampleBlock / kUnit;
  const int64_t stride = args.sample_stride;
  const int64_t first = (span.begin / kSampleBlock + stride - 1) / stride * stride;
  const int64_t blocks = (span.end + kSampleBlock - 1) / kSampleBlock;
  const int64_t units = first < blocks ? ((blocks - 1 - first) / stride + 1) * kUnits : 0;
  for (int64_t i = counts.block.thread(); i < units; i += counts.block.threads()) {
    const int64_t start = (first + i / kUnits * stride) * kSampleBlock + i % kUnits * kUnit;
    if (start >= span.end) continue;
    const Pack<float, kUnit> u = load_u(span, start);
    const uint32_t isolated = mask != nullptr ? mask[start >> 3] : 0;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const bool bit = (isolated >> j & 1u) != 0;
      const float value = u.v[j];
      if (!(value >= (bit ? lo_bound[1] : lo_bound[0])) || !(value < infinity)) continue;
      if (value >= (bit ? hi_bound[1] : hi_bound[0])) {
        ++counts.above;
      } else {
        const uint32_t key = math::ordered_key(math::score(value, terms, bit));
        counts.block.add(&counts.shared->histogram[(key - lo) >> bin_shift], 1u);
      }
    }
  }
}

template <class Block>
EPI_KERNEL void count_program(const CountArgs& args, const Block& block, CountShared* shared) {
  DomainHistogram<Block> counts{args, block, shared};
  for_each_span(args.work, block.index(), [&](const Span& span) {
    const int64_t domain = args.domain[span.row[kLayer]];
    if (args.done[domain]) return;  // a finished search costs no memory traffic
    counts.enter(domain);
    count_span(args, span, counts);
  });
  counts.flush();
}

}  // namespace epi::cuda
