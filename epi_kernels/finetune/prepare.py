"""From options to a job: data read and encoded, rows packed, steps counted. Writes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from . import chat, data, packing
from .errors import UserError
from .job import Job, Rows
from .model import load_config, load_tokenizer, pad_id, pick_device, row_length
from .options import Options
from .ranks import Ranks


@dataclass
class Prepared:
    job: Job
    config: object
    counts: dict[str, chat.Counts]
    notes: list[str]


def encode_rows(
    tokenizer, examples: Sequence[data.Example], path: str, max_length: int, options, seed: int
) -> tuple[Rows, chat.Encoding]:
    """Packed rows of `examples`; raises UserError when none has an answer token left."""
    encoding = chat.encode(tokenizer, examples, max_length, options.template)
    if not encoding.examples:
        raise UserError(
            f"{path}: no example has an answer within {max_length} tokens (all {encoding.counts.dropped} dropped); raise --max-length"
        )
    lengths = [len(one.input_ids) for one in encoding.examples]
    return Rows(encoding.examples, packing.pack(lengths, max_length, seed, options.packing)), encoding


def prepare(options: Options, ranks: Ranks | None = None) -> Prepared:
    """Reads and checks everything but the weights."""
    examples = data.read_jsonl(options.data)
    if options.validation:
        train, validation = examples, data.read_jsonl(options.validation)
    else:
        train, validation = data.split(examples, options.validation_split, options.seed)
    retain = (
        data.sample(data.read_jsonl(options.retain), options.retain_examples, options.seed)
        if options.retain
        else []
    )

    ranks = ranks or Ranks()
    device = pick_device(options.device, ranks)
    config = load_config(options.model)
    texts = (content for example in itertools.chain(train, retain) for _, content in example.messages)
    vocab_size = config.get_text_config().vocab_size
    tokenizer = load_tokenizer(options.model, options.tokenizer, vocab_size, texts)
    notes = []
    templated = options.template != "raw" or not all(one.raw for one in (*train, *validation, *retain))
    if templated and chat.ensure_template(tokenizer):
        notes.append("the tokenizer has no chat template: a plain one is used, and saved with it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token is None:
        notes.append("the tokenizer has no end token: the model will not learn to stop")
    max_length = row_length(config, options.max_length)

    sets: dict[str, Rows | None] = {"train": None, "validation": None, "retain": None}
    counts, fingerprints = {}, {}
    named = (
        ("train", train, options.data),
        ("validation", validation, options.validation or options.data),
        ("retain", retain, options.retain),
    )
    for name, chosen, path in named:
        if not chosen:
            continue
        try:
            rows, encoding = encode_rows(tokenizer, chosen, path or "", max_length, options, options.seed)
        except UserError:
            # A validation split is the program's choice, not the user's: too long a split is no reason to stop.
            if name != "validation" or options.validation:
                raise
            notes.append(
                f"no validation: all {len(chosen)} examples held out have no answer within {max_length} tokens"
            )
            continue
        sets[name], counts[name] = rows, encoding.counts
        fingerprints[f"{name} data"] = encoding.sha256()
    if sets["validation"] is None and not validation and options.validation_split > 0:
        notes.append("no validation: the data hold a single distinct example")

    train_rows = sets["train"]
    assert train_rows is not None  # encode_rows raises before
    schedule = packing.Schedule(len(train_rows.rows), options.batch_size, options.accumulation, options.seed)
    steps = schedule.steps_per_epoch * options.epochs
    if options.max_steps is not None:
        steps = options.max_steps  # beyond --epochs the data come round again
    job = Job(
        options,
        tokenizer,
        train_rows,
        sets["validation"],
        sets["retain"],
        schedule,
        steps,
        pad_id(tokenizer),
        device,
        fingerprints,
        ranks,
    )
    return Prepared(job, config, counts, notes)
