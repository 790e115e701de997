"""From the losses of a batch to its tally.

Two ways to the same integers. Where values may not be read, and where there are few, everything is done at once in as
few operators as possible, since each is a kernel to start. Where there are many and the host may read them, what is
known of them is left out: upper limbs of small numbers, and statuses where all targets are scored.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import chain, compress
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xent_metrics import _runtime
from xent_metrics.distributed import sum_over_ranks
from xent_metrics.losses.target_losses import (
    BAD_GROUP,
    BAD_WEIGHT,
    IGNORED,
    LIMIT,
    NAN,
    NEGATIVE_INFINITE,
    NUM_STATUSES,
    POSITIVE_INFINITE,
    PROBABILITY_OUT_OF_RANGE,
    SCORED,
    TARGET_OUT_OF_RANGE,
    TargetLosses,
    count_statuses,
    mark,
)
from xent_metrics.tally.limbs import (
    FRACTION_BITS,
    LIMB_BITS,
    NUM_LIMBS,
    NUM_LOW_LIMBS,
    cut,
    products,
    split_at_once,
    to_limbs,
)
from xent_metrics.tally.tally import NUM_SUM_LIMBS, SEQUENCE_BITS, TARGET_COUNTS, GroupTally, Tally

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SEQUENCE_LIMIT = 2**26  # Nats, or weight, of a sequence that is sure to fit 63 bits in units of 2**-SEQUENCE_BITS.
_BLOCK_TARGETS = 2**16  # Targets whose limbs are held at a time: a few MiB, and they stay in the cache.
_BLOCK_SEQUENCES = 2**13  # The same for sequences, which need more room each.
_FEW_TARGETS = 128  # So many are faster as Python integers than as tensors.
_FEW_SEQUENCES = 128  # Of so many, the products are.
_BLOCK_GROUPED = 2**15  # Targets that are sorted into groups at a time, at `GROUP_SIZE` numbers each.

_COUNTED_AS = {
    SCORED: ["scored"],
    NAN: ["scored", "nan"],
    NEGATIVE_INFINITE: ["scored", "negative_infinite"],
    POSITIVE_INFINITE: ["scored", "positive_infinite"],
    BAD_GROUP: ["scored"],  # In a column of its own.
    BAD_WEIGHT: ["invalid_weight"],
    PROBABILITY_OUT_OF_RANGE: ["improper"],
    TARGET_OUT_OF_RANGE: ["out_of_range"],
    IGNORED: ["ignored"],
}
_COUNTS = [[int(name in _COUNTED_AS[code]) for name in TARGET_COUNTS] for code in range(NUM_STATUSES)]
"""What a target of each status adds to each of `TARGET_COUNTS`."""

# What each limb of a sequence adds to its number of units of 2**-SEQUENCE_BITS, after the lowest one was shifted.
_TO_UNITS = [0, 0, 2**SEQUENCE_BITS, 2 ** (SEQUENCE_BITS - LIMB_BITS), 1]
_LOWEST_SHIFT = 2 * LIMB_BITS - SEQUENCE_BITS
_SHIFTS = [0, 0, 0, 0, _LOWEST_SHIFT]
_ONE = 2.0**FRACTION_BITS
_BELOW_ZERO = -math.ulp(0.0)
# Upper limbs of loss and of weight, and numbers of units of both, from which on a sequence does not fit. Limbs below
# these bounds, of fewer than 2**26 targets, make a number of units below 2**63, which is what it seems to be.
_UNIT_LIMIT = _SEQUENCE_LIMIT * 2**SEQUENCE_BITS
_TOO_WIDE = [[x] for x in [1, 1, _SEQUENCE_LIMIT] * 2 + [_UNIT_LIMIT] * 2]
_TOO_WIDE_IF_LONG = [[x] for x in [1, 1, 0] * 2 + [_UNIT_LIMIT] * 2]

# Four kinds of losses, one after the other: NaN, which `_with_nonfinite` puts before all numbers, those that count as
# -inf, those that are summed, and those that count as inf. These are the greatest of all kinds but the last.
_GREATEST_OF_KIND = {
    dtype: [-math.inf, -LIMIT, LIMIT * (1 - torch.finfo(dtype).eps / 2)] for dtype in (torch.float32, torch.float64)
}
_STATUS_OF_KIND = [NAN, NEGATIVE_INFINITE, SCORED, POSITIVE_INFINITE]


def tally_losses(losses: TargetLosses, sequence_group: ProcessGroup | None = None) -> Tally:
    """Tally per-target losses; the sums are not normalised yet, which adding to another tally does.

    Args:
        losses: What `target_losses` returns; the first dimension counts sequences, the second targets in each.
        sequence_group: Ranks that hold other targets of the same sequences; each adds what is its own, and the first
            of them adds the products of the sequences.
    """
    sequences, length = losses.loss.shape
    rows = max(1, min(_BLOCK_SEQUENCES, _BLOCK_TARGETS // max(length, 1)))
    if sequence_group is not None:
        return _tally_split_sequences(losses, rows, sequence_group)
    if 0 < sequences <= rows and length:
        return _tally_block(losses)
    total = Tally.zero(losses.loss.device)
    for start in range(0, sequences if length else 0, rows):
        total = total + _tally_block(losses.at(slice(start, start + rows)))
    return total


def tally_sequences(losses: TargetLosses, sequence: Tensor) -> Tally:
    """Tally per-target losses of sequences that lie anywhere, each in one or several places.

    Args:
        losses: What `target_losses` returns.
        sequence: int64 of the same shape; targets with one number belong to one sequence.
    """
    ids, order = sequence.flatten().sort()
    first = torch.cat([torch.ones_like(ids[:1]), ids[1:].ne(ids[:-1]).to(torch.int64)])
    index = torch.empty_like(ids).index_put_((order,), first.cumsum(0) - 1)  # Consecutive numbers, from 0.
    num_sequences = int(first.sum()) if _runtime.can_read_values(first) else ids.numel()
    columns = tally_groups(losses, index, num_sequences).state[:, :-1]
    sums, counts = columns[: 2 * NUM_LIMBS].unflatten(0, (2, NUM_LIMBS)), columns[2 * NUM_LIMBS :].sum(1)
    total = torch.cat([_total(sums), counts.new_zeros(3 * NUM_LIMBS), counts, counts.new_zeros(2)])
    tally, no_counts = Tally(total), torch.zeros_like(counts)
    for block in sums.split(_BLOCK_SEQUENCES, -1) if num_sequences else ():
        tail = _tally_sequences(block, ids.numel(), no_counts)
        tally = tally + Tally(torch.cat([counts.new_zeros(2 * NUM_LIMBS), *tail]))
    return tally


def tally_mean(mean: Tensor, count: Tensor) -> Tally:
    """Tally targets of which only the mean loss and the number are known, so that there are no sequences.

    Args:
        mean: Mean loss in nats, a scalar; not read where `count` is 0.
        count: Number of targets, an int64 scalar; if it is negative, so many targets have an invalid weight.
    """
    loss = (mean.to(_runtime.widest_float(mean.device)) * count).view(1, 1)
    losses = TargetLosses(loss, count.to(loss.dtype).view(1, 1), mark(None, IGNORED, (count == 0).view(1, 1)))
    one = tally_losses(losses).state
    sums, counts = one[: 2 * NUM_LIMBS], one[NUM_SUM_LIMBS:-2]
    return Tally(torch.cat([sums, sums.new_zeros(3 * NUM_LIMBS), counts * count.abs(), counts.new_zeros(2)]))


def tally_groups(losses: TargetLosses, group: Tensor, num_groups: int) -> GroupTally:
    """Tally per-target losses by group, in one pass whatever the number of groups; not normalised yet.

    Args:
        losses: What `target_losses` returns.
        group: Group of each target, int64 of the same shape.
        num_groups: Groups are in `[0, num_groups)`; scored targets of others are counted in a column of their own.
    """
    column = torch.where((group >= 0) & (group < num_groups), group, num_groups).flatten()
    flat = losses.map(lambda x: x.reshape(1, -1))  # A weight may have been expanded.
    total = GroupTally.zero(num_groups, column.device)
    for start in range(0, column.numel(), _BLOCK_GROUPED):
        block = (slice(None), slice(start, start + _BLOCK_GROUPED))
        rows, numbers = _cleared(flat.at(block)).numbers()
        sums = total.state if len(rows) == len(total.state) else total.state.new_zeros(len(rows), num_groups + 1)
        sums.index_add_(1, column[block[1]], numbers)
        if sums is not total.state:
            total.state[rows] += sums
    return total


def _tally_block(losses: TargetLosses) -> Tally:
    """Tally a few whole sequences."""
    length = losses.loss.shape[1]
    # Asked first: traced code would be compiled again for few targets.
    if _runtime.can_read_values(losses.loss):
        state = _few_targets(losses) if losses.loss.numel() <= _FEW_TARGETS else None
        if state is not None:
            return Tally.of(state)
    cleared = _cleared(losses) if 0 < length <= _BLOCK_TARGETS else None
    # Numbers are only known to be small if they were read.
    if cleared is not None and cleared.is_small() and len(losses.loss) <= _FEW_SEQUENCES:
        return Tally.of(_few_sequences(cleared))
    targets, counts = _tally_targets(losses) if cleared is None else cleared.targets()
    return Tally(torch.cat([_total(targets), *_tally_sequences(targets, length, counts)]))


def _few_targets(losses: TargetLosses) -> list[int] | None:
    """Return the state of a tally of a few targets; None if some of their numbers are not small.

    The law of the limbs, taken literally: Python integers. What a tensor operator costs, a dozen targets do not.
    """
    num_rows, length = losses.loss.shape
    limit = _SEQUENCE_LIMIT / losses.loss.numel()
    scored, counts = [[True] * length] * num_rows, {SCORED: losses.loss.numel()}
    if losses.status is not None:
        statuses = losses.status.tolist()
        scored, counts = [[x == SCORED for x in row] for row in statuses], Counter(chain.from_iterable(statuses))
    totals = _small_sums(losses.loss, scored, -limit, limit)
    denominator, ones = losses.denominator, [sum(row) << FRACTION_BITS for row in scored]
    weights = ones if denominator is None else _small_sums(denominator, scored, _BELOW_ZERO, limit)
    return None if totals is None or weights is None else _state_of(totals, weights, _counted(counts))


def _small_sums(numbers: Tensor, scored: list[list[bool]], least: float, most: float) -> list[int] | None:
    """Sum the scored numbers of each row in units of `2**-64`; None if one of them is not between two bounds."""
    sums = []
    for row, mask in zip(numbers.tolist(), scored, strict=True):
        total = 0
        for x in compress(row, mask):
            if not least < x < most:  # A NaN compares false with everything.
                return None
            total += round(x * _ONE)
        sums.append(total)
    return sums


def _few_sequences(cleared: _Cleared) -> list[int]:
    """Return the state of a tally of a few sequences, whose numbers are small."""
    (upper, weight_upper), (lower, weight_lower) = cleared.sequence_sums().unbind(1)
    loss, weight = _joined(upper, lower), _joined(weight_upper, weight_lower)
    return _state_of(loss, weight, cleared.counted())


def _joined(upper: Tensor, lower: Tensor) -> list[int]:
    return [(a << LIMB_BITS) + b for a, b in zip(upper.tolist(), lower.tolist(), strict=True)]


def _state_of(losses: list[int], weights: list[int], counts: list[int]) -> list[int]:
    """Return the state of a tally, from the loss and the weight of each sequence and the `TARGET_COUNTS`."""
    loss_loss = loss_weight = weight_weight = num_sequences = 0
    for loss, weight in zip(losses, weights, strict=True):
        num_sequences += weight > 0
        x, y = loss >> _LOWEST_SHIFT, weight >> _LOWEST_SHIFT
        loss_loss, loss_weight, weight_weight = loss_loss + x * x, loss_weight + x * y, weight_weight + y * y
    sums = sum(losses), sum(weights), loss_loss, loss_weight, weight_weight
    return [*(limb for number in sums for limb in to_limbs(number)), *counts, num_sequences, 0]


def _counted(numbers: Mapping[int, int]) -> list[int]:
    """Return `TARGET_COUNTS` of so many targets of each status."""
    totals = dict.fromkeys(TARGET_COUNTS, 0)
    for code, number in numbers.items():
        if number:
            for name in _COUNTED_AS[code]:
                totals[name] += number
    return [*totals.values()]


def _tally_split_sequences(losses: TargetLosses, rows: int, group: ProcessGroup) -> Tally:
    """Tally the targets that this rank holds of sequences that a group of ranks holds together: one collective."""
    sequences, length = losses.loss.shape
    total = Tally.zero(losses.loss.device)
    blocks = [slice(start, start + rows) for start in range(0, sequences, rows)]
    parts = []
    for block in blocks:
        targets, counts = _tally_targets(losses.at(block))
        parts.append(_all_limbs(targets))
        zeros = targets.new_zeros(3 * NUM_LIMBS), targets.new_zeros(2)
        total = total + Tally(torch.cat([_total(targets), zeros[0], counts, zeros[1]]))
    if not parts:
        return total
    whole = sum_over_ranks(torch.cat(parts, -1), group)
    if group.rank() != 0:
        return total
    for block in blocks:
        targets = whole[..., block]
        tail = _tally_sequences(targets, length * group.size(), targets.new_zeros(len(TARGET_COUNTS)))
        total = total + Tally(torch.cat([targets.new_zeros(2 * NUM_LIMBS), *tail]))
    return total


def _tally_targets(losses: TargetLosses) -> tuple[Tensor, Tensor]:
    """Return limbs of loss and weight of each sequence, (2, limbs, sequences), and `TARGET_COUNTS` of all."""
    length = losses.loss.shape[1]
    if 0 < length <= _BLOCK_TARGETS:
        return _cleared(losses).targets()
    sums = losses.loss.new_zeros(2, NUM_LIMBS, len(losses.loss), dtype=torch.int64)
    counts = sums.new_zeros(len(TARGET_COUNTS))
    for start in range(0, length, _BLOCK_TARGETS):
        cleared = _cleared(losses.at((slice(None), slice(start, start + _BLOCK_TARGETS))))
        sums, counts = sums + _all_limbs(cleared.sequence_sums()), counts + cleared.counts()
    return sums, counts


def _all_limbs(sums: Tensor) -> Tensor:
    """Return sums with all limbs, the upper ones 0 where they are not there."""
    return F.pad(sums, (0, 0, NUM_LIMBS - sums.shape[1], 0))


def _total(sums: Tensor) -> Tensor:
    """Add up sequences; return all limbs of loss and weight, one after the other."""
    total = sums.sum(-1)
    return (F.pad(total, (NUM_LIMBS - NUM_LOW_LIMBS, 0)) if sums.shape[1] == NUM_LOW_LIMBS else total).view(-1)


def _tally_sequences(sums: Tensor, length: int, counts: Tensor) -> list[Tensor]:
    """Return the products of sequences, the counts of targets that were given, and those of sequences.

    The sums of loss and weight are cut to units of `2**-SEQUENCE_BITS`, which makes them integers below 2**62; where
    they do not fit, the sequence is wide, and adds no products.

    Args:
        sums: Limbs of loss and weight, all or the low ones, of shape (2, limbs, sequences), not normalised.
        length: The number of targets in a sequence.
        counts: Those of targets.
    """
    if sums.shape[1] == NUM_LOW_LIMBS:
        units = torch.add(sums[:, 1] >> _LOWEST_SHIFT, sums[:, 0], alpha=2 ** (SEQUENCE_BITS - LIMB_BITS))
        weighty = (sums[1, 0] | sums[1, 1]).count_nonzero().view(1)
        return [products(torch.stack(units.unbind(), 1)), counts, weighty, torch.zeros_like(weighty)]
    weighty = sums[1].any(0).sum(0, keepdim=True)
    limbs = sums.permute(2, 0, 1) >> _runtime.constant(_SHIFTS, sums, torch.int64)
    units = (limbs * _runtime.constant(_TO_UNITS, sums, torch.int64)).sum(-1)
    # A sequence of 2**26 targets or more might not fit even if every limb of its sum, and so its units, look small.
    limits = _TOO_WIDE if length < _SEQUENCE_LIMIT else _TOO_WIDE_IF_LONG
    numbers = torch.cat([sums[0, :3], sums[1, :3], units.t()])
    wide = (numbers.abs() >= _runtime.constant(limits, sums, torch.int64)).any(0)
    units.masked_fill_(wide.unsqueeze(-1), 0)
    return [products(units.contiguous()), counts, weighty, wide.sum(0, keepdim=True)]


class _Cleared(NamedTuple):
    """What targets add to a tally.

    Attributes:
        loss: The loss of each target; where numbers are small, 0 where it is not summed.
        denominator: The same of its weight; None for 1 where it is summed.
        status: The status of each, those of losses that are not finite included; None if all are scored.
        most: A bound of the magnitude of every number; infinite if none is known.
    """

    loss: Tensor
    denominator: Tensor | None
    status: Tensor | None
    most: float

    def is_small(self) -> bool:
        """Return whether all numbers, and their sums over sequences, are known to fit the two lowest limbs."""
        # Then a sequence is not wide, and no sum of upper limbs, each below the value * 2**32, reaches 2**58.
        return self.most < _SEQUENCE_LIMIT and self.most * self.loss.numel() < _SEQUENCE_LIMIT

    def targets(self) -> tuple[Tensor, Tensor]:
        """Return limbs of loss and weight of each sequence, and `TARGET_COUNTS` of all."""
        return self.sequence_sums(), self.counts()

    def counted(self) -> list[int]:
        """Return `TARGET_COUNTS`, which the host reads."""
        return _counted({SCORED: self.loss.numel()} if self.status is None else count_statuses(self.status))

    def counts(self) -> Tensor:
        """Return `TARGET_COUNTS`, on the device."""
        if self.status is None:
            return F.pad(self.loss.new_full((1,), self.loss.numel(), dtype=torch.int64), (0, len(TARGET_COUNTS) - 1))
        if _runtime.can_read_values(self.status):
            return torch.tensor(self.counted(), device=self.status.device)
        return _runtime.constant(_COUNTS, self.loss, torch.int64)[self.status.flatten().to(torch.int64)].sum(0)

    def sequence_sums(self) -> Tensor:
        """Return limbs of each sequence's loss and weight, of shape (2, limbs, sequences); the low ones if small."""
        if not self.is_small():
            return self._all_limbs().sum(-1, dtype=torch.int64)
        sums = self.loss.new_empty(2, NUM_LOW_LIMBS, self.loss.shape[0], dtype=torch.int64)
        _sum_low_limbs(self.loss, sums[0], self.most)
        if self.denominator is not None:
            _sum_low_limbs(self.denominator, sums[1], self.most)
        else:
            sums[1, 0] = (self.loss.shape[1] if self.status is None else self._is_scored().sum(-1)) << LIMB_BITS
            sums[1, 1] = 0
        return sums

    def numbers(self) -> tuple[list[int], Tensor]:
        """Return which rows of a `GroupTally` anything is added to, and what every target of one sequence adds."""
        if not self.is_small():
            limbs = self._all_limbs().view(2 * NUM_LIMBS, -1).to(torch.int64)
            table = _runtime.constant(_COUNTS, self.loss, torch.int64)
            counts = table[self._statuses().flatten().to(torch.int64)].t()
            return [*range(2 * NUM_LIMBS + len(TARGET_COUNTS))], torch.cat([limbs, counts])
        low = [*range(NUM_LIMBS - NUM_LOW_LIMBS, NUM_LIMBS)]
        rows, numbers = low, [limb[0] for limb in cut(self.loss, NUM_LOW_LIMBS)]
        if self.denominator is None:
            rows, numbers = [*rows, NUM_LIMBS + 2], [*numbers, self._is_scored()[0]]
        else:
            rows = [*rows, *(NUM_LIMBS + i for i in low)]
            numbers += [limb[0] for limb in cut(self.denominator, NUM_LOW_LIMBS)]
        statuses = self._statuses()[0]
        present = range(1) if self.status is None else count_statuses(statuses)
        for i, name in enumerate(TARGET_COUNTS):
            codes = [code for code in present if name in _COUNTED_AS[code]]
            if codes:
                rows = [*rows, 2 * NUM_LIMBS + i]
                numbers.append(torch.isin(statuses, statuses.new_tensor(codes)))
        return rows, torch.stack([x.to(torch.int64) for x in numbers])

    def _all_limbs(self) -> Tensor:
        """Return all limbs of each target's loss and weight, still floats, of shape (2, limbs, sequences, targets)."""
        loss, weight = self.loss.to(_runtime.widest_float(self.loss.device)), self.denominator
        if self.status is not None:
            scored, zero = self.status == SCORED, _runtime.constant(0, loss, loss.dtype)
            loss, weight = loss.where(scored, zero), scored if weight is None else weight.where(scored, zero)
        pair = torch.stack([loss, torch.ones_like(loss) if weight is None else weight])
        return split_at_once(pair) if pair.dtype == torch.float64 else torch.stack(cut(pair), 1)

    def _is_scored(self) -> Tensor:
        return self._statuses() == SCORED

    def _statuses(self) -> Tensor:
        return torch.zeros_like(self.loss, dtype=torch.int8) if self.status is None else self.status


