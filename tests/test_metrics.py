"""The metric classes: pooled values, and everything that torchmetrics and its users do with a metric."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import matplotlib as mpl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.exceptions import TorchMetricsUserError
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, Running

from tests.conftest import Operators
from xent_metrics import BitsPerToken, CrossEntropy, CrossEntropyReport, Perplexity, functional

mpl.use("Agg")

K = 6
CLASSES = [CrossEntropy, BitsPerToken, Perplexity, CrossEntropyReport]
Batch = tuple[Tensor, ...]
REPORT = [
    "cross_entropy",
    "bits_per_token",
    "perplexity",
    "cross_entropy_stderr",
    "cross_entropy_lower",
    "cross_entropy_upper",
    "perplexity_lower",
    "perplexity_upper",
    "num_tokens",
    "num_ignored",
    "num_nonfinite",
]

each_class = pytest.mark.parametrize("metric_class", CLASSES)


def make_batches(weighed: bool = False) -> list[Batch]:
    """Make batches of unequal size and difficulty, with some ignored targets, so that a mean of means is wrong."""
    batches: list[Batch] = []
    for size in (1, 4, 7):
        target = torch.randint(0, K, (size, 3)).masked_fill(torch.rand(size, 3) < 0.2, -100)
        target[0, 0] = 1
        batch = (size * torch.randn(size, 3, K), target)
        batches.append((*batch, torch.rand(size, 3)) if weighed else batch)
    return batches


def together(batches: list[Batch]) -> Batch:
    """Concatenate batches."""
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def bits(value: Any) -> Any:
    """Every bit of a value, or of a dict of values."""
    return {name: bits(x) for name, x in value.items()} if isinstance(value, dict) else float(value).hex()


def filled(metric: Any, batches: list[Batch]) -> Any:
    """Update a metric with batches."""
    for batch in batches:
        metric.update(*batch)
    return metric


def assert_close(value: Any, expected: Any) -> None:
    """Compare what `forward` read in floating point with what `compute` rounded once."""
    if not isinstance(value, dict):
        value, expected = {"": value}, {"": expected}
    assert list(value) == list(expected)
    for name, tensor in value.items():
        interval = name.endswith(("stderr", "lower", "upper"))
        tolerance = {"rel": 1e-6, "abs": 1e-7} if interval else {"rel": 1e-14}
        assert tensor.item() == pytest.approx(expected[name].item(), nan_ok=True, **tolerance), name


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"class_weight": torch.linspace(0, 2, K)},
        {"class_weight": torch.linspace(0, 2, K, dtype=torch.float16), "label_smoothing": 0.2},
        {"ignore_index": 2},
    ],
)
def test_equal_to_pytorch_on_all_the_data(options: dict[str, Any], soft: bool) -> None:
    """The value is that of `F.cross_entropy` on all batches at once, with its denominators, and no mean of means."""
    batches = make_batches()
    if options.get("ignore_index") is not None:
        batches = [(preds, target.clamp(min=0)) for preds, target in batches]
    if soft:
        batches = [(preds, torch.rand(preds.shape).softmax(-1)) for preds, _ in batches]
    metric = filled(CrossEntropy(**options), batches)
    preds, target = together(batches)
    weight = options.get("class_weight")
    judged = {
        "weight": None if weight is None else weight.double(),
        "label_smoothing": options.get("label_smoothing", 0.0),
        "ignore_index": -100 if soft else options.get("ignore_index", -100),
    }

    def judge(preds: Tensor, target: Tensor) -> float:
        target = target.double().flatten(0, 1) if soft else target.flatten()
        return F.cross_entropy(preds.double().flatten(0, 1), target, **judged).item()

    assert metric.compute().item() == pytest.approx(judge(preds, target), rel=1e-6)
    means = sum(judge(*batch) for batch in batches) / len(batches)
    assert abs(metric.compute().item() - means) > 1e-2
    assert metric.compute().dtype == torch.float64


@each_class
@pytest.mark.parametrize("weighed", [False, True])
def test_same_bits_for_any_batching(metric_class: Any, weighed: bool) -> None:
    """Batch size, order and gradient accumulation do not change one bit of any reading."""
    batches = make_batches(weighed)
    expected = bits(filled(metric_class(), batches).compute())
    assert bits(filled(metric_class(), [together(batches)]).compute()) == expected
    assert bits(filled(metric_class(), batches[::-1]).compute()) == expected
    rows = [tuple(part[i : i + 1] for part in together(batches)) for i in range(12)]
    assert bits(filled(metric_class(), rows).compute()) == expected


def test_classes_agree_with_functions() -> None:
    """A class on batches is its function on all the data, and the report holds all of them."""
    batches = make_batches(weighed=True)
    data = together(batches)
    report = filled(CrossEntropyReport(), batches).compute()
    for metric_class, function in zip(
        CLASSES, (functional.cross_entropy, functional.bits_per_token, functional.perplexity), strict=False
    ):
        value = filled(metric_class(), batches).compute()
        assert value.item() == pytest.approx(function(*data).item(), rel=1e-14)
        assert bits(report[function.__name__]) == bits(value)
    in_bits = filled(CrossEntropy(unit="bits"), batches).compute()
    assert bits(in_bits) == bits(report["bits_per_token"])


def test_report() -> None:
    """The report has its keys in order, floats as float64, counts as int64, and counts what was and was not scored."""
    preds = torch.randn(2, 4, K)
    target = torch.tensor([[0, 1, -100, 2], [3, -100, 4, 5]])
    metric = CrossEntropyReport()
    metric.update(preds, target)
    metric.update(preds, target, torch.tensor([1.0, 0.0, 2.0, 1.0]))
    metric.update(preds, target, torch.tensor([[True], [False]]))
    report = metric.compute()
    assert list(report) == REPORT
    assert [x.dtype for x in report.values()] == [torch.float64] * 8 + [torch.int64] * 3
    counts = {name: x.item() for name, x in report.items() if name.startswith("num_")}
    assert counts == {"num_tokens": 6 + 5 + 3, "num_ignored": 2 + 3 + 5, "num_nonfinite": 0}
    assert report["cross_entropy_lower"] < report["cross_entropy"] < report["cross_entropy_upper"]
    assert report["perplexity_upper"].item() == pytest.approx(report["cross_entropy_upper"].exp().item())


def test_clustered_interval() -> None:
    """The standard error is the ratio estimator over sequences, and the interval a normal quantile of it."""
    losses, target = torch.rand(9, 5, dtype=torch.float64), torch.zeros(9, 5, dtype=torch.int64)
    weight = torch.rand(9, 5, dtype=torch.float64)
    report = filled(CrossEntropyReport(input="losses", confidence=0.9), [(losses, target, weight)]).compute()
    sums, weights = (losses * weight).sum(1), weight.sum(1)
    mean = sums.sum() / weights.sum()
    stderr = (9 / 8 * (sums - mean * weights).square().sum()).sqrt() / weights.sum()
    assert report["cross_entropy_stderr"].item() == pytest.approx(stderr.item(), rel=1e-8)
    upper = mean + 1.6448536269514722 * stderr
    assert report["cross_entropy_upper"].item() == pytest.approx(upper.item(), rel=1e-8)


@each_class
def test_constants(metric_class: Any) -> None:
    """Lower is better, one update is enough for `forward`, and options are keyword-only and checked."""
    metric = metric_class()
    assert (metric.higher_is_better, metric.full_state_update, metric.is_differentiable) == (False, False, False)
    with pytest.raises(TypeError):
        metric_class("logits")
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `label_smooth`"):
        metric_class(label_smooth=0.1)
    if metric_class is not CrossEntropy:
        with pytest.raises(ValueError, match="label_smoothing"):
            metric_class(label_smoothing=0.1)
    with pytest.raises(ValueError, match="`nan_policy` must be one of"):
        metric_class(nan_policy="drop")
    with pytest.raises(ValueError, match="`input` must be one of"):
        metric_class(input="logit")


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, True, "0.9"])
def test_confidence_is_checked(confidence: Any) -> None:
    """A confidence is a float between 0 and 1."""
    with pytest.raises(ValueError, match=r"`confidence` must be a float between 0 and 1, got .*0\.95"):
        CrossEntropyReport(confidence=confidence)


@pytest.mark.parametrize("unit", ["bit", None])
def test_unit_is_checked(unit: Any) -> None:
    """A unit is nats or bits."""
    with pytest.raises(ValueError, match=r"`unit` must be one of \['nats', 'bits'\]"):
        CrossEntropy(unit=unit)


@each_class
def test_no_targets_read_nan(metric_class: Any) -> None:
    """Without targets the value is NaN, with torchmetrics' warning before any update, and poisons nothing."""
    metric = metric_class()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        value = metric.compute()
    empty = (torch.zeros(0, K), torch.zeros(0, dtype=torch.int64))
    ignored = (torch.zeros(2, K), torch.full((2,), -100))
    for batch in (empty, ignored):
        metric.update(*batch)
        for reading in (value, metric.compute(), metric(*batch)):
            numbers = reading.values() if isinstance(reading, dict) else [reading]
            assert all(x.isnan() if x.is_floating_point() else x in (0, 2, 4) for x in numbers)
    batches = make_batches()
    assert_close(filled(metric, batches).compute(), filled(metric_class(), [*batches, ignored, ignored]).compute())


