"""Targets that were flattened before the loss, of which nobody can say which sequence they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics.utilities.prints import rank_zero_warn

from xent_metrics.lightning.step_outputs import StepOutputs
from xent_metrics.losses.score import target_shape


class FlattenedTargets:
    """Warns, once, of a step that returns more targets in a row than its batch has samples.

    As many targets as samples are those of a classifier, where each sample is what was drawn.
    """

    def __init__(self) -> None:
        self._warned = False

    def warn_of(self, step: str, outputs: StepOutputs, batch: Any) -> None:
        """Warn if the targets of a step were flattened."""
        shape = target_shape(outputs.target, outputs.options)
        if self._warned or len(shape) != 1:
            return
        num_samples = _count_samples(batch)
        if num_samples is not None and shape[0] > num_samples:
            self._warned = True
            rank_zero_warn(
                f"{step} must return targets with a row for each sample, got {shape[0]} in one row for a batch of "
                f"{num_samples}: each counts as a sequence of its own, so that intervals are too narrow; return losses "
                "or logits, and targets, as they are before they are flattened.",
                UserWarning,
            )


def _count_samples(batch: Any) -> int | None:
    """Return the length of the first tensor of a batch, which Lightning takes for its size; None if there is none."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
