"""The tally: what has to be remembered of any number of targets, as one small int64 tensor.

It holds five exact sums and a handful of counts, and it can do one thing: be added to another tally. Batches,
accumulation windows, epochs, ranks, data loaders and restarts are all the same `+`, which is commutative and
associative bit for bit and has `Tally.zero()` as its identity. Everything that people want to know (nats, bits,
perplexity, a standard error) is a *reading* of a tally, in `readings.py`.

The sums are those of loss and weight, and of `S * S`, `S * W` and `W * W`, where S and W are the loss and the
weight of one sequence: with them a standard error can treat a sequence, and not a token, as the unit that was drawn.
A `GroupTally` is the same for each of many groups, without the sequences: a group may cut across them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from xent_metrics.checks import (
    WEIGHT_LIMIT,
    add_at,
    add_to,
    any_of,
    at_hand,
    cleared,
    describe,
    extremes,
    namespace,
    outside,
    present,
    times,
    zeros_beside,
)
from xent_metrics.distributed import is_distributed, sum_over_ranks
from xent_metrics.exact import (
    FRACTION_BITS,
    LIMB_BITS,
    LIMIT,
    NUM_LIMBS,
    NUM_LOW_LIMBS,
    carry_in_place,
    cut,
    products,
    to_float,
    to_int,
    widest_float,
)
from xent_metrics.losses import TargetLosses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SUMS = ("loss", "weight", "loss_loss", "loss_weight", "weight_weight")
TARGET_COUNTS = (
    "scored",
    "ignored",
    "out_of_range",
    "improper",
    "invalid_weight",
    "positive_infinite",
    "negative_infinite",
    "nan",
)
COUNTS = (*TARGET_COUNTS, "sequences", "wide_sequences")
NUM_SUM_LIMBS = len(SUMS) * NUM_LIMBS
STATE_SIZE = NUM_SUM_LIMBS + len(COUNTS)
GROUP_SIZE = 2 * NUM_LIMBS + len(TARGET_COUNTS)

SEQUENCE_BITS = 36
"""A sequence's loss and weight are squared in units of `2**-SEQUENCE_BITS`, so that their products are integers."""

_SEQUENCE_LIMIT = 2**26  # Nats, or weight, of a sequence that is sure to fit 63 bits in those units.
_BLOCK_TARGETS = 2**16  # Targets whose limbs are held at a time: a few MiB, and they stay in the cache.
_BLOCK_SEQUENCES = 2**13  # The same for sequences, which need more room each.
_BLOCK_GROUPED = 2**15  # Targets that are sorted into groups at a time, at `GROUP_SIZE` numbers each.


