"""Bits per token."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import Backend, Input, LossOptions
from xent_metrics.metrics.batch_tallies import read_batch
from xent_metrics.metrics.cross_entropy import CrossEntropyMetric, tally_batch
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import NanPolicy, Reading, check_reading


class BitsPerToken(CrossEntropyMetric):
    """Cross-entropy in bits: nats over ln 2, the bits that a code built on the model spends on a token.

    Of the model's distribution, hence without label smoothing and class weights.

    Args:
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        shift: Let position t of `preds` score target t + 1, for logits and labels as Hugging Face models have them. The
            time is the last dimension of `target` (not counting classes).
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
        A float64 scalar (float32 where the device has no float64). In bits; NaN without targets.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Shannon, A Mathematical Theory of Communication, 1948, section 9.

    >>> metric = BitsPerToken()
    >>> metric.update(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    >>> metric.compute()  # log2(8): uniform over 8
    tensor(3.0000, dtype=torch.float64)
    """

    _QUANTITY, _UNIT = "bits per token", ""

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        options = LossOptions(
            input=input, class_dim=class_dim, ignore_index=ignore_index, eps=eps, shift=shift, backend=backend
        )
        super().__init__(options, nan_policy, **kwargs)

    def _read(self, reading: Reading[Any, Any]) -> Tensor:  # type: ignore[override]
        return self._as_tensor(reading.bits_per_token)


@outside_transforms
def bits_per_token(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy in bits: nats over ln 2, the bits that a code built on the model spends on a token.

    Of the model's distribution, hence without label smoothing and class weights.

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
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        shift: Let position t of `preds` score target t + 1, for logits and labels as Hugging Face models have them. The
            time is the last dimension of `target` (not counting classes).
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
        bits; NaN without targets.

    Raises:
        TypeError: If a dtype is not one of those named.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target is neither a class nor `ignore_index`, a probability is outside [0, 1], a weight is negative,
            infinite or NaN, or a loss is not finite under `nan_policy="raise"` (elsewhere the value is NaN).

    Source:
        Shannon, A Mathematical Theory of Communication, 1948, section 9.

    >>> bits_per_token(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    tensor(3., dtype=torch.float64)
    """
    check_reading(nan_policy)
    options = LossOptions(
        input=input, class_dim=class_dim, ignore_index=ignore_index, eps=eps, shift=shift, backend=backend
    )
    return read_batch(tally_batch(preds, target, weight=weight, options=options), nan_policy).bits_per_token