def _sum_low_limbs(x: Tensor, sums: Tensor, most: float) -> None:
    """Sum the two lowest limbs of each target, of a magnitude of `most`, over its sequence."""
    # Sums of integers below 2**53 are exact in float64, in whatever order, and faster than those of int64.
    exact = max(most, 1.0) * x.numel() < 2.0 ** (53 - LIMB_BITS)
    for limb, total in zip(cut(x, NUM_LOW_LIMBS), sums, strict=True):
        total[:] = limb[:, 0] if limb.shape[1] == 1 else limb.sum(-1, dtype=torch.float64 if exact else torch.int64)


def _cleared(losses: TargetLosses) -> _Cleared:
    """Decide for every target what it adds."""
    loss, denominator, status, _ = losses
    extremes = _runtime.least_and_greatest(loss)
    heaviest: float = 1.0
    if denominator is not None:
        weights = _runtime.least_and_greatest(denominator)
        heaviest = weights[1] if weights and weights[0] >= 0 else math.inf
        if not heaviest < LIMIT:
            # Not `denominator < 0`: a NaN compares false with everything, and so ends up here too.
            status = mark(status, BAD_WEIGHT, ~((denominator >= 0) & (denominator < LIMIT)))
    if extremes is None or not -LIMIT < extremes[0] <= extremes[1] < LIMIT:
        status = _with_nonfinite(status, loss)
        extremes = None
    most = math.inf if extremes is None else max(-extremes[0], extremes[1], heaviest)
    cleared = _Cleared(loss, denominator, status, most)
    if status is None or not cleared.is_small():
        return cleared
    scored = (status == SCORED).to(loss.dtype)
    # They are finite, and a product is faster than `masked_fill`.
    return _Cleared(loss * scored, None if denominator is None else denominator * scored, status, most)


def _with_nonfinite(status: Tensor | None, loss: Tensor) -> Tensor:
    """Give losses that cannot be summed their status, if they have no stronger one."""
    # `bucketize` puts a NaN first or last, as the device likes; so it goes first, before all that was minus infinity.
    ordered = loss.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=torch.finfo(loss.dtype).min)
    bounds = _runtime.constant(_GREATEST_OF_KIND[loss.dtype], loss, loss.dtype)
    kind = torch.bucketize(ordered, bounds, out_int32=True)
    marks = _runtime.constant(_STATUS_OF_KIND, loss, torch.int8)[kind]
    return marks if status is None else torch.maximum(status, marks)
