"""From the arguments of a call to the tally of its targets: losses, weights, what is wrong with them, exact sums.

What metrics and functions share. Options have been checked; nothing here keeps state, builds a graph or waits for an
accelerator. Tallies are not carried yet, which adding them to another does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import BYTES_LIMIT, check_hard, check_num_bytes
from xent_metrics.losses.binary import binary_losses
from xent_metrics.losses.dense import target_entropies
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import raise_mistakes
from xent_metrics.losses.options import BinaryOptions, LossOptions
from xent_metrics.losses.score import (
    ScoredBatch,
    as_groups,
    as_weights,
    per_byte_losses,
    per_target,
    score_batch,
    score_unweighted,
)
from xent_metrics.losses.target_losses import IGNORED, LIMIT, difference
from xent_metrics.losses.targets import as_index
from xent_metrics.readings import NanPolicy
from xent_metrics.tally.accumulate import tally_groups, tally_losses
from xent_metrics.tally.tally import GroupTally, Tally

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def decomposed(tally: Tally, nan_policy: NanPolicy) -> tuple[Tally, Tally]:
    """Choose from `tally_decomposition` the cross-entropy, and the entropy of the targets that it is read of."""
    total, entropy, entropy_of_nonfinite = tally.unbind()
    return total, entropy if nan_policy == "omit" else entropy + entropy_of_nonfinite


def tally_batch(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None = None,
    token_bytes: Tensor | None = None,
    sequence_group: ProcessGroup | None = None,
) -> Tally:
    """Tally a batch (not carried) with options that have been checked; raise on bad values where that is free.

    With `token_bytes`, a second tally stands beside the first, whose denominator is bytes.
    """
    return tally_scored(score_batch(preds, target, weight, options, class_weight, token_bytes), sequence_group)


def tally_scored(batch: ScoredBatch, sequence_group: ProcessGroup | None = None) -> Tally:
    """Tally a batch that was scored; per token and per byte side by side, of which the first has sequences' group."""
    with torch.no_grad():
        per_token = tally_losses(batch.per_token, sequence_group)
        return per_token if batch.per_byte is None else Tally.stack(per_token, tally_losses(batch.per_byte))


def group_scored(
    batch: ScoredBatch, group: Tensor, target: Tensor, options: LossOptions, num_groups: int, fix: str
) -> list[GroupTally]:
    """Tally a batch that was scored by group, per token and per byte; `fix` says what to do about a wrong group."""
    with torch.no_grad():
        groups = as_groups(group, target, options, batch.per_token, num_groups, fix)
        return [tally_groups(losses, groups, num_groups) for losses in batch if losses is not None]


def tally_per_byte(
    preds: Tensor | LinearLogits,
    target: Tensor,
    num_bytes: int | Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    token_bytes: Tensor | None,
) -> Tally:
    """Tally a batch whose denominator is bytes: those of its tokens, or `num_bytes`."""
    if (token_bytes is None) == (num_bytes is None):
        raise ValueError(
            "`num_bytes` must be given exactly if there is no `token_bytes` table, got "
            f"{'neither' if num_bytes is None else 'both'}; pass the table once, or the bytes with every batch."
        )
    with torch.no_grad():
        losses, weights = score_unweighted(preds, target, weight, options)
        if token_bytes is not None:
            losses = per_byte_losses(losses, target, options, token_bytes).weighted(weights)
            raise_mistakes(losses, preds, target, options, weights, len(token_bytes))
            return tally_losses(losses)
        assert num_bytes is not None
        check_num_bytes(num_bytes, losses.loss, _runtime.raises_eagerly(losses.loss))
        losses = losses.weighted(weights)
        raise_mistakes(losses, preds, target, options, weights)
        if isinstance(num_bytes, Tensor):
            each = num_bytes.to(torch.int64)
        else:  # Not as_tensor, of which compiled code makes a constant.
            within = max(-1, min(num_bytes, BYTES_LIMIT))
            each = torch.full((), within, dtype=torch.int64, device=losses.loss.device)
        invalid = ((each < 0) | (each >= BYTES_LIMIT)).any()
        return tally_losses(losses).with_weight(torch.where(invalid, -1, each.sum()))


