"""The arithmetic of losses: from rows of scores to a few sums over the classes of each row, and to one loss each.

A kernel reads the scores and returns what is left of each row: its largest logit, the sum of the exponentials, the
target's own score. Eagerly it gets a few rows at a time, and a buffer that is used again for the next ones; compiled,
or for a part of the classes on each rank, the same function gets all rows and no buffer. What is then done once for
each target (difference, logarithm, smoothing, class weights) is done in float64, where there is one.

A sum over classes must not lose the many small terms of a long row, which a running float32 sum does, always in the
same direction; see `sum_classes`. And a row has the same bits among any others. So a sum starts at an address that is a
multiple of 16 bytes, for which rows are padded with zeros; rows are contiguous; and they are at least two, as threads
would share the sum over a long row that is alone, and round it differently.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from xent_metrics import _runtime
from xent_metrics.losses.options import Input

Results = tuple[Any, ...]
"""What a kernel returns of rows: one number a row each, or None for what there is not."""

_CHUNK = 64  # As many terms are summed in the dtype of the scores, which costs no more than one sum over all.
_FEWEST_CHUNKS = 2


class RowSums(NamedTuple):
    """What is left of rows of scores over classes.

    Attributes:
        of_target: The score of the target. For soft targets, the sum over classes of coefficient times score, of logits
            relative to the largest one.
        top: The largest logit; None for other input.
        exponentials: The sum of the exponentials of the logits relative to the largest one; None for other input.
        of_all: The sum over classes of class weight times score, of logits relative to the largest one; None unless
            labels are smoothed.
        improper: Whether a probability is outside [0, 1]; None for other input.
    """

    of_target: Tensor
    top: Tensor | None
    exponentials: Tensor | None
    of_all: Tensor | None
    improper: Tensor | None


def score_dtype(preds: Any) -> torch.dtype:
    """Return the dtype that kernels compute in: float64 for float64, float32 for the rest."""
    return torch.float64 if preds.dtype == torch.float64 else torch.float32


def padded_width(num_classes: int) -> int:
    """Return the width of rows that hold so many classes, and zeros: whole chunks, four at a time; or 16 bytes."""
    step = 4 * _CHUNK if num_classes >= _FEWEST_CHUNKS * _CHUNK else 4
    return -(-num_classes // step) * step


def sum_classes(x: Tensor) -> Tensor:
    """Sum each padded row, in float64 where there is one, with an error that does not grow with its length.

    A float64 sum of float32 costs as much as all the rest. So chunks of a row are summed in float32, and their sums in
    float64. Of terms that are not negative, one may be so much larger than the others that its chunk rounds them away:
    `sum_exponentials` looks after that.
    """
    return _sum_with_chunks(x)[0]


def sum_exponentials(logits: Tensor, buffer: Tensor | None) -> Tensor:
    """Sum the exponentials of each row, the largest chunk in float64 as a whole.

    Args:
        logits: None above 0; overwritten if there is a buffer.
        buffer: What they lie in, padded with zeros; None to leave them as they are.
    """
    if buffer is None:  # A compiler would store exponentials that are used twice, and they are as many as the scores.
        padded = _padded(logits, None, -math.inf)
        exponentials = padded.exp()
    else:
        logits.exp_()
        padded = exponentials = buffer
    total, chunks = _sum_with_chunks(exponentials)
    if chunks is None:
        return total
    greatest, where = chunks.max(1)
    terms = padded.view(len(padded), -1, _CHUNK).gather(1, where.view(-1, 1, 1).expand(-1, 1, _CHUNK)).squeeze(1)
    return total + ((terms.exp() if buffer is None else terms).sum(1, dtype=total.dtype) - greatest)


def _sum_with_chunks(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the sum of each row, and those of its chunks, if it has any that are summed by themselves."""
    dtype = _runtime.widest_float(x.device)
    if x.dtype == dtype or x.shape[1] < _FEWEST_CHUNKS * _CHUNK:
        return x.sum(1, dtype=dtype), None
    chunks = x.view(len(x), -1, _CHUNK).sum(2)
    return chunks.sum(1, dtype=dtype), chunks


def _padded(x: Tensor, buffer: Tensor | None, value: float = 0.0) -> Tensor:
    """Return rows, or one, that are padded: those of the buffer that they lie in, if there is one."""
    width = padded_width(x.shape[-1])
    if buffer is None and width > x.shape[-1]:
        return F.pad(x, (0, width - x.shape[-1]), value=value)
    return x if buffer is None else buffer


