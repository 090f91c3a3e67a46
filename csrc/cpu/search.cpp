#include "cpu/search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "math/score.h"

namespace epi {
namespace {

constexpr int64_t kKeyEnd = int64_t{1} << 32;

// A coarse sample of about so many elements finds the region, a finer one a narrow bracket in it.
constexpr int64_t kCoarseSample = int64_t{1} << 14;
constexpr int64_t kMaxCoarseStride = 1024, kMaxFineStride = 32, kMinFineStride = 4;
// Standard deviations of a sampled rank on either side, were the elements independent. Neighbours are
// not: where runs of 64 are alike, a bracket may prove wrong, which costs another pass.
constexpr double kDeviations = 4.0;
// Keys noted by all threads together, 4 bytes each. The finer stride is chosen so that the brackets hold
// no more: at 1e8 elements and p = 1 % the arithmetic gives 5e4.
constexpr int64_t kNotedKeys = int64_t{3} << 16;
// A bracket that proves wrong is followed by one beside it, so many times as wide.
constexpr int64_t kWiden = 8;

// A domain's bracket [lo, hi) of keys, and what is known of the answer.
struct Domain {
  int64_t k, lo, hi, shift;
  bool done;
  // as they were when keys were noted
  int64_t noted_lo, noted_hi, noted_above;
};

class ThresholdSearch {
 public:
  ThresholdSearch(const Kernels& kernels, const Table& table, const LayerTerms& terms,
                  const SearchProblem& problem, const SearchResult& result)
      : kernels_(kernels),
        table_(table),
        terms_(terms),
        problem_(problem),
        result_(result),
        columns_(problem.bins + 1),
        domains_(problem.domains),
        lo_(problem.domains),
        hi_(problem.domains),
        shift_(problem.domains),
        done_(new bool[problem.domains]),
        histogram_(problem.domains * columns_) {
    for (int64_t d = 0; d < problem.domains; ++d) {
      domains_[d] = {problem.k[d], problem.floor, problem.end, 0, true, 0, 0, 0};
      fit_bins(domains_[d]);
      result_.threshold[d] = std::numeric_limits<float>::infinity();
      result_.count_ge[d] = 0;
    }
  }

  // Batches of domains, in order, as many at a time as the noted keys have room for at the coarsest of the
  // finer strides: many layers with a threshold each would need a finer sample, and still overflow.
  void run() {
    int64_t next = 0;
    while (next < problem_.domains) {
      int64_t total = 0;
      double roots = 0.0;
      for (; next < problem_.domains; ++next) {
        Domain& d = domains_[next];
        if (d.k <= 0) continue;
        const double root = std::sqrt(static_cast<double>(d.k));
        if (roots > 0.0 && bracket_roots() < (roots + root) * std::sqrt(static_cast<double>(kMaxFineStride)))
          break;
        roots += root;
        total += problem_.n_elements[next];
        d.done = false;
      }
      noted_.clear();
      find(total);
    }
  }

 private:
  // Finds the thresholds of the domains that are not done, which have `total` elements.
  void find(int64_t total) {
    if (total >= problem_.sample_from && open()) {
      sample(std::clamp<int64_t>(total / kCoarseSample, 1, kMaxCoarseStride));
      const int64_t fine = fine_stride();
      if (total / fine >= kCoarseSample) sample(fine);
    }
    while (open()) {
      if (!recount()) count_all();
      for (int64_t d = 0; d < problem_.domains; ++d) {
        if (!domains_[d].done) narrow(d);
      }
    }
  }

  bool open() const {
    return std::any_of(domains_.begin(), domains_.end(), [](const Domain& d) { return !d.done; });
  }

  // Of how many ranks' square roots, added up, the keys inside their brackets have room at stride 1, a
  // quarter of it left free: the sampled ranks are uncertain, too.
  static constexpr double bracket_roots() {
    return 0.75 * static_cast<double>(kNotedKeys) / (2.0 * kDeviations);
  }

  // The largest stride whose brackets leave room for all their keys: a bracket is kDeviations of a sampled
  // rank wide on either side, and a rank of the sample stands for `stride` of the whole.
  int64_t fine_stride() const {
    double roots = 0.0;
    for (const Domain& d : domains_) roots += d.done ? 0.0 : std::sqrt(static_cast<double>(d.k));
    const double width = bracket_roots() / roots;
    return static_cast<int64_t>(
        std::clamp(width * width, static_cast<double>(kMinFineStride), static_cast<double>(kMaxFineStride)));
  }

