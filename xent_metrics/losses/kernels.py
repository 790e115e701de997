"""The arithmetic of losses: from rows of scores to a few sums over the classes of each row, and to one loss each.

A kernel reads the scores and returns what is left of each row. Eagerly it gets a few rows at a time, and a buffer that
is used again for the next ones; compiled, the same function gets more rows and no buffer. What is then done once for
each target (logarithm, difference, smoothing, class weights) is done in float64, where there is one.

A sum over classes must not lose the many small terms of a long row, which a running float32 sum does, in a direction
that no amount of data averages out. A float64 sum of float32 costs as much as all the rest. So chunks of a long row are
summed in float32, and their sums in float64; and of exponentials, the largest chunk is summed in float64 as a whole, as
one term of it may be so much larger than the others that it rounds them away.

A row has the same bits among any others. So a sum starts at an address that is a multiple of 16 bytes: accelerators sum
in an order that depends on it. And rows are at least two, as threads would share the sum over a long row that is alone,
and round it differently. And compiled code takes no logarithm of single rows: it has one for several of them at a time
and another for what is left, which differ in the last bit.
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
"""What a kernel returns of rows: tensors with an entry for each row, or None for what there is not."""

_CHUNK = 64  # As many terms are summed in float32, which costs no more than one sum over all.
_NEGLIGIBLE = -87.0  # A logit so far below the largest adds nothing to a float64 sum.
_FEWEST_CHUNKS = 16  # Shorter rows are summed in float64: that is fewer operators, and as fast for many rows.


class RowSums(NamedTuple):
    """What is left of rows of scores over classes.

    Attributes:
        exponentials: Of logits; None for other input. Either the sum of the exponentials of a row's logits relative to
            `top`; or with one more dimension, the sums of chunks of the row, relative to anything.
        top: The largest logit, where it was needed.
        of_all: The sum over classes of coefficient times logarithm, of logits relative to `top`; None if there is none.
        improper: Whether a probability is outside [0, 1]; None for other input.
        best: The class of the largest score, the lowest of several; None if it is not wanted.
        x_log_x: The sum over classes of x ln x, of probabilities, or of exponentials relative to anything; None if no
            entropy is wanted.
    """

    exponentials: Tensor | None
    top: Tensor | None
    of_all: Tensor | None
    improper: Tensor | None
    best: Tensor | None = None
    x_log_x: Tensor | None = None


def score_dtype(preds: Any) -> torch.dtype:
    """Return the dtype that kernels compute in: float64 for float64, float32 for the rest."""
    return torch.float64 if preds.dtype == torch.float64 else torch.float32


def num_chunks(num_classes: int, dtype: torch.dtype) -> int:
    """Return in how many chunks rows are summed, some of them empty; 0 for none."""
    chunked = dtype != torch.float64 and num_classes >= _FEWEST_CHUNKS * _CHUNK
    return aligned(-(-num_classes // _CHUNK)) if chunked else 0


def aligned(num_classes: int) -> int:
    """Return how many numbers at least a row must have, so that the next one starts at a multiple of 16 bytes."""
    return -(-num_classes // 4) * 4


def sum_hard(
    scores: Tensor,
    buffer: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smooth: bool,
    find_best: bool = False,
    entropy: bool = False,
) -> Results:
    """Return the `RowSums` of each row for a target that is a class.

    Args:
        scores: Two rows or more, one score a class.
        buffer: Of the shape of `scores`, to be written to. None to make what is needed.
        class_weight: Of every class.
        input: What the scores are.
        eps: Where to clip probabilities.
        smooth: Whether the sum over all classes is wanted.
        find_best: Whether the most likely class is wanted.
        entropy: Whether what an entropy is made of is wanted.
    """
    best = scores.argmax(1) if find_best else None
    exponentials, top, x_log_x = _first_sums(scores, buffer, input, eps, entropy)
    of_all = None
    if smooth:
        logarithms, top = _logarithms(scores, buffer, top, input, eps)
        weight = None if class_weight is None else class_weight.to(logarithms.dtype)
        of_all = _sum(logarithms if weight is None else _weigh(logarithms, weight, out=buffer))
    return RowSums(exponentials, top, of_all, _outside(scores) if input == "probs" else None, best, x_log_x)


def sum_soft(
    scores: Tensor,
    target: Tensor,
    buffer: Tensor | None,
    target_buffer: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smooth: bool,
    excess: float,
    entropy: bool = False,
) -> Results:
    """Return the `RowSums` of each row for a target that is a distribution, and what else is needed of it.

    Args:
        scores: Two rows or more, one score a class.
        target: One probability a class.
        buffer: Of the shape of `scores`, to be written to. None to make what is needed.
        target_buffer: The same for `target`.
        class_weight: Of every class.
        input: What the scores are.
        eps: Where to clip probabilities.
        smooth: Whether the sum over all classes is wanted.
        excess: How far the sum of a distribution may be from 1.
        entropy: Whether what the entropy of the model is made of is wanted.

    Returns:
        `RowSums`; the sum of coefficient times logarithm, relative as theirs; the sum of the coefficients, which are
        target times class weight; and whether the target is no distribution.
    """
    exponentials, top, x_log_x = _first_sums(scores, buffer, input, eps, entropy)
    coefficient = _copied(target, target_buffer, score_dtype(scores))
    total = _sum(coefficient)
    # A NaN compares false with everything, so a row that has one is not a distribution.
    distribution = (coefficient.amin(1) >= 0) & ((total - 1).abs() <= excess)
    weight = None if class_weight is None else class_weight.to(coefficient.dtype)
    if weight is not None:
        total = _sum(coefficient.mul_(weight))
    logarithms, top = _logarithms(scores, buffer, top, input, eps)
    of_target = _sum(_weigh(logarithms, coefficient, out=target_buffer))
    of_all = None
    if smooth:
        of_all = _sum(logarithms if weight is None else _weigh(logarithms, weight, out=buffer))
    improper = _outside(scores) if input == "probs" else None
    sums = RowSums(exponentials, top, of_all, improper, None, x_log_x)
    return *sums, of_target, total, ~distribution


def log_sums(scores: Tensor, sums: RowSums) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the sum of exponentials of each row, in float64 where there is one.

    Args:
        scores: The logits.
        sums: What a kernel returned of them.

    Returns:
        That logarithm relative to a likely logit, and that logit: the largest one of the chunk whose sum is largest, so
        that no other is larger by more than ln 64. Their sum would lose the former where logits are large.
    """
    assert sums.exponentials is not None
    dtype = _runtime.widest_float(scores.device)
    if sums.exponentials.dim() == 1:
        assert sums.top is not None
        return sums.exponentials.log(), sums.top.to(dtype)
    greatest, _, terms = _likely_chunk(scores, sums.exponentials)
    top = terms.amax(1)
    exact = (terms - top.unsqueeze(1)).exp_().sum(1)
    others = sums.exponentials.sum(1, dtype=dtype) - greatest
    return (exact + others * (exact / greatest)).log(), top


