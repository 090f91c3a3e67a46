"""`--protect`: where carried importance comes from, in the form `MaskedEMAAdamW.carry_importance` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import checkpoint
from .errors import UserError
from .importance import FORMAT, load_metadata


@dataclass
class Source:
    """An optimizer's state_dict, or what looks like one, and where it is from."""

    state_dict: dict
    kind: str  # "importance" | "run"
    path: str
    weights: str | None  # fingerprint of the weights it was measured at
    description: str


def load(
    path: str, shapes: Mapping[str, torch.Size], structure: str, beta2: float, steps: int | None
) -> Source:
    """Reads an importance file or a run directory for a model with parameters of these names and shapes.

    Raises UserError when it is neither, or belongs to another model.
    """
    source = Path(path)
    if source.is_dir():
        if steps is not None:
            raise UserError(
                f"--protect-steps is for importance files; the run in {path} brings its own count of steps"
            )
        return _from_run(source, shapes)
    if not source.is_file():
        raise UserError(f"--protect {path}: no such file or directory")
    return _from_file(source, shapes, structure, beta2, steps)


def _compare(path: Path, found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> None:
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not in the model" for name in found if name not in wanted]
    wrong += [
        f"{name} is {tuple(found[name])}, the model's is {tuple(wanted[name])}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if wrong:
        raise UserError(
            f"--protect {path} belongs to another model:\n  "
            + "\n  ".join(wrong[:5])
            + (f"\n  ({len(wrong)} differences)" if len(wrong) > 5 else "")
        )


def _from_file(
    path: Path, shapes: Mapping[str, torch.Size], structure: str, beta2: float, steps: int | None
) -> Source:
    from safetensors import SafetensorError, safe_open

    metadata = load_metadata(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"--protect {path}: not written by `epi-kernels importance`")
    # One time constant: long enough that the estimate is not forgotten at once, short enough that the second moment
    # adapts to gradients the old data never had (a longer one lets the first updates overshoot).
    steps = steps or max(1, round(1 / (1 - beta2)))
    # A bias-corrected average equals the mean when the raw average is the mean times (1 - beta2^t).
    raw = 1 - beta2**steps
    state, names = {}, list(shapes)
    try:
        with safe_open(path, "pt") as file:
            _compare(
                path, {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}, shapes
            )
            for index, name in enumerate(names):
                state[index] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg_sq": file.get_tensor(name).mul_(raw),
                }
    except SafetensorError as error:
        raise UserError(f"--protect {path}: damaged ({error})") from None
    if not any(one["exp_avg_sq"].any() for one in state.values()):
        raise UserError(f"--protect {path}: all importances are 0, nothing would be protected")
    group = {"params": list(range(len(names))), "param_names": names}
    description = f"importance of {metadata['examples']} examples in {metadata['batches']} batches, counted as {steps} steps"
    return Source(
        {"state": state, "param_groups": [group]},
        "importance",
        str(path),
        metadata.get("weights"),
        description,
    )


def _from_run(path: Path, shapes: Mapping[str, torch.Size]) -> Source:
    found = [path] if (path / "optimizer.pt").is_file() else checkpoint.list_checkpoints(path)
    if not found:
        raise UserError(f"--protect {path}: holds no checkpoint of a fine-tuning run")
    state = checkpoint.load_state(found[-1])
    optimizer = checkpoint.load_optimizer(found[-1])["optimizer"]
    names = {
        index: name
        for group in optimizer["param_groups"]
        for index, name in zip(group["params"], group.get("param_names", ()))
    }
    moments = {
        names.get(index, str(index)): one.get("exp_avg_sq") for index, one in optimizer["state"].items()
    }
    if all(isinstance(value, torch.Tensor) for value in moments.values()):
        _compare(path, {name: value.shape for name, value in moments.items()}, shapes)
    return Source(
        optimizer, "run", str(path), state.get("weights"), f"the run's optimizer after step {state['step']}"
    )
