"""Samples that ranks repeat are scored once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import BatchSampler, DataLoader, Sampler

from tests.lightning.worlds import (
    BOUNDS,
    READINGS,
    Table,
    World,
    about_us,
    loader,
    make_trainer,
    messages,
    own,
    rows,
    run_ranks,
)
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = pytest.mark.distributed


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


UNEVEN = [("losses", 5, 1), ("losses", 5, 2), ("losses", 5, 3), ("losses", 1, 2), ("logits", 5, 2)]


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


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_samples_that_ranks_repeat_are_scored_once(tmp_path, of_one_process, world_size) -> None:
    """Validation and test are those of one process to the last bit, bounds included, whatever the batch size."""
    for values, said in run_ranks(world_size, evaluate_uneven, tmp_path=tmp_path):
        assert values == of_one_process
        assert not said
    assert len(of_one_process) == 3 * len(UNEVEN) + 2
    tags = {f"val/{name}" for name in (*READINGS, *BOUNDS, "num_tokens", "macro_cross_entropy")}
    tags |= {f"val_by_loader/{name}/dataloader_idx_{i}" for name in READINGS for i in range(2)}
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
