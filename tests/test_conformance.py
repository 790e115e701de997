"""What torchmetrics, its wrappers and Lightning do with a metric, done to every class and judged by plain floats."""

from __future__ import annotations

import inspect
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import matplotlib as mpl
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MetricTracker, MinMaxMetric, Running

import xent_metrics
from tests.cases import (
    CASES,
    SCALAR,
    Batch,
    Case,
    K,
    bits,
    filled,
    metric_classes,
    numbers,
    some_rows,
    together,
)
from tests.conftest import Operators
from xent_metrics import BinaryCrossEntropy, CrossEntropy, GroupedCrossEntropy, Perplexity

mpl.use("Agg")

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "clone": Metric.clone,
    "pickle": lambda metric: pickle.loads(pickle.dumps(metric)),
}

CASTS: dict[str, Callable[[Any], Any]] = {
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to device": lambda m: m.to("cpu", torch.float16),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float16),
    "set_dtype": lambda m: m.set_dtype(torch.float16),
    "module to": lambda m: nn.Sequential(m).to(torch.bfloat16),
    "module half": lambda m: nn.Sequential(m).half(),
    "module type": lambda m: nn.Sequential(m).type(torch.bfloat16),
}

# A number for a whole batch cannot be resampled.
RESAMPLED = {name: case for name, case in SCALAR.items() if case.data.get("extra") != "number"}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_scalar_case = pytest.mark.parametrize("case", SCALAR.values(), ids=SCALAR)


def assert_close(value: Any, expected: Any, rel: float = 1e-12) -> None:
    """Compare every number; what is expanded in floating point, or exponentiated from it, has fewer digits."""
    value, expected = numbers(value), numbers(expected)
    assert list(value) == list(expected)
    for name, number in value.items():
        interval = name.endswith(("stderr", "lower", "upper"))
        tolerance = {"rel": max(rel, 1e-6), "abs": 1e-7} if interval else {"rel": rel, "abs": rel}
        assert number == pytest.approx(expected[name], nan_ok=True, **tolerance), name


def of_two_ranks(other: Any) -> dict[str, Any]:
    """Return torchmetrics' options that make a metric believe that there is a second rank, which holds another one."""
    return {"distributed_available_fn": lambda: True, "dist_sync_fn": lambda x, group: [x, other.tally.state]}


# The table, and constants.


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
        with pytest.raises(ValueError, match=f"Unexpected keyword arguments: `{name}`"):
            case.metric(**{name: 0.1})
    with pytest.raises(ValueError, match="`nan_policy` must be one of"):
        case.metric(nan_policy="drop")
    with pytest.raises(ValueError, match="`input` must be one of"):
        case.metric_class(**{**case.options, "input": "logit"})


# Values.


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
        assert operators.count("log_softmax") == case.passes
        assert_close(value, case.expected(batch))
        assert_close(value, case.filled(batch).compute(), rel=1e-14)
        assert metric.update_count == i + 1
        assert bits(metric.compute()) == bits(case.filled(*batches[: i + 1]).compute())
        assert_close(metric.compute(), case.expected(*batches[: i + 1]))
    metric(**batches[0])
    assert bits(metric.compute()) == bits(case.filled(*batches, batches[0]).compute())


@each_case
def test_arguments_by_position(case: Case) -> None:
    """Arguments have the order of the signature, in `update` as in `forward`."""
    batch = case.batches(weighed=True)[1]
    positional = [batch.get(name) for name in inspect.signature(case.metric().update).parameters]
    metric = case.metric()
    metric.update(*positional)
    assert_close(metric(*positional), case.expected(batch))
    assert bits(metric.compute()) == bits(case.filled(batch, batch).compute())


@each_case
def test_value_is_float64(case: Case) -> None:
    """Readings are float64 and counts int64; a vector has a number for each group."""
    batches = case.batches()
    for value in (case.metric()(**batches[1]), case.filled(*batches).compute()):
        if case.metric_class is GroupedCrossEntropy:
            assert value.shape == (case.options["num_groups"],)
        for name, x in (value if isinstance(value, dict) else {"": value}).items():
            assert x.dtype == (torch.int64 if name.startswith("num_") else torch.float64)
            assert case.metric_class is GroupedCrossEntropy or x.shape == ()


