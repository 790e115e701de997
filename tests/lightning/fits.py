"""A small model that keeps its own float64 losses, what they read, and readers of what loggers wrote."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

K = 12
NUM_TRAIN = 7
IGNORED = -100

Batch = tuple[Tensor, Tensor]
Scored = tuple[Tensor, Tensor]  # Losses in float64, and their targets: a row is a sequence.
Points = dict[str, list[tuple[int, float]]]  # Tag to (step, value).


def ragged_batches(num: int, seed: int) -> list[Batch]:
    """Batches of unequal numbers of targets, with padding; a whole row of the second batch is padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for i in range(num):
        x, y = torch.randint(0, K, (2, 2 + i % 3, 4 + 5 * (i % 2)), generator=generator)
        y[0, 2 + i % 3 :] = IGNORED
        if i == 1:
            y[1] = IGNORED
        batches.append((x, y))
    return batches


def ragged_loader(num: int, seed: int = 0) -> DataLoader:
    """Serve batches as they are."""
    return DataLoader(ragged_batches(num, seed), batch_size=None)


class Steps:
    """Steps that return one of the forms, and keep the losses of the logits that they produced.

    Args:
        form: What the steps return.
        automatic: Whether Lightning optimises.
        adapt: Called as `adapt(stage, outputs, batch, batch_idx)`, returns what the step is to return instead.
    """

    def __init__(
        self, form: str = "losses", automatic: bool = True, adapt: Callable[[str, Any, Batch, int], Any] | None = None
    ) -> None:
        super().__init__()
        self.form = form
        self.automatic_optimization = automatic
        self.adapt = adapt
        self.table = torch.nn.Embedding(K, 6)
        self.head = torch.nn.Linear(6, K)
        self.train_batches: list[Scored] = []
        self.evaluations: list[dict[int, list[Scored]]] = []  # Of each epoch of validation or test, by loader.

    def step(self, stage: str, batch: Batch, batch_idx: int) -> tuple[Any, Scored]:
        """Return what a step returns, and what it scored."""
        x, y = batch
        logits = self.head(self.table(x))
        scored, target = (logits[:, :-1], y[:, 1:]) if self.form == "shifted labels" else (logits, y)
        losses = F.cross_entropy(scored.float().mT, target, reduction="none")
        loss = losses.sum() / (target != IGNORED).sum()
        wide = F.cross_entropy(scored.detach().double().mT, target, reduction="none")
        outputs = {
            "losses": {"loss": loss, "losses": losses, "target": y},
            "logits": {"loss": loss, "logits": logits, "target": y},
            "shifted labels": {"loss": loss, "logits": logits, "labels": y},
            "mean": {"loss": loss, "num_tokens": (target != IGNORED).sum()},
            "extract": {"loss": loss, "nll": losses},
            "tensor": loss,
        }[self.form]
        return outputs if self.adapt is None else self.adapt(stage, outputs, batch, batch_idx), (wide, target)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        """Return a form, and optimise if nobody else does."""
        outputs, scored = self.step("train", batch, batch_idx)
        self.train_batches.append(scored)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(outputs["loss"])
            optimizer.step()
        return outputs

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return a form; in a sanity check one that would be the best, and spoil every sum."""
        return self.evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return a form."""
        return self.evaluate("test", batch, batch_idx, dataloader_idx)

    def evaluate(self, stage: str, batch: Batch, batch_idx: int, dataloader_idx: int) -> Any:
        """Return a form, and keep what was scored by loader."""
        outputs, scored = self.step(stage, batch, batch_idx)
        if self.trainer.sanity_checking:
            floating = {name: 0 * x for name, x in outputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
            return outputs | floating
        if (batch_idx, dataloader_idx) == (0, 0):
            self.evaluations.append({})
        self.evaluations[-1].setdefault(dataloader_idx, []).append(scored)
        return outputs

    def configure_optimizers(self) -> Any:
        """Move fast enough for every batch to read something else."""
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Model(Steps, LightningModule):
    """The steps as a module of `lightning.pytorch`."""


class Data(LightningDataModule):
    """The same batches for a command line."""

    def train_dataloader(self) -> DataLoader:
        """Return `NUM_TRAIN` batches."""
        return ragged_loader(NUM_TRAIN, seed=1)

    def val_dataloader(self) -> DataLoader:
        """Return 3 batches."""
        return ragged_loader(3, seed=2)


def second_head(outputs: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """Find the losses of a second head, and take the targets from the batch."""
    return {"losses": outputs["second"], "target": batch[1]}


def with_all(stage: str, outputs: dict[str, Any], batch: Batch, batch_idx: int) -> dict[str, Any]:
    """Add a second head, whose losses are three times those of the first, and the name of a group."""
    return outputs | {"second": 3 * outputs["losses"], "group": ("even", "odd")[batch_idx % 2]}


def make_trainer(tmp_path: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    """Return a small silent Trainer that writes an event file."""
    kwargs = {"max_epochs": 2, "log_every_n_steps": 2, "logger": TensorBoardLogger(tmp_path, version=0)} | kwargs
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        default_root_dir=tmp_path,
        **kwargs,
    )


def pool(batches: Iterable[Scored]) -> tuple[float, int]:
    """Return all nats, and the number of targets."""
    batches = list(batches)
    return math.fsum(wide.sum().item() for wide, _ in batches), sum(int((y != IGNORED).sum()) for _, y in batches)


def readings(batches: Iterable[Scored]) -> dict[str, float]:
    """All nats over all targets, in three units."""
    nats, count = pool(batches)
    return readings_of(nats / count)


def counted(batches: Iterable[Scored]) -> dict[str, float]:
    """All nats over all targets, and how many these are."""
    batches = list(batches)
    return readings(batches) | {"num_tokens": pool(batches)[1]}


def readings_of(nats: float) -> dict[str, float]:
    """A mean in three units."""
    return {
        "cross_entropy": nats,
        "bits_per_token": nats / math.log(2),
        "perplexity": math.exp(nats) if nats < 709 else math.inf,
    }


def bounds(batches: Iterable[Scored], confidence: float = 0.95) -> dict[str, float]:
    """The interval of the definition, over the sequences that have targets."""
    rows = [pool([row]) for wide, y in batches for row in zip(wide, y, strict=True)]
    rows = [(nats, count) for nats, count in rows if count]
    num, weight = len(rows), sum(count for _, count in rows)
    mean = math.fsum(nats for nats, _ in rows) / weight
    squares = math.fsum((nats - mean * count) ** 2 for nats, count in rows)
    freedom = weight**2 / sum(count**2 for _, count in rows) - 1
    margin = stats.t.isf((1 - confidence) / 2, max(freedom, 0.25)) * math.sqrt(num / (num - 1) * squares) / weight
    return {
        "cross_entropy_lower": mean - margin,
        "cross_entropy_upper": mean + margin,
        "perplexity_lower": math.exp(mean - margin),
        "perplexity_upper": math.exp(mean + margin),
    }


def points_of_events(folder: str | Path) -> Points:
    """Read event files back, but for TensorBoard's lines to compare with.

    In the order in which they were written: by name the tenth comes before the ninth.
    """
    points: Points = {}
    for path in sorted(Path(folder).glob("events.out.tfevents.*"), key=lambda path: int(path.suffix[1:])):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if not re.search("/(uniform|unigram)_", tag):
                points.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    return points


def points_of_csv(folder: str | Path) -> Points:
    """Read the table of CSVLogger back."""
    points: Points = {}
    with (Path(folder) / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if value and tag != "step":
                    points.setdefault(tag, []).append((int(row["step"]), float(value)))
    return points


def assert_points(actual: Points, expected: Points, rel: float = 2e-6) -> None:
    """Compare every tag, step and value; Lightning's own `epoch` is the only other tag."""
    assert set(actual) - {"epoch"} == set(expected)
    for tag, points in expected.items():
        assert [step for step, _ in actual[tag]] == [step for step, _ in points], tag
        values = [value for _, value in points]
        assert [value for _, value in actual[tag]] == pytest.approx(values, rel=rel, nan_ok=True), tag


class Expected:
    """Collects the points that are to be found in a logger: everything, and nothing else."""

    def __init__(self) -> None:
        self.points: Points = {}

    def add(self, stage: str, step: int, values: dict[str, float], suffix: str = "") -> Expected:
        """Expect values at a step, under `{stage}/{name}{suffix}`."""
        for name, value in values.items():
            self.points.setdefault(f"{stage}/{name}{suffix}", []).append((step, value))
        return self

    def windows(self, batches: list[Scored], *ends: tuple[int, int]) -> Expected:
        """Expect windows that end after so many batches, at this step."""
        start = 0
        for end, step in ends:
            self.add("train", step, readings(batches[start:end]) | {"num_tokens": pool(batches[:end])[1]})
            start = end
        return self

    def epochs(self, batches: list[Scored], *ends: tuple[int, int]) -> Expected:
        """Expect epochs of training that end after so many batches, at this step."""
        start = 0
        for end, step in ends:
            values = readings(batches[start:end]) | {"num_tokens": pool(batches[:end])[1]}
            self.add("train", step, values, "_epoch")
            start = end
        return self

    def evaluation(
        self,
        stage: str,
        step: int,
        by_loader: dict[int, list[Scored]],
        interval: bool = True,
        groups: list[list[Scored]] | None = None,
        names: Sequence[str] = (),
    ) -> Expected:
        """Expect a validation or a test, without the best."""
        whole = [scored for batches in by_loader.values() for scored in batches]
        self.add(stage, step, counted(whole) | (bounds(whole) if interval else {}))
        if len(by_loader) > 1:
            for i, batches in by_loader.items():
                self.add(
                    f"{stage}_by_loader", step, readings(batches), f"/{names[i] if names else f'dataloader_idx_{i}'}"
                )
        if groups or len(by_loader) > 1:
            self.macro(stage, step, groups or [*by_loader.values()])
        return self

    def macro(self, stage: str, step: int, parts: list[list[Scored]]) -> Expected:
        """Expect the unweighted mean over parts that have targets."""
        each = [readings(part)["cross_entropy"] for part in parts if pool(part)[1]]
        return self.add(stage, step, {"macro_cross_entropy": sum(each) / len(each)})

    def validations(
        self, evaluations: list[dict[int, list[Scored]]], *steps: int, interval: bool = True, names: Sequence[str] = ()
    ) -> Expected:
        """Expect the validations of a fit, with the best so far."""
        best = math.inf
        for step, by_loader in zip(steps, evaluations, strict=True):
            self.evaluation("val", step, by_loader, interval, names=names)
            best = min(best, self.points["val/bits_per_token"][-1][1])
            self.add("val", step, {"best_bits_per_token": best})
        return self
