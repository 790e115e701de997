"""What an error about a target advises is what helps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.metrics.bad_input import raised
from xent_metrics import BinaryCrossEntropy, CrossEntropy

K = 5
ADVICE: list[tuple[Any, Any, dict[str, Any], str]] = [
    (CrossEntropy, [0, -100], {"ignore_index": 0}, "pass weight=target != -100 as well if it marks"),
    (CrossEntropy, [1, -1], {}, "pass ignore_index=-1 if it marks"),
    (CrossEntropy, [1, -100], {"ignore_index": None}, "pass ignore_index=-100 if it marks"),
    (
        CrossEntropy,
        [1, 255],
        {},
        "pass ignore_index=255 if it marks targets to leave out, or check the vocabulary size",
    ),
    (CrossEntropy, [1, 255], {"ignore_index": 0}, "pass weight=target != 255 as well if it marks"),
    (CrossEntropy, [1, 7], {}, "check the vocabulary size"),
    (BinaryCrossEntropy, [1, 255], {}, "pass ignore_index=255 if it marks"),
    (BinaryCrossEntropy, [1.0, math.nan], {}, "mask them with weight=~target.isnan()"),
    (BinaryCrossEntropy, [1, 2], {}, "more than two classes go to CrossEntropy"),
]


@pytest.mark.parametrize(("metric", "target", "options", "advice"), ADVICE)
def test_advice(metric: Any, target: list[float], options: dict[str, Any], advice: str) -> None:
    """Marks of what is left out are known, and a mark that was chosen is not replaced by another one."""
    preds = torch.zeros(2, K) if metric is CrossEntropy else torch.zeros(2)
    message = raised(ValueError, lambda: metric(**options).update(preds, torch.tensor(target)))
    assert advice in message