@each_case
@pytest.mark.parametrize("weighed", [False, True])
def test_same_bits_for_any_batching(case: Case, weighed: bool) -> None:
    """Batch size, order and gradient accumulation do not change one bit of any reading."""
    batches = case.batches(weighed=weighed)
    expected, data = bits(case.filled(*batches).compute()), together(batches)
    assert bits(case.filled(data).compute()) == expected
    assert bits(case.filled(*batches[::-1]).compute()) == expected
    rows = [some_rows(data, slice(i, i + 1)) for i in range(12)]
    assert bits(case.filled(*rows).compute()) == expected


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


# Life of a metric.


@each_case
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies(case: Case, copy: Callable[[Any], Any]) -> None:
    """A copy, of a new metric or of one that has been updated, has the same value and a life of its own."""
    batches = case.batches()
    expected = bits(case.filled(*batches).compute())
    assert bits(filled(copy(case.metric()), *batches).compute()) == expected
    metric = case.filled(batches[0])
    before = bits(metric.compute())
    other = copy(metric)
    assert type(other) is type(metric)
    assert bits(other.compute()) == before
    assert other.update_count == metric.update_count
    assert bits(filled(other, *batches[1:]).compute()) == expected
    assert bits(metric.compute()) == before
    metric.reset()
    assert metric.update_count == 0
    assert int(other.tally.state.abs().sum()) > 0
    assert bits(other.compute()) == expected


@each_case
def test_hash(case: Case) -> None:
    """Two metrics differ, and one differs from what it was before each update, `forward` and reset."""
    batches = case.batches()
    metric, other = case.metric(), case.metric()
    hashes = [hash(other), hash(metric)]
    kept = [metric.tally.state]  # So that no state takes the place of one that is gone.
    for step in (
        lambda: metric.update(**batches[0]),
        lambda: metric(**batches[1]),
        lambda: metric.merge_state(other),
        metric.reset,
    ):
        step()
        hashes.append(hash(metric))
        assert hash(metric) == hashes[-1]
        kept.append(metric.tally.state)
    assert len(set(hashes)) == len(hashes)
    assert metric in {metric}


@each_case
def test_state_dict(case: Case) -> None:
    """A persistent metric saves its state, and one that loads it goes on to the same bits; others save nothing."""
    batches = case.batches()
    metric = case.filled(*batches[:2])
    assert metric.state_dict() == {}
    metric.persistent(mode=True)
    saved = deepcopy(metric.state_dict())
    assert len(saved) == 1
    metric.update(**batches[2])
    other = case.metric()
    other.persistent(mode=True)
    other.load_state_dict(saved)
    other.update(**batches[2])
    assert bits(other.compute()) == bits(metric.compute())
    modules = [nn.Sequential(case.metric()) for _ in range(2)]
    for module in modules:
        module[0].persistent(mode=True)
    modules[0][0].update(**batches[0])
    modules[1].load_state_dict(modules[0].state_dict())
    assert torch.equal(modules[1][0].tally.state, modules[0][0].tally.state)


@each_case
def test_reset(case: Case) -> None:
    """After a reset there is nothing left, and what holds the old state keeps it."""
    batches = case.batches()
    metric = case.filled(*batches)
    metric.compute()
    state, content = metric.tally.state, metric.tally.state.clone()
    metric(**batches[0])
    assert metric.tally.state is not state
    metric.reset()
    assert torch.equal(state, content)
    assert int(metric.tally.state.abs().sum()) == metric.update_count == 0
    assert bits(filled(metric, batches[0]).compute()) == bits(case.filled(batches[0]).compute())
    metric.reset()
    assert bits(filled(metric, *batches).compute()) == bits(case.filled(*batches).compute())


@each_case
def test_inference_mode(case: Case) -> None:
    """A metric may be made, reset, updated and read inside inference mode or outside, in any order."""
    batches = case.batches()
    expected = bits(case.filled(*batches, batches[0], batches[0]).compute())
    for inside in ("make", "reset", "update", "forward", "compute", "all"):
        with torch.inference_mode(inside in ("make", "all")):
            metric = case.metric()
        for name, call, args in (
            ("reset", metric.reset, {}),
            ("update", metric.update, batches[0]),
            ("forward", metric, batches[1]),
            ("update", metric.update, batches[2]),
            ("compute", metric.compute, {}),
        ):
            with torch.inference_mode(inside in (name, "all")):
                call(**args)
        metric.update(**batches[0])
        metric.merge_state(case.filled(batches[0]))
        assert bits(metric.compute()) == bits(deepcopy(metric).compute()) == expected, inside


