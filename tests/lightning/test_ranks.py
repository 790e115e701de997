"""CrossEntropyMonitor on several processes: pooled values, what ranks repeat, restarts, exceptions and no hangs."""

from __future__ import annotations

import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.logger_connector import result as lightning_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, Sampler

from tests.distributed.ranks import run_ranks as run_world
from xent_metrics import CrossEntropyReport
from xent_metrics.lightning import CrossEntropyMonitor
from xent_metrics.tally.tally import STATE_SIZE, Tally

pytestmark = pytest.mark.distributed

K = 20
READINGS = ("cross_entropy", "bits_per_token", "perplexity")
BOUNDS = ("cross_entropy_lower", "cross_entropy_upper", "perplexity_lower", "perplexity_upper")
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all_single", "barrier",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter", "scatter",
)  # fmt: skip


# Where a run fails on one rank, or Lightning says goodbye, nobody waits for the others.
run_ranks = partial(run_world, timeout=90.0, rank_first=False, together=False)


# What runs on the ranks.


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
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **(several | defaults | kwargs),
    )


def own(metrics: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the monitor's values, to the bit."""
    names = (*READINGS, "best_bits_per_token")
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


# What looks at it.


def pooled(batches: list[dict[int, tuple[float, int]]]) -> float:
    """Cross-entropy of some batches: all nats over all targets."""
    values = [value for batch in batches for value in batch.values()]
    return math.fsum(nats for nats, _ in values) / sum(count for _, count in values)


def num_targets(batches: list[dict[int, tuple[float, int]]]) -> int:
    """How many targets some batches score."""
    return sum(count for batch in batches for _, count in batch.values())


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


# 1. Pooled values.


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


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def everything(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("everything")
    return folder / "logs", run_ranks(2, fit_everything, folder / "logs", request.param, tmp_path=folder)


def both(ranks: list[dict[str, Any]], stage: str, start: int, stop: int) -> list[dict[int, tuple[float, int]]]:
    """Return some batches of a stage, of all ranks."""
    return [batch for rank in ranks for batch in rank["seen"][stage][start:stop]]


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
    expected = {f"train/{name}{suffix}" for name in READINGS for suffix in ("", "_epoch")}
    expected |= {f"val/{name}" for name in (*READINGS, *BOUNDS, "best_bits_per_token")}
    expected |= {f"val/{name}/dataloader_idx_{i}" for name in READINGS for i in range(2)}
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


# 2. Samples that ranks repeat.


class Backwards(Sampler):
    """An order of the user's own, which Lightning deals to the ranks."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num - 1, -1, -1))

    def __len__(self) -> int:
        return self.num


class Dealt(Backwards):
    """A sampler that deals to the ranks by itself."""

    def __iter__(self) -> Iterator[int]:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return iter([i % self.num for i in range(rank, rank + self.num, world_size)])

    def __len__(self) -> int:
        return math.ceil(self.num / torch.distributed.get_world_size())


class Batches(BatchSampler):
    """Batches of the user's own, into which Lightning puts a sampler that deals to the ranks."""


UNEVEN = [(form, 5, batch_size) for form in ("losses", "logits") for batch_size in (1, 2, 3)] + [("losses", 1, 2)]


def evaluate_uneven() -> tuple[dict[str, dict[str, str]], list[str]]:
    """Validate in a fit, validate and test on numbers of samples that ranks cannot share evenly."""
    values: dict[str, dict[str, str]] = {}

    def keep(name: str, trainer: Trainer) -> None:
        values[name] = {tag: x for tag, x in own(trainer.callback_metrics).items() if not tag.startswith("train")}

    with messages() as said:
        for form, num, batch_size in UNEVEN:
            name, module = f"{form}, {num} in batches of {batch_size}", Table(form, lr=0.0)
            trainer = make_trainer(CrossEntropyMonitor())
            trainer.fit(module, loader(6), loader(num, batch_size))
            keep(f"fit: {name}", trainer)
            trainer.validate(module, loader(num, batch_size), verbose=False)
            keep(f"validate: {name}", trainer)
            trainer.test(module, loader(num, batch_size), verbose=False)
            keep(f"test: {name}", trainer)
        trainer = make_trainer(CrossEntropyMonitor())
        trainer.validate(Table(), loader(5, sampler=Backwards(5)), verbose=False)
        keep("an order of its own", trainer)
        trainer.validate(Table(), [loader(5, 2), loader(7, 3, first=100)], verbose=False)
        keep("two loaders", trainer)
    return values, about_us(said)


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    [(values, _)] = run_ranks(1, evaluate_uneven, tmp_path=tmp_path_factory.mktemp("one"))
    return values


@pytest.mark.parametrize("world_size", [2, 3])
def test_samples_that_ranks_repeat_are_scored_once(tmp_path, of_one_process, world_size) -> None:
    """Validation and test are those of one process to the last bit, bounds included, whatever the batch size."""
    for values, said in run_ranks(world_size, evaluate_uneven, tmp_path=tmp_path):
        assert values == of_one_process
        assert not said
    assert len(of_one_process) == 3 * len(UNEVEN) + 2
    tags = {f"val/{name}" for name in (*READINGS, *BOUNDS)}
    tags |= {f"val/{name}/dataloader_idx_{i}" for name in READINGS for i in range(2)}
    assert tags == set(of_one_process["two loaders"])


def fit_what_cannot_be_told() -> dict[str, list[str]]:
    """Fit with validation where the monitor cannot tell what is repeated, and where nothing is."""
    said = {}
    cases = {
        "a sampler of its own": ("losses", loader(5, sampler=Dealt(5))),
        "batches of its own": ("losses", DataLoader(rows(5), batch_sampler=Batches(range(5), 2, False))),
        "flattened": ("flattened", loader(5)),
        "mean": ("mean", loader(5)),
        "flattened, nothing repeated": ("flattened", loader(6)),
        "mean, nothing repeated": ("mean", loader(6)),
        "nothing repeated": ("losses", loader(6)),
    }
    for name, (form, data) in cases.items():
        with messages() as caught:
            deals = not isinstance(data.sampler, Dealt)
            trainer = make_trainer(CrossEntropyMonitor(), max_epochs=2, use_distributed_sampler=deals)
            trainer.fit(Table(form), loader(4), data)
        said[name] = about_us(caught)
    return said


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    return run_ranks(2, fit_what_cannot_be_told, tmp_path=tmp_path_factory.mktemp("warned"))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("a sampler of its own", "the val loader has a Dealt"),
        ("batches of its own", "the val loader has batches of its own"),
        ("flattened", "targets do not have a row for each sample"),
        ("mean", "validation_step returns means"),
    ],
    ids=["sampler", "batches", "flattened", "mean"],
)
def test_one_warning_where_repetitions_cannot_be_told(warned, case, reason) -> None:
    """It says why, and what to do, once for all validations of a fit."""
    [message] = warned[0][case]
    assert reason in message
    assert "all of them are counted; use `torch.utils.data.DistributedSampler`" in message


