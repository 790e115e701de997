"""Pure functions: losses, a tally, a reading, for one batch or for all the data at once.

Nothing here keeps state or builds a graph, and nothing waits for an accelerator. Bad values raise at once where
looking at them is free, on the CPU; elsewhere, and in compiled code, they are counted in the tally and read as NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xent_metrics.checks import (
    WEIGHT_LIMIT,
    as_token_table,
    check_class_weight,
    check_device,
    check_distributions,
    check_group,
    check_hard,
    check_num_bytes,
    check_num_classes,
    check_pos_weight,
    check_weight,
    free_to_look,
    raises_now,
    without,
)
from xent_metrics.distributed import is_distributed
from xent_metrics.exact import LIMIT, widest_float
from xent_metrics.losses import (
    BinaryInput,
    BinaryOptions,
    Input,
    LossOptions,
    SmoothingOver,
    TargetLosses,
    as_index,
    binary_losses,
    convert_label_smoothing,
    difference,
    shifted,
    target_entropies,
    target_losses,
)
from xent_metrics.readings import (
    DIFFERENCE,
    DeviceReading,
    ExactReading,
    NanPolicy,
    Unit,
    check_reading,
    check_unit,
    check_valid,
)
from xent_metrics.tally import GroupTally, Tally, tally_groups, tally_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "binary_cross_entropy",
    "bits_per_byte",
    "bits_per_token",
    "convert_label_smoothing",
    "cross_entropy",
    "cross_entropy_decomposition",
    "cross_entropy_difference",
    "grouped_cross_entropy",
    "normalized_cross_entropy",
    "per_target_losses",
    "perplexity",
    "tally",
]


def cross_entropy(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    unit: Unit = "nats",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Cross-entropy of all targets at once: the sum of `weight * loss` over the sum of `weight`.

    Arguments, errors and the value without targets (NaN) are those of `xent_metrics.CrossEntropy`. The result is a
    float64 scalar (float32 where the device has no float64) without a graph: it measures, it does not train.

    >>> cross_entropy(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    tensor(0.4170, dtype=torch.float64)
    """
    check_unit(unit)
    check_class_weight(class_weight, input)
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, shift)
    reading = _read(tally_batch(preds, target, weight, options, class_weight), nan_policy)
    return reading.cross_entropy if unit == "nats" else reading.bits_per_token


def bits_per_token(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Cross-entropy in bits, nats over ln 2; see `xent_metrics.BitsPerToken`.

    >>> bits_per_token(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    tensor(3.0000, dtype=torch.float64)
    """
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift)
    return _read(tally_batch(preds, target, weight, options), nan_policy).bits_per_token


def perplexity(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Exponential of the cross-entropy in nats; see `xent_metrics.Perplexity`.

    >>> perplexity(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    tensor(8.0000, dtype=torch.float64)
    """
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift)
    return _read(tally_batch(preds, target, weight, options), nan_policy).perplexity


def bits_per_byte(
    preds: Tensor,
    target: Tensor,
    num_bytes: int | Tensor | None = None,
    weight: Tensor | None = None,
    *,
    token_bytes: Tensor | None = None,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Total bits over total UTF-8 bytes; see `xent_metrics.BitsPerByte`.

    Four tokens of 3 bits each that stand for 6 bytes:

    >>> bits_per_byte(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]), num_bytes=6)
    tensor(2.0000, dtype=torch.float64)
    """
    check_reading(nan_policy)
    if token_bytes is not None:
        token_bytes = as_token_table(token_bytes)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift)
    return _read(tally_per_byte(preds, target, num_bytes, weight, options, token_bytes), nan_policy).bits_per_token


def binary_cross_entropy(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: BinaryInput = "logits",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    eps: float | None = None,
    unit: Unit = "nats",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Binary cross-entropy of all targets at once; see `xent_metrics.BinaryCrossEntropy`.

    >>> binary_cross_entropy(torch.tensor([0.99, 0.01, 0.99]), torch.tensor([1, 0, 1]), input="probs")
    tensor(0.0101, dtype=torch.float64)
    """
    check_unit(unit)
    check_pos_weight(pos_weight)
    check_reading(nan_policy)
    options = BinaryOptions(input, label_smoothing, ignore_index, eps)
    reading = _read(tally_binary(preds, target, weight, options, pos_weight), nan_policy)
    return reading.cross_entropy if unit == "nats" else reading.bits_per_token


