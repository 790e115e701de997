"""Anything may be passed to a public entry point: it is refused in the library's own words, or the value is right."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import xent_metrics
from tests.cases import QUANTITIES, Quantity
from tests.metrics.fuzz_judge import AmbiguityError, Judged, RefusalError, Value, flat, judge, judge_options, read
from tests.strategies import Call, calls, examples
from xent_metrics import GroupedCrossEntropy, functional

fuzz = settings(
    deadline=None,
    max_examples=examples(200),
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=False,
)
ENTRIES = {
    **{name: quantity for name, quantity in QUANTITIES.items() if quantity.function is not None},
    "per_target_losses": Quantity(None, functional.per_target_losses, ("preds", "target")),
    "tally": QUANTITIES["report"]._replace(function=functional.tally),
}
METRICS = [name for name, entry in ENTRIES.items() if entry.metric is not None]


def outcome(call: Callable[[], Any]) -> Any:
    """Call; of errors allow only those that the library itself raises, and return them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except (TypeError, ValueError) as caught:
        error = caught
    last = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(xent_metrics.__file__).parent in Path(last.filename).parents and (last.line or "").startswith("raise")
    assert own, f"not the library's own: {error!r}"
    return error


def assert_right(found: Any, expected: Callable[[], dict[str, Value]], refused: bool = True) -> None:
    """Compare an outcome with what must come out; where nothing is refused, NaN stands for an error."""
    try:
        values = expected()
    except RefusalError:
        if refused:
            assert isinstance(found, Exception), f"accepted, with the value {found}"
        else:
            numbers = flat(found).values()
            assert all(math.isnan(x) for x in numbers if isinstance(x, float)), f"not NaN but {found}"
        return
    except AmbiguityError:
        return
    assert not isinstance(found, Exception), f"refused, but valid: {found}"
    actual = flat(found)
    if list(values) == ["0"]:
        actual = {"0": actual.get("", actual.get("0", math.nan))}  # torchmetrics squeezes what one group reads.
    for name, value in values.items():
        assert value.agrees(actual[name]), f"{name} is {actual[name]}, expected {value}"


def versions(call: Call) -> list[int]:
    """Count how often each tensor of a call was written to."""
    values = [*call.options.values(), *(x for batch in call.batches for x in batch.values())]
    return [x._version for x in values if isinstance(x, Tensor)]


def expected_of(name: str, form: Callable[..., Any], call: Call) -> dict[str, Value]:
    """Judge a call of one batch."""
    entry = ENTRIES[name]
    options = judge_options(entry, form, call.options)
    return read(name, options, [judge(entry, options, batch) for batch in call.batches])


def chosen(entry: Quantity, form: Callable[..., Any], call: Call) -> dict[str, Any]:
    """Choose the options that a function or a metric has."""
    return {name: value for name, value in call.options.items() if name in entry.options(form)}


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "per_target_losses"])
def test_functions(name: str) -> None:
    """A function returns the right value, or refuses in its own words what must be refused, and writes to nothing."""
    entry = ENTRIES[name]

    @fuzz
    @given(calls(entry))
    def check(call: Call) -> None:
        before = versions(call)
        options = chosen(entry, entry.function, call)
        found = outcome(lambda: entry.function(**call.batches[0], **options))
        assert_right(found, lambda: expected_of(name, entry.function, call))
        assert versions(call) == before

    check()


@fuzz
@given(calls(ENTRIES["per_target_losses"]))
def test_per_target_losses(call: Call) -> None:
    """Every loss by itself, of target's shape, 0 where the target is ignored, or a refusal."""
    entry = ENTRIES["per_target_losses"]
    batch = call.batches[0]

    def expected() -> dict[str, Value]:
        options = judge_options(entry, entry.function, call.options)
        judged = judge(entry, options, batch)
        tolerances = iter([one.tolerance for one in judged.targets()])
        return {str(i): loss_of(loss, batch["preds"].dtype, tolerances) for i, loss in enumerate(judged.losses)}

    found = outcome(lambda: entry.function(**batch, **chosen(entry, entry.function, call)))
    if isinstance(found, Tensor):
        dim = call.options.get("class_dim", -1)
        shape = batch["target"][..., 0] if dim == -1 and batch["target"].is_floating_point() else None
        assert found.dtype == torch.float64
        assert shape is None or found.shape == shape.shape
        found = found.reshape(-1)
        assert_right(found, expected)
    else:
        assert_right(found, expected)


