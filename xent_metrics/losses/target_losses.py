"""The waist of the library: one loss, one denominator and one status for each target.

All that comes before makes losses; all that comes after adds them up. A status is one small integer: the target was
scored, or the first reason why it is not. Of two reasons the larger code wins, so that they are combined by `maximum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import WEIGHT_LIMIT

LIMIT = 2.0**94
"""The first magnitude of a loss that counts as infinite: what is below is summed exactly."""

# The order is that of precedence: nobody looks at the loss of a target that is ignored. Mistakes, and only they,
# have the bit of 4.
SCORED = 0
POSITIVE_INFINITE = 1
NAN = 2
NEGATIVE_INFINITE = 3
BAD_GROUP = 4
BAD_WEIGHT = 5
PROBABILITY_OUT_OF_RANGE = 6
TARGET_OUT_OF_RANGE = 7
IGNORED = 8
NUM_STATUSES = 9


class TargetLosses(NamedTuple):
    """The losses of a batch, each of shape (sequences, targets in a sequence).

    Attributes:
        loss: Loss of each target in nats, times its weights; anything where the target is not scored.
        denominator: What the target adds to the denominator: its weight or its bytes; None for 1.
        status: int8, `SCORED` or the reason why not; None if all targets are scored. Losses that are not finite are
            still `SCORED` here: a tally finds them.
        others: What else is averaged over the same targets: for `LossOptions.accuracy` 1 where the most likely class is
            the target's and 0 elsewhere, for `LossOptions.entropy` the entropy of the model, in this order.
    """

    loss: Tensor
    denominator: Tensor | None = None
    status: Tensor | None = None
    others: tuple[Tensor, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> TargetLosses:
        """Change every tensor alike."""
        denominator, status = (None if x is None else change(x) for x in (self.denominator, self.status))
        return TargetLosses(change(self.loss), denominator, status, tuple(map(change, self.others)))

    def parts(self) -> list[TargetLosses]:
        """Return the losses, and then each of `others` as if it were the loss."""
        return [TargetLosses(x, self.denominator, self.status) for x in (self.loss, *self.others)]

    @classmethod
    def cat(cls, batches: Sequence[TargetLosses]) -> TargetLosses:
        """Concatenate batches whose sequences are equally long; all of them have a denominator, or none."""
        losses, denominators, statuses, others = zip(*batches, strict=True)
        status = None
        if any(x is not None for x in statuses):
            status = torch.cat(
                [_all_scored(loss) if x is None else x for x, loss in zip(statuses, losses, strict=True)]
            )
        denominator = None if denominators[0] is None else torch.cat(denominators)
        return cls(torch.cat(losses), denominator, status, tuple(map(torch.cat, zip(*others, strict=True))))

    def at(self, index: slice | tuple[slice, slice]) -> TargetLosses:
        """Return a part of the batch."""
        return self.map(lambda x: x[index])

    def as_sequences(self, shape: torch.Size) -> TargetLosses:
        """View flat targets of this shape as rows: a sequence is a row, or one target where there are no rows."""
        rows = (shape[0], shape[1:].numel()) if len(shape) > 1 else (-1, 1)
        return self.map(lambda x: x.view(rows))

    def marked(self, code: int, where: Tensor) -> TargetLosses:
        """Give targets a status where a mask is true and they have no stronger one."""
        # The compiler of PyTorch 2.8 cannot trace `_replace`.
        return TargetLosses(self.loss, self.denominator, mark(self.status, code, where), self.others)

    def weighted(self, weight: Tensor | None) -> TargetLosses:
        """Weigh every target, by numbers or by a mask of what to score; what has weight 0 is ignored."""
        if weight is None:
            return self
        if weight.dtype == torch.bool:
            masked = ~weight
            return self if _is_nowhere(masked) else self.marked(IGNORED, masked)
        denominator = weight if self.denominator is None else self.denominator * weight
        losses = TargetLosses(self.loss * weight, denominator, self.status, tuple(x * weight for x in self.others))
        extremes = _runtime.least_and_greatest(weight)
        if extremes and extremes[0] > 0 and extremes[1] < WEIGHT_LIMIT:
            return losses
        if not extremes or not (extremes[0] >= 0 and extremes[1] < WEIGHT_LIMIT):
            # Not `weight < 0`: a NaN compares false with everything, and so ends up here too.
            losses = losses.marked(BAD_WEIGHT, ~((weight >= 0) & (weight < WEIGHT_LIMIT)))
        return losses.marked(IGNORED, weight == 0)

    def within(self, ids: Tensor, limit: int) -> TargetLosses:
        """Mark targets whose `ids` are not in `[0, limit)`."""
        extremes = _runtime.least_and_greatest(ids)
        if extremes and extremes[0] >= 0 and extremes[1] < limit:
            return self
        return self.marked(TARGET_OUT_OF_RANGE, (ids < 0) | (ids >= limit))

    def per_byte(self, ids: Tensor, token_bytes: Tensor) -> TargetLosses:
        """Let each target add its bytes to the denominator; one without bytes is ignored."""
        within = self.within(ids, len(token_bytes))
        if not len(token_bytes):
            token_bytes = token_bytes.new_zeros(1)  # Every target is out of range, and looks up index 0.
        num_bytes = token_bytes[ids if within.status is None else ids.masked_fill(within._is_no_class(), 0)]
        silent = num_bytes == 0
        denominator = num_bytes.to(_runtime.widest_float(ids.device))
        losses = TargetLosses(within.loss, denominator, within.status, within.others)
        if _is_nowhere(silent):
            return losses
        return losses.marked(IGNORED, silent if within.status is None else silent & ~within._is_no_class())

    def _is_no_class(self) -> Tensor:
        assert self.status is not None
        return self.status >= TARGET_OUT_OF_RANGE  # Or ignored.


def count_statuses(status: Tensor) -> dict[int, int]:
    """Return how many targets have each status that any has; the host reads them."""
    if has_only(status, IGNORED):
        num_ignored = int(status.count_nonzero())
        numbers = {SCORED: status.numel() - num_ignored, IGNORED: num_ignored}
    else:
        numbers = {code: int((status == code).count_nonzero()) for code in range(NUM_STATUSES)}
    return {code: number for code, number in numbers.items() if number}


def has_only(status: Tensor, bits: int) -> bool:
    """Return whether no status has any other bits than these: `IGNORED`, or those of losses that are not finite."""
    return not status.numel() or not int((status & ~bits).max())


def mark(status: Tensor | None, code: int, where: Tensor) -> Tensor:
    """Return statuses with a code where a mask is true, unless there is a larger one already."""
    marks = where * _runtime.constant(code, where, torch.int8)
    return marks if status is None else torch.maximum(status, marks)


def difference(first: TargetLosses, second: TargetLosses) -> TargetLosses:
    """Subtract the first losses from the second ones, target by target; both are of the same targets and weights."""
    dtype = _runtime.widest_float(first.loss.device)  # Where that is float64, two float32 losses differ exactly.

    def wide(loss: Tensor) -> Tensor:
        """Widen; what counts as infinite is infinite also if the other one is as large."""
        return loss.to(dtype).masked_fill(loss >= LIMIT, math.inf).masked_fill(loss <= -LIMIT, -math.inf)

    status = second.status if first.status is None else first.status
    if first.status is not None and second.status is not None:
        status = torch.maximum(first.status, second.status)
    return TargetLosses(wide(second.loss) - wide(first.loss), second.denominator, status, second.others)


def _is_nowhere(mask: Tensor) -> bool:
    """Return whether a mask is known to be true nowhere."""
    return _runtime.can_read_values(mask) and not mask.any()


def _all_scored(loss: Tensor) -> Tensor:
    return torch.zeros_like(loss, dtype=torch.int8)
