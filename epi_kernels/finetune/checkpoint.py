"""Checkpoints that are whole or absent: written beside, synced, renamed.

OUT/checkpoints/step-00000200/   config.json, model.safetensors, tokenizer: loads with AutoModelForCausalLM
                                 optimizer.pt: optimizer and schedule (torch.load, weights_only)
                                 state.json: step, log length, fingerprint of the weights, sizes of the files
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from epi_kernels.files import sync

from .errors import UserError

PREFIX = "step-"
TEMPORARY = ".partial-"


class DiskFull(Exception):
    """No space was left; the directory that was being written is gone again, everything older is whole."""


def _probe(directory: Path) -> None:
    """Writes and removes 1 MiB."""
    path = directory / (TEMPORARY + "probe")
    try:
        with open(path, "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def is_disk_full(error: BaseException, directory: Path) -> bool:
    """True for ENOSPC in the forms it comes in: safetensors and torch.save raise errors of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if "No space left" in str(error) or "os error 28" in str(error):
        return True
    # torch.save's messages name no cause ("iostream error", "unexpected pos 7808 vs 7700"): try the disk.
    try:
        _probe(directory)
    except OSError as probed:
        return probed.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def write_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Fills `target` by `write(temporary directory)`; it appears complete and synced or not at all. Raises DiskFull."""
    parent = target.parent
    temporary = parent / (TEMPORARY + target.name)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        for path in sorted(temporary.rglob("*")):
            sync(path)
        sync(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        sync(parent)
    except BaseException as error:
        # Asked before the half-written files go, which may be what fills the disk.
        full = isinstance(error, Exception) and is_disk_full(error, parent)
        shutil.rmtree(temporary, ignore_errors=True)
        if full:
            raise DiskFull(f"no space left on the disk of {parent}") from error
        raise


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if re.fullmatch(PREFIX + r"\d+", path.name) and (path / "state.json").is_file()
    )


def save_checkpoint(
    run_dir: Path, step: int, model, tokenizer, optimizer: dict, scheduler: dict, state: dict, keep: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:  # fmt: skip
    """Writes the checkpoint of `step`, then removes all but the last `keep`. Raises DiskFull.

    `optimizer`, `scheduler`: their state dicts; `weights`: the model's, when it is sharded.
    """
    target = run_dir / "checkpoints" / f"{PREFIX}{step:08d}"

    def write(folder: Path) -> None:
        save_pretrained(model, tokenizer, folder, weights)
        torch.save({"optimizer": optimizer, "scheduler": scheduler}, folder / "optimizer.pt")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / "state.json").write_text(
            json.dumps({"step": step, **state, "files": files}, indent=1) + "\n", encoding="utf-8"
        )

    write_directory(target, write)
    sync(run_dir)  # the names of what a resume needs beside it
    prune(run_dir, keep)
    return target


def prune(run_dir: Path, keep: int) -> None:
    """Removes all checkpoints but the last `keep`."""
    for old in list_checkpoints(run_dir)[:-keep]:
        # Renamed first: a kill midway must not leave half a checkpoint under a checkpoint's name.
        doomed = old.with_name(TEMPORARY + "old-" + old.name)
        os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clean(run_dir: Path) -> None:
    """Removes what a killed writer left behind."""
    for path in (run_dir / "checkpoints").glob(TEMPORARY + "*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for path in run_dir.glob(TEMPORARY + "*"):
        path.unlink()


def load_state(checkpoint: Path) -> dict:
    """state.json. Raises UserError naming the file that is damaged: that one, or any other that is not as long as it was."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint's ({error})") from None
    if not isinstance(state, dict) or not {"step", "log_bytes", "weights", "carried"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint's (it lacks what a resume needs)")
    for name, size in state.get("files", {}).items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "missing" if found is None else f"{found} bytes, not the {size} that were written"
            raise UserError(f"{file}: {what}")
    return state


def load_optimizer(checkpoint: Path) -> dict:
    """{"optimizer": state_dict, "scheduler": state_dict}, tensors mapped from the file."""
    path = checkpoint / "optimizer.pt"
    try:
        both = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(both, dict) or not {"optimizer", "scheduler"} <= both.keys():
        raise UserError(f"{path}: cannot be read (it holds no optimizer with its schedule)")
    return both


def save_pretrained(model, tokenizer, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def export_model(model, tokenizer, out: Path, weights: dict[str, torch.Tensor] | None) -> bool:
    """Puts a model into `out` without a checkpoint, whose optimizer has no room there; whether the model has."""
    folder = out / "checkpoints" / (TEMPORARY + "model")
    try:
        write_directory(folder, lambda temporary: save_pretrained(model, tokenizer, temporary, weights))
        export(folder, out)
    except DiskFull:
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


def export(checkpoint: Path, out: Path) -> None:
    """Puts a checkpoint's model and tokenizer into `out` itself, by hard links where the file system has them."""
    for source in sorted(checkpoint.iterdir()):
        if source.name in ("optimizer.pt", "state.json"):
            continue
        temporary = out / (TEMPORARY + source.name)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            try:
                shutil.copyfile(source, temporary)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                if is_disk_full(error, out):
                    raise DiskFull(f"no space left on the disk of {out}") from error
                raise
        os.replace(temporary, out / source.name)
        temporary.unlink(missing_ok=True)  # a rename between two links to one file does nothing
    sync(out)
