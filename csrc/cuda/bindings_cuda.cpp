// Schemas and argument checks of the CUDA library, its only Python-facing file. Plain C++: nothing
// here needs a header that only a CUDA build of torch has.

// Importable as a Python module (epi_kernels._C_cuda); importing it registers the operators.
#include <Python.h>

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.h"

// python_tests builds this file a second time over kernels played by the CPU, under another name.
#if !defined(EPI_CUDA_LIBRARY)
#define EPI_CUDA_LIBRARY epi_kernels
#define EPI_CUDA_KEY CUDA
#endif

extern "C" PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace epi::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kType = ScalarType::Undefined;
template <>
constexpr ScalarType kType<int64_t> = ScalarType::Long;
template <>
constexpr ScalarType kType<float> = ScalarType::Float;
template <>
constexpr ScalarType kType<double> = ScalarType::Double;
template <>
constexpr ScalarType kType<bool> = ScalarType::Bool;

void check(bool ok, const char* name, const char* what) {
  if (!ok) throw std::runtime_error(std::string("epi_kernels: ") + name + ": " + what);
}

// The data of a contiguous tensor of this type on the launch's device, with `numel` elements.
template <class T>
T* data(const Tensor& tensor, const char* name, int64_t numel, int32_t device) {
  check(tensor.get_device() == device, name, "is not on the device of the tables");
  check(tensor.scalar_type() == kType<std::remove_const_t<T>>, name,
        "has another dtype than its schema says");
  check(tensor.is_contiguous(), name, "is not contiguous");
  check(tensor.numel() == numel, name, "has the wrong number of elements");
  return static_cast<T*>(tensor.data_ptr());
}

#if defined(EPI_CUDA_EMULATION)
struct Guard {
  explicit Guard(int32_t) {}
};
bool on_device(const Tensor&) {
  return true;
}
#else
using Guard = torch::stable::accelerator::DeviceGuard;
bool on_device(const Tensor& tensor) {
  return tensor.is_cuda();
}
#endif

// The device of the tables, made current, and torch's stream on it.
class Launch {
 public:
  explicit Launch(const Tensor& tables) : device_(checked_device(tables)), guard_(device_) {
    check(aoti_torch_get_current_cuda_stream(device_, &stream_) == 0, "stream",
          "torch did not name its current stream");
  }
  int32_t device() const { return device_; }
  void* stream() const { return stream_; }
  void finish(int error, const char* kernel) const {
    check(error == 0, kernel, cudaGetErrorString(static_cast<cudaError_t>(error)));
  }

 private:
  static int32_t checked_device(const Tensor& tables) {
    check(on_device(tables), "the table", "is not on a device");
    return tables.get_device();
  }
  int32_t device_;
  Guard guard_;
  void* stream_ = nullptr;
};

Work work_of(const Tensor& rows, const Tensor& programs, int32_t device) {
  check(rows.numel() % kColumns == 0, "rows", "is not [n, 19]");
  check(programs.numel() >= 4 && programs.numel() % 2 == 0, "programs", "is not [n + 1, 2] with n > 0");
  return {data<const int64_t>(rows, "rows", rows.numel(), device),
          data<const int64_t>(programs, "programs", programs.numel(), device), programs.numel() / 2 - 1};
}

StatsOut stats_of(const Tensor& rows, const Tensor& runs, const Tensor& partials, bool moments,
                  int32_t device) {
  constexpr int64_t kWords = sizeof(StatsPartial) / sizeof(double);
  check(partials.numel() % kWords == 0, "partials", "is not [n, 4]");
  return {data<const int64_t>(runs, "runs", rows.numel() / kColumns, device),
          reinterpret_cast<StatsPartial*>(data<double>(partials, "partials", partials.numel(), device)),
          moments};
}

// Tensors by value: every torch since 2.10 boxes them so.

// One value, or none.
template <class T>
T* optional(const Tensor& tensor, const char* name, int32_t device) {
  return tensor.numel() == 0 ? nullptr : data<T>(tensor, name, 1, device);
}

