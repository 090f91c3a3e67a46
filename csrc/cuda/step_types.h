// From a StepKind, known at run time, to the types that the step's templates take.

#pragma once

#include "cuda/step_body.h"

namespace epi::cuda {

template <class P, class S, class U>
struct StepTypes {};

// visit(StepTypes<P, S, U>{}), for the kinds with codes or for those without, whichever kCodes asks for.
template <bool kWithCodes, class P, class S, class Visit>
void with_step_types(const StepKind& kind, const Visit& visit) {
  switch (kind.importance) {
    case Importance::kShared:
      if constexpr (kWithCodes == kCodes<S>) visit(StepTypes<P, S, SharedImportance>{});
      break;
    case Importance::kFloat32:
      if constexpr (kWithCodes == kCodes<S>) visit(StepTypes<P, S, float>{});
      break;
    case Importance::kBfloat16:
      if constexpr (kWithCodes == kCodes<S>) visit(StepTypes<P, S, uint16_t>{});
      break;
    case Importance::kInt8:
      if constexpr (kWithCodes) visit(StepTypes<P, S, uint8_t>{});
      break;
  }
}

template <bool kWithCodes, class P, class Visit>
void with_step_types(const StepKind& kind, const Visit& visit) {
  switch (kind.state) {
    case Stored::kFloat32:
      return with_step_types<kWithCodes, P, float>(kind, visit);
    case Stored::kBfloat16:
      return with_step_types<kWithCodes, P, uint16_t>(kind, visit);
    case Stored::kInt8:
      if constexpr (kWithCodes) with_step_types<kWithCodes, P, uint8_t>(kind, visit);
  }
}

template <bool kWithCodes, class Visit>
void with_step_types(const StepKind& kind, const Visit& visit) {
  kind.param == Stored::kBfloat16 ? with_step_types<kWithCodes, uint16_t>(kind, visit)
                                  : with_step_types<kWithCodes, float>(kind, visit);
}

}  // namespace epi::cuda
