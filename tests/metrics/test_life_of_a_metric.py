"""Copies, states, resets, casts, devices and merges of every class."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from tests.cases import (
    Case,
    bits,
    filled,
)
from tests.instruments import Operators
from tests.metrics.conformance import assert_close, each_case, each_state
from xent_metrics import CrossEntropy, GroupedCrossEntropy

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


def of_two_ranks(other: Any) -> dict[str, Any]:
    """Return torchmetrics' options that make a metric believe that there is a second rank, which holds another one."""
    return {"distributed_available_fn": lambda: True, "dist_sync_fn": lambda x, group: [x, other.tally.state]}


@each_state
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


@each_state
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


@each_state
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


@each_state
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


@each_state
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


@each_state
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


@each_state
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


@each_state
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


@each_state
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


def test_a_batch_whose_sync_failed_was_not_added() -> None:
    """It may be given again."""

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError

    metric = CrossEntropy(dist_sync_on_step=True, dist_sync_fn=fail, distributed_available_fn=lambda: True)
    with pytest.raises(ConnectionError):
        metric(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert (metric.tally.totals().scored, metric.update_count, metric._is_synced) == (0, 0, False)


@each_state
def test_sync_and_unsync(case: Case) -> None:
    """Between `sync` and `unsync` the state is that of both ranks, a batch is refused, and afterwards all goes on."""
    batches = case.batches()
    metric = filled(case.metric(sync_on_compute=False), batches[1])
    ranks = of_two_ranks(case.filled(batches[0]))
    sync = {"dist_sync_fn": ranks["dist_sync_fn"], "distributed_available": lambda: True}
    metric.sync(**sync)
    for add in (lambda: metric(**batches[2]), lambda: metric.merge_state(metric), lambda: metric.add(metric.tally)):
        with pytest.raises(TorchMetricsUserError, match="synced"):
            add()
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


@each_state
@pytest.mark.parametrize("form", ["metric", "dict", "tally"])
def test_merge(case: Case, form: str) -> None:
    """Merging is one more addition: of a metric, of its state, or of a tally, and the cached value is forgotten."""
    batches = case.batches()

    def merge(metric: Any, other: Any) -> None:
        if form == "tally":
            metric.add(other.tally)
        else:
            metric.merge_state(other if form == "metric" else other.metric_state)

    metric, other = filled(case.metric(compute_with_cache=True), batches[0]), case.filled(*batches[1:])
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


@each_state
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
