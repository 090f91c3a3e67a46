"""Gradient release: the bits of a step over all gradients at once, with one gradient alive at a time."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from epi_kernels import AdaptiveInterval, AdaptiveRatio, MaskedEMAAdamW, enable_gradient_release
from epi_kernels.optim import release as release_module
from python_tests.harness import assert_same_run, make, snapshot


class Net(torch.nn.Module):
    """A tied weight, a branch that only some batches take, a 0-dim and an empty parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, scale_shape: tuple[int, ...] = ()):
        super().__init__()
        torch.manual_seed(0)
        self.scale = torch.nn.Parameter(torch.ones(scale_shape))
        self.nothing = torch.nn.Parameter(torch.empty(0))
        self.embed = torch.nn.Embedding(19, 72)
        self.first = torch.nn.Linear(72, 72)
        self.branch = torch.nn.Linear(72, 72)
        self.norm = torch.nn.LayerNorm(72)
        self.to(dtype)

    def forward(self, tokens, *, branch: bool):
        x = self.first(self.embed(tokens)).tanh()
        if branch:
            x = self.branch(x)
        return self.norm(x * self.scale) @ self.embed.weight.t()


def loss_of(net: torch.nn.Module, step: int) -> torch.Tensor:
    tokens = torch.randint(19, (4, 5), generator=torch.Generator().manual_seed(step))
    return torch.nn.functional.cross_entropy(
        net(tokens, branch=step % 3 == 0).flatten(0, 1), tokens.flatten()
    )


def optimizer_of(net: torch.nn.Module, **options) -> MaskedEMAAdamW:
    return make(dict(net.named_parameters()), **({"backend": "cpu"} | options))


def train(net, optimizer, steps, *, backwards: int = 1, after=lambda step: None) -> list[dict]:
    """The reports of the refreshes; ``after``: is called after every step."""
    reports = []
    for step in steps if isinstance(steps, range) else range(steps):
        for i in range(backwards):
            loss_of(net, 100 * i + step).backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)
        report = optimizer.isolation_report()
        if report is not None and report.step == optimizer.param_groups[0]["isolation_step"]:
            reports.append(report.as_dict())
    return reports


def assert_same(a, b) -> None:
    """Runs, and the order of what a state dict holds."""
    assert_same_run(a, b)
    assert list(a.state_dict()["state"]) == list(b.state_dict()["state"])


def halves(name: str) -> str:
    return "one" if name < "first.bias" else "other"


OPTIONS = {
    "minmax": {},
    "zscore over several parameters": {"normalization": "zscore", "layer_key": halves},
    "none, by layer": {"normalization": "none", "scope": "layer", "hysteresis": 0.3},
    "8-bit states": {"state_dtype": "int8", "importance_beta": 0.9, "importance_dtype": "int8"},
    "own importance": {"importance_beta": 0.9, "importance_dtype": torch.bfloat16, "mask_warmup": 5},
    "schedules": {
        "isolation_ratio": AdaptiveRatio(0.1, 0.02, 0.3),
        "mask_interval": AdaptiveInterval(2, 1, 4),
    },
    "plain AdamW": {"isolation_ratio": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), ("reference", torch.float32)]
)
def test_bits_are_those_of_one_step(options, backend, dtype):
    runs = []
    for released in (False, True):
        net = Net(dtype)
        optimizer = optimizer_of(net, backend=backend, **options)
        if released:
            enable_gradient_release(net, optimizer)
        runs.append((optimizer, train(net, optimizer, 9)))
    (whole, reports), (released, its_reports) = runs
    assert_same(whole, released)
    assert reports == its_reports and (reports or options == OPTIONS["plain AdamW"])


