"""Ranks that share a model, a sequence or a pipeline count every target once."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DistributedSampler

from tests.lightning.worlds import Table, loader, make_trainer, messages, rows, run_ranks
from xent_metrics.lightning import CrossEntropyMonitor
from xent_metrics.lightning.trainer import Ranks
from xent_metrics.lightning.windows import sum_over_ranks
from xent_metrics.tags import parse_tag
from xent_metrics.tally import Tally

pytestmark = pytest.mark.distributed
HALF = 2  # Pairs of ranks, and ranks of a pair. Each pair has every other sample.
READINGS = ("cross_entropy", "perplexity", "num_tokens", "accuracy", "entropy")
GROUPS = ("a", "b", "c")
SIZES = (16, 5, 3)  # Samples of training and of two validation loaders.


class Unchanged(Table):
    """Does not learn, so that every fit reads the same."""

    def __init__(self) -> None:
        super().__init__("logits")
        self.automatic_optimization = False

    def configure_model(self) -> None:
        """Nothing is spread; a strategy with a mesh asks for this method."""

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().step(stage, batch) | {"group": batch[0] % 3}

    def configure_optimizers(self) -> None:
        return None


class ContextParallel(Unchanged):
    """The ranks of a pair hold the first three and the last of the four targets of a sequence."""

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        index, x, y = batch
        part = slice(3) if self.global_rank % HALF == 0 else slice(3, None)
        return super().step(stage, [index, x[:, part], y[:, part]])


class LastStage(Unchanged):
    """Only the second rank of a pair gets as far as the logits."""

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return super().step(stage, batch) if self.global_rank % HALF == 1 else None


def read(module: Table, samplers: list[Any], **kwargs: Any) -> dict[str, Any]:
    """Fit, and return every value of the monitor to the bit, and what pictures are drawn of."""
    options = {name: kwargs.pop(name) for name in ("process_group", "sequence_group", "groups") if name in kwargs}
    monitor = CrossEntropyMonitor(readings=READINGS, **options)
    trainer = make_trainer(monitor, use_distributed_sampler=False, **kwargs)
    size = 4 if samplers[0] is None else 2
    train, *validation = (loader(n, size, sampler=sampler) for n, sampler in zip(SIZES, samplers, strict=True))
    with messages() as said:
        trainer.fit(module, train, validation)
    assert [text for text in said if "Monitor" in text] == []
    stats = monitor._evaluation.stats
    assert isinstance(pickle.loads(pickle.dumps(monitor)).sequence_group, str | None)  # No process can have another's.
    return {
        "values": {tag: x.item().hex() for tag, x in trainer.callback_metrics.items() if parse_tag(tag)},
        "references": monitor._dashboards._references,
        "shares": stats and stats.histogram.shares(),
        "positions": stats and stats.histogram.by_position(),
        "repeated": stats and stats.histogram.num_repeated,
    }


def fit(module: Table, mesh: bool = False, **options: Any) -> dict[str, Any]:
    """Fit on four ranks."""
    strategy = {"strategy": ModelParallelStrategy(HALF, HALF)} if mesh else {}
    pair = torch.distributed.get_rank() // HALF
    samplers = [DistributedSampler(rows(n), HALF, pair, shuffle=False) for n in SIZES]
    return read(module, samplers, **strategy, **options)


def fit_all() -> dict[str, Any]:
    """Fit with each way to share."""
    pairs = [torch.distributed.new_group([first, first + 1]) for first in (0, HALF)]
    pair = pairs[torch.distributed.get_rank() // HALF]
    both, tensor_parallel = ("data_parallel", "tensor_parallel"), "tensor_parallel"
    with pytest.raises(ValueError, match=r"`sequence_group` must name a dimension .*'data_parallel', .* got 'time'; "):
        fit(Unchanged(), mesh=True, sequence_group="time")
    with pytest.raises(ValueError, match=r"`process_group` must name a dimension .* has \[\], got 'data_parallel'; "):
        fit(Unchanged(), process_group="data_parallel")
    with pytest.raises(TypeError, match=r"`process_group` must be a process group .* got tuple \(\)"):
        fit(Unchanged(), process_group=())
    across = [torch.distributed.new_group([first, first + HALF]) for first in (0, 1)]
    across = across[torch.distributed.get_rank() % HALF]
    with pytest.raises(ValueError, match="`process_group` must hold the ranks of `sequence_group`, which have other"):
        fit(ContextParallel(), process_group=across, sequence_group=pair)
    with pytest.raises(ValueError, match="must add up the same on every rank"):  # On all, of which three do not differ.
        sum_over_ranks([(Tally.zero(),)], "ab"[torch.distributed.get_rank() > 0], Ranks((across, pair), pair))
    return {
        "tensor parallel": fit(Unchanged(), mesh=True),
        "context parallel": fit(ContextParallel(), sequence_group=pair),
        "context parallel on a mesh": fit(ContextParallel(), mesh=True, sequence_group=tensor_parallel),
        "context parallel, groups": fit(ContextParallel(), sequence_group=pair, groups=GROUPS),
        "last stage": fit(LastStage()),
        "last stage on a mesh": fit(LastStage(), mesh=True, process_group=both),
    }


def fit_alone(folder: Any) -> list[dict[str, Any]]:
    """Fit with one process, whose batches are those of two ranks, without groups and with them."""
    options = {"samplers": [None] * len(SIZES), "folder": folder}
    return [read(Unchanged(), **options), read(Unchanged(), groups=GROUPS, **options)]


def test_every_target_counts_once_whatever_ranks_share(tmp_path) -> None:
    """Tensor, context and pipeline parallel ranks read what one process reads, to the bit: means, counts, intervals."""
    ranks = run_ranks(4, fit_all, tmp_path=tmp_path)
    [[one, grouped]] = run_ranks(1, fit_alone, tmp_path / "log", tmp_path=tmp_path)
    read_of_one = {(parse_tag(tag).stage, parse_tag(tag).name.removesuffix("_epoch")) for tag in one["values"]}
    assert {(stage, name) for stage in ("train", "val") for name in READINGS} < read_of_one
    assert {("val", "macro_cross_entropy"), ("val", "perplexity_upper")} < read_of_one
    for rank in ranks:
        for name, seen in rank.items():
            # A part of a sequence does not say where it begins.
            positions = len(one["positions"][0]) if "context" not in name else 1
            assert len(seen.pop("positions")[0]) == positions, name
            assert seen.pop("repeated") == HALF, name  # A sample of each validation loader.
            expected = grouped if "groups" in name else one
            assert seen == {key: expected[key] for key in seen}, name
