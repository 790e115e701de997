"""Cross-entropy; also the losses that it is the mean of, and the tally that it is read from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._rounding import Unit
from xent_metrics._validate import check_class_weight, on_host
from xent_metrics.losses.dense import target_losses
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import raise_mistakes
from xent_metrics.losses.options import Backend, Input, LossOptions, SmoothingOver
from xent_metrics.losses.score import as_sequence, score_batch, target_shape
from xent_metrics.losses.target_losses import IGNORED, SCORED
from xent_metrics.metrics.base import LossMetric
from xent_metrics.metrics.batch_tallies import read_batch, tally_scored
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import NanPolicy, Reading, check_reading, check_unit
from xent_metrics.tally import Tally

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def tally_batch(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    options: LossOptions,
    class_weight: Tensor | None = None,
    token_bytes: Tensor | None = None,
    sequence_group: ProcessGroup | None = None,
    sequence: Tensor | None = None,
) -> Tally:
    """Tally a batch by weight; with `token_bytes`, a second tally stands beside that, by bytes."""
    batch = score_batch(preds, target, weight, options, class_weight, token_bytes)
    ids = None if sequence is None else as_sequence(sequence, target, options, batch.per_token, sequence_group)
    return tally_scored(batch, sequence_group, ids)


class CrossEntropyMetric(LossMetric):
    """A metric that reads the tally of `tally_batch`: they share it, whatever they read of it."""

    _tally_function = staticmethod(tally_batch)

    def update(
        self,
        preds: Tensor | LinearLogits,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sequence: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
            target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft
                targets, floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
            weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape
                (for soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep
                them well above it: what is below some 1e-12 has few bits left.
            sequence: Integers, broadcastable to target's shape (for soft targets, to that without the class dimension):
                targets of this update with the same number belong to one sequence, as the documents in packed rows do.
                `xent_metrics.sequence_ids` makes them of `cu_seqlens`. None if each row of `target` is a sequence.

        Raises:
            TypeError: If a dtype is not one of those named.
            ValueError: If shapes or devices do not fit; on the CPU also if a target is neither a class nor
                `ignore_index`, a probability is outside [0, 1], or a weight is negative, infinite or NaN (elsewhere
                `compute` raises). The state is then as it was.
        """
        self._add_batch(preds, target, weight=weight, sequence=sequence)