def cross_entropy_decomposition(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    nan_policy: NanPolicy = "propagate",
) -> dict[str, Tensor]:
    """Cross-entropy, entropy and KL divergence; see `xent_metrics.CrossEntropyDecomposition`.

    >>> values = cross_entropy_decomposition(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
    >>> [round(value.item(), 4) for value in values.values()]
    [0.6931, 0.6931, 0.0]
    """
    check_reading(nan_policy)
    check_distributions(input)
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over)
    batch = tally_decomposition(preds, target, weight, options)
    total, entropy = (_read(part, nan_policy) for part in decomposed(batch, nan_policy))
    return {
        "cross_entropy": total.cross_entropy,
        "entropy": entropy.cross_entropy,
        "kl_divergence": total.cross_entropy - entropy.cross_entropy,
    }


def grouped_cross_entropy(
    preds: Tensor,
    target: Tensor,
    group: Tensor,
    weight: Tensor | None = None,
    *,
    num_groups: int,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    unit: Unit = "nats",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Cross-entropy of each group of targets; see `xent_metrics.GroupedCrossEntropy`.

    >>> grouped_cross_entropy(torch.zeros(3, 8), torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]), num_groups=3)
    tensor([2.0794,    nan, 2.0794], dtype=torch.float64)
    """
    check_unit(unit)
    check_num_classes("num_groups", num_groups)
    check_class_weight(class_weight, input)
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, shift)
    batch = tally_grouped(preds, target, group, weight, options, class_weight, num_groups)
    reading = _read(batch, nan_policy)
    return reading.cross_entropy if unit == "nats" else reading.bits_per_token


def normalized_cross_entropy(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    num_classes: int,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Cross-entropy over the entropy of the class frequencies; see `xent_metrics.NormalizedCrossEntropy`.

    >>> normalized_cross_entropy(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]), num_classes=2)
    tensor(1.0000, dtype=torch.float64)
    """
    check_num_classes("num_classes", num_classes, 2)
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps)
    return _read(tally_by_class(preds, target, weight, options, num_classes), nan_policy).normalized_cross_entropy


def cross_entropy_difference(
    preds_a: Tensor,
    preds_b: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
    confidence: float = 0.95,
) -> dict[str, Tensor]:
    """By how much model b is better or worse than model a; see `xent_metrics.CrossEntropyDifference`.

    >>> uniform, certain = torch.zeros(4, 8), torch.eye(8)[:4].log()
    >>> cross_entropy_difference(uniform, certain, torch.arange(4))["difference"]  # -log(8)
    tensor(-2.0794, dtype=torch.float64)
    """
    check_reading(nan_policy, confidence)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift)
    reading = _read(tally_difference(preds_a, preds_b, target, weight, options), nan_policy, confidence)
    return {name: getattr(reading, attribute) for name, attribute in DIFFERENCE.items()}


def per_target_losses(
    preds: Tensor,
    target: Tensor,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
) -> Tensor:
    """Loss of every target in nats, as `F.cross_entropy(..., reduction="none")` but without its copies of the logits.

    Returns:
        Losses of target's shape (for soft targets, without the class dimension), float32, or float64 for float64
        `preds`; 0 where the target is ignored. Without a graph.

    Raises:
        ValueError: On the CPU, if a target or a probability is out of range; elsewhere its loss is NaN.

    >>> per_target_losses(torch.tensor([[2.0, 1.0, 0.1], [0.0, 0.0, 0.0]]), torch.tensor([0, -100]))
    tensor([0.4170, 0.0000])
    """
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over)
    check_class_weight(class_weight, input)
    losses = target_losses(preds, target, options, class_weight)
    _raise_invalid(losses, None, preds, target, options)
    loss = losses.loss.masked_fill(losses.out_of_range, math.nan)
    if losses.improper is not None:
        loss = loss.masked_fill(losses.improper, math.nan)
    return loss.masked_fill(losses.ignored, 0.0).reshape(_target_shape(target, options))


