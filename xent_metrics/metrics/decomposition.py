"""What of a cross-entropy is entropy, and what is divergence."""

from __future__ import annotations

import math
from typing import Any

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import check_distributions
from xent_metrics.losses.dense import target_entropies
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import Backend, Input, LossOptions, SmoothingOver
from xent_metrics.losses.score import score_batch
from xent_metrics.losses.target_losses import IGNORED, LIMIT, TargetLosses
from xent_metrics.metrics.base import LossMetric
from xent_metrics.metrics.batch_tallies import read_batch
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import DeviceReading, NanPolicy, check_reading
from xent_metrics.tally import Tally, tally_losses


def tally_decomposition(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    options: LossOptions,
) -> Tally:
    """Tally three losses of a batch side by side.

    They are the cross-entropies, the entropies where those are finite, and the entropies where they are not, so that
    a reading may leave out the same targets from both.
    """
    with _runtime.no_graph():
        losses = score_batch(preds, target, weight, options).per_token
        loss = target_entropies(preds, target, options).view_as(losses.loss)
        weighted = loss if losses.denominator is None else loss * losses.denominator
        entropies = TargetLosses(weighted, losses.denominator, losses.status)
        finite = losses.loss.abs() < LIMIT
        parts = (losses, entropies.marked(IGNORED, ~finite), entropies.marked(IGNORED, finite))
        return Tally.stack(*(tally_losses(part) for part in parts))


def _total_and_entropy(tally: Tally, nan_policy: NanPolicy) -> tuple[Tally, Tally]:
    """Choose what the cross-entropy is read from, and what the entropy of the targets is read from."""
    total, entropy, entropy_of_nonfinite = tally.unbind()
    return total, entropy if nan_policy == "omit" else entropy + entropy_of_nonfinite


def _decompose(total: Any, entropy: Any) -> dict[str, Any]:
    """Return cross-entropy, entropy and their difference, from exact readings of the two or from ones on the device."""
    cross_entropy, own = total.mean, entropy.mean
    if isinstance(total, DeviceReading) and total.nan_policy == "raise":
        own = own.masked_fill(total.num_nonfinite > 0, math.nan)
    return {"cross_entropy": cross_entropy, "entropy": own, "kl_divergence": cross_entropy - own}


class CrossEntropyDecomposition(LossMetric):
    """What of a cross-entropy is the targets' own entropy, and what is the model's divergence from them.

    `H(P, Q) = H(P) + KL(P || Q)`, each a mean over targets in nats: P is a soft target, or a smoothed class index, and
    Q the model's distribution. No model gets below `entropy`; `kl_divergence` is what it could still gain, the value of
    `torch.nn.KLDivLoss(reduction="batchmean")` on all the data at once. It is the difference of the exact means, so the
    equation holds to the last bits, and for a model equal to P it is 0 up to rounding of the losses (some 1e-7 nats for
    float32, of either sign).

    For class indices without smoothing the entropy is 0. `nan_policy="omit"` leaves the same targets out of all three.

    Args:
        input: What `preds` holds: `"logits"`, `"log_probs"`, or `"probs"` (not renormalised). `"losses"` is refused: it
            tells nothing of the entropy.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        label_smoothing: `a` in the target `(1 - a) * onehot + a / K`, as in `F.cross_entropy`.
        label_smoothing_over: `"all"` for that; `"others"` for the convention that leaves `1 - b` on the true class and
            gives every other one `b / (K - 1)`: with `label_smoothing=0.1` and three classes, `[0.9, 0.05, 0.05]`. It
            is `"all"` with `a = b * K / (K - 1)`; see `xent_metrics.functional.convert_label_smoothing`.
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
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        A dict of float64 scalars (float32 where the device has no float64), in nats: `cross_entropy`, `entropy`,
        `kl_divergence`. NaN without targets.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Kullback and Leibler, On information and sufficiency, 1951; Cover and Thomas, Elements of Information Theory,
        section 2.3.

    >>> metric = CrossEntropyDecomposition()
    >>> metric.update(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]))
    >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}  # log 2, and log(4 / 3) / 2
    {'cross_entropy': 0.837, 'entropy': 0.6931, 'kl_divergence': 0.1438}
    """

    _tally_function = staticmethod(tally_decomposition)

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        label_smoothing: float = 0.0,
        label_smoothing_over: SmoothingOver = "all",
        ignore_index: int | None = -100,
        eps: float | None = None,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_distributions(input)
        options = LossOptions(
            input=input,
            class_dim=class_dim,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            eps=eps,
            label_smoothing_over=label_smoothing_over,
            backend=backend,
        )
        super().__init__(options, nan_policy, None, Tally.zero(num_tallies=3), **kwargs)

    def _parts(self, tally: Tally) -> tuple[Tally, Tally]:
        return _total_and_entropy(tally, self.nan_policy)

    def _read(self, total: Any, entropy: Any) -> dict[str, Tensor]:  # type: ignore[override]
        values = _decompose(total, entropy)
        return self._as_tensors({name: x if isinstance(x, Tensor) else float(x) for name, x in values.items()})