@each_case
def test_casts_change_nothing(case: Case) -> None:
    """Casting a metric, or the module that holds it, casts neither state, defaults, tensors of options nor values."""
    batches = case.batches()
    expected = bits(case.filled(*batches).compute())
    for name, cast in CASTS.items():
        metric = filled(case.metric(compute_with_cache=name != "half"), *batches)
        value, state = metric.compute(), metric.tally.state.clone()
        cast(metric)
        assert metric.tally.state.dtype == torch.int64, name
        assert torch.equal(metric.tally.state, state), name
        assert bits(metric.compute()) == bits(deepcopy(metric).compute()) == expected, name
        assert [x.dtype for x in _tensors(metric.compute())] == [x.dtype for x in _tensors(value)], name
        for option, tensor in case.options.items():
            if isinstance(tensor, Tensor):
                assert torch.equal(getattr(metric, option), tensor), name
                assert getattr(metric, option).dtype == tensor.dtype, name
        metric.reset()
        assert bits(filled(metric, *batches).compute()) == expected, name


def _tensors(value: Any) -> list[Tensor]:
    return [*value.values()] if isinstance(value, dict) else [value]


@each_case
def test_moves_to_a_device(case: Case, operators: Operators) -> None:
    """State, defaults and tensors of options move together, and batches, values of batches and resets stay there."""
    batches = [
        {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in batch.items()}
        for batch in case.batches(weighed=True)
    ]
    metric = case.filled(case.batches()[0]).to("meta")
    assert metric.device.type == metric.tally.state.device.type == "meta"
    assert all(getattr(metric, n).device.type == "meta" for n, x in case.options.items() if isinstance(x, Tensor))
    with operators:
        metric.update(**batches[0])
        value = metric(**batches[1])
    assert {x.device.type for x in (metric.tally.state, *_tensors(value))} == {"meta"}
    assert operators.count("_local_scalar_dense") == 0
    metric.reset()
    assert metric.tally.state.device.type == "meta"


@each_case
def test_compute_on_cpu(case: Case) -> None:
    """torchmetrics' `compute_on_cpu` and `compute_with_cache=False` change no value."""
    batches = case.batches()
    metric = filled(case.metric(compute_on_cpu=True, compute_with_cache=False), *batches)
    assert bits(metric.compute()) == bits(metric.compute()) == bits(case.filled(*batches).compute())


@each_case
def test_errors_leave_no_trace(case: Case) -> None:
    """A batch that does not fit raises from `update` and from `forward` and counts for nothing."""
    batches = case.batches()
    metric = case.filled(batches[0])
    state, count, value = metric.tally.state.clone(), metric.update_count, metric.compute()
    for call in (metric.update, metric):
        for bad in (
            {**batches[1], "target": batches[1]["target"][:, :-1]},
            {**batches[1], "weight": torch.full((1,), -1.0)},
            {**batches[1], "target": batches[1]["target"].masked_fill(torch.tensor(True), 77)},
        ):
            if "losses" in case.options.values() and 77 in bad["target"]:
                continue
            with pytest.raises(ValueError, match=r"^`(target|preds|weight|group)`"):
                call(**bad)
            assert torch.equal(metric.tally.state, state)
            assert metric.update_count == count
    assert bits(metric.compute()) == bits(value)
    assert bits(filled(metric, *batches[1:]).compute()) == bits(case.filled(*batches).compute())


# Ranks and merging.


