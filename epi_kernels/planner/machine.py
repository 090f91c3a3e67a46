"""What a machine moves and computes in a second: the cards' data sheets, and the host as asked for or measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

GB = 10**9
UTILISATION = 0.4  # of the sheet's dense bfloat16 rate, what training runs reach (PaLM, arXiv 2204.02311, table 3: 21 to 46 %)


@dataclass(frozen=True)
class Card:
    """GB/s of its memory, dense bfloat16 TFLOP/s, and GB/s of its link to the host, each direction, as on its data sheet."""

    name: str
    memory_gbps: float
    tflops: float
    link_gbps: float


# By GB of memory: the card of that size that is met most.
CARDS = {
    16: Card("GeForce RTX 4080", 717, 97, 32),
    24: Card("GeForce RTX 4090", 1008, 165, 32),
    32: Card("GeForce RTX 5090", 1792, 209, 64),
    40: Card("A100 40 GB", 1555, 312, 32),
    48: Card("L40S", 864, 362, 32),
    80: Card("H100 SXM", 3350, 989, 64),
    141: Card("H200", 4800, 989, 64),
}
LINK_SHARE = 0.8  # of the sheet's rate, what copies from pinned memory reach


@dataclass(frozen=True)
class Machine:
    """Rates that a plan counts with: bytes and operations a second."""

    card: str
    memory: float
    compute: float
    link: float  # one direction
    host: float  # read and written


def card_of(gigabytes: float) -> Card:
    """The largest card listed that is no larger; the smallest where all are larger."""
    listed = [size for size in CARDS if size <= gigabytes]
    return CARDS[max(listed) if listed else min(CARDS)]


def rates(
    gigabytes: float,
    *,
    card_gbps: float | None = None,
    card_tflops: float | None = None,
    link_gbps: float | None = None,
    host_gbps: float | None = None,
) -> Machine:
    """Those given; else the data sheet's of a card of that memory, and what a copy on this host reaches."""
    card = card_of(gigabytes)
    return Machine(
        card=card.name,
        memory=(card_gbps or card.memory_gbps) * GB,
        compute=(card_tflops or card.tflops) * 1e12 * UTILISATION,
        link=(link_gbps or LINK_SHARE * card.link_gbps) * GB,
        host=(host_gbps or measured_host_gbps()) * GB,
    )


def measured_host_gbps(n_bytes: int = 1 << 28, rounds: int = 3) -> float:
    """GB read and written a second by a copy here, the best of a few: what a host step is held against."""
    source = torch.ones(n_bytes // 4)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * n_bytes / (time.perf_counter() - start) / GB)
    return best