@dataclass(frozen=True, eq=False)  # Tensors have no single truth; compare `totals()`.
class Tally:
    """Exact sums and counts over any number of targets.

    `+` returns canonical sums: two of its results for the same targets are equal bit for bit.

    Attributes:
        state: One int64 tensor of `STATE_SIZE` numbers (on the last dimension, where several tallies stand side by
            side); save it, load it, or sum it over ranks.
    """

    state: Tensor

    def __post_init__(self) -> None:
        if self.state.dtype != torch.int64 or self.state.shape[-1:] != (STATE_SIZE,):
            raise ValueError(
                f"`state` must be an int64 tensor of {STATE_SIZE} numbers, got {self.state.dtype} of shape "
                f"{tuple(self.state.shape)}; pass the `state` of another tally."
            )

    @classmethod
    def zero(cls, device: torch.device | str | None = None, num_tallies: int | None = None) -> Tally:
        """Return the tally of no targets at all, the identity of `+`."""
        shape = (STATE_SIZE,) if num_tallies is None else (num_tallies, STATE_SIZE)
        return cls(torch.zeros(shape, dtype=torch.int64, device=device))

    @classmethod
    def stack(cls, *tallies: Tally) -> Tally:
        """Put tallies side by side."""
        return cls(torch.stack([tally.state for tally in tallies]))

    def unbind(self) -> list[Tally]:
        """Return the tallies that stand side by side; one that stands alone is the only one."""
        return [Tally(state) for state in self.state.view(-1, STATE_SIZE).unbind()]

    def __add__(self, other: Tally) -> Tally:
        """Return the tally of both sets of targets, in canonical form."""
        _check_addend(self, other)
        state = self.state + other.state
        carry_in_place(at_hand(state)[..., :NUM_SUM_LIMBS].reshape(*state.shape[:-1], len(SUMS), NUM_LIMBS))
        return Tally(state)

    def with_weight(self, weight: Tensor) -> Tally:
        """Return the tally with another denominator, an integer that its targets share; a negative one is invalid."""
        state = self.state.clone()
        state[NUM_LIMBS : 2 * NUM_LIMBS] = _limbs_of(weight.clamp(min=0))
        state[NUM_SUM_LIMBS + COUNTS.index("invalid_weight")] += weight < 0
        return Tally(state)

    def cpu(self) -> Tally:
        """Copy the tally to the host."""
        return Tally(self.state.cpu())

    def sums_on_device(self, dtype: torch.dtype, quick: bool = False) -> dict[str, Any]:
        """Read all `SUMS` in floating point, in nats, weights and their products, without leaving the device.

        They are tensors; or numbers, if it is to be `quick` and they are at hand.
        """
        numbers = at_hand(self.state) if quick else self.state
        values = to_float(numbers[:NUM_SUM_LIMBS].reshape(len(SUMS), NUM_LIMBS), dtype)
        products = values[2:] * 2.0 ** (FRACTION_BITS - 2 * SEQUENCE_BITS)
        return dict(zip(SUMS, (*values[:2], *products), strict=True))

    def counts_on_device(self, quick: bool = False) -> dict[str, Any]:
        """Return `COUNTS`, as `sums_on_device` does the sums."""
        numbers = (at_hand(self.state) if quick else self.state)[NUM_SUM_LIMBS:]
        return dict(zip(COUNTS, numbers, strict=True))

    def totals(self) -> Totals:
        """Copy the tally to the host, as Python integers."""
        numbers: list[int] = self.state.tolist()
        sums = (to_int(numbers[i : i + NUM_LIMBS]) for i in range(0, NUM_SUM_LIMBS, NUM_LIMBS))
        return Totals(*sums, *numbers[NUM_SUM_LIMBS:])


class Totals(NamedTuple):
    """A tally on the host: Python integers, one for each of `SUMS` and `COUNTS`.

    `loss` and `weight` are in units of `2**-64`, the three products in units of `2**-72`. `scored` counts every target
    that was looked at; those whose loss was infinite or NaN are also counted as such, and are in none of the sums.
    `sequences` counts those of positive weight, `wide_sequences` those whose products did not fit.
    """

    loss: int
    weight: int
    loss_loss: int
    loss_weight: int
    weight_weight: int
    scored: int
    ignored: int
    out_of_range: int
    improper: int
    invalid_weight: int
    positive_infinite: int
    negative_infinite: int
    nan: int
    sequences: int
    wide_sequences: int

    @property
    def nonfinite(self) -> int:
        """Number of scored targets whose loss was infinite (`2**94` nats or more count as such) or NaN."""
        return self.positive_infinite + self.negative_infinite + self.nan


