"""What is gathered of one validation beside its tallies, for pictures and reference lines.

A mean hides how unequal the losses are, whether the model uses its context, and which tokens are hard. So a validation
also keeps a histogram of its losses with their mean by position, the first tokens of this rank, and the number of times
that each class occurs. Nothing here needs Lightning or TensorBoard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xent_metrics.page import NUM_CHARACTERS, Decode, Page, Row, write_page

BINS_PER_BIT = 4
MAX_BITS = 24
"""Losses are counted in bins of a quarter of a bit up to this many bits; one more bin holds all larger losses."""

_NUM_TOKENS = 2 * NUM_CHARACTERS  # Most targets may be masked prompts, which are not shown.
_NUM_RANKS = NUM_CHARACTERS // 2  # Each rank is a look at all classes.
_NUM_BINS = BINS_PER_BIT * MAX_BITS + 1
_MOST_COMPARED = 2**21  # Numbers at a time, of which there are copies of some MiB.
_NUM_SINGLE = 16  # Positions below this have a bucket each; above, each doubling has half as many buckets.
_NUM_BUCKETS = _NUM_SINGLE * 9  # Up to 2**20 positions; the last bucket holds all later ones.
_UNIT = 2**-20  # Of the bits that are summed by position: finer than a pixel, and 2**43 bits fit into int64.


@dataclass(frozen=True, eq=False)
class LossHistogram:
    """How many targets had which loss, and the mean loss by position in the sequence. Integers, added like a tally.

    Attributes:
        state: One int64 tensor; its size does not depend on the data, so that ranks can add it up.
    """

    state: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> LossHistogram:
        """Return the histogram of no targets."""
        return cls(torch.zeros(_NUM_BINS + 2 * _NUM_BUCKETS + 1, dtype=torch.int64, device=device))

    @classmethod
    def of(cls, loss: Tensor, scored: Tensor) -> LossHistogram:
        """Return the histogram of a batch; targets of infinite or NaN loss count in the last bin only.

        Args:
            loss: Loss of each target in nats, of shape (sequences, targets in a sequence).
            scored: Whether each target is scored.
        """
        with torch.no_grad():
            bits = loss / math.log(2)
            bits = torch.where(bits.isfinite(), bits, 2.0 * MAX_BITS).clamp(max=2.0 * MAX_BITS)
            bins = (bits * BINS_PER_BIT).long().clamp(0, _NUM_BINS - 1)
            counts = torch.zeros(_NUM_BINS, dtype=torch.int64, device=bits.device)
            counts.scatter_add_(0, bins.flatten(), scored.long().flatten())
            finite = scored & loss.isfinite()
            # Rounded to integers before they are summed, so that the order of batches and ranks does not matter.
            sums = (bits.masked_fill(~finite, 0) / _UNIT).round().long().sum(0)
            by_position = torch.zeros(2, _NUM_BUCKETS, dtype=torch.int64, device=bits.device)
            bucket = _bucket(torch.arange(bits.shape[1], device=bits.device))
            by_position.index_add_(1, bucket, torch.stack([sums, finite.sum(0)]))
            return cls(torch.cat([counts, by_position.flatten(), counts.new_zeros(1)]))

    def __add__(self, other: LossHistogram) -> LossHistogram:
        """Return the histogram of both sets of targets."""
        return LossHistogram(self.state + other.state)

    @property
    def num_repeated(self) -> int:
        """Number of samples that were left out because another rank has them too."""
        return int(self.state[-1])

    @property
    def mean(self) -> float:
        """Mean bits of targets of finite loss, to the precision of a picture; NaN without targets."""
        sums, counts = self.state[_NUM_BINS:-1].view(2, _NUM_BUCKETS).sum(1).tolist()
        return sums * _UNIT / counts if counts else math.nan

    def shares(self) -> list[float]:
        """Return the share of targets in each bin of losses; all 0 without targets."""
        counts = self.state[:_NUM_BINS].tolist()
        return [count / max(1, sum(counts)) for count in counts]

    def by_position(self) -> tuple[list[float], list[float]]:
        """Return positions (from 0; the middle of a bucket) that have targets, and the mean bits of each."""
        sums, counts = self.state[_NUM_BINS:-1].view(2, _NUM_BUCKETS).tolist()
        filled = [i for i in range(_NUM_BUCKETS) if counts[i]]
        middles = [(_first_position(i) + _first_position(i + 1) - 1) / 2 for i in filled]
        return middles, [sums[i] * _UNIT / counts[i] for i in filled]


def _bucket(position: Tensor) -> Tensor:
    """Return the bucket of each position: fine where a sequence begins, coarse far out."""
    half = _NUM_SINGLE // 2
    octave = ((position + 0.5) / half).log2().floor().long().clamp(min=0)
    return (octave * half + (position >> octave)).clamp(max=_NUM_BUCKETS - 1)


def _first_position(bucket: int) -> int:
    """Return the first position of a bucket."""
    half = _NUM_SINGLE // 2
    octave = max(0, bucket // half - 1)
    return (bucket - octave * half) << octave


class ValidationPoint(NamedTuple):
    """The result of one validation: bits per target, and the ends of the interval; NaN where there is none."""

    step: int
    bits: float
    lower: float
    upper: float


class ValidationStats:
    """Statistics of one validation, for its pictures and for the reference lines.

    Args:
        device: Where losses are.
        counts_classes: Whether to count the targets of each class.
        has_positions: Whether a row begins where its sequence does, so that the loss by position is known.
        has_text: Whether to keep the first tokens, for a page.

    Attributes:
        histogram: Of the losses.
        class_counts: Number of scored targets of each class; empty if classes are not counted.
        num_beyond: Number of scored targets that are no class.
    """

    def __init__(
        self, device: torch.device, counts_classes: bool, has_positions: bool = True, has_text: bool = True
    ) -> None:
        self.histogram = LossHistogram.zero(device)
        self.class_counts = torch.zeros(0, dtype=torch.int64, device=device)
        self.num_beyond = torch.zeros((), dtype=torch.int64, device=device)
        self._counts_classes = counts_classes
        self._has_positions = has_positions
        self._room = _NUM_TOKENS if has_text else 0
        self._first: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def add(
        self,
        loss: Tensor,
        scored: Tensor,
        ids: Tensor | None,
        num_classes: int | None,
        scores: Tensor | None = None,
    ) -> None:
        """Add a batch, without waiting for the device.

        Args:
            loss: Loss of each target in nats, of shape (sequences, targets in a sequence).
            scored: Whether each target is scored.
            ids: The class of each target; None if targets are distributions.
            num_classes: How many classes there are; None if that is not known.
            scores: The logits of each target, classes last, which are looked at if a sequence has one dimension; None
                if there are none.
        """
        shape = loss.shape if self._has_positions else (-1, 1)
        self.histogram = self.histogram + LossHistogram.of(loss.reshape(shape), scored.reshape(shape))
        if ids is None:
            return
        ids = ids.reshape(loss.shape)
        if num_classes is not None and self._counts_classes:
            self._count(ids, scored, num_classes)
        if self._room > 0 and ids.numel():
            columns = min(ids.shape[1], self._room)
            part = (slice(-(-self._room // columns)), slice(columns))
            most = self._room - (_NUM_TOKENS - _NUM_RANKS)
            has_ranks = scores is not None and scores.shape[:-1] == loss.shape and most > 0
            ranks = _ranks(scores[part], ids[part], most) if scores is not None and has_ranks else None
            # Cloned, since a view would keep the memory of the whole batch.
            self._first.append((ids[part].clone(), loss[part].clone(), scored[part].clone(), ranks))
            self._room -= ids[part].numel()

    def leave_out(self, num_samples: int) -> None:
        """Count samples that were not scored because another rank has them too."""
        self.histogram.state[-1] += num_samples

    def _count(self, ids: Tensor, scored: Tensor, num_classes: int) -> None:
        missing = num_classes - len(self.class_counts)  # Loaders may have different numbers of classes.
        self.class_counts = torch.nn.functional.pad(self.class_counts, (0, max(0, missing)))
        known = (ids >= 0) & (ids < num_classes)
        self.num_beyond = self.num_beyond + (scored & ~known).sum()
        index = ids.masked_fill(~known, 0).flatten()
        self.class_counts.scatter_add_(0, index, (scored & known).long().flatten())

    def page(self, decode: Decode | None) -> Page:
        """Return the first text of this rank; `decode` is that of `write_page`."""
        return write_page(self._rows(), decode)

    def _rows(self) -> Iterator[Row]:
        for ids, losses, scored, ranks in self._first:
            places = [None] * len(ids) if ranks is None else ranks.tolist()
            yield from map(Row, ids.tolist(), losses.tolist(), scored.tolist(), places)


def _ranks(scores: Tensor, ids: Tensor, most: int) -> Tensor:
    """Return the place of each of the first classes among all, 1 for the most likely one, a few at a time.

    It is 0 for those beyond the first `most`, and where it is none: that of a NaN.
    """
    num_classes = scores.shape[-1]
    first = torch.arange(min(most, ids.numel()), device=ids.device)
    ranks = []
    for some in first.split(max(1, _MOST_COMPARED // num_classes)):
        where = some // ids.shape[1], some % ids.shape[1]
        of_all = scores[where]
        own = of_all.gather(1, ids[where].clamp(0, num_classes - 1).unsqueeze(1))
        # What is summed is first copied in the dtype of the sum.
        ranks.append(((of_all > own).sum(1, dtype=torch.int32) + 1).masked_fill_(own.squeeze(1).isnan(), 0))
    return torch.nn.functional.pad(torch.cat(ranks), (0, ids.numel() - len(first))).view_as(ids)


def unigram_bits(counts: Sequence[int]) -> float:
    """Return the entropy in bits of the class frequencies; NaN if there are no targets."""
    total = sum(counts)
    return -math.fsum(n / total * math.log2(n / total) for n in counts if n) if total else math.nan