def test_bits_of_the_triton_backend():
    runs = []
    for released in (False, True):
        net = Net()
        optimizer = optimizer_of(
            net, backend="triton", normalization="zscore", layer_key=halves, mask_interval=1
        )
        if released:
            enable_gradient_release(net, optimizer)
        runs.append((optimizer, train(net, optimizer, range(1, 2))))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_several_groups_with_a_scheduler_and_corrected_weights():
    runs = []
    for released in (False, True):
        net = Net(torch.bfloat16)
        named = list(net.named_parameters())
        groups = [
            {"params": named[:3], "lr": 1e-2},
            {"params": named[3:5], "isolate": False, "betas": (0.8, 0.9)},
            {"params": named[5:], "weight_decay": 0.0},
        ]
        optimizer = MaskedEMAAdamW(groups, mask_interval=2, isolation_ratio=0.2, master_weight_bits=32)
        # a warm-up from lr 0, which is no template's
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 7, after=lambda _, scheduler=scheduler: scheduler.step())
        runs.append(optimizer)
    assert_same(*runs)


# ---------------------------------------------------------------- memory and time


@pytest.mark.parametrize("released", [False, True])
def test_one_gradient_is_alive_at_a_time(released):
    net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(10)))
    alive, peak = [], []

    def note(param):
        alive.append(weakref.ref(param.grad))
        peak.append(sum(ref() is not None for ref in alive))

    for param in net.parameters():  # before the release's own hooks
        param.register_post_accumulate_grad_hook(note)
    optimizer = optimizer_of(net)
    if released:
        enable_gradient_release(net, optimizer)
    for _ in range(3):
        net(torch.ones(3, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(peak) <= 2 if released else max(peak) == 20
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_plans_are_kept_from_step_to_step(monkeypatch):
    made = []

    class Counted(release_module.StepPlan):
        def __init__(self, entries, *arguments, **options):
            made.append([entry.name for entry in entries])
            super().__init__(entries, *arguments, **options)

    monkeypatch.setattr(release_module, "StepPlan", Counted)
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, range(9))
    assert sorted(made) == sorted([name] for name, p in net.named_parameters() if p.numel())
    made.clear()
    optimizer.load_state_dict(optimizer.state_dict())  # other tensors: plans and the old state go
    train(net, optimizer, range(9, 12))
    assert len(made) == 8


def test_an_optimizer_that_goes_takes_its_hooks_along():
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 1)
    states = [weakref.ref(state["exp_avg_sq"]) for state in optimizer.state.values()]
    del optimizer
    gc.collect()
    assert not any(ref() is not None for ref in states)
    loss_of(net, 0).backward()
    assert net.scale.grad is not None
    enable_gradient_release(net, optimizer_of(net))


# ---------------------------------------------------------------- loops of other shapes


def both(body, **options):
    """``body(net, optimizer, released)`` with and without release gives the same bits. Returns the released optimizer."""
    runs = []
    for released in (False, True):
        net = Net()
        optimizer = optimizer_of(net, **options)
        body(net, optimizer, released)
        runs.append(optimizer)
    assert_same(*runs)
    return runs[1]


def test_accumulation():
    """The branch takes part in some of the backwards of a step, or in none."""

    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer, accumulation_steps=3)
        train(net, optimizer, 6, backwards=3)
        loss_of(net, 77).backward()  # an epoch ends with fewer
        optimizer.step()

    both(body)


@pytest.mark.parametrize("drop", ["to none", "to zero", "of the model"])
def test_accumulation_starts_anew_where_gradients_are_dropped(drop):
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer, accumulation_steps=2)
        train(net, optimizer, 3, backwards=2)
        loss_of(net, 50).backward()  # a batch that is thrown away
        if drop == "of the model":
            net.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad(set_to_none=drop == "to none")
        loss_of(net, 51).backward()
        if released:
            assert not optimizer._release.is_open
        loss_of(net, 54).backward()
        if released:
            assert optimizer._release.is_open and net.scale.grad is None
        optimizer.step()

    both(body)


def test_closure():
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        for step in range(5):

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0

    both(body)


def test_frozen_and_unfrozen_parameters():
    def body(net, optimizer, released):
        net.first.requires_grad_(False)
        if released:
            enable_gradient_release(net, optimizer)
            assert not net.first.weight.requires_grad
        train(net, optimizer, 2)
        assert not optimizer.state.get(net.first.weight)
        net.first.requires_grad_(True)
        net.norm.requires_grad_(False)
        loss_of(net, 2).backward()
        assert (net.first.weight.grad is None) == released
        optimizer.step()
        optimizer.zero_grad()
        train(net, optimizer, range(3, 6))

    both(body)