@each_case
def test_sync_options(case: Case) -> None:
    """`dist_sync_on_step` syncs the value of a batch, `sync_on_compute=False` reads one rank; neither stays synced."""
    elsewhere, *batches = case.batches()
    ranks = of_two_ranks(case.filled(elsewhere))
    for on_step, on_compute in itertools.product((False, True), repeat=2):
        metric = case.metric(dist_sync_on_step=on_step, sync_on_compute=on_compute, **ranks)
        for i, batch in enumerate(batches, 1):
            value = metric(**batch)
            assert_close(value, case.expected(*[elsewhere] * on_step, batch))
            own = case.filled(*batches[:i]).tally.state
            assert torch.equal(metric.tally.state, own)
            pooled = case.filled(*[elsewhere] * on_compute, *batches[:i])
            assert bits(metric.compute()) == bits(pooled.compute())
            assert torch.equal(metric.tally.state, own)


@each_case
def test_sync_and_unsync(case: Case) -> None:
    """Between `sync` and `unsync` the state is that of both ranks, a batch is refused, and afterwards all goes on."""
    batches = case.batches()
    metric = filled(case.metric(sync_on_compute=False), batches[1])
    ranks = of_two_ranks(case.filled(batches[0]))
    sync = {"dist_sync_fn": ranks["dist_sync_fn"], "distributed_available": lambda: True}
    metric.sync(**sync)
    with pytest.raises(TorchMetricsUserError, match="synced"):
        metric(**batches[2])
    both = case.metric()
    both.add(metric.tally)
    assert bits(both.compute()) == bits(case.filled(*batches[:2]).compute())
    with pytest.raises(TorchMetricsUserError, match="already been synced"):
        metric.sync(**sync)
    metric.unsync()
    assert torch.equal(metric.tally.state, case.filled(batches[1]).tally.state)
    with pytest.raises(TorchMetricsUserError, match="un-synced"):
        metric.unsync()
    metric(**batches[2])
    assert metric.update_count == 2
    assert bits(metric.compute()) == bits(case.filled(*batches[1:]).compute())
    with metric.sync_context(**sync):
        merged = case.metric()
        merged.merge_state(metric.metric_state)
    assert bits(merged.compute()) == bits(case.filled(*batches).compute())


@each_case
@pytest.mark.parametrize("form", ["metric", "dict", "tally"])
def test_merge(case: Case, form: str) -> None:
    """Merging is one more addition: of a metric, of its state, or of a tally, and the cached value is forgotten."""
    batches = case.batches()

    def merge(metric: Any, other: Any) -> None:
        if form == "tally":
            metric.add(other.tally)
        else:
            metric.merge_state(other if form == "metric" else other.metric_state)

    metric, other = case.filled(batches[0]), case.filled(*batches[1:])
    before, incoming = metric.compute(), other.tally.state.clone()
    merge(metric, other)
    assert metric.update_count == (3 if form == "metric" else 2)
    assert bits(metric.compute()) == bits(case.filled(*batches).compute()) != bits(before)
    assert torch.equal(metric.tally.state, case.filled(*batches).tally.state)
    assert torch.equal(other.tally.state, incoming)
    merge(metric, case.metric())
    assert bits(metric.compute()) == bits(case.filled(*batches).compute())
    assert bits(filled(metric, *batches).compute()) == bits(case.filled(*batches, *batches).compute())
    fresh = case.metric()
    merge(fresh, other)
    assert bits(fresh.compute()) == bits(other.compute())
    assert torch.equal(fresh.tally.state, other.tally.state)


@each_case
def test_merge_of_a_stranger_is_refused(case: Case) -> None:
    """What comes from a metric configured otherwise, from another class or from nowhere is refused without a trace."""
    batches = case.batches()
    metric = case.filled(*batches)
    state, count = metric.tally.state.clone(), metric.update_count
    other = case.metric_class(**{**case.options, "ignore_index": 5})
    grouped = GroupedCrossEntropy(19) if case.metric_class is not GroupedCrossEntropy else CrossEntropy()
    for stranger in (other, other.metric_state, grouped, {}, "state"):
        with pytest.raises((TypeError, ValueError), match=r"incoming.state"):
            metric.merge_state(stranger)
    with pytest.raises(ValueError, match="`batch` must be a tally of the shape"):
        metric.add(grouped.tally)
    assert torch.equal(metric.tally.state, state)
    assert metric.update_count == count


# Wrappers, arithmetic and plots.


