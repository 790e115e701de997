"""The metric classes: pooled values, reports, options and bad values; what all share is in `test_conformance.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.cases import named
from xent_metrics import BitsPerToken, CrossEntropy, CrossEntropyReport, Perplexity, functional
from xent_metrics.reading_info import OF_OTHER_TALLIES, READINGS

K = 6
CLASSES = [CrossEntropy, BitsPerToken, Perplexity, CrossEntropyReport]
Batch = tuple[Tensor, ...]
REPORT = [info for info in READINGS.values() if info.name not in OF_OTHER_TALLIES]


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
        metric.update(**named(metric.update, *batch))
    return metric


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


def test_classes_agree_with_functions() -> None:
    """A class on batches is its function on all the data, and the report holds all of them."""
    batches = make_batches(weighed=True)
    data = together(batches)
    report = filled(CrossEntropyReport(), batches).compute()
    for metric_class, function in zip(
        CLASSES, (functional.cross_entropy, functional.bits_per_token, functional.perplexity), strict=False
    ):
        value = filled(metric_class(), batches).compute()
        assert value.item() == pytest.approx(function(**named(function, *data)).item(), rel=1e-14)
        assert bits(report[function.__name__]) == bits(value)
    in_bits = filled(CrossEntropy(unit="bits"), batches).compute()
    assert bits(in_bits) == bits(report["bits_per_token"])


def test_report() -> None:
    """The report has its keys in order, floats as float64, counts as int64, and counts what was and was not scored."""
    preds = torch.randn(2, 4, K)
    target = torch.tensor([[0, 1, -100, 2], [3, -100, 4, 5]])
    metric = CrossEntropyReport()
    metric.update(preds, target)
    metric.update(preds, target, weight=torch.tensor([1.0, 0.0, 2.0, 1.0]))
    metric.update(preds, target, weight=torch.tensor([[True], [False]]))
    report = metric.compute()
    assert list(report) == [info.name for info in REPORT]
    assert [x.dtype for x in report.values()] == [torch.int64 if info.is_count else torch.float64 for info in REPORT]
    counts = {name: x.item() for name, x in report.items() if name.startswith("num_")}
    assert counts == {"num_tokens": 6 + 5 + 3, "num_ignored": 2 + 3 + 5, "num_nonfinite": 0}
    assert report["cross_entropy_lower"] < report["cross_entropy"] < report["cross_entropy_upper"]
    assert report["perplexity_upper"].item() == pytest.approx(report["cross_entropy_upper"].exp().item())


def test_clustered_interval() -> None:
    """The standard error is the ratio estimator over sequences, and the interval a quantile of Student's of it."""
    losses, target = torch.rand(9, 5, dtype=torch.float64), torch.zeros(9, 5, dtype=torch.int64)
    weight = torch.rand(9, 5, dtype=torch.float64)
    report = filled(CrossEntropyReport(input="losses", confidence=0.9), [(losses, target, weight)]).compute()
    sums, weights = (losses * weight).sum(1), weight.sum(1)
    mean = sums.sum() / weights.sum()
    stderr = (9 / 8 * (sums - mean * weights).square().sum()).sqrt() / weights.sum()
    assert report["cross_entropy_stderr"].item() == pytest.approx(stderr.item(), rel=1e-8)
    freedom = weights.sum().square() / weights.square().sum() - 1
    upper = mean + stats.t.isf(0.05, freedom.item()) * stderr
    assert report["cross_entropy_upper"].item() == pytest.approx(upper.item(), rel=1e-8)


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


# Life of a metric.


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
        value = metric(**named(metric.update, *batch))
    expected = filled(CrossEntropy(**options), [batch])
    assert bits(value) == bits(expected(**named(metric.update, *batch)))
    assert bits(metric.compute()) == bits(expected.compute())


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
        getattr(metric, call)(**named(metric.update, *args))
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


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize(("target", "weight", "ignore_index", "text"), BAD_BATCHES)
def test_bad_values_are_counted_where_they_cannot_raise(
    target: list[int], weight: list[float] | None, ignore_index: int | None, text: str
) -> None:
    """On an accelerator they are counted: `forward` reads NaN, `compute` raises with the count until a reset heals."""
    metric = CrossEntropy(ignore_index=ignore_index)
    good = (torch.randn(2, K), torch.tensor([0, 1]))
    bad = (torch.zeros(2, K), torch.tensor(target), None if weight is None else torch.tensor(weight))
    assert metric(**named(metric.update, *bad)).isnan()
    assert math.isfinite(metric(*good).item())
    metric.update(**named(metric.update, *bad))
    number = re.search(r"got (\d)", text)
    assert number
    name, tail = ("target", "targets were outside; .*reset") if weight is None else ("weight", "were not; .*reset")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"`{name}` .* {2 * int(number[1])} {tail}"):
            metric.compute()
    metric.reset()
    assert bits(filled(metric, [good]).compute()) == bits(filled(CrossEntropy(), [good]).compute())


def test_nothing_is_added_while_synced() -> None:
    """What was added to the tally of all ranks would be lost when it gives way to that of this one."""
    batch = together(make_batches())[:2]
    other = functional.tally(*batch)
    metric = filled(CrossEntropy(), [batch])
    metric.sync(dist_sync_fn=lambda x, group: [x, other.state], distributed_available=lambda: True)
    state = metric.tally.state.clone()
    for add in (lambda: metric.update(*batch), lambda: metric(*batch), lambda: metric.add(other)):
        with pytest.raises(TorchMetricsUserError, match="synced; call unsync"):
            add()
    assert torch.equal(metric.tally.state, state)
    metric.unsync()
    assert metric.tally.totals() == other.totals()


def test_an_empty_batch_is_not_the_look_at_the_first_one() -> None:
    """Probabilities that are read as logits draw their warning with the first batch that has any."""
    metric = CrossEntropy()
    metric.update(torch.zeros(0, K), torch.zeros(0, dtype=torch.int64))
    with pytest.warns(UserWarning, match="look like probabilities"):
        metric.update(torch.randn(3, K).softmax(-1), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("form", ["logits", "log_probs", "probs"])
def test_a_look_at_the_first_batch_costs_no_memory(
    form: str, peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    """64 rows of 100,000 classes are looked at one by one: some 0.4 MB beside the buffer of any update."""
    preds, target = torch.randn(64, 100_000).log_softmax(-1), torch.zeros(64, dtype=torch.int64)
    preds = preds.exp() if form == "probs" else preds
    assert peak_bytes(lambda: CrossEntropy(input=form).update(preds, target)) < 8 * 2**20


def test_a_value_is_not_stored() -> None:
    """What a caller does to a value does not change the next one."""
    report = filled(CrossEntropyReport(), make_batches())
    first = bits(report.compute())
    report.compute()["cross_entropy"].zero_()
    assert bits(report.compute()) == first
