"""Two real processes: every class reads on both ranks, to the last bit, what one process reads that has all batches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

from tests.cases import CASES, Batch, Case, bits, filled, numbers
from tests.distributed.ranks import run_ranks

# Which batches each rank has: uneven ones, and none at all. Later they swap them.
SPLITS = {"uneven": ([0, 2], [1]), "one rank has none": ([0, 1, 2], [])}
FIRST = {case.metric_class: name for name, case in reversed(CASES.items())}.values()  # Of each class.
CASES_OF = {"uneven": [*CASES], "one rank has none": [*FIRST]}  # Options change nothing about adding up nothing.
SHARED = ("CrossEntropy", "CrossEntropy-bits", "BitsPerToken", "Perplexity", "CrossEntropyReport", "BitsPerByte-table")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


def batches_of(name: str) -> list[Batch]:
    """Make the same batches in every process."""
    torch.manual_seed(sorted(CASES).index(name))
    return CASES[name].batches(weighed=True)


def on_one_rank(case: Case, batches: list[Batch], own: list[int], other: list[int]) -> dict[str, Any]:
    """Read a metric in every way that talks to the other rank, or must not."""
    metric = case.metric()
    filled(metric, *(batches[i] for i in own))
    state = metric.tally.state.clone()
    read = {"all": bits(metric.compute())}
    assert torch.equal(metric.tally.state, state), "The metric stayed synced."
    assert metric.update_count == len(own)
    metric.update(**batches[0])
    read["goes on"] = bits(metric.compute())
    alone = filled(case.metric(sync_on_compute=False), *(batches[i] for i in own))
    read["alone"] = bits(alone.compute())
    metric.sync()
    read["synced state"] = metric.tally.state.flatten().tolist()
    metric.unsync()
    on_step = case.metric(dist_sync_on_step=True)
    read["step"] = numbers(on_step(**batches[1 + dist.get_rank()]))
    read["after step"] = bits(on_step.compute())
    metric.reset()
    filled(metric, *(batches[i] for i in other))
    read["swapped"] = bits(metric.compute())
    return read


def read_every_metric(rank: int) -> dict[str, Any]:
    """Be one of the processes."""
    warnings.filterwarnings("ignore", message="The ``compute`` method")  # A rank may have nothing.
    results: dict[str, Any] = {}
    for split, parts in SPLITS.items():
        own, other = parts[rank], parts[1 - rank]
        for name in CASES_OF[split]:
            results[f"{split}, {name}"] = on_one_rank(CASES[name], batches_of(name), own, other)
        collection = MetricCollection({name: CASES[name].metric() for name in SHARED})
        for i in own:
            collection.update(**batches_of("CrossEntropy")[i])
        results[f"{split}, together"] = {name: bits(m.compute()) for name, m in collection.items(keep_base=True)}
    return results


def test_two_ranks_read_every_metric_as_one_process_does(tmp_path: Path) -> None:
    """Values of uneven ranks, of ranks without batches, of steps and of collections are those of one process."""
    results = run_ranks(2, read_every_metric, tmp_path=tmp_path)
    for split, parts in SPLITS.items():
        for name in CASES_OF[split]:
            case, batches = CASES[name], batches_of(name)
            both = case.filled(*(batches[i] for part in parts for i in part))
            expected = bits(both.compute())
            goes_on = bits(filled(both, batches[0], batches[0]).compute())
            step = case.filled(*batches[1:]).compute()
            for rank, result in enumerate(results):
                read, where = result[f"{split}, {name}"], (split, name, rank)
                assert read["all"] == read["swapped"] == expected, where
                assert read["goes on"] == goes_on, where
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # A rank may have nothing.
                    assert read["alone"] == bits(case.filled(*(batches[i] for i in parts[rank])).compute()), where
                assert read["step"] == pytest.approx(numbers(step), rel=1e-6, abs=1e-6, nan_ok=True), where
                assert read["after step"] == bits(step), where
                merged = case.metric()
                (name_of_state,) = merged.metric_state
                state = torch.tensor(read["synced state"]).view_as(merged.tally.state)
                merged.merge_state({name_of_state: state})
                assert bits(merged.compute()) == goes_on, where
        together = [batches_of("CrossEntropy")[i] for part in parts for i in part]
        expected = {name: bits(CASES[name].filled(*together).compute()) for name in SHARED}
        for result in results:
            assert result[f"{split}, together"] == expected
