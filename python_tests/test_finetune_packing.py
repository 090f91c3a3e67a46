"""Packed examples do not see each other; batches are a pure function of seed and step."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epi_kernels.finetune import packing
from epi_kernels.finetune.chat import IGNORE, Encoded
from epi_kernels.finetune.errors import UserError
from epi_kernels.finetune.packing import Schedule, collate, pack
from epi_kernels.finetune.train import answer_loss
from python_tests.tiny_model import tiny_llama


@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(0, 3))
def test_rows_hold_every_example_once_and_fit(lengths, seed):
    rows = pack(lengths, 20, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 20
    assert rows == pack(lengths, 20, seed)
    # First fit: two neighbours that would fit one row are only apart when an old row was closed.
    if len(rows) <= packing.OPEN_ROWS:
        assert sum(2 * sum(lengths[index] for index in row) <= 20 for row in rows) <= 1


def test_without_packing_a_row_is_an_example():
    assert sorted(pack([3, 1, 2], 20, 0, packing=False)) == [[0], [1], [2]]


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 4))
def test_an_epoch_has_every_row_once_and_the_next_another_order(rows, batch_size, accumulation):
    schedule = Schedule(rows, batch_size, accumulation, seed=1)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        batches = [schedule.micro_batches(step) for step in steps]
        assert all(1 <= len(step) <= accumulation for step in batches)
        assert all(1 <= len(batch) <= batch_size for step in batches for batch in step)
        epochs.append([row for step in batches for batch in step for row in batch])
        assert sorted(epochs[-1]) == list(range(rows))
    assert rows < 20 or epochs[0] != epochs[1]


def test_an_epoch_is_shuffled_once(monkeypatch):
    shuffled = []
    shuffle = random.Random.shuffle
    monkeypatch.setattr(
        random.Random, "shuffle", lambda self, order: shuffled.append(len(order)) or shuffle(self, order)
    )
    schedule = Schedule(97, 2, 3, seed=time.time_ns())
    first = [schedule.micro_batches(step) for step in range(schedule.steps_per_epoch)]
    assert shuffled == [97]
    first[0][0].clear()  # what is handed out is the caller's
    assert schedule.micro_batches(0)[0]
    schedule.micro_batches(schedule.steps_per_epoch)
    assert shuffled == [97, 97]


def encoded(*ids, answer=2):
    """An example whose last `answer` tokens are learned."""
    return Encoded(list(ids), [IGNORE] * (len(ids) - answer) + list(ids[-answer:]))


FIRST, OTHER, SECOND = encoded(5, 6, 7, 8), encoded(90, 91, 92, 93), encoded(20, 21, 22, 23, 24)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_example_does_not_see_its_neighbour_in_a_row(attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    logits, gradients = [], []
    for first in (FIRST, OTHER):
        # No loss on the first example: every gradient is the second's.
        silent = Encoded(first.input_ids, [IGNORE] * 4)
        batch = collate([[silent, SECOND]], 0, packing=True)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits.append(model(**inputs, use_cache=False).logits[0, 4:].detach())
        model.zero_grad()
        loss, count = answer_loss(model, batch)
        assert count == 2
        loss.backward()
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters()})
    assert torch.equal(*logits)
    for name in gradients[0]:
        assert torch.equal(gradients[0][name], gradients[1][name]), name
    # The same model without position_ids does leak, so the test can fail.
    leaking = [
        model(input_ids=torch.tensor([one.input_ids + SECOND.input_ids])).logits[0, 4:]
        for one in (FIRST, OTHER)
    ]
    assert not torch.equal(*leaking)


def test_a_packed_row_has_the_loss_of_its_examples_alone():
    model = tiny_llama().eval()
    packed, count = answer_loss(model, collate([[FIRST, SECOND], [OTHER]], 0, packing=True))
    alone = [answer_loss(model, collate([[one]], 0, packing=False)) for one in (FIRST, SECOND, OTHER)]
    assert count == sum(tokens for _, tokens in alone) == 6
    torch.testing.assert_close(packed, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


def test_padding_of_unpacked_rows_is_masked():
    batch = collate([[FIRST], [SECOND]], 9, packing=False)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 8, 9]
    assert batch["labels"][0].tolist() == [IGNORE, IGNORE, 7, 8, IGNORE]


def test_positions_restart_in_every_example_and_in_the_padding():
    batch = collate([[FIRST, SECOND], [OTHER]], 0, packing=True)
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3, 4]]


def test_one_row_for_flash_attention_keeps_examples_apart_too():
    """It reads boundaries only in a batch of one row; the joined row gives what the separate ones give."""
    rows = [[FIRST, SECOND], [OTHER]]
    joined = collate(rows, 0, packing=True, attention="flash_attention_2")
    assert joined["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3]]
    model = tiny_llama().eval()
    one, two = answer_loss(model, joined), answer_loss(model, collate(rows, 0, packing=True))
    assert one[1] == two[1]
    torch.testing.assert_close(one[0], two[0], rtol=1e-5, atol=1e-5)


class Leaking(torch.nn.Module):
    """Mixes tokens along a row, as a recurrent model does, or across the rows of a batch."""

    def __init__(self, dim):
        super().__init__()
        self.embed, self.dim = torch.nn.Embedding(50, 50), dim

    def forward(self, input_ids, position_ids=None, use_cache=None):
        class Output:
            logits = self.embed(input_ids).cumsum(self.dim)

        return Output


class WithoutPositions(torch.nn.Linear):
    def forward(self, input_ids, use_cache=None):
        raise AssertionError("never called")


def test_a_model_that_would_leak_is_refused_before_training():
    packing.assert_no_leak(tiny_llama(), 300)
    packing.assert_no_leak(tiny_llama(dtype=torch.bfloat16), 300)
    for dim in (0, 1):
        with pytest.raises(UserError, match="Leaking lets packed examples see each other.*--no-packing"):
            packing.assert_no_leak(Leaking(dim), 50)
    with pytest.raises(UserError, match="does not take position_ids.*--no-packing"):
        packing.assert_no_leak(WithoutPositions(2, 2), 50)
