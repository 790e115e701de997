"""Paired differences of two models."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import reference
from tests.metrics.quantities import FLOATS, ROWS, K, T, distributions, filled, losses_of, ragged, read
from tests.reference import Target
from xent_metrics import CrossEntropy, CrossEntropyDifference, functional


def sequences_of(losses: Tensor, weight: Tensor | None = None, norm: Tensor | None = None) -> list[list[Target]]:
    """Losses of shape (sequences, targets) as the reference wants them."""
    weight = torch.ones_like(losses) if weight is None else weight
    norm = torch.ones_like(losses) if norm is None else norm
    rows = zip(losses.tolist(), norm.tolist(), weight.tolist(), strict=True)
    return [[Target(*t) for t in zip(*row, strict=True)] for row in rows]


def judge_difference(difference: Tensor, weight: Tensor | None, confidence: float) -> dict[str, float]:
    """Judge paired differences, clustered by sequence."""
    sequences = sequences_of(difference, weight)
    mean, (lower, upper) = reference.cross_entropy(sequences), reference.interval(sequences, confidence)
    return {
        "difference": mean,
        "difference_stderr": reference.stderr(sequences),
        "difference_lower": lower,
        "difference_upper": upper,
        "perplexity_ratio": reference.perplexity(mean),
        "perplexity_ratio_lower": reference.perplexity(lower),
        "perplexity_ratio_upper": reference.perplexity(upper),
    }


@pytest.mark.parametrize("confidence", [0.95, 0.5])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_difference(class_dim: int, weighed: bool, soft: bool, confidence: float) -> None:
    """Difference, standard error, interval and ratio are those of the paired differences."""
    models = [torch.randn(ROWS, T, K, dtype=torch.float64) for _ in range(2)]
    target = torch.randint(0, K, (ROWS, T)).masked_fill(torch.rand(ROWS, T) < 0.2, -100)
    scored = (target >= 0).double()
    losses = [losses_of(x, target) for x in models]
    if soft:
        target, scored = distributions(ROWS, T, K), torch.ones_like(scored)
        losses = [F.cross_entropy(x.movedim(-1, 1), target.movedim(-1, 1), reduction="none") for x in models]
    weight = torch.rand(ROWS, T, dtype=torch.float64) if weighed else None
    weights = scored if weight is None else scored * weight
    expected = judge_difference(losses[1] - losses[0], weights, confidence)
    a, b, labels = (x.movedim(-1, class_dim) if x.dim() == 3 else x for x in (*models, target))
    metric = CrossEntropyDifference(class_dim=class_dim, confidence=confidence)
    value = filled(metric, ragged(a, b, labels, weight)).compute()
    assert {name: x.item() for name, x in value.items()} == pytest.approx(expected, rel=1e-8)
    assert list(value) == list(expected)
    one_pass = functional.cross_entropy_difference(
        a, b, labels, weight=weight, class_dim=class_dim, confidence=confidence
    )
    assert {name: x.item() for name, x in one_pass.items()} == pytest.approx(expected, rel=1e-6)
    two = [read(CrossEntropy(class_dim=class_dim), x, labels, weight) for x in (a, b)]
    assert value["difference"].item() == pytest.approx(two[1] - two[0], rel=1e-12)


def test_pairing_cancels_what_is_hard_for_both() -> None:
    """Where both models find the same sequences hard, the paired standard error is far below the unpaired one."""
    hard = 4 * torch.rand(50, 1, dtype=torch.float64)
    first, second = (hard + mean + 0.05 * torch.randn(50, 20, dtype=torch.float64) for mean in (2.0, 1.97))
    target = torch.zeros(50, 20, dtype=torch.int64)
    value = read(CrossEntropyDifference(input="losses"), first, second, target)
    assert value == pytest.approx(judge_difference(second - first, None, 0.95), rel=1e-8)
    unpaired = math.hypot(*(reference.stderr(sequences_of(x)) for x in (first, second)))
    assert 30 * value["difference_stderr"] < unpaired
    assert value["difference_upper"] < 0 < value["difference"] + 2 * unpaired
    swapped = read(CrossEntropyDifference(input="losses"), second, first, target)
    assert swapped["difference"] == -value["difference"]
    assert swapped["difference_lower"] == -value["difference_upper"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_identical_models_do_not_differ(dtype: torch.dtype) -> None:
    """A model against itself differs by exactly 0, with no error, and has the ratio 1."""
    preds, target = torch.randn(ROWS, T, K).to(dtype), torch.randint(0, K, (ROWS, T))
    metric = CrossEntropyDifference()
    value = {name: x.item() for name, x in metric(preds, preds.clone(), target, weight=torch.rand(ROWS, T)).items()}
    expected = {name: float("ratio" in name) for name in value}
    assert value == expected
    assert {name: x.item() for name, x in metric.compute().items()} == expected


def test_differences_of_float32_losses_are_exact() -> None:
    """Losses in float32 are subtracted without rounding."""
    first, second = torch.rand(1000), 100 * torch.rand(1000)
    value = read(CrossEntropyDifference(input="losses"), first, second, torch.zeros(1000, dtype=torch.int64))
    exact = sum(Fraction(b) - Fraction(a) for a, b in zip(first.tolist(), second.tolist(), strict=True)) / 1000
    assert value["difference"] == float(exact)


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        (1.0, math.inf, math.inf),
        (math.inf, 1.0, -math.inf),
        (math.inf, math.inf, math.nan),
        (math.nan, 1.0, math.nan),
        (1.0, math.nan, math.nan),
    ],
)
def test_difference_of_infinite_losses(first: float, second: float, difference: float) -> None:
    """One infinite loss is an infinite difference, two are none; `omit` leaves their target out."""
    a, b = torch.tensor([1.0, first, 2.0]), torch.tensor([1.5, second, 4.0])
    batch = (a, b, torch.zeros(3, dtype=torch.int64))
    metric = CrossEntropyDifference(input="losses")
    ratio = {math.inf: math.inf, -math.inf: 0.0}.get(difference, math.nan)
    for value in (metric(*batch), metric.compute()):
        assert value["difference"].item() == pytest.approx(difference, nan_ok=True)
        assert value["perplexity_ratio"].item() == pytest.approx(ratio, nan_ok=True)
        assert value["difference_stderr"].isnan()
    omitted = read(CrossEntropyDifference(input="losses", nan_policy="omit"), *batch)
    assert omitted == pytest.approx(judge_difference((b - a)[::2, None].double(), None, 0.95), rel=1e-8)
    with pytest.raises(ValueError, match="nan_policy='raise'"):
        read(CrossEntropyDifference(input="losses", nan_policy="raise"), *batch)