# Life of a metric.


@each_class
@pytest.mark.parametrize("copy", [deepcopy, Metric.clone, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_copies(metric_class: Any, copy: Callable[[Any], Any]) -> None:
    """A copy has the same value and a life of its own."""
    batches = make_batches()
    options = {"class_weight": torch.rand(K)} if metric_class is CrossEntropy else {}
    metric = filled(metric_class(**options), batches[:1])
    before = bits(metric.compute())
    other = copy(metric)
    assert bits(other.compute()) == before
    assert bits(filled(other, batches[1:]).compute()) == bits(filled(metric_class(**options), batches).compute())
    assert bits(metric.compute()) == before
    metric.reset()
    assert metric.update_count == 0
    assert other.tally.totals().scored > 0


@each_class
def test_state_dict(metric_class: Any) -> None:
    """A persistent metric saves its state, and one that loads it goes on to the same bits; others save nothing."""
    batches = make_batches()
    metric = filled(metric_class(), batches[:2])
    assert metric.state_dict() == {}
    metric.persistent(mode=True)
    saved = deepcopy(metric.state_dict())
    metric.update(*batches[2])
    other = metric_class()
    other.persistent(mode=True)
    other.load_state_dict(saved)
    other.update(*batches[2])
    assert bits(other.compute()) == bits(metric.compute())
    assert list(metric.parameters()) == []


@each_class
def test_reset(metric_class: Any) -> None:
    """After a reset there is nothing left, and what the old state is referenced by keeps it."""
    batches = make_batches()
    metric = filled(metric_class(), batches)
    metric.compute()
    state, content = metric.tally.state, metric.tally.state.clone()
    metric.update(*batches[0])
    assert metric.tally.state is not state
    metric.reset()
    assert torch.equal(state, content)
    assert metric.tally.totals().scored == metric.update_count == 0
    assert bits(filled(metric, batches[:1]).compute()) == bits(filled(metric_class(), batches[:1]).compute())


@each_class
@pytest.mark.parametrize("inside", ["reset", "update", "forward", "compute", "all"])
def test_inference_mode(metric_class: Any, inside: str) -> None:
    """A metric may be made, reset, updated and read inside inference mode or outside, in any order."""
    batches = make_batches()
    metric = metric_class()
    for name, call in (
        ("reset", metric.reset),
        ("update", lambda: metric.update(*batches[0])),
        ("forward", lambda: metric(*batches[1])),
        ("update", lambda: metric.update(*batches[2])),
        ("compute", metric.compute),
    ):
        with torch.inference_mode(inside in (name, "all")):
            call()
    metric.update(*batches[0])
    metric.merge_state(filled(metric_class(), batches[:1]))
    expected = bits(filled(metric_class(), [*batches, batches[0], batches[0]]).compute())
    assert bits(metric.compute()) == bits(deepcopy(metric).compute()) == expected


@each_class
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.bfloat16(),
        lambda m: m.type(torch.float16),
        lambda m: m.set_dtype(torch.float16),
        lambda m: nn.Sequential(m).to(torch.bfloat16),
        lambda m: nn.Sequential(m).type(torch.bfloat16),
    ],
)
def test_casts_change_nothing(metric_class: Any, cast: Callable[[Any], Any]) -> None:
    """Casting a metric, or the module that holds it, casts neither state, defaults, class weights nor values."""
    batches = make_batches()
    options = {"class_weight": torch.rand(K, dtype=torch.float64)} if metric_class is CrossEntropy else {}
    metric = filled(metric_class(**options), batches)
    expected, state = bits(metric.compute()), metric.tally.state.clone()
    cast(metric)
    assert metric.tally.state.dtype == torch.int64
    assert torch.equal(metric.tally.state, state)
    value = metric.compute()
    assert bits(value) == expected
    numbers = value.values() if isinstance(value, dict) else [value]
    assert all(x.dtype in (torch.float64, torch.int64) for x in numbers)
    if metric_class is CrossEntropy:
        assert torch.equal(metric.class_weight, options["class_weight"])
        assert metric.class_weight.dtype == torch.float64
    metric.reset()
    assert bits(filled(metric, batches).compute()) == expected


