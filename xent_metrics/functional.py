"""Pure functions: losses, a tally, a reading, for one batch or for all the data at once.

Nothing here keeps state or builds a graph, and nothing waits for an accelerator. Bad values raise at once where
looking at them is free, on the CPU; elsewhere, and in compiled code, they are counted in the tally and read as NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xent_metrics.exact import widest_float
from xent_metrics.losses import (
    WEIGHT_LIMIT,
    Input,
    LossOptions,
    TargetLosses,
    check_class_weight,
    describe,
    raises_now,
    target_losses,
    without,
)
from xent_metrics.readings import DeviceReading, ExactReading, NanPolicy, Unit, check_reading, check_unit
from xent_metrics.tally import Tally, tally_losses


def cross_entropy(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    eps: float | None = None,
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
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps)
    reading = _read(preds, target, weight, options, class_weight, nan_policy)
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
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Cross-entropy in bits, nats over ln 2; see `xent_metrics.BitsPerToken`.

    >>> bits_per_token(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    tensor(3.0000, dtype=torch.float64)
    """
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps)
    return _read(preds, target, weight, options, None, nan_policy).bits_per_token


def perplexity(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Exponential of the cross-entropy in nats; see `xent_metrics.Perplexity`.

    >>> perplexity(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    tensor(8.0000, dtype=torch.float64)
    """
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps)
    return _read(preds, target, weight, options, None, nan_policy).perplexity


def per_target_losses(
    preds: Tensor,
    target: Tensor,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    eps: float | None = None,
) -> Tensor:
    """Loss of every target in nats, as `F.cross_entropy(..., reduction="none")` but without its copies of the logits.

    Returns:
        Losses of target's shape (for soft targets, without the class dimension), float32, or float64 for float64
        `preds`; 0 where the target is ignored. Without a graph.

    Raises:
        ValueError: On the CPU, if a target is out of range; elsewhere its loss is NaN.

    >>> per_target_losses(torch.tensor([[2.0, 1.0, 0.1], [0.0, 0.0, 0.0]]), torch.tensor([0, -100]))
    tensor([0.4170, 0.0000])
    """
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps)
    check_class_weight(class_weight, options)
    losses = target_losses(preds, target, options, class_weight)
    if raises_now(losses.loss):
        _raise_invalid(preds, target, losses, None, options)
    loss = losses.loss.masked_fill(losses.ignored, 0.0).masked_fill(losses.out_of_range, math.nan)
    return loss.reshape(_target_shape(target, options))


def tally(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    eps: float | None = None,
) -> Tally:
    """Exact sums and counts of a batch, to be added to other tallies; see `xent_metrics.tally.Tally`.

    >>> batch = tally(torch.zeros(4, 8), torch.tensor([0, 1, 2, -100]))
    >>> (batch + batch).totals().scored
    6
    """
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps)
    check_class_weight(class_weight, options)
    batch = tally_batch(preds, target, weight, options, class_weight)
    return Tally.zero(batch.state.device) + batch


def tally_batch(
    preds: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, class_weight: Tensor | None
) -> Tally:
    """Tally a batch (not carried) with options that have been checked; raise on bad values where that is free."""
    with torch.no_grad():
        losses = target_losses(preds, target, options, class_weight)
        if weight is not None:
            weight = _as_weight(weight, _target_shape(target, options), losses.loss)
        if raises_now(losses.loss):
            _raise_invalid(preds, target, losses, weight, options)
        return tally_losses(losses, weight)


def _read(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    class_weight: Tensor | None,
    nan_policy: NanPolicy,
) -> DeviceReading:
    check_reading(nan_policy)
    check_class_weight(class_weight, options)
    batch = tally_batch(preds, target, weight, options, class_weight)
    if nan_policy == "raise" and raises_now(batch.state):
        ExactReading(batch.totals(), nan_policy).require_finite()
    return DeviceReading(batch, nan_policy)


def _target_shape(target: Tensor, options: LossOptions) -> torch.Size:
    """Return the shape of the losses: target's, without the class dimension of soft targets."""
    return without(target.shape, options.class_dim) if target.is_floating_point() else target.shape


def _as_weight(weight: Tensor, shape: torch.Size, loss: Tensor) -> Tensor:
    """Broadcast weights to the losses, in a dtype in which their product is (all but) exact."""
    if not isinstance(weight, Tensor) or weight.is_complex() or weight.layout != torch.strided:
        raise TypeError(f"`weight` must be a dense tensor of real numbers or booleans, got {describe(weight)}.")
    if weight.device != loss.device:
        raise ValueError(
            f"`weight` must be on the device of `preds`, {loss.device}, got {weight.device}; move it with .to()."
        )
    fits = weight.dim() <= len(shape) and all(
        own in (1, wanted) for own, wanted in zip(reversed(weight.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"`weight` must be broadcastable to target's shape {tuple(shape)}, got {tuple(weight.shape)}; "
            "class weights go to `class_weight`."
        )
    if weight.dtype != torch.bool:
        weight = weight.to(widest_float(loss.device))
    return weight.expand(shape).reshape(loss.shape)


def _raise_invalid(
    preds: Tensor, target: Tensor, losses: TargetLosses, weight: Tensor | None, options: LossOptions
) -> None:
    """Raise if a target that would be scored is out of range or has an invalid weight, and show one."""
    looked_at = ~losses.ignored if weight is None else ~losses.ignored & (weight != 0)
    outside = losses.out_of_range & looked_at
    if outside.any():
        example = target.reshape(-1)[outside.view(-1)][0].item()
        fix = f"pass ignore_index={example} if it marks targets to leave out"
        raise ValueError(
            f"`target` must hold class indices in [0, {preds.shape[options.class_dim]}) or ignore_index="
            f"{options.ignore_index}, got {int(outside.sum())} that are neither, such as {example}; "
            f"{fix if example < 0 else 'check the vocabulary size'}."
        )
    if weight is not None and weight.dtype != torch.bool:
        invalid = weight[looked_at & ~((weight > 0) & (weight < WEIGHT_LIMIT))]
        if invalid.numel():
            raise ValueError(
                f"`weight` must hold finite numbers that are not negative (and below 2**47), got {invalid.numel()} "
                f"that are not, such as {invalid[0].item()}; use 0 or False for targets that are not to be scored."
            )