@each_case
@pytest.mark.parametrize("call", ["update", "forward"])
def test_running(case: Case, call: str) -> None:
    """A window holds the pooled value of its last batches."""
    batches = case.batches() * 2
    running = Running(case.metric(), window=2)
    for before, batch in zip([None, *batches], batches, strict=False):
        getattr(running, call)(**batch)
        window = [x for x in (before, batch) if x is not None]
        assert bits(running.compute()) == bits(case.filled(*window).compute())
    running.reset()
    running.update(**batches[0])
    assert bits(running.compute()) == bits(case.filled(batches[0]).compute())


@each_case
def test_tracker(case: Case) -> None:
    """A tracker keeps every step, and its best is the lowest."""
    batches = case.batches()[:2]
    steps = [case.filled(batch).compute() for batch in batches]
    scalar = case in SCALAR.values()
    tracker = MetricTracker(case.metric()) if scalar else MetricTracker(case.metric(), maximize=False)
    for batch in batches:
        tracker.increment()
        tracker.update(**batch)
    every = tracker.compute_all()
    if isinstance(steps[0], dict):
        assert {name: bits(x) for name, x in every.items()} == {
            name: [float(step[name]).hex() for step in steps] for name in steps[0]
        }
    else:
        assert bits(every) == bits(torch.stack(steps))
    assert tracker.n_steps == 2
    if scalar:
        assert tracker.maximize is False
        best, index = tracker.best_metric(return_step=True)
        values = [step.item() for step in steps]
        assert (best, index) == (min(values), values.index(min(values)))


def test_one_group_is_a_vector() -> None:
    """The value of one group has the shape (1,), from `compute` as from `forward`."""
    metric = GroupedCrossEntropy(num_groups=1)
    batch = {**CASES["CrossEntropy"].batches()[1], "group": torch.zeros(4, 1, dtype=torch.int64)}
    assert metric(**batch).shape == (1,)
    assert metric.compute().shape == (1,)


@each_scalar_case
def test_min_max(case: Case) -> None:
    """Extremes are those of the values computed, from `update` as from `forward`."""
    batches = case.batches()
    extremes, seen = MinMaxMetric(case.metric()), []
    for i, batch in enumerate(batches):
        extremes.update(**batch)
        value = extremes.compute()
        seen.append(case.filled(*batches[: i + 1]).compute().item())
        assert {name: x.item() for name, x in value.items()} == {"raw": seen[-1], "max": max(seen), "min": min(seen)}
    extremes.reset()
    assert_close(extremes(**batches[2])["raw"], case.expected(batches[2]))


@pytest.mark.parametrize("case", RESAMPLED.values(), ids=RESAMPLED)
@pytest.mark.parametrize("call", ["update", "forward"])
def test_bootstrap(case: Case, call: str) -> None:
    """Bootstraps hold resampled sequences: of one sequence, the same again; of several, their mean and spread."""
    batches = case.batches()
    bootstrap = BootStrapper(case.metric(), num_bootstraps=3, raw=True, sampling_strategy="multinomial")
    getattr(bootstrap, call)(**batches[0])
    assert bits(bootstrap.compute()["raw"]) == bits(case.filled(batches[0]).compute().expand(3))
    getattr(bootstrap, call)(**batches[2])
    value = bootstrap.compute()
    each = torch.stack([metric.compute() for metric in bootstrap.metrics])
    assert bits(value["raw"]) == bits(each)
    assert len(set(each.tolist())) == 3
    assert value["mean"].item() == pytest.approx(each.mean().item())
    assert value["std"].item() == pytest.approx(each.std().item())
    losses = case.filled(batches[0], *(some_rows(batches[2], slice(i, i + 1)) for i in range(7))).compute()
    assert bits(losses) == bits(case.filled(batches[0], batches[2]).compute())


@pytest.mark.parametrize("num_groups", [2, 4])
def test_classwise(num_groups: int) -> None:
    """Groups may be given names."""
    case = CASES["GroupedCrossEntropy"]
    case = case._replace(options={"num_groups": num_groups})
    batches = [{**batch, "group": batch["group"] % num_groups} for batch in case.batches()]
    labels = [f"part {i}" for i in range(num_groups)]
    wrapper = ClasswiseWrapper(case.metric(), labels=labels, prefix="loss of ")
    value = wrapper(**batches[0])
    filled(wrapper, *batches[1:])
    assert list(value) == list(wrapper.compute()) == [f"loss of {label}" for label in labels]
    assert_close([*value.values()], case.expected(batches[0]))
    assert bits(next(iter(wrapper.compute().values()))) == bits(case.filled(*batches).compute()[0])
    assert_close([*wrapper.compute().values()], case.expected(*batches))


