"""Logits of which each rank has some of the classes: two small collectives, and no rank ever holds a whole row.

They are there already, or are made here from the classes of a head that this rank has.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.distributed import VocabShard, is_dtensor, max_over_ranks, sum_over_ranks, vocab_shard
from xent_metrics.losses import kernels
from xent_metrics.losses.kernels import RowSums
from xent_metrics.losses.linear import LinearLogits, local_head
from xent_metrics.losses.options import LossOptions
from xent_metrics.losses.rows import Reduction, RowReader, num_rows_in, of_rows
from xent_metrics.losses.target_losses import TARGET_OUT_OF_RANGE, TargetLosses, mark
from xent_metrics.losses.targets import as_index, lookup_index


def local_scores(preds: Tensor | LinearLogits, class_dim: int) -> tuple[Tensor | LinearLogits, VocabShard | None]:
    """Return the scores of the classes that are on this rank, and which these are; None if they are all."""
    if isinstance(preds, LinearLogits):
        return local_head(preds)
    return vocab_shard("`preds`", preds, class_dim) if is_dtensor(preds) else (preds, None)


def score_shard(
    scores: Tensor | LinearLogits,
    shard: VocabShard,
    target: Tensor,
    options: LossOptions,
    class_weight: Tensor | None,
) -> TargetLosses:
    """Score class indices with logits of which each rank has some classes, in two small collectives.

    What ranks exchange is a likely logit of each row, and then the sums of exponentials and the target's logit.
    """
    if options.input != "logits" or target.is_floating_point():
        raise ValueError(
            f"`preds` that are sharded over the classes must be logits with integer targets, got input="
            f"{options.input!r} and {target.dtype} targets; gather them with full_tensor()."
        )
    num_classes = shard.num_classes
    logits, target = options.shifted(scores, target)
    index, status = lookup_index(as_index(target).reshape(-1), num_classes, options)
    smoothing = options.smoothing(num_classes)

    own = _own_sums(shard, logits, index, options, class_weight, smoothing)
    greatest, mismatch = _max_and_mismatch(own.top, shard, index)
    status = mark(status, TARGET_OUT_OF_RANGE, mismatch.expand(index.shape))
    of_target, exponentials, of_all = sum_over_ranks(own.relative_to(greatest), shard.group)
    denominator = None if class_weight is None else class_weight[index]
    loss = kernels.weighed_and_smoothed(
        of_target,
        exponentials.log(),
        of_all if smoothing else None,
        denominator,
        class_weight,
        num_classes,
        smoothing,
    )
    return TargetLosses(loss, denominator, status).as_sequences(target.shape)


class _OwnSums(NamedTuple):
    """What a rank's classes add to each row.

    Attributes:
        of_target: The target's logit, if it is here.
        here: Whether it is.
        top: A likely logit; `-inf` where no class is possible.
        log_sum: The logarithm of the sum of exponentials, relative to `top`.
        of_all: The sum over classes of class weight times logit, relative to `top_of_all`.
        top_of_all: The largest logit, or a finite one.
        weight_of_all: The sum of the class weights.
    """

    of_target: Tensor
    here: Tensor
    top: Tensor
    log_sum: Tensor
    of_all: Tensor
    top_of_all: Tensor
    weight_of_all: float | Tensor

    def relative_to(self, top: Tensor) -> Tensor:
        """Return the target's logit, the sum of exponentials and that of all logits, relative to one for each row."""
        exponentials = (self.log_sum + (self.top - top)).exp().masked_fill_(self.top == -math.inf, 0.0)
        of_target = (self.of_target - top).masked_fill_(~self.here, 0.0)
        return torch.stack([of_target, exponentials, self.of_all + (self.top_of_all - top) * self.weight_of_all])


def _own_sums(
    shard: VocabShard,
    logits: Tensor | LinearLogits,
    index: Tensor,
    options: LossOptions,
    class_weight: Tensor | None,
    smoothing: float,
) -> _OwnSums:
    """Read this rank's classes."""
    rows = logits.movedim(options.class_dim, -1) if isinstance(logits, Tensor) else logits
    width = rows.shape[-1]
    local = index - shard.offset
    here = (local >= 0) & (local < width)
    local = local.masked_fill(~here, 0)
    of_target, top, log_sum, of_all, top_of_all = torch.zeros(
        5, len(index), dtype=_runtime.widest_float(index.device), device=index.device
    )
    top.fill_(-math.inf)
    if not width:  # A rank may have no classes at all.
        return _OwnSums(of_target, here, top, log_sum, of_all, top_of_all, 0.0)
    weight = None if class_weight is None else class_weight[shard.offset : shard.offset + width]
    last = replace(options, class_dim=-1)
    reader = RowReader(rows, None, last)
    reduction = Reduction(kernels.sum_hard, reader, input="logits", eps=None, smooth=smoothing > 0)
    for block, (scores,) in reader.groups():
        own, count = RowSums(*reduction([scores], weight)), num_rows_in(block)
        of_target[block] = scores.gather(1, of_rows(local, block).unsqueeze(1))[:count, 0].to(of_target.dtype)
        log, likely = kernels.log_sums(scores, own)
        # Of no class that is possible the sum is 0, and not NaN, since other ranks may have one.
        top[block] = likely.masked_fill(scores.amax(1) == -math.inf, -math.inf)[:count]
        log_sum[block] = log[:count]
        if own.of_all is not None and own.top is not None:
            of_all[block], top_of_all[block] = own.of_all[:count], own.top[:count].to(top.dtype)
    return _OwnSums(of_target, here, top, log_sum, of_all, top_of_all, kernels.weight_of_all(weight, width))


def _max_and_mismatch(top: Tensor, shard: VocabShard, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of each number over ranks, and whether the parts of the ranks do not fit together.

    What has to be known of the parts travels with the numbers. If they do not fit, all ranks raise, where that is free.
    """
    # Ranks that share the data, as those of FSDP do, have other targets, and all but surely another sum of these.
    targets = (index * torch.arange(1, len(index) + 1, device=index.device)).sum().to(top.dtype)
    # Not from a list, which the device would have to wait for.
    about = [top.new_full((), x) for x in (bool(shard.mismatch), shard.num_classes, -shard.num_classes)]
    packed = max_over_ranks(torch.cat([top, torch.stack([*about, targets, -targets])]), shard.group)
    mismatch, most, least, above, below = packed[-5:].unbind()
    mismatch, others = (mismatch > 0) | (most != -least), above != -below
    if _runtime.can_read_values(mismatch) and mismatch:
        raise ValueError(
            f"{shard.name} must be a DTensor of the parts that torch.chunk gives, of as many classes on every rank"
            f"{shard.mismatch}; pass `shape` and `stride` to DTensor.from_local if the last part is smaller."
        )
    if _runtime.can_read_values(others) and others:
        raise ValueError(
            f"`target` must be the same on all ranks that share the classes of {shard.name}, but is not; where they "
            "share the data, as ranks of FSDP do, pass full_tensor() of what is sharded."
        )
    return packed[:-5], mismatch | others