// No grad_scale, no found_inf: tensors without an element.
void prepare(Tensor rows, Tensor scalars, Tensor hyper, int64_t mixed_seed, Tensor grad_scale,
             Tensor grad_multiplier, Tensor found_inf) {
  const Launch launch(rows);
  check(rows.numel() > 0 && rows.numel() % kColumns == 0, "rows", "is not [n, 19] with n > 0");
  const int64_t n = rows.numel() / kColumns;
  PrepareArgs args{};
  args.rows = data<int64_t>(rows, "rows", rows.numel(), launch.device());
  check(scalars.numel() >= n * 9, "scalars", "is not [n, 9]");
  args.scalars = data<float>(scalars, "scalars", scalars.numel(), launch.device());
  args.hyper = data<const double>(hyper, "hyper", n * kHyperColumns, launch.device());
  args.n_rows = n;
  args.mixed_seed = static_cast<uint32_t>(mixed_seed);
  args.grad_scale = optional<const float>(grad_scale, "grad_scale", launch.device());
  args.grad_multiplier = optional<float>(grad_multiplier, "grad_multiplier", launch.device());
  check((args.grad_scale == nullptr) == (args.grad_multiplier == nullptr), "grad_multiplier",
        "does not go with grad_scale");
  args.found_inf = optional<const float>(found_inf, "found_inf", launch.device());
  launch.finish(launch_prepare(args, launch.stream()), "cuda_prepare");
}

// kind: param + 3 * state + 12 * importance, the numbers of table.h's enums. No partials: no stats.
void step(Tensor rows, Tensor programs, Tensor runs, Tensor scalars, int64_t kind, bool stochastic_rounding,
          Tensor grad_multiplier, Tensor partials, bool moments) {
  check(kind >= 0 && kind < kStepKinds, "kind", "is not one of the 48");
  const Launch launch(rows);
  StepArgs args{};
  args.work = work_of(rows, programs, launch.device());
  // an odd number of scalars is padded to whole 64-bit words
  check(scalars.numel() >= rows.numel() / kColumns * 9, "scalars", "is not [n, 9]");
  args.scalars = data<const float>(scalars, "scalars", scalars.numel(), launch.device());
  const bool stats = partials.numel() > 0;
  if (stats) args.stats = stats_of(rows, runs, partials, moments, launch.device());
  args.stochastic_rounding = stochastic_rounding;
  args.grad_multiplier = optional<const float>(grad_multiplier, "grad_multiplier", launch.device());
  const StepKind step_kind{static_cast<Weights>(kind % 3), static_cast<Stored>(kind / 3 % 4),
                           static_cast<Importance>(kind / 12), stats};
  check(step_kind.state != Stored::kInt4 || step_kind.importance == Importance::kShared, "kind",
        "is of 4-bit states and an importance of its own");
  const decltype(&launch_step) of_source[] = {launch_step, launch_step_codes, launch_step_corrected};
  const auto start = of_source[static_cast<int>(step_kind.source())];
  launch.finish(start(args, step_kind, launch.stream()), "cuda_step");
}

void stats(Tensor rows, Tensor programs, Tensor runs, Tensor partials, bool moments) {
  const Launch launch(rows);
  StatsArgs args{};
  args.work = work_of(rows, programs, launch.device());
  args.stats = stats_of(rows, runs, partials, moments, launch.device());
  launch.finish(launch_stats(args, launch.stream()), "cuda_stats");
}

void merge_stats(Tensor run_slots, Tensor partials, bool moments, Tensor minimum, Tensor maximum,
                 Tensor nonfinite, Tensor moment_sums) {
  const Launch launch(run_slots);
  const int64_t layers = minimum.numel();
  MergeArgs args{};
  check(run_slots.numel() > 0 && run_slots.numel() % 3 == 0, "run_slots", "is not [n, 3] with n > 0");
  args.run_slots = data<const int64_t>(run_slots, "run_slots", run_slots.numel(), launch.device());
  args.n_runs = run_slots.numel() / 3;
  args.partials = reinterpret_cast<const StatsPartial*>(
      data<const double>(partials, "partials", partials.numel(), launch.device()));
  args.moments = moments;
  args.minimum = data<float>(minimum, "minimum", layers, launch.device());
  args.maximum = data<float>(maximum, "maximum", layers, launch.device());
  args.nonfinite = data<int64_t>(nonfinite, "nonfinite", layers, launch.device());
  args.moment_sums = data<double>(moment_sums, "moment_sums", 2 * layers, launch.device());
  launch.finish(launch_merge(args, launch.stream()), "cuda_merge_stats");
}

