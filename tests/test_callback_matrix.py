"""CrossEntropyMonitor under every pair of settings of a Trainer: each value at each place, against float64 sums."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from xent_metrics.callback import CrossEntropyMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU:UserWarning")

K = 12
NUM_TRAIN, NUM_EPOCHS, EVERY = 7, 2, 2
NORMAL_QUANTILE = 1.959963984540054  # Of 97.5 %.

FACTORS = {
    "form": ("losses", "logits", "shifted labels", "mean", "extract"),
    "precision": ("32-true", "bf16-true", "bf16-mixed", "16-mixed"),
    "accumulate": (1, 3),
    "loaders": ("one", "two", "dict"),
    "logger": ("tensorboard", "csv", "both", "none"),
}

Sequences = list[tuple[float, int]]  # Nats and targets of each.
Points = dict[str, list[tuple[int, float]]]  # Tag to (step, value).


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


def ragged_batches(num: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of unequal numbers of targets, with padding; a whole row of the second batch is padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(num):
        x, y = torch.randint(0, K, (2, 2 + i % 3, 4 + 5 * (i % 2)), generator=generator)
        y[0, 2 + i % 3 :] = -100
        if i == 1:
            y[1] = -100
        batches.append((x, y))
    return batches


def ragged_loader(num: int, seed: int) -> DataLoader:
    """Serve batches as they are."""
    return DataLoader(ragged_batches(num, seed), batch_size=None)


def some_loaders(kind: str, seed: int) -> Any:
    """Return one loader, or two of unequal size."""
    one, two = ragged_loader(3, seed), ragged_loader(2, seed + 1)
    return {"one": one, "two": [one, two], "dict": {"a": one, "b": two}}[kind]


class Model(LightningModule):
    """Returns one of the forms, and keeps nats and counts of every sequence, of the logits that it produced."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.table = torch.nn.Embedding(K, 6)
        self.head = torch.nn.Linear(6, K)
        self.train_batches: list[Sequences] = []
        self.evaluations: list[dict[int, Sequences]] = []  # Of each epoch of validation or test, by loader.

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, Any], Sequences]:
        x, y = batch
        logits = self.head(self.table(x))
        scored, target = (logits[:, :-1], y[:, 1:]) if self.form == "shifted labels" else (logits, y)
        losses = F.cross_entropy(scored.float().mT, target, reduction="none")
        loss = losses.sum() / (target != -100).sum()
        wide = F.cross_entropy(scored.detach().double().mT, target, reduction="none")
        sequences = list(zip(wide.sum(1).tolist(), (target != -100).sum(1).tolist(), strict=True))
        return {
            "losses": {"loss": loss, "losses": losses, "target": y},
            "logits": {"loss": loss, "logits": logits, "target": y},
            "shifted labels": {"loss": loss, "logits": logits, "labels": y},
            "mean": {"loss": loss, "num_tokens": (target != -100).sum()},
            "extract": {"loss": loss, "nll": losses},
        }[self.form], sequences

    def training_step(self, batch, batch_idx):
        outputs, sequences = self.step(batch)
        self.train_batches.append(sequences)
        return outputs

    def evaluate(self, batch, batch_idx, dataloader_idx=0):
        outputs, sequences = self.step(batch)
        if self.trainer.sanity_checking:  # Would be the best one, and spoil every sum.
            return {name: 0 * value if value.is_floating_point() else value for name, value in outputs.items()}
        if (batch_idx, dataloader_idx) == (0, 0):
            self.evaluations.append({})
        self.evaluations[-1].setdefault(dataloader_idx, []).extend(sequences)
        return outputs

    validation_step = evaluate
    test_step = evaluate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def losses_of_the_batch(outputs: dict[str, Any], batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """Take one half of the form from the outputs, the other from the batch."""
    return {"losses": outputs["nll"], "target": batch[1]}


class Recorder(Callback):
    """Copies what callbacks can monitor, wherever they look."""

    def __init__(self) -> None:
        self.train_batches: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.train_epochs: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        self.train_batches.append({tag: value.item() for tag, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self.validations.append({tag: value.item() for tag, value in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer, *_):
        self.train_epochs.append({tag: value.item() for tag, value in trainer.callback_metrics.items()})


def readings(sequences: Sequences) -> dict[str, float]:
    """All nats over all targets, in three units."""
    nats, count = math.fsum(nats for nats, _ in sequences), sum(count for _, count in sequences)
    return {
        "cross_entropy": nats / count,
        "bits_per_token": nats / count / math.log(2),
        "perplexity": math.exp(nats / count),
    }


def bounds(sequences: Sequences) -> dict[str, float]:
    """The interval of the definition, over the sequences that have targets."""
    sequences = [(nats, count) for nats, count in sequences if count]
    num, weight = len(sequences), sum(count for _, count in sequences)
    mean = math.fsum(nats for nats, _ in sequences) / weight
    squares = math.fsum((nats - mean * count) ** 2 for nats, count in sequences)
    margin = NORMAL_QUANTILE * math.sqrt(num / (num - 1) * squares) / weight
    return {
        "cross_entropy_lower": mean - margin,
        "cross_entropy_upper": mean + margin,
        "perplexity_lower": math.exp(mean - margin),
        "perplexity_upper": math.exp(mean + margin),
    }


def pool(batches: list[Sequences]) -> Sequences:
    """Return the sequences of some batches, or of some loaders."""
    return [sequence for batch in batches for sequence in batch]


def expected_evaluation(stage: str, by_loader: dict[int, Sequences], form: str) -> dict[str, float]:
    """Everything that is logged of a validation or a test, but the best."""
    whole = pool(list(by_loader.values()))
    values = readings(whole) | ({} if form == "mean" else bounds(whole))
    if len(by_loader) > 1:
        for i, sequences in by_loader.items():
            values |= {f"{name}/dataloader_idx_{i}": value for name, value in readings(sequences).items()}
    return {f"{stage}/{name}": value for name, value in values.items()}


def expected_windows(train_batches: list[Sequences], accumulate: int) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Number of batches and step at each log point, and what the batches since the last one read."""
    start, steps = 0, 0
    for batch in range(len(train_batches)):
        if (batch % NUM_TRAIN + 1) % accumulate and batch % NUM_TRAIN + 1 != NUM_TRAIN:
            continue  # No optimizer step.
        if (steps + 1) % EVERY == 0:
            window = readings(pool(train_batches[start : batch + 1]))
            yield batch + 1, steps, {f"train/{name}": value for name, value in window.items()}
            start = batch + 1
        steps += 1


def points_of_events(folder: str) -> Points:
    """Read event files back; a tag has one point at a step."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def points_of_csv(folder: str) -> Points:
    """Read the table of CSVLogger back."""
    points: Points = {}
    with (Path(folder) / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value and tag != "step":
                    points.setdefault(tag, []).append((int(row["step"]), float(value)))
    return points


def assert_points(actual: Points, expected: Points) -> None:
    """Compare every tag, step and value; Lightning's own `epoch` is the only other tag."""
    assert set(actual) - {"epoch"} == set(expected)
    for tag, points in expected.items():
        assert [step for step, _ in actual[tag]] == [step for step, _ in points], tag
        assert [value for _, value in actual[tag]] == pytest.approx([value for _, value in points], rel=2e-6), tag


@pytest.mark.parametrize(tuple(FACTORS), covering_runs())
def test_every_value_is_pooled_and_logged_once(tmp_path, form, precision, accumulate, loaders, logger) -> None:
    """Windows, epochs, validations with bounds, best and loaders, and a test: in all loggers and for all callbacks."""
    writers = {
        "tensorboard": [TensorBoardLogger(tmp_path, version=0)],
        "csv": [CSVLogger(tmp_path, version=0)],
        "both": [TensorBoardLogger(tmp_path, version=0), CSVLogger(tmp_path, version=1)],
        "none": False,
    }[logger]
    module, recorder = Model(form), Recorder()
    monitor = CrossEntropyMonitor(
        shift=form == "shifted labels", extract=losses_of_the_batch if form == "extract" else None
    )
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        accumulate_grad_batches=accumulate,
        max_epochs=NUM_EPOCHS,
        log_every_n_steps=EVERY,
        logger=writers,
        callbacks=[monitor, recorder],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, ragged_loader(NUM_TRAIN, seed=1), some_loaders(loaders, seed=2))
    tested = trainer.test(module, some_loaders(loaders, seed=4), verbose=False)

    # What was computed, by another way.
    assert {len(module.train_batches), len(recorder.train_batches)} == {NUM_EPOCHS * NUM_TRAIN}
    steps_per_epoch = math.ceil(NUM_TRAIN / accumulate)
    expected: Points = {}

    def expect(step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            expected.setdefault(tag, []).append((step, value))

    windows = list(expected_windows(module.train_batches, accumulate))
    for _, step, values in windows:
        expect(step, values)
    epochs, validations, best = [], [], math.inf
    for epoch in range(NUM_EPOCHS):
        last_step = (epoch + 1) * steps_per_epoch - 1
        whole = readings(pool(module.train_batches[epoch * NUM_TRAIN : (epoch + 1) * NUM_TRAIN]))
        epochs.append({f"train/{name}_epoch": value for name, value in whole.items()})
        expect(last_step, epochs[-1])
        validations.append(expected_evaluation("val", module.evaluations[epoch], form))
        best = min(best, validations[-1]["val/bits_per_token"])
        validations[-1]["val/best_bits_per_token"] = best
        expect(last_step, validations[-1])
    test = expected_evaluation("test", module.evaluations[NUM_EPOCHS], form)
    expect(NUM_EPOCHS * steps_per_epoch, test)

    # What loggers have.
    for each in writers or []:
        read = points_of_events if isinstance(each, TensorBoardLogger) else points_of_csv
        assert_points(read(each.log_dir), expected)

    # What callbacks can monitor, and what `trainer.test` returns.
    def present(seen: dict[str, float], part: str, values: dict[str, float]) -> None:
        own = {tag: value for tag, value in seen.items() if tag.startswith(part)}
        assert own == pytest.approx(values, rel=1e-6)

    for number, seen in enumerate(recorder.train_batches, 1):
        latest = next((values for batches, _, values in reversed(windows) if batches <= number), {})
        windows_seen = {tag: value for tag, value in seen.items() if not tag.endswith("_epoch")}
        present(windows_seen, "train/", latest)
    for epoch in range(NUM_EPOCHS):
        present(recorder.validations[epoch], "val/", validations[epoch])
        present(recorder.train_epochs[epoch], "val/", validations[epoch])
        epoch_seen = {tag: value for tag, value in recorder.train_epochs[epoch].items() if tag.endswith("_epoch")}
        present(epoch_seen, "", epochs[epoch])
    present({tag: value.item() for tag, value in trainer.callback_metrics.items()}, "", test)
    assert len(tested) == len(module.evaluations[NUM_EPOCHS])
    for of_a_loader in tested:
        present(of_a_loader, "", test)
    assert trainer.progress_bar_metrics == {}
