"""The arithmetic of losses: from rows of scores to one loss each, in nats, one kernel for each kind of target.

A kernel that runs eagerly gets a few rows at a time, and a buffer that is used again for the next ones. Compiled, it
gets all rows at once and no buffer: the compiler fuses its steps. It then returns sums over a row (the `partials`), and
the losses are made of them outside.

Either way a row has the same bits among any others. So rows are contiguous and at least two: threads would share the
`sum` over a long row that is alone, and round it differently. And compiled code takes no logarithm of single rows: it
has one for several of them at a time and another for what is left, which differ in the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xent_metrics import _runtime
from xent_metrics.losses.options import Input, LossOptions

Results = tuple[Any, ...]
"""What a kernel returns of rows: losses first, then masks, or None for nowhere."""


def loss_dtype(preds: Any) -> torch.dtype:
    """Return the dtype that losses of `preds` are computed in: float64 for float64, float32 for the rest."""
    return torch.float64 if preds.dtype == torch.float64 else torch.float32


def nll(
    scores: Tensor,
    index: Tensor,
    buffer: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smooth: bool,
) -> Results:
    """Return the loss `-log q[index]` of each row, a sum over its classes, and whether it is improper.

    The sum is `sum_k class_weight[k] * log q[k]`; None unless `smooth`. A row of probabilities is improper if one of
    them is outside [0, 1]; None for other input.

    Args:
        scores: Two rows or more, one score a class.
        index: The class of each row.
        buffer: Of the shape of `scores`, to be written to; it may be `scores`. None to make what is needed.
        class_weight: Of every class.
        input: What the scores are.
        eps: Where to clip probabilities.
        smooth: Whether the sum over all classes is wanted.
    """
    log_probs, improper = _log_probs(scores, buffer, input, eps)
    loss = F.nll_loss(log_probs, index, reduction="none")
    if smooth:
        weigh(log_probs, class_weight)
    return loss, log_probs.sum(1) if smooth else None, improper


def nll_partials(
    scores: Tensor,
    index: Tensor,
    top: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smooth: bool,
) -> Results:
    """Return the sums of which `nll_from_partials` makes losses; a compiler makes them while it reads the scores.

    Args:
        scores: Two rows or more, one score a class.
        index: The class of each row.
        top: The largest logit of each row, if some of them are on other ranks.
        class_weight: Of every class.
        input: What the scores are.
        eps: Where to clip probabilities.
        smooth: Whether the sum over all classes is wanted.

    Returns:
        For each row: its score at `index`, for logits relative to the largest one; the sum of the exponentials of those
        relative logits, or None for other input; the sum over all classes, if asked to; and whether it is improper.
    """
    scores, exponentials, improper = _relative(scores, top, input, eps)
    of_target, of_all = scores.gather(1, index.unsqueeze(1)).squeeze(1), None
    if smooth:
        if input == "probs":
            scores.log_()
        weigh(scores, class_weight)
        of_all = scores.sum(1)
    return of_target, exponentials, of_all, improper


def nll_from_partials(
    of_target: Tensor,
    exponentials: Tensor | None,
    of_all: Tensor | None,
    improper: Tensor | None,
    *,
    input: Input,
    weight_of_all: float | Tensor,
) -> Results:
    """Return the results of `nll`, from those of `nll_partials` and the sum of the class weights."""
    if exponentials is None:
        return (of_target.log() if input == "probs" else of_target).neg(), of_all, improper
    log_sum = exponentials.log()
    return log_sum - of_target, None if of_all is None else of_all - _times(log_sum, weight_of_all), improper


def weigh_and_smooth(
    loss: Tensor, of_all: Tensor | None, denominator: Tensor | None, smoothing: float, num_classes: int
) -> Tensor:
    """Apply class weights and label smoothing, in place, to the results of `nll`."""
    if denominator is not None:
        loss.mul_(denominator).masked_fill_(denominator == 0, 0.0)
    if of_all is not None:
        loss.mul_(1 - smoothing) if smoothing < 1 else loss.zero_()  # Not 0 * inf.
        loss.sub_(of_all, alpha=smoothing / num_classes)
    return loss


def finish_nll(
    results: Results, denominator: Tensor | None, class_weight: Tensor | None, num_classes: int, options: LossOptions
) -> tuple[Tensor, Tensor | None]:
    """Return losses, and which rows have improper probabilities, from the results of either kernel for indices."""
    if len(results) > 3:  # Of the one that leaves logarithms to be taken.
        weight_of_all = num_classes if class_weight is None else class_weight.sum()
        results = nll_from_partials(*results, input=options.input, weight_of_all=weight_of_all)
    loss, of_all, improper = results
    return weigh_and_smooth(loss, of_all, denominator, options.smoothing(num_classes), num_classes), improper


def soft_nll(
    scores: Tensor,
    target: Tensor,
    buffer: Tensor | None,
    target_buffer: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smoothing: float,
    excess: float,
) -> Results:
    """Return the loss of each row for a soft target; whether that is no distribution; and whether the row is improper.

    Args:
        scores: Two rows or more, one score a class.
        target: One probability a class.
        buffer: Of the shape of `scores`, to be written to; it may be `scores`. None to make what is needed.
        target_buffer: The same for `target`.
        class_weight: Of every class.
        input: What the scores are.
        eps: Where to clip probabilities.
        smoothing: The share of a target that is spread over all classes.
        excess: How far the sum of a distribution may be from 1.
    """
    log_probs, improper = _log_probs(scores, buffer, input, eps)
    coefficient, none = _coefficients(target, target_buffer, log_probs.dtype, class_weight, smoothing, excess)
    weigh(log_probs, coefficient)
    return log_probs.sum(1).neg_(), none, improper


def soft_nll_partials(
    scores: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smoothing: float,
    excess: float,
) -> Results:
    """Return the sums of which `soft_nll_from_partials` makes losses, for a compiler."""
    scores, exponentials, improper = _relative(scores, None, input, eps)
    if input == "probs":
        scores.log_()
    coefficient, none = _coefficients(target, None, scores.dtype, class_weight, smoothing, excess)
    weigh(scores, coefficient)
    return scores.sum(1), exponentials, coefficient.sum(1), none, improper


def soft_nll_from_partials(
    of_all: Tensor, exponentials: Tensor | None, weight_of_all: Tensor, none: Tensor, improper: Tensor | None
) -> Results:
    """Return the results of `soft_nll`, from those of `soft_nll_partials`."""
    loss = of_all.neg() if exponentials is None else _times(exponentials.log(), weight_of_all) - of_all
    return loss, none, improper


def entropy(target: Tensor, buffer: Tensor | None = None, *, smoothing: float) -> Results:
    """Return the entropy of each row, a distribution."""
    probs = _copied(target, buffer, loss_dtype(target))
    if smoothing:
        probs.mul_(1 - smoothing).add_(smoothing / probs.shape[1])
    return (torch.special.entr(probs).sum(1),)


def binary(
    preds: Tensor, target: Tensor, pos_weight: Tensor | None, *, input: Input, eps: float | None, smoothing: float
) -> Results:
    """Return the loss of each yes-or-no target, and which probabilities are outside [0, 1]; all of one shape."""
    scores = preds.to(loss_dtype(preds))
    positive = target.to(scores.dtype)
    if smoothing:
        positive = positive.mul(1 - smoothing).add(smoothing / 2)
    negative = 1 - positive
    if pos_weight is not None:
        positive = positive * pos_weight.to(scores.dtype)
    improper = None
    if input == "logits":
        log_p, log_q = F.logsigmoid(scores), F.logsigmoid(-scores)
    else:
        improper = (scores < 0) | (scores > 1)
        log_p, log_q = scores.log(), torch.log1p(-scores)
        if eps is not None:
            bounds = math.log(eps), math.log1p(-eps)
            log_p, log_q = log_p.clamp(*bounds), log_q.clamp(*bounds)
    for log, coefficient in ((log_p, positive), (log_q, negative)):
        extremes = _runtime.least_and_greatest(log.mul_(coefficient))
        if extremes and extremes[0] > -math.inf:
            continue  # Not even a NaN: all logarithms were finite, and 0 times each of them is 0.
        log.masked_fill_(coefficient == 0, 0.0)
    return torch.neg(log_p + log_q), improper


def _times(log_sum: Tensor, weight: float | Tensor) -> Tensor:
    """Multiply; a weight of 0 gives 0, also of an infinity."""
    product = log_sum * weight
    return product.masked_fill_(weight == 0, 0.0) if isinstance(weight, Tensor) else product


def weigh(log_probs: Tensor, coefficient: Tensor | None) -> None:
    """Multiply in place; a class of coefficient 0 adds nothing, even where its log-probability is `-inf`."""
    if coefficient is not None:
        log_probs.mul_(coefficient).masked_fill_(coefficient == 0, 0.0)


def _relative(
    scores: Tensor, top: Tensor | None, input: Input, eps: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a copy of the scores: logits relative to the largest of a row, with the sum of their exponentials."""
    scores = scores.to(loss_dtype(scores), copy=True)
    if input != "logits":
        return scores, None, _clip(scores, eps) if input == "probs" else None
    scores.sub_((scores.amax(1) if top is None else top).unsqueeze(1))
    return scores, scores.exp().sum(1), None