  // The smallest shift that lays the bracket over the bins.
  void fit_bins(Domain& d) const {
    d.shift = 0;
    while (d.hi - d.lo > problem_.bins << d.shift) ++d.shift;
  }

  int64_t* row(int64_t domain) { return histogram_.data() + domain * columns_; }

  void count_pass(int64_t stride, std::vector<NotedKeys>* noted) {
    for (int64_t d = 0; d < problem_.domains; ++d) {
      lo_[d] = domains_[d].lo, hi_[d] = domains_[d].hi, shift_[d] = domains_[d].shift;
      done_[d] = domains_[d].done;
    }
    std::fill(histogram_.begin(), histogram_.end(), 0);
    const Search search{lo_.data(),      hi_.data(),        shift_.data(), done_.get(),
                        problem_.domain, histogram_.data(), columns_};
    count(kernels_, table_, terms_, search, stride, noted);
    for (int64_t i = 0; i < problem_.layers; ++i) {
      const int64_t d = problem_.domain[i];
      if (problem_.zeros[i] > 0 && !done_[d]) {
        add_key(d, key_of_zero(i), problem_.zeros[i] / stride);
      }
    }
  }

  int64_t key_of_zero(int64_t layer) const {
    const scalar::ScoreTerms terms{terms_.shift[layer], terms_.scale[layer], terms_.keep_factor};
    return scalar::ordered_key(scalar::score(0.0f, terms, false));
  }

  void add_key(int64_t domain, int64_t key, int64_t n) {
    const Domain& d = domains_[domain];
    if (key >= d.lo) row(domain)[key >= d.hi ? problem_.bins : (key - d.lo) >> d.shift] += n;
  }

  // Noted keys of a domain. Few are inside a bracket that is one bin of the last; which side of it the others
  // are on, nothing predicts.
  void add_keys(int64_t domain, const uint32_t* first, const uint32_t* last) {
    const Domain& d = domains_[domain];
    int64_t* bins = row(domain);
    const uint64_t width = static_cast<uint64_t>(d.hi - d.lo);
    int64_t above = 0;
    for (; first != last; ++first) {
      const int64_t key = *first;
      above += key >= d.hi;
      if (static_cast<uint64_t>(key - d.lo) < width) [[unlikely]]
        ++bins[(key - d.lo) >> d.shift];
    }
    bins[problem_.bins] += above;
  }

  // Counts every element, and notes the keys inside the brackets for recount().
  void count_all() {
    const int64_t threads = std::max<int64_t>(torch::stable::get_num_threads(), 1);
    noted_.resize(threads);
    for (NotedKeys& own : noted_) {
      if (own.keys == nullptr) {
        own.capacity = kNotedKeys / threads;
        own.keys.reset(new uint32_t[own.capacity]);
      }
      own.runs.clear();
      own.size = 0;
      own.overflowed = false;
    }
    count_pass(1, &noted_);
    for (int64_t i = 0; i < problem_.domains; ++i) {
      Domain& d = domains_[i];
      d.noted_lo = d.lo, d.noted_hi = d.hi, d.noted_above = row(i)[problem_.bins];
    }
  }

  // Fills the histograms from the keys noted before, where these are all there is to the brackets.
  bool recount() {
    if (noted_.empty()) return false;
    for (const NotedKeys& own : noted_) {
      if (own.overflowed) return false;
    }
    for (const Domain& d : domains_) {
      if (!d.done && (d.lo < d.noted_lo || d.hi > d.noted_hi)) return false;
    }
    std::fill(histogram_.begin(), histogram_.end(), 0);
    for (int64_t i = 0; i < problem_.domains; ++i) row(i)[problem_.bins] = domains_[i].noted_above;
    for (const NotedKeys& own : noted_) {
      for (size_t run = 0; run < own.runs.size(); ++run) {
        const int64_t domain = own.runs[run].domain;
        if (domains_[domain].done) continue;
        const int64_t end = run + 1 < own.runs.size() ? own.runs[run + 1].first : own.size;
        add_keys(domain, own.keys.get() + own.runs[run].first, own.keys.get() + end);
      }
    }
    for (int64_t i = 0; i < problem_.layers; ++i) {
      const Domain& d = domains_[problem_.domain[i]];
      const int64_t key = key_of_zero(i);
      if (!d.done && key >= d.noted_lo && key < d.noted_hi)
        add_key(problem_.domain[i], key, problem_.zeros[i]);
    }
    return true;
  }

