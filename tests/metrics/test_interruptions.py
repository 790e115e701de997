"""A call that raises, wherever it does and whatever it raises, leaves a metric as it was."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import CASES, Case
from tests.metrics.interrupted import LIBRARY, METRICS, TORCHMETRICS, check_interruptions, comparable
from xent_metrics import CrossEntropy, compute_together


class Counting(CrossEntropy):
    """Shifts its targets, and keeps more: a sum that is changed in place, a list, and a plain attribute."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("calls", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sizes", [], dist_reduce_fx="cat")
        self.last = 0

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Count the call, and add the batch."""
        self.calls += 1
        self.sizes.append(torch.tensor([len(preds)]))
        self.last = len(preds)
        super().update(preds[:, :-1], target[:, 1:])

    def compute(self) -> dict[str, Any]:  # type: ignore[override]
        """Read everything."""
        return {"loss": super().compute(), "calls": self.calls}


def two_ranks() -> bool:
    """Say that there is another rank."""
    return True


def twice(state: Tensor, group: Any) -> list[Tensor]:
    """Gather a state from another rank, which has the same."""
    return [state, state]


def with_sync(metric: Any) -> Any:
    """Read a metric while it is synchronized."""
    with metric.sync_context(twice):
        return metric.tally


# Each call on a metric that has seen a batch, given another batch, and another metric that has seen that.
CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "update": lambda metric, batch, other: metric.update(**batch),
    "forward": lambda metric, batch, other: metric(**batch),
    "forward on all ranks": lambda metric, batch, other: metric(**batch),
    "compute": lambda metric, batch, other: metric.compute(),
    "compute_together": lambda metric, batch, other: compute_together({"": metric}),
    "reset": lambda metric, batch, other: metric.reset(),
    "add": lambda metric, batch, other: metric.add(other.tally),
    "merge_state": lambda metric, batch, other: metric.merge_state(other),
    "merge_state of a state": lambda metric, batch, other: metric.merge_state(other.metric_state),
    "load_state_dict": lambda metric, batch, other: metric.load_state_dict(other.state_dict()),
    "state_dict": lambda metric, batch, other: metric.state_dict(),
    "to": lambda metric, batch, other: metric.to("meta"),
    "sync": lambda metric, batch, other: metric.sync(twice),
    "unsync": lambda metric, batch, other: metric.unsync(),
    "sync_context": lambda metric, batch, other: with_sync(metric),
    "deepcopy": lambda metric, batch, other: deepcopy(metric),
    "pickle": lambda metric, batch, other: pickle.dumps(metric),
}


def check(case: Case, name: str, *folders: Path) -> None:
    """Interrupt a call, and compare what it does at last with what it does to a metric that was not interrupted."""
    first, second = case.batches()[1:]
    options: dict[str, Any] = {"compute_with_cache": True}
    if name != "compute_together":  # Which takes none of a function of its own.
        options |= {"distributed_available_fn": two_ranks, "dist_sync_fn": twice}

    def make() -> tuple[Any, Callable[[], Any]]:
        metric = case.metric(**options, dist_sync_on_step=name == "forward on all ranks")
        other = case.metric(**options)
        for each, batch in ((metric, first), (other, second)):
            each.persistent(True)
            each(**batch)
            each.compute()
        if name == "unsync":
            metric.sync(twice)
        return metric, lambda: CALLS[name](metric, second, other)

    metric = check_interruptions(make, *folders)
    expected, call = make()
    call()
    assert comparable(metric.metric_state) == comparable(expected.metric_state)
    assert metric.update_count == expected.update_count


FIRST_CASES = {case.metric_class.__name__: case for case in reversed(CASES.values())}


@pytest.mark.parametrize("name", CALLS)
def test_interrupted_in_a_metric(name: str) -> None:
    """At every line of the metric, and of torchmetrics, that a call runs."""
    check(CASES["CrossEntropyReport"], name, METRICS, TORCHMETRICS)


CHANGES = ["update", "forward", "forward on all ranks", "reset", "merge_state", "load_state_dict", "sync", "unsync"]


@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_in_a_subclass(name: str) -> None:
    """The same where a subclass does what it likes to states of its own: they are put back too."""
    check(Case(Counting, lambda *_: None), name, METRICS, TORCHMETRICS, Path(__file__))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["update", "forward", "forward on all ranks", "compute"])
@pytest.mark.parametrize("case", FIRST_CASES.values(), ids=FIRST_CASES)
def test_interrupted_anywhere(case: Case, name: str) -> None:
    """At every line of the library, for every class."""
    check(case, name, LIBRARY, TORCHMETRICS)
