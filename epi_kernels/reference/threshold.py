"""Stage 3, threshold: the k-th largest score by counting, never by sorting.

Scores are compared as ordered integer keys (the float's bits, made monotone). A search holds, for
every domain (one for ``scope="global"``, one a layer for ``scope="layer"``), a bracket [lo, hi) of
keys that is believed to hold the k-th largest. A counting pass fills a histogram of the bracket and
counts what lies above; ``select`` then proves the bracket right and narrows it to one bin, or proves
it wrong and moves to the side that holds the answer. A bracket guessed from a sample therefore costs
a pass when it is wrong, never exactness.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from epi_kernels.reference import bits
from epi_kernels.reference.stats import ScoreTerms, score, slices
from epi_kernels.reference.tensors import ParamTensors

KEY_END = 1 << 32
SAMPLE_BLOCK = 64  # consecutive elements that are sampled or passed over together
_SIGN = 0x80000000


def score_keys(scores: Tensor) -> Tensor:
    """[n] fp32 (no NaN, no -0) -> [n] int64 in [0, 2^32), ordered as the scores are."""
    word = scores.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(word >= _SIGN, 0xFFFFFFFF - word, word + _SIGN)


def key_scores(keys: Tensor) -> Tensor:
    """Inverse of ``score_keys``."""
    word = torch.where(keys >= _SIGN, keys - _SIGN, 0xFFFFFFFF - keys)
    word = torch.where(word >= _SIGN, word - KEY_END, word)
    return word.to(torch.int32).view(torch.float32)


@dataclass(frozen=True, slots=True)
class SearchProblem:
    """The k-th largest score of every domain is asked for; tensors on one device."""

    k: Tensor  # [domains] int64
    domain: Tensor  # [layers] int64: the domain a layer belongs to
    n_elements: Tensor  # [domains] int64: all eligible elements
    zeros: Tensor  # [layers] int64: those without state, whose u is 0
    floor: int  # every finite score's key lies in [floor, end)
    end: int
    bin_bits: int
    keep_factor: float  # float32(1 - hysteresis)


@dataclass(slots=True)
class KthSearch:
    """Brackets and counts of a search, one row a domain; all tensors on one device."""

    k: Tensor  # [domains] int64, >= 1 where the domain selects anything
    lo: Tensor  # [domains] int64 key
    hi: Tensor  # [domains] int64 key, exclusive
    shift: Tensor  # [domains] int64: bin = (key - lo) >> shift
    done: Tensor  # [domains] bool
    threshold: Tensor  # [domains] fp32, +inf until done
    count_ge: Tensor  # [domains] int64: finite eligible elements with score >= threshold, once done
    histogram: Tensor  # [domains, bins + 1] int64; the last column counts keys >= hi
    domain: Tensor  # [layers] int64: the domain a layer belongs to
    keep_factor: float  # float32(1 - hysteresis)
    floor: int  # no key lies below
    bin_bits: int = field(default=11)

    @classmethod
    def start(cls, problem: SearchProblem) -> KthSearch:
        k = problem.k
        search = cls(
            k=k,
            lo=torch.full_like(k, problem.floor),
            hi=torch.full_like(k, problem.end),
            shift=torch.zeros_like(k),
            done=k <= 0,
            threshold=torch.full(k.shape, torch.inf, dtype=torch.float32, device=k.device),
            count_ge=torch.zeros_like(k),
            histogram=torch.zeros(k.numel(), (1 << problem.bin_bits) + 1, dtype=torch.int64, device=k.device),
            domain=problem.domain,
            keep_factor=problem.keep_factor,
            floor=problem.floor,
            bin_bits=problem.bin_bits,
        )
        search._fit_bins()
        return search

    def _fit_bins(self) -> None:
        """Smallest shift that lays the bracket over the bins; a finished domain's bracket is empty."""
        self.lo = torch.where(self.done, self.hi, self.lo)
        width = self.hi - self.lo
        ceil_log2 = torch.frexp((width - 1).clamp_min(0).double()).exponent
        shift = (ceil_log2.to(torch.int64) - self.bin_bits).clamp_min(0)
        self.shift = shift

    def add_zero_elements(self, terms: ScoreTerms, counts: Tensor) -> None:
        """Counts elements without state, whose u is 0 ([layers] int64 counts)."""
        zero = torch.zeros_like(terms.shift)
        key = score_keys(score(zero, terms.shift, terms.scale, None, 1.0))
        lo, hi, shift = self.lo[self.domain], self.hi[self.domain], self.shift[self.domain]
        column = torch.where(key >= hi, self.histogram.shape[1] - 1, ((key - lo).clamp_min(0) >> shift))
        counted = torch.where((key >= lo) & ~self.done[self.domain], counts, 0)
        column = torch.where(counted > 0, column, 0)
        self.histogram.index_put_((self.domain, column), counted, accumulate=True)

    def bracket_from_sample(self, n_elements: Tensor) -> None:
        """Turns a histogram of a sample over the whole range into a bracket ([domains] int64 sizes).

        Five standard deviations of the sampled rank on either side; ``select`` checks it on the whole.
        """
        at_least = self.histogram[:, :-1].flip(1).cumsum(1).flip(1) + self.histogram[:, -1:]
        rank = self.k.double() * at_least[:, 0].double() / n_elements.clamp_min(1).double()
        margin = 5.0 * rank.sqrt() + 5.0
        bins = at_least.shape[1]
        low_bin = ((at_least >= (rank + margin).unsqueeze(1)).sum(1) - 1).clamp_min(0)
        high_bin = bins - (at_least <= (rank - margin).unsqueeze(1)).sum(1)
        lo, hi = self.lo, self.hi
        self.lo = lo + (low_bin << self.shift)
        self.hi = torch.minimum(lo + (high_bin << self.shift), hi)
        self._fit_bins()

    def select(self) -> None:
        """Narrows, finishes or moves every open bracket by the histogram of a whole counting pass."""
        above = self.histogram[:, -1]
        at_least = self.histogram[:, :-1].flip(1).cumsum(1).flip(1) + above.unsqueeze(1)
        total = at_least[:, 0]
        open_ = ~self.done
        # fewer finite scores than k: the smallest of them is the threshold
        k = torch.where(self.lo <= self.floor, torch.minimum(self.k, total), self.k)
        empty = open_ & (k <= 0)
        too_low, too_high = open_ & (above >= k) & ~empty, open_ & (total < k)
        inside = open_ & ~empty & ~too_low & ~too_high

        bin_ = ((at_least >= k.unsqueeze(1)).sum(1) - 1).clamp_min(0)
        bin_lo = self.lo + (bin_ << self.shift)
        bin_hi = torch.minimum(bin_lo + (torch.ones_like(bin_) << self.shift), self.hi)
        finished = inside & (self.shift == 0)
        self.threshold = torch.where(finished, key_scores(bin_lo), self.threshold)
        self.count_ge = torch.where(finished, at_least.gather(1, bin_.unsqueeze(1)).squeeze(1), self.count_ge)
        self.k = torch.where(
            empty, torch.zeros_like(k), torch.where(open_ & (self.lo <= self.floor), k, self.k)
        )
        self.done = self.done | finished | empty

        lo, hi = self.lo, self.hi
        self.lo = torch.where(inside, bin_lo, torch.where(too_low, hi, torch.where(too_high, self.floor, lo)))
        self.hi = torch.where(inside, bin_hi, torch.where(too_low, KEY_END, torch.where(too_high, lo, hi)))
        self._fit_bins()


