"""Every class reads what plain floats say, however its data are cut, and its arguments are checked."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

import xent_metrics
from tests.cases import (
    CASES,
    Batch,
    Case,
    K,
    bits,
    filled,
    metric_classes,
    numbers,
    some_rows,
)
from tests.instruments import Operators
from tests.metrics.conformance import assert_close, each_case
from xent_metrics import BinaryCrossEntropy, GroupedCrossEntropy


def test_every_class_has_a_case() -> None:
    """No metric class of the package is missing from the table, or from the package's namespace."""
    tested = {case.metric_class for case in CASES.values()}
    assert metric_classes(xent_metrics) == tested
    assert {x for x in vars(xent_metrics.metrics).values() if inspect.isclass(x) and issubclass(x, Metric)} == tested


@each_case
def test_constants(case: Case) -> None:
    """Lower is better, one update is enough for `forward`, and nothing of that can be set on an instance."""
    metric = case.metric()
    assert (metric.higher_is_better, metric.full_state_update, metric.is_differentiable) == (False, False, False)
    for name in ("higher_is_better", "full_state_update", "is_differentiable", "plot_lower_bound"):
        with pytest.raises(RuntimeError, match=f"Can't change const `{name}`"):
            setattr(metric, name, True)
    assert list(metric.parameters()) == list(metric.buffers()) == []


@each_case
def test_options_are_checked(case: Case) -> None:
    """Options are keyword-only, and one that is unknown, or not one of those named, is refused."""
    required = [case.options[name] for name in ("num_groups", "num_classes") if name in case.options]
    with pytest.raises(TypeError):
        case.metric_class(*required, "logits")
    known = inspect.signature(case.metric_class).parameters
    unknown = {"label_smooth", "label_smoothing", "token_byte", "confidences"} - set(known)
    for name in unknown:
        with pytest.raises(
            ValueError, match=f"(Unexpected keyword arguments: `{name}`|`{name}` must not be passed to )"
        ):
            case.metric(**{name: 0.1})
    with pytest.raises(ValueError, match="`nan_policy` must be one of"):
        case.metric(nan_policy="drop")
    with pytest.raises(ValueError, match="`input` must be one of"):
        case.metric_class(**{**case.options, "input": "logit"})


@each_case
@pytest.mark.parametrize("weighed", [False, True])
def test_values(case: Case, weighed: bool, operators: Operators) -> None:
    """`forward` reads its batch, `compute` all batches, as plain floats would, with one pass over the logits."""
    batches = case.batches(weighed=weighed)
    metric = case.metric()
    for i, batch in enumerate(batches):
        operators.counts.clear()
        with operators:
            value = metric(**batch)
        assert operators.count("amax") == case.passes
        assert_close(value, case.expected(batch))
        assert_close(value, case.filled(batch).compute(), rel=1e-14)
        assert metric.update_count == i + 1
        assert bits(metric.compute()) == bits(case.filled(*batches[: i + 1]).compute())
        assert_close(metric.compute(), case.expected(*batches[: i + 1]))
    metric(**batches[0])
    assert bits(metric.compute()) == bits(case.filled(*batches, batches[0]).compute())


@each_case
def test_arguments_by_position(case: Case) -> None:
    """By position there are predictions and targets, the same for all metrics, and all else goes by its name."""
    batch = case.batches(weighed=True)[1]
    positional = [batch[name] for name in case.quantity.positional]
    others = {name: x for name, x in batch.items() if name not in case.quantity.positional}
    metric = case.metric()
    metric.update(*positional, **others)
    assert_close(metric(*positional, **others), case.expected(batch))
    assert bits(metric.compute()) == bits(case.filled(batch, batch).compute())


