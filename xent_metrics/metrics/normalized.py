"""Cross-entropy over the entropy of the class frequencies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import as_num_classes, check_hard
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import raise_mistakes
from xent_metrics.losses.options import Backend, Input, LossOptions
from xent_metrics.losses.score import per_target, score_unweighted
from xent_metrics.losses.targets import as_index
from xent_metrics.metrics.base import LossMetric
from xent_metrics.metrics.batch_tallies import read_batch
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import DeviceReading, GroupReading, NanPolicy, check_reading
from xent_metrics.tally import GroupTally, tally_groups


def tally_by_class(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    options: LossOptions,
    num_classes: int,
) -> GroupTally:
    """Tally a batch by the class of its targets."""
    with _runtime.no_graph():
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


def normalized(reading: GroupReading | DeviceReading) -> float | Tensor:
    """Return the cross-entropy over the entropy of the frequencies of the groups."""
    if isinstance(reading, DeviceReading):
        return _normalized_on_device(reading)
    cross_entropy, entropy = reading.overall.cross_entropy, entropy_of_groups(reading)
    if math.isinf(cross_entropy):
        return cross_entropy  # Whatever the frequencies: they lack the targets that made it so.
    return cross_entropy / entropy if entropy else math.nan


def entropy_of_groups(reading: GroupReading) -> float:
    """Return the entropy in nats of the frequencies of the groups, by weight, some 1e-15 off; NaN without targets."""
    whole = reading.totals.everything.weight
    if not whole:
        return math.nan
    # Each logarithm is taken where it is accurate: log1p of what is missing for a group of more than half.
    return math.fsum(
        -part / whole * (math.log(part / whole) if 2 * part < whole else math.log1p((part - whole) / whole))
        for part in reading.totals.weight
        if part
    )


def _normalized_on_device(reading: DeviceReading) -> Tensor:
    tally = reading.tally
    assert isinstance(tally, GroupTally)
    cross_entropy = DeviceReading(tally.overall(), reading.nan_policy).cross_entropy
    weight = reading.sums["weight"]
    entropy = torch.special.entr(weight / weight.sum()).sum()
    value = (cross_entropy / entropy).masked_fill(entropy == 0, math.nan)
    value = torch.where(cross_entropy.isinf(), cross_entropy, value)
    return value.masked_fill(tally.num_groupless() > 0, math.nan)


class NormalizedCrossEntropy(LossMetric):
    """Cross-entropy over the entropy of the class frequencies seen: 1.0 is no better than knowing the base rate.

    `H / -sum_k f[k] log f[k]`, f being the share of class k in the targets that were scored, by weight. Below 1 a model
    knows more than how frequent the classes are. It makes problems of different base rates comparable, as click-through
    rates are.

    A binary model's logits x come as two columns, `torch.stack([torch.zeros_like(x), x], -1)`. Soft targets are
    refused: the frequencies of classes are counted.

    Args:
        num_classes: How many classes there are.
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` lets `compute` raise. Losses of `2**94` nats or more count as infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer. `"compile"` compiles that with
            `torch.compile` when it is first needed: some seconds for each dtype, number of classes and set of options,
            whatever the batch sizes (and again in another mode of PyTorch, such as autocast). Its losses agree with the
            others' to a relative 1e-6 and have the same bits in any batch. What it gains is in `docs/benchmarks.md`.
            `"auto"` never compiles: it is `"eager"`, but for a function that you compile, of which it becomes a part
            that the compiler can fuse. Metrics of different backends have different states.
        **kwargs: torchmetrics' own, such as `process_group` and `sync_on_compute`. Only ranks that hold different
            targets are to be added up: pass the data-parallel group where others hold the same targets.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`; `weight`: broadcastable to `(...)`.

    Returns:
        A float64 scalar (float32 where the device has no float64). NaN without targets, and where only one class was
        seen: its entropy is 0.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        He et al., Practical lessons from predicting clicks on ads at Facebook, 2014, section 3.

    >>> metric = NormalizedCrossEntropy(num_classes=2)
    >>> metric.update(torch.tensor([[0.75, 0.25]]).log().expand(4, -1), torch.tensor([0, 0, 0, 1]))
    >>> metric.compute()  # the model is the base rate
    tensor(1.0000, dtype=torch.float64)
    """

    _QUANTITY, _UNIT = "cross-entropy over that of the base rate", ""
    _tally_function = staticmethod(tally_by_class)

    def __init__(
        self,
        num_classes: int,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        num_classes = as_num_classes("num_classes", num_classes, 2)
        options = LossOptions(input=input, class_dim=class_dim, ignore_index=ignore_index, eps=eps, backend=backend)
        zero, decides = GroupTally.zero(num_classes), {"num_classes": num_classes}
        super().__init__(options, nan_policy, decides, zero, **kwargs)

    def _read(self, reading: GroupReading | DeviceReading) -> Tensor:  # type: ignore[override]
        return self._as_tensor(normalized(reading))


@outside_transforms
def normalized_cross_entropy(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    num_classes: int,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy over the entropy of the class frequencies seen: 1.0 is no better than knowing the base rate.

    `H / -sum_k f[k] log f[k]`, f being the share of class k in the targets that were scored, by weight. Below 1 a model
    knows more than how frequent the classes are. It makes problems of different base rates comparable, as click-through
    rates are.

    A binary model's logits x come as two columns, `torch.stack([torch.zeros_like(x), x], -1)`. Soft targets are
    refused: the frequencies of classes are counted.

    Args:
        preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
        target: Class indices of any integer dtype and `preds`' shape without the class dimension.
        weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape (for
            soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep them well
            above it: what is below some 1e-12 has few bits left. None for 1.
        num_classes: How many classes there are.
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` raises on the CPU, and reads NaN elsewhere. Losses of `2**94` nats or more count as
            infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer; `"compile"` compiles that with
            `torch.compile` when it is first needed; `"auto"` is `"eager"`, but a part of a function that you compile.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`; `weight`: broadcastable to `(...)`.

    Returns:
        A float64 scalar (float32 where the device has no float64) without a graph: it measures, it does not train. NaN
        without targets, and where only one class was seen: its entropy is 0.

    Raises:
        TypeError: If a dtype is not one of those named, or targets are soft.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target is neither a class nor `ignore_index`, a probability is outside [0, 1], a weight is negative,
            infinite or NaN, or a loss is not finite under `nan_policy="raise"` (elsewhere the value is NaN).

    Source:
        He et al., Practical lessons from predicting clicks on ads at Facebook, 2014, section 3.

    >>> normalized_cross_entropy(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]), num_classes=2)
    tensor(1., dtype=torch.float64)
    """
    num_classes = as_num_classes("num_classes", num_classes, 2)
    check_reading(nan_policy)
    options = LossOptions(input=input, class_dim=class_dim, ignore_index=ignore_index, eps=eps, backend=backend)
    batch = tally_by_class(preds, target, weight=weight, options=options, num_classes=num_classes)
    return _normalized_on_device(read_batch(batch, nan_policy))