class CrossEntropy(CrossEntropyMetric):
    """Cross-entropy of a model's distribution and the targets, over all the data at once.

    `H = sum(weight * loss) / sum(weight)` with `loss = -log q[target]`, the value of `F.cross_entropy` on all batches
    of all ranks concatenated. The mean of batch means, which loops usually log, is another number as soon as batches
    differ in their number of targets.

    Sums are exact integers, so the value is the same to the last bit for any batch size, order or number of ranks,
    given the same losses.

    Args:
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
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

        Logits may be a DTensor that is sharded over the classes, as `ColwiseParallel(use_local_output=False)` gives, or
        `DTensor.from_local(part, tensor_mesh, [Shard(-1)])`, with `shape=` and `stride=` of the whole if the last part
        is smaller. They are never gathered: an update exchanges the largest logit of each row, and then three numbers
        of each. Losses then agree with those of whole rows to 1e-6.

    Returns:
        A float64 scalar (float32 where the device has no float64), in `unit`. NaN without targets.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Shannon, A Mathematical Theory of Communication, 1948; Goodfellow et al., Deep Learning, section 3.13.

    >>> metric = CrossEntropy()
    >>> metric.update(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    >>> metric.compute()  # log(e**2 + e**1 + e**0.1) - 2
    tensor(0.4170, dtype=torch.float64)
    """

    def __init__(
        self,
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
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_unit(unit)
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
        super().__init__(options, nan_policy, {"class_weight": class_weight}, **kwargs)
        self.unit = unit

    def _read(self, reading: Reading[Any, Any]) -> Tensor:  # type: ignore[override]
        return self._as_tensor(reading.in_unit(self.unit))


@outside_transforms
def cross_entropy(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
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
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of all targets at once: the sum of `weight * loss` over the sum of `weight`.

    Args:
        preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
        target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft targets,
            floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
        weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape (for
            soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep them well
            above it: what is below some 1e-12 has few bits left. None for 1.
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
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` raises on the CPU, and reads NaN elsewhere. Losses of `2**94` nats or more count as
            infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer; `"compile"` compiles that with
            `torch.compile` when it is first needed; `"auto"` is `"eager"`, but a part of a function that you compile.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        A float64 scalar (float32 where the device has no float64) without a graph: it measures, it does not train. In
        `unit`; NaN without targets.

    Raises:
        TypeError: If a dtype is not one of those named.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target is neither a class nor `ignore_index`, a probability is outside [0, 1], a weight is negative,
            infinite or NaN, or a loss is not finite under `nan_policy="raise"` (elsewhere the value is NaN).

    Source:
        Shannon, A Mathematical Theory of Communication, 1948; Goodfellow et al., Deep Learning, section 3.13.

    >>> cross_entropy(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    tensor(0.4170, dtype=torch.float64)
    """
    check_unit(unit)
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
    return read_batch(
        tally_batch(preds, target, weight=weight, options=options, class_weight=class_weight), nan_policy
    ).in_unit(unit)


@outside_transforms
def per_target_losses(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Loss of every target in nats, as `F.cross_entropy(..., reduction="none")` but without its copies of the logits.

    Args:
        preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
        target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft targets,
            floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
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
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer; `"compile"` compiles that with
            `torch.compile` when it is first needed; `"auto"` is `"eager"`, but a part of a function that you compile.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        Losses of target's shape (for soft targets, without the class dimension), float64, or float32 on devices that
        have no float64; 0 where the target is ignored. Without a graph; empty without targets.

    Raises:
        TypeError: If a dtype is not one of those named.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target or a probability is out of range (elsewhere its loss is NaN).

    Source:
        Shannon, A Mathematical Theory of Communication, 1948; Goodfellow et al., Deep Learning, section 3.13.

    >>> per_target_losses(torch.tensor([[2.0, 1.0, 0.1], [0.0, 0.0, 0.0]]), torch.tensor([0, -100]))
    tensor([0.4170, 0.0000], dtype=torch.float64)
    """
    options = LossOptions(
        input=input,
        class_dim=class_dim,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        eps=eps,
        label_smoothing_over=label_smoothing_over,
        backend=backend,
    )
    check_class_weight(class_weight, input)
    losses = target_losses(preds, target, options, class_weight)
    raise_mistakes(losses, preds, target, options, counted=False)
    loss, status = losses.loss, losses.status
    if status is not None:
        loss = loss.masked_fill(status == IGNORED, 0.0).masked_fill((status != SCORED) & (status != IGNORED), math.nan)
    if input == "losses":
        # They may be those of the caller, with their graph.
        loss = loss.detach().to(_runtime.widest_float(loss.device), copy=True)
    return loss.reshape(target_shape(target, options))


@outside_transforms
def tally(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    sequence: Tensor | None = None,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    backend: Backend = "auto",
) -> Tally:
    """Exact sums and counts of a batch, to be kept, sent, or added to other tallies with `+`.

    Args:
        preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
        target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft targets,
            floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
        weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape (for
            soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep them well
            above it: what is below some 1e-12 has few bits left. None for 1.
        sequence: Integers, broadcastable to target's shape (for soft targets, to that without the class dimension):
            targets with the same number belong to one sequence, as the documents in packed rows do. None if each row of
            `target` is a sequence.
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
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer; `"compile"` compiles that with
            `torch.compile` when it is first needed; `"auto"` is `"eager"`, but a part of a function that you compile.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        A `xent_metrics.Tally`, the state that `CrossEntropy` keeps; without targets, the tally of nothing.

    Raises:
        TypeError: If a dtype is not one of those named.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target is neither a class nor `ignore_index`, a probability is outside [0, 1], or a weight is negative,
            infinite or NaN (elsewhere they are counted).

    Source:
        Shannon, A Mathematical Theory of Communication, 1948; Goodfellow et al., Deep Learning, section 3.13.

    >>> batch = tally(torch.zeros(4, 8), torch.tensor([0, 1, 2, -100]))
    >>> (batch + batch).totals().scored
    6
    """
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
    check_class_weight(class_weight, input)
    batch = tally_batch(preds, target, weight=weight, options=options, class_weight=class_weight, sequence=sequence)
    return Tally.zero(batch.state.device) + batch