def are_most_likely(scores: Tensor, index: Tensor, sums: RowSums) -> Tensor:
    """Return whether the class of each row is the most likely one, the lowest of several.

    On the CPU `argmax` takes as long as all exponentials. So there `RowSums` of logits need no `best`, and rows are
    looked at again only where what is left of them does not tell: no class of a chunk is more likely than all of it.
    """
    if sums.best is not None:
        return sums.best == index
    assert sums.exponentials is not None
    of_target = scores.gather(1, index.unsqueeze(1)).squeeze(1)
    if sums.exponentials.dim() == 1:
        assert sums.top is not None
        is_hit, is_miss = torch.zeros_like(index, dtype=torch.bool), of_target < sums.top
    else:
        greatest, where, terms = _likely_chunk(scores, sums.exponentials)
        top = terms.amax(1)
        share = greatest / (terms - top.unsqueeze(1)).exp_().sum(1)  # Of a class at the top, as a hit is.
        num_rivals = (sums.exponentials >= 0.999 * share.unsqueeze(1)).sum(1)  # Its own chunk is one.
        is_first = terms.argmax(1) == index - where * _CHUNK
        is_hit, is_miss = is_first & (num_rivals == 1), of_target < top
    rows = (~(is_hit | is_miss)).nonzero().squeeze(1)
    if len(rows):
        is_hit[rows] = scores[rows].argmax(1) == index[rows]
    return is_hit


def entropies(sums: RowSums) -> Tensor:
    """Return the entropy of each row's own distribution, in float64 where there is one: `-sum(p ln p)`."""
    assert sums.x_log_x is not None
    if sums.exponentials is None:
        return torch.neg(sums.x_log_x)
    total = sums.exponentials.to(sums.x_log_x.dtype)
    total = total.sum(1) if total.dim() == 2 else total
    # Not below 0: of a row that is certain, two rounded numbers are left of each other.
    return (total.log() - sums.x_log_x / total).clamp_(min=0.0)