void count(Tensor rows, Tensor programs, Tensor shift, Tensor scale, double keep_factor, Tensor domain,
           Tensor lo, Tensor hi, Tensor bin_shift, Tensor done, int64_t sample_stride, Tensor bounds,
           Tensor histogram) {
  const Launch launch(rows);
  const int64_t layers = shift.numel(), domains = lo.numel();
  check(domains > 0 && histogram.numel() % domains == 0, "histogram", "is not [domains, bins + 1]");
  CountArgs args{};
  args.work = work_of(rows, programs, launch.device());
  args.shift = data<const float>(shift, "shift", layers, launch.device());
  args.scale = data<const float>(scale, "scale", layers, launch.device());
  args.keep_factor = static_cast<float>(keep_factor);
  args.n_layers = layers;
  args.domain = data<const int64_t>(domain, "domain", layers, launch.device());
  args.lo = data<const int64_t>(lo, "lo", domains, launch.device());
  args.hi = data<const int64_t>(hi, "hi", domains, launch.device());
  args.bin_shift = data<const int64_t>(bin_shift, "bin_shift", domains, launch.device());
  args.done = data<const bool>(done, "done", domains, launch.device());
  args.bins = histogram.numel() / domains - 1;
  check(args.bins > 0 && args.bins <= kMaxBins, "histogram", "has more bins than shared memory");
  check(sample_stride > 0, "sample_stride", "is not positive");
  args.sample_stride = sample_stride;
  args.bounds = data<float>(bounds, "bounds", 4 * layers, launch.device());
  args.histogram = data<int64_t>(histogram, "histogram", domains * (args.bins + 1), launch.device());
  launch.finish(launch_count(args, launch.stream()), "cuda_count");
}

void select(Tensor rows, Tensor programs, Tensor shift, Tensor scale, Tensor thresholds, double keep_factor,
            bool positive_only, Tensor bounds, Tensor drift) {
  const Launch launch(rows);
  const int64_t layers = shift.numel();
  SelectArgs args{};
  args.work = work_of(rows, programs, launch.device());
  args.shift = data<const float>(shift, "shift", layers, launch.device());
  args.scale = data<const float>(scale, "scale", layers, launch.device());
  args.thresholds = data<const float>(thresholds, "thresholds", layers, launch.device());
  args.keep_factor = static_cast<float>(keep_factor);
  args.positive_only = positive_only;
  args.n_layers = layers;
  args.bounds = data<float>(bounds, "bounds", 2 * layers, launch.device());
  args.drift = data<int64_t>(drift, "drift", 3 * layers, launch.device());
  launch.finish(launch_select(args, launch.stream()), "cuda_select");
}

}  // namespace
}  // namespace epi::cuda

// A fragment: the CPU library opens the namespace, and either may be loaded without the other.
STABLE_TORCH_LIBRARY_FRAGMENT(EPI_CUDA_LIBRARY, m) {
  m.def(
      "cuda_prepare(Tensor(a!) rows, Tensor(b!) scalars, Tensor hyper, int mixed_seed, Tensor grad_scale, "
      "Tensor(c!) grad_multiplier, Tensor found_inf) -> ()");
  m.def(
      "cuda_step(Tensor rows, Tensor programs, Tensor runs, Tensor scalars, int kind, "
      "bool stochastic_rounding, Tensor grad_multiplier, "
      "Tensor(a!) partials, bool moments) -> ()");
  m.def("cuda_stats(Tensor rows, Tensor programs, Tensor runs, Tensor(a!) partials, bool moments) -> ()");
  m.def(
      "cuda_merge_stats(Tensor run_slots, Tensor partials, bool moments, Tensor(a!) minimum, "
      "Tensor(b!) maximum, Tensor(c!) nonfinite, Tensor(d!) moment_sums) -> ()");
  m.def(
      "cuda_count(Tensor rows, Tensor programs, Tensor shift, Tensor scale, float keep_factor, "
      "Tensor domain, Tensor lo, Tensor hi, Tensor bin_shift, Tensor done, int sample_stride, "
      "Tensor(a!) bounds, Tensor(b!) histogram) -> ()");
  m.def(
      "cuda_select(Tensor rows, Tensor programs, Tensor shift, Tensor scale, Tensor thresholds, "
      "float keep_factor, bool positive_only, Tensor(a!) bounds, Tensor(b!) drift) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(EPI_CUDA_LIBRARY, EPI_CUDA_KEY, m) {
  m.impl("cuda_prepare", TORCH_BOX(&epi::cuda::prepare));
  m.impl("cuda_step", TORCH_BOX(&epi::cuda::step));
  m.impl("cuda_stats", TORCH_BOX(&epi::cuda::stats));
  m.impl("cuda_merge_stats", TORCH_BOX(&epi::cuda::merge_stats));
  m.impl("cuda_count", TORCH_BOX(&epi::cuda::count));
  m.impl("cuda_select", TORCH_BOX(&epi::cuda::select));
}
