"""Tallies of a batch that was scored, and their readings: what several quantities share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.distributed import is_distributed
from xent_metrics.losses.options import LossOptions
from xent_metrics.losses.score import ScoredBatch, as_groups
from xent_metrics.losses.target_losses import TargetLosses
from xent_metrics.readings import DeviceReading, NanPolicy, read_exactly
from xent_metrics.tally import GroupTally, Tally, tally_groups, tally_losses, tally_sequences

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tally_scored(
    batch: ScoredBatch, sequence_group: ProcessGroup | None = None, sequence: Tensor | None = None
) -> Tally:
    """Tally a scored batch; with losses per byte, or others, several tallies side by side.

    Args:
        batch: The batch.
        sequence_group: Ranks that hold other targets of the same sequences.
        sequence: The sequence of each target, in the shape of its losses; None if each row is one.
    """
    with _runtime.no_graph():
        losses, *more = _side_by_side(batch)
        per_token = tally_losses(losses, sequence_group) if sequence is None else tally_sequences(losses, sequence)
        return Tally.stack(per_token, *map(tally_losses, more)) if more else per_token


def tally_scored_by_group(
    batch: ScoredBatch,
    group: Tensor,
    target: Tensor,
    options: LossOptions,
    num_groups: int,
    fix: str = "raise `num_groups`, or mask their targets with `weight`",
) -> list[GroupTally]:
    """Tally a scored batch by group, per token, then per byte if it has that, then what else it has.

    Args:
        batch: The batch.
        group: Integers in `[0, num_groups)`, broadcastable to `target` (without classes).
        target: The targets, as the caller passed them.
        options: How the losses were made.
        num_groups: How many groups there are.
        fix: What an error says to do about other groups.
    """
    with torch.no_grad():
        groups = as_groups(group, target, options, batch.per_token, num_groups, fix)
        return [tally_groups(losses, groups, num_groups) for losses in _side_by_side(batch)]


def _side_by_side(batch: ScoredBatch) -> list[TargetLosses]:
    """Return the losses per token, then per byte if there are such, then what else is averaged over the targets."""
    losses, *others = batch.per_token.parts()
    return [losses, *([] if batch.per_byte is None else [batch.per_byte]), *others]


def read_batch(tally: Tally | GroupTally, nan_policy: NanPolicy, confidence: float = 0.95) -> DeviceReading:
    """Read the tally of a batch that no metric keeps, without waiting for an accelerator.

    Raises:
        ValueError: On the CPU, if `nan_policy` is `"raise"` and a loss is not finite; among several ranks, where
            scoring raised nothing, also if something invalid was counted.
    """
    was_counted = is_distributed() and _runtime.can_read_values(tally.state)  # Scoring did not raise.
    if was_counted or (nan_policy == "raise" and _runtime.raises_eagerly(tally.state)):
        read_exactly(tally, nan_policy, confidence, kept=False).require_finite()
    return DeviceReading(tally, nan_policy, confidence)
