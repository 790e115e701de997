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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from xent_metrics.checks import WEIGHT_LIMIT, describe
from xent_metrics.distributed import is_distributed, sum_over_ranks
from xent_metrics.exact import (
    FRACTION_BITS,
    LIMB_BITS,
    LIMB_MASK,
    LIMIT,
    NUM_LIMBS,
    carry,
    split,
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
        sums = carry(state[..., :NUM_SUM_LIMBS].unflatten(-1, (len(SUMS), NUM_LIMBS)))
        return Tally(torch.cat([sums.flatten(-2), state[..., NUM_SUM_LIMBS:]], -1))

    def with_weight(self, weight: Tensor) -> Tally:
        """Return the tally with another denominator, an integer that its targets share; a negative one is invalid."""
        state = self.state.clone()
        state[NUM_LIMBS : 2 * NUM_LIMBS] = _ones_limb(weight.clamp(min=0))
        state[NUM_SUM_LIMBS + COUNTS.index("invalid_weight")] += weight < 0
        return Tally(state)

    def cpu(self) -> Tally:
        """Copy the tally to the host."""
        return Tally(self.state.cpu())

    def sums_on_device(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read all `SUMS` in floating point, in nats, weights and their products, without leaving the device."""
        values = to_float(self.state[:NUM_SUM_LIMBS].view(len(SUMS), NUM_LIMBS), dtype)
        products = values[2:] * 2.0 ** (FRACTION_BITS - 2 * SEQUENCE_BITS)
        return dict(zip(SUMS, (*values[:2].unbind(), *products.unbind()), strict=True))

    def count_on_device(self, name: str) -> Tensor:
        """Return one of `COUNTS`, without leaving the device."""
        return self.state[NUM_SUM_LIMBS + COUNTS.index(name)]

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
        sums = carry(state[: 2 * NUM_LIMBS].unflatten(0, (2, NUM_LIMBS)).movedim(1, -1))
        return GroupTally(torch.cat([sums.movedim(-1, 1).flatten(0, 1), state[2 * NUM_LIMBS :]]))

    def unbind(self) -> list[GroupTally]:
        """Return the only tally there is, as `Tally.unbind` would."""
        return [self]

    def cpu(self) -> GroupTally:
        """Copy the tally to the host."""
        return GroupTally(self.state.cpu())

    def sums_on_device(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read loss and weight of each group in floating point, without leaving the device."""
        limbs = self.state[: 2 * NUM_LIMBS, :-1].unflatten(0, (2, NUM_LIMBS)).movedim(1, -1)
        loss, weight = to_float(limbs, dtype)
        return {"loss": loss, "weight": weight}

    def count_on_device(self, name: str) -> Tensor:
        """Return one of `TARGET_COUNTS` for each group, or for all together if it is a mistake, on the device."""
        counts = self.state[2 * NUM_LIMBS + TARGET_COUNTS.index(name)]
        return counts.sum() if name in ("out_of_range", "improper", "invalid_weight") else counts[:-1]

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
    sequences, length = losses.loss.shape
    rows = max(1, min(_BLOCK_SEQUENCES, _BLOCK_TARGETS // max(length, 1)))
    if sequence_group is not None:
        return _tally_split_sequences(losses, weight, rows, sequence_group)
    if 0 < sequences <= rows and length:
        return Tally(_tally_sequences(losses, weight))
    total = Tally.zero(losses.loss.device)
    for start in range(0, sequences if length else 0, rows):
        block = slice(start, start + rows)
        total = total + Tally(_tally_sequences(losses.at(block), None if weight is None else weight[block]))
    return total


def tally_mean(mean: Tensor, count: Tensor) -> Tally:
    """Tally targets of which only the mean loss and the number are known, so that there are no sequences.

    Args:
        mean: Mean loss in nats, a scalar; not looked at where `count` is 0.
        count: Number of targets, an int64 scalar.
    """
    loss = (mean.to(widest_float(mean.device)) * count).view(1, 1)
    nothing = torch.zeros(1, 1, dtype=torch.bool, device=mean.device)
    one = tally_losses(TargetLosses(loss, count.to(loss.dtype).view(1, 1), (count == 0).view(1, 1), nothing)).state
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
    flat = losses.map(lambda x: x.view(1, -1))
    weight = None if weight is None else weight.reshape(1, -1)  # It may have been expanded.
    total = GroupTally.zero(num_groups, column.device)
    for start in range(0, column.numel(), _BLOCK_GROUPED):
        block = (slice(None), slice(start, start + _BLOCK_GROUPED))
        part = _classify(flat.at(block), None if weight is None else weight[block])
        rows = torch.cat([split(part.loss).squeeze(1), part.weight_limbs().squeeze(1), part.masks.squeeze(1)])
        total.state.index_add_(1, column[block[1]], rows)
    return total


def _tally_sequences(losses: TargetLosses, weight: Tensor | None) -> Tensor:
    """Return the state of a few whole sequences, not yet carried."""
    sums, counts = _sum_sequences(losses, weight)
    products, sequence_counts = _multiply_sequences(sums, losses.loss.shape[1])
    return torch.cat([sums.sum(-1).T.flatten(), products, counts, sequence_counts])


def _tally_split_sequences(losses: TargetLosses, weight: Tensor | None, rows: int, group: ProcessGroup) -> Tally:
    """Tally the targets that this rank holds of sequences that a group of ranks holds together: one collective."""
    sequences, length = losses.loss.shape
    total = Tally.zero(losses.loss.device)
    blocks = [slice(start, start + rows) for start in range(0, sequences, rows)]
    parts = []
    for block in blocks:
        sums, counts = _sum_sequences(losses.at(block), None if weight is None else weight[block])
        total = total + Tally(
            torch.cat([sums.sum(-1).T.flatten(), sums.new_zeros(3 * NUM_LIMBS), counts, counts.new_zeros(2)])
        )
        parts.append(sums)
    if not parts:
        return total
    whole = sum_over_ranks(torch.cat(parts, -1), group)
    if group.rank() != 0:
        return total
    for block in blocks:
        products, counts = _multiply_sequences(whole[..., block], length * group.size())
        nothing = products.new_zeros(2 * NUM_LIMBS), products.new_zeros(len(TARGET_COUNTS))
        total = total + Tally(torch.cat([nothing[0], products, nothing[1], counts]))
    return total


def _sum_sequences(losses: TargetLosses, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return limbs of loss and weight of each sequence, of shape (limbs, 2, sequences), and `TARGET_COUNTS`."""
    sequences, length = losses.loss.shape
    sums = torch.zeros(NUM_LIMBS, 2, sequences, dtype=torch.int64, device=losses.loss.device)
    counts = torch.zeros(len(TARGET_COUNTS), dtype=torch.int64, device=losses.loss.device)
    for start in range(0, length, _BLOCK_TARGETS):
        block = (slice(None), slice(start, start + _BLOCK_TARGETS))
        part = _classify(losses.at(block), None if weight is None else weight[block])
        sums = sums + torch.stack([split(part.loss).sum(-1), part.weight_sum()], 1)
        counts = counts + part.masks.sum((-2, -1))
    return sums, counts


class _Classified(NamedTuple):
    """What each target adds to a tally.

    Attributes:
        loss: Its weighted loss, 0 where it adds none.
        norm: Its weight, 0 where it adds none; None for 1 except where it is left out.
        left_out: Where it adds to no sum.
        masks: `TARGET_COUNTS`, on a new first dimension.
    """

    loss: Tensor
    norm: Tensor | None
    left_out: Tensor
    masks: Tensor

    def weight_limbs(self) -> Tensor:
        """Return the limbs of every weight, on a new first dimension."""
        return _ones_limb((~self.left_out).to(torch.int64)) if self.norm is None else split(self.norm)

    def weight_sum(self) -> Tensor:
        """Return the limbs of each sequence's weight: a plain count where every weight is 1."""
        return _ones_limb((~self.left_out).sum(-1)) if self.norm is None else split(self.norm).sum(-1)


def _ones_limb(count: Tensor) -> Tensor:
    """Return the limbs of integers."""
    zero = torch.zeros_like(count)
    return torch.stack([zero, zero, count, zero, zero])


def _classify(losses: TargetLosses, weight: Tensor | None) -> _Classified:
    """Decide for every target whether it is scored, and what it adds."""
    loss, norm, ignored, out_of_range, improper = losses
    if weight is not None:
        ignored = ignored | (weight == 0)
        out_of_range = out_of_range & ~ignored
        if weight.dtype != torch.bool:
            loss = loss * weight
            norm = weight if norm is None else norm * weight
    skipped = ignored | out_of_range
    nothing = torch.zeros_like(skipped)
    improper = nothing if improper is None else improper & ~skipped
    skipped = skipped | improper
    invalid = nothing
    if norm is not None:
        # Not `norm < 0`: a NaN compares false with everything, and so ends up here too.
        valid = (norm >= 0) & (norm < LIMIT)
        if weight is not None and weight.dtype != torch.bool:
            valid = valid & (weight >= 0) & (weight < WEIGHT_LIMIT)  # A class weight of 0 would hide its sign.
        invalid = ~(skipped | valid)
        skipped = skipped | invalid
    loss = loss.masked_fill(skipped, 0.0)
    positive, negative, nan = loss >= LIMIT, loss <= -LIMIT, loss.isnan()
    left_out = skipped | positive | negative | nan
    masks = torch.stack([~skipped, ignored, out_of_range, improper, invalid, positive, negative, nan])
    norm = None if norm is None else norm.masked_fill(left_out, 0.0)
    return _Classified(loss.masked_fill(left_out, 0.0), norm, left_out, masks)


def _multiply_sequences(sums: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Sum `S * S`, `S * W` and `W * W` over sequences, in exact integers.

    S and W are cut to units of `2**-36` and then into two balanced digits of 32 bits, whose products fit an int64.

    Args:
        sums: Limbs of loss and weight, of shape (limbs, 2, sequences), not carried.
        length: The number of targets in a sequence.

    Returns:
        Limbs of the three sums, and the last two of `COUNTS`.
    """
    # A sequence of 2**26 targets or more might not fit even if every limb of its sum looks small.
    wide = (sums[:2] != 0).any(0) | (sums[2].abs() >= (_SEQUENCE_LIMIT if length < _SEQUENCE_LIMIT else 0))
    wide = wide.any(0)
    shift = LIMB_BITS - SEQUENCE_BITS + LIMB_BITS
    fixed = (sums[2] << SEQUENCE_BITS) + (sums[3] << (SEQUENCE_BITS - LIMB_BITS)) + (sums[4] >> shift)
    fixed = fixed.masked_fill(wide, 0)
    half = 2 ** (LIMB_BITS - 1)
    low = ((fixed + half) & LIMB_MASK) - half
    digits = torch.stack([(fixed - low) >> LIMB_BITS, low])
    products = digits[:, :, None, None] * digits  # (digit, S or W, digit, S or W, sequences)
    columns = []
    for part in ((products >> LIMB_BITS).sum(-1), (products & LIMB_MASK).sum(-1)):
        columns.append((part[0, :, 0], part[0, :, 1] + part[1, :, 0], part[1, :, 1]))
    upper, lower = columns
    limbs = [torch.zeros_like(upper[0]), upper[0], lower[0] + upper[1], lower[1] + upper[2], lower[2]]
    square = torch.stack(limbs, -1)  # (S or W, S or W, limbs)
    weighty = (sums[:, 1] != 0).any(0)
    counts = torch.stack([weighty.sum(), (wide & weighty).sum()])
    return torch.cat([square[0].flatten(), square[1, 1]]), counts
