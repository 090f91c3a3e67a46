// Schemas and argument checks: the only Python-facing file of the CPU library.
//
// Parameters come as a table of pointers (epi_kernels/backends/table.py), everything else as small
// tensors, which are checked here; the stages trust what they are given.

// Importable as a Python module (epi_kernels._C); importing it registers the operators.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cpu/search.h"
#include "cpu/stages.h"
#include "math/adamw.h"
#include "math/codec.h"
#include "watch.h"

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;
constexpr const char* kIsaNames[] = {"plain", "avx2", "avx512"};

template <class T>
constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;
template <>
constexpr ScalarType kScalarType<bool> = ScalarType::Bool;

// The data of a contiguous CPU tensor of this dtype and shape (kAny: any size).
template <class T>
T* data(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == kScalarType<T>, name, ": wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(),
                  " dimensions, got ", tensor.dim());
  int64_t i = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size == kAny || tensor.size(i) == size, name, ": expected size ", size, " in dimension ",
                    i, ", got ", tensor.size(i));
    ++i;
  }
  return static_cast<T*>(tensor.data_ptr());
}

const epi::Kernels& kernels_of(int64_t isa) {
  const epi::Kernels* found = epi::kernels(isa);
  STD_TORCH_CHECK(found != nullptr, "this processor lacks instruction set ", isa);
  return *found;
}

// layers == kAny: the stage needs no layer. `least`: the smallest layer row allowed.
epi::Table table_of(const Tensor& tensor, int64_t layers, int64_t least) {
  const epi::Table table{data<int64_t>(tensor, "table", {kAny, epi::kColumns}), tensor.size(0)};
  for (int64_t i = 0; i < table.size && layers != kAny; ++i) {
    const int64_t layer = table[i][epi::kLayer];
    STD_TORCH_CHECK(layer >= least && layer < layers, "row ", i, " of the table: layer ", layer, " of ",
                    layers);
  }
  return table;
}

// "" asks for the widest. An unknown or missing instruction set is an error that says what there is.
int64_t cpu_isa(std::string name) {
  std::string here;
  int64_t found = -1;
  for (int64_t isa = 0; isa < 3; ++isa) {
    if (epi::kernels(isa) == nullptr) continue;
    here += (here.empty() ? "" : ", ") + std::string(kIsaNames[isa]);
    if (name.empty() || name == kIsaNames[isa]) found = isa;
  }
  STD_TORCH_CHECK(found >= 0, "instruction set '", name, "' is not one of those here: ", here);
  return found;
}

std::string cpu_capability() {
  return kIsaNames[cpu_isa("")];
}

epi::LayerStats layer_stats(const Tensor& minimum, const Tensor& maximum, const Tensor& nonfinite,
                            const Tensor& moments, bool with_moments) {
  const int64_t layers = minimum.numel();
  return {data<float>(minimum, "minimum", {layers}), data<float>(maximum, "maximum", {layers}),
          data<int64_t>(nonfinite, "nonfinite", {layers}), data<double>(moments, "moments", {layers, 2}),
          with_moments};
}

void cpu_step(Tensor table, Tensor scalars, bool stochastic_rounding, std::optional<double> grad_multiplier,
              std::optional<Tensor> minimum, std::optional<Tensor> maximum, std::optional<Tensor> nonfinite,
              std::optional<Tensor> moments, bool with_moments, int64_t isa) {
  const bool with_stats = minimum.has_value();
  STD_TORCH_CHECK(with_stats == maximum.has_value() && with_stats == nonfinite.has_value() &&
                      with_stats == moments.has_value(),
                  "minimum, maximum, nonfinite and moments go together");
  epi::LayerStats stats{};
  if (with_stats) stats = layer_stats(*minimum, *maximum, *nonfinite, *moments, with_moments);
  const epi::Table rows = table_of(table, with_stats ? minimum->numel() : kAny, -1);
  const float* values = data<float>(scalars, "scalars", {rows.size, epi::scalar::kStepScalars});
  for (int64_t i = 0; i < rows.size; ++i) {
    bool complete = true;
    for (const int column : {epi::kParam, epi::kGrad, epi::kExpAvg, epi::kExpAvgSq}) {
      complete = complete && rows[i][column] != 0;
    }
    const int64_t flags = rows[i][epi::kFlags];
    if ((flags & (epi::kStateInt8 | epi::kStateInt4)) != 0) {
      complete = complete && rows[i][epi::kExpAvgScale] != 0 && rows[i][epi::kExpAvgSqScale] != 0;
    }
    if ((flags & epi::kImportanceInt8) != 0) complete = complete && rows[i][epi::kImportanceScale] != 0;
    STD_TORCH_CHECK(complete || rows[i][epi::kNumel] == 0, "row ", i,
                    " of the table lacks a tensor that the step needs");
  }
  epi::StepArguments arguments{};
  arguments.stochastic_rounding = stochastic_rounding;
  arguments.has_grad_multiplier = grad_multiplier.has_value();
  arguments.grad_multiplier = static_cast<float>(grad_multiplier.value_or(1.0));
  arguments.moments = with_stats && with_moments;
  epi::step(kernels_of(isa), rows, values, arguments, with_stats ? &stats : nullptr);
}