def losses_of_hard(
    scores: Tensor,
    index: Tensor,
    sums: RowSums,
    denominator: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smoothing: float,
) -> Tensor:
    """Return the loss of each row, in float64 where there is one.

    Args:
        scores: One score a class.
        index: The class of each row.
        sums: What `sum_hard` returned.
        denominator: The class weight of each target; None for 1.
        class_weight: Of every class.
        input: What the scores are.
        eps: Where to clip probabilities.
        smoothing: The share of a target that is spread over all classes.
    """
    of_target = scores.gather(1, index.unsqueeze(1)).squeeze(1)
    of_all, log_sum = sums.of_all, None
    if input == "logits":
        log_sum, top = log_sums(scores, sums)
        of_target = of_target - top
        if of_all is not None and sums.top is not None:
            of_all = of_all + (sums.top - top) * weight_of_all(class_weight, scores.shape[1])
    else:
        of_target = of_target.to(_runtime.widest_float(scores.device))
        of_target = clip_logarithms(of_target.log(), eps) if input == "probs" else of_target
    return weighed_and_smoothed(of_target, log_sum, of_all, denominator, class_weight, scores.shape[1], smoothing)


def weighed_and_smoothed(
    of_target: Tensor,
    log_sum: Tensor | None,
    of_all: Tensor | None,
    denominator: Tensor | None,
    class_weight: Tensor | None,
    num_classes: int,
    smoothing: float,
) -> Tensor:
    """Return losses, from the logit of each target, that of all classes, and their normaliser.

    Args:
        of_target: The logit, relative to any, or the logarithm of the probability, of the target.
        log_sum: The logarithm of the sum of exponentials, relative to the same; None for probabilities.
        of_all: The sum over classes of class weight times what `of_target` is; None without smoothing.
        denominator: The class weight of each target; None for 1.
        class_weight: Of every class.
        num_classes: How many there are.
        smoothing: The share of a target that is spread over all classes.
    """
    loss = (0.0 if log_sum is None else log_sum) - of_target  # Not `-of_target`, which may be -0.0.
    if denominator is not None:
        loss.mul_(denominator).masked_fill_(denominator == 0, 0.0)
    return smoothed(loss, log_sum, of_all, class_weight, num_classes, smoothing)


def losses_of_soft(
    scores: Tensor,
    sums: RowSums,
    of_target: Tensor,
    coefficients: Tensor,
    class_weight: Tensor | None,
    *,
    smoothing: float,
) -> Tensor:
    """Return the loss of each row, in float64 where there is one.

    Args:
        scores: One score a class.
        sums: What `sum_soft` returned.
        of_target: The sum of coefficient times logarithm that it returned.
        coefficients: The sum of coefficients that it returned.
        class_weight: Of every class.
        smoothing: The share of a target that is spread over all classes.
    """
    if sums.top is None:
        return smoothed(0.0 - of_target, None, sums.of_all, class_weight, scores.shape[1], smoothing)
    log_sum, top = log_sums(scores, sums)
    log_sum = log_sum + (top - sums.top)
    loss = (log_sum * coefficients).masked_fill_(coefficients == 0, 0.0) - of_target  # Not 0 * inf.
    return smoothed(loss, log_sum, sums.of_all, class_weight, scores.shape[1], smoothing)


def smoothed(
    loss: Tensor,
    log_sum: Tensor | None,
    of_all: Tensor | None,
    class_weight: Tensor | None,
    num_classes: int,
    smoothing: float,
) -> Tensor:
    """Mix losses with the mean over all classes, of which `of_all` and `log_sum` are relative to one logit."""
    if of_all is None:
        return loss
    if log_sum is not None:
        of_all = of_all - log_sum * weight_of_all(class_weight, num_classes)
    loss.mul_(1 - smoothing) if smoothing < 1 else loss.zero_()  # Not 0 * inf.
    return loss.sub_(of_all, alpha=smoothing / num_classes)


def weight_of_all(class_weight: Tensor | None, num_classes: int) -> float | Tensor:
    """Return the sum of the class weights."""
    return num_classes if class_weight is None else class_weight.sum()


def entropy(target: Tensor, _: Tensor | None = None, *, smoothing: float) -> Results:
    """Return the entropy of each row, a distribution."""
    probs = target.to(_runtime.widest_float(target.device))
    if smoothing:
        probs = probs * (1 - smoothing) + smoothing / probs.shape[1]
    return (_sum(torch.special.entr(probs)),)


def clip_logarithms(logarithms: Tensor, eps: float | None) -> Tensor:
    """Clip the logarithms of probabilities, in place: float32 has no `eps` of 1e-50, but its logarithm."""
    return logarithms if eps is None else logarithms.clamp_(math.log(eps), math.log1p(-eps))


