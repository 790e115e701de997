"""Losses of yes-or-no targets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xent_metrics import _runtime
from xent_metrics._validate import check_binary
from xent_metrics.losses import kernels
from xent_metrics.losses.compiled import compiles, run
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import BinaryOptions
from xent_metrics.losses.target_losses import PROBABILITY_OUT_OF_RANGE, TARGET_OUT_OF_RANGE, TargetLosses, mark
from xent_metrics.losses.targets import as_index, ignored_status


def binary_losses(
    preds: Tensor, target: Tensor, options: BinaryOptions, pos_weight: Tensor | None = None
) -> TargetLosses:
    """Compute `-(pos_weight * y * log p + (1 - y) * log(1 - p))` of every target.

    Both logarithms come from the score itself, never from `1 - p`, and one whose coefficient is 0 adds nothing, so
    that a confident and right prediction costs 0 and a wrong one what it should, up to infinity.

    Args:
        preds: Logits, or probabilities of 1.
        target: 0 and 1 in any dtype, or soft labels between them; of `preds`' shape.
        options: How losses are made.
        pos_weight: Weight of the positive term, broadcastable to `target`.

    Raises:
        TypeError: If a dtype is not one of those named above.
        ValueError: If shapes or devices do not fit.
    """
    if isinstance(preds, LinearLogits):
        raise TypeError(
            "`preds` must be a tensor with yes-or-no targets, got LinearLogits; pass F.linear(hidden, weight, bias), "
            "which is no larger than the targets."
        )
    check_binary(preds, target, pos_weight)
    if not target.is_floating_point():
        target = as_index(target)  # Unsigned integers cannot be compared.
    with torch.no_grad():
        status = _binary_status(target, options)
        rows: tuple[Tensor | None, ...] = preds, target, pos_weight
        if compiles(options.backend):  # For one dimension, whatever the shape.
            rows = tuple(None if x is None else x.expand(target.shape).reshape(-1) for x in rows)
        constants: dict[str, Any] = {"input": options.input, "eps": options.eps, "smoothing": options.label_smoothing}
        loss, improper = run(options.backend, _kernel, rows, [], **constants)
        if improper is not None and not (_runtime.can_read_values(improper) and not improper.any()):
            status = mark(status, PROBABILITY_OUT_OF_RANGE, improper.view(target.shape))
        losses = TargetLosses(loss.to(_runtime.widest_float(loss.device)), None, status)
        return losses.map(lambda x: x.reshape(-1)).as_sequences(target.shape)


def _binary_status(target: Tensor, options: BinaryOptions) -> Tensor | None:
    """Return the status of targets that may be ignored, or outside [0, 1]; None if all are scored."""
    status = ignored_status(target, options)
    wide = target.dtype in (torch.float32, torch.float64, torch.int64)
    extremes = _runtime.least_and_greatest(target if wide else target.to(torch.float32))
    if extremes and extremes[0] >= 0 and extremes[1] <= 1:
        return status
    return mark(status, TARGET_OUT_OF_RANGE, ~((target >= 0) & (target <= 1)))  # Where it is a NaN, too.


def _kernel(
    preds: Tensor, target: Tensor, pos_weight: Tensor | None, *, input: str, eps: float | None, smoothing: float
) -> kernels.Results:
    """Return the loss of each yes-or-no target, and which probabilities are outside [0, 1]; all of one shape."""
    scores = preds.to(kernels.score_dtype(preds))
    # A rounded difference would be multiplied by a logit. Of 0 and 1, the only ones that integers can be, it is exact.
    exact = not smoothing and not target.is_floating_point() and pos_weight is None
    dtype = scores.dtype if exact else _runtime.widest_float(scores.device)
    positive = target.to(dtype)
    negative = 1 - positive
    if smoothing:
        positive, negative = (x * (1 - smoothing) + smoothing / 2 for x in (positive, negative))
    if pos_weight is not None:
        positive = positive * pos_weight.to(dtype)
    improper = None
    if input == "logits":
        log_p, log_q = F.logsigmoid(scores), F.logsigmoid(-scores)
    else:
        improper = (scores < 0) | (scores > 1)
        log_p, log_q = kernels.clip_logarithms(scores.log(), eps), kernels.clip_logarithms(torch.log1p(-scores), eps)
    log_p, log_q = log_p.to(dtype), log_q.to(dtype)
    for log, coefficient in ((log_p, positive), (log_q, negative)):
        extremes = _runtime.least_and_greatest(log.mul_(coefficient))
        if extremes and extremes[0] > -math.inf:
            continue  # Not even a NaN: all logarithms were finite, and 0 times each of them is 0.
        log.masked_fill_(coefficient == 0, 0.0)
    return torch.neg(log_p + log_q), improper
