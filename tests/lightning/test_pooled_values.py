"""Every reading is that of all ranks, in one collective a log point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from tests.distributed.ranks import needs_fsdp2
from tests.lightning.worlds import (
    BOUNDS,
    READINGS,
    Sharded,
    Table,
    about_us,
    assert_logged,
    both,
    collectives,
    loader,
    logged,
    make_trainer,
    messages,
    own,
    pooled,
    run_ranks,
)
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = pytest.mark.distributed


class Timeline(Callback):
    """Notes how many tallies were reduced since the last note."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.noted = calls, 0
        self.notes: list[tuple[str, int]] = []

    def note(self, name: str) -> None:
        total = self.calls.count("tally")
        self.notes.append((name, total - self.noted))
        self.noted = total

    def on_train_batch_end(self, *args: Any) -> None:
        self.note("batch")

    def on_train_epoch_end(self, *args: Any) -> None:
        self.note("epoch")

    def on_validation_epoch_end(self, *args: Any) -> None:
        self.note("validation")


def fit_everything(folder: Path, strategy: str) -> dict[str, Any]:
    """Fit with accumulation, validation in mid-epoch, several loaders; then again without the monitor."""
    settings = {"max_epochs": 2, "log_every_n_steps": 3, "accumulate_grad_batches": 2, "val_check_interval": 3}
    data = (loader(26), [loader(8, first=100), loader(5, first=200)])

    def start(*callbacks: Callback, folder: Path) -> tuple[Table, Trainer]:
        own = {"strategy": ModelParallelStrategy(2, 1)} if strategy == "fsdp2" else {}
        return Sharded() if own else Table(), make_trainer(*callbacks, folder=folder, **settings, **own)

    with messages() as said, collectives() as calls:
        timeline = Timeline(calls)
        module, trainer = start(CrossEntropyMonitor(), timeline, folder=folder)
        trainer.fit(module, *data)
    with collectives() as others:
        plain, without = start(Timeline(others), folder=folder / "without")
        without.fit(plain, *data)
    return {
        "seen": module.seen,
        "metrics": own(trainer.callback_metrics),
        "said": about_us(said),
        "notes": timeline.notes,
        "calls": (len(calls), len(others), others.count("tally")),
    }


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def everything(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("everything")
    return folder / "logs", run_ranks(2, fit_everything, folder / "logs", request.param, tmp_path=folder)


def test_every_reading_is_that_of_all_ranks(everything) -> None:
    """Windows, also over the end of an epoch, epochs and validations are all nats over all targets."""
    folder, ranks = everything
    points = logged(folder)
    # 7 batches an epoch, optimizer steps after the second, fourth, sixth and last: 8 steps, logged at 2 and 5.
    windows = [(2, both(ranks, "train", 0, 6)), (5, both(ranks, "train", 6, 11))]
    epochs = [(3, both(ranks, "train", 0, 7)), (7, both(ranks, "train", 7, 14))]
    assert_logged(points, "train", [(step, pooled(batches)) for step, batches in windows])
    assert_logged(points, "train", [(step, pooled(batches)) for step, batches in epochs], suffix="_epoch")
    # A validation has 2 + 2 batches on each rank, and the second loader gives one sample to both.
    validations = [both(ranks, "val", start, start + 4) for start in range(0, 16, 4)]
    samples = [{index: value for batch in batches for index, value in batch.items()} for batches in validations]
    assert {len(each) for each in samples} == {13}
    assert_logged(points, "val", list(zip((1, 2, 5, 6), (pooled([each]) for each in samples), strict=True)))


def test_ranks_log_the_same_bits_once(everything) -> None:
    """`callback_metrics` is the same on all ranks, and one of them writes."""
    folder, ranks = everything
    expected = {f"train/{name}{suffix}" for name in (*READINGS, "num_tokens") for suffix in ("", "_epoch")}
    expected |= {
        f"val/{name}" for name in (*READINGS, *BOUNDS, "best_bits_per_token", "num_tokens", "macro_cross_entropy")
    }
    expected |= {f"val_by_loader/{name}/dataloader_idx_{i}" for name in READINGS for i in range(2)}
    assert set(ranks[0]["metrics"]) == expected
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert len(list(folder.glob("events*"))) == 1


def test_nothing_is_said_when_nothing_is_wrong(everything) -> None:
    """Lightning's advice to reduce our values once more is not given, nor any warning of ours."""
    _, ranks = everything
    assert [rank["said"] for rank in ranks] == [[], []]


def test_one_collective_a_log_point_an_epoch_and_a_validation(everything) -> None:
    """No other collective is called: as many more than without the monitor as there are readings."""
    _, ranks = everything
    before, last = [("batch", 0)] * 3 + [("validation", 1)], [("batch", 0), ("epoch", 1)]
    first = [*before, ("batch", 0), ("batch", 0), ("batch", 1), ("validation", 1), *last]
    second = [*before, ("batch", 1), ("batch", 0), ("batch", 0), ("validation", 1), *last]
    for rank in ranks:
        assert rank["notes"] == [("validation", 1), *first, *second]
        with_monitor, without, tallies_without = rank["calls"]
        assert tallies_without == 0
        # One more asks, once a run, how many classes there are for TensorBoard's reference lines.
        assert with_monitor - without == sum(number for _, number in rank["notes"]) + 1
