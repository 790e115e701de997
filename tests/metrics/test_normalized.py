"""Cross-entropy over the entropy of the classes seen, judged by torcheval and by plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from torcheval.metrics import BinaryNormalizedEntropy

from tests import reference
from tests.metrics.quantities import ROWS, T, filled, losses_of, ragged, read
from xent_metrics import NormalizedCrossEntropy, functional


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("rate", [0.5, 0.1, 0.002])
def test_normalized_is_torchevals(rate: float, weighed: bool) -> None:
    """With two columns `[0, x]` the value is torcheval's normalized entropy."""
    x, y = torch.randn(3000, dtype=torch.float64) - 2, torch.rand(3000) < rate
    weight = torch.rand(3000, dtype=torch.float64) if weighed else None
    columns = torch.stack([torch.zeros_like(x), x], -1)
    metric, judge = NormalizedCrossEntropy(2), BinaryNormalizedEntropy(from_logits=True)
    for some, columns_of, labels, weights in ragged(x, columns, y, weight):
        metric.update(columns_of, labels.long(), weight=weights)
        if len(some):
            judge.update(some, labels.double(), weight=weights)
    assert metric.compute().item() == pytest.approx(judge.compute().item(), rel=1e-10)
    one_pass = functional.normalized_cross_entropy(columns, y.long(), weight=weight, num_classes=2)
    assert one_pass.item() == pytest.approx(judge.compute().item(), rel=1e-10)


@pytest.mark.parametrize("weighed", ["", "full", "column", "mask"])
@pytest.mark.parametrize("num_classes", [2, 5, 300])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_normalized_of_many_classes(class_dim: int, num_classes: int, weighed: str) -> None:
    """The value is cross-entropy over the entropy of the classes seen, by weight, those not seen adding nothing."""
    preds = torch.randn(ROWS, T, num_classes, dtype=torch.float64)
    target = torch.randint(0, num_classes, (ROWS, T)).masked_fill(torch.rand(ROWS, T) < 0.2, -100)
    weight = {
        "": None,
        "full": torch.rand(ROWS, T, dtype=torch.float64),
        "column": torch.rand(ROWS, 1, dtype=torch.float64),
        "mask": torch.rand(ROWS, T) < 0.7,
    }[weighed]
    weights = (target >= 0) * (1.0 if weight is None else weight.expand(ROWS, T).double())
    nats = (losses_of(preds, target) * weights).sum() / weights.sum()
    frequencies = [weights[target == k].sum().item() for k in range(num_classes)]
    expected = reference.normalized_cross_entropy(nats.item(), frequencies)
    metric = NormalizedCrossEntropy(num_classes, class_dim=class_dim)
    filled(metric, ragged(preds.movedim(-1, class_dim), target, weight))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)
    one_pass = NormalizedCrossEntropy(num_classes, class_dim=class_dim)(
        preds.movedim(-1, class_dim), target, weight=weight
    )
    assert one_pass.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [[1, 1], [3, 1], [999_999, 1], [5, 0, 2, 13]])
def test_the_base_rate_is_one(counts: list[int]) -> None:
    """A model that knows the base rate and nothing else reads 1, however rare a class is."""
    frequencies = torch.tensor(counts, dtype=torch.float64)
    target = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    preds = (frequencies / frequencies.sum()).expand(len(target), -1)
    assert read(NormalizedCrossEntropy(len(counts), input="probs"), preds, target) == pytest.approx(1.0, rel=1e-11)


def test_normalized_without_a_choice() -> None:
    """One class seen has no entropy, and no target has no value; a second class heals both."""
    preds = torch.randn(4, 3, dtype=torch.float64)
    metric = NormalizedCrossEntropy(3)
    for target in ([-100] * 4, [1, 1, 1, -100], [1, 1, 1, 1]):
        assert metric(preds, torch.tensor(target)).isnan()
        assert metric.compute().isnan()
    assert metric(preds, torch.tensor([1, 1, 1, 2]), weight=torch.tensor([1.0, 1.0, 1.0, 0.0])).isnan()
    value = read(metric, preds, torch.tensor([2, 1, 0, 0]))
    assert math.isfinite(value)
    frequencies = [2, 3 + 4 + 3 + 1, 1]
    losses = [losses_of(preds, torch.tensor(x)) for x in ([1] * 3 + [-100], [1] * 4, [1] * 3 + [-100], [2, 1, 0, 0])]
    nats = torch.cat(losses).sum().item() / sum(frequencies)
    assert value == pytest.approx(reference.normalized_cross_entropy(nats, frequencies), rel=1e-13)


@pytest.mark.parametrize("losses", [[1.0, 2.0, math.inf, 3.0], [1.0, 2.0, 3.0, math.inf]])
def test_normalized_with_an_infinite_loss(losses: list[float]) -> None:
    """An infinite loss is an infinite ratio; left out, its target is in no frequency either."""
    preds, target = torch.tensor(losses), torch.tensor([0, 1, 0, 2])
    metric = NormalizedCrossEntropy(3, input="losses")
    assert read(metric, preds, target) == metric(preds, target).item() == math.inf
    kept = preds.isfinite()
    seen = torch.bincount(target[kept], minlength=3).tolist()
    expected = reference.normalized_cross_entropy(2.0, seen)
    omitting = NormalizedCrossEntropy(3, input="losses", nan_policy="omit")
    assert read(omitting, preds, target) == pytest.approx(expected, rel=1e-13)
    with pytest.raises(ValueError, match="nan_policy='raise'"):
        read(NormalizedCrossEntropy(3, input="losses", nan_policy="raise"), preds, target)


def test_normalized_with_a_class_of_infinite_losses() -> None:
    """A class of which every loss is infinite was seen all the same: the ratio is infinite."""
    metric = NormalizedCrossEntropy(2, input="losses")
    batch = (torch.tensor([1.0, 2.0, math.inf]), torch.tensor([0, 0, 1]))
    assert [metric(*batch).item(), metric.compute().item()] == [math.inf, math.inf]
