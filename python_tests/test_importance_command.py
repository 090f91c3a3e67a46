"""`epi-kernels importance` and what `finetune --protect` makes of it."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from epi_kernels.finetune import chat, checkpoint, data, packing, protect
from epi_kernels.finetune import command as finetune
from epi_kernels.finetune import importance_command as importance
from epi_kernels.finetune.model import weights_fingerprint
from python_tests.finetune_runs import events
from python_tests.stopped_runs import forget_sizes, signalled
from python_tests.tiny_model import backend, command, qa, save_tiny, tiny_tokenizer, write_config, write_jsonl

LENGTH = 48
RATIO = 0.05


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "old.jsonl", qa(10))
    write_jsonl(folder / "new.jsonl", [{"instruction": f"Shout {n}", "output": f"{n}!!"} for n in range(12)])
    save_tiny(folder / "model")
    write_config(folder)
    out = folder / "imp.safetensors"
    assert command(importance, *arguments(folder, out)) == 0
    return folder


def arguments(files, out, *more):
    base = ["--model", files / "model", "--data", files / "old.jsonl", "--out", out]
    return [*base, "--max-length", LENGTH, "--batch-size", 3, "--quiet", *more]


def tuned(files, out, *more):
    base = ["--model", files / "model", "--data", files / "new.jsonl", "--out", out, "--max-length", LENGTH]
    common = ["--lr", 1e-2, "--max-steps", 4, "--isolation-ratio", RATIO, "--mask-interval", 50, "--quiet"]
    return [*base, *common, "--backend", backend(), *more]


def plain_gradients(files):
    """Squared gradients of each batch, the plain way."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(files / "model")
    tokenizer = tiny_tokenizer()
    chat.ensure_template(tokenizer)
    examples = chat.encode(tokenizer, data.read_jsonl(files / "old.jsonl"), LENGTH).examples
    rows = packing.pack([len(one.input_ids) for one in examples], LENGTH, 0)
    schedule = packing.Schedule(len(rows), 3, 1, 0)
    squares = []
    for step in range(schedule.steps_per_epoch):
        net.zero_grad()
        total, count = 0, 0
        for row in schedule.micro_batches(step)[0]:
            for index in rows[row]:  # one example at a time: no packing, no padding
                ids = torch.tensor([examples[index].input_ids])
                labels = torch.tensor(examples[index].labels)
                logits = net(ids).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
                count += int((labels[1:] != chat.IGNORE).sum())
        (total / count).backward()
        squares.append({name: one.grad.square() for name, one in net.named_parameters()})
    return squares


def test_it_is_the_mean_of_squared_batch_gradients(files):
    squares = plain_gradients(files)
    assert len(squares) > 1
    written = load_file(files / "imp.safetensors")
    assert written.keys() == squares[0].keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.float32
        expected = sum(one[name] for one in squares) / len(squares)
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    # Not the mean of per-example squares: the file says so.
    with safe_open(files / "imp.safetensors", "pt") as file:
        metadata = file.metadata()
    assert "not a per-sample Fisher" in metadata["statistic"]
    assert (metadata["batches"], metadata["batch_size"], metadata["examples"]) == (
        str(len(squares)),
        "3",
        "10",
    )
    assert metadata["version"] == "1"


def test_it_changes_no_weight_and_repeats_to_the_bit(files, tmp_path):
    weights = (files / "model" / "model.safetensors").read_bytes()
    assert command(importance, *arguments(files, tmp_path / "again.safetensors")) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (files / "imp.safetensors").read_bytes()
    assert (files / "model" / "model.safetensors").read_bytes() == weights
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_checkpointed_activations_give_the_same_importance(files, tmp_path):
    out = tmp_path / "imp.safetensors"
    assert command(importance, *arguments(files, out, "--gradient-checkpointing")) == 0
    assert out.read_bytes() == (files / "imp.safetensors").read_bytes()


def test_max_batches_bf16_and_single_examples(files, tmp_path):
    out = tmp_path / "imp.safetensors"
    more = ["--max-batches", 2, "--dtype", "bf16", "--no-packing", "--batch-size", 1]
    assert command(importance, *arguments(files, out, *more)) == 0
    with safe_open(out, "pt") as file:
        assert file.metadata()["batches"] == file.metadata()["examples"] == "2"
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float32}


def refused(capsys, *arguments, module=importance, status=2):
    assert command(module, *arguments) == status
    return capsys.readouterr().err


