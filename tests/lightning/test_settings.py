"""CrossEntropyMonitor under every pair of settings of a Trainer: each value at each place, against float64 sums."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tests.lightning.fits import (
    NUM_TRAIN,
    Expected,
    Model,
    assert_points,
    make_trainer,
    points_of_csv,
    points_of_events,
    ragged_loader,
)
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU:UserWarning")

NUM_EPOCHS, EVERY = 2, 2
WINDOWS = r"train/.*(?<!_epoch)$"
FACTORS = {
    "form": ("losses", "logits", "shifted labels", "mean", "extract"),
    "precision": ("32-true", "bf16-true", "bf16-mixed", "16-mixed"),
    "accumulate": (1, 3),
    "loaders": ("one", "two", "dict"),
    "logger": ("tensorboard", "csv", "both", "none"),
}


def covering_runs() -> list[tuple[Any, ...]]:
    """Few runs in which each two values of two factors meet: always the one with the most pairs that are missing."""
    runs = list(itertools.product(*FACTORS.values()))

    def pairs(run: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(run), 2))

    missing = set().union(*map(pairs, runs))
    chosen = []
    while missing:
        chosen.append(max(runs, key=lambda run: len(pairs(run) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def some_loaders(kind: str, seed: int) -> Any:
    """Return one loader, or two of unequal size."""
    one, two = ragged_loader(3, seed), ragged_loader(2, seed + 1)
    return {"one": one, "two": [one, two], "dict": {"web": one, "code": two}}[kind]


def losses_of_the_batch(outputs: Any, batch: Any) -> dict[str, Any]:
    """Take one half of the form from the outputs, the other from the batch."""
    return {"losses": outputs["nll"], "target": batch[1]}


def log_points(accumulate: int) -> Iterator[tuple[int, int]]:
    """Yield the number of batches and the step at each log point."""
    steps = 0
    for batch in range(NUM_EPOCHS * NUM_TRAIN):
        of_the_epoch = batch % NUM_TRAIN + 1
        if of_the_epoch % accumulate == 0 or of_the_epoch == NUM_TRAIN:  # The optimizer steps.
            if (steps + 1) % EVERY == 0:
                yield batch + 1, steps
            steps += 1


class Recorder(Callback):
    """Copies what callbacks can monitor, wherever they look."""

    def __init__(self) -> None:
        self.train_batches: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.train_epochs: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        self.train_batches.append(floats(trainer.callback_metrics))

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self.validations.append(floats(trainer.callback_metrics))

    def on_train_epoch_end(self, trainer, *_):
        self.train_epochs.append(floats(trainer.callback_metrics))


def floats(metrics: dict[str, Any]) -> dict[str, float]:
    """Copy values, as long as they are what they are."""
    return {tag: float(value) for tag, value in metrics.items()}


def runs_and_slow_ones() -> Iterator[Any]:
    """Yield every second run; the others are slow."""
    for i, run in enumerate(covering_runs()):
        yield pytest.param(*run, marks=pytest.mark.slow if i % 4 else ())


@pytest.mark.parametrize(tuple(FACTORS), [*runs_and_slow_ones()])
def test_every_value_is_pooled_and_logged_once(tmp_path, form, precision, accumulate, loaders, logger) -> None:
    """Windows, epochs, validations with bounds, best and loaders, and a test: in all loggers and for all callbacks."""
    writers = {
        "tensorboard": [TensorBoardLogger(tmp_path, version=0)],
        "csv": [CSVLogger(tmp_path, version=0)],
        "both": [TensorBoardLogger(tmp_path, version=0), CSVLogger(tmp_path, version=1)],
        "none": False,
    }[logger]
    monitor = CrossEntropyMonitor(
        shift=form == "shifted labels", extract=losses_of_the_batch if form == "extract" else None
    )
    module, recorder = Model(form), Recorder()
    trainer = make_trainer(
        tmp_path,
        monitor,
        recorder,
        logger=writers,
        precision=precision,
        accumulate_grad_batches=accumulate,
        max_epochs=NUM_EPOCHS,
        log_every_n_steps=EVERY,
    )
    trainer.fit(module, ragged_loader(NUM_TRAIN, seed=1), some_loaders(loaders, seed=2))
    tested = trainer.test(module, some_loaders(loaders, seed=4), verbose=False)

    batches, windows = module.train_batches, list(log_points(accumulate))
    steps_per_epoch = math.ceil(NUM_TRAIN / accumulate)
    ends = [(epoch * NUM_TRAIN, epoch * steps_per_epoch - 1) for epoch in range(1, NUM_EPOCHS + 1)]
    expected = Expected().windows(batches, *windows).epochs(batches, *ends)
    *validations, test = module.evaluations
    names = ("web", "code") if loaders == "dict" else ()
    expected.validations(validations, *(step for _, step in ends), interval=form != "mean", names=names)
    last_step = NUM_EPOCHS * steps_per_epoch
    expected.evaluation("test", last_step, test, interval=form != "mean", names=names)

    # What loggers have.
    for each in writers or []:
        read = points_of_events if isinstance(each, TensorBoardLogger) else points_of_csv
        assert_points(read(each.log_dir), expected.points)

    # What callbacks can monitor, and what `trainer.test` returns.
    def assert_latest(seen: dict[str, float], step: int, tags: str) -> None:
        latest = {
            tag: [value for at, value in points if at <= step][-1]
            for tag, points in expected.points.items()
            if re.match(tags, tag) and points[0][0] <= step
        }
        assert {tag: value for tag, value in seen.items() if re.match(tags, tag)} == pytest.approx(latest, rel=1e-6)

    assert len(recorder.train_batches) == NUM_EPOCHS * NUM_TRAIN
    for number, seen in enumerate(recorder.train_batches, 1):
        assert_latest(seen, max((step for end, step in windows if end <= number), default=-1), WINDOWS)
    for (_, step), at_validation, at_end in zip(ends, recorder.validations, recorder.train_epochs, strict=True):
        assert_latest(at_validation, step, "val")
        assert_latest(at_end, step, "train|val")
    assert_latest(floats(trainer.callback_metrics), last_step, "test")
    assert len(tested) == len(test)
    for i, returned in enumerate(tested):  # Those of all loaders, and of the loader itself.
        own = f"test/|test_by_loader/.*/{names[i] if names else f'dataloader_idx_{i}'}$"
        assert {tag for tag in returned if not re.match(own, tag)} == set()
        assert len(returned) == sum(bool(re.match(own, tag)) for tag in expected.points)
        assert floats(returned).items() <= floats(trainer.callback_metrics).items()
    assert set(trainer.progress_bar_metrics) == {"test/bits_per_token"}
