"""Fits on several processes: the module, the loaders and what looks at them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.connectors.logger_connector import result as lightning_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Sampler

from tests.blank_pictures import without_drawing
from tests.distributed.ranks import run_ranks as run_world
from xent_metrics.tally.tally import STATE_SIZE

K = 20
READINGS = ("cross_entropy", "bits_per_token", "perplexity")
BOUNDS = ("cross_entropy_lower", "cross_entropy_upper", "perplexity_lower", "perplexity_upper")
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all_single", "barrier",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter", "scatter",
)  # fmt: skip


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, tmp_path: Path, timeout: float = 90.0) -> Any:
    """Call a function on ranks that draw nothing.

    Where a run fails on one rank, or Lightning says goodbye, nobody waits for the others.
    """
    how = {"tmp_path": tmp_path, "timeout": timeout, "rank_first": False, "together": False}
    return run_world(world_size, without_drawing, function, *args, **how)


class World(ClusterEnvironment):
    """The process group that is already there: Lightning starts no processes and opens no ports."""

    creates_processes_externally = True
    main_address = ""
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    def local_rank(self) -> int:
        return torch.distributed.get_rank()

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None:
        assert size == self.world_size()

    def set_global_rank(self, rank: int) -> None:
        assert rank == self.global_rank()


def rows(num: int, first: int = 0) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Samples of 4 targets, some of them padding; each is the same wherever it appears."""
    samples = []
    for index in range(first, first + num):
        x, y = torch.randint(0, K, (2, 4), generator=torch.Generator().manual_seed(index))
        y[4 - index % 3 :] = -100
        samples.append((index, x, y))
    return samples


class Table(LightningModule):
    """A table of logits that returns one of the accepted forms and remembers what it saw of each sample."""

    def __init__(self, form: str = "losses", lr: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Embedding(K, K)
        self.form, self.lr = form, lr
        self.seen: dict[str, list[dict[int, tuple[float, int]]]] = {"train": [], "val": [], "test": []}

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x)

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        index, x, y = batch
        logits = self.logits(x)
        full = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        losses = F.cross_entropy(full.mT, y, reduction="none")
        wide = F.cross_entropy(full.detach().double().mT, y, reduction="none")
        if not self.trainer.sanity_checking:
            counts = (y != -100).sum(1).tolist()
            seen = zip(index.tolist(), zip(wide.sum(1).tolist(), counts, strict=True), strict=True)
            self.seen[stage].append(dict(seen))
        num_tokens = (y != -100).sum()
        loss = losses.sum() / num_tokens
        return {
            "losses": {"loss": loss, "losses": losses, "target": y},
            "logits": {"loss": loss, "logits": logits, "target": y},
            "flattened": {"loss": loss, "losses": losses.flatten(), "target": y.flatten()},
            "mean": {"loss": loss, "num_tokens": num_tokens},
        }[self.form]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> object:
        return self.step("train", batch)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> object:
        return self.step("val", batch)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> object:
        return self.step("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(num: int, batch_size: int = 2, first: int = 0, sampler: Sampler | None = None) -> DataLoader:
    """Serve rows in order."""
    return DataLoader(rows(num, first), batch_size, sampler=sampler)


def make_trainer(*callbacks: Callback, folder: Path | None = None, strategy: Any = "ddp", **kwargs: Any) -> Trainer:
    """Return a small silent Trainer on all ranks of the world, or a plain one in a world of one."""
    world_size = torch.distributed.get_world_size()
    several = {"strategy": strategy, "plugins": [World()]} if world_size > 1 or strategy != "ddp" else {}
    defaults = {"max_epochs": 1, "log_every_n_steps": 2, "num_sanity_val_steps": 1}
    return Trainer(
        accelerator="cpu",
        devices=world_size,
        callbacks=list(callbacks),
        logger=False if folder is None else TensorBoardLogger(folder, name="", version=""),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **(several | defaults | kwargs),
    )


def own(metrics: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the monitor's values, to the bit."""
    names = (*READINGS, "best_bits_per_token", "num_tokens", "macro_cross_entropy")
    return {tag: value.item().hex() for tag, value in metrics.items() if tag.split("/")[1].startswith(names)}


@contextmanager
def messages() -> Iterator[list[str]]:
    """Record every warning, also those that Lightning would give once a process only."""
    lightning_result.warning_cache.clear()
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
        said += [str(warning.message) for warning in caught]


def about_us(said: list[str]) -> list[str]:
    """Pick the warnings that the monitor gives, or that are about what it logs."""
    return [message for message in said if any(part in message for part in ("Monitor", *READINGS))]


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Record the collectives that Python code calls; `tally` for those on a tensor of a tally's type and size."""
    calls: list[str] = []

    def record(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs.get("tensor")
            is_tally = isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.numel() >= STATE_SIZE
            calls.append("tally" if is_tally else name)
            return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(torch.distributed, name, record(name, getattr(torch.distributed, name)))
        yield calls


def pooled(batches: list[dict[int, tuple[float, int]]]) -> float:
    """Cross-entropy of some batches: all nats over all targets."""
    values = [value for batch in batches for value in batch.values()]
    return math.fsum(nats for nats, _ in values) / sum(count for _, count in values)


def logged(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Read the event files of a run: tag to (step, bits of the value)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value.hex()) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_logged(
    points: dict[str, list[tuple[int, str]]], tag: str, expected: list[tuple[int, float]], suffix=""
) -> None:
    """Compare all three readings with pooled cross-entropies at their steps."""
    readings = {"cross_entropy": lambda h: h, "bits_per_token": lambda h: h / math.log(2), "perplexity": math.exp}
    for name, read in readings.items():
        actual = points[f"{tag}/{name}{suffix}"]
        assert [step for step, _ in actual] == [step for step, _ in expected]
        values = [float.fromhex(value) for _, value in actual]
        assert values == pytest.approx([read(h) for _, h in expected], rel=2e-6)


def both(ranks: list[dict[str, Any]], stage: str, start: int, stop: int) -> list[dict[int, tuple[float, int]]]:
    """Return some batches of a stage, of all ranks."""
    return [batch for rank in ranks for batch in rank["seen"][stage][start:stop]]


class Sharded(Table):
    """The table's parameters are spread over the data-parallel ranks (FSDP2)."""

    def configure_model(self) -> None:
        fully_shard(self.table, mesh=self.device_mesh["data_parallel"])
