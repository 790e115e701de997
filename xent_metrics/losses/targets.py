"""Targets as they come: integers of any dtype, marks of what is ignored, indices outside the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.losses.options import BinaryOptions, LossOptions
from xent_metrics.losses.target_losses import IGNORED, TARGET_OUT_OF_RANGE, mark


def as_index(integers: Tensor) -> Tensor:
    """Convert to int64; what a uint64 has above that becomes the largest index, instead of wrapping to a negative."""
    if integers.dtype == torch.int64:
        return integers
    index = integers.to(torch.int64)
    return index.masked_fill(index < 0, 2**63 - 1) if integers.dtype == torch.uint64 else index


assert IGNORED == TARGET_OUT_OF_RANGE + 1  # See `lookup_index`.


def ignored_status(target: Tensor, options: LossOptions | BinaryOptions) -> Tensor | None:
    """Return the status of targets of which some may be `ignore_index`; None if none is."""
    mark_value = options.ignore_index
    if mark_value is None:
        return None
    # In a wide type: a narrow one would round `ignore_index` to a target.
    exact = target.to(_runtime.widest_float(target.device)) if target.is_floating_point() else target
    extremes = _runtime.least_and_greatest(exact)
    # A mark such as -100 is usually below all targets.
    if extremes and (mark_value < extremes[0] or mark_value > extremes[1]):  # False of NaNs.
        return None
    ignored = exact == mark_value
    known = extremes is not None and mark_value in extremes
    return None if extremes and not known and not ignored.any() else mark(None, IGNORED, ignored)


def lookup_index(index: Tensor, num_classes: int, options: LossOptions) -> tuple[Tensor, Tensor | None]:
    """Return indices that can all be looked up, and the status of the given ones."""
    extremes = _runtime.least_and_greatest(index)
    all_classes = extremes is not None and extremes[0] >= 0 and extremes[1] < num_classes
    mark_value = options.ignore_index
    if all_classes and (mark_value is None or not 0 <= mark_value < num_classes):
        return index, None
    within = index if all_classes else index.clamp(0, num_classes - 1)
    outside = within != index
    if mark_value is None:
        return within, mark(None, TARGET_OUT_OF_RANGE, outside)
    ignored = index == mark_value
    if all_classes:
        return within, mark(None, IGNORED, ignored)
    if 0 <= mark_value < num_classes:
        return within, mark(None, TARGET_OUT_OF_RANGE, outside).masked_fill_(ignored, IGNORED)
    # What is ignored is outside too, and its code is the next one.
    return within, torch.add(ignored.view(torch.int8), outside.view(torch.int8), alpha=TARGET_OUT_OF_RANGE)
