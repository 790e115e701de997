"""Laws that hold for every quantity: any batching, functions as classes, no targets, no waiting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import Operators
from tests.metrics.quantities import GROUPS, ROWS, TABLE, K, T, bits, filled, make_data
from tests.strategies import examples, partitions, relaxed
from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    NormalizedCrossEntropy,
    functional,
)


class Case(NamedTuple):
    """A metric, what its updates take, and its function."""

    make: Callable[..., Any]
    names: tuple[str, ...]
    function: Callable[..., Any] | None = None


def make_case(make: Any, names: str, function: Callable[..., Any] | None = None, **options: Any) -> Case:
    """Say what a metric is made of; its function has the same options."""
    return Case(
        lambda **more: make(**options, **more),
        tuple(names.split()),
        None if function is None else lambda *args, **more: function(*args, **options, **more),
    )


POSITIVE = torch.linspace(0, 3, T)

CASES = {
    "binary": make_case(
        BinaryCrossEntropy,
        "logits labels weight",
        functional.binary_cross_entropy,
        ignore_index=-1,
        pos_weight=POSITIVE,
    ),
    "binary smoothed": make_case(
        BinaryCrossEntropy, "logits soft_labels", functional.binary_cross_entropy, label_smoothing=0.1
    ),
    "binary probabilities": make_case(
        BinaryCrossEntropy,
        "probs labels mask",
        functional.binary_cross_entropy,
        input="probs",
        ignore_index=-1,
        eps=0.01,
        unit="bits",
    ),
    "decomposition": make_case(CrossEntropyDecomposition, "preds soft weight", functional.cross_entropy_decomposition),
    "decomposition smoothed": make_case(
        CrossEntropyDecomposition,
        "preds target mask",
        functional.cross_entropy_decomposition,
        label_smoothing=0.1,
        label_smoothing_over="others",
    ),
    "decomposition smoothed soft": make_case(
        CrossEntropyDecomposition, "preds soft", functional.cross_entropy_decomposition, label_smoothing=0.2
    ),
    "smoothed over others": make_case(
        CrossEntropy,
        "preds target weight",
        functional.cross_entropy,
        label_smoothing=0.2,
        label_smoothing_over="others",
    ),
    "shifted": make_case(CrossEntropy, "preds target weight", functional.cross_entropy, shift=True),
    "bytes of a table": make_case(BitsPerByte, "preds target", functional.bits_per_byte, token_bytes=TABLE),
    "bytes given": make_case(BitsPerByte, "preds target num_bytes weight", functional.bits_per_byte),
    "report with bytes": make_case(CrossEntropyReport, "preds target weight", token_bytes=TABLE),
    "grouped": make_case(
        GroupedCrossEntropy, "preds target group", functional.grouped_cross_entropy, num_groups=GROUPS
    ),
    "grouped and weighed": make_case(
        GroupedCrossEntropy,
        "preds soft group weight",
        functional.grouped_cross_entropy,
        num_groups=GROUPS,
        class_weight=torch.linspace(0, 2, K),
    ),
    "normalized": make_case(
        NormalizedCrossEntropy, "preds target weight", functional.normalized_cross_entropy, num_classes=K
    ),
    "difference": make_case(CrossEntropyDifference, "preds other target weight", functional.cross_entropy_difference),
}

each_case = pytest.mark.parametrize("name", CASES)


def take(data: dict[str, Tensor], names: tuple[str, ...], rows: Any = slice(None)) -> tuple[Tensor, ...]:
    """Take a batch of some rows."""
    return tuple(data[name][rows] for name in names)


@each_case
@settings(relaxed, max_examples=examples(15))
@given(data=st.data())
def test_same_bits_for_any_batching(name: str, data: st.DataObject) -> None:
    """Any batch size and order, through `update`, `forward` or `merge_state`, leave the same state and reading."""
    make, names, _ = CASES[name]
    values = make_data()
    whole = filled(make(), [take(values, names)])
    parts = data.draw(partitions(ROWS))
    updated, called, merged = make(), make(), make()
    for part in parts:
        batch = take(values, names, part)
        updated.update(*batch)
        called(*batch)
        merged.merge_state(filled(make(), [batch]))
    expected = bits(whole.compute())
    for metric in (updated, called, merged):
        assert torch.equal(metric.tally.state, whole.tally.state)
        assert bits(metric.compute()) == expected


@each_case
def test_a_function_is_its_class(name: str) -> None:
    """The function, `forward` and `compute` agree on one batch."""
    make, names, function = CASES[name]
    batch = take(make_data(), names)
    metric = make()
    forward, value = metric(*batch), metric.compute()
    for other in [forward] if function is None else [forward, function(*batch)]:
        if not isinstance(value, dict):
            torch.testing.assert_close(other, value, rtol=1e-13, atol=1e-13, equal_nan=True)
        else:
            assert list(other) == list(value)
            exact = {n: x.item() for n, x in value.items()}
            assert {n: x.item() for n, x in other.items()} == pytest.approx(exact, rel=1e-6, abs=1e-7)


def without_targets(data: dict[str, Tensor], names: tuple[str, ...]) -> list[tuple[Tensor, ...]]:
    """Make batches in which nothing is scored, of scores that are NaN: empty, all ignored, or all of weight 0."""
    scores = dict.fromkeys(("preds", "other", "logits", "probs"), math.nan)
    found = [take(data, names, slice(0, 0))]
    for marks in ({"target": -100, "labels": -1}, {"weight": 0, "mask": False}):
        if set(marks) & set(names):
            fills = {**scores, **marks, "num_bytes": 0}
            found.append(tuple(torch.full_like(data[n], fills[n]) if n in fills else data[n] for n in names))
    return found


@each_case
def test_no_targets_read_nan(name: str) -> None:
    """Without targets every value is NaN and every sum 0, and what comes later is not poisoned."""
    make, names, _ = CASES[name]
    data = make_data()
    metric = make()
    for batch in without_targets(data, names):
        for reading in (metric(*batch), metric.compute()):
            numbers = reading if isinstance(reading, dict) else {"": reading}
            for n, x in numbers.items():
                assert x.isnan().all() if x.is_floating_point() else x == 0 or n == "num_ignored"
    value, expected = (filled(x, [take(data, names)]).compute() for x in (metric, make()))
    if isinstance(value, dict):
        value, expected = ({n: x for n, x in v.items() if n != "num_ignored"} for v in (value, expected))
    assert bits(value) == bits(expected)


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal.default", "item")


@each_case
def test_update_and_forward_never_wait(name: str, operators: Operators) -> None:
    """On a device without data nothing is looked at, moved there or built from Python data."""
    make, names, _ = CASES[name]
    batch: list[Any] = [x.to("meta") for x in take(make_data(), names)]
    metric = make().to("meta")
    with operators:
        metric.update(*batch)
        metric(*batch)
        if "num_bytes" in names:
            batch[names.index("num_bytes")] = 1000
            metric.update(*batch)
            metric(*batch)
    assert metric.tally.state.device.type == "meta"
    assert operators.devices == {"meta"}
    assert [op for op in operators.counts if any(part in op for part in WAITS)] == []


@pytest.mark.usefixtures("hidden_values")
@each_case
def test_only_the_checks_of_the_cpu_look_at_values(name: str, operators: Operators) -> None:
    """Without the checks that are free on the CPU nothing is read back, and no number is copied to the device."""
    make, names, _ = CASES[name]
    batch: list[Any] = list(take(make_data(), names))
    metric = make()
    with operators:
        metric.update(*batch)
        metric(*batch)
        if "num_bytes" in names:
            batch[names.index("num_bytes")] = 1000
            metric(*batch)
    assert [op for op in operators.counts if any(part in op for part in WAITS)] == []
