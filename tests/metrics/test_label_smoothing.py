"""Both conventions of label smoothing, and the way from one to the other."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import reference
from tests.metrics.quantities import ROWS, K, bits, filled, read, smoothed_row
from xent_metrics import CrossEntropy, functional


def test_label_smoothing_over_others() -> None:
    """Smoothing by 0.1 over three classes is `[0.9, 0.05, 0.05]`, which is PyTorch's 0.15."""
    preds, target = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    soft = torch.full((7, 3), 0.05, dtype=torch.float64)
    soft[torch.arange(7), target] = 0.9
    expected = F.cross_entropy(preds, soft).item()
    options: dict[str, Any] = {"label_smoothing": 0.1, "label_smoothing_over": "others"}
    assert read(CrossEntropy(**options), preds, target) == pytest.approx(expected, rel=1e-14)
    assert functional.cross_entropy(preds, target, **options).item() == pytest.approx(expected, rel=1e-14)
    assert F.cross_entropy(preds, target, label_smoothing=0.15).item() == pytest.approx(expected, rel=1e-14)
    losses = functional.per_target_losses(preds, target, **options)
    torch.testing.assert_close(losses, F.cross_entropy(preds, soft, reduction="none"))
    assert bits(functional.tally(preds, target, **options).state) == bits(
        filled(CrossEntropy(**options), [(preds, target)]).tally.state
    )


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("over", ["all", "others"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.75])
def test_both_conventions_are_their_soft_targets(share: float, over: str, weighed: bool) -> None:
    """A smoothed class costs what its distribution costs, written out, with class weights too."""
    preds, target = torch.randn(ROWS, K, dtype=torch.float64), torch.randint(0, K, (ROWS,))
    class_weight = torch.rand(K, dtype=torch.float64) if weighed else None
    options: dict[str, Any] = {"label_smoothing": share, "label_smoothing_over": over}
    losses = functional.per_target_losses(preds, target, class_weight=class_weight, **options)
    rows = [smoothed_row(y, share, K, over) for y in target.tolist()]
    judged = [
        reference.target_loss(reference.log_softmax(q), p, class_weight=class_weight.tolist() if weighed else None)
        for q, p in zip(preds.tolist(), rows, strict=True)
    ]
    assert losses.tolist() == pytest.approx(judged, rel=1e-13)
    value = read(CrossEntropy(class_weight=class_weight, **options), preds, target)
    all_classes = share if over == "all" else functional.convert_label_smoothing(share, K)
    expected = F.cross_entropy(preds, target, class_weight, label_smoothing=all_classes).item()
    assert value == pytest.approx(expected, rel=1e-13)
    one_hot = F.one_hot(target, K).double()
    assert read(CrossEntropy(**options), preds, one_hot) == pytest.approx(
        F.cross_entropy(preds, torch.tensor(rows, dtype=torch.float64)).item(), rel=1e-13
    )


@pytest.mark.parametrize("num_classes", [2, 3, 7, 10, 49, 1000, 128256])
def test_convert_label_smoothing(num_classes: int) -> None:
    """The converted share is the rational `b K / (K - 1)` to the last bits, up to 1, and not beyond."""
    bound = (num_classes - 1) / num_classes
    for share in (0.0, 1e-300, 0.1, 0.25, 1 / 3, 0.5, bound):
        if share <= bound:
            value = functional.convert_label_smoothing(share, num_classes)
            exact = Fraction(share) * num_classes / (num_classes - 1)
            assert abs(Fraction(value) - exact) <= exact * Fraction(1, 2**52)
            assert value <= 1.0
    for share in (math.nextafter(bound, 2), 1.0):
        with pytest.raises(ValueError, match="at most"):
            functional.convert_label_smoothing(share, num_classes)


def test_convert_label_smoothing_at_the_edges() -> None:
    """With one class there is nothing to spread over; what is no share is refused."""
    assert functional.convert_label_smoothing(0, 1) == 0.0
    for share in (0.1, 1.0, 1e-300):
        with pytest.raises(ValueError, match="at most"):
            functional.convert_label_smoothing(share, 1)
    for bad in (-0.1, 1.1, math.nan, True, "0.1"):
        with pytest.raises(ValueError, match="`label_smoothing` must be a number"):
            functional.convert_label_smoothing(bad, 3)
    options: dict[str, Any] = {"label_smoothing": 2 / 3, "label_smoothing_over": "others"}
    losses = functional.per_target_losses(torch.tensor([[1.0, 2.0, 4.0]]).expand(3, 3), torch.arange(3), **options)
    assert losses.tolist() == pytest.approx([losses[0].item()] * 3)  # The target is uniform.
    with pytest.raises(ValueError, match="at most"):
        functional.per_target_losses(torch.zeros(1, 2), torch.tensor([0]), **options)
    with pytest.raises(ValueError, match="`label_smoothing_over` must be one of"):
        CrossEntropy(label_smoothing_over="other")