def loss_of(loss: float, dtype: torch.dtype, tolerances: Any) -> Value:
    """Expect a loss that has not been summed: what float32 cannot hold is infinite."""
    largest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    if abs(loss) > largest / 2 and not math.isinf(loss):
        return Value(loss, math.inf)
    return Value(loss, 2e-5 * (1 + abs(loss)) + max(tolerances, default=0.0) if math.isfinite(loss) else 0.0)


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name: str) -> None:
    """A metric reads what it was given, in total and batch by batch, and a batch that is refused leaves no trace."""
    entry = ENTRIES[name]

    @fuzz
    @given(calls(entry, num_batches=2), st.sampled_from(["update", "forward"]))
    def check(call: Call, method: str) -> None:
        metric = outcome(lambda: entry.metric(**chosen(entry, entry.metric, call)))
        try:
            options = judge_options(entry, entry.metric, call.options)
        except RefusalError:
            assert isinstance(metric, Exception), "made with options that must be refused"
            return
        assert not isinstance(metric, Exception), f"not made: {metric}"
        judged: list[Judged] = []
        for batch in call.batches:
            state, count = metric.tally.state.clone(), metric.update_count
            found = outcome(lambda batch=batch: getattr(metric, method)(**batch))
            try:
                part = judge(entry, options, batch)
            except RefusalError:
                assert isinstance(found, Exception), f"accepted, with the value {found}"
                assert torch.equal(metric.tally.state, state)
                assert metric.update_count == count
                continue
            assert not isinstance(found, Exception), f"refused, but valid: {found}"
            judged.append(part)
            assert metric.update_count == count + 1
            if method == "forward":
                assert_right(found, lambda part=part: read(name, options, [part]), refused=False)
        found = outcome(metric.compute)
        assert_right(found, lambda: read(name, options, judged))

    check()


@pytest.mark.parametrize("name", ENTRIES)
def test_valid_calls_are_never_refused(name: str) -> None:
    """Without damage every call is accepted, by the function and by the metric."""
    entry = ENTRIES[name]

    @settings(fuzz, max_examples=examples(25))
    @given(calls(entry, damage=False))
    def check(call: Call) -> None:
        (batch,) = call.batches
        call = call._replace(options={name: x for name, x in call.options.items() if name != "nan_policy"})
        assert not isinstance(
            outcome(lambda: entry.function(**batch, **chosen(entry, entry.function, call))), Exception
        )
        if entry.metric is not None:
            metric = entry.metric(**chosen(entry, entry.metric, call))
            for method in (metric.update, metric):
                assert not isinstance(outcome(lambda method=method: method(**batch)), Exception)

    check()


@settings(fuzz, max_examples=examples(200))
@given(
    st.floats() | st.floats(0, 1) | st.integers(-1, 2) | st.sampled_from([None, True, "0.1", 1j]),
    st.integers(-1, 9) | st.integers() | st.sampled_from([None, True, 3.0, "3"]),
)
def test_conversion_of_smoothing(share: Any, num_classes: Any) -> None:
    """Both conventions give the true class the same, or there is nothing to convert."""
    found = outcome(lambda: functional.convert_label_smoothing(share, num_classes))
    valid = type(share) in (int, float) and 0 <= share <= 1 and type(num_classes) is int and num_classes >= 1
    if not valid or share > (num_classes - 1) / num_classes:
        assert isinstance(found, Exception), f"accepted, with the value {found}"
        return
    assert not isinstance(found, Exception), f"refused, but valid: {found}"
    assert 1 - found + found / num_classes == pytest.approx(1 - share, abs=1e-12)
    assert 0 <= found <= 1


@pytest.mark.parametrize("name", [name for name in METRICS if "weight" in ENTRIES[name].arguments])
@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 1), (1, 1), (2, 3)])
def test_weights_may_have_any_shape_that_broadcasts(name: str, shape: tuple[int, ...]) -> None:
    """A weight that is broadcast is the same as one that is written out, for every function and metric."""
    entry, target = ENTRIES[name], torch.tensor([[0, 1, 0], [1, 1, 0]])
    preds, weight = torch.rand(2, 3) if entry.binary else torch.rand(2, 3, 2), torch.rand(shape, dtype=torch.float64)
    batch = {"preds": preds, "preds_a": preds, "preds_b": preds + 1, "target": target, "group": target, "num_bytes": 9}
    options = {key: 2 for key in ("num_groups", "num_classes") if key in entry.options(entry.metric)}
    values = []
    for each in (weight, weight.expand(2, 3).clone()):
        arguments = {key: {**batch, "weight": each}[key] for key in entry.arguments}
        metric = entry.metric(**options)
        values += [flat(metric(**arguments)), flat(entry.function(**arguments, **options)), flat(metric.compute())]
    assert str(values[:3]) == str(values[3:])


def test_one_group_reads_as_a_vector() -> None:
    """The shape of the values is `(num_groups,)`, also for one group."""
    metric = GroupedCrossEntropy(1)
    assert metric(torch.zeros(3, 2), torch.tensor([0, 1, 0]), group=torch.tensor(0)).shape == (1,)
    assert metric.compute().shape == (1,)


def test_all_entry_points_are_here() -> None:
    """Every function and every class is thrown at."""
    assert {*ENTRIES, "convert_label_smoothing"} == set(functional.__all__)
    classes = {x for x in map(vars(xent_metrics).get, xent_metrics.__all__) if hasattr(x, "merge_state")}
    assert {entry.metric for entry in ENTRIES.values()} - {None} == classes