void cpu_accumulate(Tensor table, Tensor minimum, Tensor maximum, Tensor nonfinite, Tensor moments,
                    bool with_moments, int64_t isa) {
  const auto stats = layer_stats(minimum, maximum, nonfinite, moments, with_moments);
  epi::accumulate(kernels_of(isa), table_of(table, minimum.numel(), 0), stats);
}

void cpu_count(Tensor table, Tensor shift, Tensor scale, double keep_factor, Tensor lo, Tensor hi,
               Tensor bin_shift, Tensor done, Tensor domain, Tensor histogram, int64_t sample_stride,
               int64_t isa) {
  const int64_t layers = shift.numel(), domains = lo.numel();
  const epi::LayerTerms terms{data<float>(shift, "shift", {layers}), data<float>(scale, "scale", {layers}),
                              static_cast<float>(keep_factor)};
  int64_t* counts = data<int64_t>(histogram, "histogram", {domains, kAny});
  const epi::Search search{data<int64_t>(lo, "lo", {domains}),
                           data<int64_t>(hi, "hi", {domains}),
                           data<int64_t>(bin_shift, "bin_shift", {domains}),
                           data<bool>(done, "done", {domains}),
                           data<int64_t>(domain, "domain", {layers}),
                           counts,
                           histogram.size(1)};
  for (int64_t i = 0; i < layers; ++i) {
    STD_TORCH_CHECK(search.domain[i] >= 0 && search.domain[i] < domains, "domain of layer ", i, " is ",
                    search.domain[i], " of ", domains);
  }
  for (int64_t i = 0; i < domains; ++i) {
    if (search.done[i]) continue;
    const int64_t s = search.bin_shift[i];
    STD_TORCH_CHECK(search.lo[i] >= 0 && search.hi[i] <= int64_t{1} << 32 && s >= 0 && s < 32,
                    "bracket of domain ", i, " is out of range");
    STD_TORCH_CHECK(search.hi[i] - search.lo[i] <= (search.columns - 1) << s, "bracket of domain ", i,
                    " is wider than its bins");
  }
  STD_TORCH_CHECK(sample_stride >= 1, "sample_stride: expected at least 1, got ", sample_stride);
  epi::count(kernels_of(isa), table_of(table, layers, 0), terms, search, sample_stride);
}

void cpu_find_thresholds(Tensor table, Tensor shift, Tensor scale, double keep_factor, Tensor domain,
                         Tensor zeros, Tensor n_elements, Tensor k, int64_t floor, int64_t end, int64_t bins,
                         int64_t sample_from, Tensor threshold, Tensor count_ge, int64_t isa) {
  const int64_t layers = shift.numel(), domains = k.numel();
  const epi::LayerTerms terms{data<float>(shift, "shift", {layers}), data<float>(scale, "scale", {layers}),
                              static_cast<float>(keep_factor)};
  const epi::SearchProblem problem{layers,
                                   domains,
                                   data<int64_t>(domain, "domain", {layers}),
                                   data<int64_t>(zeros, "zeros", {layers}),
                                   data<int64_t>(n_elements, "n_elements", {domains}),
                                   data<int64_t>(k, "k", {domains}),
                                   floor,
                                   end,
                                   bins,
                                   sample_from};
  for (int64_t i = 0; i < layers; ++i) {
    STD_TORCH_CHECK(problem.domain[i] >= 0 && problem.domain[i] < domains, "domain of layer ", i, " is ",
                    problem.domain[i], " of ", domains);
  }
  STD_TORCH_CHECK(floor >= 0 && floor < end && end <= int64_t{1} << 32, "keys [", floor, ", ", end,
                  ") are out of range");
  STD_TORCH_CHECK(bins >= 2 && bins <= 1 << 16 && (bins & (bins - 1)) == 0,
                  "bins: expected a power of two from 2 to 65536, got ", bins);
  const epi::SearchResult result{data<float>(threshold, "threshold", {domains}),
                                 data<int64_t>(count_ge, "count_ge", {domains})};
  epi::find_thresholds(kernels_of(isa), table_of(table, layers, 0), terms, problem, result);
}

