"""Metrics side by side: what a collection lets share one state, what it keeps apart, and what may be merged."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

import xent_metrics
from tests.cases import CASES, Batch, bits, filled, make_batches, metric_classes, numbers
from tests.instruments import Operators
from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    NormalizedCrossEntropy,
    Perplexity,
)

# Probabilities are read as logits and log-probabilities too.
pytestmark = pytest.mark.filterwarnings("ignore:`preds")

K = 5  # Classes, positions and sequences, so that every dimension may count classes.
ONES, RISING = torch.ones(K), torch.linspace(1, 2, K)
TABLE, OTHER_TABLE = torch.tensor([1, 1, 2, 3, 4]), torch.tensor([2, 1, 2, 3, 4])

# Each row holds metrics that make the same update and read it in several ways; two rows make two updates.
ROWS: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "plain": [
        (CrossEntropy, {}),
        (CrossEntropy, {"ignore_index": -100, "class_dim": -1, "unit": "bits", "nan_policy": "omit"}),
        (CrossEntropy, {"label_smoothing": 0}),
        (BitsPerToken, {}),
        (Perplexity, {"nan_policy": "raise"}),
        (CrossEntropyReport, {}),
        (CrossEntropyReport, {"confidence": 0.8}),
    ],
    "ignore 0": [(CrossEntropy, {"ignore_index": 0}), (Perplexity, {"ignore_index": 0})],
    "ignore none": [(CrossEntropy, {"ignore_index": None}), (BitsPerToken, {"ignore_index": None})],
    "classes second": [(CrossEntropy, {"class_dim": 1}), (CrossEntropyReport, {"class_dim": 1})],
    "smoothed": [
        (CrossEntropy, {"label_smoothing": 0.25}),
        (CrossEntropy, {"label_smoothing": np.float64(0.25), "unit": "bits"}),
    ],
    "smoothed over others": [(CrossEntropy, {"label_smoothing": 0.25, "label_smoothing_over": "others"})],
    "ones": [
        (CrossEntropy, {"class_weight": ONES}),
        (CrossEntropy, {"class_weight": ONES.double(), "nan_policy": "omit"}),
    ],
    "rising": [(CrossEntropy, {"class_weight": RISING}), (CrossEntropy, {"class_weight": RISING.clone()})],
    "shifted": [(CrossEntropy, {"shift": True}), (Perplexity, {"shift": True}), (BitsPerToken, {"shift": True})],
    "log-probs": [(CrossEntropy, {"input": "log_probs"}), (Perplexity, {"input": "log_probs"})],
    "probs": [(CrossEntropy, {"input": "probs"}), (BitsPerToken, {"input": "probs"})],
    "clipped": [(CrossEntropy, {"input": "probs", "eps": 0.1}), (Perplexity, {"input": "probs", "eps": 0.1})],
    "report of bytes": [
        (CrossEntropyReport, {"token_bytes": TABLE}),
        (CrossEntropyReport, {"token_bytes": TABLE.int(), "confidence": 0.8}),
    ],
    "report of other bytes": [(CrossEntropyReport, {"token_bytes": OTHER_TABLE})],
    "bytes": [
        (BitsPerByte, {"token_bytes": TABLE}),
        (BitsPerByte, {"token_bytes": TABLE.clone(), "nan_policy": "omit"}),
    ],
    "other bytes": [(BitsPerByte, {"token_bytes": OTHER_TABLE})],
    "bytes ignoring 0": [(BitsPerByte, {"token_bytes": TABLE, "ignore_index": 0})],
    "decomposition": [(CrossEntropyDecomposition, {}), (CrossEntropyDecomposition, {"nan_policy": "omit"})],
    "decomposition smoothed": [(CrossEntropyDecomposition, {"label_smoothing": 0.25})],
    "normalized": [
        (NormalizedCrossEntropy, {"num_classes": K}),
        (NormalizedCrossEntropy, {"num_classes": K, "nan_policy": "raise"}),
    ],
    "normalized ignoring 0": [(NormalizedCrossEntropy, {"num_classes": K, "ignore_index": 0})],
    "grouped": [(GroupedCrossEntropy, {"num_groups": 3}), (GroupedCrossEntropy, {"num_groups": 3, "unit": "bits"})],
    "more groups": [(GroupedCrossEntropy, {"num_groups": 4})],
    "as many groups as classes": [(GroupedCrossEntropy, {"num_groups": K})],
    "grouped ones": [(GroupedCrossEntropy, {"num_groups": 3, "class_weight": ONES})],
    "grouped shifted": [(GroupedCrossEntropy, {"num_groups": 3, "shift": True})],
    "difference": [(CrossEntropyDifference, {}), (CrossEntropyDifference, {"confidence": 0.5})],
    "difference ignoring 0": [(CrossEntropyDifference, {"ignore_index": 0})],
    "difference shifted": [(CrossEntropyDifference, {"shift": True})],
}
BINARY_ROWS: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "binary": [(BinaryCrossEntropy, {}), (BinaryCrossEntropy, {"unit": "bits", "nan_policy": "omit"})],
    "binary ignoring 0": [(BinaryCrossEntropy, {"ignore_index": 0}), (BinaryCrossEntropy, {"ignore_index": 0})],
    "binary ignoring -1": [(BinaryCrossEntropy, {"ignore_index": -1})],
    "binary smoothed": [(BinaryCrossEntropy, {"label_smoothing": 0.25})],
    "binary one": [(BinaryCrossEntropy, {"pos_weight": torch.ones(1)})],
    "binary ones": [
        (BinaryCrossEntropy, {"pos_weight": ONES}),
        (BinaryCrossEntropy, {"pos_weight": ONES.double(), "unit": "bits"}),
    ],
    "binary rising": [(BinaryCrossEntropy, {"pos_weight": RISING})],
    "binary probs": [(BinaryCrossEntropy, {"input": "probs"})],
    "binary clipped": [(BinaryCrossEntropy, {"input": "probs", "eps": 0.4})],
}
ALL_ROWS = {**ROWS, **BINARY_ROWS}
PAIRS = [pair for rows in (ROWS, BINARY_ROWS) for pair in itertools.combinations(rows, 2)]


def make(row: str, column: int = 0) -> Any:
    """Make one of the metrics."""
    metric_class, options = ALL_ROWS[row][column]
    return metric_class(**options)


@cache
def batches_for(binary: bool, first: str, ignored: bool = False) -> list[Batch]:
    """Make a first batch, in which many updates do the same, and another one, in which no two do.

    All losses of a uniform first batch are the same, the groups are the classes, and no target is a 0 (nor an ignored
    one): until the second batch there is no difference between most metrics.
    """
    batches: list[Batch] = []
    torch.manual_seed(21)
    for kind in (first, "random"):
        if binary:
            preds = torch.full((K, K), 0.5) if kind == "uniform" else torch.rand(K, K)
            batches.append({"preds": preds.double(), "target": torch.ones(K, K, dtype=torch.int64)})
        else:
            scores = torch.zeros(2, K, K, K) if kind == "uniform" else 3 * torch.randn(2, K, K, K)
            target, group = torch.randint(1, K, (K, K)), torch.randint(0, 3, (K, K))
            a, b = scores.double().softmax(-1)
            preds = a
            if kind == "uniform":  # Model a is certain, so that what b costs is the difference; groups are classes.
                target = group = torch.randint(1, 3, (K, K))
                a = 1e4 * torch.nn.functional.one_hot(target, K).double()
            batches.append({"preds": preds, "preds_a": a, "preds_b": b, "target": target, "group": group})
    batches[1]["target"][:, ::2] = 0
    if ignored:
        batches[1]["target"][:, 1] = -1 if binary else -100
    return batches


def take(metric: Any, batch: Batch) -> Batch:
    """Return the arguments that a metric knows."""
    return metric._filter_kwargs(**batch)


def alone(row: str, column: int, batches: list[Batch]) -> Any:
    """Return every bit of what a metric reads that is alone."""
    metric = make(row, column)
    return bits(filled(metric, *(take(metric, batch) for batch in batches)).compute())


@cache
def alone_on_both(row: str, first: str, ignored: bool) -> Any:
    """Return every bit of what the first metric of a row reads after two batches."""
    return alone(row, 0, batches_for(row in BINARY_ROWS, first, ignored))


def read(collection: MetricCollection) -> dict[str, Any]:
    """Return every bit that each metric of a collection reads."""
    return {name: bits(metric.compute()) for name, metric in collection.items(keep_base=True)}


def accepts_ignored(row: str) -> bool:
    """Say whether a metric ignores the usual index."""
    usual = -1 if row in BINARY_ROWS else -100
    (metric_class, options), *_ = ALL_ROWS[row]
    return options.get("ignore_index", None if metric_class is BinaryCrossEntropy else -100) == usual


def test_every_class_is_in_a_row() -> None:
    """No metric class of the package is missing."""
    assert {metric_class for row in ALL_ROWS.values() for metric_class, _ in row} == metric_classes(xent_metrics)


# Sharing.


@pytest.mark.parametrize("call", ["update", "forward"])
@pytest.mark.parametrize("row", ALL_ROWS)
def test_metrics_alike_share_a_state(row: str, call: str, operators: Operators) -> None:
    """Metrics whose updates are alike make one, however that was spelled and whatever they read."""
    columns = range(len(ALL_ROWS[row]))
    collection = MetricCollection({f"{i}": make(row, i) for i in columns})
    batches = batches_for(row in BINARY_ROWS, "random") * 2
    collection.update(**batches[0])
    assert len(collection.compute_groups) == 1
    with operators:
        alone(row, 0, batches[1:2])
    passes = operators.count("amax")
    with operators:
        collection.update(**batches[1])
    assert operators.count("amax") == 2 * passes
    for batch in batches[2:]:
        getattr(collection, call)(**batch)
    assert read(collection) == {f"{i}": alone(row, i, batches) for i in columns}


@pytest.mark.parametrize("first", ["uniform", pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", ALL_ROWS)
def test_metrics_that_differ_are_kept_apart(row: str, first: str) -> None:
    """Every pair of metrics whose updates differ has two states, though they may be equal after the first batch."""
    for other in (b for a, b in PAIRS if a == row):
        ignored = accepts_ignored(row) and accepts_ignored(other)
        collection = MetricCollection({name: make(name) for name in (row, other)})
        for batch in batches_for(row in BINARY_ROWS, first, ignored):
            collection.update(**batch)
        assert len(collection.compute_groups) == 2, other
        assert read(collection) == {name: alone_on_both(name, first, ignored) for name in (row, other)}, other


@pytest.mark.parametrize(
    ("first", "calls"),
    [
        ("random", ["update"]),
        pytest.param("uniform", ["update"], marks=pytest.mark.slow),
        pytest.param("uniform", ["forward"], marks=pytest.mark.slow),
        pytest.param("uniform", ["update", "forward"], marks=pytest.mark.slow),
        ("uniform", ["forward", "update", "update"]),
    ],
)
@pytest.mark.parametrize("rows", [ROWS, BINARY_ROWS], ids=["classes", "binary"])
def test_all_of_them_together(rows: dict[str, Any], calls: list[str], first: str) -> None:
    """All metrics of all rows in one collection read what they read alone, and share as many states as rows."""
    members = {f"{row} {i}": (row, i) for row in rows for i in range(len(rows[row]))}
    collection = MetricCollection({name: make(*member) for name, member in members.items()})
    lone = {name: make(*member) for name, member in members.items()}
    batches = batches_for(rows is BINARY_ROWS, first) * 2
    for i, batch in enumerate(batches):
        getattr(collection, calls[i % len(calls)])(**batch)
        expected = {name: bits(filled(metric, take(metric, batch)).compute()) for name, metric in lone.items()}
        assert read(collection) == read(collection) == expected
    assert len(collection.compute_groups) == (len(rows) if "update" in calls else len(members))
    collection.reset()
    assert {metric.update_count for metric in collection.values()} == {0}
    collection.update(**batches[1])
    assert read(collection) == {name: alone(*member, batches[1:2]) for name, member in members.items()}
    assert len(collection.compute_groups) == len(rows)


@pytest.mark.parametrize("first", [25, 30])
def test_bytes_of_the_text_are_kept_apart(first: int) -> None:
    """A metric that is told the bytes of each batch shares nothing, be it one for each target at first."""
    collection = MetricCollection([BitsPerToken(), BitsPerByte(), Perplexity()])
    lone = BitsPerByte()
    for batch, num_bytes in zip(batches_for(False, "uniform"), (first, 60), strict=True):
        collection.update(**batch, num_bytes=num_bytes)
        lone.update(batch["preds"], batch["target"], num_bytes=num_bytes)
    assert len(collection.compute_groups) == 2
    assert bits(collection["BitsPerByte"].compute()) == bits(lone.compute())
    assert bits(collection["BitsPerToken"].compute()) == alone("plain", 3, batches_for(False, "uniform"))


def test_without_compute_groups() -> None:
    """A collection that shares nothing reads the same."""
    batches = batches_for(False, "random")
    collections = [MetricCollection({row: make(row) for row in ROWS}, compute_groups=on) for on in (False, True)]
    for collection in collections:
        for batch in batches:
            collection.update(**batch)
    assert read(collections[0]) == read(collections[1])


# The life of a collection.


def test_signatures_may_be_mixed() -> None:
    """Metrics of different signatures take their own of the keyword arguments, the weight included."""
    names = [
        "CrossEntropy",
        "BitsPerByte-number",
        "GroupedCrossEntropy",
        "CrossEntropyReport",
        "NormalizedCrossEntropy",
    ]
    names += ["Perplexity", "CrossEntropyDifference", "BitsPerToken", "CrossEntropyDecomposition-smoothed"]
    cases = {name: CASES[name]._replace(data={}) for name in names}
    smoothed = {"label_smoothing": 0.1}
    cases["CrossEntropyDecomposition-smoothed"] = cases[names[-1]]._replace(options=smoothed)
    batches = [
        {
            **batch,
            "preds_a": batch["preds"],
            "preds_b": batch["preds"].flip(-1),
            "group": batch["target"] % 4,
            "num_bytes": 9,
        }
        for batch in make_batches(weighed=True)
    ]
    collection = MetricCollection({name: case.metric() for name, case in cases.items()})
    for batch, call in zip(batches, ("update", "forward", "update"), strict=True):
        value = getattr(collection, call)(**batch)
        if call == "forward":
            steps = {name: metric._forward_cache for name, metric in collection.items()}
            assert set(value) == {
                key
                for name, step in steps.items()
                for key in ([f"{name}_{k}" for k in step] if isinstance(step, dict) else [name])
            }
    for name, case in cases.items():
        expected = numbers(case.expected(*batches))
        value = numbers(collection[name].compute())
        for key, number in value.items():
            assert number == pytest.approx(expected[key], rel=1e-6, abs=1e-6, nan_ok=True), (name, key)
        own = filled(case.metric(), *(take(case.metric(), batch) for batch in batches))
        assert bits(collection[name].compute()) == bits(own.compute())
    alike = [{"BitsPerToken", "CrossEntropy", "CrossEntropyReport", "Perplexity"}]
    assert [set(group) for group in collection.compute_groups.values() if len(group) > 1] == alike


def copies() -> Iterator[Any]:
    """Yield ways and times to copy: each way once, and each time once; the others are slow."""
    for (i, copy), (j, when) in itertools.product(
        enumerate(("clone", "deepcopy", "pickle")), enumerate(("after one", "before", "after both"))
    ):
        yield pytest.param(copy, when, marks=() if i == j else pytest.mark.slow)


@pytest.mark.parametrize(("copy", "when"), [*copies()])
def test_copies_of_a_collection(copy: str, when: str) -> None:
    """A copy, with names of its own or not, goes on by itself, whenever it was made."""
    batches = batches_for(False, "uniform")
    collection = MetricCollection({f"{row} {i}": make(row, i) for row in ROWS for i in range(len(ROWS[row]))})
    done = {"before": 0, "after one": 1, "after both": 2}[when]
    for batch in batches[:done]:
        collection.update(**batch)
    expected = MetricCollection({f"{row} {i}": make(row, i) for row in ROWS for i in range(len(ROWS[row]))})
    for batch in batches:
        expected.update(**batch)
    if copy == "clone":
        other = collection.clone(prefix="val/", postfix=" (all)")
    else:
        other = deepcopy(collection) if copy == "deepcopy" else pickle.loads(pickle.dumps(collection))
    for batch in batches[done:]:
        other.update(**batch)
    assert read(other) == read(expected)
    assert len(other.compute_groups) == len(ROWS)
    names = {name if copy != "clone" else f"val/{name} (all)" for name in expected.compute()}
    assert set(other.compute()) == names
    if done == 1:
        first = {f"{row} {i}": alone(row, i, batches[:1]) for row in ROWS for i in range(len(ROWS[row]))}
        assert read(collection) == first
    if done == 0:
        assert {metric.update_count for metric in collection.values()} == {0}
    other.reset()
    collection.update(**batches[1])
    kept = [*batches[:done], batches[1]]
    assert read(collection) == {name: alone(*_member(name), kept) for name in read(collection)}


def _member(name: str) -> tuple[str, int]:
    row, column = name.rsplit(" ", 1)
    return row, int(column)


def test_values_of_a_collection() -> None:
    """`forward` names the numbers of a batch as `compute` names those of all, where a dict is among them too."""
    collection = MetricCollection([CrossEntropy(), Perplexity(), BitsPerToken(), CrossEntropyReport()])
    for i, batch in enumerate(make_batches(weighed=True)):
        step = collection(**batch) if i != 1 else collection.update(**batch)
        value = collection.compute()
        if step is not None:
            assert list(step) == list(value)
            report = filled(CrossEntropyReport(), batch).compute()
            assert numbers({k: step[k] for k in ("perplexity", "num_tokens")}) == pytest.approx(
                numbers({k: report[k] for k in ("perplexity", "num_tokens")}), rel=1e-13
            )
        assert bits(value["Perplexity"]) == bits(value["perplexity"])
        assert bits(value["CrossEntropy"]) == bits(value["cross_entropy"])
        assert bits(value["BitsPerToken"]) == bits(value["bits_per_token"])


def test_persistent_collection() -> None:
    """A persistent collection saves what it shares for each member, and one that loads it goes on to the same bits."""
    batches = batches_for(False, "uniform")
    collections = [MetricCollection({row: make(row) for row in ROWS}) for _ in range(2)]
    for collection in collections:
        assert collection.state_dict() == {}
        collection.persistent()
    collections[0].update(**batches[0])
    collections[1].load_state_dict(deepcopy(collections[0].state_dict()))
    for collection in collections:
        collection.update(**batches[1])
    assert read(collections[1]) == read(collections[0])


# Merging.


@pytest.mark.parametrize("row", ALL_ROWS)
def test_merge_of_different_metrics_is_refused(row: str) -> None:
    """A metric whose updates mean something else is not added, whether it comes as a metric or as its state."""
    pattern = r"(?s)`incoming_state` must come from .* same options.*alike"
    for other in (
        b for pair in PAIRS for a, b in (pair, pair[::-1]) if a == row and ALL_ROWS[a][0][0] is ALL_ROWS[b][0][0]
    ):
        metric, incoming = make(row), make(other)
        state = metric.tally.state.clone()
        for form in (incoming, incoming.metric_state):
            with pytest.raises(ValueError, match=pattern):
                metric.merge_state(form)
        assert torch.equal(metric.tally.state, state)


@pytest.mark.parametrize("row", ALL_ROWS)
def test_merge_of_metrics_alike(row: str) -> None:
    """Metrics whose updates are alike may be merged, however that was spelled and whatever they read."""
    batches = batches_for(row in BINARY_ROWS, "random")
    for i, j in itertools.permutations(range(len(ALL_ROWS[row])), 2):
        metric, other = make(row, i), make(row, j)
        filled(metric, take(metric, batches[0]))
        filled(other, take(other, batches[1]))
        expected = alone(row, i, batches)
        states = deepcopy(metric)
        states.merge_state(other.metric_state)
        assert bits(states.compute()) == expected
        metric.merge_state(other)
        assert bits(metric.compute()) == expected


@pytest.mark.parametrize(
    "row", ["difference", "ones", "smoothed", "ignore 0", "ignore none", "classes second", "probs"]
)
def test_first_batches_hide_what_differs(row: str) -> None:
    """The uniform first batch is a trap: metrics that differ have equal states after it."""
    (batch, _) = batches_for(False, "uniform")
    states = [filled(make(name), take(make(name), batch)).tally.state for name in ("plain", row)]
    assert torch.allclose(*states, rtol=1e-5)
    groups = [
        filled(make(name), take(make(name), batch)).tally.state for name in ("normalized", "as many groups as classes")
    ]
    assert torch.equal(*groups)
