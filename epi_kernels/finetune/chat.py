"""From conversations to tokens with loss on the answers only; the fallback chat template and the fallback tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .data import Example
from .errors import UserError

IGNORE = -100  # the label of a position without loss

# Plain text and the tokenizer's own end token: it needs no token that the model does not have.
FALLBACK_TEMPLATE = (
    "{{ bos_token if bos_token is defined and bos_token else '' }}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{{ (eos_token if eos_token is defined and eos_token else '') if message['role'] == 'assistant' else '' }}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
END = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end token


@dataclass
class Encoded:
    """Tokens of one example: `labels[i]` is `input_ids[i]` where it is learned, else IGNORE; `labels[0]` is always IGNORE."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Counts:
    """What became of the examples of one file."""

    examples: int = 0
    truncated: int = 0
    dropped: int = 0
    unlearned_turns: int = 0
    tokens: int = 0
    answer_tokens: int = 0

    def __str__(self) -> str:
        text = f"{self.examples} examples, {self.tokens} tokens, {self.answer_tokens} of them answers; {self.truncated} truncated, {self.dropped} dropped"
        if self.unlearned_turns:
            text += f"; {self.unlearned_turns} earlier answers without loss, for the chat template rewrites history"
        return text


@dataclass
class Encoding:
    examples: list[Encoded] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def sha256(self) -> str:
        """Of all tokens and labels: changes with data, tokenizer, template and maximum length."""
        digest = hashlib.sha256()
        for one in self.examples:
            digest.update(f"{one.input_ids}{one.labels}".encode())
        return digest.hexdigest()


def ensure_template(tokenizer) -> bool:
    """Gives a tokenizer without chat template the fallback (saved with it); True when it did. Also names a padding token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = FALLBACK_TEMPLATE
    return True


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer learned from `texts`, of at most `vocab_size` tokens: any text has an encoding in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"the config's vocab_size {vocab_size} is too small for a byte-level tokenizer: at least {SMALLEST_VOCABULARY}, or pass --tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def _spans(tokenizer, example: Example, template: bool) -> tuple[str, list[tuple[int, int]], int]:
    """(text, character spans of the answers, answers that have no span)."""
    if not template:
        prompt, answer = example.messages[0][1], example.messages[1][1] + (tokenizer.eos_token or "")
        return prompt + answer, [(len(prompt), len(prompt) + len(answer))], 0
    messages = [{"role": role, "content": content} for role, content in example.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans, lost = [], 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = (
                tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
                if turn
                else ""
            )
            through = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
            if turn and text.startswith(through) and through.startswith(before):
                spans.append((len(before), len(through)))
            else:
                lost += 1
    except Exception as error:  # a template raises what it likes
        raise UserError(f"{example.where}: the chat template refuses it ({error})") from None
    if not spans or spans[-1][1] != len(text):
        raise UserError(
            f"{example.where}: the chat template does not keep the prompt as the beginning of prompt and answer; use another template"
        )
    # White space that the template puts after the end token is not part of an answer.
    eos = tokenizer.eos_token
    trimmed = []
    for start, end in spans:
        answer = text[start:end]
        if eos and eos in answer:
            end = start + answer.rindex(eos) + len(eos)
        trimmed.append((start, end))
    return text, trimmed, lost


def encode(tokenizer, examples: Sequence[Example], max_length: int, template: str = "chat") -> Encoding:
    """Tokens and labels of every example of at most `max_length` tokens.

    `template`: "chat" renders all forms through the chat template, "raw" joins prompt and completion as they stand.
    Longer examples are cut at the end, and dropped when no answer token is left; both are counted.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets; answers cannot be told from prompts: use a fast tokenizer"
        )
    result = Encoding()
    counts = result.counts
    for example in examples:
        text, spans, lost = _spans(tokenizer, example, template == "chat" or not example.raw)
        counts.unlearned_turns += lost
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        ids = encoded["input_ids"]
        # A token that straddles prompt and answer belongs to the prompt: at inference it is part of the input.
        labels = [
            token if any(start <= left and right <= end and left < right for start, end in spans) else IGNORE
            for token, (left, right) in zip(ids, encoded["offset_mapping"])
        ]
        # What follows the last answer (a line end of the template) teaches nothing.
        last = max((place for place, label in enumerate(labels, 1) if label != IGNORE), default=0)
        cut = last > max_length
        ids, labels = ids[: min(last, max_length)], labels[: min(last, max_length)]
        if ids:
            # Nothing before the first token predicts it; in a packed row its neighbour must not.
            labels[0] = IGNORE
        answers = sum(label != IGNORE for label in labels)
        if not answers:
            counts.dropped += 1
            continue
        counts.truncated += cut
        counts.examples += 1
        counts.tokens += len(ids)
        counts.answer_tokens += answers
        result.examples.append(Encoded(ids, labels))
    return result
