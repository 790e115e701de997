"""A bad target, weight, probability or group raises at once on the CPU and is counted elsewhere; it leaves no trace."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from tests.metrics.bad_input import (
    A_GROUP,
    A_TARGET,
    FUNCTIONS,
    KINDS,
    OF_CLASSES,
    SOFT,
    SPOT,
    Batch,
    K,
    assert_no_trace,
    bits,
    each_kind,
    main,
    make_batch,
    numbers,
    ones,
    raised,
)
from xent_metrics import CrossEntropy, functional

A_WEIGHT = "a negative, infinite or NaN weight"
A_PROBABILITY = 'a probability outside [0, 1] with `input="probs"`'
A_SOFT_TARGET = "soft targets that are negative or do not sum to 1 (to 1e-3; in half precision to 1e-2)"
A_BINARY_TARGET = "binary targets outside [0, 1]"


class Case(NamedTuple):
    """One bad value: the kinds that take it, the options and form of the batch, where it goes, and what is said."""

    names: list[str]
    argument: str
    value: Any
    text: str
    options: Mapping[str, Any] = MappingProxyType({})
    soft: bool = False

    def good(self, name: str) -> Batch:
        """Make the batch before the value is put into it."""
        batch = make_batch(name, self.options.get("input", "logits"), self.soft)
        if self.argument == "target" and KINDS[name].binary:
            batch["target"] = batch["target"].to(torch.float64 if isinstance(self.value, float) else torch.int64)
        return batch

    def bad(self, name: str) -> Batch:
        """Make the batch with the value in it."""
        batch = self.good(name)
        if self.argument == "weight":
            batch["weight"] = ones()
        key = self.argument
        if key == "preds" and "preds_a" in KINDS[name].arguments:
            key = "preds_a" if name.endswith("(a)") else "preds_b"
        spot = (*SPOT, 2) if self.argument == "preds" and not KINDS[name].binary else SPOT
        batch[key][spot] = self.value
        return batch


CASES = [
    *(
        Case(OF_CLASSES, "target", bad, rf"\[0, {K}\) or ignore_index={index}, got 1 .* such as {bad}; {fix}", options)
        for bad, index, fix, options in (
            (K, -100, "check the vocabulary size", {}),
            (2**40, -100, "check the vocabulary size", {}),
            (-1, -100, "pass ignore_index=-1 if it marks", {}),
            (-100, None, "pass ignore_index=-100 if it marks", {"ignore_index": None}),
        )
    ),
    *(
        Case(list(KINDS), "weight", bad, f"got 1 that are not, such as {bad}; use 0 or False")
        for bad in (-1.0, -math.inf, math.inf, math.nan, 2.0**47)
    ),
    *(
        Case(list(KINDS), "preds", bad, "got 1 targets for which they are not; pass input='logits'", {"input": "probs"})
        for bad in (1.5, -0.25, math.inf, -math.inf)
    ),
    *(
        Case(SOFT, "target", torch.tensor(bad), f"with a sum of 1, got 1 that do not, .*; {fix}", soft=True)
        for bad, fix in (
            *((x, "divide them") for x in ([0.5, 0.4, 0.0, 0.0], [math.nan, 1.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4)),
            ([-0.5, 1.5, 0.0, 0.0], "pass their softmax"),
        )
    ),
    *(
        Case(["BinaryCrossEntropy"], "target", bad, f"got 1 that are neither, such as {bad}; {fix}")
        for bad, fix in (
            (-1, "pass ignore_index=-1 if it marks"),
            (-1.0, "pass ignore_index=-1 if it marks"),
            *((bad, "more than two classes") for bad in (2, 2**40, 1.5, -0.5, math.inf, -math.inf)),
            (math.nan, "mask them with weight=~target.isnan()"),
        )
    ),
    *(
        Case(["GroupedCrossEntropy"], "group", bad, rf"\[0, 3\), got 1 .* such as {bad}; raise `num_groups`, or mask")
        for bad in (3, -1, 2**40)
    ),
]

VALUES = [pytest.param(case, name, id=f"{name}-{case.argument}={case.value}") for case in CASES for name in case.names]
ALL_VALUES = (A_TARGET, A_WEIGHT, A_PROBABILITY, A_SOFT_TARGET, A_BINARY_TARGET, A_GROUP)


@pytest.mark.parametrize(("case", "name"), VALUES)
def test_a_bad_value_raises_at_once(case: Case, name: str) -> None:
    """On the CPU one bad value is refused with the count, an example and the fix, and leaves no trace."""
    message = assert_no_trace(name, case.bad(name), case.options, case.good(name), ValueError)
    assert re.search(rf"^`{case.argument}(_[ab])?` must hold\b.*{case.text}", message), message


@pytest.mark.parametrize(("case", "name"), [param for param in VALUES if param.values[1] in FUNCTIONS])
def test_a_bad_value_raises_in_functions(case: Case, name: str) -> None:
    """The functions say the same."""
    message = raised(ValueError, lambda: KINDS[name].call(case.bad(name), **case.options))
    assert re.search(rf"^`{case.argument}(_[ab])?` must hold\b.*{case.text}", message), message


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize(("case", "name"), VALUES)
def test_a_bad_value_is_counted_elsewhere(case: Case, name: str) -> None:
    """On an accelerator the batch reads NaN, and `compute` raises with the count, again and again until a reset."""
    bad, good = (KINDS[name].chosen(batch) for batch in (case.bad(name), case.good(name)))
    metric, expected = KINDS[name].make(**case.options), KINDS[name].make(**case.options)
    for call in (metric, metric, lambda **batch: KINDS[name].call(batch, **case.options)):
        if call is metric or name in FUNCTIONS:
            assert all(map(math.isnan, numbers(call(**bad))))
    assert not any(map(math.isnan, main(metric(**good))))
    for _ in range(2):
        assert re.search(rf"^`{case.argument}`.* must hold .*\b2\b.*reset\(\)", raised(ValueError, metric.compute))
    metric.update(**good)
    raised(ValueError, metric.compute)
    metric.reset()
    for each in (metric, expected):
        each.update(**good)
    assert bits(metric.compute()) == bits(expected.compute())


@pytest.mark.parametrize(("case", "name"), [param for param in VALUES if param.values[0].argument != "weight"])
def test_a_bad_value_that_is_masked_is_not_looked_at(case: Case, name: str, hide_values: Callable[[], None]) -> None:
    """Where a target is not scored, neither it nor its predictions nor its group matter, on any device."""
    for deferred, weight in ((False, torch.float32), (True, torch.bool)):
        mask = ones().to(weight)
        mask[SPOT] = 0
        if deferred:
            hide_values()
        metric, expected = KINDS[name].make(**case.options), KINDS[name].make(**case.options)
        value = metric(**KINDS[name].chosen({**case.bad(name), "weight": mask}))
        assert bits(value) == bits(expected(**KINDS[name].chosen({**case.good(name), "weight": mask})))
        assert bits(metric.compute()) == bits(expected.compute())
        assert not any(map(math.isnan, main(value)))


@each_kind
def test_a_bad_weight_of_an_ignored_target_is_not_looked_at(name: str) -> None:
    """`ignore_index` decides before the weight does."""
    batch = make_batch(name)
    batch["target"][SPOT] = -100
    clean = KINDS[name].make(ignore_index=-100)(**KINDS[name].chosen({**batch, "weight": ones()}))
    for bad in (-1.0, math.nan, math.inf):
        weight = ones()
        weight[SPOT] = bad
        metric = KINDS[name].make(ignore_index=-100)
        assert bits(metric(**KINDS[name].chosen({**batch, "weight": weight}))) == bits(clean)


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_a_bad_weight_of_a_class_without_weight_is_counted(smoothing: float) -> None:
    """A negative weight is one even where the class weight is 0, so that their product is no negative number."""
    metric = CrossEntropy(class_weight=torch.tensor([1.0, 0.0, 1.0, 1.0]), label_smoothing=smoothing)
    batch = make_batch("CrossEntropy")
    weight = ones()
    weight[SPOT] = -1.0
    assert metric(batch["preds"], batch["target"], weight=weight).isnan()
    assert "`weight`" in raised(ValueError, metric.compute)


@pytest.mark.parametrize("bad", [2.0, -1.0])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_nan_beside_it_does_not_hide_a_bad_probability(name: str, bad: float) -> None:
    """Each probability is looked at for itself."""
    batch = make_batch(name, "probs")
    key = "preds" if "preds" in KINDS[name].arguments else f"preds_{name[-2]}"
    batch[key][SPOT] = torch.tensor([math.nan, bad, 0.5, 0.5])
    metric = KINDS[name].make(input="probs")
    message = raised(ValueError, lambda: metric.update(**KINDS[name].chosen(batch)))
    assert message.startswith(f"`{key}` must hold probabilities")


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [
        (torch.float64, 9e-4, 1.2e-3),
        (torch.float32, 9e-4, 1.2e-3),
        (torch.float16, 7e-3, 1.3e-2),
        (torch.bfloat16, 7e-3, 2e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("preds_dtype", [torch.float16, torch.float64], ids=str)
def test_how_far_from_1_a_soft_target_may_sum(
    preds_dtype: torch.dtype, sign: int, dtype: torch.dtype, within: float, beyond: float
) -> None:
    """The dtype of the targets decides, not that of the predictions."""
    preds = torch.zeros(1, 2, dtype=preds_dtype)
    value = functional.cross_entropy(preds, torch.tensor([[0.5, 0.5 + sign * within]], dtype=dtype))
    assert value.item() == pytest.approx(math.log(2), rel=1e-2)
    with pytest.raises(ValueError, match="`target` must hold, as soft targets, probabilities"):
        functional.cross_entropy(preds, torch.tensor([[0.5, 0.5 + sign * beyond]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_binary_targets_of_any_integer_type(dtype: torch.dtype) -> None:
    """0 and 1 are 0 and 1 in every dtype, 2 is out of range, and no `ignore_index` wraps to one of them."""
    preds, target = torch.tensor([1.0, -1.0]), torch.tensor([1, 0])
    expected = functional.binary_cross_entropy(preds, target).item()
    for ignore_index in (None, -100, 257, 2**32 + 1, 300):
        assert functional.binary_cross_entropy(preds, target.to(dtype), ignore_index=ignore_index).item() == expected
    with pytest.raises(ValueError, match="got 1 that are neither, such as 2;"):
        functional.binary_cross_entropy(preds, torch.tensor([1, 2]).to(dtype))


@pytest.mark.parametrize(
    ("target", "dtype", "ignore_index"),
    [(156, torch.uint8, -100), (1, torch.uint8, 257), (-100, torch.int8, 156), (2048.0, torch.float16, 2049)],
)
def test_a_binary_target_is_not_ignored_for_what_it_would_wrap_to(
    target: float, dtype: torch.dtype, ignore_index: int
) -> None:
    """A target that is not `ignore_index` as a number is scored, or refused."""
    args = torch.zeros(1), torch.tensor([target], dtype=dtype)
    if 0 <= target <= 1:
        assert functional.binary_cross_entropy(*args, ignore_index=ignore_index).item() == pytest.approx(math.log(2))
    else:
        with pytest.raises(ValueError, match="got 1 that are neither"):
            functional.binary_cross_entropy(*args, ignore_index=ignore_index)


@pytest.mark.parametrize("bad", [2**64 - 100, 2**63, 2**64 - 1])
def test_an_unsigned_target_is_not_ignored_for_what_it_would_wrap_to(bad: int, hide_values: Callable[[], None]) -> None:
    """What a uint64 has above int64 is no class, no 0 or 1 and no `ignore_index`: it raises, or is counted."""
    target = torch.tensor([0, bad], dtype=torch.uint64)
    options = {"ignore_index": bad - 2**64}
    calls: list[Callable[[], Any]] = [
        lambda: functional.cross_entropy(torch.zeros(2, K), target, **options),
        lambda: functional.cross_entropy(
            torch.zeros(1, 3, K), torch.cat([target[:1], target])[None], shift=True, **options
        ),
        lambda: functional.binary_cross_entropy(torch.zeros(2), target, **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"got 1 that are neither, such as {bad};"):
            call()
    losses = functional.tally(torch.zeros(2), target, input="losses", **options).totals()
    assert (losses.scored, losses.ignored) == (2, 0)
    hide_values()
    assert all(call().isnan() for call in calls)
    totals = functional.tally(torch.zeros(2, K), target, **options).totals()
    assert (totals.out_of_range, totals.ignored) == (1, 0)
