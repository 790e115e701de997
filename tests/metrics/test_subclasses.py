"""Classes that override what torchmetrics lets a subclass override, or add states, and objects that are patched."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from tests.cases import CASES, Case, bits, filled, numbers
from tests.metrics.conformance import assert_close
from xent_metrics import CrossEntropy, GroupedCrossEntropy, Perplexity, compute_together

LOGITS, LABELS = torch.randn(3, 4, 5, 6), torch.randint(0, 6, (3, 4, 5))
BATCHES = [*zip(LOGITS, LABELS, strict=True)]


def shifted(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Let each position score the next target."""
    return preds[:, :-1], target[:, 1:]


def judge(*batches: tuple[Tensor, Tensor]) -> float:
    """Return the cross-entropy of shifted batches, by PyTorch."""
    pairs = [shifted(*batch) for batch in batches]
    preds, target = (torch.cat([pair[i].flatten(0, 1) for pair in pairs]) for i in (0, 1))
    return torch.nn.functional.cross_entropy(preds.double(), target).item()


class Shifted(CrossEntropy):
    """Overrides `update`."""

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Shift."""
        super().update(*shifted(preds, target))


class Unpacked(CrossEntropy):
    """Overrides `update` with another signature."""

    def update(self, batch: dict[str, Tensor]) -> None:  # type: ignore[override]
        """Take a dict, in two parts, and shift."""
        preds, target = shifted(batch["logits"], batch["labels"])
        super().update(preds[:1], target[:1])
        super().update(preds[1:], target[1:])


class ByPosition(CrossEntropy):
    """Overrides `update` with more arguments by position."""

    def update(self, name: str, preds: Tensor, target: Tensor, *rest: Any) -> None:  # type: ignore[override]
        """Shift."""
        del name, rest
        super().update(*shifted(preds, target))


class Mixin:
    """Overrides `update` beside the metric."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Shift."""
        super().update(*shifted(preds, target))  # type: ignore[misc]


class Mixed(Mixin, CrossEntropy):
    """Overrides nothing itself."""


class Inner(CrossEntropy):
    """Overrides a part of `update` that is not public."""

    def _add_batch(self, preds: Tensor, target: Tensor, **rest: Any) -> None:
        super()._add_batch(*shifted(preds, target), **rest)


def patched(replace: Callable[[Any], Callable[..., None]]) -> Any:
    """Return a metric whose `update` was replaced."""
    metric = CrossEntropy()
    metric.update = replace(metric)
    return metric


def around(metric: Any) -> Callable[..., None]:
    """Return a function around `update`."""
    own = metric.update
    return lambda preds, target: own(*shifted(preds, target))


def unbound(metric: CrossEntropy, preds: Tensor, target: Tensor) -> None:
    """Update a metric by the function of its class."""
    CrossEntropy.update(metric, *shifted(preds, target))


