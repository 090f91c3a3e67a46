"""Methods of the harness: every one by its config, stopped and resumed, what it carries and what it refuses."""

from __future__ import annotations

import ast

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from epi_kernels import MaskedEMAAdamW
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods import METHODS, make_method
from epi_kernels.repro.methods import config as configs
from epi_kernels.repro.methods.published import PublishedEPI
from python_tests.methods_runs import (
    MASKING,
    OTHERS,
    RECIPE,
    P,
    begin,
    counted,
    made_folders,
    make_stage,
    masks_of,
    same_bits,
    saved_importance,
    stop_and_resume,
    train,
    weights_of,
)
from python_tests.test_imports import PACKAGE, imports


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    yield from made_folders(tmp_path_factory)


def test_every_config_has_a_method(folders):
    schema = TypeAdapter(configs.Method).json_schema()
    assert set(schema["discriminator"]["mapping"]) == set(METHODS)
    assert {config.name for config in [*MASKING.values(), *OTHERS.values()]} == set(METHODS)


def test_the_benchmark_gets_published_epi_without_the_harness():
    for name in ("__init__", "plain", "published"):
        path = PACKAGE / "repro" / "methods" / f"{name}.py"
        runtime = ast.parse(path.read_text().replace("if TYPE_CHECKING:", "def _():")).body
        ours = {node.module for node in runtime if isinstance(node, ast.ImportFrom) and node.level}
        others = {name for _, name in imports(path)}
        assert ours <= {"plain"} and not any(one.startswith("pydantic") for one in others), path


@pytest.mark.parametrize("name", [*MASKING, *OTHERS])
def test_a_stopped_stage_goes_on_as_if_it_had_not_stopped(folders, name):
    config = (MASKING | OTHERS)[name]
    tasks = (0, 1, -1)  # in what order PCGrad projects makes a difference
    whole = begin(config, make_stage(folders))
    train(whole, range(5), tasks=tasks)
    part = begin(config, make_stage(folders))
    train(part, range(3), tasks=tasks)
    resumed = stop_and_resume(part, config, make_stage(folders))
    train(resumed, range(3, 5), tasks=tasks)
    wanted, found = weights_of(whole.finish()), weights_of(resumed.finish())
    start = weights_of(make_stage(folders).model)
    assert wanted.keys() == found.keys() == start.keys()
    assert all(same_bits(wanted[key], found[key]) for key in wanted)
    assert any(not same_bits(wanted[key], start[key]) for key in wanted)
    assert whole.extra_bytes() == resumed.extra_bytes()


def test_full_by_either_optimizer_is_adamw(folders):
    models = []
    for config in (configs.Full(), configs.Full(optimizer="epi")):
        method = begin(config, make_stage(folders))
        train(method, range(3))
        models.append(method.finish())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_kept_moments_go_on_without_a_mask(folders):
    method = begin(OTHERS["full-moments"], make_stage(folders))
    for group in method.optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            state = method.optimizer.state[param]
            assert torch.equal(state["exp_avg_sq"], saved_importance(folders)[name])
            assert float(state["step"]) == RECIPE.steps and not state["exp_avg"].any()
    assert counted(masks_of(method)) == 0
    with pytest.raises(ValidationError, match='needs optimizer "epi"'):
        configs.Full(keep_moments=True)


def test_published_epi_starts_from_what_was_carried_and_keeps_its_dtypes(folders):
    method = begin(MASKING["published"], make_stage(folders))
    for group in method.optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            state = method.optimizer.state[param]
            assert state["step"] == 0 and not state["exp_avg_sq"].any()
            assert torch.equal(state["importance"], saved_importance(folders)[name])

    param = torch.nn.Parameter(torch.randn(40, dtype=torch.bfloat16))
    param.grad = torch.randn(40, dtype=torch.bfloat16)
    first, second = PublishedEPI([param], ratio=0.1), PublishedEPI([param], ratio=0.1)
    first.step()
    first.refresh()
    second.load_state_dict(first.state_dict())
    for key, value in first.state[param].items():
        other = second.state[param][key]
        assert other == value if key == "step" else other.dtype == value.dtype and torch.equal(other, value)


def test_published_epi_passes_over_tensors_whose_importances_are_equal():
    params = [torch.nn.Parameter(torch.zeros(20)) for _ in range(2)]
    epi = PublishedEPI(params, ratio=0.1)
    params[0].grad, params[1].grad = torch.arange(20.0), torch.ones(20)
    epi.step()
    epi.refresh()
    assert epi.state[params[0]]["isolation_mask"].tolist() == [False] * 16 + [True] * 4
    assert not epi.state[params[1]]["isolation_mask"].any()
    none = PublishedEPI(params, ratio=0.001)  # less than an element
    none.step()
    none.refresh()
    assert not any(none.state[param]["isolation_mask"].any() for param in params)