def test_moves_to_a_device() -> None:
    """State and class weights move together."""
    metric = CrossEntropy(class_weight=torch.ones(K)).to("meta")
    assert {metric.tally.state.device.type, metric.class_weight.device.type, metric.device.type} == {"meta"}


@pytest.mark.parametrize("weight_class", [torch.Tensor.clone, nn.Parameter])
def test_class_weights_are_the_metrics_own(weight_class: Callable[[Tensor], Tensor]) -> None:
    """Class weights are a snapshot: not a parameter to train, and not changed with the tensor that was passed."""
    class_weight = weight_class(torch.ones(K))
    metric = CrossEntropy(class_weight=class_weight)
    assert list(metric.parameters()) == []
    with torch.no_grad():
        class_weight[0] = 5.0
    assert metric.class_weight.tolist() == [1.0] * K
    assert metric.to("meta").class_weight.device.type == "meta"


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weight": torch.rand(K)}])
def test_autocast(options: dict[str, Any], dtype: torch.dtype, soft: bool) -> None:
    """Autocast does not reach in: an update under it gives the same bits."""
    preds, target, weight = together(make_batches(weighed=True))
    batch = (preds.to(dtype), torch.rand(preds.shape).softmax(-1) if soft else target, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric = filled(CrossEntropy(**options), [batch])
        value = metric(*batch)
    expected = filled(CrossEntropy(**options), [batch])
    assert bits(value) == bits(expected(*batch))
    assert bits(metric.compute()) == bits(expected.compute())


@each_class
def test_no_graph_is_kept(metric_class: Any) -> None:
    """Logits that require a gradient leave neither graph nor gradient behind."""
    preds, target, weight = (x.requires_grad_(x.is_floating_point()) for x in together(make_batches(weighed=True)))
    metric = metric_class()
    metric.update(preds, target, weight)
    value = metric(preds, target, weight)
    values = [*value.values()] if isinstance(value, dict) else [value]
    assert not any(x.requires_grad for x in (metric.tally.state, *values, metric.compute()) if isinstance(x, Tensor))


# forward.


@each_class
@pytest.mark.parametrize("weighed", [False, True])
def test_forward(metric_class: Any, weighed: bool, operators: Operators) -> None:
    """`forward` returns the value of its batch, accumulates, and passes over the logits once."""
    batches = make_batches(weighed)
    metric = metric_class()
    for batch in batches:
        with operators:
            value = metric(*batch)
        assert_close(value, filled(metric_class(), [batch]).compute())
    assert operators.count("log_softmax") == len(batches)
    assert metric.update_count == len(batches)
    assert bits(metric.compute()) == bits(filled(metric_class(), batches).compute())
    metric(*batches[0])
    assert bits(metric.compute()) == bits(filled(metric_class(), [*batches, batches[0]]).compute())


def test_sync_options() -> None:
    """`dist_sync_on_step` syncs the value of a batch, `sync_on_compute=False` reads one rank; neither stays synced."""
    batch = together(make_batches())
    scored = functional.tally(*batch).totals().scored
    tally = functional.tally(*make_batches()[1])  # Of the other rank.
    other, rest = tally.state, tally.totals().scored
    two_ranks = {"distributed_available_fn": lambda: True, "dist_sync_fn": lambda x, group: [x, other]}
    for on_step in (False, True):
        for on_compute in (False, True):
            metric = CrossEntropyReport(dist_sync_on_step=on_step, sync_on_compute=on_compute, **two_ranks)
            step = metric(*batch)
            assert step["num_tokens"].item() == scored + on_step * rest
            metric.update(*batch)
            value = metric.compute()
            assert value["num_tokens"].item() == 2 * scored + on_compute * rest
            assert metric.tally.totals().scored == 2 * scored
            pooled = functional.tally(*batch) + functional.tally(*batch)
            expected = CrossEntropyReport()
            expected.add(pooled)
            if on_compute:
                expected.merge_state(dict.fromkeys(expected.metric_state, other))
            assert bits(value) == bits(expected.compute())


def test_forward_while_synced_is_refused() -> None:
    """A batch cannot be added to a metric that holds the state of all ranks."""
    batch = together(make_batches())
    metric = filled(CrossEntropy(), [batch])
    metric.sync(dist_sync_fn=lambda x, group: [x, x], distributed_available=lambda: True)
    with pytest.raises(TorchMetricsUserError, match="synced"):
        metric(*batch)
    metric.unsync()
    metric(*batch)
    assert metric.update_count == 2


@each_class
def test_compute_on_cpu(metric_class: Any) -> None:
    """torchmetrics' `compute_on_cpu` and `compute_with_cache=False` change no value."""
    batches = make_batches()
    metric = filled(metric_class(compute_on_cpu=True, compute_with_cache=False), batches)
    assert bits(metric.compute()) == bits(metric.compute()) == bits(filled(metric_class(), batches).compute())


# Merging, plotting, wrapping.


@each_class
@pytest.mark.parametrize("form", ["metric", "dict", "tally"])
def test_merge(metric_class: Any, form: str) -> None:
    """Merging is one more addition: of a metric, of its state, or of a tally, and the cached value is forgotten."""
    batches = make_batches()
    metric, other = filled(metric_class(), batches[:1]), filled(metric_class(), batches[1:])
    before, incoming = metric.compute(), other.tally.state.clone()
    if form == "tally":
        metric.add(other.tally)
    else:
        metric.merge_state(other if form == "metric" else other.metric_state)
    assert bits(metric.compute()) == bits(filled(metric_class(), batches).compute()) != bits(before)
    assert torch.equal(other.tally.state, incoming)
    metric.merge_state(metric_class())
    assert bits(filled(metric, batches).compute()) == bits(filled(metric_class(), batches + batches).compute())
    fresh = metric_class()
    fresh.merge_state(other)
    assert bits(fresh.compute()) == bits(other.compute())


DIFFERENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"ignore_index": 0}),
    ({}, {"ignore_index": None}),
    ({}, {"label_smoothing": 0.1}),
    ({}, {"class_weight": torch.ones(K)}),
    ({"class_weight": torch.ones(K)}, {"class_weight": torch.linspace(1, 2, K)}),
    ({}, {"input": "log_probs"}),
    ({"input": "probs"}, {"input": "probs", "eps": 0.01}),
]
ALIKE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"ignore_index": -100, "class_dim": -1, "unit": "bits", "nan_policy": "omit"}),
    ({}, {"label_smoothing": 0}),
    ({"label_smoothing": 0.25}, {"label_smoothing": torch.tensor(0.25).double().numpy()[()]}),
    ({"class_weight": torch.ones(K)}, {"class_weight": torch.ones(K, dtype=torch.float64)}),
]