def tally_grouped(
    preds: Tensor | LinearLogits,
    target: Tensor,
    group: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None,
    num_groups: int,
) -> GroupTally:
    """Tally a batch by group."""
    with torch.no_grad():
        losses = score_batch(preds, target, weight, options, class_weight).per_token
        fix = "raise `num_groups`, or mask their targets with `weight`"
        groups = as_groups(group, target, options, losses, num_groups, fix)
        return tally_groups(losses, groups, num_groups)


def tally_by_class(
    preds: Tensor | LinearLogits, target: Tensor, weight: Tensor | None, options: LossOptions, num_classes: int
) -> GroupTally:
    """Tally a batch by the class of its targets."""
    with torch.no_grad():
        losses, weights = score_unweighted(preds, target, weight, options)
        check_hard(target, "the frequencies of classes are counted")
        if options.input != "losses" and preds.shape[options.class_dim] != num_classes:
            raise ValueError(
                f"`preds` must have `num_classes`={num_classes} classes on dimension {options.class_dim}, got shape "
                f"{tuple(preds.shape)}; binary logits x are the two columns [0, x]."
            )
        index = per_target(as_index(target), target.shape, options, losses)
        losses = losses.within(index, num_classes).weighted(weights)
        raise_mistakes(losses, preds, target, options, weights, num_classes)
        return tally_groups(losses, index, num_classes)


def tally_decomposition(
    preds: Tensor | LinearLogits, target: Tensor, weight: Tensor | None, options: LossOptions
) -> Tally:
    """Tally three losses of a batch side by side.

    They are the cross-entropies, the entropies where those are finite, and the entropies where they are not, so that
    a reading may leave out the same targets from both.
    """
    with torch.no_grad():
        unweighted, weights = score_unweighted(preds, target, weight, options)
        losses = unweighted.weighted(weights)
        raise_mistakes(losses, preds, target, options, weights)
        loss = target_entropies(preds, target, options).view_as(losses.loss)
        entropies = losses._replace(loss=loss if losses.denominator is None else loss * losses.denominator)
        finite = losses.loss.abs() < LIMIT
        parts = (losses, *(entropies.marked(IGNORED, left_out) for left_out in (~finite, finite)))
        return Tally.stack(*(tally_losses(part) for part in parts))


def tally_difference(
    preds_a: Tensor | LinearLogits,
    preds_b: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    sequence_group: ProcessGroup | None = None,
) -> Tally:
    """Tally by how much the losses of `preds_b` exceed those of `preds_a`."""
    with torch.no_grad():
        with _called("preds_a"):
            first, weights = score_unweighted(preds_a, target, weight, options)
            raise_mistakes(first.weighted(weights), preds_a, target, options, weights)
        with _called("preds_b"):
            second, weights = score_unweighted(preds_b, target, weight, options)
            raise_mistakes(second.weighted(weights), preds_b, target, options, weights)
        return tally_losses(difference(first, second).weighted(weights), sequence_group)


def tally_binary(
    preds: Tensor, target: Tensor, weight: Tensor | None, options: BinaryOptions, pos_weight: Tensor | None
) -> Tally:
    """Tally a batch of binary predictions."""
    with torch.no_grad():
        losses = binary_losses(preds, target, options, pos_weight)
        weights = None if weight is None else as_weights(weight, target.shape, LossOptions(), losses)
        losses = losses.weighted(weights)
        raise_mistakes(losses, preds, target, options, weights)
        return tally_losses(losses)


@contextmanager
def _called(name: str) -> Iterator[None]:
    """Let errors about `preds` name the argument that it is called by."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`preds`", f"`{name}`")) from None
