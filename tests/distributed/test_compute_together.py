"""Many metrics are read in one collective."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics.text
from torchmetrics import MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from tests.distributed.ranks import run_ranks
from xent_metrics import CrossEntropy, CrossEntropyReport, Perplexity, compute_together

if TYPE_CHECKING:
    from pathlib import Path
from tests.distributed.shares import (
    METRICS,
    alone,
    bits,
    distributed,
    error,
    made,
    make_data,
    own_rows,
    rows_of,
    update,
)


def compute_in_both_ways(rank: int) -> dict[str, Any]:
    """Compute metrics one by one and together; then ask for what is refused."""
    data = own_rows(rank)
    metrics = {name: update(made(name), name, data) for name in METRICS}
    metrics["nothing"] = CrossEntropy()
    states = {name: metric.tally.state.clone() for name, metric in metrics.items()}
    together = compute_together(metrics)
    intact = all(torch.equal(metric.tally.state, states[name]) for name, metric in metrics.items())
    collection = MetricCollection([CrossEntropy(), Perplexity(), CrossEntropyReport()], prefix="val/")
    rounds = []
    for _ in range(2):  # Metrics of a collection share a state from the first update on.
        collection.update(data.logits, data.target)
        both = compute_together(collection)
        rounds.append((bits(both), bits({name: metric.compute() for name, metric in collection.items()})))
        collection.compute()
    group, other = dist.new_group([0, 1]), CrossEntropy()
    refused = {
        "torchmetrics": lambda: compute_together({"a": other, "b": torchmetrics.MeanMetric()}),
        "groups": lambda: compute_together({"a": other, "b": CrossEntropy(process_group=group)}),
        "dist_sync_fn": lambda: compute_together({"a": CrossEntropy(dist_sync_fn=gather_all_tensors)}),
    }
    return {
        "together": bits(together),
        "one by one": bits({name: metric.compute() for name, metric in metrics.items()}),
        "order": list(together) == list(metrics),
        "intact": intact,
        "rounds": rounds,
        "nothing": compute_together({}),
        "refused": {name: error(call) for name, call in refused.items()},
    }


@distributed
def test_compute_together(tmp_path: Path) -> None:
    """One collective gives the bits of each `compute`, also of metrics that share a state; others are refused."""
    for seen in run_ranks(2, compute_in_both_ways, tmp_path=tmp_path):
        assert seen["together"] == seen["one by one"]
        assert seen["order"]
        assert seen["intact"]
        for both, each in seen["rounds"]:
            assert both == each
        assert seen["together"]["nothing"] == "nan"
        assert seen["nothing"] == {}
        assert seen["refused"]["torchmetrics"] == (
            "TypeError: `metrics` must be metrics of xent_metrics, got MeanMetric as 'b'; compute it by itself."
        )
        for name in ("groups", "dist_sync_fn"):
            assert seen["refused"][name].startswith("ValueError: `metrics` must have one `process_group`"), name
    for name in METRICS:
        assert seen["together"][name] == alone(name, rows_of([0, 1])), name


def test_compute_together_alone() -> None:
    """Without a process group it is `compute` of each."""
    data = make_data()
    metrics = {name: update(made(name), name, data) for name in METRICS}

    assert bits(compute_together(metrics)) == bits({name: metric.compute() for name, metric in metrics.items()})


def compute_local_ones_together(rank: int) -> dict[str, tuple[Any, Any]]:
    """Compute, by itself and together, metrics that are not to be synchronized, or are already."""
    seen = {}
    for name, options in {
        "sync_on_compute": {"sync_on_compute": False},
        "distributed_available_fn": {"distributed_available_fn": lambda: False},
        "synced": {},
    }.items():
        metric = update(CrossEntropyReport(**options), "CrossEntropyReport", own_rows(rank))
        single = bits(metric.compute())
        if name == "synced":
            metric.sync()
        seen[name] = (single, error(lambda metric=metric: compute_together({"": metric})))
        if not seen[name][1]:
            seen[name] = (single, bits(compute_together({"": metric})[""]))
    return seen


@distributed
def test_compute_together_of_local_metrics(tmp_path: Path) -> None:
    """`compute_together` gives what `compute` does, or refuses."""
    for seen in run_ranks(2, compute_local_ones_together, tmp_path=tmp_path):
        for name, (single, together) in seen.items():
            assert together == single or "Error: " in together, name


def compute_in_another_order(rank: int) -> dict[str, Any]:
    """Compute two metrics together that a dict of this rank holds in its own order."""
    metrics = {"a": CrossEntropy(), "b": CrossEntropy()}
    metrics["a"].update(torch.zeros(1, 8), torch.tensor([0]))
    metrics["b"].update(torch.zeros(1, 2), torch.tensor([0]))
    names = ("a", "b") if rank == 0 else ("b", "a")
    return {name: x.item() for name, x in compute_together({name: metrics[name] for name in names}).items()}


@distributed
def test_compute_together_goes_by_name(tmp_path: Path) -> None:
    """The order of a dict on one rank does not mix metrics up."""
    for rank, values in enumerate(run_ranks(2, compute_in_another_order, tmp_path=tmp_path)):
        assert list(values) == (["a", "b"] if rank == 0 else ["b", "a"])
        assert values == pytest.approx({"a": math.log(8), "b": math.log(2)})
