"""Observers change nothing, go on after a stop, and are asked for by name and options."""

from __future__ import annotations

import copy
import io
import json
from types import SimpleNamespace

import pytest
import torch

from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.measure import OBSERVERS, ask, asked, make_observer, make_observers
from epi_kernels.repro.measure.refreshes import RefreshWatch
from python_tests.measure_runs import Data, carried, make_stage, masked, observe, plain, train

ALL = ("curve:every=1", "drift:every=2,batches=2,ratios=0.1", "conflict:every=2", "stability:window=1")


pytestmark = pytest.mark.usefixtures("one_thread")


def traces(optimizer, names, steps: int = 6):
    """Everything an observer must leave alone, after every step."""
    stage = make_stage(steps, optimizer)
    stage.model.model.layers[0].mlp.eval()  # flags differ within a model
    torch.manual_seed(5)
    data, observers = observe(stage, *names)
    found = []

    def look(step: int) -> None:
        found.append(
            {
                "weights": [param.detach().clone() for param in stage.model.parameters()],
                "grads": [param.grad.clone() for param in stage.model.parameters()],
                "rng": torch.get_rng_state(),
                "optimizer": copy.deepcopy(stage.optimizer.state_dict()),
                "training": [module.training for module in stage.model.modules()],
            }
        )

    train(stage, data, observers, each=look)
    return found


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("optimizer", [plain, masked], ids=["torch", "masked"])
def test_observers_change_nothing(optimizer):
    assert same(traces(optimizer, ALL), traces(optimizer, ()))


def test_gradients_are_the_same_tensors_before_the_step():
    stage = make_stage(1)
    data, observers = observe(stage, *ALL)

    class Between:
        def before_step(self, stage, step):
            self.grads = [(param.grad, param.grad.clone()) for param in stage.model.parameters()]

        def after_step(self, stage, step):
            for param, (grad, copied) in zip(stage.model.parameters(), self.grads):
                assert param.grad is grad and torch.equal(grad, copied)

    train(stage, data, [Between(), *observers])


def test_a_stop_changes_no_record():
    steps, stop = 11, 5

    def start():
        stage = make_stage(steps, lambda model: masked(model, mask_interval=4), interval=4)
        carried(stage)  # a resumed run does so too, before it loads where it was
        torch.manual_seed(5)
        return stage, *observe(stage, *ALL)

    stage, data, observers = start()
    train(stage, data, observers)
    expected = json.loads(json.dumps([one.record() for one in observers]))
    assert expected[3]["mean"]["refresh"]["n"] == 2 and expected[3]["mean"]["placebo"]["n"] == 2
    assert [one["step"] for one in expected[0]["refreshes"]] == [0, 4, 8]

    stage, data, observers = start()
    train(stage, data, observers, last=stop)
    file = io.BytesIO()
    saved = {
        "observers": [one.state_dict() for one in observers],
        "model": stage.model.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)

    stage, data, observers = start()
    stage.model.load_state_dict(loaded["model"])
    stage.optimizer.load_state_dict(loaded["optimizer"])
    for one, state in zip(observers, loaded["observers"]):
        one.load_state_dict(state)
    torch.set_rng_state(loaded["rng"])
    train(stage, data, observers, first=stop)
    assert json.loads(json.dumps([one.record() for one in observers])) == expected


def test_a_refresh_is_seen_once():
    report = SimpleNamespace(step=40, interval=10)  # the optimizer had steps before this stage
    stage = SimpleNamespace(optimizer=SimpleNamespace(isolation_report=lambda: report))
    watch = RefreshWatch()
    assert watch.new(stage, 0) is report and watch.new(stage, 1) is None
    assert watch.next_due(stage) == 10
    resumed = RefreshWatch()  # beside an optimizer that still has the old report
    resumed.load_state_dict(watch.state_dict())
    assert resumed.new(stage, 2) is None and resumed.next_due(stage) == 10
    report = SimpleNamespace(step=50, interval=None)
    assert resumed.new(stage, 10) is report and resumed.next_due(stage) is None


def test_options_are_read_and_written():
    assert ask("drift", every=25, ratios=(0.01, 0.1)) == "drift:every=25,ratios=0.01+0.1"
    drift = asked("drift:every=25,ratios=0.01+0.1")
    assert drift.name == "drift"
    assert (drift.options.every, drift.options.ratios, drift.options.batches) == (25, (0.01, 0.1), 8)
    assert ask("curve", every=None) == "curve"
    assert {asked(name).name for name in OBSERVERS} == set(OBSERVERS)


@pytest.mark.parametrize(
    "text, words",
    [
        ("nonsense", ["'nonsense'", "curve, drift, conflict, stability"]),
        ("drift:evry=3", ["evry", "every, ratios, batches"]),
        ("drift:every=0", ["every", "greater than or equal to 1"]),
        ("drift:ratios=0.1+2", ["ratios.1", "less than 1"]),
        ("drift:every", ["'every' is not option=value"]),
        ("curve:every=1,every=2", ["'every=2'", "once"]),
    ],
)
def test_what_cannot_be_asked_for(text, words):
    with pytest.raises(ReproError) as error:
        make_observer(text, make_stage(1), Data())
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_every_run_has_a_curve_and_each_observer_once():
    stage, data = make_stage(6), Data()
    assert list(make_observers(["drift:every=3"], stage, data)) == ["curve", "drift"]
    own = make_observers(["curve:every=3"], stage, data)
    assert own["curve"].record()["every"] == 3
    with pytest.raises(ReproError, match="twice: drift"):
        make_observers(["drift:every=3", "drift"], stage, data)


def test_optimizers_without_masks_have_no_refreshes():
    stage = make_stage(6, plain, interval=2)
    data, observers = observe(stage, *ALL)
    train(stage, data, observers)
    curve, drift, conflict, stability = (one.record() for one in observers)
    assert curve["refreshes"] == [] and len(curve["points"]) == 6
    assert drift["optimizer"] == []
    assert all(point["all"] == point["free"] for point in conflict["points"])
    assert stability["rows"] == [] and stability["events"] == []
