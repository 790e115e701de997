"""From the arguments of a call to the losses of its targets, their weights, and a tally of them.

What metrics, functional forms and the monitor share. Options have been checked. Nothing here keeps state, builds a
graph or waits for an accelerator. The sums of these tallies are not normalised; adding them to another one does that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from xent_metrics import checks
from xent_metrics.checks import (
    WEIGHT_LIMIT,
    any_of,
    at_hand,
    check_device,
    check_group,
    check_hard,
    check_weight,
    extremes,
    no_graph,
    without,
)
from xent_metrics.distributed import is_distributed
from xent_metrics.exact import widest_float
from xent_metrics.losses import (
    BinaryOptions,
    LinearLogits,
    LossOptions,
    TargetLosses,
    as_index,
    shifted,
    target_losses,
)
from xent_metrics.readings import DeviceReading, NanPolicy, read_exactly
from xent_metrics.tally import GroupTally, Tally, tally_groups, tally_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ScoredBatch(NamedTuple):
    """The losses of a batch, from which several tallies can be made.

    Attributes:
        per_token: A target counts as its weight.
        per_byte: The same losses; a target counts as its bytes, times its weight. None without a table of bytes.
        weight: Weight of each target, or a mask of what to score; None for 1.
    """

    per_token: TargetLosses
    per_byte: TargetLosses | None = None
    weight: Tensor | None = None


def score_batch(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None = None,
    token_bytes: Tensor | None = None,
) -> ScoredBatch:
    """Score a batch.

    Raises:
        ValueError: If the arguments do not fit; where values can be read, also if they are invalid.
    """
    with no_graph():
        losses, weight = unchecked_losses(preds, target, weight, options, class_weight)
        if token_bytes is None:
            raise_invalid(losses, weight, preds, target, options)
            return ScoredBatch(losses, None, weight)
        per_byte = per_byte_losses(losses, target, options, token_bytes)
        losses = losses._replace(out_of_range=per_byte.out_of_range)  # An id that the table lacks is wrong in both.
        raise_invalid(losses, weight, preds, target, options, len(token_bytes))
        return ScoredBatch(losses, per_byte, weight)


def unchecked_losses(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None = None,
) -> tuple[TargetLosses, Tensor | None]:
    """Return the loss of every target and its weight; call `raise_invalid` after what else there is to check."""
    losses = target_losses(preds, target, options, class_weight)
    return losses, as_weights(weight, target, options, losses)


def per_byte_losses(losses: TargetLosses, target: Tensor, options: LossOptions, token_bytes: Tensor) -> TargetLosses:
    """Let every target count as its bytes."""
    check_hard(target, "tokens stand for bytes, distributions do not")
    check_device("token_bytes", token_bytes, losses.loss)
    return losses.per_byte(per_target(as_index(target), target.shape, options, losses), token_bytes)


def tally_scored(scored: ScoredBatch, sequence_group: ProcessGroup | None = None) -> Tally:
    """Tally a scored batch; with losses per byte, two tallies side by side."""
    with no_graph():
        per_token = tally_losses(scored.per_token, scored.weight, sequence_group)
        if scored.per_byte is None:
            return per_token
        return Tally.stack(per_token, tally_losses(scored.per_byte, scored.weight))


def tally_scored_by_group(
    scored: ScoredBatch,
    groups: Tensor,
    num_groups: int,
    fix: str = "raise `num_groups`, or mask their targets with `weight`",
) -> list[GroupTally]:
    """Tally a scored batch by group, per token and then per byte if it has that.

    Args:
        scored: The batch.
        groups: The group of each loss, as `as_groups` returns them.
        num_groups: Groups are in `[0, num_groups)`.
        fix: What an error says to do about others.

    Raises:
        ValueError: If a scored target has another group, where values can be read.
    """
    with no_graph():
        if checks.raises_now(groups):
            looked_at = _looked_at(scored.per_token, scored.weight)
            bad = (groups < 0) | (groups >= num_groups)
            bad = groups[bad if looked_at is None else bad & looked_at]
            if bad.numel():
                raise ValueError(
                    f"`group` must hold integers in [0, {num_groups}), got {bad.numel()} that are not, such as "
                    f"{bad[0].item()}; {fix}."
                )
        parts = [part for part in scored[:2] if part is not None]
        return [tally_groups(part, scored.weight, groups, num_groups) for part in parts]


def read_batch(tally: Tally | GroupTally, nan_policy: NanPolicy, confidence: float = 0.95) -> DeviceReading:
    """Read the tally of a batch that no metric keeps, without waiting for an accelerator.

    Raises:
        ValueError: On the CPU, if `nan_policy` is `"raise"` and a loss is not finite; among several ranks, where
            scoring raised nothing, also if something invalid was counted.
    """
    was_counted = is_distributed() and checks.free_to_look(tally.state)  # Instead of raised already.
    if was_counted or (nan_policy == "raise" and checks.raises_now(tally.state)):
        read_exactly(tally, nan_policy, confidence, kept=False).require_finite()
    return DeviceReading(tally, nan_policy, confidence)


def target_shape(target: Tensor, options: LossOptions) -> torch.Size:
    """Return the shape of the losses before a shift: target's, without the class dimension of soft targets."""
    return without(target.shape, options.class_dim) if target.is_floating_point() else target.shape


def per_target(values: Tensor, shape: torch.Size, options: LossOptions, losses: TargetLosses) -> Tensor:
    """Give every loss its value, from a tensor that is broadcastable to target's shape."""
    return options.aligned(values.expand(shape)).reshape(losses.loss.shape)


