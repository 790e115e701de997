"""Binary cross-entropy."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._rounding import Unit
from xent_metrics._validate import check_pos_weight, on_host
from xent_metrics.losses.binary import binary_losses
from xent_metrics.losses.mistakes import raise_mistakes
from xent_metrics.losses.options import Backend, BinaryInput, BinaryOptions, LossOptions
from xent_metrics.losses.score import as_weights
from xent_metrics.metrics.base import TallyMetric
from xent_metrics.metrics.batch_tallies import read_batch
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import NanPolicy, Reading, check_reading, check_unit
from xent_metrics.tally import Tally, tally_losses


def tally_binary(
    preds: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    options: BinaryOptions,
    pos_weight: Tensor | None = None,
) -> Tally:
    """Tally a batch of binary predictions."""
    with _runtime.no_graph():
        losses = binary_losses(preds, target, options, pos_weight)
        # Every label is a target, also if it is a float.
        weights = None if weight is None else as_weights(weight, target.shape, LossOptions(), losses)
        losses = losses.weighted(weights)
        raise_mistakes(losses, preds, target, options, weights)
        return tally_losses(losses)


class BinaryCrossEntropy(TallyMetric):
    """Binary cross-entropy (log loss) over all the data at once, of one label or of many.

    `sum(weight * loss) / sum(weight)` with `loss = -(pos_weight * y * log p + (1 - y) * log(1 - p))`: the value of
    `F.binary_cross_entropy_with_logits` on all batches of all ranks concatenated, and of `F.binary_cross_entropy` for
    probabilities. Unlike the latter, which takes no logarithm below -100, it is infinite where a probability of 0 or 1
    was wrong, unless `eps` asks for clipping.

    Args:
        input: What `preds` holds: `"logits"`, or `"probs"`, the probabilities of 1.
        pos_weight: Weight of the positive term, broadcastable to `target`: one, or one for each label (column).
        label_smoothing: `a` in the target `(1 - a) * y + a / 2`.
        ignore_index: The target that is not scored, such as -1; None scores all.
        eps: Clip probabilities to `[eps, 1 - eps]`, as the textbook form does; None clips nothing.
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
        `preds` and `target`: any one shape, `(N,)` or `(N, labels)`; `weight`: broadcastable to it.

    Returns:
        A float64 scalar (float32 where the device has no float64), in `unit`. NaN without targets.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Good, Rational decisions, 1952; Bishop, Pattern Recognition and Machine Learning, 2006, equation 4.90.

    >>> metric = BinaryCrossEntropy(input="probs")
    >>> metric.update(torch.tensor([0.1, 0.9, 0.2]), torch.tensor([1, 0, 1]))
    >>> metric.compute()  # -(log(0.1) + log(0.1) + log(0.2)) / 3
    tensor(2.0715, dtype=torch.float64)
    """

    _QUANTITY, _UNIT = "binary cross-entropy", "nats"
    _TARGETS = "0 and 1, or soft labels between them"
    _tally_function = staticmethod(tally_binary)

    def __init__(
        self,
        *,
        input: BinaryInput = "logits",
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        eps: float | None = None,
        unit: Unit = "nats",
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_unit(unit)
        check_pos_weight(on_host(pos_weight))
        options = BinaryOptions(
            input=input, label_smoothing=label_smoothing, ignore_index=ignore_index, eps=eps, backend=backend
        )
        super().__init__(options, nan_policy, {"pos_weight": pos_weight}, **kwargs)
        self.unit = unit

    def update(self, preds: Tensor, target: Tensor, *, weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: Logits or probabilities: float16, bfloat16, float32 or float64.
            target: 0 and 1 of any dtype, or soft labels between them; of `preds`' shape.
            weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to `target`. None
                for 1.

        Raises:
            TypeError: If a dtype is not one of those named.
            ValueError: If shapes or devices do not fit; on the CPU also if a target or a probability is outside [0, 1],
                or a weight is negative, infinite or NaN (elsewhere `compute` raises). The state is then as it was.
        """
        self._add_batch(preds, target, weight=weight)

    def _read(self, reading: Reading[Any, Any]) -> Tensor:  # type: ignore[override]
        return self._as_tensor(reading.in_unit(self.unit))


@outside_transforms
def binary_cross_entropy(
    preds: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    input: BinaryInput = "logits",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    eps: float | None = None,
    unit: Unit = "nats",
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Binary cross-entropy (log loss) of all targets at once, of one label or of many.

    `sum(weight * loss) / sum(weight)` with `loss = -(pos_weight * y * log p + (1 - y) * log(1 - p))`: the value of
    `F.binary_cross_entropy_with_logits` on all batches of all ranks concatenated, and of `F.binary_cross_entropy` for
    probabilities. Unlike the latter, which takes no logarithm below -100, it is infinite where a probability of 0 or 1
    was wrong, unless `eps` asks for clipping.

    Args:
        preds: Logits or probabilities: float16, bfloat16, float32 or float64.
        target: 0 and 1 of any dtype, or soft labels between them; of `preds`' shape.
        weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to `target`. None for
            1.
        input: What `preds` holds: `"logits"`, or `"probs"`, the probabilities of 1.
        pos_weight: Weight of the positive term, broadcastable to `target`: one, or one for each label (column).
        label_smoothing: `a` in the target `(1 - a) * y + a / 2`.
        ignore_index: The target that is not scored, such as -1; None scores all.
        eps: Clip probabilities to `[eps, 1 - eps]`, as the textbook form does; None clips nothing.
        unit: `"nats"`, or `"bits"`, which divides by ln 2.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` raises on the CPU, and reads NaN elsewhere. Losses of `2**94` nats or more count as
            infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer; `"compile"` compiles that with
            `torch.compile` when it is first needed; `"auto"` is `"eager"`, but a part of a function that you compile.

    Shapes:
        `preds` and `target`: any one shape, `(N,)` or `(N, labels)`; `weight`: broadcastable to it.

    Returns:
        A float64 scalar (float32 where the device has no float64) without a graph: it measures, it does not train. In
        `unit`; NaN without targets.

    Raises:
        TypeError: If a dtype is not one of those named.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target or a probability is outside [0, 1], a weight is negative, infinite or NaN, or a loss is not finite
            under `nan_policy="raise"` (elsewhere the value is NaN).

    Source:
        Good, Rational decisions, 1952; Bishop, Pattern Recognition and Machine Learning, 2006, equation 4.90.

    >>> binary_cross_entropy(torch.tensor([0.99, 0.01, 0.99]), torch.tensor([1, 0, 1]), input="probs")
    tensor(0.0101, dtype=torch.float64)
    """
    check_unit(unit)
    check_pos_weight(pos_weight)
    check_reading(nan_policy)
    options = BinaryOptions(
        input=input, label_smoothing=label_smoothing, ignore_index=ignore_index, eps=eps, backend=backend
    )
    batch = tally_binary(preds, target, weight=weight, options=options, pos_weight=pos_weight)
    return read_batch(batch, nan_policy).in_unit(unit)
