"""One validation or test: the tallies of each loader, and the statistics for its pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xent_metrics.distributed import place_among_ranks
from xent_metrics.lightning.flattened_targets import FlattenedTargets
from xent_metrics.lightning.repeated_samples import RepeatedSamples
from xent_metrics.lightning.step_outputs import OutputReader, StepOutputs, Tallies
from xent_metrics.lightning.windows import Pool, sum_over_ranks
from xent_metrics.validation_stats import ValidationStats

if TYPE_CHECKING:
    from xent_metrics.lightning.trainer import Ranks


class Evaluation:
    """Collects a validation or a test.

    Args:
        stage: `"val"` or `"test"`.
        num_loaders: How many loaders there are.
        reader: Reads what steps return.
        repeated: Finds samples that ranks draw twice.
        flattened: Finds targets that were flattened.
        stats: Collects statistics for pictures; None for no pictures.
    """

    def __init__(
        self,
        stage: str,
        num_loaders: int,
        reader: OutputReader,
        repeated: RepeatedSamples,
        flattened: FlattenedTargets,
        stats: ValidationStats | None = None,
    ) -> None:
        self._stage = stage
        self._step = {"val": "validation_step", "test": "test_step"}[stage]
        self._pools = [Pool(reader.zero()) for _ in range(num_loaders)]
        self._reader = reader
        self._repeated = repeated
        self._flattened = flattened
        self.stats = stats

    def add(self, outputs: Any, batch: Any, loaders: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Add what a step returned, without the samples that another rank has too; `loaders` are the Trainer's."""
        drawn = self._repeated.find(loaders, self._stage, batch_idx, dataloader_idx)
        read = self._reader.read(self._step, outputs, batch)
        if read is None:
            return
        if isinstance(read, StepOutputs):
            self._flattened.warn_of(self._step, read, batch)
        if drawn is not None:
            if isinstance(read, StepOutputs):  # A mean cannot be taken apart.
                read, num_repeated = self._repeated.leave_out(read, drawn)
                group = self._reader.sequence_group
                if self.stats and (group is None or place_among_ranks(group)[0] == 0):  # Others have the same samples.
                    self.stats.leave_out(num_repeated)
            else:
                self._repeated.warn(f"{self._step} returns means")
        # Losses are computed once, for the tallies and for the statistics.
        scored = self._pools[dataloader_idx].add_outputs(self._reader, read)
        if self.stats and scored and isinstance(read, StepOutputs):
            classes = self._reader.classes(read)
            self.stats.add(scored.loss, scored.is_scored, *classes, self._reader.scores(read))

    def reduce(self, ranks: Ranks) -> list[Tallies]:
        """Return the tallies of each loader, and reduce the histogram too: ranks meet in one collective."""
        parts: list[Any] = [pool.tallies() for pool in self._pools]
        about = f"{len(parts)} loaders of the {self._step} of {self._reader.about}"
        if self.stats is None:
            return sum_over_ranks(parts, about, ranks)
        *loaders, [self.stats.histogram] = sum_over_ranks([*parts, (self.stats.histogram,)], about, ranks)
        return loaders
