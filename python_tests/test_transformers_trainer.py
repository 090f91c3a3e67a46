"""transformers.Trainer with MaskedEMAAdamW: its arguments arrive, importance is carried in, refreshes are logged."""

from __future__ import annotations

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

from epi_kernels import MaskedEMAAdamW
from epi_kernels.integrations.transformers import add_isolation_callback, masked_ema_adamw
from python_tests.tiny_model import backend, tiny_llama
from python_tests.tracked_runs import curves, offline_rows


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.arange(i, i + 12) % 300
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "weight_decay": 0.03,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(**(given | changes))


def trainer(model, args, **options):
    chosen = {"backend": backend(), "isolation_ratio": 0.1, "mask_interval": 2} | options
    return transformers.Trainer(
        model, args, train_dataset=Tokens(), optimizer_cls_and_kwargs=masked_ema_adamw(args, **chosen)
    )


def ours(trainer) -> MaskedEMAAdamW:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def assert_isolated_kept(trainer, model, before, ratio: float = 0.1) -> None:
    """Every tensor moved, and no isolated element did."""
    kept = 0
    for name, p in model.named_parameters():
        mask = ours(trainer).isolation_mask(p)
        assert torch.equal(p[mask], before[name][mask]), name
        assert not torch.equal(p, before[name]), name
        kept += int(mask.sum())
    assert kept >= int(ratio * sum(p.numel() for p in model.parameters()))


def test_arguments_and_names_arrive(tmp_path):
    model = tiny_llama()
    made = trainer(model, arguments(tmp_path), state_dtype=torch.bfloat16).create_optimizer()
    assert isinstance(made, MaskedEMAAdamW)
    for group in made.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.95), 1e-7)
    decaying, plain = made.param_groups
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.03, 0.0)
    names = {name for name, _ in model.named_parameters()}
    assert {*decaying["param_names"], *plain["param_names"]} == names
    assert all("norm" in name for name in plain["param_names"]) and plain["param_names"]


def test_what_the_arguments_hold_is_not_given_twice(tmp_path):
    with pytest.raises(ValueError, match=r"lr \(learning_rate\).*TrainingArguments"):
        masked_ema_adamw(arguments(tmp_path), lr=1e-3)


def test_frozen_parameters_are_left_out(tmp_path):
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    made = trainer(model, arguments(tmp_path)).create_optimizer()
    held = [name for group in made.param_groups for name in group["param_names"]]
    assert held and not any("embed_tokens" in name for name in held)


def test_a_run_is_the_plain_loops(tmp_path):
    """The Trainer's run, step by step: the bits of the same optimizer in a loop of one's own."""
    model, twin = tiny_llama(), tiny_llama()
    args = arguments(tmp_path, max_grad_norm=0.0, lr_scheduler_type="constant")
    running = trainer(model, args)
    batches = list(running.get_train_dataloader())[: args.max_steps]
    running.train()
    optimizer = trainer(twin, args).create_optimizer()
    for batch in batches:
        optimizer.zero_grad()
        twin(**batch).loss.backward()
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert ours(running).param_groups[0]["isolation_step"] == args.max_steps