void cpu_select(Tensor table, Tensor shift, Tensor scale, double keep_factor, bool positive_only,
                Tensor thresholds, Tensor drift, int64_t isa) {
  const int64_t layers = shift.numel();
  const epi::LayerTerms terms{data<float>(shift, "shift", {layers}), data<float>(scale, "scale", {layers}),
                              static_cast<float>(keep_factor)};
  const float* threshold = data<float>(thresholds, "thresholds", {layers});
  int64_t* counts = data<int64_t>(drift, "drift", {layers, 3});
  const epi::Table rows = table_of(table, layers, 0);
  for (int64_t i = 0; i < rows.size; ++i) {
    STD_TORCH_CHECK(rows[i][epi::kIsolationMask] != 0 || rows[i][epi::kNumel] == 0, "row ", i,
                    " of the table has no mask to write");
  }
  epi::select(kernels_of(isa), rows, terms, threshold, positive_only, counts);
}

int64_t watch(std::vector<Tensor> tensors) {
  return epi::watches().add(tensors);
}
void unwatch(int64_t number) {
  epi::watches().remove(number);
}
bool unmoved(int64_t number) {
  return epi::watches().unmoved(number);
}

}  // namespace

// The tensors behind a table's pointers are written too; a schema cannot say so.
STABLE_TORCH_LIBRARY(epi_kernels, m) {
  m.def("cpu_capability() -> str");
  m.def("cpu_isa(str name) -> int");
  m.def("watch(Tensor[] tensors) -> int");
  m.def("unwatch(int number) -> ()");
  m.def("unmoved(int number) -> bool");
  m.def(
      "cpu_step(Tensor table, Tensor scalars, bool stochastic_rounding, float? grad_multiplier, "
      "Tensor(a!)? minimum, Tensor(b!)? maximum, Tensor(c!)? nonfinite, Tensor(d!)? moments, "
      "bool with_moments, int isa) -> ()");
  m.def(
      "cpu_accumulate(Tensor table, Tensor(a!) minimum, Tensor(b!) maximum, Tensor(c!) nonfinite, "
      "Tensor(d!) moments, bool with_moments, int isa) -> ()");
  m.def(
      "cpu_count(Tensor table, Tensor shift, Tensor scale, float keep_factor, Tensor lo, "
      "Tensor hi, Tensor bin_shift, Tensor done, Tensor domain, Tensor(a!) histogram, "
      "int sample_stride, int isa) -> ()");
  m.def(
      "cpu_find_thresholds(Tensor table, Tensor shift, Tensor scale, float keep_factor, Tensor domain, "
      "Tensor zeros, Tensor n_elements, Tensor k, int floor, int end, int bins, int sample_from, "
      "Tensor(a!) threshold, Tensor(b!) count_ge, int isa) -> ()");
  m.def(
      "cpu_select(Tensor table, Tensor shift, Tensor scale, float keep_factor, "
      "bool positive_only, Tensor thresholds, Tensor(a!) drift, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(epi_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("watch", TORCH_BOX(&watch));
  m.impl("unwatch", TORCH_BOX(&unwatch));
  m.impl("unmoved", TORCH_BOX(&unmoved));
}

STABLE_TORCH_LIBRARY_IMPL(epi_kernels, CPU, m) {
  m.impl("cpu_step", TORCH_BOX(&cpu_step));
  m.impl("cpu_accumulate", TORCH_BOX(&cpu_accumulate));
  m.impl("cpu_count", TORCH_BOX(&cpu_count));
  m.impl("cpu_find_thresholds", TORCH_BOX(&cpu_find_thresholds));
  m.impl("cpu_select", TORCH_BOX(&cpu_select));
}