@outside_transforms
def cross_entropy_decomposition(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    input: Input = "logits",
    class_dim: int = -1,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> dict[str, Tensor]:
    """What of a cross-entropy is the targets' own entropy, and what is the model's divergence from them.

    `H(P, Q) = H(P) + KL(P || Q)`, each a mean over targets in nats: P is a soft target, or a smoothed class index, and
    Q the model's distribution. No model gets below `entropy`; `kl_divergence` is what it could still gain, the value of
    `torch.nn.KLDivLoss(reduction="batchmean")` on all the data at once. It is the difference of the exact means, so the
    equation holds to the last bits, and for a model equal to P it is 0 up to rounding of the losses (some 1e-7 nats for
    float32, of either sign).

    For class indices without smoothing the entropy is 0. `nan_policy="omit"` leaves the same targets out of all three.

    Args:
        preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
        target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft targets,
            floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
        weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape (for
            soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep them well
            above it: what is below some 1e-12 has few bits left. None for 1.
        input: What `preds` holds: `"logits"`, `"log_probs"`, or `"probs"` (not renormalised). `"losses"` is refused: it
            tells nothing of the entropy.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        label_smoothing: `a` in the target `(1 - a) * onehot + a / K`, as in `F.cross_entropy`.
        label_smoothing_over: `"all"` for that; `"others"` for the convention that leaves `1 - b` on the true class and
            gives every other one `b / (K - 1)`: with `label_smoothing=0.1` and three classes, `[0.9, 0.05, 0.05]`. It
            is `"all"` with `a = b * K / (K - 1)`; see `xent_metrics.functional.convert_label_smoothing`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` raises on the CPU, and reads NaN elsewhere. Losses of `2**94` nats or more count as
            infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer; `"compile"` compiles that with
            `torch.compile` when it is first needed; `"auto"` is `"eager"`, but a part of a function that you compile.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        A dict of float64 scalars (float32 where the device has no float64), in nats: `cross_entropy`, `entropy`,
        `kl_divergence`. NaN without targets. Without a graph.

    Raises:
        TypeError: If a dtype is not one of those named.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target is neither a class nor `ignore_index`, a probability is outside [0, 1], a weight is negative,
            infinite or NaN, or a loss is not finite under `nan_policy="raise"` (elsewhere the value is NaN).

    Source:
        Kullback and Leibler, On information and sufficiency, 1951; Cover and Thomas, Elements of Information Theory,
        section 2.3.

    >>> values = cross_entropy_decomposition(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
    >>> [round(value.item(), 4) for value in values.values()]
    [0.6931, 0.6931, 0.0]
    """
    check_reading(nan_policy)
    check_distributions(input)
    options = LossOptions(
        input=input,
        class_dim=class_dim,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        eps=eps,
        label_smoothing_over=label_smoothing_over,
        backend=backend,
    )
    batch = tally_decomposition(preds, target, weight=weight, options=options)
    return _decompose(*(read_batch(part, nan_policy) for part in _total_and_entropy(batch, nan_policy)))