def test_parameters_that_join_late_and_gradients_put_by_hand():
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 3)
        late = torch.nn.Parameter(torch.linspace(-1, 1, 70))
        net.register_parameter("late", late)
        optimizer.add_param_group({"params": [("late", late)], "lr": 0.1})
        for step in range(3, 7):
            (loss_of(net, step) + late.square().sum()).backward()
            net.nothing.grad = torch.empty(0)
            # it joined after the last step: not hooked yet, and stepped all the same
            assert (late.grad is None) == (released and step > 3)
            optimizer.step()
            optimizer.zero_grad()

    both(body)


def test_steps_without_a_backward_count():
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 3)
        optimizer.step()
        for p in net.parameters():
            p.grad = torch.ones_like(p)  # all by hand
        optimizer.step()
        assert optimizer.param_groups[0]["isolation_step"] == 5

    both(body)


def test_masks_of_the_user_act():
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 1)
        before = net.first.weight.detach().clone()
        mask = torch.zeros(72, 72, dtype=torch.bool)
        mask[3] = True
        optimizer.set_isolation_mask(net.first.weight, mask, persistent=True)
        train(net, optimizer, range(1, 8))
        assert torch.equal(net.first.weight[3], before[3]) and not torch.equal(net.first.weight[4], before[4])

    both(body)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Net):
        def forward(self, tokens, *, branch: bool):
            x = checkpoint(self.first, self.embed(tokens), use_reentrant=reentrant).tanh()
            x = checkpoint(self.branch, x, use_reentrant=reentrant)
            return self.norm(x * self.scale) @ self.embed.weight.t()

    runs = []
    for released in (False, True):
        net = Checkpointed()
        optimizer = optimizer_of(net)
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 5)
        runs.append(optimizer)
    assert_same(*runs)


def test_two_optimizers():
    runs = []
    for released in (False, True):
        net = Net()
        named = list(net.named_parameters())
        optimizers = [MaskedEMAAdamW(part, mask_interval=2, lr=1e-2) for part in (named[::2], named[1::2])]
        if released:
            for optimizer in optimizers:
                enable_gradient_release(net, optimizer)
        for step in range(5):
            loss_of(net, step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        runs.append(optimizers)
    for one, other in zip(*runs, strict=True):
        assert_same(one, other)


def test_remove():
    def body(net, optimizer, released):
        handle = enable_gradient_release(net, optimizer) if released else None
        train(net, optimizer, 3)
        if handle is not None:
            handle.remove()
            handle.remove()  # once more is nothing
        loss_of(net, 3).backward()
        assert net.scale.grad is not None
        optimizer.step()
        optimizer.zero_grad()
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, range(4, 6))

    both(body)


def test_copies_and_checkpoints_do_not_release(tmp_path):
    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 3)
        twin, its_optimizer = copy.deepcopy((net, optimizer))
        loss_of(twin, 3).backward()
        assert twin.scale.grad is not None and its_optimizer._release is None
        torch.save((net, optimizer.state_dict()), tmp_path / "both")
        loaded, state = torch.load(tmp_path / "both", weights_only=False)
        loss_of(loaded, 3).backward()
        assert loaded.scale.grad is not None
        optimizer.load_state_dict(state)
        train(net, optimizer, range(3, 6))

    both(body)


