"""What `forward` reads of its batch."""

from __future__ import annotations

import math

import pytest
import torch

from tests.cases import CASES, Case, bits, numbers
from xent_metrics import CrossEntropy, CrossEntropyReport, GroupedCrossEntropy, NormalizedCrossEntropy
from xent_metrics.tally import GroupTally

EXACT = {name: case for name, case in CASES.items() if not isinstance(case.metric().tally, GroupTally)}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_forward_has_the_bits_of_compute(case: Case) -> None:
    """On the CPU the value of a batch is read exactly, but for groups, of which there may be very many."""
    for batch in case.batches(weighed=True):
        assert bits(case.metric()(**batch)) == bits(case.filled(batch).compute())


@pytest.mark.parametrize(
    "metric",
    [
        CrossEntropy(nan_policy="raise"),
        CrossEntropyReport(nan_policy="raise"),
        GroupedCrossEntropy(2, nan_policy="raise"),
        NormalizedCrossEntropy(2, nan_policy="raise"),
    ],
    ids=lambda metric: type(metric).__name__,
)
def test_forward_is_nan_where_compute_raises(metric: CrossEntropy) -> None:
    """A training loop goes on after a batch that `compute` will refuse, and the batch is kept."""
    batch = {"preds": torch.tensor([[0.0, math.nan], [1.0, 0.0]]), "target": torch.tensor([0, 1])}
    if isinstance(metric, GroupedCrossEntropy):
        batch["group"] = torch.tensor([0, 1])
    value = numbers(metric(**batch))
    assert all(math.isnan(x) for name, x in value.items() if not name.startswith("num_"))
    assert metric.update_count == 1
    with pytest.raises(ValueError, match="allows finite losses only"):
        metric.compute()
