"""Logits of which each rank has some of the classes: two small collectives, and no rank ever holds a whole row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.distributed import VocabShard, max_over_ranks, sum_over_ranks
from xent_metrics.losses import kernels
from xent_metrics.losses.compiled import fuses, run
from xent_metrics.losses.kernels import RowSums, score_dtype
from xent_metrics.losses.options import LossOptions
from xent_metrics.losses.rows import num_rows_in, padded_rows, row_blocks, rows_in_buffer
from xent_metrics.losses.target_losses import TARGET_OUT_OF_RANGE, TargetLosses, mark
from xent_metrics.losses.targets import as_index, lookup_index


def score_shard(
    shard: VocabShard, shape: torch.Size, target: Tensor, options: LossOptions, class_weight: Tensor | None
) -> TargetLosses:
    """Score class indices with logits of which each rank has some classes, in two small collectives.

    What ranks exchange is the largest logit of each row, and then the sums of exponentials and the target's logit.
    """
    if options.input != "logits" or target.is_floating_point():
        raise ValueError(
            f"`preds` that are sharded over the classes must be logits with integer targets, got input="
            f"{options.input!r} and {target.dtype} targets; gather them with full_tensor()."
        )
    num_classes = shape[options.class_dim]
    logits, target = options.shifted(shard.logits, target)
    index, status = lookup_index(as_index(target).reshape(-1), num_classes, options)
    smoothing = options.smoothing(num_classes)

    rows = logits.movedim(options.class_dim, -1)
    width = rows.shape[-1]
    dtype = score_dtype(logits)
    max_rows = rows_in_buffer(logits, dtype.itemsize * max(1, width))
    top = torch.full(index.shape, -math.inf, dtype=dtype, device=index.device)
    blocks = list(row_blocks([rows], max_rows)) if width else []  # A rank may have no classes at all.
    for block, (part,) in blocks:
        top[block] = part.reshape(-1, width).amax(1).to(dtype)
    top, mismatch = _max_and_mismatch(top, shard, num_classes)
    status = mark(status, TARGET_OUT_OF_RANGE, mismatch.expand(index.shape))

    local = index - shard.offset
    here = (local >= 0) & (local < width)
    local = local.masked_fill(~here, 0)
    own_weight = None if class_weight is None else class_weight[shard.offset : shard.offset + width]
    # Of each row: the target's logit and the sum of all, relative to the largest, and the sum of exponentials.
    wide = _runtime.widest_float(index.device)
    shares = torch.zeros(3, len(index), dtype=wide, device=index.device)
    constants: dict[str, Any] = {"input": "logits", "eps": None}
    most = max((num_rows_in(block) for block, _ in blocks), default=0)
    buffer = None if fuses(options.backend) else padded_rows(most, width, dtype, index.device)
    for block, (part,) in blocks:
        rows = num_rows_in(block)
        tensors = part.reshape(-1, width), local[block], None if buffer is None else buffer[:rows], top[block]
        sums = RowSums(
            *run(options.backend, kernels.sum_hard, tensors, [own_weight], smooth=smoothing > 0, **constants)
        )
        of_target = sums.of_target.to(wide) - top[block]
        for share, x in zip(shares, (of_target, sums.exponentials, sums.of_all), strict=True):
            if x is not None:
                share[block] = x
    shares[0].masked_fill_(~here, 0.0)
    of_target, exponentials, of_all = sum_over_ranks(shares, shard.group)
    sums = RowSums(of_target, torch.zeros_like(top), exponentials, of_all if smoothing else None, None)
    denominator = None if class_weight is None else class_weight[index]
    loss = kernels.losses_of_hard(sums, denominator, class_weight, num_classes, smoothing=smoothing, **constants)
    return TargetLosses(loss, denominator, status).as_sequences(target.shape)


def _max_and_mismatch(top: Tensor, shard: VocabShard, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the largest of each number over ranks, and whether the parts of the ranks do not fit together.

    What has to be known of the parts travels with the numbers. If they do not fit, all ranks raise, where that is free.
    """
    # Not from a list, which the device would have to wait for.
    about = torch.stack([top.new_full((), x) for x in (bool(shard.mismatch), num_classes, -num_classes)])
    packed = max_over_ranks(torch.cat([top, about]), shard.group)
    mismatch, most, least = packed[-3:].unbind()
    mismatch = (mismatch > 0) | (most != -least)
    if _runtime.can_read_values(mismatch) and mismatch:
        raise ValueError(
            f"`preds` must be a DTensor of the parts that torch.chunk gives, of as many classes on every rank"
            f"{shard.mismatch}; pass `shape` and `stride` to DTensor.from_local if the last part is smaller."
        )
    return packed[:-3], mismatch