@dataclass(frozen=True, eq=False)
class GroupTally:
    """Exact sums of loss and weight, and counts, for each of many groups of targets.

    Attributes:
        state: One int64 tensor of shape (`GROUP_SIZE`, number of groups + 1); the last column is for targets that
            have a group outside `[0, number of groups)`.
    """

    state: Tensor

    def __post_init__(self) -> None:
        if self.state.dtype != torch.int64 or self.state.dim() != 2 or len(self.state) != GROUP_SIZE:
            raise ValueError(
                f"`state` must be an int64 tensor of {GROUP_SIZE} rows, got {self.state.dtype} of shape "
                f"{tuple(self.state.shape)}; pass the `state` of another tally."
            )

    @classmethod
    def zero(cls, num_groups: int, device: torch.device | str | None = None) -> GroupTally:
        """Return the tally of no targets at all, the identity of `+`."""
        return cls(torch.zeros(GROUP_SIZE, num_groups + 1, dtype=torch.int64, device=device))

    def __add__(self, other: GroupTally) -> GroupTally:
        """Return the tally of both sets of targets, in canonical form."""
        _check_addend(self, other)
        state = self.state + other.state
        carry_in_place(state[: 2 * NUM_LIMBS].unflatten(0, (2, NUM_LIMBS)).movedim(1, -1))
        return GroupTally(state)

    def unbind(self) -> list[GroupTally]:
        """Return the only tally there is, as `Tally.unbind` would."""
        return [self]

    def cpu(self) -> GroupTally:
        """Copy the tally to the host."""
        return GroupTally(self.state.cpu())

    def sums_on_device(self, dtype: torch.dtype, quick: bool = False) -> dict[str, Any]:
        """Read loss and weight of each group in floating point, without leaving the device."""
        limbs = self.state[: 2 * NUM_LIMBS, :-1].unflatten(0, (2, NUM_LIMBS)).movedim(1, -1)
        loss, weight = to_float(limbs, dtype)
        return {"loss": loss, "weight": weight}

    def counts_on_device(self, quick: bool = False) -> dict[str, Any]:
        """Return `TARGET_COUNTS` for each group, or for all together if it is a mistake, on the device."""
        mistakes = "out_of_range", "improper", "invalid_weight"
        counts = zip(TARGET_COUNTS, self.state[2 * NUM_LIMBS :], strict=True)
        return {name: count.sum() if name in mistakes else count[:-1] for name, count in counts}

    def groupless_on_device(self) -> Tensor:
        """Return the number of scored targets that had no valid group, on the device."""
        return self.state[2 * NUM_LIMBS + TARGET_COUNTS.index("scored"), -1]

    def overall(self) -> Tally:
        """Return the tally of all groups together, without sequences."""
        sums, counts = self.state[: 2 * NUM_LIMBS, :-1].sum(1), self.state[2 * NUM_LIMBS :].sum(1)
        return Tally(torch.cat([sums, sums.new_zeros(3 * NUM_LIMBS), counts, counts.new_zeros(2)]))

    def totals(self) -> GroupTotals:
        """Copy the tally to the host, as Python integers."""
        rows = self.state[:, :-1].T.contiguous()  # Or each number would be looked up by itself.
        loss = [to_int(limbs) for limbs in rows[:, :NUM_LIMBS].tolist()]
        weight = [to_int(limbs) for limbs in rows[:, NUM_LIMBS : 2 * NUM_LIMBS].tolist()]
        scored, nonfinite = rows[:, 2 * NUM_LIMBS].tolist(), rows[:, -3:].tolist()
        return GroupTotals(loss, weight, scored, nonfinite, int(self.groupless_on_device()), self.overall().totals())


class GroupTotals(NamedTuple):
    """A group tally on the host: Python integers in units of `2**-64`, one for each group.

    `scored` and `nonfinite` count targets of each group, the latter those of infinite, minus infinite and NaN losses;
    `groupless` counts scored targets without a valid group, which are in `everything` only by their counts.
    """

    loss: list[int]
    weight: list[int]
    scored: list[int]
    nonfinite: list[list[int]]
    groupless: int
    everything: Totals


def _check_addend(tally: Tally | GroupTally, other: object) -> None:
    """Raise unless the other is a tally of the same kind; a sum of others would be broadcast, or wrong."""
    if type(other) is not type(tally):
        raise TypeError(
            f"`+` must add a {type(tally).__name__} to its kind, got {describe(other)}; pass the `tally` of a metric."
        )
    if other.state.shape != tally.state.shape:
        raise ValueError(
            f"`+` must add tallies of one shape, got {tuple(tally.state.shape)} and {tuple(other.state.shape)}; take "
            "them from metrics that are configured alike."
        )


class _Summable(Protocol):
    """What is one tensor of integers, and is added by adding it."""

    @property
    def state(self) -> Tensor: ...


AnyTally = TypeVar("AnyTally", bound=_Summable)


def sum_tallies_over_ranks(tallies: Sequence[AnyTally], group: ProcessGroup | None = None) -> list[AnyTally]:
    """Add up each of several tallies over the ranks of a group, or of all, in one collective."""
    if not tallies or not is_distributed():
        return list(tallies)
    packed = sum_over_ranks(torch.cat([tally.state.flatten() for tally in tallies]), group)
    parts = packed.split([tally.state.numel() for tally in tallies])
    make: Any = type
    return [make(tally)(part.view_as(tally.state)) for tally, part in zip(tallies, parts, strict=True)]