@each_scalar_case
def test_arithmetic(case: Case) -> None:
    """Metrics can be added, scaled and compared, with numbers and with each other, before they are updated."""
    batches = case.batches()
    value = case.filled(*batches).compute()
    two = torch.tensor(2.0, dtype=torch.float64)
    for make, expected in (
        (lambda a, b: a + b, 2 * value),
        (lambda a, b: a - b, 0 * value),
        (lambda a, b: a / b, value / value),
        (lambda a, b: a * 2.0 - 1, 2 * value - 1),
        (lambda a, b: two**a, 2**value),
        (lambda a, b: abs(-a), value.abs()),
        (lambda a, b: a < b, torch.tensor(False)),
    ):
        composed = make(case.metric(), case.metric())
        filled(composed, *batches)
        assert composed.compute().item() == pytest.approx(expected.item(), rel=1e-15)
        composed.reset()
        composed(**batches[0])
        filled(composed, *batches[1:])
        assert composed.compute().item() == pytest.approx(expected.item(), rel=1e-15)


def test_perplexity_is_two_to_the_power_of_bits() -> None:
    """Arithmetic on metrics gives metrics: 2 to the power of one is the other."""
    batches = CASES["Perplexity"].batches()
    composed = torch.tensor(2.0, dtype=torch.float64) ** CrossEntropy(unit="bits")
    value = filled(composed, *batches).compute()
    assert value.item() == pytest.approx(filled(Perplexity(), *batches).compute().item(), rel=1e-14)


@each_case
def test_plot(case: Case) -> None:
    """Every class plots its present value, one value, and a list of values, on given axes too."""
    metric = case.metric()
    history = [metric(**batch) for batch in case.batches()]
    for value in (None, history[0], history):
        figure, _ = metric.plot(value)
        assert figure is not None
        mpl.pyplot.close(figure)
    figure, axes = mpl.pyplot.subplots()
    metric.plot(ax=axes)
    assert axes.has_data()
    mpl.pyplot.close(figure)


# Lightning.


class Logging(LightningModule):
    """Logs every scalar case by `self.log`, as metric objects."""

    def __init__(self, on_step: bool) -> None:
        """Hold a metric for each case and stage."""
        super().__init__()
        self.on_step = on_step
        self.metrics = nn.ModuleDict(
            {f"{stage} {name}": case.metric() for name, case in SCALAR.items() for stage in ("train", "val")}
        )
        self.batches = {name: case.batches() for name, case in SCALAR.items()}
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, index: Tensor, _: int) -> Tensor:
        """Call every metric."""
        for name, batches in self.batches.items():
            metric = self.metrics[f"train {name}"]
            metric(**batches[index])
            self.log(f"train {name}", metric, on_step=self.on_step, on_epoch=True)
        return self.weight.sum()

    def validation_step(self, index: Tensor, _: int) -> None:
        """Update every metric."""
        for name, batches in self.batches.items():
            metric = self.metrics[f"val {name}"]
            metric.update(**batches[index])
            self.log(f"val {name}", metric)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train the one weight."""
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("on_step", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_lightning_logs_metrics(precision: Any, on_step: bool) -> None:
    """`self.log` of a metric logs the value of the epoch, pooled, to the last bit and in any precision, and resets."""
    trainer = Trainer(
        fast_dev_run=3,
        accelerator="cpu",
        logger=False,
        precision=precision,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Logging(on_step)
    loader = torch.utils.data.DataLoader(range(3), batch_size=None)
    trainer.fit(module, loader, loader)
    logged = trainer.callback_metrics
    for name, case in SCALAR.items():
        expected = case.filled(*module.batches[name]).compute()
        assert bits(logged[f"val {name}"]) == bits(expected)
        assert bits(logged[f"train {name}_epoch" if on_step else f"train {name}"]) == bits(expected)
        if on_step:
            assert_close(logged[f"train {name}_step"], case.expected(module.batches[name][2]))
        assert module.metrics[f"train {name}"].update_count == 0
