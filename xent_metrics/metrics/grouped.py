"""Cross-entropy of each of many groups of targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics._rounding import Unit
from xent_metrics._validate import as_num_classes, check_class_weight, on_host
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import Backend, Input, LossOptions, SmoothingOver
from xent_metrics.losses.score import score_batch
from xent_metrics.metrics.base import TallyMetric
from xent_metrics.metrics.batch_tallies import read_batch, tally_scored_by_group
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import Average, NanPolicy, Reading, check_average, check_reading, check_unit
from xent_metrics.tally import GroupTally


def tally_grouped(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    group: Tensor,
    weight: Tensor | None = None,
    options: LossOptions,
    num_groups: int,
    class_weight: Tensor | None = None,
) -> GroupTally:
    """Tally a batch by group."""
    scored = score_batch(preds, target, weight, options, class_weight)
    [tally] = tally_scored_by_group(scored, group, target, options, num_groups)
    return tally


class GroupedCrossEntropy(TallyMetric):
    """Cross-entropy of each of many groups of targets, in one pass whatever their number.

    Each value is that of `CrossEntropy` on the targets of the group. Recipes, with classes on the last dimension:

    - by dataset or domain: `update(preds, target, group=dataset_of_sequence[:, None])`;
    - by class: `num_groups` is the number of classes, `update(preds, target, group=target)`;
    - by position: `num_groups` is the longest sequence T, `update(preds, target, group=torch.arange(T))`.

    Args:
        num_groups: How many groups there are. The state is 18 int64 numbers for each, also what ranks exchange.
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        class_weight: A weight for each class, as `weight` in `F.cross_entropy`: the denominator is the sum of
            `class_weight[target] * weight` for class indices, of `weight` for soft targets.
        label_smoothing: `a` in the target `(1 - a) * onehot + a / K`, as in `F.cross_entropy`.
        label_smoothing_over: `"all"` for that; `"others"` for the convention that leaves `1 - b` on the true class and
            gives every other one `b / (K - 1)`: with `label_smoothing=0.1` and three classes, `[0.9, 0.05, 0.05]`. It
            is `"all"` with `a = b * K / (K - 1)`; see `xent_metrics.functional.convert_label_smoothing`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        shift: Let position t of `preds` score target t + 1, for logits and labels as Hugging Face models have them. The
            time is the last dimension of `target` (not counting classes).
        unit: `"nats"`, or `"bits"`, which divides by ln 2.
        average: `"none"` for the value of each group, `"macro"` for their unweighted mean, over groups with targets.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` lets `compute` raise. Losses of `2**94` nats or more count as infinite. It holds for
            each group by itself (`"raise"` for all).
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer. `"compile"` compiles that with
            `torch.compile` when it is first needed: some seconds for each dtype, number of classes and set of options,
            whatever the batch sizes (and again in another mode of PyTorch, such as autocast). Its losses agree with the
            others' to a relative 1e-6 and have the same bits in any batch. What it gains is in `docs/benchmarks.md`.
            `"auto"` never compiles: it is `"eager"`, but for a function that you compile, of which it becomes a part
            that the compiler can fuse. Metrics of different backends have different states.
        **kwargs: torchmetrics' own, such as `process_group` and `sync_on_compute`. Only ranks that hold different
            targets are to be added up: pass the data-parallel group where others hold the same targets.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `group` and `weight`:
        broadcastable to `(...)`.

    Returns:
        A float64 tensor (float32 where the device has no float64) of shape `(num_groups,)`, in `unit`; NaN for groups
        without targets. With `average="macro"` a scalar; NaN without targets.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Shannon, A Mathematical Theory of Communication, 1948; by position, Khandelwal et al., Sharp nearby, fuzzy far
        away, 2018.

    >>> metric = GroupedCrossEntropy(num_groups=3)
    >>> preds = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    >>> metric.update(preds, target=torch.tensor([0, 1, 1]), group=torch.tensor([0, 2, 2]))
    >>> metric.compute()  # log 2; none; the mean of log(1 + e**-2) and log(1 + e**2)
    tensor([0.6931,    nan, 1.1269], dtype=torch.float64)
    """

    _tally_function = staticmethod(tally_grouped)

    def __init__(
        self,
        num_groups: int,
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
        average: Average = "none",
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_unit(unit)
        check_average(average)
        num_groups = as_num_classes("num_groups", num_groups)
        check_class_weight(on_host(class_weight), input)
        options = LossOptions(
            input=input,
            class_dim=class_dim,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            eps=eps,
            label_smoothing_over=label_smoothing_over,
            shift=shift,
            backend=backend,
        )
        decides = {"class_weight": class_weight, "num_groups": num_groups}
        super().__init__(options, nan_policy, decides, GroupTally.zero(num_groups), **kwargs)
        self.unit, self.average = unit, average

    def update(
        self, preds: Tensor | LinearLogits, target: Tensor, *, group: Tensor, weight: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
            target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft targets,
                floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
            group: Integers in `[0, num_groups)`, broadcastable to `target` (without classes). Those of targets that are
                not scored may be anything. With `shift=True` they are those of the labels, the first of which is not
                scored.
            weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape
                (for soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep
                them well above it: what is below some 1e-12 has few bits left. None for 1.

        Raises:
            TypeError: If a dtype is not one of those named, or `group` does not hold integers.
            ValueError: If shapes or devices do not fit; on the CPU also if a target is neither a class nor
                `ignore_index`, a probability is outside [0, 1], or a weight is negative, infinite or NaN (elsewhere
                `compute` raises). Also, on the CPU, if a scored target has none of the groups. The state is then as it
                was.
        """
        self._add_batch(preds, target, group=group, weight=weight)

    def plot(self, val: Any = None, ax: Any = None, *, group_names: Sequence[str] | None = None) -> Any:
        """Draw the value of each group with matplotlib, or for several steps a curve for each group.

        Args:
            val: What `forward` or `compute` returned, or a list of that, each a step; None for the present value.
            ax: Where to draw; None for a new figure.
            group_names: A name for each group; None numbers them.

        Raises:
            TypeError: If `val` is neither.
            ValueError: If a group has no name of its own.
        """
        return self._plot_values(val, ax, group_names)

    def _wrap_compute(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        squeezed = super()._wrap_compute(compute)  # torchmetrics makes a scalar of the value of a single group.

        @wraps(compute)
        def vector() -> Tensor:
            value: Tensor = squeezed()
            return value if self.average == "macro" else value.view(-1)

        return vector

    def _read(self, reading: Reading[Any, Any]) -> Tensor:  # type: ignore[override]
        return self._as_tensor(_averaged(reading, self.average, self.unit))


def _averaged(reading: Any, average: Average, unit: Unit) -> Any:
    """Return the value of each group, or their mean."""
    return reading.macro_in_unit(unit) if average == "macro" else reading.in_unit(unit)


@outside_transforms
def grouped_cross_entropy(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    group: Tensor,
    weight: Tensor | None = None,
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
    average: Average = "none",
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of each of many groups of targets, in one pass whatever their number.

    Each value is that of `cross_entropy` on the targets of the group.

    Args:
        preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
        target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft targets,
            floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
        group: Integers in `[0, num_groups)`, broadcastable to `target` (without classes). Those of targets that are not
            scored may be anything. With `shift=True` they are those of the labels, the first of which is not scored.
        weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape (for
            soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep them well
            above it: what is below some 1e-12 has few bits left. None for 1.
        num_groups: How many groups there are.
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        class_weight: A weight for each class, as `weight` in `F.cross_entropy`: the denominator is the sum of
            `class_weight[target] * weight` for class indices, of `weight` for soft targets.
        label_smoothing: `a` in the target `(1 - a) * onehot + a / K`, as in `F.cross_entropy`.
        label_smoothing_over: `"all"` for that; `"others"` for the convention that leaves `1 - b` on the true class and
            gives every other one `b / (K - 1)`: with `label_smoothing=0.1` and three classes, `[0.9, 0.05, 0.05]`. It
            is `"all"` with `a = b * K / (K - 1)`; see `xent_metrics.functional.convert_label_smoothing`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        shift: Let position t of `preds` score target t + 1, for logits and labels as Hugging Face models have them. The
            time is the last dimension of `target` (not counting classes).
        unit: `"nats"`, or `"bits"`, which divides by ln 2.
        average: `"none"` for the value of each group, `"macro"` for their unweighted mean, over groups with targets.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` raises on the CPU, and reads NaN elsewhere. Losses of `2**94` nats or more count as
            infinite. It holds for each group by itself (`"raise"` for all).
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer; `"compile"` compiles that with
            `torch.compile` when it is first needed; `"auto"` is `"eager"`, but a part of a function that you compile.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `group` and `weight`:
        broadcastable to `(...)`.

    Returns:
        A float64 tensor (float32 where the device has no float64) of shape `(num_groups,)`, in `unit`, without a graph;
        NaN for groups without targets. With `average="macro"` a scalar; NaN without targets.

    Raises:
        TypeError: If a dtype is not one of those named, or `group` does not hold integers.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target is neither a class nor `ignore_index`, a probability is outside [0, 1], a weight is negative,
            infinite or NaN, or a loss is not finite under `nan_policy="raise"` (elsewhere the value is NaN). Also, on
            the CPU, if a scored target has none of the groups.

    Source:
        Shannon, A Mathematical Theory of Communication, 1948; by position, Khandelwal et al., Sharp nearby, fuzzy far
        away, 2018.

    >>> grouped_cross_entropy(torch.zeros(3, 8), torch.tensor([0, 1, 2]), group=torch.tensor([0, 2, 2]), num_groups=3)
    tensor([2.0794,    nan, 2.0794], dtype=torch.float64)
    """
    check_unit(unit)
    check_average(average)
    num_groups = as_num_classes("num_groups", num_groups)
    check_class_weight(class_weight, input)
    check_reading(nan_policy)
    options = LossOptions(
        input=input,
        class_dim=class_dim,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        eps=eps,
        label_smoothing_over=label_smoothing_over,
        shift=shift,
        backend=backend,
    )
    batch = tally_grouped(
        preds, target, group=group, weight=weight, options=options, num_groups=num_groups, class_weight=class_weight
    )
    value: Tensor = _averaged(read_batch(batch, nan_policy), average, unit)
    return value
