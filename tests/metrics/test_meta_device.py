"""Modules that are made on the meta device, where nothing has values: their metrics are empty when they leave it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from tests.cases import CASES, CLASS_WEIGHT, TOKEN_BYTES, Case, bits, filled
from tests.metrics.conformance import each_state
from xent_metrics import BinaryCrossEntropy, BitsPerByte, CrossEntropy, CrossEntropyReport, GroupedCrossEntropy


class Net(nn.Module):
    """A layer, and a metric beside it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """Make both."""
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.metric = make()


def made_on_meta(make: Callable[[], Any]) -> Net:
    """Make a module without values."""
    with torch.device("meta"):
        return Net(make)


def loaded(net: Net, make: Callable[[], Any]) -> Any:
    """Load a module as one that has no values is loaded, and return its metric."""
    net.load_state_dict(Net(make).state_dict(), assign=True)
    assert not net.layer.weight.is_meta
    return net.metric


MOVES: dict[str, Callable[[Net], Any]] = {
    "to_empty of the module": lambda net: net.to_empty(device="cpu").metric,
    "to_empty": lambda net: net.metric.to_empty(device="cpu"),
    "to": lambda net: net.metric.to("cpu"),
    "cpu": lambda net: net.metric.cpu(),
    "half": lambda net: net.half().metric.to("cpu", torch.float16),
}


@each_state
def test_metrics_that_leave_the_meta_device(case: Case) -> None:
    """They are empty, whether they or their module are moved, and by which method."""
    batches = case.batches(weighed=True)
    expected = bits(case.filled(*batches).compute())
    for name, move in MOVES.items():
        net = made_on_meta(case.metric)
        assert net.metric.tally.state.is_meta
        metric = move(net)
        assert (metric.device.type, metric.tally.state.device.type) == ("cpu", "cpu"), name
        assert not metric.tally.state.any(), name
        assert bits(filled(metric, *batches).compute()) == expected, name
        metric.reset()
        assert not metric.tally.state.any(), name


@each_state
def test_loading_after_the_meta_device(case: Case) -> None:
    """With `load_state_dict(assign=True)`, before the move or after it, a metric that was saved goes on."""
    batches = case.batches()

    def persistent() -> Any:
        metric = case.metric()
        metric.persistent(mode=True)
        return metric

    def saved() -> Any:
        return filled(persistent(), batches[0])

    expected = bits(case.filled(*batches).compute())
    moved = made_on_meta(persistent).to_empty(device="cpu")
    for metric in (loaded(moved, saved), loaded(made_on_meta(persistent), saved)):
        assert metric.device.type == "cpu"
        assert bits(filled(metric, *batches[1:]).compute()) == expected
    # One that was not saved stays where it is until its module is moved.
    net = made_on_meta(case.metric)
    loaded(net, case.metric)
    metric = net.to("cpu").metric
    assert bits(filled(metric, *batches).compute()) == expected


def test_a_collection_leaves_the_meta_device() -> None:
    """Its metrics are empty, and share their states as ever."""
    case = CASES["CrossEntropy"]
    names = ("CrossEntropy", "CrossEntropyReport", "Perplexity")

    def collection() -> MetricCollection:
        return MetricCollection({name: CASES[name].metric() for name in names})

    batches = case.batches()
    for move in (MOVES["to_empty of the module"], MOVES["to_empty"], MOVES["to"]):
        metrics = filled(move(made_on_meta(collection)), *batches)
        assert bits(metrics.compute()) == bits(filled(collection(), *batches).compute())
        assert metrics.compute_groups == {0: [*names]}


def test_what_was_seen_on_the_meta_device_does_not_count() -> None:
    """It has no values: a metric that comes back has seen nothing; a cast on the way changes nothing."""
    batch = CASES["CrossEntropy"].batches()[0]
    metric = CrossEntropy(compute_with_cache=True).to("meta")
    metric(batch["preds"].to("meta"), batch["target"].to("meta"))
    assert nn.Sequential(metric).half()[0].update_count == 1
    metric.to("cpu")
    assert (metric.update_count, metric._forward_cache, int(metric.tally.state.abs().sum())) == (0, None, 0)


def test_a_metric_that_has_values_keeps_them() -> None:
    """`to_empty` of a module that was not made on the meta device empties no metric."""
    batches = CASES["CrossEntropy"].batches()
    net = Net(CrossEntropy)
    filled(net.metric, *batches)
    value = bits(net.metric.compute())
    assert bits(net.to_empty(device="cpu").metric.compute()) == value


def test_a_metric_on_the_meta_device_says_how_to_leave_it() -> None:
    """The fix that the error names is one."""
    batch = CASES["CrossEntropy"].batches()[0]
    metric = made_on_meta(CrossEntropy).metric
    with pytest.raises(ValueError, match=r"device of the metric, meta, got cpu; move the metric with \.to\('cpu'\)"):
        metric.update(**batch)
    metric.to("cpu").update(**batch)


TENSORS: dict[str, Callable[..., Any]] = {
    "class_weight": lambda move: CrossEntropy(class_weight=move(CLASS_WEIGHT)),
    "class_weight of groups": lambda move: GroupedCrossEntropy(2, class_weight=move(CLASS_WEIGHT)),
    "pos_weight": lambda move: BinaryCrossEntropy(pos_weight=move(CLASS_WEIGHT)),
    "token_bytes": lambda move: BitsPerByte(token_bytes=move(TOKEN_BYTES)),
    "token_bytes of a report": lambda move: CrossEntropyReport(token_bytes=move(TOKEN_BYTES)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_weights_and_tables_must_have_values(name: str) -> None:
    """A metric is neither made with a tensor that has none, nor moved to where it would need them."""
    sentence = rf"^`{name.partition(' ')[0]}` must have values, got a tensor of .* on the meta device; make it with "
    for make in (
        lambda: TENSORS[name](lambda x: x.to("meta")),
        lambda: made_on_meta(lambda: TENSORS[name](lambda x: torch.tensor(x.tolist()))),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()
    metric = TENSORS[name](torch.clone).to("meta")
    with pytest.raises(ValueError, match=sentence):
        metric.to_empty(device="cpu")
    assert metric.tally.state.is_meta