def as_groups(group: Tensor, target: Tensor, options: LossOptions, losses: TargetLosses) -> Tensor:
    """Broadcast groups to the losses."""
    shape = target_shape(target, options)
    check_group(group, shape, losses.loss)
    return per_target(as_index(group), shape, options, losses)


def as_weights(
    weight: Tensor | None, target: Tensor, options: LossOptions | BinaryOptions, losses: TargetLosses
) -> Tensor | None:
    """Broadcast weights to the losses, in a dtype in which their product is (all but) exact."""
    if weight is None:
        return None
    if isinstance(options, BinaryOptions):  # Every label is a target, also if it is a float.
        shape, options = target.shape, LossOptions()
    else:
        shape = target_shape(target, options)
    check_weight(weight, shape, losses.loss)
    if weight.dtype != torch.bool:
        weight = weight.to(widest_float(weight.device))
    return per_target(weight, shape, options, losses)


def raise_invalid(
    losses: TargetLosses,
    weight: Tensor | None,
    preds: Tensor | LinearLogits,
    target: Tensor,
    options: LossOptions | BinaryOptions,
    num_ids: int | None = None,
    counted: bool = True,
) -> None:
    """Raise ValueError if a target to be scored, its probabilities or its weight are invalid, where that is free.

    What is `counted` raises on all ranks when it is read, and therefore not now if there are several.
    """
    valued = weight is not None and weight.dtype != torch.bool
    if losses.out_of_range is None and losses.improper is None and not valued:
        return
    if not (checks.raises_now if counted else checks.free_to_look)(losses.loss):
        return
    looked_at = _looked_at(losses, weight)
    wrong = _where_looked_at(losses.out_of_range, looked_at)
    if wrong is not None:
        raise ValueError(_explain_target(wrong.view(-1), preds, target, options, num_ids))
    improper = _where_looked_at(losses.improper, looked_at)
    if improper is not None:
        raise ValueError(
            f"`preds` must hold probabilities in [0, 1] with `input='probs'`, got {int(improper.sum())} targets for "
            "which they are not; pass input='logits' if they are scores."
        )
    if weight is not None and valued:
        low, high = extremes(at_hand(weight))
        if low >= 0 and high < WEIGHT_LIMIT:
            return
        invalid = ~((weight > 0) & (weight < WEIGHT_LIMIT))
        invalid = weight[invalid if looked_at is None else invalid & looked_at]
        if invalid.numel():
            raise ValueError(
                f"`weight` must hold finite numbers that are not negative (and below 2**47), got {invalid.numel()} "
                f"that are not, such as {invalid[0].item()}; use 0 or False for targets that are not to be scored."
            )


def _looked_at(losses: TargetLosses, weight: Tensor | None) -> Tensor | None:
    """Return which targets are to be scored, if nothing is wrong with them; None for all."""
    left_out = any_of(losses.ignored, None if weight is None else weight == 0)
    return None if left_out is None else ~left_out


def _where_looked_at(mask: Tensor | None, looked_at: Tensor | None) -> Tensor | None:
    """Return where a mask is true for targets that are to be scored; None for nowhere."""
    if mask is None or not mask.any():
        return None
    mask = mask if looked_at is None else mask & looked_at
    return mask if mask.any() else None


def _explain_target(
    outside: Tensor,
    preds: Tensor | LinearLogits,
    target: Tensor,
    options: LossOptions | BinaryOptions,
    num_ids: int | None,
) -> str:
    """Return what targets must be, with one of those that are not."""
    number = int(outside.sum())
    if isinstance(options, BinaryOptions):
        example = target.reshape(-1)[outside][0].item()
        return (
            f"`target` must hold 0 and 1, or soft labels between them{_or_ignored(options)}, got {number} that are "
            f"neither, such as {example}; {_fix(example, 'more than two classes go to CrossEntropy')}."
        )
    target = shifted(preds, target, options)[1]
    if target.is_floating_point():
        row = target.movedim(options.class_dim, -1).reshape(len(outside), -1)[outside][0].double()
        return (
            f"`target` must hold, as soft targets, probabilities in [0, 1] with a sum of 1, got {number} that do not, "
            f"such as one with a sum of {row.sum().item():.6g} and a least entry of {row.min().item():.6g}; divide "
            "them by their sum, or mask them with `weight`."
        )
    example = target.reshape(-1)[outside][0].item()
    fix = _fix(example, "check the vocabulary size")
    limit = preds.shape[options.class_dim] if options.input != "losses" else num_ids
    if num_ids is not None and limit is not None and num_ids <= example < limit:
        fix = f"`token_bytes` has {num_ids} entries for {limit} classes: make it of this vocabulary, or pad it with 0"
    limit = limit if num_ids is None or limit is None else min(limit, num_ids)
    return (
        f"`target` must hold class indices in [0, {limit}){_or_ignored(options)}, got {number} that are neither, such "
        f"as {example}; {fix}."
    )


def _or_ignored(options: LossOptions | BinaryOptions) -> str:
    return f" or ignore_index={options.ignore_index}"


def _fix(example: float, otherwise: str) -> str:
    """Return what to do about a target: negative integers usually mark what is to be left out."""
    marks = example < 0 and math.isfinite(example) and example == int(example)
    return f"pass ignore_index={int(example)} if it marks targets to leave out" if marks else otherwise