# Each makes the same update, given other arguments.
OVERRIDDEN: dict[str, tuple[Callable[[], Any], Callable[[Tensor, Tensor], tuple[Any, ...]]]] = {
    "update": (Shifted, lambda x, y: (x, y)),
    "signature": (Unpacked, lambda x, y: ({"logits": x, "labels": y},)),
    "more by position": (ByPosition, lambda x, y: ("name", x, y, 0)),
    "mixin": (Mixed, lambda x, y: (x, y)),
    "a part": (Inner, lambda x, y: (x, y)),
    "patched": (lambda: patched(around), lambda x, y: (x, y)),
    "method": (lambda: patched(lambda metric: MethodType(unbound, metric)), lambda x, y: (x, y)),
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_update(name: str, hidden: bool, hide_values: Callable[[], None]) -> None:
    """`forward` scores and keeps what `update` would keep, and counts it once; also where values are hidden."""
    if hidden:
        hide_values()
    make, arguments = OVERRIDDEN[name]
    by_update, by_forward = make(), make()
    for i, batch in enumerate(BATCHES, 1):
        by_update.update(*arguments(*batch))
        assert by_forward(*arguments(*batch)).item() == pytest.approx(judge(batch), rel=1e-6)
        assert torch.equal(by_update.tally.state, by_forward.tally.state)
        assert by_update.update_count == by_forward.update_count == i
        assert by_forward.compute().item() == pytest.approx(judge(*BATCHES[:i]), rel=1e-6)


def test_overridden_update_waits_for_nothing() -> None:
    """`forward` of a subclass that has the library's `compute` reads its value on the device."""
    metric = Shifted().to("meta")
    assert metric(*(x.to("meta") for x in BATCHES[0])).is_meta
    assert metric.update_count == 1


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_update_that_raises(name: str) -> None:
    """A batch that raises in `update` or in `forward`, be it in its second half, leaves nothing."""
    make, arguments = OVERRIDDEN[name]
    metric = make()
    metric(*arguments(*BATCHES[0]))
    state = metric.tally.state
    bad = BATCHES[1][0], BATCHES[1][1].clone()
    bad[1][-1, -1] = 99
    for call in (metric.update, metric):
        with pytest.raises(ValueError, match="`target` must hold class indices"):
            call(*arguments(*bad))
        assert torch.equal(metric.tally.state, state)
        assert metric.update_count == 1
    metric(*arguments(*BATCHES[1]))
    assert metric.compute().item() == pytest.approx(judge(*BATCHES[:2]), rel=1e-6)


def test_overridden_updates_share_no_state() -> None:
    """A collection and `merge_state` keep what is tallied in another way apart, be it equal after the first batch."""
    uniform = torch.zeros(4, 5, 6), torch.cat([torch.full((4, 1), -100), LABELS[0][:, 1:]], 1)
    collection = MetricCollection({"own": CrossEntropy(), "shifted": Shifted(), "inner": Inner(), "alike": Shifted()})
    for batch in (uniform, BATCHES[1]):
        collection.update(*batch)
    assert torch.equal(CrossEntropy().tally.state, Shifted().tally.state)
    assert sorted(map(len, collection.compute_groups.values())) == [1, 1, 2]
    own = CrossEntropy()
    own.update(*BATCHES[1])
    own.update(*uniform)
    assert bits(collection["own"].compute()) == bits(own.compute())
    assert collection["shifted"].compute().item() == pytest.approx(judge(uniform, BATCHES[1]), rel=1e-6)
    assert bits(collection["shifted"].compute()) == bits(collection["alike"].compute())
    for a, b in ((Shifted(), CrossEntropy()), (CrossEntropy(), Shifted()), (Shifted(), Inner())):
        with pytest.raises(ValueError, match="`incoming_state` must come from a metric with the same options"):
            a.merge_state(b)


class Percent(CrossEntropy):
    """Overrides `compute`."""

    def compute(self) -> Tensor:
        """Read percents."""
        return 100 * super().compute()


class Reads(GroupedCrossEntropy):
    """Overrides `read`."""

    def read(self, tally: Any) -> Any:
        """Read percents."""
        return 100 * super().read(tally)


def with_patched_compute() -> Any:
    """Return a metric whose `compute` was replaced."""
    metric = CrossEntropy()
    own = metric.compute
    metric.compute = lambda: 100 * own()
    return metric


PERCENT: dict[str, tuple[Callable[[], Any], Case]] = {
    "compute": (Percent, CASES["CrossEntropy"]),
    "read": (lambda: Reads(4), CASES["GroupedCrossEntropy"]),
    "patched": (with_patched_compute, CASES["CrossEntropy"]),
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", PERCENT)
def test_overridden_compute(name: str, hidden: bool, hide_values: Callable[[], None]) -> None:
    """`forward` returns of its batch what `compute` would, and `compute_together` refuses what it would pass over."""
    if hidden:
        hide_values()
    make, case = PERCENT[name]
    metric, batches = make(), case.batches()
    for batch in batches:
        value = {key: x / 100 for key, x in numbers(metric(**batch)).items()}
        assert_close([*value.values()], [*numbers(case.expected(batch)).values()])
    assert torch.equal(metric.tally.state, case.filled(*batches).tally.state)
    assert metric.update_count == len(batches)
    value = {key: x / 100 for key, x in numbers(metric.compute()).items()}
    assert_close([*value.values()], [*numbers(case.expected(*batches)).values()])
    with pytest.raises(TypeError, match=r"`metrics` must be metrics whose `compute` is that of xent_metrics, got"):
        compute_together({"own": CrossEntropy(), "other": metric})


def test_overridden_compute_that_raises() -> None:
    """The error comes from `forward`, and the batch was not added."""

    class Raises(CrossEntropy):
        def compute(self) -> Tensor:
            raise KeyError("mine")

    metric = Raises()
    with pytest.raises(KeyError, match="mine"):
        metric(*BATCHES[0])
    assert (metric.update_count, metric.tally.totals().scored) == (0, 0)


def test_what_a_subclass_may_override_freely() -> None:
    """Other readings, and what is not of a metric, leave `forward` as fast as it was."""

    class Doubled(Perplexity):
        """Reads twice as much."""

        def _read(self, *readings: Any) -> Any:
            return 2 * super()._read(*readings)

        def more(self) -> None:
            """Do nothing."""

    metric, own = Doubled(), Perplexity()
    for batch in BATCHES:
        assert bits(metric(*batch)) == bits(2 * own(*batch))
        assert bits(metric.compute()) == bits(2 * own.compute())
        assert bits(compute_together({"": metric})[""]) == bits(metric.compute())
    metric.merge_state(own)
    assert metric.has_own("update")
    assert metric.has_own("compute")


# Added states.

ZEROS = {"sum": 0.0, "max": 0.0, "min": 9.0, "mean": 0.0}


class Adding(CrossEntropy):
    """Adds a state for each of torchmetrics' reductions."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, zero in ZEROS.items():
            self.add_state(name, torch.tensor(zero), name)
        self.add_state("cat", [], "cat")

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Look at the sizes of batches, and add them."""
        size = len(preds)
        self.sum += size
        self.max, self.min = self.max.clamp(min=size), self.min.clamp(max=size)
        self.mean = (self.mean * (self.update_count - 1) + size) / self.update_count
        self.cat.append(torch.tensor([size]))
        super().update(preds, target)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Read everything."""
        cat = torch.cat(self.cat) if isinstance(self.cat, list) else self.cat
        return {"loss": super().compute(), "sum": self.sum, "max": self.max, "min": self.min, "mean": self.mean} | {
            f"size {i}": x for i, x in enumerate(cat.sort().values)
        }


def judge_sizes(*batches: dict[str, Any]) -> dict[str, float]:
    """Return what they read."""
    sizes = sorted(len(batch["preds"]) for batch in batches)
    return {
        "loss": CASES["CrossEntropy"].expected(*batches),
        "sum": sum(sizes),
        "max": max(sizes),
        "min": min(sizes),
        "mean": sum(sizes) / len(sizes),
    } | {f"size {i}": size for i, size in enumerate(sizes)}


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda metric: metric,
    "deepcopy": deepcopy,
    "pickle": lambda metric: pickle.loads(pickle.dumps(metric)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_added_states(copy: Callable[[Any], Any]) -> None:
    """They are kept, reset, copied, saved and read as the tally is, from `update` as from `forward`."""
    batches = CASES["CrossEntropy"].batches()
    metric = copy(Adding())
    for i, batch in enumerate(batches, 1):
        if i == 2:
            metric.update(**batch)
        else:
            assert_close(metric(**batch), judge_sizes(batch))
        metric = copy(metric)
    assert_close(metric.compute(), judge_sizes(*batches))
    metric.persistent(True)
    saved = metric.state_dict()
    metric.reset()
    assert (float(metric.sum), metric.cat, metric.tally.totals().scored) == (0, [], 0)
    metric.load_state_dict(saved)
    assert_close(metric.compute(), judge_sizes(*batches))


def test_added_states_are_merged() -> None:
    """`merge_state` adds them up as they say, from a metric or from its state, or not at all."""
    first, *rest = CASES["CrossEntropy"].batches()
    for form in (lambda metric: metric, lambda metric: metric.metric_state):
        metric, other = filled(Adding(), first), filled(Adding(), *rest)
        metric.merge_state(form(other))
        value, expected = metric.compute(), judge_sizes(first, *rest)
        del value["mean"], expected["mean"]  # torchmetrics merges means by the number of updates of one of them.
        assert_close(value, expected)
    before = metric.metric_state
    state = {name: x for name, x in other.metric_state.items() if name != "cat"}
    with pytest.raises(ValueError, match="Expected state variable cat to be present"):
        metric.merge_state(state)
    assert bits(metric.metric_state["sum"]) == bits(before["sum"])
    assert torch.equal(metric.tally.state, CASES["CrossEntropy"].filled(first, *rest).tally.state)