def _part(buffer: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the part of a buffer that is not padding."""
    return buffer if buffer is None or buffer.shape == x.shape else buffer[:, : x.shape[1]]


def sum_hard(
    scores: Tensor,
    index: Tensor,
    buffer: Tensor | None,
    top: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smooth: bool,
) -> RowSums:
    """Return the sums of each row for a target that is a class.

    Args:
        scores: Two rows or more, one score a class.
        index: The class of each row.
        buffer: Of the shape of `scores`, but padded with zeros, to be written to; `scores` may lie in it. None to make
            what is needed.
        top: The largest logit of each row, if some of them are on other ranks.
        class_weight: Of every class.
        input: What the scores are.
        eps: Where to clip probabilities.
        smooth: Whether the sum over all classes is wanted.
    """
    of_target, improper = scores.gather(1, index.unsqueeze(1)).squeeze(1), None
    if input == "probs":
        improper = ((scores < 0) | (scores > 1)).any(1)  # Not amin: a NaN would hide the others.
    if input != "logits" and not smooth:
        return RowSums(of_target, None, None, None, improper)
    scores, top = _logarithms(scores, buffer, top, input, eps)
    of_all = None
    if smooth:
        padded = _padded(scores, buffer)
        weight = None if class_weight is None else _padded(class_weight.to(scores.dtype), None)
        of_all = sum_classes(padded if weight is None else _weigh(padded, weight))
    return RowSums(of_target, top, None if top is None else sum_exponentials(scores, buffer), of_all, improper)


def losses_of_hard(
    sums: RowSums,
    denominator: Tensor | None,
    class_weight: Tensor | None,
    num_classes: int,
    *,
    input: Input,
    eps: float | None,
    smoothing: float,
) -> Tensor:
    """Return the loss of each row, in float64 where there is one.

    Args:
        sums: What `sum_hard` returned.
        denominator: The class weight of each target; None for 1.
        class_weight: Of every class.
        num_classes: How many there are.
        input: What the scores are.
        eps: Where to clip probabilities.
        smoothing: The share of a target that is spread over all classes.
    """
    of_target = sums.of_target.to(_runtime.widest_float(sums.of_target.device))
    if input == "probs":
        of_target = _clip_logarithms(of_target.log(), eps)
    loss, of_all = -of_target, sums.of_all
    if sums.exponentials is not None and sums.top is not None:
        log_sum = sums.exponentials.log()
        loss = log_sum - (of_target - sums.top)
        if of_all is not None:
            of_all = of_all - _times(log_sum, num_classes if class_weight is None else class_weight.sum())
    if denominator is not None:
        loss.mul_(denominator).masked_fill_(denominator == 0, 0.0)
    if of_all is not None:
        loss.mul_(1 - smoothing) if smoothing < 1 else loss.zero_()  # Not 0 * inf.
        loss.sub_(of_all, alpha=smoothing / num_classes)
    return loss


def sum_soft(
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
    """Return the sums of each row for a target that is a distribution; its coefficients' sum; and whether it is none.

    Args:
        scores: Two rows or more, one score a class.
        target: One probability a class.
        buffer: Of the shape of `scores`, but padded with zeros, to be written to; `scores` may lie in it. None to make
            what is needed.
        target_buffer: The same for `target`.
        class_weight: Of every class.
        input: What the scores are.
        eps: Where to clip probabilities.
        smoothing: The share of a target that is spread over all classes.
        excess: How far the sum of a distribution may be from 1.
    """
    improper = ((scores < 0) | (scores > 1)).any(1) if input == "probs" else None
    coefficient = _copied(target, _part(target_buffer, target), score_dtype(scores))
    total = sum_classes(_padded(coefficient, target_buffer))
    # A NaN compares false with everything, so a row that has one is not a distribution.
    distribution = (coefficient.amin(1) >= 0) & ((total - 1).abs() <= excess)
    if smoothing:
        coefficient.mul_(1 - smoothing).add_(smoothing / coefficient.shape[1])
    if class_weight is not None:
        coefficient.mul_(class_weight.to(coefficient.dtype))
    if smoothing or class_weight is not None:
        total = sum_classes(_padded(coefficient, target_buffer))
    scores, top = _logarithms(scores, buffer, None, input, eps)
    weighed = _weigh(_padded(scores, buffer), _padded(coefficient, target_buffer), out=target_buffer)
    exponentials = None if top is None else sum_exponentials(scores, buffer)
    return *RowSums(sum_classes(weighed), top, exponentials, None, improper), total, ~distribution


def losses_of_soft(sums: RowSums, coefficients: Tensor) -> Tensor:
    """Return the loss of each row, in float64 where there is one, from what `sum_soft` returned."""
    loss = -sums.of_target
    return loss if sums.exponentials is None else loss + _times(sums.exponentials.log(), coefficients)


def entropy(target: Tensor, buffer: Tensor | None = None, *, smoothing: float) -> Results:
    """Return the entropy of each row, a distribution."""
    probs = _copied(target, _part(buffer, target), score_dtype(target))
    if smoothing:
        probs.mul_(1 - smoothing).add_(smoothing / probs.shape[1])
    return (sum_classes(torch.special.entr(_padded(probs, buffer))),)


def binary(
    preds: Tensor, target: Tensor, pos_weight: Tensor | None, *, input: Input, eps: float | None, smoothing: float
) -> Results:
    """Return the loss of each yes-or-no target, and which probabilities are outside [0, 1]; all of one shape."""
    scores = preds.to(score_dtype(preds))
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
        log_p, log_q = _clip_logarithms(scores.log(), eps), _clip_logarithms(torch.log1p(-scores), eps)
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


def _weigh(logarithms: Tensor, coefficient: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply; a class of coefficient 0 adds nothing, even where its logarithm is `-inf`."""
    nothing = coefficient == 0
    return torch.mul(logarithms, coefficient, out=out).masked_fill_(nothing, 0.0)


def _logarithms(
    scores: Tensor, buffer: Tensor | None, top: Tensor | None, input: Input, eps: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return logarithms, in the buffer if there is one: logits relative to the largest of a row, and that."""
    dtype = score_dtype(scores)
    if input == "logits":
        top = scores.amax(1) if top is None else top
        return torch.sub(scores.to(dtype), top.to(dtype).unsqueeze(1), out=_part(buffer, scores)), top
    scores = _copied(scores, _part(buffer, scores), dtype)
    return (scores if input == "log_probs" else _clip_logarithms(scores.log_(), eps)), None


def _clip_logarithms(logarithms: Tensor, eps: float | None) -> Tensor:
    """Clip the logarithms of probabilities, in place: float32 has no `eps` of 1e-50, but its logarithm."""
    return logarithms if eps is None else logarithms.clamp_(math.log(eps), math.log1p(-eps))


def _copied(values: Tensor, buffer: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a copy, in a buffer if there is one, that may be written to."""
    if buffer is None:
        return values.to(dtype, copy=True)
    return values if values.data_ptr() == buffer.data_ptr() else buffer.copy_(values)