def _first_sums(
    scores: Tensor, buffer: Tensor | None, input: Input, eps: float | None, entropy: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return `exponentials`, `top` and `x_log_x` of `RowSums`."""
    if input == "logits":
        return _exponentials(scores, buffer, entropy)
    if not entropy:
        return None, None, None
    probs = _copied(scores, buffer, score_dtype(scores))
    if input == "log_probs":
        probs.clamp_(min=_NEGLIGIBLE).exp_()
    elif eps is not None:
        probs.clamp_(eps, 1 - eps)
    return None, None, _sum_of_x_log_x(probs)


def _sum_of_x_log_x(x: Tensor) -> Tensor:
    """Return the sum of x ln x over each row, which is written to."""
    x.clamp_(min=torch.finfo(x.dtype).tiny)  # Adds some 1e-36 of a nat, and not 0 * -inf.
    return _sum(x.log().mul_(x))


def _exponentials(logits: Tensor, buffer: Tensor | None, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return `exponentials`, `top` and `x_log_x` of `RowSums`, of logits."""
    dtype = score_dtype(logits)
    chunked = num_chunks(logits.shape[1], dtype) > 0
    if chunked and buffer is not None and _runtime.can_read_values(logits):
        # One pass, the fastest there is on the CPU. By what it divides is as good as any, as long as it is one number.
        wide = logits if logits.dtype == dtype else buffer.copy_(logits)
        terms = torch.softmax(wide, 1, out=buffer)
        return _sum_chunks(terms), None, _sum_of_x_log_x(terms) if entropy else None
    top = logits.amax(1)
    relative = torch.sub(logits.to(dtype), top.to(dtype).unsqueeze(1), out=buffer)
    # `exp` takes a hundred times as long on the CPU where it is all but 0; and an entropy must not get 0 * -inf.
    if entropy or _runtime.can_read_values(relative):
        relative.clamp_(min=_NEGLIGIBLE)
    terms = relative.exp() if entropy else relative.exp_()
    return (_sum_chunks if chunked else _sum)(terms), top, _sum(relative.mul_(terms)) if entropy else None


def _logarithms(
    scores: Tensor, buffer: Tensor | None, top: Tensor | None, input: Input, eps: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return logarithms: logits relative to the largest of each row, and that."""
    dtype = score_dtype(scores)
    if input == "logits":
        # A finite one also where all logits of a part are -inf, which have to stay that.
        top = (scores.amax(1) if top is None else top).clamp(min=torch.finfo(scores.dtype).min)
        return torch.sub(scores.to(dtype), top.to(dtype).unsqueeze(1), out=buffer), top
    scores = _copied(scores, buffer, dtype)
    return scores if input == "log_probs" else clip_logarithms(scores.log_(), eps), None


def _sum(x: Tensor) -> Tensor:
    """Sum each row, in chunks if it is long."""
    if num_chunks(x.shape[1], x.dtype):
        x = _sum_chunks(x)
    elif x.shape[1] % 4 and not _runtime.can_read_values(x):  # A float64 copy would be packed.
        x = F.pad(x, (0, aligned(x.shape[1]) - x.shape[1]))
    return x.sum(1, dtype=_runtime.widest_float(x.device))


def _likely_chunk(scores: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest sum of a chunk in each row, which chunk that is, and its scores in the widest float."""
    greatest, where = chunks.max(1)
    index = where.unsqueeze(1) * _CHUNK + torch.arange(_CHUNK, device=scores.device)
    last = scores.shape[1] - 1
    terms = scores.gather(1, index.clamp(max=last)).to(_runtime.widest_float(scores.device))
    return greatest, where, terms.masked_fill_(index > last, -math.inf)


def _sum_chunks(x: Tensor) -> Tensor:
    """Sum chunks of each row."""
    rest = x.shape[1] % _CHUNK
    chunks = (x[:, :-rest] if rest else x).view(len(x), -1, _CHUNK).sum(2)
    if rest:
        chunks = torch.cat([chunks, x[:, -rest:].sum(1, keepdim=True)], 1)
    empty = num_chunks(x.shape[1], x.dtype) - chunks.shape[1]
    return F.pad(chunks, (0, empty)) if empty else chunks


def _weigh(logarithms: Tensor, coefficient: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply; a class of coefficient 0 adds nothing, even where its logarithm is `-inf`."""
    nothing = coefficient == 0
    return torch.mul(logarithms, coefficient, out=out).masked_fill_(nothing, 0.0)


def _outside(probs: Tensor) -> Tensor:
    """Return which rows have a probability outside [0, 1]."""
    return ((probs < 0) | (probs > 1)).any(1)  # Not amin: a NaN would hide the others.


def _copied(values: Tensor, buffer: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a copy, in a buffer if there is one, that may be written to."""
    return values.to(dtype, copy=True) if buffer is None else buffer.copy_(values)