def tally_losses(
    losses: TargetLosses, weight: Tensor | None = None, sequence_group: ProcessGroup | None = None
) -> Tally:
    """Tally per-target losses; the sums are not carried yet, which adding to another tally does.

    Args:
        losses: What `target_losses` returns; the first dimension counts sequences, the second targets in each.
        weight: Weight of each target, of the same shape: numbers in `[0, 2**47)`, or booleans to say which to score.
        sequence_group: Ranks that hold other targets of the same sequences; each adds what is its own, and the first
            of them adds the products of the sequences.
    """
    device = losses.loss.device
    sequences, length = losses.loss.shape
    rows = max(1, min(_BLOCK_SEQUENCES, _BLOCK_TARGETS // max(length, 1)))
    losses = losses.map(at_hand)
    weight = None if weight is None else at_hand(weight)
    if sequence_group is not None:
        return _tally_split_sequences(losses, weight, rows, sequence_group, device)
    if 0 < sequences <= rows and length:
        return _tally_sequences(losses, weight, device)
    total = Tally.zero(device)
    for start in range(0, sequences if length else 0, rows):
        block = slice(start, start + rows)
        total = total + _tally_sequences(losses.at(block), None if weight is None else weight[block], device)
    return total


def tally_mean(mean: Tensor, count: Tensor) -> Tally:
    """Tally targets of which only the mean loss and the number are known, so that there are no sequences.

    Args:
        mean: Mean loss in nats, a scalar; not looked at where `count` is 0.
        count: Number of targets, an int64 scalar.
    """
    loss = (mean.to(widest_float(mean.device)) * count).view(1, 1)
    one = tally_losses(TargetLosses(loss, count.to(loss.dtype).view(1, 1), (count == 0).view(1, 1), None)).state
    sums, counts = one[: 2 * NUM_LIMBS], one[NUM_SUM_LIMBS:-2]
    return Tally(torch.cat([sums, sums.new_zeros(3 * NUM_LIMBS), counts * count, counts.new_zeros(2)]))


def tally_groups(losses: TargetLosses, weight: Tensor | None, group: Tensor, num_groups: int) -> GroupTally:
    """Tally per-target losses by group, in one pass whatever the number of groups; not carried yet.

    Args:
        losses: What `target_losses` returns.
        weight: Weight of each target, as in `tally_losses`.
        group: Group of each target, int64 of the same shape.
        num_groups: Groups are in `[0, num_groups)`; targets of others are counted apart.
    """
    column = torch.where((group >= 0) & (group < num_groups), group, num_groups).flatten()
    flat = losses.map(lambda x: at_hand(x.view(1, -1)))
    weight = None if weight is None else at_hand(weight.reshape(1, -1))  # It may have been expanded.
    total = GroupTally.zero(num_groups, column.device)
    for start in range(0, column.numel(), _BLOCK_GROUPED):
        block = (slice(None), slice(start, start + _BLOCK_GROUPED))
        part = _classify(flat.at(block), None if weight is None else weight[block])
        rows, numbers = part.each()
        sums = total.state.new_zeros(len(rows), num_groups + 1)
        sums.index_add_(1, column[block[1]], torch.as_tensor(numbers))
        for row, found in zip(rows, sums, strict=True):
            add_to(total.state[row], found)
    return total


def _tally_sequences(losses: TargetLosses, weight: Any, device: torch.device) -> Tally:
    """Tally a few whole sequences, not yet carried."""
    tally = Tally.zero(device)
    numbers = at_hand(tally.state)
    _add_products(numbers, _add_targets(numbers, losses, weight), losses.loss.shape[1])
    return tally


def _tally_split_sequences(
    losses: TargetLosses, weight: Any, rows: int, group: ProcessGroup, device: torch.device
) -> Tally:
    """Tally the targets that this rank holds of sequences that a group of ranks holds together: one collective."""
    sequences, length = losses.loss.shape
    total = Tally.zero(device)
    blocks = [slice(start, start + rows) for start in range(0, sequences, rows)]
    parts = []
    for block in blocks:
        own, tally = losses.at(block), Tally.zero(device)
        parts.append(_add_targets(at_hand(tally.state), own, None if weight is None else weight[block], NUM_LIMBS))
        total = total + tally
    if not parts:
        return total
    whole = sum_over_ranks(torch.cat([torch.as_tensor(part) for part in parts], -1), group)
    if group.rank() != 0:
        return total
    for block in blocks:
        tally = Tally.zero(device)
        _add_products(at_hand(tally.state), at_hand(whole)[..., block], length * group.size())
        total = total + tally
    return total


def _add_targets(numbers: Any, losses: TargetLosses, weight: Any, num_limbs: int | None = None) -> Any:
    """Add to the numbers of a state what targets add by themselves: to the sums of loss and weight, and to the counts.

    Returns:
        Limbs of loss and weight of each sequence, of shape (limbs, 2, sequences), not carried: as many as needed, or as
        asked for.
    """
    length = losses.loss.shape[1]
    if 0 < length <= _BLOCK_TARGETS:
        part = _classify(losses, weight)
        sums = part.sums(num_limbs or part.num_limbs)
        part.add_counts(numbers[NUM_SUM_LIMBS:])
    else:
        sums = zeros_beside(losses.loss, NUM_LIMBS, 2, len(losses.loss))
        for start in range(0, length, _BLOCK_TARGETS):
            block = (slice(None), slice(start, start + _BLOCK_TARGETS))
            part = _classify(losses.at(block), None if weight is None else weight[block])
            sums = sums + part.sums(NUM_LIMBS)
            part.add_counts(numbers[NUM_SUM_LIMBS:])
    add_to(numbers[: 2 * NUM_LIMBS].reshape(2, NUM_LIMBS)[:, NUM_LIMBS - len(sums) :], sums.sum(-1).T)
    return sums


def _add_products(numbers: Any, sums: Any, length: int) -> None:
    """Add to the numbers of a state the exact sums of `S * S`, `S * W` and `W * W`, and how many sequences there are.

    S and W are cut to units of `2**-36`, which makes them integers of less than 63 bits.

    Args:
        numbers: The state.
        sums: Limbs of loss and weight, of shape (limbs, 2, sequences), not carried.
        length: The number of targets in a sequence.
    """
    weighty = sums[:, 1].any(0)
    fixed = (sums[-2] << (SEQUENCE_BITS - LIMB_BITS)) + (sums[-1] >> (2 * LIMB_BITS - SEQUENCE_BITS))
    if len(sums) != NUM_LOW_LIMBS:  # Of few limbs none is wide.
        # A sequence of 2**26 targets or more might not fit even if every limb of its sum looks small.
        wide = sums[:2].any(0) | (abs(sums[2]) >= (_SEQUENCE_LIMIT if length < _SEQUENCE_LIMIT else 0))
        wide = wide.any(0)
        fixed = (fixed + (sums[2] << SEQUENCE_BITS)) * ~wide
        add_at(numbers, STATE_SIZE - 1, (wide & weighty).sum())
    add_at(numbers, STATE_SIZE - 2, weighty.sum())
    pairs = zeros_beside(fixed, fixed.shape[1], 2)
    pairs[:] = fixed.T
    square = products(pairs)
    sums_of_products = numbers[2 * NUM_LIMBS : NUM_SUM_LIMBS].reshape(3, NUM_LIMBS)
    add_to(sums_of_products[:2], square[0])
    add_to(sums_of_products[2], square[1, 1])


class _Classified(NamedTuple):
    """What each target adds to a tally, as tensors or as arrays.

    Attributes:
        loss: Its weighted loss, 0 where it adds none.
        norm: Its weight, 0 where it adds none; None for 1 except where it is left out.
        left_out: Where it adds to no sum; None for nowhere, here and below.
        skipped: Where it is not scored.
        reasons: Where it is each of `TARGET_COUNTS` but the first.
        num_limbs: How many limbs the sums need.
    """

    loss: Any
    norm: Any
    left_out: Any
    skipped: Any
    reasons: tuple[Any, ...]
    num_limbs: int

    def sums(self, num_limbs: int) -> Any:
        """Return limbs of each sequence's loss and weight, of shape (limbs, 2, sequences)."""
        sums = zeros_beside(self.loss, num_limbs, 2, self.loss.shape[0])
        _sum_targets(cut(self.loss, num_limbs), sums[:, 0])
        if self.norm is not None:
            _sum_targets(cut(self.norm, num_limbs), sums[:, 1])
        elif num_limbs == NUM_LOW_LIMBS:
            sums[0, 1] = self._num_added() << LIMB_BITS
        else:
            sums[2, 1] = self._num_added()
        return sums

    def _num_added(self) -> Any:
        """Return how many targets of each sequence are not left out."""
        if self.left_out is None:
            return self.loss.shape[1]
        return (~self.left_out).sum(-1, dtype=namespace(self.loss).int64)

    def add_counts(self, counts: Any) -> None:
        """Add to `TARGET_COUNTS`."""
        scored: Any = self.loss.shape[0] * self.loss.shape[1]
        if self.skipped is not None:
            scored = scored - self.skipped.sum()
        add_at(counts, 0, scored)
        for i, mask in enumerate(self.reasons, start=1):
            if mask is not None:
                add_at(counts, i, mask.sum())

    def each(self) -> tuple[list[int], Any]:
        """Return which rows of a `GroupTally` anything is added to, and what every target, flat, adds to them."""
        low = range(NUM_LIMBS - self.num_limbs, NUM_LIMBS)
        floats = dict(zip(low, cut(self.loss, self.num_limbs), strict=True))
        masks = {2 * NUM_LIMBS + i: mask for i, mask in enumerate(self.reasons, start=1) if mask is not None}
        everywhere = self.loss == self.loss  # As a NaN is not, but there is none left.
        masks[2 * NUM_LIMBS] = everywhere if self.skipped is None else ~self.skipped
        if self.norm is not None:
            floats |= {NUM_LIMBS + i: limb for i, limb in zip(low, cut(self.norm, self.num_limbs), strict=True)}
        else:
            masks[NUM_LIMBS + 2] = everywhere if self.left_out is None else ~self.left_out
        numbers, xp = zeros_beside(self.loss, len(floats) + len(masks), self.loss.shape[1]), namespace(self.loss)
        numbers[: len(floats)] = xp.stack([*floats.values()])[:, 0]
        numbers[len(floats) :] = xp.stack([*masks.values()])[:, 0]
        return [*floats, *masks], numbers


def _sum_targets(limbs: list[Any], sums: Any) -> None:
    """Sum limbs of targets over each sequence; the first dimension of the sums counts limbs."""
    if isinstance(sums, Tensor):  # In few operators, of which each is a kernel to start.
        sums[:] = torch.stack(limbs).sum(-1, dtype=torch.int64)
    else:
        for limb, total in zip(limbs, sums, strict=True):
            total[:] = limb[:, 0] if limb.shape[1] == 1 else limb.sum(-1, dtype=np.int64)


def _limbs_of(count: Tensor) -> Tensor:
    """Return the limbs of integers, on a new first dimension."""
    zero = torch.zeros_like(count)
    return torch.stack([zero, zero, count, zero, zero])


def _classify(losses: TargetLosses, weight: Any) -> _Classified:
    """Decide for every target whether it is scored, and what it adds."""
    loss, norm, *masks = losses
    ignored, out_of_range, improper = map(present, masks)
    scaled = False
    if weight is not None:
        unweighted = weight == 0
        ignored = any_of(ignored, present(unweighted))
        out_of_range = outside(out_of_range, ignored)
        scaled = weight.dtype != unweighted.dtype
        if scaled:
            loss = times(loss, weight)
            norm = weight if norm is None else norm * weight
    skipped = any_of(ignored, out_of_range)
    improper = outside(improper, skipped)
    skipped = any_of(skipped, improper)
    invalid, heaviest = None, 1.0
    if norm is not None:
        heaviest = max(_heaviest(norm, LIMIT), _heaviest(weight, WEIGHT_LIMIT) if scaled else 0.0)
        if heaviest == math.inf:
            # Not `norm < 0`: a NaN compares false with everything, and so ends up here too.
            valid = (norm >= 0) & (norm < LIMIT)
            if scaled:
                valid = valid & (weight >= 0) & (weight < WEIGHT_LIMIT)  # A class weight of 0 would hide its sign.
            invalid = outside(~valid, skipped)
            skipped = any_of(skipped, invalid)
    loss, left_out = cleared(loss, skipped), skipped
    positive = negative = nan = None
    low, high = extremes(loss)
    if not -LIMIT < low <= high < LIMIT:
        positive, negative, nan = loss >= LIMIT, loss <= -LIMIT, loss != loss  # As only NaN is not.
        left_out = any_of(skipped, positive, negative, nan)
        loss = cleared(loss, left_out)
        high = math.inf
    norm = None if norm is None else cleared(norm, left_out)
    # Then a sequence is not wide, and no sum of upper limbs, each below the value * 2**32, reaches 2**58.
    most = max(-low, high, heaviest)
    few = most < _SEQUENCE_LIMIT and most * loss.shape[0] * loss.shape[1] < _SEQUENCE_LIMIT
    reasons = (ignored, out_of_range, improper, invalid, positive, negative, nan)
    return _Classified(loss, norm, left_out, skipped, reasons, NUM_LOW_LIMBS if few else NUM_LIMBS)


def _heaviest(weight: Any, limit: float) -> float:
    """Return the largest of weights; infinity if they are not known to be in `[0, limit)`."""
    low, high = extremes(weight)
    return high if low >= 0 and high < limit else math.inf