@pytest.mark.parametrize(("options", "others"), DIFFERENT)
def test_merge_of_different_metrics_is_refused(options: dict[str, Any], others: dict[str, Any]) -> None:
    """A metric whose updates mean something else is not added."""
    metric, other = CrossEntropy(**options), CrossEntropy(**others)
    for incoming in (other, other.metric_state):
        with pytest.raises(ValueError, match=r"(?s)`incoming_state` must come from .* same options.*alike"):
            metric.merge_state(incoming)


@pytest.mark.parametrize(("options", "others"), ALIKE)
def test_merge_of_metrics_alike(options: dict[str, Any], others: dict[str, Any]) -> None:
    """Metrics whose updates are alike may be merged, however that was spelled and whatever they read."""
    batches = make_batches()
    metric = filled(CrossEntropy(**options), batches[:1])
    metric.merge_state(filled(CrossEntropy(**others), batches[1:]))
    assert bits(metric.compute()) == bits(filled(CrossEntropy(**options), batches).compute())


@each_class
def test_plot(metric_class: Any) -> None:
    """Every class plots its present value, one value, and a list of values."""
    batches = make_batches()
    metric = metric_class()
    history = [metric(*batch) for batch in batches]
    for value in (None, history[0], history):
        figure, _ = metric.plot(value)
        assert figure is not None
        mpl.pyplot.close(figure)


