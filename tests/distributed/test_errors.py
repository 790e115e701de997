"""A rank whose peers are gone, or that is interrupted, keeps what it had; a subclass may add states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.cases import CASES, filled
from tests.distributed.ranks import run_ranks
from tests.distributed.shares import distributed, error, make_data
from tests.metrics.conformance import assert_close
from tests.metrics.interrupted import METRICS, TORCHMETRICS, attributes, check_interruptions, comparable
from tests.metrics.test_subclasses import Adding, Shifted, judge, judge_sizes
from xent_metrics import CrossEntropy, CrossEntropyReport, GroupedCrossEntropy, compute_together

if TYPE_CHECKING:
    from pathlib import Path


CLASSES: dict[str, Any] = {
    "report": CrossEntropyReport,
    "groups": lambda **options: GroupedCrossEntropy(4, **options),
    "subclass": Adding,
}
CALLS: dict[str, Any] = {
    "forward": lambda metric, batch: metric(**batch),
    "compute": lambda metric, batch: metric.compute(),
    "sync": lambda metric, batch: metric.sync(),
}


def batch_for(name: str) -> dict[str, Any]:
    """Return a batch for a class of the table."""
    data = make_data(num_rows=4)
    batch = {"preds": data.logits, "target": data.target}
    return {**batch, "group": data.group} if name == "groups" else batch


def outlive_the_others(rank: int) -> dict[Any, Any]:
    """Exchange something once; then let rank 1 leave, and go on."""
    metrics = {name: make(dist_sync_on_step=True, compute_with_cache=True) for name, make in CLASSES.items()}
    for name, metric in metrics.items():
        for _ in range(2):  # So that it holds something else than a batch.
            metric(**batch_for(name))
    seen: dict[Any, Any] = {}
    if rank == 1:
        return seen
    for name, metric in metrics.items():
        for call, function in CALLS.items():
            before = attributes(metric)
            seen[name, call] = [error(lambda: function(metric, batch_for(name))) for _ in range(2)]  # noqa: B023
            seen[name, call, "intact"] = attributes(metric) == before
    together = CrossEntropy()
    before = attributes(together)
    seen["together"] = [error(lambda: compute_together({"": together})), attributes(together) == before]
    return seen


@distributed
def test_peers_that_are_gone(tmp_path: Path) -> None:
    """A batch whose value could not be exchanged was not added, and may be given again; no call leaves a trace."""
    [seen, _] = run_ranks(2, outlive_the_others, tmp_path=tmp_path, together=False)
    for name in CLASSES:
        for call in CALLS:
            assert all("Error" in text for text in seen[name, call]), (name, call)
            assert seen[name, call, "intact"], (name, call)
    assert "Error" in seen["together"][0]
    assert seen["together"][1]


INTERRUPTED: dict[str, Any] = {
    **CALLS,
    "compute_together": lambda metric, batch: compute_together({"": metric}),
    "unsync": lambda metric, batch: metric.unsync(),
}


def be_interrupted(_: int) -> dict[str, bool]:
    """Interrupt each call at each of its lines, in a world of one rank, which nobody waits for."""
    batch, seen = batch_for("report"), {}
    for name, call in INTERRUPTED.items():

        def make(name: str = name, call: Any = call) -> Any:
            metric = CrossEntropyReport(dist_sync_on_step=True, compute_with_cache=True)
            for _ in range(2):  # So that it holds something else than a batch.
                metric(**batch)
            if name == "unsync":
                metric.sync()
            return metric, lambda: call(metric, batch)

        metric, (expected, last) = check_interruptions(make, METRICS, TORCHMETRICS), make()
        last()
        seen[name] = comparable(metric.metric_state) == comparable(expected.metric_state)
    return seen


@distributed
def test_interrupted_on_a_rank(tmp_path: Path) -> None:
    """Wherever a call is interrupted that exchanges a state, the metric is what it was."""
    assert run_ranks(1, be_interrupted, tmp_path=tmp_path) == [dict.fromkeys(INTERRUPTED, True)]


def read_subclasses(rank: int, batches: Any, shifted: Any) -> dict[str, Any]:
    """Read subclasses of which each rank has seen a batch."""

    metric = filled(Adding(), batches[rank])
    seen = {"all": metric.compute(), "own": metric.tally.totals().scored, "cat": len(metric.cat)}
    on_step = Adding(dist_sync_on_step=True)
    for batch in (batches[rank], batches[1 - rank]):
        seen["step"] = on_step(**batch)
    seen["steps"] = on_step.compute()
    other = Shifted()
    other.update(*shifted[rank])
    seen["shifted"] = other.compute().item()
    return seen


@distributed
def test_subclasses_on_several_ranks(tmp_path: Path) -> None:
    """States that a subclass has added are reduced as they say, and what it overrides is called on every rank."""
    batches = CASES["CrossEntropy"].batches()[:2]
    shifted = [(torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))) for _ in range(2)]
    for rank, seen in enumerate(run_ranks(2, read_subclasses, batches, shifted, tmp_path=tmp_path)):
        assert_close(seen["all"], judge_sizes(*batches))
        assert (seen["own"], seen["cat"]) == (CASES["CrossEntropy"].filled(batches[rank]).tally.totals().scored, 1)
        assert_close(seen["step"], judge_sizes(*batches))
        assert_close(seen["steps"], judge_sizes(*batches, *batches))
        assert abs(seen["shifted"] - judge(*shifted)) < 1e-6