def test_a_template_for_a_checkpoint_takes_no_step():
    """torch.distributed.checkpoint steps a fresh optimizer with lr 0 on zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    assert get_optimizer_state_dict(net, optimizer)["state"]
    assert optimizer.param_groups[0]["isolation_step"] == 0
    assert {state["step"].item() for state in optimizer.state.values()} == {0}
    train(net, optimizer, 3)
    other = Net()
    whole = optimizer_of(other)
    get_optimizer_state_dict(other, whole)
    train(other, whole, 3)
    assert_same(whole, optimizer)


def test_a_compiled_model():
    runs = []
    for released in (False, True):
        net = Net()
        optimizer = optimizer_of(net)
        if released:
            enable_gradient_release(net, optimizer)
        train(torch.compile(net, backend="aot_eager"), optimizer, 4)
        runs.append(optimizer)
    assert_same(*runs)


# ---------------------------------------------------------------- broken off


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("out of memory")


def break_off(net) -> None:
    """The head, the norm and the scale have had their gradients by then."""
    tokens = torch.arange(5)
    x = Breaks.apply(net.first(net.embed(tokens)))
    with pytest.raises(RuntimeError, match="out of memory"):
        (net.norm(x * net.scale) @ net.embed.weight.detach().t()).sum().backward()


def test_a_step_after_a_broken_backward_is_torchs():
    """Parameters that have their gradients are stepped, others are not."""

    def body(net, optimizer, released):
        if released:
            enable_gradient_release(net, optimizer)
        train(net, optimizer, 3)
        break_off(net)
        optimizer.step()
        assert {int(optimizer.state[p]["step"]) for p in (net.norm.weight, net.first.weight)} == {3, 4}
        optimizer.zero_grad()
        train(net, optimizer, range(4, 7))

    both(body)


def test_a_backward_after_a_broken_one_is_refused():
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 3)
    state, weights = copy.deepcopy((optimizer.state_dict(), net.state_dict()))
    break_off(net)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"norm\.\w+ has a second gradient.*broken off"):
        loss_of(net, 3).backward()
    with pytest.raises(RuntimeError, match=r"has a second gradient"):
        optimizer.step()
    optimizer.zero_grad()
    assert snapshot(optimizer) == before
    # back to a checkpoint
    net.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(net, optimizer, range(3, 6))
    whole = Net()
    its_optimizer = optimizer_of(whole)
    train(whole, its_optimizer, 6)
    assert_same(its_optimizer, optimizer)


def test_two_backwards_of_one_step_are_refused_at_the_second():
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    loss_of(net, 0).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="accumulation_steps=n"):
        loss_of(net, 1).backward()
    optimizer.zero_grad()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda net, optimizer, handle: optimizer.state_dict(),
        lambda net, optimizer, handle: optimizer.refresh_isolation_mask(),
        lambda net, optimizer, handle: optimizer.carry_importance(optimizer_of(net)),
        lambda net, optimizer, handle: optimizer.set_isolation_mask(net.scale, torch.tensor(True)),
        lambda net, optimizer, handle: copy.deepcopy(optimizer),
        lambda net, optimizer, handle: handle.remove(),
    ],
)
def test_nothing_else_between_backward_and_step(call):
    net = Net()
    optimizer = optimizer_of(net)
    handle = enable_gradient_release(net, optimizer)
    train(net, optimizer, 1)
    loss_of(net, 1).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"in the middle of a step.*call optimizer.step\(\) first"):
        call(net, optimizer, handle)
    assert snapshot(optimizer) == before
    optimizer.step()


# ---------------------------------------------------------------- refused by name


def refused_in_backward(net, optimizer, match, backward, error=RuntimeError) -> None:
    """And nothing has changed."""
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        backward()
    net.zero_grad()
    assert snapshot(optimizer) == before


def test_a_gradscaler_is_refused():
    net = Net()
    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    scalers = [torch.amp.GradScaler("cpu")]
    refused_in_backward(net, optimizer, "GradScaler", lambda: scalers[0].scale(loss_of(net, 0)).backward())
    scalers.clear()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(loss_of(net, 0)).backward()
    off.step(optimizer)
    loss_of(net, 1).backward()
    before = snapshot(optimizer)
    late = torch.amp.GradScaler("cpu")  # comes when weights are changed already: the step ends nothing
    optimizer.found_inf = torch.zeros(())
    with pytest.raises(RuntimeError, match=r"GradScaler.*were already stepped with scaled"):
        optimizer.step()
    del optimizer.found_inf, late
    assert snapshot(optimizer) == before
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # create_graph=True
def test_what_a_step_refuses_is_refused_before_the_first_parameter():
    interval = lambda step: 0 if step == 4 else 2  # noqa: E731
    net = Net()
    optimizer = optimizer_of(net, mask_interval=interval)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 3)
    refused_in_backward(net, optimizer, "mask_interval", lambda: loss_of(net, 3).backward(), ValueError)

    optimizer = optimizer_of(net)
    enable_gradient_release(net, optimizer)
    train(net, optimizer, 1)
    optimizer.param_groups[0]["lr"] = -1.0
    refused_in_backward(net, optimizer, "lr must be", lambda: loss_of(net, 1).backward(), ValueError)
    optimizer.param_groups[0]["lr"] = 1.0
    refused_in_backward(
        net, optimizer, "create_graph=True", lambda: loss_of(net, 1).backward(create_graph=True)
    )
    optimizer.state[net.first.weight]["exp_avg"] = torch.zeros(
        3
    )  # a refresh follows, which looks at all state
    refused_in_backward(net, optimizer, "does not fit", lambda: loss_of(net, 1).backward())


def test_what_cannot_be_enabled():
    net = Net()
    optimizer = optimizer_of(net)
    with pytest.raises(TypeError, match="got AdamW"):
        enable_gradient_release(net, torch.optim.AdamW(net.parameters()))
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"accumulation_steps must be an int >= 1"):
            enable_gradient_release(net, optimizer, accumulation_steps=wrong)
    with pytest.raises(ValueError, match=r"scale, .*which the model has not"):
        enable_gradient_release(net.first, optimizer)
    handle = enable_gradient_release(net, optimizer)
    with pytest.raises(RuntimeError, match="already"):
        enable_gradient_release(net, optimizer)
    with pytest.raises(RuntimeError, match="another optimizer"):
        enable_gradient_release(net, optimizer_of(net))
    handle.remove()
    with pytest.raises(RuntimeError, match="capturable=True: a graph replays"):
        enable_gradient_release(net, optimizer_of(net, backend="triton", capturable=True))
    net.embed.sparse = True
    with pytest.raises(RuntimeError, match="embed has sparse gradients"):
        enable_gradient_release(net, optimizer)
    assert optimizer._release is None
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


# ---------------------------------------------------------------- several ranks


def ddp_on_one_rank(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    net = Net()
    optimizer = optimizer_of(net)
    handle = enable_gradient_release(net, optimizer)
    model = DistributedDataParallel(net, find_unused_parameters=True)  # comes later
    refused_in_backward(net, optimizer, "DistributedDataParallel", lambda: loss_of(model, 0).backward())
    handle.remove()
    for inside in (model, net):
        with pytest.raises(RuntimeError, match="DistributedDataParallel averages"):
            enable_gradient_release(inside, optimizer_of(net))
    enable_gradient_release(other := Net(), optimizer_of(other))  # which it knows nothing of


def test_distributed_data_parallel_is_refused():
    from python_tests.ranks import on_ranks

    on_ranks(1, ddp_on_one_rank)


def fsdp2_run(rank: int, released: bool, backwards: int, normalization: str):
    from torch.distributed.fsdp import fully_shard

    net = Net(scale_shape=(1,))  # which FSDP2 asks for
    for layer in (net.first, net.branch, net):
        fully_shard(layer)
    optimizer = optimizer_of(net, normalization=normalization)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1.0)
    if released:
        enable_gradient_release(net, optimizer, accumulation_steps=backwards)
    alive = []
    for step in range(5):
        for i in range(backwards):
            loss_of(net, 300 * rank + 30 * i + step).backward()
        alive.append(sum(p.grad is not None for p in net.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    whole = {
        (number, key): value.full_tensor() if hasattr(value, "full_tensor") else value
        for number, one in state.items()
        for key, value in one.items()
    }
    weights = [p.detach().full_tensor() for p in net.parameters()]
    return weights, whole, optimizer.isolation_report().as_dict(), max(alive)


@pytest.mark.parametrize(("backwards", "normalization"), [(1, "minmax"), (2, "zscore")])
def test_fsdp2(backwards, normalization):
    from python_tests.ranks import on_ranks

    both_runs = [on_ranks(2, fsdp2_run, released, backwards, normalization) for released in (False, True)]
    for whole, released in zip(*both_runs, strict=True):
        assert all(map(torch.equal, whole[0], released[0]))
        assert whole[1].keys() == released[1].keys()
        assert all(torch.equal(value, released[1][key]) for key, value in whole[1].items())
        assert whole[2] == released[2] and whole[2]["isolated"] > 0
        assert whole[3] >= 7 and released[3] == 0