def test_tracker_and_min_max() -> None:
    """The tracker's best is its lowest, and the extremes are those of the values computed."""
    batches = make_batches()
    expected = [filled(CrossEntropy(), [batch]).compute().item() for batch in batches]
    tracker, extremes = MetricTracker(CrossEntropy()), MinMaxMetric(CrossEntropy())
    for batch in batches:
        tracker.increment()
        tracker.update(*batch)
        extremes.reset()
        extremes.update(*batch)
        result = extremes.compute()
    best, step = tracker.best_metric(return_step=True)
    assert (best, step) == (min(expected), expected.index(min(expected)))
    assert tracker.compute_all().tolist() == expected
    assert result["raw"].item() == expected[-1]
    running = MinMaxMetric(CrossEntropy())
    seen = [running(*batch)["raw"].item() for batch in batches]
    assert running.compute()["min"].item() == pytest.approx(min([*seen, running.compute()["raw"].item()]), rel=1e-14)


@each_class
@pytest.mark.parametrize("call", ["update", "forward"])
def test_running(metric_class: Any, call: str) -> None:
    """A window holds the pooled value of its last batches."""
    batches = [*make_batches(), *make_batches()]
    running = Running(metric_class(), window=2)
    for before, batch in zip([None, *batches], batches, strict=False):
        getattr(running, call)(*batch)
        window = [x for x in (before, batch) if x is not None]
        assert bits(running.compute()) == bits(filled(metric_class(), window).compute())


