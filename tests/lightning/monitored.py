"""What the tests of CrossEntropyMonitor share."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer

from tests.lightning.fits import (
    K,
    Model,
    points_of_events,
    readings,
)

NAMES = ("cross_entropy", "bits_per_token", "perplexity")


def logged(trainer: Trainer) -> dict[str, list[tuple[int, float]]]:
    """Read the event files of a trainer back."""
    return points_of_events(trainer.logger.log_dir)


def monitored(trainer: Trainer, part: str = "") -> dict[str, float]:
    """Return what callbacks can monitor whose tag begins so."""
    return {tag: value.item() for tag, value in trainer.callback_metrics.items() if tag.startswith(part)}


def tagged(stage: str, values: dict[str, float], suffix: str = "") -> dict[str, float]:
    """Return values under their tags."""
    return {f"{stage}/{name}{suffix}": value for name, value in values.items()}


def expected_best(module: Model, *which: int) -> Any:
    """Return the lowest bits per token of some evaluations."""
    return pytest.approx(min(readings(module.evaluations[i][0])["bits_per_token"] for i in which), rel=1e-6)


NUM_BYTES = [0, *range(1, K)]
