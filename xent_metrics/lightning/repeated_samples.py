"""Samples that ranks draw twice, so that all have equally many: which they are, and a warning where that is unknown."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler, IterableDataset

from xent_metrics.distributed import is_distributed, num_unpadded_samples
from xent_metrics.lightning.step_outputs import StepOutputs


class DrawnSamples(NamedTuple):
    """How many samples this rank drew for a batch, and how many of them, the first ones, are not repeated."""

    num_samples: int
    num_kept: int


class RepeatedSamples:
    """Finds and leaves out repeated samples, and warns once for each reason why it cannot."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def find(self, loaders: Any, stage: str, batch_idx: int, dataloader_idx: int) -> DrawnSamples | None:
        """Return the samples of a batch; None if its sampler repeats none, or if it cannot be known."""
        loader = tree_leaves(loaders)[dataloader_idx]
        sampler, batch_size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
        if not is_distributed() or sampler is None or isinstance(getattr(loader, "dataset", None), IterableDataset):
            return None
        if not isinstance(sampler, DistributedSampler) or batch_size is None:
            own = "batches of its own" if batch_size is None else f"a {type(sampler).__name__}"
            self.warn(f"the {stage} loader has {own}")
            return None
        if sampler.total_size <= len(sampler.dataset):  # type: ignore[arg-type]
            return None  # It divides evenly, or drops the rest.
        start = batch_idx * batch_size
        num_samples = min(batch_size, len(sampler) - start)
        return DrawnSamples(num_samples, num_unpadded_samples(sampler, start, num_samples))

    def leave_out(self, outputs: StepOutputs, drawn: DrawnSamples) -> tuple[StepOutputs, int]:
        """Return the outputs without repeated samples, and how many those were."""
        if not outputs.target.shape[:1] == outputs.preds.shape[:1] == (drawn.num_samples,):
            # Such as targets that were flattened: which of them are of a repeated sample is unknown.
            self.warn("targets do not have a row for each sample")
            return outputs, 0
        # A sampler puts the samples that it repeats at the end of each rank's share.
        return outputs.first(drawn.num_kept), drawn.num_samples - drawn.num_kept

    def warn(self, reason: str) -> None:
        """Warn on the first rank that samples may be counted twice, once for each reason."""
        if reason in self._warned:
            return
        self._warned.add(reason)
        if torch.distributed.get_rank() == 0:
            warnings.warn(
                f"`CrossEntropyMonitor` cannot tell which samples ranks draw twice to be equally many, since {reason}: "
                "all of them are counted; use `torch.utils.data.DistributedSampler` and return targets with a row for "
                "each sample, or make the number of samples a multiple of the number of ranks.",
                UserWarning,
                stacklevel=2,
            )
