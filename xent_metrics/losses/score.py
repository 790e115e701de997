"""From the arguments of a call to the losses of its targets, weighted, and with what is wrong with them raised.

What metrics, functional forms and the monitor share. Nothing here keeps state, builds a graph or waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._compat import where_true
from xent_metrics._validate import check_device, check_hard, check_ids, check_weight, without
from xent_metrics.losses.dense import target_losses
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import raise_mistakes, raise_now
from xent_metrics.losses.options import LossOptions
from xent_metrics.losses.target_losses import BAD_GROUP, IGNORED, SCORED, TargetLosses
from xent_metrics.losses.targets import as_index


class ScoredBatch(NamedTuple):
    """The losses of a batch: with a weight for denominator, and the same ones with bytes for it.

    Attributes:
        per_token: A target's denominator is its weight.
        per_byte: A target's denominator is its bytes, times its weight; None without a table of bytes.
    """

    per_token: TargetLosses
    per_byte: TargetLosses | None = None

    @classmethod
    def cat(cls, batches: Sequence[ScoredBatch]) -> ScoredBatch:
        """Concatenate batches of one row type."""
        parts = zip(*batches, strict=True)
        return cls(*(None if part[0] is None else TargetLosses.cat(part) for part in parts))  # type: ignore[arg-type]

    @property
    def loss(self) -> Tensor:
        """Loss of each target, of shape (sequences, targets in a sequence)."""
        return self.per_token.loss

    @property
    def is_scored(self) -> Tensor:
        """Whether each target is scored."""
        status = self.per_token.status
        return torch.ones_like(self.loss, dtype=torch.bool) if status is None else status == SCORED

    @property
    def row_type(self) -> tuple[int, torch.dtype, torch.device, int]:
        """Length, dtype and device of a sequence, and what else is averaged; equal ones can be joined."""
        return self.loss.shape[1], self.loss.dtype, self.loss.device, len(self.per_token.others)

    def copy(self) -> ScoredBatch:
        """Return the batch with losses in memory of their own, without a graph."""
        # A compiled step may write the losses of every batch to the same memory. The rest is made anew for each batch.
        loss = self.loss.detach().clone()
        return ScoredBatch(*(None if part is None else part._replace(loss=loss) for part in self))  # type: ignore[arg-type]


def score_batch(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None = None,
    token_bytes: Tensor | None = None,
) -> ScoredBatch:
    """Score a batch; raise ValueError on what is wrong with it, where that is free."""
    with _runtime.no_graph():
        losses, weights = score_unweighted(preds, target, weight, options, class_weight)
        if token_bytes is None:
            losses = losses.weighted(weights)
            raise_mistakes(losses, preds, target, options, weights)
            return ScoredBatch(losses)
        per_byte = per_byte_losses(losses, target, options, token_bytes).weighted(weights)
        # An id that has no entry in the table is wrong in both.
        ids = per_target(as_index(target), target.shape, options, losses)
        losses = losses.within(ids, len(token_bytes)).weighted(weights)
        raise_mistakes(losses, preds, target, options, weights, len(token_bytes))
        return ScoredBatch(losses, per_byte)


def score_unweighted(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None = None,
) -> tuple[TargetLosses, Tensor | None]:
    """Return the losses of a batch, and the weight of each, which was not applied yet."""
    losses = target_losses(preds, target, options, class_weight)
    return losses, None if weight is None else as_weights(weight, target_shape(target, options), options, losses)


def per_byte_losses(losses: TargetLosses, target: Tensor, options: LossOptions, token_bytes: Tensor) -> TargetLosses:
    """Let the bytes of each target be its denominator."""
    check_hard(target, "tokens stand for bytes, distributions do not")
    check_device("token_bytes", token_bytes, losses.loss)
    return losses.per_byte(per_target(as_index(target), target.shape, options, losses), token_bytes)


def as_weights(weight: Tensor, shape: torch.Size, options: LossOptions, losses: TargetLosses) -> Tensor:
    """Broadcast weights to the losses, in a dtype in which their product is (all but) exact."""
    check_weight(weight, shape, losses.loss)
    if weight.dtype != torch.bool:
        weight = weight.to(_runtime.widest_float(weight.device))
    return per_target(weight, shape, options, losses)


def as_groups(
    group: Tensor, target: Tensor, options: LossOptions, losses: TargetLosses, num_groups: int, fix: str
) -> Tensor:
    """Broadcast groups to the losses; raise ValueError on bad ones, where that is free.

    Args:
        group: Integers, broadcastable to the targets.
        target: The targets.
        options: How the losses were made.
        losses: The losses.
        num_groups: Groups are in `[0, num_groups)`.
        fix: What to do about others.
    """
    shape = target_shape(target, options)
    check_ids("group", group, shape, losses.loss)
    groups = per_target(as_index(group), shape, options, losses)
    if _runtime.raises_eagerly(groups):
        extremes = _runtime.least_and_greatest(groups)
        if extremes and not (extremes[0] >= 0 and extremes[1] < num_groups):
            bad = (groups < 0) | (groups >= num_groups)
            # As they were given: a uint64 may hold more than an index.
            bad = bad if losses.status is None else bad & (losses.status != IGNORED)
            bad = where_true(per_target(group, shape, options, losses), bad)
            if bad.numel():
                raise_now(BAD_GROUP, bad.numel(), num_groups=num_groups, example=bad[0].item(), fix=fix)
    return groups


def as_sequence(
    sequence: Tensor, target: Tensor, options: LossOptions, losses: TargetLosses, sequence_group: object = None
) -> Tensor:
    """Broadcast ids of sequences to the losses; raise ValueError if ranks share rows, whose sequences would differ."""
    if sequence_group is not None:
        raise ValueError(
            "`sequence` must be None with `sequence_group`, got ids; ranks share rows, each of which is a sequence."
        )
    shape = target_shape(target, options)
    check_ids("sequence", sequence, shape, losses.loss)
    return per_target(as_index(sequence), shape, options, losses)


def target_shape(target: Tensor, options: LossOptions) -> torch.Size:
    """Return the shape of the losses before a shift: target's, without the class dimension of soft targets."""
    return without(target.shape, options.class_dim) if target.is_floating_point() else target.shape


def per_target(values: Tensor, shape: torch.Size, options: LossOptions, losses: TargetLosses) -> Tensor:
    """Give every loss its value, from a tensor that is broadcastable to target's shape."""
    return options.aligned(values.expand(shape)).reshape(losses.loss.shape)
