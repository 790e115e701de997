"""The arithmetic of losses: from rows of scores to one loss each, in nats, one kernel for each kind of target.

A kernel that is run as it is gets a few rows at a time, and a buffer that is used again for the next ones. Compiled, it
gets all rows at once and no buffer: the compiler fuses its steps so that none is needed. It then returns sums over a
row, of which losses are made outside.

Either way a row has the same bits among any others. So rows are contiguous and at least two, as threads would share the
`sum` over a long row that is alone and round it differently; and compiled code takes no logarithm of single rows, as it
has one for several of them at a time and another for what is left, which differ in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, partial
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from xent_metrics.checks import at_hand, being_compiled, extremes

Input = Literal["logits", "log_probs", "probs", "losses"]
Backend = Literal["auto", "eager", "compile"]
Results = tuple[Any, ...]
"""What a kernel returns of rows: losses first, then masks, or None for nowhere."""

_LANES = 64  # A multiple of as many numbers as any processor does at a time.
_MANY = 256  # Compilations of a kernel for other numbers of threads, in other modes: more than anybody has.


_ONE_AT_A_TIME = Lock()  # Threads would compile the same kernel, each for itself; so they also run it in turns.


def loss_dtype(preds: Any) -> torch.dtype:
    """Return the dtype that losses of `preds` are computed in: float64 for float64, float32 for the rest."""
    return torch.float64 if preds.dtype == torch.float64 else torch.float32


def compiles(backend: Backend) -> bool:
    """Say whether kernels are compiled; where what calls us is compiled itself, they are a part of that instead."""
    return backend == "compile" and not being_compiled() and not torch._dynamo.config.disable


def fuses(backend: Backend) -> bool:
    """Say whether kernels need no buffers, as a compiler fuses their steps: that of our caller, or ours."""
    return being_compiled() if backend == "auto" else backend == "compile" and (being_compiled() or compiles(backend))


def looked_up(
    scores: Tensor,
    index: Tensor,
    buffer: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smooth: bool,
) -> Results:
    """Return of each row `-log q[index]`; `sum_k class_weight[k] * log q[k]` if asked to; and what is improper.

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


def reduced(
    scores: Tensor,
    index: Tensor,
    top: Tensor | None,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smooth: bool,
) -> Results:
    """Return what `resolved` makes the same of: sums that a compiler makes while it reads the scores.

    Args:
        scores: As above.
        index: As above.
        top: The largest logit of each row, if some of them are elsewhere.
        class_weight: As above.
        input: As above.
        eps: As above.
        smooth: As above.

    Returns:
        Of each row its score at `index`; for logits relative to the largest one, and then the sum of exponentials of
        all of them; the sum over all classes if asked to; and what is improper.
    """
    scores, exponentials, improper = _relative(scores, top, input, eps)
    of_target, of_all = scores.gather(1, index.unsqueeze(1)).squeeze(1), None
    if smooth:
        if input == "probs":
            scores.log_()
        weigh(scores, class_weight)
        of_all = scores.sum(1)
    return of_target, exponentials, of_all, improper


def resolved(
    of_target: Tensor,
    exponentials: Tensor | None,
    of_all: Tensor | None,
    improper: Tensor | None,
    *,
    input: Input,
    weight_of_all: float | Tensor,
) -> Results:
    """Return what `looked_up` does, of what `reduced` returns and the sum of the class weights."""
    if exponentials is None:
        return (of_target.log() if input == "probs" else of_target).neg(), of_all, improper
    log_sum = exponentials.log()
    return log_sum - of_target, None if of_all is None else of_all - _times(log_sum, weight_of_all), improper


def weighted(loss: Tensor, of_all: Tensor | None, norm: Tensor | None, smoothing: float, num_classes: int) -> Tensor:
    """Return the losses of class indices from the above, changed in place, with class weights and label smoothing."""
    if norm is not None:
        loss.mul_(norm).masked_fill_(norm == 0, 0.0)
    if of_all is not None:
        loss.mul_(1 - smoothing) if smoothing < 1 else loss.zero_()  # Not 0 * inf.
        loss.sub_(of_all, alpha=smoothing / num_classes)
    return loss


