"""From what a model returns to one loss per target, in nats: scores over classes, as a whole on this rank.

All losses are `-sum_k t[k] * log q[k]` with target t and model q. The scores are read in float32 (float64 for float64
`preds`); what is done once for each target is done in float64, where there is one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import check_hard, check_tensors, without
from xent_metrics.losses import kernels
from xent_metrics.losses.kernels import RowSums, score_dtype
from xent_metrics.losses.linear import LinearLogits, check_linear
from xent_metrics.losses.options import LossOptions
from xent_metrics.losses.rows import Reduction, RowReader, RowResults, num_rows_in, of_rows, rows_to_score
from xent_metrics.losses.sharded import local_scores, score_shard
from xent_metrics.losses.target_losses import PROBABILITY_OUT_OF_RANGE, TARGET_OUT_OF_RANGE, TargetLosses
from xent_metrics.losses.targets import as_index, ignored_status, lookup_index

# How far the sum of a soft target may be from 1: float32 rounds very little, halves keep 3 digits of each probability.
_SOFT_EXCESS = {torch.float32: 1e-3, torch.float64: 1e-3}
_LOW_PRECISION_SOFT_EXCESS = 1e-2


def target_losses(
    preds: Tensor | LinearLogits, target: Tensor, options: LossOptions, class_weight: Tensor | None = None
) -> TargetLosses:
    """Compute the loss of every target, and `others`, without synchronising with the device and without autograd.

    Args:
        preds: Scores with classes on `options.class_dim`, or losses of target's shape with `input="losses"`; logits may
            be a DTensor that is sharded over the classes, and so may the weight of `LinearLogits`.
        target: Class indices of any integer dtype, of `preds`' shape without the class dimension; or soft targets,
            floats of `preds`' shape.
        options: How losses are made.
        class_weight: One weight for each class.

    Raises:
        TypeError: If a dtype is not one of those named above, or if soft targets should be the most likely class.
        ValueError: If shapes or devices do not fit.
    """
    check_tensors(_outline(preds, options), target, options.input, options.class_dim, class_weight, options.shift)
    if options.accuracy:
        check_hard(target, "a distribution is not one class")
    with _runtime.no_graph():
        if class_weight is not None:
            class_weight = class_weight.to(score_dtype(preds)).to(_runtime.widest_float(preds.device))
        preds, shard = local_scores(preds, options.class_dim)
        if shard is not None:
            if options.accuracy or options.entropy:
                raise ValueError(
                    f"{shard.name} must hold all classes for `accuracy` and `entropy`, got a DTensor that is sharded "
                    "over the classes; leave them out, or pass its full_tensor()."
                )
            return score_shard(preds, shard, target, options, class_weight)
        preds, target = options.shifted(preds, target)
        if target.is_floating_point():
            losses = _score_soft(preds, target, options, class_weight)
            return losses.as_sequences(without(preds.shape, options.class_dim))
        index = as_index(target).reshape(-1)
        return _score_hard(preds, index, options, class_weight).as_sequences(target.shape)


def target_entropies(preds: Tensor | LinearLogits, target: Tensor, options: LossOptions) -> Tensor:
    """Compute the entropy of every target's own distribution, smoothed; flat, and for what `target_losses` accepts."""
    with torch.no_grad():
        preds, target = options.shifted(preds, target)
        num_classes = preds.shape[options.class_dim]
        smoothing = options.smoothing(num_classes)
        if not target.is_floating_point():
            rest = smoothing / num_classes
            nats = _entropy_term(1 - smoothing + rest) + (num_classes - 1) * _entropy_term(rest)
            return torch.full((target.numel(),), nats, dtype=_runtime.widest_float(preds.device), device=preds.device)
        results = RowResults(target.numel() // num_classes)
        reader = RowReader(target, None, options)
        reduction = Reduction(kernels.entropy, reader, temporaries=4, smoothing=smoothing)  # In float64.
        for rows, probs in reader.groups():
            results.add(num_rows_in(rows), reduction(probs))
        return _no_losses(target) if results.joined is None else results.joined[0]


def _outline(preds: Tensor | LinearLogits, options: LossOptions) -> Tensor:
    """Return what can be checked as `preds` are: of logits that are not there, one number with their shape."""
    if not isinstance(preds, LinearLogits):
        return preds
    check_linear(preds.hidden, preds.weight, preds.bias, options.input, options.class_dim)
    return preds.hidden.detach().new_empty(()).expand(preds.shape)


def _score_hard(
    preds: Tensor | LinearLogits, index: Tensor, options: LossOptions, class_weight: Tensor | None
) -> TargetLosses:
    """Score flat class indices."""
    if options.input == "losses":
        assert isinstance(preds, Tensor)
        return TargetLosses(preds.reshape(-1).to(score_dtype(preds)), None, ignored_status(index, options))
    num_classes = preds.shape[options.class_dim]
    index, status = lookup_index(index, num_classes, options)
    denominator = None if class_weight is None else class_weight[index]
    scored = rows_to_score(preds, index, status)
    results = RowResults(len(index) if scored is None else len(scored))
    smoothing = options.smoothing(num_classes)
    constants: dict[str, Any] = {"input": options.input, "eps": options.eps}
    reader = RowReader(preds, None, options, scored)
    tells_later = options.input == "logits" and _runtime.can_read_values(index)  # See `are_most_likely`.
    reduction = Reduction(
        kernels.sum_hard,
        reader,
        temporaries=options.entropy,
        smooth=smoothing > 0,
        find_best=options.accuracy and not tells_later,
        entropy=options.entropy,
        **constants,
    )
    for rows, (scores,) in reader.groups():
        sums = RowSums(*reduction([scores], class_weight))
        weights = None if denominator is None else of_rows(denominator, rows)
        targets = of_rows(index, rows)
        loss = kernels.losses_of_hard(scores, targets, sums, weights, class_weight, smoothing=smoothing, **constants)
        others = _others(sums)
        if options.accuracy:
            hits = kernels.are_most_likely(scores, targets, sums)
            others = [hits.to(_runtime.widest_float(hits.device)), *others]
        results.add(num_rows_in(rows), (loss, sums.improper, *others))
    if results.joined is None:
        nothing = _no_losses(index).new_zeros(index.shape)
        return TargetLosses(nothing, denominator, status, (nothing,) * (options.accuracy + options.entropy))
    made = results.joined
    if scored is not None:  # The others were not made.
        made = tuple(None if x is None else x.new_zeros(index.shape).index_copy_(0, scored, x) for x in made)
    loss, improper, *others = made
    return _with_improper(TargetLosses(loss, denominator, status, tuple(others)), improper)


def _score_soft(
    preds: Tensor | LinearLogits, target: Tensor, options: LossOptions, class_weight: Tensor | None
) -> TargetLosses:
    """Score targets that are distributions."""
    num_classes = preds.shape[options.class_dim]
    smoothing = options.smoothing(num_classes)
    results = RowResults(target.numel() // num_classes)
    reader = RowReader(preds, target, options)
    reduction = Reduction(
        kernels.sum_soft,
        reader,
        num_tensors=2,
        input=options.input,
        eps=options.eps,
        smooth=smoothing > 0,
        excess=_SOFT_EXCESS.get(target.dtype, _LOW_PRECISION_SOFT_EXCESS),
        temporaries=options.entropy,
        entropy=options.entropy,
    )
    for rows, group in reader.groups():
        *parts, of_target, coefficients, out_of_range = reduction(group, class_weight)
        sums = RowSums(*parts)
        loss = kernels.losses_of_soft(group[0], sums, of_target, coefficients, class_weight, smoothing=smoothing)
        results.add(num_rows_in(rows), (loss, out_of_range, sums.improper, *_others(sums)))
    if results.joined is None:
        return TargetLosses(_no_losses(target), others=(_no_losses(target),) * options.entropy)
    loss, out_of_range, improper, *others = results.joined
    losses = TargetLosses(loss, others=tuple(others))
    if not (_runtime.can_read_values(out_of_range) and not out_of_range.any()):
        losses = losses.marked(TARGET_OUT_OF_RANGE, out_of_range)
    return _with_improper(losses, improper)


def _others(sums: RowSums) -> list[Tensor]:
    """Return what of `TargetLosses.others` does not depend on the target: entropies, if they are wanted."""
    return [] if sums.x_log_x is None else [kernels.entropies(sums)]


def _with_improper(losses: TargetLosses, improper: Tensor | None) -> TargetLosses:
    """Mark targets for which probabilities are outside [0, 1]."""
    if improper is None or (_runtime.can_read_values(improper) and not improper.any()):
        return losses
    return losses.marked(PROBABILITY_OUT_OF_RANGE, improper)


def _no_losses(beside: Tensor) -> Tensor:
    return beside.new_empty(0, dtype=_runtime.widest_float(beside.device))


def _entropy_term(p: float) -> float:
    return -p * math.log(p) if p else 0.0
