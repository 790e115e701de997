"""From the arguments of a call to the tally of its targets: losses, weights, what is wrong with them, exact sums.

What metrics and functions share. Options have been checked; nothing here keeps state, builds a graph or waits for an
accelerator. Tallies are not carried yet, which adding them to another does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xent_metrics.checks import (
    BYTES_LIMIT,
    WEIGHT_LIMIT,
    any_of,
    at_hand,
    check_device,
    check_group,
    check_hard,
    check_num_bytes,
    check_weight,
    extremes,
    free_to_look,
    no_graph,
    raises_now,
    without,
)
from xent_metrics.exact import LIMIT, widest_float
from xent_metrics.losses import (
    BinaryOptions,
    LinearLogits,
    LossOptions,
    TargetLosses,
    as_index,
    binary_losses,
    difference,
    shifted,
    target_entropies,
    target_losses,
)
from xent_metrics.readings import NanPolicy
from xent_metrics.tally import GroupTally, Tally, tally_groups, tally_losses

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
    return tally_scored(*score_batch(preds, target, weight, options, class_weight, token_bytes), sequence_group)


def score_batch(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None = None,
    token_bytes: Tensor | None = None,
) -> tuple[list[TargetLosses], Tensor | None]:
    """Return the losses of a batch, from which several tallies can be made, and the weight of each.

    With `token_bytes`, the same losses come a second time, with bytes for a denominator.
    """
    with no_graph():
        losses, weight = _score(preds, target, weight, options, class_weight)
        if token_bytes is None:
            raise_invalid(losses, weight, preds, target, options)
            return [losses], weight
        per_byte = _per_byte(losses, target, options, token_bytes)
        losses = losses._replace(out_of_range=per_byte.out_of_range)
        raise_invalid(losses, weight, preds, target, options, len(token_bytes))
        return [losses, per_byte], weight


def tally_scored(
    kinds: list[TargetLosses], weight: Tensor | None = None, sequence_group: ProcessGroup | None = None
) -> Tally:
    """Tally what `score_batch` returns; two kinds side by side, of which the first has the sequences' group."""
    with torch.no_grad():
        first = tally_losses(kinds[0], weight, sequence_group)
        return Tally.stack(first, *(tally_losses(kind, weight) for kind in kinds[1:])) if kinds[1:] else first


def group_scored(
    kinds: list[TargetLosses],
    group: Tensor,
    target: Tensor,
    options: LossOptions,
    num_groups: int,
    fix: str,
) -> list[GroupTally]:
    """Tally what `score_batch` returns by group, each kind for itself; `fix` says what to do about a wrong group."""
    with torch.no_grad():
        group = _as_group(group, target, options, kinds[0])
        _raise_groupless(kinds[0], None, group, num_groups, fix)
        return [tally_groups(kind, None, group, num_groups) for kind in kinds]


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
        losses, weight = _score(preds, target, weight, options)
        if token_bytes is not None:
            losses = _per_byte(losses, target, options, token_bytes)
            raise_invalid(losses, weight, preds, target, options, len(token_bytes))
            return tally_losses(losses, weight)
        assert num_bytes is not None
        check_num_bytes(num_bytes, losses.loss, raises_now(losses.loss))
        raise_invalid(losses, weight, preds, target, options)
        if isinstance(num_bytes, Tensor):
            each = num_bytes.to(torch.int64)
        else:  # Not as_tensor, of which compiled code makes a constant.
            within = max(-1, min(num_bytes, BYTES_LIMIT))
            each = torch.full((), within, dtype=torch.int64, device=losses.loss.device)
        invalid = ((each < 0) | (each >= BYTES_LIMIT)).any()
        return tally_losses(losses, weight).with_weight(torch.where(invalid, -1, each.sum()))


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
        losses, weight = _score(preds, target, weight, options, class_weight)
        group = _as_group(group, target, options, losses)
        raise_invalid(losses, weight, preds, target, options)
        _raise_groupless(losses, weight, group, num_groups)
        return tally_groups(losses, weight, group, num_groups)


def tally_by_class(
    preds: Tensor | LinearLogits, target: Tensor, weight: Tensor | None, options: LossOptions, num_classes: int
) -> GroupTally:
    """Tally a batch by the class of its targets."""
    with torch.no_grad():
        losses, weight = _score(preds, target, weight, options)
        check_hard(target, "the frequencies of classes are counted")
        if options.input != "losses" and preds.shape[options.class_dim] != num_classes:
            raise ValueError(
                f"`preds` must have `num_classes`={num_classes} classes on dimension {options.class_dim}, got shape "
                f"{tuple(preds.shape)}; binary logits x are the two columns [0, x]."
            )
        index = _per_target(as_index(target), target.shape, options, losses)
        losses = losses.within(index, num_classes)
        raise_invalid(losses, weight, preds, target, options, num_classes)
        return tally_groups(losses, weight, index, num_classes)