def test_no_warning_where_nothing_is_repeated(warned) -> None:
    """A number of samples that ranks share evenly is fine in any form."""
    cases = [case for case in warned[0] if "nothing repeated" in case]
    assert len(cases) == 3
    assert [rank[case] for rank in warned for case in cases] == [[]] * 6


def test_only_the_first_rank_warns(warned) -> None:
    """A warning for each of a thousand ranks is noise."""
    assert not any(warned[1].values())


def validate_other_data() -> dict[str, str]:
    """Fit with one validation loader, then validate on others."""
    module, trainer = Table(lr=0.0), make_trainer(CrossEntropyMonitor())
    trainer.fit(module, loader(4), loader(5, 1))
    trainer.validate(module, loader(6, 1, first=100), verbose=False)
    return own(trainer.callback_metrics)


def test_validation_after_a_fit_looks_at_its_own_loaders(tmp_path) -> None:
    """What was repeated in the fit's validation says nothing about another data set."""
    [expected] = run_ranks(1, validate_other_data, tmp_path=tmp_path)
    assert run_ranks(2, validate_other_data, tmp_path=tmp_path) == [expected] * 2


def fit_ddp_alone() -> list[str]:
    """Fit with the strategy of several ranks in a world of one."""
    with messages() as said:
        trainer = make_trainer(CrossEntropyMonitor(), plugins=[World()], strategy=DDPStrategy())
        trainer.fit(Table(), loader(4), loader(5))
    return about_us(said)