@each_case
def test_value_is_float64(case: Case) -> None:
    """Readings are float64 and counts int64; a vector has a number for each group."""
    batches = case.batches()
    for value in (case.metric()(**batches[1]), case.filled(*batches).compute()):
        if case.metric_class is GroupedCrossEntropy:
            assert value.shape == (() if "average" in case.options else (case.options["num_groups"],))
        for name, x in (value if isinstance(value, dict) else {"": value}).items():
            assert x.dtype == (torch.int64 if name.startswith("num_") else torch.float64)
            assert case.metric_class is GroupedCrossEntropy or x.shape == ()


@each_case
def test_weight_broadcasts(case: Case) -> None:
    """A weight, or a mask, is broadcast to the targets, with and without a shift."""
    known = inspect.signature(case.metric_class).parameters
    batch = case.batches()[2]
    labels = (7, 3, K) if case.metric_class is BinaryCrossEntropy else (7, 3)
    shifts = (False, True) if "shift" in known and case.options.get("input") != "losses" else (False,)
    for shape, shift in itertools.product(((), (7, 1), (3,), (1, 3), (7, 3)), shifts):
        shifted = case._replace(options={**case.options, "shift": True} if shift else case.options)
        columns = [1] * (len(labels) - 2) if shape else []
        random = torch.rand((*shape, *columns))
        for weight in (random + 0.1, random < 0.7):
            value = shifted.filled({**batch, "weight": weight}).compute()
            assert_close(value, shifted.expected({**batch, "weight": weight.double().expand(labels)}))


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs(case: Case, dtype: torch.dtype) -> None:
    """Half precision is widened before anything is computed: the value is that of the same numbers, to float32."""
    halves = [
        {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in batch.items()}
        for batch in case.batches(weighed=True)
    ]
    assert_close(case.filled(*halves).compute(), case.expected(*halves), rel=1e-5)
    assert_close(case.metric()(**halves[2]), case.expected(halves[2]), rel=1e-5)


def nothings(batch: Batch, ignore_index: int) -> Iterator[Batch]:
    """Make batches without a scored target: an empty one, masked ones, and one of ignored targets."""
    if "num_bytes" in batch:
        batch = {**batch, "num_bytes": 0}  # Bytes that are given count, whatever is scored.
    yield some_rows(batch, slice(0, 0))
    scores = {name: torch.full_like(x, math.nan) for name, x in batch.items() if name.startswith("preds")}
    batch = {**batch, **scores}  # Whatever is not scored is not looked at.
    for mask in (torch.tensor(False), torch.zeros(1)):
        yield {**batch, "weight": mask}
    if not batch["target"].is_floating_point():
        yield {**batch, "target": torch.full_like(batch["target"], ignore_index)}


@each_case
def test_no_targets_read_nan(case: Case) -> None:
    """Without targets the value is NaN, with torchmetrics' warning before any update, and nothing is poisoned."""
    options = {"ignore_index": -100, **case.options}
    case = case._replace(options=options, data={**case.data, "ignored": options["ignore_index"]})
    batches = case.batches()
    metric = case.metric()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        readings = [metric.compute()]
    for batch in nothings(batches[1], options["ignore_index"]):
        metric.update(**batch)
        readings += [metric.compute(), metric(**batch)]
    for reading in readings:
        values = numbers(reading)
        assert {x for name, x in values.items() if name in ("num_tokens", "num_nonfinite")} <= {0}
        assert all(math.isnan(x) for name, x in values.items() if not name.startswith("num_"))
    value, expected = (numbers(x) for x in (filled(metric, *batches).compute(), case.filled(*batches).compute()))
    for name in expected:
        assert name == "num_ignored" or value[name] == pytest.approx(expected[name], rel=0, nan_ok=True)


@each_case
def test_no_graph_is_kept(case: Case) -> None:
    """Scores that require a gradient leave neither graph nor gradient behind."""
    batch = {
        name: x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in case.batches(weighed=True)[2].items()
    }
    metric = case.filled(batch)
    for value in (metric(**batch), metric.compute()):
        values = value.values() if isinstance(value, dict) else [value]
        assert not any(x.requires_grad for x in (metric.tally.state, *values))