def test_refusals_write_nothing(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "imp.safetensors"
    out.write_bytes(b"precious")
    assert "--overwrite replaces it" in refused(capsys, *arguments(files, out))
    assert out.read_bytes() == b"precious"
    assert "is a directory" in refused(capsys, *arguments(files, tmp_path))
    assert "does not exist" in refused(capsys, *arguments(files, tmp_path / "no" / "imp"))
    assert "--batch-size is 0" in refused(capsys, *arguments(files, tmp_path / "a", "--batch-size", 0))
    assert "--max-length is -3" in refused(capsys, *arguments(files, tmp_path / "a", "--max-length", -3))
    config = ["--model", files / "config-tiny.json", "--data", files / "old.jsonl", "--out", tmp_path / "a"]
    assert "random weights" in refused(capsys, *config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imp.safetensors"]


def test_a_full_disk_or_an_interruption_leaves_nothing(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "imp.safetensors"

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        assert "no space left" in refused(capsys, *arguments(files, out), status=1)
    assert list(tmp_path.iterdir()) == []

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", denied)
        assert "cannot be written (Permission denied)" in refused(capsys, *arguments(files, out))
    assert list(tmp_path.iterdir()) == []

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(importance, "answer_loss", stop)
    assert "nothing was written" in refused(capsys, *arguments(files, out), status=130)
    assert list(tmp_path.iterdir()) == []


def moved(files, out):
    """Name by name, which elements changed."""
    before, after = load_file(files / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    return {name: after[name] != before[name] for name in before}


def expected_mask(tensors):
    """SPEC section 3 in a few lines: the floor(p N) largest of importance, min-max normalised inside each tensor."""
    scores = {name: (one - one.min()) / (one.max() - one.min()) for name, one in tensors.items()}
    together = torch.cat([one.flatten() for one in scores.values()])
    bound = together.sort(descending=True).values[int(RATIO * together.numel()) - 1]
    return {name: one >= bound for name, one in scores.items()}


def test_protect_isolates_from_the_first_step(files, tmp_path):
    out = tmp_path / "out"
    assert command(finetune, *tuned(files, out, "--protect", files / "imp.safetensors")) == 0
    (refresh,) = events(out, "refresh")
    assert refresh["step"] == 0 and refresh["isolated"] > 0
    (protect,) = events(out, "protect")
    assert protect["kind"] == "importance" and protect["other_weights"] is False
    changed = moved(files, out)
    # Scores scale with the importance, so the mask is that of the file itself, up to a rounding at the bound.
    isolated = expected_mask(load_file(files / "imp.safetensors"))
    count = sum(int(mask.sum()) for mask in isolated.values())
    assert abs(count - refresh["isolated"]) <= 1
    escaped = sum(int((changed[name] & isolated[name]).sum()) for name in changed)
    assert escaped <= 1
    assert sum(int(one.sum()) for one in changed.values()) > 1000

    free = tmp_path / "free"
    assert command(finetune, *tuned(files, free)) == 0
    assert events(free, "refresh") == []
    unprotected = moved(files, free)
    assert sum(int((unprotected[name] & isolated[name]).sum()) for name in isolated) > 0.9 * count


def test_a_run_protects_the_next_one(files, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(finetune, *tuned(files, first)) == 0
    capsys.readouterr()
    options = tuned(files, second, "--protect", first)
    options[1] = first
    assert command(finetune, *options) == 0
    assert "warning" not in capsys.readouterr().err
    state = checkpoint.load_optimizer(checkpoint.list_checkpoints(first)[-1])["optimizer"]
    names = {
        i: name
        for group in state["param_groups"]
        for i, name in zip(group["params"], group["param_names"], strict=True)
    }
    isolated = expected_mask({names[i]: one["exp_avg_sq"] for i, one in state["state"].items()})
    (refresh,) = events(second, "refresh")
    assert refresh["step"] == 0
    assert refresh["isolated"] == sum(int(mask.sum()) for mask in isolated.values())
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    for name, mask in isolated.items():
        assert torch.equal(before[name][mask], after[name][mask]), name
        assert not torch.equal(before[name], after[name]), name


def test_a_protected_run_resumes_to_the_same_bits(files, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = ["--protect", files / "imp.safetensors", "--mask-interval", 2]
    assert command(finetune, *tuned(files, whole, *more)) == 0
    with signalled(0):
        assert command(finetune, *tuned(files, out, *more)) == 130
    assert command(finetune, "--out", out, "--resume") == 0
    assert [one["step"] for one in events(out, "refresh")] == [0, 2, 4]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_own_importance_is_carried_alone(files, tmp_path):
    out = tmp_path / "out"
    more = ["--protect", files / "imp.safetensors", "--importance-beta", 0.99]
    assert command(finetune, *tuned(files, out, *more)) == 0
    isolated = expected_mask(load_file(files / "imp.safetensors"))
    changed = moved(files, out)
    assert sum(int((changed[name] & isolated[name]).sum()) for name in changed) <= 1


def test_importance_of_another_model_is_refused(files, tmp_path, capsys):
    save_tiny(tmp_path / "wider", hidden_size=64)
    save_tiny(tmp_path / "deeper", num_hidden_layers=3)
    out = tmp_path / "out"
    for name, fault in (("wider", "the model's is"), ("deeper", "is missing")):
        options = tuned(files, out, "--protect", files / "imp.safetensors")
        options[1] = tmp_path / name
        text = refused(capsys, *options, module=finetune)
        assert "belongs to another model" in text and fault in text
    text = refused(
        capsys, *tuned(files, out, "--protect", files / "model" / "model.safetensors"), module=finetune
    )
    assert "not written by `epi-kernels importance`" in text
    text = refused(capsys, *tuned(files, out, "--protect", files / "old.jsonl"), module=finetune)
    assert "not a safetensors file" in text
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((files / "imp.safetensors").read_bytes()[:-100])
    text = refused(capsys, *tuned(files, out, "--protect", damaged), module=finetune)
    assert "not a safetensors file" in text or "damaged" in text
    assert not out.exists()


def test_importance_measured_at_other_weights_is_used_with_a_warning(files, tmp_path, capsys):
    save_tiny(tmp_path / "other", seed=9)
    out = tmp_path / "out"
    options = tuned(files, out, "--protect", files / "imp.safetensors")
    options[1] = tmp_path / "other"
    assert command(finetune, *options) == 0
    assert "was measured at other weights" in capsys.readouterr().err
    assert events(out, "protect")[0]["other_weights"] is True


def test_an_importance_of_zeros_is_refused(files, tmp_path, capsys):
    from safetensors.torch import save_file

    with safe_open(files / "imp.safetensors", "pt") as file:
        metadata = file.metadata()
    zeros = {name: torch.zeros_like(one) for name, one in load_file(files / "imp.safetensors").items()}
    save_file(zeros, tmp_path / "zero.safetensors", metadata=metadata)
    text = refused(
        capsys, *tuned(files, tmp_path / "out", "--protect", tmp_path / "zero.safetensors"), module=finetune
    )
    assert "all importances are 0" in text


def test_fingerprint_sees_one_bit():
    net = torch.nn.Linear(3, 3)
    before = weights_fingerprint(net)
    with torch.no_grad():
        net.weight.view(torch.int32)[1, 1] ^= 1
    assert weights_fingerprint(net) != before


def test_carried_importance_is_the_mean_counted_as_some_steps(files, tmp_path):
    means = load_file(files / "imp.safetensors")
    shapes = {name: one.shape for name, one in means.items()}
    for steps, counted in ((None, 10), (40, 40)):
        carried = protect.load(
            str(files / "imp.safetensors"), shapes, (0.9, 0.99), steps, own=False
        ).state_dict
        (group,) = carried["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True):
            state = carried["state"][index]
            assert state["step"] == counted
            torch.testing.assert_close(state["exp_avg_sq"] / (1 - 0.99**counted), means[name])
    own = protect.load(str(files / "imp.safetensors"), shapes, (0.9, 0.99), None, own=True).state_dict
    assert all(
        torch.equal(own["state"][index]["exp_avg_sq"], means[name]) for index, name in enumerate(shapes)
    )

    # A run's exp_avg_sq after its steps, without the bias of its start.
    out = tmp_path / "out"
    assert command(finetune, *tuned(files, out)) == 0
    optimizer = checkpoint.load_optimizer(checkpoint.list_checkpoints(out)[-1])["optimizer"]
    carried = protect.load(str(out), shapes, (0.9, 0.999), None, own=True).state_dict
    position = {name: index for index, name in enumerate(shapes)}
    for group in optimizer["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            expected = optimizer["state"][index]["exp_avg_sq"] / (1 - 0.999**4)
            torch.testing.assert_close(carried["state"][position[name]]["exp_avg_sq"], expected)


def test_a_run_whose_parameter_never_had_a_gradient_protects_the_others(files, tmp_path):
    out = tmp_path / "out"
    assert command(finetune, *tuned(files, out)) == 0
    saved = checkpoint.list_checkpoints(out)[-1] / "optimizer.pt"
    both = torch.load(saved, weights_only=True)
    group = both["optimizer"]["param_groups"][0]
    unused = group["param_names"][1]
    del both["optimizer"]["state"][group["params"][1]]  # as torch leaves it
    torch.save(both, saved)
    forget_sizes(saved.parent)
    shapes = {name: one.shape for name, one in load_file(out / "model.safetensors").items()}
    carried = protect.load(str(out), shapes, (0.9, 0.999), None, own=True).state_dict
    nonzero = {name for i, name in enumerate(shapes) if carried["state"][i]["exp_avg_sq"].any()}
    assert nonzero == shapes.keys() - {unused}
    assert command(finetune, *tuned(files, tmp_path / "next", "--protect", out)) == 0
    rows = {row["name"]: row["isolated"] for row in events(tmp_path / "next", "refresh")[0]["layers"]}
    assert rows[unused] == 0 and sum(rows.values()) > 0