  // Every stride-th run of the elements decides the next brackets.
  void sample(int64_t stride) {
    std::vector<int64_t> sampled(problem_.domains);
    for (int64_t i = 0; i < problem_.layers; ++i) sampled[problem_.domain[i]] += problem_.zeros[i] / stride;
    for (int64_t i = 0; i < table_.size; ++i) {
      sampled[problem_.domain[table_[i][kLayer]]] += sampled_elements(table_[i][kNumel], stride);
    }
    count_pass(stride, nullptr);
    for (int64_t i = 0; i < problem_.domains; ++i) {
      Domain& d = domains_[i];
      if (d.done) continue;
      const double rank = static_cast<double>(d.k) * static_cast<double>(sampled[i]) /
                          static_cast<double>(problem_.n_elements[i]);
      const double margin = kDeviations * std::sqrt(rank) + kDeviations;
      const int64_t* bins = row(i);
      int64_t at_least = bins[problem_.bins], low = 0, high = 0;
      for (int64_t bin = problem_.bins - 1; bin >= 0; --bin) {
        if (static_cast<double>(at_least) <= rank - margin) high = problem_.bins - 1 - bin;
        at_least += bins[bin];
        if (static_cast<double>(at_least) >= rank + margin) {
          low = bin;
          break;
        }
      }
      const int64_t lo = d.lo;
      d.lo = lo + (low << d.shift);
      d.hi = std::min(lo + ((problem_.bins - high) << d.shift), d.hi);
      fit_bins(d);
    }
  }

  static int64_t sampled_elements(int64_t n, int64_t stride) {
    if (n == 0) return 0;
    const int64_t last_run = ((n + kSampleBlock - 1) / kSampleBlock - 1) / stride;
    return last_run * kSampleBlock + std::min<int64_t>(kSampleBlock, n - last_run * stride * kSampleBlock);
  }

  // Proves a bracket right by the counts of all elements and narrows it to one bin, or moves it to the
  // side that holds the answer.
  void narrow(int64_t domain) {
    Domain& d = domains_[domain];
    const int64_t* bins = row(domain);
    const int64_t above = bins[problem_.bins];
    int64_t total = above;
    for (int64_t bin = 0; bin < problem_.bins; ++bin) total += bins[bin];
    // fewer finite scores than k: the smallest of them is the threshold
    if (d.lo <= problem_.floor) d.k = std::min(d.k, total);
    const int64_t width = kWiden * (d.hi - d.lo);
    if (d.k <= 0) {
      d.done = true;
    } else if (above >= d.k) {
      d.lo = d.hi;
      d.hi = std::min(d.hi + width, kKeyEnd);
    } else if (total < d.k) {
      d.hi = d.lo;
      d.lo = std::max(d.lo - width, problem_.floor);
    } else {
      int64_t bin = problem_.bins, at_least = above;
      while (at_least < d.k) at_least += bins[--bin];
      const int64_t bin_lo = d.lo + (bin << d.shift);
      if (d.shift == 0) {
        d.done = true;
        result_.threshold[domain] = scalar::float_of_key(static_cast<uint32_t>(bin_lo));
        result_.count_ge[domain] = at_least;
      }
      d.hi = std::min(bin_lo + (int64_t{1} << d.shift), d.hi);
      d.lo = bin_lo;
    }
    fit_bins(d);
  }

  const Kernels& kernels_;
  const Table& table_;
  const LayerTerms& terms_;
  const SearchProblem& problem_;
  const SearchResult& result_;
  const int64_t columns_;
  std::vector<Domain> domains_;
  std::vector<int64_t> lo_, hi_, shift_;
  std::unique_ptr<bool[]> done_;
  std::vector<int64_t> histogram_;  // [domains, columns]; the last column counts keys >= hi
  std::vector<NotedKeys> noted_;    // one a thread
};

}  // namespace

void find_thresholds(const Kernels& kernels, const Table& table, const LayerTerms& terms,
                     const SearchProblem& problem, const SearchResult& result) {
  ThresholdSearch(kernels, table, terms, problem, result).run();
}

}  // namespace epi
