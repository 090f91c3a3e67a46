// From a StepKind, known at run time, to the types that the step's templates take.

#pragma once

#include "cuda/step_body.h"

namespace epi::cuda {

template <class P, class S, class U>
struct StepTypes {};

// visit(StepTypes<P, S, U>{}), where it is a kind of this source.
template <StepSource kSource, class P, class S, class U, class Visit>
void with_types(const Visit& visit) {
  constexpr bool kHasCodes = kCodes<S> || std::is_same_v<U, uint8_t>;
  if constexpr (kCorrected<P> || kHasCodes == (kSource == StepSource::kCodes)) visit(StepTypes<P, S, U>{});
}

template <StepSource kSource, class P, class S, class Visit>
void with_importance(const StepKind& kind, const Visit& visit) {
  switch (kind.importance) {
    case Importance::kShared:
      return with_types<kSource, P, S, SharedImportance>(visit);
    case Importance::kFloat32:
      return with_types<kSource, P, S, float>(visit);
    case Importance::kBfloat16:
      return with_types<kSource, P, S, uint16_t>(visit);
    case Importance::kInt8:
      return with_types<kSource, P, S, uint8_t>(visit);
  }
}

template <StepSource kSource, class P, class Visit>
void with_state(const StepKind& kind, const Visit& visit) {
  switch (kind.state) {
    case Stored::kFloat32:
      return with_importance<kSource, P, float>(kind, visit);
    case Stored::kBfloat16:
      return with_importance<kSource, P, uint16_t>(kind, visit);
    case Stored::kInt8:
      return with_importance<kSource, P, uint8_t>(kind, visit);
    case Stored::kInt4:
      return with_types<kSource, P, Nibbles, SharedImportance>(visit);
  }
}

template <StepSource kSource, class Visit>
void with_step_types(const StepKind& kind, const Visit& visit) {
  if constexpr (kSource == StepSource::kCorrected) {
    with_state<kSource, Corrected>(kind, visit);
  } else {
    kind.param == Weights::kBfloat16 ? with_state<kSource, uint16_t>(kind, visit)
                                     : with_state<kSource, float>(kind, visit);
  }
}

}  // namespace epi::cuda
