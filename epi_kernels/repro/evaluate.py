"""A task's score and held-out loss, of a model that is left as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from epi_kernels.finetune.chat import IGNORE, Encoded, Encoding, encode, ensure_template
from epi_kernels.finetune.data import Example
from epi_kernels.finetune.model import pad_id
from epi_kernels.finetune.packing import collate
from epi_kernels.finetune.ranks import Ranks
from epi_kernels.repro.errors import ReproError
from epi_kernels.repro.methods.base import logits_of
from epi_kernels.repro.pictures import Pictured, with_pictures
from epi_kernels.repro.stage import Batch
from epi_kernels.repro.tasks import Task


def encode_task(tokenizer: Any, examples: Sequence[Example], max_length: int) -> Encoding:
    """Tokens with loss on the answers and the end token behind them.

    Raw examples are prompt and answer as they stand; others go through the chat template, or the fallback's where the
    tokenizer has none (it is then kept in the tokenizer). What is cut or dropped is counted in ``counts``.
    """
    if not all(example.raw for example in examples):
        ensure_template(tokenizer)
    return with_pictures(examples, encode(tokenizer, examples, max_length, template="raw"))


def make_batch(
    rows: Sequence[Encoded], pad: int, device: torch.device, task: int | Sequence[int] = 0
) -> Batch:
    """Rows padded on the right; `task` is the rows' index among the stage's tasks, one for all or one each.

    Raises ReproError where some rows have a picture and others none.
    """
    parts = collate([[row] for row in rows], pad, packing=False)
    indices = [task] * len(rows) if isinstance(task, int) else list(task)
    pictures = [row.picture for row in rows if isinstance(row, Pictured)]
    if len(pictures) not in (0, len(rows)):
        raise ReproError("tasks with pictures and tasks without cannot be learned in one stage")
    batch = Batch(**parts, task=torch.tensor(indices), pictures=torch.stack(pictures) if pictures else None)
    return batch.to(device)


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    device: torch.device,
    batch: int,
    max_length: int | None = None,
    ranks: Ranks | None = None,
) -> tuple[float, float]:
    """(score in the task's unit, loss in nats a token of the answers, the end token included).

    `batch`: rows of a forward pass, at most: fewer where they are long or the model is large (`portions`).
    `max_length`: tokens an example may have, None for any number. Longer ones are left out of the loss and count as
    wrong where the score is exact; where answers are generated, a prompt loses its beginning to leave room for one.
    Raises ReproError when no example is short enough.

    `ranks`: share the examples out, and each has the result; the first alone asks the task for a score.
    """
    ranks = ranks or Ranks()
    limit = max_length or sys.maxsize
    rows = [
        one for one in encode_task(tokenizer, examples, sys.maxsize).examples if len(one.input_ids) <= limit
    ]
    if not rows:
        raise ReproError(f"{task.kind}: no example has at most {limit} tokens; raise max_length")
    own = slice(ranks.rank, None, ranks.size)
    with _evaluating(model):
        found = ranks.together(_teacher_forced, model, rows[own], pad_id(tokenizer), device, batch)
        right, nats, tokens = ranks.sums(found)
        if task.exact:
            return 100.0 * right / len(examples), nats / tokens
        parts = ranks.gathered(
            ranks.together(
                generate, model, tokenizer, examples[own], device, batch, task.max_new_tokens, limit
            )
        )
    answers = [parts[at % ranks.size][at // ranks.size] for at in range(len(examples))]
    return ranks.first_does(task.score, answers, examples), nats / tokens


PASS_BYTES = 8 << 30  # what a forward pass of an evaluation may hold of logits and keys and values


def token_bytes(model: Any) -> int:
    """Of one token in a forward pass: its logits in float32 and, while answers are generated, its keys and values."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    return 4 * config.vocab_size + kept * model.dtype.itemsize


def portions(lengths: Sequence[int], most: int, of_a_token: int) -> Iterator[slice]:
    """Slices of rows, in order, of at most `most` rows each and at most PASS_BYTES as they are padded; one at least."""
    start, longest = 0, 0
    for at, length in enumerate(lengths):
        longest = max(longest, length)
        if at > start and (at - start == most or (at - start + 1) * longest * of_a_token > PASS_BYTES):
            yield slice(start, at)
            start, longest = at, length
    if lengths:
        yield slice(start, len(lengths))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without a graph; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _teacher_forced(
    model: Any, rows: Sequence[Encoded], pad: int, device: torch.device, batch: int
) -> tuple[int, float, int]:
    """(rows whose every answer token is the likeliest one given the right tokens before it, nats of all, tokens).

    Greedy decoding goes wrong exactly where this does: the two part only after a first mistake.
    """
    right, nats, tokens = 0, 0.0, 0
    for portion in portions([len(row.input_ids) for row in rows], batch, token_bytes(model)):
        part = make_batch(rows[portion], pad, device)
        logits = logits_of(model, part, use_cache=False)
        labels = part.labels[:, 1:]
        learned = labels != IGNORE
        logits, wanted = logits[:, :-1][learned].float(), labels[learned]  # [tokens, vocabulary], [tokens]
        missed = torch.zeros_like(learned)
        missed[learned] = logits.argmax(-1) != wanted
        right += int((~missed.any(1)).sum())
        nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
        tokens += len(wanted)
    return right, nats, tokens


def prompt_of(tokenizer: Any, example: Example) -> str:
    """What the model is given before its answer, as `encode_task` has it."""
    if example.raw:
        return example.messages[0][1]
    messages = [{"role": role, "content": content} for role, content in example.messages[:-1]]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def generate(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    device: torch.device,
    batch: int,
    max_new_tokens: int,
    max_length: int = sys.maxsize,
) -> list[str]:
    """Greedy answers in the examples' order, without special tokens. The model is in evaluation mode."""
    room = max(1, max_length - max_new_tokens)
    prompts = [
        tokenizer(prompt_of(tokenizer, one), add_special_tokens=False)["input_ids"][-room:]
        for one in examples
    ]
    pad, answers = pad_id(tokenizer), [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    with _greedy(model, tokenizer, max_new_tokens):
        lengths = [len(prompts[index]) + max_new_tokens for index in order]
        for portion in portions(lengths, batch, token_bytes(model)):
            chosen = order[portion]
            width = len(prompts[chosen[-1]])
            ids = [[pad] * (width - len(prompts[index])) + prompts[index] for index in chosen]
            seen = [[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen]
            found = model.generate(
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(seen, device=device)
            )
            texts = tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
            for index, text in zip(chosen, texts):
                answers[index] = text
    return answers


@contextmanager
def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """A checkpoint's own generation settings (sampling, penalties) are set aside; its end tokens count still."""
    from transformers import GenerationConfig

    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad_id(tokenizer),
        use_cache=True,
    )
    try:
        yield
    finally:
        model.generation_config = own