def tally(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
) -> Tally:
    """Exact sums and counts of a batch, to be added to other tallies; see `xent_metrics.tally.Tally`.

    >>> batch = tally(torch.zeros(4, 8), torch.tensor([0, 1, 2, -100]))
    >>> (batch + batch).totals().scored
    6
    """
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, shift)
    check_class_weight(class_weight, input)
    batch = tally_batch(preds, target, weight, options, class_weight)
    return Tally.zero(batch.state.device) + batch


def decomposed(tally: Tally, nan_policy: NanPolicy) -> tuple[Tally, Tally]:
    """Choose from `tally_decomposition` the cross-entropy, and the entropy of the targets that it is read of."""
    total, entropy, entropy_of_nonfinite = tally.unbind()
    return total, entropy if nan_policy == "omit" else entropy + entropy_of_nonfinite


def tally_batch(
    preds: Tensor,
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
    with torch.no_grad():
        losses, weight = _score(preds, target, weight, options, class_weight)
        if token_bytes is None:
            _raise_invalid(losses, weight, preds, target, options)
            return tally_losses(losses, weight, sequence_group)
        per_byte = _per_byte(losses, preds, target, options, token_bytes)
        losses = losses._replace(out_of_range=per_byte.out_of_range)
        _raise_invalid(losses, weight, preds, target, options, len(token_bytes))
        return Tally.stack(tally_losses(losses, weight, sequence_group), tally_losses(per_byte, weight))


def tally_per_byte(
    preds: Tensor,
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
            losses = _per_byte(losses, preds, target, options, token_bytes)
            _raise_invalid(losses, weight, preds, target, options, len(token_bytes))
            return tally_losses(losses, weight)
        assert num_bytes is not None
        check_num_bytes(num_bytes)
        _raise_invalid(losses, weight, preds, target, options)
        each = torch.as_tensor(num_bytes, dtype=torch.int64, device=losses.loss.device)
        return tally_losses(losses, weight).with_weight(torch.where((each < 0).any(), -1, each.sum()))


def tally_grouped(
    preds: Tensor,
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
        shape = _target_shape(target, options)
        check_group(group, shape, preds)
        group = _per_target(as_index(group), shape, options, losses)
        _raise_invalid(losses, weight, preds, target, options)
        _raise_groupless(losses, weight, group, num_groups)
        return tally_groups(losses, weight, group, num_groups)


def tally_by_class(
    preds: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, num_classes: int
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
        _raise_invalid(losses, weight, preds, target, options, num_classes)
        return tally_groups(losses, weight, index, num_classes)


def tally_decomposition(preds: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tally:
    """Tally three losses of a batch side by side.

    They are the cross-entropies, the entropies where those are finite, and the entropies where they are not, so that
    a reading may leave out the same targets from both.
    """
    with torch.no_grad():
        losses, weight = _score(preds, target, weight, options)
        _raise_invalid(losses, weight, preds, target, options)
        entropies = losses._replace(loss=target_entropies(preds, target, options).view_as(losses.loss))
        finite = losses.loss.abs() < LIMIT
        parts = (losses, *(entropies._replace(ignored=losses.ignored | left_out) for left_out in (~finite, finite)))
        return Tally.stack(*(tally_losses(part, weight) for part in parts))


def tally_difference(
    preds_a: Tensor,
    preds_b: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    sequence_group: ProcessGroup | None = None,
) -> Tally:
    """Tally by how much the losses of `preds_b` exceed those of `preds_a`."""
    with torch.no_grad():
        first, _ = _score(preds_a, target, None, options)
        second, weight = _score(preds_b, target, weight, options)
        for preds, losses in ((preds_a, first), (preds_b, second)):
            _raise_invalid(losses, weight, preds, target, options)
        return tally_losses(difference(first, second), weight, sequence_group)


def tally_binary(
    preds: Tensor, target: Tensor, weight: Tensor | None, options: BinaryOptions, pos_weight: Tensor | None
) -> Tally:
    """Tally a batch of binary predictions."""
    with torch.no_grad():
        losses = binary_losses(preds, target, options, pos_weight)
        if weight is not None:
            weight = _as_weight(weight, target.shape, LossOptions(), losses)
        _raise_invalid(losses, weight, preds, target, options)
        return tally_losses(losses, weight)


def _read(batch: Tally | GroupTally, nan_policy: NanPolicy, confidence: float = 0.95) -> DeviceReading:
    """Read the tally of a batch; raise on losses that are not finite where that is asked for, and free."""
    counted = is_distributed() and free_to_look(batch.state)  # Instead of raised already.
    if counted or (nan_policy == "raise" and raises_now(batch.state)):
        if isinstance(batch, GroupTally):
            totals, groupless = batch.overall().totals(), int(batch.groupless_on_device())
        else:
            totals, groupless = batch.totals(), 0
        check_valid(totals, groupless)
        ExactReading(totals, nan_policy).require_finite()
    return DeviceReading(batch, nan_policy, confidence)


def _score(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None = None,
) -> tuple[TargetLosses, Tensor | None]:
    """Return the loss of every target that there is, and its weight."""
    losses = target_losses(preds, target, options, class_weight)
    if weight is not None:
        weight = _as_weight(weight, _target_shape(target, options), options, losses)
    return losses, weight


def _per_byte(
    losses: TargetLosses, preds: Tensor, target: Tensor, options: LossOptions, token_bytes: Tensor
) -> TargetLosses:
    check_hard(target, "tokens stand for bytes, distributions do not")
    check_device("token_bytes", token_bytes, preds)
    return losses.per_byte(_per_target(as_index(target), target.shape, options, losses), token_bytes)


def _target_shape(target: Tensor, options: LossOptions) -> torch.Size:
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


def _raise_invalid(
    losses: TargetLosses,
    weight: Tensor | None,
    preds: Tensor,
    target: Tensor,
    options: LossOptions | BinaryOptions,
    num_ids: int | None = None,
) -> None:
    """Raise if a target that would be scored is invalid, or its probabilities or weight are, and show one."""
    if not raises_now(losses.loss):
        return
    looked_at = ~losses.ignored if weight is None else ~losses.ignored & (weight != 0)
    outside = losses.out_of_range & looked_at
    if outside.any():
        raise ValueError(_explain_target(outside.view(-1), preds, target, options, num_ids))
    if losses.improper is not None and (improper := losses.improper & looked_at).any():
        raise ValueError(
            f"`preds` must hold probabilities in [0, 1] with `input='probs'`, got {int(improper.sum())} targets for "
            "which they are not; pass input='logits' if they are scores."
        )
    if weight is not None and weight.dtype != torch.bool:
        invalid = weight[looked_at & ~((weight > 0) & (weight < WEIGHT_LIMIT))]
        if invalid.numel():
            raise ValueError(
                f"`weight` must hold finite numbers that are not negative (and below 2**47), got {invalid.numel()} "
                f"that are not, such as {invalid[0].item()}; use 0 or False for targets that are not to be scored."
            )


def _explain_target(
    outside: Tensor, preds: Tensor, target: Tensor, options: LossOptions | BinaryOptions, num_ids: int | None
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
    limit = preds.shape[options.class_dim] if options.input != "losses" else num_ids
    limit = limit if num_ids is None or limit is None else min(limit, num_ids)
    return (
        f"`target` must hold class indices in [0, {limit}){_or_ignored(options)}, got {number} that are neither, such "
        f"as {example}; {_fix(example, 'check the vocabulary size')}."
    )


def _or_ignored(options: LossOptions | BinaryOptions) -> str:
    return f" or ignore_index={options.ignore_index}"


def _fix(example: float, otherwise: str) -> str:
    """Say what to do about a target: negative integers usually mark what is to be left out."""
    return f"pass ignore_index={int(example)} if it marks targets to leave out" if example < 0 else otherwise


def _raise_groupless(losses: TargetLosses, weight: Tensor | None, group: Tensor, num_groups: int) -> None:
    if not raises_now(group):
        return
    looked_at = ~losses.ignored if weight is None else ~losses.ignored & (weight != 0)
    bad = group[looked_at & ~((group >= 0) & (group < num_groups))]
    if bad.numel():
        raise ValueError(
            f"`group` must hold integers in [0, {num_groups}), got {bad.numel()} that are not, such as "
            f"{bad[0].item()}; raise `num_groups`, or mask their targets with `weight`."
        )