def tally_decomposition(
    preds: Tensor | LinearLogits, target: Tensor, weight: Tensor | None, options: LossOptions
) -> Tally:
    """Tally three losses of a batch side by side.

    They are the cross-entropies, the entropies where those are finite, and the entropies where they are not, so that
    a reading may leave out the same targets from both.
    """
    with torch.no_grad():
        losses, weight = _score(preds, target, weight, options)
        raise_invalid(losses, weight, preds, target, options)
        entropies = losses._replace(loss=target_entropies(preds, target, options).view_as(losses.loss))
        weighted = losses.loss if weight is None or weight.dtype == torch.bool else losses.loss * weight
        finite = weighted.abs() < LIMIT
        left_out = (any_of(losses.ignored, part) for part in (~finite, finite))
        parts = (losses, *(entropies._replace(ignored=ignored) for ignored in left_out))
        return Tally.stack(*(tally_losses(part, weight) for part in parts))


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
            first, rows = _score(preds_a, target, weight, options)
            raise_invalid(first, rows, preds_a, target, options)
        with _called("preds_b"):
            second, weight = _score(preds_b, target, weight, options)
            raise_invalid(second, weight, preds_b, target, options)
        return tally_losses(difference(first, second), weight, sequence_group)


def tally_binary(
    preds: Tensor, target: Tensor, weight: Tensor | None, options: BinaryOptions, pos_weight: Tensor | None
) -> Tally:
    """Tally a batch of binary predictions."""
    with torch.no_grad():
        losses = binary_losses(preds, target, options, pos_weight)
        if weight is not None:
            weight = _as_weight(weight, target.shape, LossOptions(), losses)
        raise_invalid(losses, weight, preds, target, options)
        return tally_losses(losses, weight)


@contextmanager
def _called(name: str) -> Iterator[None]:
    """Let errors about `preds` name the argument that it is called by."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`preds`", f"`{name}`")) from None


def _score(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None = None,
) -> tuple[TargetLosses, Tensor | None]:
    """Return the loss of every target that there is, and its weight."""
    losses = target_losses(preds, target, options, class_weight)
    if weight is not None:
        weight = _as_weight(weight, target_shape(target, options), options, losses)
    return losses, weight


def _as_group(group: Tensor, target: Tensor, options: LossOptions, losses: TargetLosses) -> Tensor:
    """Broadcast groups to the losses."""
    shape = target_shape(target, options)
    check_group(group, shape, losses.loss)
    return _per_target(as_index(group), shape, options, losses)


def _per_byte(losses: TargetLosses, target: Tensor, options: LossOptions, token_bytes: Tensor) -> TargetLosses:
    check_hard(target, "tokens stand for bytes, distributions do not")
    check_device("token_bytes", token_bytes, losses.loss)
    return losses.per_byte(_per_target(as_index(target), target.shape, options, losses), token_bytes)


def target_shape(target: Tensor, options: LossOptions) -> torch.Size:
    """Return the shape of the losses before a shift: target's, without the class dimension of soft targets."""
    return without(target.shape, options.class_dim) if target.is_floating_point() else target.shape


def _per_target(values: Tensor, shape: torch.Size, options: LossOptions, losses: TargetLosses) -> Tensor:
    """Give every loss its value, from a tensor that is broadcastable to target's shape."""
    return options.aligned(values.expand(shape)).reshape(losses.loss.shape)


def _as_weight(weight: Tensor, shape: torch.Size, options: LossOptions, losses: TargetLosses) -> Tensor:
    """Broadcast weights to the losses, in a dtype in which their product is (all but) exact."""
    check_weight(weight, shape, losses.loss)
    if weight.dtype != torch.bool:
        weight = weight.to(widest_float(weight.device))
    return _per_target(weight, shape, options, losses)


def raise_invalid(
    losses: TargetLosses,
    weight: Tensor | None,
    preds: Tensor | LinearLogits,
    target: Tensor,
    options: LossOptions | BinaryOptions,
    num_ids: int | None = None,
    counted: bool = True,
) -> None:
    """Raise, where that is free, if a target that would be scored, its probabilities or its weight are invalid.

    What is `counted` raises on all ranks when it is read, and therefore not now if there are several.
    """
    valued = weight is not None and weight.dtype != torch.bool
    if losses.out_of_range is None and losses.improper is None and not valued:
        return
    if not (raises_now if counted else free_to_look)(losses.loss):
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
    """Say which targets are to be scored, if nothing is wrong with them; None for all."""
    left_out = any_of(losses.ignored, None if weight is None else weight == 0)
    return None if left_out is None else ~left_out


def _where_looked_at(mask: Tensor | None, looked_at: Tensor | None) -> Tensor | None:
    """Say where a mask is true for targets that are to be scored; None for nowhere."""
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
    """Say what targets must be, and show one of those that are not."""
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
    """Say what to do about a target: negative integers usually mark what is to be left out."""
    marks = example < 0 and math.isfinite(example) and example == int(example)
    return f"pass ignore_index={int(example)} if it marks targets to leave out" if marks else otherwise


def _raise_groupless(
    losses: TargetLosses,
    weight: Tensor | None,
    group: Tensor,
    num_groups: int,
    fix: str = "raise `num_groups`, or mask their targets with `weight`",
) -> None:
    if not raises_now(group):
        return
    looked_at = _looked_at(losses, weight)
    bad = (group < 0) | (group >= num_groups)
    bad = group[bad if looked_at is None else bad & looked_at]
    if bad.numel():
        raise ValueError(
            f"`group` must hold integers in [0, {num_groups}), got {bad.numel()} that are not, such as "
            f"{bad[0].item()}; {fix}."
        )
