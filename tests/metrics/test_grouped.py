"""A group reads what its targets alone would read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.instruments import Operators
from tests.metrics.quantities import GROUPS, ROWS, K, T, bits, distributions, filled, losses_of, ragged, read
from xent_metrics import CrossEntropy, GroupedCrossEntropy, functional


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "bits"},
        {"class_weight": torch.linspace(0, 2, K)},
        {"class_weight": torch.rand(K), "label_smoothing": 0.1, "label_smoothing_over": "others"},
        {"class_dim": 1},
    ],
)
@pytest.mark.parametrize("weighed", ["", "full", "column", "row", "mask"])
def test_a_group_is_its_subset(weighed: str, options: dict[str, Any], soft: bool) -> None:
    """The value of each group is that of `CrossEntropy` on its targets, bit for bit."""
    preds, target, group = torch.randn(ROWS, T, K), torch.randint(0, K, (ROWS, T)), torch.randint(0, GROUPS, (ROWS, T))
    if not soft:
        target = target.masked_fill(torch.rand(ROWS, T) < 0.2, -100)
    else:
        target = distributions(ROWS, T, K, dtype=torch.float32)
    weight = {
        "": None,
        "full": torch.rand(ROWS, T, dtype=torch.float64),
        "column": torch.rand(ROWS, 1),
        "row": torch.rand(T),
        "mask": torch.rand(ROWS, T) < 0.7,
    }[weighed]
    class_dim = options.get("class_dim", -1)
    move = (lambda x: x.movedim(-1, class_dim)) if class_dim == 1 else (lambda x: x)
    metric = GroupedCrossEntropy(GROUPS + 2, **options)
    some = weight if weight is None or len(weight) == ROWS else weight.expand(ROWS, T)
    if weighed == "row":
        metric.update(move(preds), move(target) if soft else target, group=group, weight=weight)
    else:
        filled(metric, ragged(move(preds), move(target) if soft else target, group, some))
    value = metric.compute()
    flat_options = {**options, "class_dim": -1}
    weights = None if weight is None else weight.expand(ROWS, T)
    expected = []
    for g in range(GROUPS):
        mask = group == g
        subset = CrossEntropy(**flat_options)
        subset.update(preds[mask], target[mask], weight=None if weights is None else weights[mask])
        expected += bits(subset.compute())
    assert bits(value) == [*expected, *bits(torch.full((2,), math.nan))]
    assert value.dtype == torch.float64
    one_pass = functional.grouped_cross_entropy(
        move(preds), move(target) if soft else target, group=group, weight=weight, num_groups=GROUPS + 2, **options
    )
    torch.testing.assert_close(one_pass, value, rtol=1e-13, atol=0, equal_nan=True)


def test_grouped_by_the_recipes() -> None:
    """The recipes for data sets, classes and positions give the mean loss of each."""
    preds, target = torch.randn(ROWS, T, K, dtype=torch.float64), torch.randint(0, K, (ROWS, T))
    target[:, 3] = target[:, 3].masked_fill(target[:, 3] < 3, -100)
    losses, scored = losses_of(preds, target), target >= 0
    dataset = torch.tensor([0, 2, 2, 0, 2, 0, 0, 2, 2])
    recipes = {
        "dataset": (3, dataset[:, None], dataset[:, None].expand(ROWS, T)),
        "class": (K, target, target),
        "position": (T, torch.arange(T), torch.arange(T).expand(ROWS, T)),
    }
    for num_groups, group, where in recipes.values():
        value = read(GroupedCrossEntropy(num_groups), preds, target, group)
        expected = [losses[(where == g) & scored].mean().item() for g in range(num_groups)]
        assert value == pytest.approx(expected, rel=1e-13, nan_ok=True)
        assert value == pytest.approx(
            read(GroupedCrossEntropy(num_groups), preds, target, group.to(torch.int16)), nan_ok=True
        )
    assert math.isnan(read(GroupedCrossEntropy(3), preds, target, dataset[:, None])[1])


def test_groups_of_what_is_not_scored_may_be_anything() -> None:
    """An ignored or masked target may have any group, a scored one may not."""
    preds, target, group = torch.randn(3, K), torch.tensor([1, -100, 2]), torch.tensor([1, -7, 2**40])
    value = read(GroupedCrossEntropy(2), preds, target, group, torch.tensor([1.0, 1.0, 0.0]))
    assert value == pytest.approx([math.nan, losses_of(preds, target)[0].item()], rel=1e-6, nan_ok=True)
    with pytest.raises(ValueError, match=rf"`group` must hold integers in \[0, 2\), got 1 .* {2**40};"):
        read(GroupedCrossEntropy(2), preds, target, group)


def test_each_group_has_its_own_infinities() -> None:
    """An infinite or NaN loss propagates into its own group, or is left out of it."""
    losses = torch.tensor([1.0, math.inf, 3.0, math.nan, 5.0, -math.inf, 7.0, math.inf, -math.inf, 2.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 4, 5])
    batch = (losses, torch.zeros(10, dtype=torch.int64), group)
    propagated = [math.inf, math.nan, -math.inf, 7.0, math.nan, 2.0, math.nan]
    for policy, expected in (("propagate", propagated), ("omit", [1.0, 3.0, 5.0, 7.0, math.nan, 2.0, math.nan])):
        metric = GroupedCrossEntropy(7, input="losses", nan_policy=policy)
        assert metric(*batch[:2], group=group).tolist() == pytest.approx(expected, nan_ok=True)
        assert metric.compute().tolist() == pytest.approx(expected, nan_ok=True)
    with pytest.raises(ValueError, match="nan_policy='raise'"):
        read(GroupedCrossEntropy(7, input="losses", nan_policy="raise"), *batch)


@pytest.mark.slow
def test_a_hundred_thousand_groups(operators: Operators) -> None:
    """Many groups are as exact as few, and take no operator more."""
    size, num_groups = 150_000, 100_000
    preds, target, group = torch.randn(size, 3), torch.randint(0, 3, (size,)), torch.randint(0, num_groups, (size,))
    metric = filled(GroupedCrossEntropy(num_groups), ragged(preds, target, group))
    value = metric.compute()
    assert value.isnan().equal(torch.bincount(group, minlength=num_groups) == 0)
    for g in [*range(0, num_groups, 1999), num_groups - 1]:
        mask = group == g
        if mask.any():
            subset = filled(CrossEntropy(), [(preds[mask], target[mask])])
            assert bits(value[g]) == bits(subset.compute())
    counts = []
    for number in (2, num_groups):
        operators.counts.clear()
        few = GroupedCrossEntropy(number)
        with operators:
            few.update(preds, target, group=group % number)
            few(preds[:9], target[:9], group=group[:9] % number)
        counts.append(operators.counts.copy())
    assert counts[0] == counts[1]
    assert counts[0].total() < 1000


@pytest.mark.parametrize("weighed", [False, True])
def test_groups_hold_little(weighed: bool, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """An update with a million grouped targets holds at most 64 bytes for each, and 8 MiB."""
    size = 2**20
    preds, target, group = torch.randn(size, 2), torch.randint(0, 2, (size,)), torch.randint(0, 100, (size,))
    weight = torch.rand(size) if weighed else None
    metric = GroupedCrossEntropy(100)
    assert peak_bytes(lambda: metric.update(preds, target, group=group, weight=weight)) < 64 * size + 8 * 2**20


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    ("nan_policy", "third", "expected"),
    [
        ("propagate", 6.0, 3.0),
        ("propagate", math.inf, math.inf),
        ("propagate", math.nan, math.nan),
        ("omit", math.inf, 1.5),
    ],
)
def test_the_mean_over_groups_counts_each_once(
    nan_policy: Any, third: float, expected: float, elsewhere: bool, hide_values: Callable[[], None]
) -> None:
    """However many targets it has; one without targets is left out, one of infinite losses only where that is asked."""
    if elsewhere:
        hide_values()
    metric = GroupedCrossEntropy(4, input="losses", average="macro", nan_policy=nan_policy)
    batch = torch.tensor([1.0, 1.0, 1.0, 2.0, third]), torch.zeros(5, dtype=torch.int64)
    value = metric(*batch, group=torch.tensor([0, 0, 0, 1, 3]))
    for found in (value, metric.compute()):
        assert found.dim() == 0
        torch.testing.assert_close(found.item(), expected, equal_nan=True)
    options: dict[str, Any] = {"num_groups": 3, "input": "losses", "average": "macro", "nan_policy": "omit"}
    one = functional.grouped_cross_entropy(*batch, group=torch.full((5,), 2), **options)
    torch.testing.assert_close(one.item(), (5 + third) / 5 if math.isfinite(third) else 1.25)
    ignored = torch.full((5,), -100)
    assert functional.grouped_cross_entropy(batch[0], ignored, group=torch.zeros_like(ignored), **options).isnan()