def _coefficients(
    target: Tensor,
    buffer: Tensor | None,
    dtype: torch.dtype,
    class_weight: Tensor | None,
    smoothing: float,
    excess: float,
) -> tuple[Tensor, Tensor]:
    """Return what log-probabilities are multiplied by for soft targets, and which targets are not distributions."""
    probs = _copied(target, buffer, dtype)
    # A NaN compares false with everything, so a row that has one is not a distribution.
    distribution = (probs.amin(1) >= 0) & ((probs.sum(1) - 1).abs() <= excess)
    if smoothing:
        probs.mul_(1 - smoothing).add_(smoothing / probs.shape[1])
    if class_weight is not None:
        probs.mul_(class_weight)
    return probs, ~distribution


def _log_probs(scores: Tensor, buffer: Tensor | None, input: Input, eps: float | None) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities, and for probabilities which rows have some outside [0, 1]."""
    if input == "logits":
        return torch.log_softmax(scores, 1, loss_dtype(scores), out=buffer), None
    probs = _copied(scores, buffer, loss_dtype(scores))
    if input == "log_probs":
        return probs, None
    improper = _clip(probs, eps)
    return probs.log_(), improper


def _clip(probs: Tensor, eps: float | None) -> Tensor:
    """Clip probabilities in place; return which rows had some outside [0, 1]."""
    outside = (probs < 0).logical_or_(probs > 1)  # Not amin: a NaN would hide the others.
    if eps is not None:
        probs.clamp_(eps, 1 - eps)
    return outside.any(1)


def _copied(values: Tensor, buffer: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a copy, in a buffer if there is one, that may be written to."""
    if buffer is None:
        return values.to(dtype, copy=True)
    return values if values is buffer else buffer.copy_(values)