# Collections.


@pytest.mark.parametrize("call", ["update", "forward"])
@pytest.mark.parametrize(("options", "others"), DIFFERENT)
def test_collection_keeps_different_metrics_apart(options: dict[str, Any], others: dict[str, Any], call: str) -> None:
    """Metrics that differ are not grouped, though their states are equal after the first batch."""
    kind = torch.float64
    uniform = torch.full((4, K), -math.log(K) if "input" not in options else 1 / K, dtype=kind)  # Normalised.
    first = (uniform, torch.tensor([1, 1, 1, 1]))
    second_logits = torch.randn(4, K, dtype=kind) if "input" not in options else torch.rand(4, K, dtype=kind)
    second_logits[0, 3] = 0.001
    missing = {options.get("ignore_index", -100), others.get("ignore_index", -100)}
    second = (second_logits, torch.tensor([3, 0 if 0 in missing else 2, 2, 3]))
    singles = [filled(CrossEntropy(**kwargs), [first, second]) for kwargs in (options, others)]
    collection = MetricCollection({"a": CrossEntropy(**options), "b": CrossEntropy(**others)})
    for batch in (first, second):
        getattr(collection, call)(*batch)
    assert len(collection.compute_groups) == 2
    assert [bits(x) for x in collection.compute().values()] == [bits(metric.compute()) for metric in singles]


@pytest.mark.parametrize(("options", "others"), ALIKE)
def test_collection_groups_metrics_alike(options: dict[str, Any], others: dict[str, Any], operators: Operators) -> None:
    """Metrics whose updates are alike share one, however that was spelled and whatever they read."""
    batches = make_batches()
    collection = MetricCollection({"a": CrossEntropy(**options), "b": CrossEntropy(**others)})
    collection.update(*batches[0])
    with operators:
        collection.update(*batches[1])
    assert len(collection.compute_groups) == operators.count("log_softmax") == 1


@pytest.mark.parametrize("calls", [["update"], ["forward"], ["update", "forward"], ["forward", "update", "update"]])
def test_collection_of_all_classes(calls: list[str], operators: Operators) -> None:
    """All classes share one state and one pass, and read it right after update, forward, reset, and twice."""
    collection = MetricCollection([metric_class() for metric_class in CLASSES])
    batches = [*make_batches(), *make_batches()]

    def check(batches: list[Batch]) -> None:
        for _ in range(2):
            values = collection.compute()
            for metric_class in CLASSES[:3]:
                assert bits(values[metric_class.__name__]) == bits(filled(metric_class(), batches).compute())
            report = filled(CrossEntropyReport(), batches).compute()
            assert {name: bits(values[name]) for name in REPORT} == bits(report)

    for i, batch in enumerate(batches):
        call = calls[i % len(calls)]
        if call == "update" and i > calls.index("update"):  # The first update forms the groups.
            operators.counts.clear()
            with operators:
                collection.update(*batch)
            assert operators.count("log_softmax") == 1
        else:
            value = getattr(collection, call)(*batch)
            if call == "forward":
                assert_close(value["Perplexity"], filled(Perplexity(), [batch]).compute())
        check(batches[: i + 1])
    assert len(collection.compute_groups) == (1 if "update" in calls else len(CLASSES))
    collection.reset()
    for batch in batches[:2]:
        collection.update(*batch)
    check(batches[:2])


