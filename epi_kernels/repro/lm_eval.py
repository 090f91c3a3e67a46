"""Evaluation by lm-eval (EleutherAI's evaluation harness), of the tasks that both have.

The package is optional and imported when it is asked for. Its prompts and examples are its own, so its scores go by
another metric's name than ours. What it lacks, or does in a way we do not: CodeAlpaca, Alpaca, UltraChat and CoNLL-2003
are not in it; its MBPP runs what the model writes; its AG News needs a further package (unitxt); its `logiqa` still reads
a dataset script, which `datasets` 4 and later refuse, so that LogiQA is AGIEval's version of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from epi_kernels.repro.errors import ReproError

if TYPE_CHECKING:
    from epi_kernels.repro.config import TaskSpec


class Entry(NamedTuple):
    """A task of lm-eval and which of its figures is meant, as its results name it (a share of 1)."""

    task: str
    figure: str  # "metric,filter"


TASKS = {
    "gsm8k": Entry("gsm8k", "exact_match,strict-match"),
    "logiqa": Entry("agieval_logiqa_en", "acc,none"),
    "nli": Entry("mnli", "acc,none"),  # MultiNLI's matched development set
}


def entry_of(kind: str) -> Entry:
    """Raises ReproError for a kind that lm-eval does not have."""
    if kind not in TASKS:
        raise ReproError(f'task {kind}: lm-eval evaluates {", ".join(TASKS)}; leave `harness` at "own"')
    return TASKS[kind]


def metric(kind: str) -> str:
    """For the tables: 'lm-eval gsm8k exact_match (strict-match), %'. Raises ReproError."""
    task, figure = entry_of(kind)
    name, _, filtered = figure.partition(",")
    return f"lm-eval {task} {name}{f' ({filtered})' if filtered not in ('', 'none') else ''}, %"


def score(
    spec: TaskSpec,
    model: Any,
    tokenizer: Any,
    *,
    batch_size: int = 8,
    entry: Entry | None = None,
    include_path: str | None = None,
) -> float:
    """Percentage by lm-eval of a transformers model in memory, on `spec.test` examples or all of them.

    The number of shots is lm-eval's own for the task. `entry` and `include_path` are for tasks from a folder of YAML
    files. The model comes back in the mode it had. Raises ReproError.
    """
    entry = entry or entry_of(spec.kind)
    try:
        evaluator = importlib.import_module("lm_eval")
        wrapper = importlib.import_module("lm_eval.models.huggingface")
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise ReproError(
            f'task {spec.kind}: harness "lm-eval" needs the package lm_eval (pip install lm_eval): {error}'
        ) from None
    training = model.training
    try:
        results = evaluator.simple_evaluate(
            model=wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[entry.task],
            limit=spec.test,
            task_manager=tasks.TaskManager(include_path=include_path),
            apply_chat_template=bool(tokenizer.chat_template),
            bootstrap_iters=0,
            log_samples=False,
        )
    except Exception as error:  # a hub that does not answer, a task that is not there
        reason = " ".join(str(error).split())[:300]
        raise ReproError(f"task {spec.kind}: lm-eval failed ({type(error).__name__}: {reason})") from error
    finally:
        model.train(training)
    figures = results["results"][entry.task]
    if entry.figure not in figures:
        raise ReproError(
            f"task {spec.kind}: lm-eval gave no {entry.figure!r} for {entry.task}, but {', '.join(figures)}"
        )
    return 100 * float(figures[entry.figure])
