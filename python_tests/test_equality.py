"""Every backend gives the oracle's bits: weights, state, masks, T and report figures (guarantees 3 and 5)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from python_tests.cases import CASES, GRADIENT_KINDS, LAYOUTS, SHAPES, Case, Spec, case
from python_tests.harness import Pair, Target
from python_tests.oracle import Hyper, Settings


@pytest.mark.parametrize("name", CASES)
def test_named_case(name: str, target: Target):
    pair = Pair(CASES[name], target)
    n = len(pair.params)
    steps = (["normal"] * n, ["spread"] * n, ["ties", "sparse"], ["normal", None, "small"])
    for kinds in steps[: 2 if target.interpreted else 4]:
        pair.step(pair.gradients([kinds[i % len(kinds)] for i in range(n)]))
        pair.check()


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_gradients_of_every_kind(kind: str, target: Target):
    specs = (Spec((33, 17)), Spec((71,)), Spec((33, 17), "bfloat16"), Spec((71,), "bfloat16"))
    own = Hyper(importance_beta=0.9)
    pair = Pair(case(*specs, isolation_ratio=0.2, mask_interval=2, hyper=own), target)
    for _ in range(3 if target.interpreted else 5):
        pair.step(pair.gradients([kind] * 4))
        pair.check()


@pytest.mark.parametrize("kind", ["normal", "ties", "spread", "nonfinite"])
def test_mask_after_a_standalone_refresh(kind: str, target: Target):
    """Statistics from the stand-alone kernel, parameters without state or gradient among the eligible."""
    specs = (Spec((33, 17)), Spec((9,), "bfloat16"), Spec((40,)), Spec((300,), "bfloat16"))
    pair = Pair(case(*specs, isolation_ratio=0.3, mask_interval=None), target)
    for kinds in ([kind, kind, None, None], [kind, None, None, kind]):
        pair.step(pair.gradients(kinds))
        pair.refresh()
        pair.check()


@pytest.mark.parametrize("scale", [65536.0, 3.0, 0.1])
def test_grad_scale_and_found_inf(scale: float, target: Target):
    pair = Pair(case(Spec((33, 17)), Spec((70,), "bfloat16"), isolation_ratio=0.1, mask_interval=2), target)
    for found_inf in (False, True, False, True, False):
        pair.step(pair.gradients(["normal", "small"]), grad_scale=scale, found_inf=found_inf)
        pair.check()


@pytest.mark.parametrize("normalization", ["minmax", "none", "zscore"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_zscore_and_others_where_no_last_bit_decides(normalization: str, scope: str, target: Target):
    """zscore's mean and std may differ in a last bit between backends: elements that sit apart may not."""
    pair = Pair(
        case(
            *(Spec(shape) for shape in ((33, 17), (257,), (7,), (1,), ())),
            isolation_ratio=0.1,
            mask_interval=None,
            normalization=normalization,
            scope=scope,
        ),
        target,
    )
    rng = np.random.default_rng(3)
    # Importances a factor of 1.05 apart: no two scores are closer than 1e-4 where they are not the same.
    grads = [
        (1.05 ** rng.permutation(int(np.prod(s.shape)))).clip(max=1e4).astype(np.float32)
        for s in pair.case.specs
    ]
    pair.step(grads)
    pair.refresh()
    for p, expected in zip(pair.params, pair.oracle.params, strict=True):
        mask = pair.optimizer.isolation_mask(p).cpu().numpy().reshape(-1)
        np.testing.assert_array_equal(mask, expected.mask)
    actual, expected = pair.optimizer.isolation_report(), pair.oracle.report
    assert (actual.isolated, actual.ties) == (expected.isolated, expected.ties)


# --- random runs --------------------------------------------------------------------------------------------

_reals = lambda low, high: st.floats(low, high, allow_nan=False, width=64)  # noqa: E731
_beta = st.one_of(st.sampled_from([0.0, 0.9, 0.999]), _reals(0.0, 0.9999))


@st.composite
def hypers(draw) -> Hyper:
    betas = (draw(_beta), draw(_beta))
    return Hyper(
        lr=draw(st.sampled_from([0.0, 1e-3, 0.1]) | _reals(0.0, 1.0)),
        betas=betas,
        eps=draw(st.sampled_from([1e-8, 1e-30, 0.1])),
        weight_decay=draw(st.sampled_from([0.0, 0.01, 0.5])),
        maximize=draw(st.booleans()),
        isolate=draw(st.booleans() | st.just(True)),
        importance_beta=draw(st.sampled_from([None, betas[1]]) | _beta),
    )


@st.composite
def runs(draw, max_elements: int) -> tuple[Case, list[list[str | None]], list[bool]]:
    """(case, kinds of gradient per step and parameter, whether a refresh by hand follows the step)."""
    shapes = [s for s in SHAPES.values() if np.prod(s) <= max_elements]
    layout = st.sampled_from(LAYOUTS)
    spec = st.builds(Spec, st.sampled_from(shapes), st.sampled_from(["float32", "bfloat16"]), layout, layout)
    groups = draw(
        st.lists(
            st.tuples(hypers(), st.lists(spec, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=3
        )
    )
    normalization = draw(st.sampled_from(["minmax", "none"]))
    named = draw(st.booleans())
    chosen = Settings(
        isolation_ratio=draw(st.sampled_from([0.0, 0.01, 0.5]) | _reals(0.0, 0.99)),
        mask_interval=draw(st.sampled_from([None, 1, 2, 3])),
        mask_warmup=draw(st.sampled_from([None, 0, 1, 2])),
        importance_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        normalization=normalization,
        scope=draw(st.sampled_from(["global", "layer"])),
        layer_key=draw(st.sampled_from([None, lambda name: int(name[1:]) % 2])) if named else None,
        hysteresis=draw(st.sampled_from([0.0, 0.1, 0.75])),
        state_dtype=draw(st.sampled_from([None, "float32", "bfloat16"])),
        master_weight_bits=draw(st.sampled_from([16, 24, 32])),
        stochastic_rounding=draw(st.sampled_from([None, True, False])),
        seed=draw(st.integers(0, 2**40)),
    )
    chosen_case = Case(tuple(groups), chosen, named, draw(st.integers(0, 2**32 - 1)))
    kind = st.sampled_from([None, *GRADIENT_KINDS])
    many = len(chosen_case.specs)
    kinds = draw(st.lists(st.lists(kind, min_size=many, max_size=many), min_size=2, max_size=5))
    by_hand = draw(st.lists(st.booleans(), min_size=len(kinds), max_size=len(kinds)))
    return chosen_case, kinds, by_hand


def test_random_runs(target: Target):
    examples = settings().max_examples
    if target.interpreted:
        examples = examples // 5

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(runs(400 if target.interpreted else 3000))
    def check(run):
        chosen_case, kinds, by_hand = run
        pair = Pair(chosen_case, target)
        for kinds_of_step, refresh in zip(kinds, by_hand, strict=True):
            pair.step(pair.gradients(kinds_of_step))
            if refresh:
                pair.refresh()
            pair.check()

    check()
