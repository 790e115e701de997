"""Laws that hold for every metric of the registry: any batching, functions as classes, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import CASES, SIZES, Batch, Case, bits, numbers, some_rows, together
from tests.instruments import Operators
from tests.strategies import examples, partitions, relaxed

ROWS = sum(SIZES)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal.default", "item")

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def data_of(case: Case, weighed: bool = True) -> Batch:
    """Return the same data of a case whenever it is asked for."""
    torch.manual_seed(7)
    return together(case.batches(weighed=weighed))


@pytest.mark.parametrize("weighed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unweighted", "weighted"])
@each_case
@settings(relaxed, max_examples=examples(15))
@given(data=st.data())
def test_any_batching_leaves_the_same_bits(case: Case, weighed: bool, data: st.DataObject) -> None:
    """Any batch size and order, through `update`, `forward` or `merge_state`, leave the same state and reading."""
    values = data_of(case, weighed)
    whole = case.filled(values)
    one_by_one, backwards = [[i] for i in range(ROWS)], [[*range(6, ROWS)], [], [*range(6)]]
    updated, called, merged = case.metric(), case.metric(), case.metric()
    for part in data.draw(st.sampled_from([one_by_one, backwards]) | partitions(ROWS)):
        batch = some_rows(values, torch.tensor(part, dtype=torch.int64))
        updated.update(**batch)
        called(**batch)
        merged.merge_state(case.filled(batch))
    for metric in (updated, called, merged):
        assert torch.equal(metric.tally.state, whole.tally.state)
        assert bits(metric.compute()) == bits(whole.compute())


@pytest.mark.parametrize("weighed", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.quantity.function is not None])
def test_a_function_reads_what_its_class_reads(name: str, weighed: bool) -> None:
    """The function, `forward` and `compute` agree on one batch."""
    case = CASES[name]
    batch, metric = data_of(case, weighed), case.metric()
    forward, value = metric(**batch), metric.compute()
    for other in (forward, case.quantity.function(**batch, **case.options)):
        found, expected = numbers(other), numbers(value)
        assert list(found) == list(expected)
        tolerance = {"rel": 1e-13, "abs": 1e-13} if not isinstance(value, dict) else {"rel": 1e-6, "abs": 1e-7}
        assert found == pytest.approx(expected, nan_ok=True, **tolerance)


def assert_never_waits(metric: Any, batch: Batch, operators: Operators) -> None:
    """Update and call a metric, with a number of bytes too where it takes one, and look at what was asked."""
    with operators:
        for some in (batch, {**batch, "num_bytes": 1000}) if "num_bytes" in batch else (batch,):
            metric.update(**some)
            metric(**some)
    assert [op for op in operators.counts if any(part in op for part in WAITS)] == []


@each_case
def test_update_and_forward_never_wait(case: Case, operators: Operators) -> None:
    """On a device without data nothing is looked at, moved there or built from Python data."""
    batch = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in data_of(case).items()}
    metric = case.metric().to("meta")
    assert_never_waits(metric, batch, operators)
    assert metric.tally.state.device.type == "meta"
    assert operators.devices == {"meta"}


@pytest.mark.usefixtures("hidden_values")
@each_case
def test_only_the_checks_of_the_cpu_look_at_values(case: Case, operators: Operators) -> None:
    """Without the checks that are free on the CPU nothing is read back, and no number is copied to the device."""
    assert_never_waits(case.metric(), data_of(case), operators)