CARRIES = ["epi", "published", "window", "static-g2", "random", "inverted", "full-moments", "ewc"]


@pytest.mark.parametrize("name", CARRIES)
def test_a_run_before_that_kept_no_importance_is_named(folders, name):
    stage = make_stage(folders, before=folders.without)
    with pytest.raises(ReproError, match=r"without has no isolation.safetensors.*\"optimizer\": \"epi\""):
        make_method((MASKING | OTHERS)[name], stage)
    stage.before = None
    with pytest.raises(ReproError, match="there is no run before this stage"):
        make_method((MASKING | OTHERS)[name], stage)


def test_the_importance_of_another_model_is_refused(folders):
    stage = make_stage(folders)
    stage.model.resize_token_embeddings(26)
    for config in (configs.Epi(), configs.Ewc(), configs.PublishedEpi()):
        with pytest.raises(ReproError, match="of another model.*embed_tokens"):
            make_method(config, stage)
    (folders.without / "isolation.safetensors").write_bytes(b"damaged")
    try:
        for config in (configs.Epi(), configs.Ewc()):
            with pytest.raises(ReproError, match="no whole safetensors file"):
                make_method(config, make_stage(folders, before=folders.without))
    finally:
        (folders.without / "isolation.safetensors").unlink()


def test_a_core_by_delta_needs_two_runs_of_one_model(folders, tmp_path):
    stage = make_stage(folders)
    stage.origin = None
    with pytest.raises(ReproError, match="static by delta: needs a stage before"):
        make_method(MASKING["static-delta"], stage)
    stage.origin = tmp_path
    with pytest.raises(ReproError, match="static by delta: .*holds no model.safetensors"):
        make_method(MASKING["static-delta"], stage)


def test_masking_methods_own_what_they_say(folders):
    for name, config in MASKING.items():
        method = begin(config, make_stage(folders))
        assert isinstance(method.optimizer, PublishedEPI if name == "published" else MaskedEMAAdamW)
        assert set(method.extra_bytes()) == ({"window"} if name == "window" else set())


# ---------------------------------------------------------------- bfloat16 weights and 8-bit states


def low(folders, **changes):
    stage = make_stage(folders)
    stage.model.bfloat16()
    stage.recipe = RECIPE.model_copy(update=changes)
    return stage


def test_over_bfloat16_weights_small_steps_move_every_method_that_is_adamw(folders):
    """A step of 1e-5 is under half a unit in the last place of most weights: rounded to nearest it would be lost."""
    for config in (
        configs.Full(),
        configs.Ewc(strength=0.5),
        configs.L2Sp(strength=0.5),
        configs.Replay(share=0.2),
    ):
        stage = low(folders, lr=1e-5)
        start = weights_of(stage.model)
        method = begin(config, stage)
        assert isinstance(method.optimizer, MaskedEMAAdamW)
        train(method, range(2))
        name = "model.layers.0.mlp.up_proj.weight"
        moved = (weights_of(method.finish())[name] != start[name]).float().mean()
        assert moved > 0.01, config.name
    assert isinstance(begin(configs.Full(), make_stage(folders)).optimizer, torch.optim.AdamW)


def test_states_are_of_the_recipes_dtype_and_resume(folders):
    for name in ("full-moments", "epi", "static-g2", "random", "window"):
        config = (MASKING | OTHERS)[name]
        whole = begin(config, low(folders, state_dtype="int8"))
        assert whole.optimizer._config.state_dtype == torch.uint8, name
        train(whole, range(4))
        part = begin(config, low(folders, state_dtype="int8"))
        train(part, range(2))
        resumed = stop_and_resume(part, config, low(folders, state_dtype="int8"))
        train(resumed, range(2, 4))
        wanted, found = weights_of(whole.finish()), weights_of(resumed.finish())
        assert all(same_bits(wanted[key], found[key]) for key in wanted), name
    own = begin(configs.Epi(ratio=P, state_dtype="bfloat16"), low(folders, state_dtype="int8"))
    assert own.optimizer._config.state_dtype == torch.bfloat16
    # its scores are read from the state as it is
    assert begin(MASKING["inverted"], low(folders, state_dtype="int8")).optimizer._config.state_dtype is None