def soft(
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
    """Return the loss of each row for a target that is a distribution; which are none; and what is improper.

    Args:
        scores: As above.
        target: One probability a class.
        buffer: As above.
        target_buffer: The same for `target`.
        class_weight: As above.
        input: As above.
        eps: As above.
        smoothing: The share of a target that is spread over all classes.
        excess: How far the sum of a distribution may be from 1.
    """
    log_probs, improper = _log_probs(scores, buffer, input, eps)
    coefficient, none = _coefficients(target, target_buffer, log_probs.dtype, class_weight, smoothing, excess)
    weigh(log_probs, coefficient)
    return log_probs.sum(1).neg_(), none, improper


def soft_reduced(
    scores: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    *,
    input: Input,
    eps: float | None,
    smoothing: float,
    excess: float,
) -> Results:
    """Return what `soft_resolved` makes the same of, as `reduced` does."""
    scores, exponentials, improper = _relative(scores, None, input, eps)
    if input == "probs":
        scores.log_()
    coefficient, none = _coefficients(target, None, scores.dtype, class_weight, smoothing, excess)
    weigh(scores, coefficient)
    return scores.sum(1), exponentials, coefficient.sum(1), none, improper


def soft_resolved(
    of_all: Tensor, exponentials: Tensor | None, weight_of_all: Tensor, none: Tensor, improper: Tensor | None
) -> Results:
    """Return what `soft` does, of what `soft_reduced` returns."""
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
        if extremes(at_hand(log.mul_(coefficient)))[0] > -math.inf:
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
    """Return what log-probabilities are multiplied by for soft targets, and which of those are no distributions."""
    probs = _copied(target, buffer, dtype)
    # Asked so that a NaN is none either.
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


def run(
    backend: Backend,
    kernel: Callable[..., Results],
    rows: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    **constants: Hashable,
) -> Results:
    """Call a kernel, compiled if that is asked for and there is anything to do.

    Args:
        backend: Whether to compile it.
        kernel: One of the above.
        rows: Its tensors that have a row for each target.
        others: Those that have not.
        **constants: Its other arguments.

    Raises:
        ValueError: If it cannot be compiled.
    """
    if not compiles(backend) or not all(x is None or x.numel() for x in rows):
        return kernel(*rows, *others, **constants)
    assert rows[0] is not None
    count = len(rows[0])
    # Compiled code takes several short rows at a time, and what is left of them in another way, with other bits. So
    # nothing is left.
    left = count % _LANES if rows[0].shape[1:].numel() < _LANES else 0
    parts = []
    if left < count:
        parts.append(_run_compiled(kernel, [x if x is None else x[: count - left] for x in rows], others, constants))
    if left:
        rest = [x if x is None else torch.cat([x[-left:], x.new_zeros(_LANES - left, *x.shape[1:])]) for x in rows]
        parts.append(tuple(x if x is None else x[:left] for x in _run_compiled(kernel, rest, others, constants)))
    return parts[0] if len(parts) == 1 else join(parts)


def _run_compiled(
    kernel: Callable[..., Results],
    rows: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    constants: Mapping[str, Hashable],
) -> Results:
    """Call a kernel that is compiled for any number of rows, but for one number of classes.

    What is best for one may be another thing for the next, and the bits of a loss must not depend on what came first.
    """
    # A view is of another kind than what is none, and strides are too.
    tensors = [None if x is None else x.contiguous().data for x in [*rows, *others]]
    for x in tensors:
        if x is not None and x.dim() == 2:
            torch._dynamo.mark_static(x, 1)
    kinds = tuple(None if x is None else (x.dtype, x.device, x.shape[1:]) for x in tensors)
    try:
        with _ONE_AT_A_TIME:
            return _compiled(kernel, kinds, **constants)(*tensors)
    except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # The latter of the compiler's cache.
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"`backend` must be 'auto' or 'eager' where the losses cannot be compiled, got 'compile' and {cause!r}; "
            "install the compiler if it is missing (C++, on CUDA Triton), or look at the error above."
        ) from error


def join(results: Sequence[Results]) -> Results:
    """Put what a kernel returned of several blocks one after the other."""
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*results, strict=True))


@cache
def _compiled(kernel: Callable[..., Results], _: Hashable, **constants: Any) -> Callable[..., Results]:
    """Return a compiled kernel for tensors of one kind.

    Each kind has its own: PyTorch refuses to compile one function too often, as it counts threads, autocast and
    inference mode too.
    """
    bound = partial(kernel, **constants)
    return torch.compile(bound, dynamic=True, fullgraph=True, isolate_recompiles=True, recompile_limit=_MANY)  # type: ignore[call-overload,no-any-return]  # Their overloads lack it.
