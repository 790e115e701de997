"""Threads that share a metric, and processes that are forked while another thread uses it."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.cases import CASES, Case, bits
from tests.forks import in_a_fork, needs_forks
from tests.metrics.test_subclasses import Adding
from xent_metrics import BitsPerToken, CrossEntropy, CrossEntropyReport, _runtime, _student

THREADS, UPDATES = 4, 40
BATCH = torch.zeros(3, 4), torch.tensor([0, 1, 2])
ADDING = Case(Adding, lambda *_: None)


@pytest.fixture(name="eager_threads")
def _eager_threads() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(call: Callable[[int], Any], number: int = THREADS) -> list[Any]:
    """Call a function in threads, each with its number."""
    with ThreadPoolExecutor(number) as pool:
        return [future.result(60) for future in [pool.submit(call, i) for i in range(number)]]


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("call", ["update", "forward", "mixed"])
@pytest.mark.parametrize(
    "case", [CASES["CrossEntropyReport"], CASES["GroupedCrossEntropy"], ADDING], ids=["report", "groups", "subclass"]
)
def test_every_update_counts(case: Case, call: str) -> None:
    """Whatever threads add to one metric is added, and counted."""
    batch = case.batches()[0]
    metric, one = case.metric(), case.filled(batch)

    def add(_: int) -> None:
        for i in range(UPDATES):
            if call == "mixed" and i % 4 > 1:
                metric.add(one.tally) if i % 4 == 2 else metric.merge_state(one)
            elif call == "update" or (call == "mixed" and i % 4):
                metric.update(**batch)
            else:
                metric(**batch)

    in_threads(add)
    expected = case.filled(*[batch] * THREADS * UPDATES)
    assert torch.equal(metric.tally.state, expected.tally.state)
    assert metric.update_count == THREADS * UPDATES
    if case is ADDING and call != "mixed":  # Which adds tallies alone.
        assert bits(metric.compute()) == bits(expected.compute())


READERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda metric: pickle.loads(pickle.dumps(metric)),
    "merge": lambda metric: merged(type(metric)(), metric),
}


def merged(metric: Any, other: Any) -> Any:
    """Merge a metric into another one."""
    metric.merge_state(other)
    return metric


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("metric_class", [CrossEntropyReport, Adding])
def test_no_reader_sees_half_an_update(metric_class: Any, read: Callable[[Any], Any]) -> None:
    """Every copy that is made meanwhile holds as many targets as its updates had, and can be updated."""
    metric, done = metric_class(), Event()

    def use(i: int) -> None:
        while i and not done.is_set():
            other = read(metric)
            assert other.tally.totals().scored == 3 * other.update_count
            if metric_class is Adding:
                assert len(other.cat) == other.update_count == int(other.sum) / 3
            other.update(*BATCH)
        if not i:
            for _ in range(UPDATES):
                metric.update(*BATCH)
            done.set()

    in_threads(use, 3)
    assert metric.tally.totals().scored == 3 * UPDATES


def test_no_value_is_kept_too_long() -> None:
    """A value that was about to be kept when another thread added a batch is not returned after that."""
    computed, updated = Event(), Event()

    class Slow(CrossEntropyReport):
        @property
        def compute_with_cache(self) -> bool:
            """Whether a value is kept, which torchmetrics asks when it has one."""
            computed.set()
            return updated.wait(0.2) or True

        @compute_with_cache.setter
        def compute_with_cache(self, _: bool) -> None: ...

    metric = Slow()
    metric.update(*BATCH)

    def update() -> None:
        assert computed.wait(60)
        metric.update(*BATCH)
        updated.set()

    thread = Thread(target=update)
    thread.start()
    metric.compute()
    thread.join(60)
    assert metric.compute()["num_tokens"] == 6


def test_an_update_waits_for_the_ranks() -> None:
    """While one thread reads all ranks together, another one may add and look, and nothing is lost or counted twice."""
    asked, answered = Event(), Event()

    def gather(state: Tensor, group: Any) -> list[Tensor]:
        asked.set()
        assert answered.wait(60)
        return [state, state]

    metric = CrossEntropyReport(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(*BATCH)
    seen: dict[str, Any] = {}
    threads = [Thread(target=lambda: seen.update(computed=metric.compute()["num_tokens"].item()))]
    threads[0].start()
    assert asked.wait(60)
    threads += [
        Thread(target=lambda: metric.update(*BATCH)),
        Thread(target=lambda: metric(*BATCH)),
        Thread(target=lambda: seen.update(tally=metric.tally.totals().scored)),
        Thread(target=lambda: seen.update(saved=deepcopy(metric).tally.totals().scored)),
        Thread(target=lambda: seen.update(state=next(iter(metric.metric_state.values())).clone())),
        Thread(target=lambda: seen.update(reduced=metric.is_to_be_reduced())),
    ]
    for thread in threads[1:]:
        thread.start()
    threads[-1].join(0.2)
    answered.set()
    for thread in threads:
        thread.join(60)
    assert seen["computed"] == 6
    assert metric.tally.totals().scored == 9
    assert metric.update_count == 3
    assert {seen["tally"], seen["saved"], type(metric.tally)(seen["state"]).totals().scored} <= {3, 6, 9}
    assert seen["reduced"]


def test_an_update_waits_for_the_end_of_a_context() -> None:
    """In `sync_context` another thread waits, where this one is refused."""
    metric = CrossEntropyReport(distributed_available_fn=lambda: True)
    thread = Thread(target=metric.update, args=BATCH)
    with metric.sync_context(lambda state, group: [state, state]):
        thread.start()
        thread.join(0.2)
        with pytest.raises(TorchMetricsUserError, match="synced"):
            metric.update(*BATCH)
    thread.join(60)
    assert metric.tally.totals().scored == 3


def test_metrics_may_be_merged_into_each_other() -> None:
    """A metric that waits for another one may be used meanwhile, also by a thread that the other one waits for."""
    metric, other = CrossEntropy(), CrossEntropy()
    other.update(*BATCH)
    threads = [Thread(target=metric.merge_state, args=(other,)), Thread(target=metric.update, args=BATCH)]
    with other.sync_context():
        for thread in threads:
            thread.start()
            thread.join(0.2)
        assert [thread.is_alive() for thread in threads] == [True, False]
    threads[0].join(60)
    assert metric.tally.totals().scored == 6


@pytest.mark.usefixtures("eager_threads")
def test_a_collection_whose_groups_are_known() -> None:
    """After its first batch, threads may update a collection, and every member reads all batches."""
    collection = MetricCollection([CrossEntropy(), BitsPerToken(), CrossEntropyReport()])
    collection.update(*BATCH)
    in_threads(lambda _: [collection.update(*BATCH) for _ in range(UPDATES)])
    assert collection.compute()["num_tokens"] == 3 * (1 + THREADS * UPDATES)


def test_constants_of_lists_that_are_gone() -> None:
    """A list that takes the place of another one in memory is not taken for it."""
    beside = torch.empty(0)
    for i in range(50):
        assert _runtime.constant([float(i), 1.0], beside, torch.float64).tolist() == [i, 1.0]


@pytest.mark.usefixtures("eager_threads")
def test_threads_get_one_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that need a quantile for the first time get one list, of which one constant is made."""
    monkeypatch.setattr(_student, "_series", {})
    assert len({id(x) for x in in_threads(lambda _: _student.quantile_series(0.5))}) == 1


@needs_forks
def test_a_fork_while_another_thread_updates() -> None:
    """In a process that is forked while a thread holds a metric, the metric goes on."""
    there, leave = Event(), Event()

    class Slow(CrossEntropy):
        def update(self, *batch: Tensor) -> None:  # type: ignore[override]
            there.set()
            leave.wait(60)
            super().update(*batch)

    metric = Slow()

    def hold(forked: Event, done: Event) -> None:
        thread = Thread(target=metric.update, args=BATCH)
        thread.start()
        there.wait(60)
        forked.set()
        done.wait(60)
        leave.set()
        thread.join(60)

    def update() -> tuple[int, float]:
        leave.set()
        metric.update(*BATCH)
        return metric.tally.totals().scored, float(metric.compute())

    assert in_a_fork(hold, update) == (3, pytest.approx(1.3862943611198906))
    assert metric.tally.totals().scored == 3
