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

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import describe
from xent_metrics.distributed import is_distributed, sum_alike_over_ranks
from xent_metrics.tally.limbs import (
    FRACTION_BITS,
    LIMB_BITS,
    NUM_LIMBS,
    normalise_in_place,
    to_float,
    to_int,
    to_limbs,
    units_of,
)

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


_GREATEST = 2 ** (LIMB_BITS * (NUM_LIMBS - 1) + 63) - 1  # The limbs of a sum hold no more.

UNITS = units_of([2.0**-FRACTION_BITS] * 2 + [2.0 ** (-2 * SEQUENCE_BITS)] * 3)
GROUP_UNITS = UNITS[:2]


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
    def of(cls, numbers: Sequence[int]) -> Tally:
        """Return the tally with these numbers for its state, on the host; `torch.tensor` takes five times as long."""
        return cls(torch.frombuffer(array("q", numbers), dtype=torch.int64))

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
        if self.state.dim() == 1 and _runtime.can_read_values(self.state):  # Integers are faster than operators here.
            numbers = [*map(add, self.state.tolist(), other.state.tolist())]
            sums = (to_int(numbers[i : i + NUM_LIMBS]) for i in range(0, NUM_SUM_LIMBS, NUM_LIMBS))
            limbs = (to_limbs(x if -_GREATEST < x < _GREATEST else _GREATEST if x > 0 else -_GREATEST) for x in sums)
            return Tally.of([*chain.from_iterable(limbs), *numbers[NUM_SUM_LIMBS:]])
        state = self.state + other.state
        normalise_in_place(state[..., :NUM_SUM_LIMBS].unflatten(-1, (len(SUMS), NUM_LIMBS)))
        return Tally(state)

    def with_weight(self, weight: Tensor) -> Tally:
        """Return the tally with another denominator, an integer that its targets share; a negative one is invalid."""
        state = self.state.clone()
        # Not `= 0`, which makes a tensor of Python's 0 and copies it to the device.
        state[NUM_LIMBS : 2 * NUM_LIMBS].zero_()[2].copy_(weight.clamp(min=0))
        state[NUM_SUM_LIMBS + COUNTS.index("invalid_weight")] += weight < 0
        return Tally(state)

    def cpu(self) -> Tally:
        """Copy the tally to the host."""
        return Tally(self.state.cpu())

    def float_sums(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read all `SUMS` in floating point, in nats, weights and their products, without leaving the device."""
        values = to_float(self.state[:NUM_SUM_LIMBS].view(len(SUMS), NUM_LIMBS), dtype, UNITS)
        return dict(zip(SUMS, values.unbind(), strict=True))

    def target_counts(self) -> Tensor:
        """Return `TARGET_COUNTS`, without leaving the device."""
        return self.state[NUM_SUM_LIMBS:-2]

    def sequence_counts(self) -> tuple[Tensor, Tensor]:
        """Return how many sequences of positive weight there are, and how many wide ones, on the device."""
        return self.state[-2], self.state[-1]

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
        normalise_in_place(state[: 2 * NUM_LIMBS].unflatten(0, (2, NUM_LIMBS)).movedim(1, -1))
        return GroupTally(state)

    def unbind(self) -> list[GroupTally]:
        """Return the only tally there is, as `Tally.unbind` would."""
        return [self]

    def cpu(self) -> GroupTally:
        """Copy the tally to the host."""
        return GroupTally(self.state.cpu())

    def float_sums(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read loss and weight of each group in floating point, without leaving the device."""
        limbs = self.state[: 2 * NUM_LIMBS, :-1].unflatten(0, (2, NUM_LIMBS)).movedim(1, -1)
        loss, weight = to_float(limbs, dtype, GROUP_UNITS)
        return {"loss": loss, "weight": weight}

    def target_counts(self) -> Tensor:
        """Return `TARGET_COUNTS` for each group, on the device; mistakes are those of all groups, in each of them."""
        counts = self.state[2 * NUM_LIMBS :]
        own, shared = counts[:, :-1], counts.sum(1, keepdim=True).expand(-1, counts.shape[1] - 1)
        # A scored target without a group is a mistake too.
        return torch.cat([own[:2], shared[2:3] + self.num_groupless(), shared[3:5], own[5:]])

    def num_groupless(self) -> Tensor:
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
        return GroupTotals(loss, weight, scored, nonfinite, int(self.num_groupless()), self.overall().totals())


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
    if other.state.device != tally.state.device:
        raise ValueError(
            f"`+` must add tallies on one device, got {tally.state.device} and {other.state.device}; move the metrics "
            "that they come from, with .to()."
        )


class _Summable(Protocol):
    """What is one tensor of integers, and is added by adding it."""

    @property
    def state(self) -> Tensor: ...


AnyTally = TypeVar("AnyTally", bound=_Summable)


def sum_tallies_over_ranks(
    tallies: Sequence[AnyTally], about: str, group: ProcessGroup | None = None
) -> list[AnyTally]:
    """Add up each of several tallies over the ranks of a group, or of all; see `sum_alike_over_ranks`."""
    if not tallies or not is_distributed():
        return list(tallies)
    packed = sum_alike_over_ranks(torch.cat([tally.state.flatten() for tally in tallies]), about, group)
    parts = packed.split([tally.state.numel() for tally in tallies])
    make: Any = type
    return [make(tally)(part.view_as(tally.state)) for tally, part in zip(tallies, parts, strict=True)]
