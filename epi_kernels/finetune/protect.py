"""`--protect`: where carried importance comes from, in the form `MaskedEMAAdamW.carry_importance` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from epi_kernels.optim import exchange
from epi_kernels.optim.moments import read_moment
from epi_kernels.optim.sharded_state import localized

from . import checkpoint
from .errors import UserError
from .importance import FORMAT, load_metadata


@dataclass
class Source:
    """What looks like an optimizer's state_dict, and where it is from."""

    state_dict: dict
    kind: str  # "importance" | "run"
    path: str
    weights: str | None  # fingerprint of the weights it was measured at
    description: str


def default_steps(beta1: float) -> int:
    """Steps of evidence that carried importance counts for in a shared exp_avg_sq: exp_avg's own time constant.

    At its optimum the old data's second moment is small. Carried over as the evidence of many steps it switches the
    bias correction off, and the first updates overshoot (up to 6.5 times lr for 1,000 steps; 1.1 times for 10).
    Measured on a two-layer Llama (sums, then strings; 2 seeds, ratio 0.2), the old data's loss rose by 7.5 under plain
    AdamW, 2.8 with 3 steps, 3.2 with 10, 3.8 with 30, 10.1 with 100, 10.4 with 1,000, 2.5 with an own importance.
    """
    return max(1, round(1 / (1 - beta1)))


def load(
    path: str, shapes: Mapping[str, torch.Size], betas: tuple[float, float], steps: int | None, own: bool
) -> Source:
    """Reads an importance file or a run directory for a model with parameters of these names and shapes.

    `own`: the optimizer has an importance of its own, which takes the mean squared gradient as it is; into a shared
    exp_avg_sq it goes as the evidence of `steps` steps. Raises UserError when it is neither file nor run, or belongs
    to another model.
    """
    source = Path(path)
    steps = steps or default_steps(betas[0])
    if source.is_dir():
        means, weights, description = _from_run(source, shapes)
        kind = "run"
    elif source.is_file():
        means, weights, description = _from_file(source, shapes)
        kind = "importance"
    else:
        raise UserError(f"--protect {path}: no such file or directory")
    if not any(one.any() for one in means.values()):
        raise UserError(f"--protect {path}: all importances are 0, nothing would be protected")
    # The optimizer divides by 1 - beta2^t: what it then sees is the mean again.
    factor = 1.0 if own else 1 - betas[1] ** steps
    state = {
        index: {"step": torch.tensor(float(steps)), "exp_avg_sq": means[name] * factor}
        for index, name in enumerate(shapes)
    }
    group = {"params": list(state), "param_names": list(shapes)}
    description += "" if own else f", counted as {steps} steps"
    return Source({"state": state, "param_groups": [group]}, kind, path, weights, description)


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


def _mean(average: torch.Tensor, beta: float, step: float) -> torch.Tensor:
    """fp32 mean of the squares that an average which began at 0 has seen in `step` steps; as it is before the first."""
    return average.float() / (1 - beta**step) if step else average.float()


Means = tuple[dict[str, torch.Tensor], "str | None", str]


def _from_file(path: Path, shapes: Mapping[str, torch.Size]) -> Means:
    """(mean squared gradients by name, fingerprint of the weights, description)."""
    from safetensors import SafetensorError, safe_open

    metadata = load_metadata(path)
    if metadata.get("format") == exchange.FORMAT:
        return _from_optimizer(path, shapes)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"--protect {path}: not written by `epi-kernels importance`, nor by epi_kernels.save_isolation"
        )
    try:
        with safe_open(path, "pt") as file:
            _compare(
                path, {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}, shapes
            )
            means = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise UserError(f"--protect {path}: damaged ({error})") from None
    description = f"importance of {metadata['examples']} examples in {metadata['batches']} batches"
    return means, metadata.get("weights"), description


def _from_optimizer(path: Path, shapes: Mapping[str, torch.Size]) -> Means:
    """The same from what save_isolation wrote, without its bias; where nothing was stepped, zeros."""
    try:
        file = exchange.read(path)
    except ValueError as error:
        raise UserError(f"--protect {error}") from None
    _compare(path, {name: one.shape for name, one in file.parameters.items()}, shapes)
    means = {
        name: torch.zeros(one.shape) if one.importance is None else _mean(one.importance, one.beta, one.step)
        for name, one in file.parameters.items()
    }
    return means, None, f"an optimizer's importance after step {file.isolation_step}"


def _from_run(path: Path, shapes: Mapping[str, torch.Size]) -> Means:
    """The same from a run's optimizer: its own importance if it had one, else exp_avg_sq, without their bias."""
    found = [path] if (path / "optimizer.pt").is_file() else checkpoint.list_checkpoints(path)
    if not found:
        raise UserError(f"--protect {path}: holds no checkpoint of a fine-tuning run")
    run = checkpoint.load_state(found[-1])
    optimizer = checkpoint.load_optimizer(found[-1])["optimizer"]
    means = {}
    for group in optimizer["param_groups"]:
        for index, name in zip(group["params"], group["param_names"], strict=True):
            state = optimizer["state"].get(index)
            if not state:  # it never had a gradient (an expert that no token took)
                means[name] = torch.zeros(shapes.get(name, ()))
                continue
            kept = "importance" if "importance" in state else "exp_avg_sq"
            try:
                what = f"the run's state of {name}"
                state = localized(
                    state, state[kept], what
                )  # a run on several ranks has a scale beside every code
                values = read_moment(state, kept, state[kept].shape, what)
            except (KeyError, AttributeError, ValueError) as error:
                raise UserError(f"--protect {path}: {error}") from None
            beta = group["importance_beta"] if kept == "importance" else group["betas"][1]
            means[name] = _mean(values, beta, float(state["step"]))
    _compare(path, {name: mean.shape for name, mean in means.items()}, shapes)
    return means, run.get("weights"), f"the run's optimizer after step {run['step']}"