def test_refreshes_are_logged_with_everything_else(tmp_path):
    running = trainer(tiny_llama(), arguments(tmp_path))
    add_isolation_callback(running)
    running.train()
    logged = [line for line in running.state.log_history if "isolation/share" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]
    for line in logged:
        assert 0.09 < line["isolation/share"] < 0.12 and 0 <= line["isolation/jaccard"] <= 1
        assert (line["isolation/ratio"], line["isolation/interval"]) == (0.1, 2)
    assert logged[0]["isolation/entered"] > 0 == logged[0]["isolation/released"]
    # the Trainer's own lines of the same steps are there too
    assert [line["step"] for line in running.state.log_history if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_refreshes_reach_tensorboards_event_file(tmp_path):
    running = trainer(tiny_llama(), arguments(tmp_path, report_to="tensorboard"))
    add_isolation_callback(running)
    running.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    logged = [line for line in running.state.log_history if "isolation/share" in line]
    for name in ("share", "jaccard", "entered", "released"):
        read = {event.step: event.value for event in events.Scalars(f"train/isolation/{name}")}
        assert read == {line["step"]: pytest.approx(line[f"isolation/{name}"]) for line in logged}
        assert list(read) == [2, 4, 6]
    assert min(event.value for event in events.Scalars("train/isolation/entered")) > 0


def test_refreshes_reach_wandb(tmp_path):
    wandb = pytest.importorskip("wandb")
    running = trainer(tiny_llama(), arguments(tmp_path / "out", report_to="wandb"))
    add_isolation_callback(running)
    with wandb.init(dir=tmp_path, mode="offline"):  # the Trainer takes the run that is there
        running.train()
    rows = [row for row in offline_rows(tmp_path) if "train/isolation/share" in row]
    logged = [line for line in running.state.log_history if "isolation/share" in line]
    names = [name for name in logged[0] if name.startswith("isolation/")]
    found = curves([{**row, "_step": row["train/global_step"]} for row in rows])
    assert len(logged) == 3 and len(names) == 6
    for name in names:
        assert found[f"train/{name}"] == {line["step"]: pytest.approx(line[name]) for line in logged}


class Reported(transformers.TrainerCallback):
    """What every callback of `report_to` is handed, W&B's among them."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append((state.global_step, dict(logs)))


def test_whatever_the_trainer_reports_to_is_handed_the_refreshes(tmp_path):
    running, reported = trainer(tiny_llama(), arguments(tmp_path)), Reported()
    running.add_callback(reported)
    add_isolation_callback(running)
    running.train()
    names = {"share", "ratio", "jaccard", "entered", "released", "interval"}
    lines = [(step, line) for step, line in reported.lines if "isolation/share" in line]
    assert [step for step, _ in lines] == [2, 4, 6]
    assert all({f"isolation/{name}" for name in names} <= line.keys() for _, line in lines)


@pytest.mark.parametrize("choice, written", [(None, True), (True, True), (False, False)])
def test_tensorboard_is_the_default_where_nothing_else_is_reported_to(tmp_path, choice, written):
    running = trainer(tiny_llama(), arguments(tmp_path))
    add_isolation_callback(running, tensorboard=choice)
    running.train()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len(files) == written
    for file in files:
        assert "train/isolation/share" in EventAccumulator(str(file)).Reload().Tags()["scalars"]


def test_parameters_that_take_no_part_are_chosen_by_name(tmp_path):
    running = trainer(tiny_llama(), arguments(tmp_path), isolate=r"self_attn|norm", no_isolate=r"layers\.1\.")
    running.train()
    isolated = {name for name, p in running.model.named_parameters() if ours(running).isolation_mask(p).any()}
    assert isolated
    for name in isolated:
        assert ("self_attn" in name or "norm" in name) and "layers.1." not in name


def test_carried_importance_protects_from_the_first_step(tmp_path):
    model = tiny_llama()
    first = trainer(model, arguments(tmp_path / "a"))
    first.train()
    second = trainer(model, arguments(tmp_path / "b", max_steps=1), mask_interval=100)
    add_isolation_callback(second, carry=ours(first))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    second.train()
    assert_isolated_kept(second, model, before)
    assert [line["step"] for line in second.state.log_history if "isolation/share" in line] == [0]


def test_a_run_resumed_from_a_model_alone_is_protected_too(tmp_path):
    model = tiny_llama()
    first = MaskedEMAAdamW(model.named_parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    first.step()
    saving = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer(model, saving).train()
    resumed = trainer(model, arguments(tmp_path, max_steps=2), mask_interval=100)
    add_isolation_callback(resumed, carry=first)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    n_isolated = sum(int(ours(resumed).isolation_mask(p).sum()) for p in model.parameters())
    assert n_isolated >= int(0.1 * sum(p.numel() for p in model.parameters()))


def test_a_resumed_run_is_the_whole_one(tmp_path):
    whole_model = tiny_llama()
    whole = trainer(whole_model, arguments(tmp_path / "whole"))
    whole.train()

    saving = arguments(tmp_path / "parts", save_strategy="steps", save_steps=3)
    stopped = trainer(tiny_llama(), saving)
    stopped.train()
    model = tiny_llama(seed=9)
    resumed = trainer(model, saving)
    carried = add_isolation_callback(resumed, carry=ours(whole))
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for p, q in zip(whole_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert carried._carry is None


def test_another_optimizer_is_named(tmp_path):
    plain = transformers.Trainer(tiny_llama(), arguments(tmp_path), train_dataset=Tokens())
    add_isolation_callback(plain)
    with pytest.raises(TypeError, match="masked_ema_adamw"):
        plain.train()
