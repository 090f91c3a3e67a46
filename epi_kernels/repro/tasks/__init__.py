"""Tasks by kind. Real ones read the original formats; synthetic ones need nothing and never go by a real one's name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from epi_kernels.repro.config import TaskSpec
from epi_kernels.repro.errors import ReproError

from .base import Task
from .reading import Hub

# kind -> "module:class"; the class is called with (spec, seed)
SYNTHETIC = {
    "sums": "synthetic.sums:Sums",  # stands for GSM8K
    "programs": "synthetic.programs:Programs",  # CodeAlpaca
    "deductions": "synthetic.deductions:Deductions",  # LogiQA
    "strings": "synthetic.strings:Strings",  # Alpaca
    "dialogues": "synthetic.dialogues:Dialogues",  # UltraChat
    "topics": "synthetic.topics:Topics",  # text classification
    "entailment": "synthetic.entailment:Entailment",  # natural language inference
    "spans": "synthetic.spans:Spans",  # named entity recognition
    "snippets": "synthetic.snippets:Snippets",  # code generation
}
PICTURED = {  # of no task of the papers, which name models that see as future work
    "shapes": "synthetic.shapes:Shapes",  # what stands at a place of a picture
    "places": "synthetic.places:Places",  # where in a picture a thing stands
}
REAL = {
    "gsm8k": "gsm8k:Gsm8k",
    "codealpaca": "code:CodeAlpaca",
    "logiqa": "logiqa:LogiQA",
    "alpaca": "chat:Alpaca",
    "ultrachat": "chat:UltraChat",
    "classification": "labels:Classification",
    "nli": "labels:Nli",
    "ner": "ner:Ner",
    "mbpp": "code:Mbpp",
}
KINDS = SYNTHETIC | PICTURED | REAL


def make_task(spec: TaskSpec, seed: int = 0) -> Task:
    """The task of a spec; `seed` draws a synthetic task's examples. Raises ReproError."""
    return _class(spec)(spec, seed)


def local_files(spec: TaskSpec) -> list[Path]:
    """What a real task reads from a local folder, as far as it is there; nothing of other tasks. Raises ReproError."""
    if spec.kind not in REAL or spec.source is None:
        return []
    folder = Path(spec.source).expanduser()
    return sorted(set().union(*_class(spec).files(folder))) if folder.is_dir() else []


def hub_of(spec: TaskSpec) -> Hub | None:
    """Where on the hub a real task's data lie; None of a local folder and of synthetic kinds. Raises ReproError."""
    if spec.kind not in REAL or (spec.source is not None and Path(spec.source).expanduser().is_dir()):
        return None
    return _class(spec).on_hub(spec)


def _class(spec: TaskSpec) -> Any:
    if spec.kind not in KINDS:
        raise ReproError(f"no kind of task is called {spec.kind!r}; there are {', '.join(KINDS)}")
    module, name = KINDS[spec.kind].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