# Bad values.

BAD_BATCHES: list[tuple[list[int], list[float] | None, int | None, str]] = [
    ([0, K], None, -100, rf"\[0, {K}\) or ignore_index=-100, got 1 .* such as {K}; check the vocabulary"),
    ([-1, -1], None, -100, "got 2 that are neither, such as -1; pass ignore_index=-1"),
    ([0, 2**40], None, -100, f"got 1 that are neither, such as {2**40}"),
    ([0, -100], None, None, "ignore_index=None, got 1 that are neither, such as -100; pass ignore_index=-100"),
    ([0, 1], [1.0, -1.0], -100, r"`weight` must hold finite .*got 1 that are not, such as -1\.0; use 0 or False"),
    ([0, 1], [math.nan, 1.0], -100, "`weight` must hold finite .*got 1 that are not, such as nan"),
    ([0, 1], [math.inf, math.inf], -100, "`weight` must hold finite .*got 2 that are not, such as inf"),
]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("call", ["update", "forward"])
@pytest.mark.parametrize(("target", "weight", "ignore_index", "text"), BAD_BATCHES)
def test_bad_values_raise_and_leave_no_trace(
    target: list[int], weight: list[float] | None, ignore_index: int | None, text: str, call: str, fresh: bool
) -> None:
    """On the CPU a bad target or weight raises before anything is added: state, counts and value are as they were."""
    metric = CrossEntropyReport(ignore_index=ignore_index)
    good = (torch.randn(2, K), torch.tensor([0, 1]))
    if not fresh:
        metric.update(*good)
    state, count = metric.tally.state.clone(), metric.update_count
    args = (torch.zeros(2, K), torch.tensor(target), None if weight is None else torch.tensor(weight))
    with pytest.raises(ValueError, match=text):
        getattr(metric, call)(*args)
    assert torch.equal(metric.tally.state, state)
    assert metric.update_count == count
    expected = filled(CrossEntropyReport(ignore_index=ignore_index), [good] if fresh else [good, good])
    assert bits(filled(metric, [good]).compute()) == bits(expected.compute())


@pytest.mark.parametrize("call", ["update", "forward"])
def test_wrong_shapes_leave_no_trace(call: str) -> None:
    """A batch that does not fit raises and counts for nothing."""
    metric = CrossEntropy()
    with pytest.raises(ValueError, match=r"`target` must have the shape \(2,\)"):
        getattr(metric, call)(torch.zeros(2, K), torch.zeros(3, dtype=torch.int64))
    assert metric.update_count == metric.tally.totals().scored == 0


@pytest.mark.parametrize(("target", "weight", "ignore_index", "text"), BAD_BATCHES)
def test_bad_values_are_counted_where_they_cannot_raise(
    target: list[int], weight: list[float] | None, ignore_index: int | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator they are counted: `forward` reads NaN, `compute` raises with the count until a reset heals."""
    monkeypatch.setattr("xent_metrics.checks.free_to_look", lambda _: False)
    metric = CrossEntropy(ignore_index=ignore_index)
    good = (torch.randn(2, K), torch.tensor([0, 1]))
    bad = (torch.zeros(2, K), torch.tensor(target), None if weight is None else torch.tensor(weight))
    assert metric(*bad).isnan()
    assert math.isfinite(metric(*good).item())
    metric.update(*bad)
    number = re.search(r"got (\d)", text)
    assert number
    name, tail = ("target", "targets were outside; .*reset") if weight is None else ("weight", "were not; .*reset")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"`{name}` .* {2 * int(number[1])} {tail}"):
            metric.compute()
    metric.reset()
    assert bits(filled(metric, [good]).compute()) == bits(filled(CrossEntropy(), [good]).compute())