def count(tensors: ParamTensors, terms: ScoreTerms, search: KthSearch, sample_stride: int = 1) -> None:
    """Adds one parameter's finite scores to its domain's histogram row.

    ``sample_stride`` = s > 1 counts only every s-th block of SAMPLE_BLOCK elements of the parameter.
    """
    row = tensors.layer
    domain = int(search.domain[row])
    if bool(search.done[domain]):
        return
    lo, hi, shift = search.lo[domain], search.hi[domain], search.shift[domain]
    columns = search.histogram.shape[1]
    for start, stop in slices(tensors.n_stored):
        u = tensors.read_u(start, stop)
        isolated = None
        if search.keep_factor != 1.0 and tensors.isolation_mask is not None:
            isolated = bits.unpack(tensors.isolation_mask[start // 8 : bits.packed_bytes(stop)], stop - start)
        keep = torch.isfinite(u)
        if sample_stride > 1:
            position = torch.arange(start, stop, device=u.device)
            keep &= (position // SAMPLE_BLOCK) % sample_stride == 0
        keys = score_keys(score(u, terms.shift[row], terms.scale[row], isolated, search.keep_factor)[keep])
        column = torch.where(keys >= hi, columns - 1, (keys - lo).clamp_min(0) >> shift)[keys >= lo]
        search.histogram[domain] += torch.bincount(column, minlength=columns)