def test_nothing_is_said_in_a_world_of_one(tmp_path) -> None:
    """The strategy of several ranks with a single one gives no advice on reducing either."""
    assert run_ranks(1, fit_ddp_alone, tmp_path=tmp_path) == [[]]


# 3. Model parallelism.


class Sharded(Table):
    """The table's parameters are spread over the data-parallel ranks (FSDP2)."""

    def configure_model(self) -> None:
        fully_shard(self.table, mesh=self.device_mesh["data_parallel"])


class Parallel(Table):
    """The table's classes are spread over the tensor-parallel ranks, and gathered for the loss."""

    spread = False

    def configure_model(self) -> None:
        layout = Shard(-1) if self.spread else Replicate()
        plan = ColwiseParallel(output_layouts=layout, use_local_output=not self.spread)
        parallelize_module(self.table, self.device_mesh["tensor_parallel"], plan)


class Spread(Parallel):
    """The logits stay spread."""

    spread = True


def fit_model_parallel(folder: Path, module_class: type[Table], data_parallel: int | None) -> dict[str, Any]:
    """Fit with `ModelParallelStrategy`, or plainly, and then validate without training."""
    world_size = torch.distributed.get_world_size()

    def trainer(**kwargs: Any) -> Trainer:
        if data_parallel is not None:
            kwargs["strategy"] = ModelParallelStrategy(data_parallel, world_size // data_parallel)
        return make_trainer(CrossEntropyMonitor(), **kwargs)

    with messages() as said:
        module, fitter = module_class("logits"), trainer(folder=folder)
        fitter.fit(module, loader(16), loader(5))
        fresh, validator = module_class("logits"), trainer()
        validator.validate(fresh, loader(5), verbose=False)
    val = {tag: x for tag, x in own(validator.callback_metrics).items() if tag.startswith("val")}
    return {"seen": module.seen, "fit": own(fitter.callback_metrics), "val": val, "said": about_us(said)}


@pytest.mark.parametrize(
    ("module_class", "world_size", "data_parallel"),
    [(Sharded, 2, 2), (Parallel, 2, 1), (Spread, 2, 1), (Parallel, 4, 2)],
    ids=["fsdp2", "tensor parallel", "tensor parallel, logits spread", "two by two"],
)
def test_model_parallel_ranks_are_counted_once(tmp_path, module_class, world_size, data_parallel) -> None:
    """Readings are those of the data-parallel ranks, equal on all ranks, and those of one process."""
    ranks = run_ranks(world_size, fit_model_parallel, tmp_path / "log", module_class, data_parallel, tmp_path=tmp_path)
    [one] = run_ranks(1, fit_model_parallel, tmp_path / "one", Table, None, tmp_path=tmp_path)
    different = ranks[:: world_size // data_parallel]
    points, batches = logged(tmp_path / "log"), 8 // data_parallel
    windows = [(1 + start, pooled(both(different, "train", start, start + 2))) for start in range(0, batches, 2)]
    assert_logged(points, "train", windows)
    assert_logged(points, "train", [(batches - 1, pooled(both(different, "train", 0, batches)))], suffix="_epoch")
    for rank in ranks:
        assert rank["fit"] == ranks[0]["fit"]
        assert rank["said"] == []
        if module_class is Spread:  # The softmax of parts of a row rounds differently.
            values, expected = ([float.fromhex(x) for x in each["val"].values()] for each in (rank, one))
            assert values == pytest.approx(expected, rel=1e-6)
        else:
            assert rank["val"] == one["val"]


def fit_fsdp(folder: Path) -> dict[str, Any]:
    """Fit with FSDP of the first kind, on GPUs."""
    module, settings = Table("logits"), {"accelerator": "cuda", "strategy": "fsdp"}
    trainer = make_trainer(CrossEntropyMonitor(), folder=folder, **settings)
    trainer.fit(module, loader(16), loader(5))
    return {"seen": module.seen, "metrics": own(trainer.callback_metrics)}


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDPStrategy takes no CPU, and two ranks need two GPUs")
def test_fsdp_logs_pooled_readings(tmp_path) -> None:
    """FullyShardedDataParallel's ranks hold different data, all of them."""
    ranks = run_ranks(2, fit_fsdp, tmp_path / "log", tmp_path=tmp_path)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert_logged(logged(tmp_path / "log"), "train", [(3, pooled(both(ranks, "train", 0, 4)))], suffix="_epoch")


# 4. Restarts.


class Positioned:
    """A loader that deals batches to the ranks and saves how many all of them have had."""

    def __init__(self, num: int) -> None:
        self.batches = [torch.utils.data.default_collate(rows(2, first=2 * i)) for i in range(num)]
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.position, self.start = 0, 0

    def __len__(self) -> int:
        return len(self.batches) // self.world_size

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        start, self.start = self.start, 0
        for i in range(start // self.world_size, len(self)):
            self.position = (i + 1) * self.world_size
            yield self.batches[i * self.world_size + self.rank]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = self.start = state["position"] % len(self.batches)


class Killed(Callback):
    """Ends its process as an operating system does, in the middle of the second epoch."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)


class States(Callback):
    """Keeps what the monitor gave to each checkpoint, and how many targets its epochs had."""

    def __init__(self, monitor: CrossEntropyMonitor) -> None:
        self.monitor = monitor
        self.saved: list[dict[str, Any]] = []
        self.scored: list[int] = []

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved.append(checkpoint["callbacks"][self.monitor.state_key])

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.scored.append(Tally(self.monitor.state_dict()["tallies"]["epoch"][0]).totals().scored)


def train(folder: Path, checkpoint: Path | None = None, killed: bool = False) -> dict[str, Any]:
    """Train three epochs of 14 batches with checkpoints, from the start or from one of them."""
    module, monitor = Table(), CrossEntropyMonitor()
    states = States(monitor)
    keeper = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    callbacks = [monitor, states, keeper, *([Killed()] if killed else [])]
    trainer = make_trainer(*callbacks, folder=folder, max_epochs=3, log_every_n_steps=6)
    trainer.fit(module, Positioned(14), ckpt_path=checkpoint)
    return {"seen": module.seen, "states": states.saved, "scored": states.scored}


def at_step(folder: Path, step: int) -> Path:
    """Return the checkpoint that a run wrote after a step."""
    [path] = (folder / "checkpoints").glob(f"*step={step}.ckpt")
    return path


LAST = {1: 16, 2: 10}  # The step of a killed run's last checkpoint: two or three batches into the second epoch.


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def killed(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, list[dict[str, Any]]]:
    """A run that was never killed, and one that was."""
    world_size, folder = request.param, tmp_path_factory.mktemp("killed")
    ranks = run_ranks(world_size, train, folder / "whole", tmp_path=folder)
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[-9"):
        run_ranks(world_size, train, folder / "killed", None, True, tmp_path=folder)
    newest = max((folder / "killed" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest == at_step(folder / "killed", LAST[world_size])
    return world_size, folder, ranks


def assert_goes_on(whole: Path, resumed: Path, step: int) -> None:
    """Everything that a resumed run logs is what the whole run logged from that step on, to the bit."""
    actual, expected = logged(resumed), logged(whole)
    for name in READINGS:
        for tag in (f"train/{name}", f"train/{name}_epoch"):
            assert actual[tag] == [point for point in expected[tag] if point[0] >= step]
            assert actual[tag]


def test_a_killed_run_goes_on_with_the_same_bits(killed) -> None:
    """Windows, also one that began in the epoch before, and epochs are those of a run that was never killed."""
    world_size, folder, _ = killed
    step = LAST[world_size]
    run_ranks(world_size, train, folder / "resumed", at_step(folder / "killed", step), tmp_path=folder)
    assert_goes_on(folder / "whole", folder / "resumed", step)


def test_a_checkpoint_before_the_first_window_of_an_epoch_goes_on_too(killed) -> None:
    """What the epoch before left to the window is in the state."""
    world_size, folder, _ = killed
    step = {1: 16, 2: 8}[world_size]
    path = at_step(folder / "whole", step)
    state = torch.load(path, weights_only=True)["callbacks"][CrossEntropyMonitor().state_key]
    assert Tally(state["tallies"]["reduced_not_logged"][0]).totals().scored > 0
    run_ranks(world_size, train, folder / "early", path, tmp_path=folder)
    assert_goes_on(folder / "whole", folder / "early", step)


def test_a_checkpoint_after_the_last_batch_of_an_epoch_goes_on_too(killed) -> None:
    """The next epoch does not get the targets of the one that is over."""
    world_size, folder, _ = killed
    step = 28 // world_size
    run_ranks(world_size, train, folder / "last", at_step(folder / "whole", step), tmp_path=folder)
    assert_goes_on(folder / "whole", folder / "last", step)


def test_a_resumed_epoch_on_another_number_of_ranks_counts_every_target_once(killed) -> None:
    """The tallies of a checkpoint are not multiplied by the ranks that load them, nor divided."""
    world_size, folder, whole = killed
    step, other = LAST[world_size], 3 - world_size
    ranks = run_ranks(other, train, folder / "other", at_step(folder / "killed", step), tmp_path=folder)
    epoch = 14 // world_size
    before = both(whole, "train", epoch, step)
    after = [batch for rank in ranks for batch in rank["seen"]["train"][: -14 // other]]
    assert len(before) == step * world_size - 14
    assert [rank["scored"][0] for rank in ranks] == [num_targets(before + after)] * other
    assert [rank["scored"][1] for rank in ranks] == [num_targets(both(whole, "train", 0, epoch))] * other
    value = float.fromhex(logged(folder / "other")["train/cross_entropy_epoch"][0][1])
    assert value == pytest.approx(pooled(before + after), rel=2e-6)


def test_the_state_is_plain_and_the_same_on_all_ranks(killed) -> None:
    """Tensors under strings, which PyTorch loads without running anything, and no rank's own."""
    _, folder, ranks = killed
    for states in zip(*(rank["states"] for rank in ranks), strict=True):
        for state in states:
            assert all(type(name) is str for name in state)
            assert {type(leaf) for leaf in tree_leaves(state)} <= {torch.Tensor, float, int}
            assert as_lists(state) == as_lists(states[0])
    loaded = torch.load(at_step(folder / "whole", 2), weights_only=True)["callbacks"][CrossEntropyMonitor().state_key]
    assert as_lists(loaded) == as_lists(ranks[0]["states"][0])


def as_lists(state: dict[str, Any]) -> str:
    """Spell out a state, so that two can be compared."""
    return repr(tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, state))


# 5. Exceptions.


class Alone(Callback):
    """Keeps Lightning from waiting for the others after an exception, and counts what the monitor reduces then."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.before = calls, 0

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        trainer.strategy.barrier = lambda *args, **kwargs: None
        self.before = self.calls.count("tally")


class Failing(Table):
    """Fails on some ranks at the sixth batch."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__()
        self.ranks = ranks

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> object:
        if batch_idx == 5 and torch.distributed.get_rank() in self.ranks:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def epoch_in(path: Path) -> Tally:
    """Return all targets of the epoch that a monitor goes on with from a checkpoint."""
    monitor = CrossEntropyMonitor()
    monitor.load_state_dict(torch.load(path, weights_only=True)["callbacks"][monitor.state_key])
    state = monitor.state_dict()
    return Tally(state["tallies"]["epoch"][0])


def fail(folder: Path, ranks: list[int]) -> dict[str, Any]:
    """Fit until an exception, with every checkpoint that Lightning can write then."""
    module, error = Failing(ranks), None
    with collectives() as calls:
        alone = Alone(calls)
        checkpoints = ModelCheckpoint(folder / "model", save_on_exception=True), OnExceptionCheckpoint(folder / "any")
        try:
            trainer = make_trainer(CrossEntropyMonitor(), alone, *checkpoints, log_every_n_steps=2)
            trainer.fit(module, loader(40))
        except Exception as caught:
            error = type(caught).__name__
    return {"seen": module.seen, "error": error, "after": calls.count("tally") - alone.before}


@pytest.mark.parametrize("failing", [[0], [1], [0, 1]], ids=str)
def test_an_exception_leaves_a_checkpoint_without_waiting_for_anyone(tmp_path, failing) -> None:
    """It holds the tallies of the last log point, of all ranks, and loads."""
    ranks = run_ranks(2, fail, tmp_path, failing, tmp_path=tmp_path, timeout=60)
    assert [ranks[rank]["error"] for rank in failing] == ["ZeroDivisionError"] * len(failing)
    assert all(rank["error"] for rank in ranks)
    assert [rank["after"] for rank in ranks] == [0, 0]
    expected = both(ranks, "train", 0, 4)
    for path in (*(tmp_path / "model").iterdir(), tmp_path / "any" / "on_exception.ckpt"):
        epoch = epoch_in(path)
        assert epoch.totals().scored == num_targets(expected)
        value = CrossEntropyReport().read(epoch)["cross_entropy"].item()
        assert value == pytest.approx(pooled(expected), rel=2e-6)


def test_an_exception_on_a_single_rank_loses_nothing(tmp_path) -> None:
    """There is nobody to wait for, so the checkpoint has the targets since the last log point too."""
    [rank] = run_ranks(1, fail, tmp_path, [0], tmp_path=tmp_path)
    scored = epoch_in(tmp_path / "any" / "on_exception.ckpt").totals().scored
    assert scored == num_targets(rank["seen"]["train"])


# 6. No rank waits for another for ever.


class Reader(Callback):
    """Reads `callback_metrics` on the first rank only, where others read them too."""

    def __init__(self) -> None:
        self.read: list[dict[str, str]] = []

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.read.append(own(trainer.callback_metrics))

    on_train_batch_end = on_validation_batch_end = on_validation_epoch_end = lambda self, trainer, module, *args: (
        self.on_train_epoch_end(trainer, module)
    )


class Selfish(Callback):
    """Logs under names that other ranks do not have."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        module.log(f"train/of_rank_{trainer.global_rank}", 1.0, on_step=True, on_epoch=True)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        module.log(f"val/of_rank_{trainer.global_rank}", 1.0)


class Uneven:
    """A loader without a length: three batches for the first rank, as many as you like for the others."""

    def __init__(self, for_others: int) -> None:
        self.rank = torch.distributed.get_rank()
        self.num = for_others if self.rank else 3

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for i in range(self.num):
            yield torch.utils.data.default_collate(rows(2, first=100 * self.rank + 2 * i))


def fit_with_company(folder: Path) -> dict[str, Any]:
    """Fit beside callbacks that do different things on different ranks."""
    module, readers = Table(), (Reader(), Reader())
    trainer = make_trainer(readers[0], CrossEntropyMonitor(), readers[1], Selfish(), folder=folder)
    trainer.fit(module, loader(16), loader(5))
    return {"metrics": own(trainer.callback_metrics), "read": [reader.read for reader in readers]}


def fit_with_uneven_validation(for_others: int) -> dict[str, Any]:
    """Fit with a validation of which ranks have unequal shares."""
    module, trainer = Table(), make_trainer(CrossEntropyMonitor(), num_sanity_val_steps=0)
    trainer.fit(module, loader(16), Uneven(for_others))
    return {"metrics": own(trainer.callback_metrics), "seen": module.seen}


def test_what_others_do_on_one_rank_does_not_hang(tmp_path) -> None:
    """Reading our values communicates nothing, and their names are the same on all ranks."""
    ranks = run_ranks(2, fit_with_company, tmp_path / "log", tmp_path=tmp_path, timeout=60)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert "val/cross_entropy" in ranks[0]["read"][1][-1]
    assert ranks[1]["read"] == [[], []]


@pytest.mark.parametrize("for_others", [0, 1])
def test_a_rank_with_fewer_batches_is_waited_for_once(tmp_path, for_others) -> None:
    """A validation of which one rank has less, or nothing, is that of all batches."""
    ranks = run_ranks(2, fit_with_uneven_validation, for_others, tmp_path=tmp_path, timeout=60)
    assert [len(rank["seen"]["val"]) for rank in ranks] == [3, for_others]
    for rank in ranks:
        assert rank["metrics"] == ranks[0]["metrics"]
        value = float.fromhex(rank["metrics"]["val/cross_entropy"])
        assert value == pytest.approx(pooled(both(ranks, "val", 0, 3)), rel=2e-6)


class Mistaken(Table):
    """Returns a target that is no class, in one stage, on the second rank, in one batch."""

    def __init__(self, stage: str) -> None:
        super().__init__("logits")
        self.stage = stage

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        form = super().step(stage, batch)
        if stage == self.stage and torch.distributed.get_rank() == 1 and len(self.seen[stage]) == 1:
            form["target"] = form["target"].clone().fill_(K + 3)
        return form


def fit_mistakes() -> list[tuple[str, int]]:
    """Fit with bad targets in training, and then in validation."""
    errors = []
    for stage in ("train", "val"):
        module = Mistaken(stage)
        with pytest.raises(ValueError, match="`target`") as caught:
            make_trainer(CrossEntropyMonitor(), log_every_n_steps=3).fit(module, loader(16), loader(8))
        errors.append((str(caught.value), len(module.seen[stage])))
    return errors


def test_every_rank_raises_what_one_rank_did_wrong(tmp_path) -> None:
    """A bad target on one rank raises on all of them, at the next reading, and nobody waits."""
    first, second = run_ranks(2, fit_mistakes, tmp_path=tmp_path, timeout=60)
    assert first == second
    (in_training, after_batches), (in_validation, all_batches) = first
    assert (after_batches, all_batches) == (3, 2)
    assert "8 " in in_training
    assert "8 " in in_validation


# 7. Dashboards.


def fit_with_dashboards(folder: Path, idle: bool) -> dict[str, Any]:
    """Fit with a TensorBoard logger; ranks repeat a sample, or one of them has no validation at all."""
    monitor = CrossEntropyMonitor(decode=lambda ids: f"{ids[0]} ")
    trainer = make_trainer(monitor, folder=folder)
    trainer.fit(Table("logits"), loader(16), Uneven(0) if idle else loader(5))
    return {
        "references": monitor._dashboards._references,
        "profile": monitor._evaluation.stats.histogram.state.tolist(),
    }


@pytest.mark.parametrize("idle", [False, True], ids=["a repeated sample", "an idle rank"])
def test_dashboards_are_of_all_ranks_and_written_once(tmp_path, idle) -> None:
    """Reference lines and pictures have the samples of all ranks, each once; the first rank writes them."""
    ranks = run_ranks(2, fit_with_dashboards, tmp_path / "log", idle, tmp_path=tmp_path, timeout=60)
    assert ranks[0] == ranks[1]
    seen = rows(6) if idle else rows(5)
    targets = [int(target) for _, _, y in seen for target in y if target != -100]
    shares = [targets.count(k) / len(targets) for k in set(targets)]
    entropy = -math.fsum(share * math.log2(share) for share in shares)
    expected = {"uniform_bits_per_token": math.log2(K), "unigram_bits_per_token": entropy}
    assert ranks[0]["references"] == pytest.approx(expected, rel=1e-12)
    assert ranks[0]["profile"][-1] == (0 if idle else 1)
    points = logged(tmp_path / "log")
    assert float.fromhex(points["val/unigram_bits_per_token"][0][1]) == pytest.approx(entropy, rel=1e-6)
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert {"val/distribution", "val/by_position", "val/surprisal"} <= set(events.Tags()["images"])
    page = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"left out of the last validation: {0 if idle else 1}." in page
    assert f"| the last validation | {len(targets)} |" in page


def fit_with_a_logger_on_one_rank(folder: Path) -> dict[str, str]:
    """Give a logger to the first rank only, as some do."""
    trainer = make_trainer(CrossEntropyMonitor(), folder=folder if torch.distributed.get_rank() == 0 else None)
    trainer.fit(Table("logits"), loader(16), loader(5))
    return own(trainer.callback_metrics)


def test_a_logger_on_one_rank_does_not_hang(tmp_path) -> None:
    """What is gathered for TensorBoard must not depend on who writes it."""
    first, second = run_ranks(2, fit_with_a_logger_on_one_rank, tmp_path / "log", tmp_path=tmp_path, timeout=60)
    assert first == second
    assert "val/unigram_bits_per_token" in logged(tmp_path / "log")
