"""What the page of text at the end of a run tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xent_metrics.lightning.tagged_readings import TaggedReadings
from xent_metrics.lightning.trainer import describe_trainer
from xent_metrics.lightning.windows import RunTallies
from xent_metrics.validation_stats import ValidationStats

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def describe_run(
    trainer: Trainer,
    pl_module: LightningModule,
    settings: Mapping[str, Any],
    run: RunTallies,
    readings: TaggedReadings,
    stats: ValidationStats | None,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return its configuration, its counts of targets, and its repeated samples.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        settings: The arguments of the monitor.
        run: What was tallied.
        readings: Reads that.
        stats: The statistics of the last validation, if there are such.
    """
    configuration = describe_trainer(trainer, pl_module) | {f"CrossEntropyMonitor.{k}": v for k, v in settings.items()}
    totals = {"training": run.run_total, "the last validation": run.validated}
    counts = {name: readings.read_exactly(tallies)[0] for name, tallies in totals.items()}
    return configuration, counts, stats.histogram.num_repeated if stats else 0
