"""What a call costs, as numbers of operators, which do not depend on the machine or on what else runs on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.cases import named
from tests.instruments import Operators
from xent_metrics import BinaryCrossEntropy, CrossEntropy, CrossEntropyReport, GroupedCrossEntropy

VIEWS = [
    "t",
    "view",
    "select",
    "slice",
    "unsqueeze",
    "squeeze",
    "permute",
    "transpose",
    "unbind",
    "detach",
    "alias",
    "expand",
    "split",
]
BATCH = torch.randn(2, 8, 50), torch.randint(0, 50, (2, 8))
PADDED = BATCH[0], BATCH[1].where(torch.arange(8) < 6, -100)


def operators_of(call: Callable[[], object], operators: Operators) -> int:
    """Count the operators of the second call, views apart; the first one looks at what `preds` look like."""
    call()
    operators.counts.clear()
    with operators:
        call()
    return sum(name.split(".")[1].strip("_") not in VIEWS for name in operators.counts.elements())


def test_update_of_a_small_batch(operators: Operators) -> None:
    """The losses are some ten operators, and a few targets are tallied as Python integers."""
    report = CrossEntropyReport()
    assert operators_of(lambda: report.update(*BATCH), operators) <= 16
    assert operators_of(lambda: report.update(*BATCH, weight=torch.ones(2, 8)), operators) <= 22
    assert operators_of(lambda: report.update(*PADDED), operators) <= 28


def test_forward_of_a_small_batch(operators: Operators) -> None:
    """The value of a batch costs no more operators than making tensors of its readings."""
    report = CrossEntropyReport()
    assert operators_of(lambda: report(*BATCH), operators) <= 18


@pytest.mark.usefixtures("hidden_values")
def test_update_of_a_small_batch_elsewhere(operators: Operators) -> None:
    """On an accelerator, where each operator is a kernel to start, there are some more."""
    report = CrossEntropyReport()
    assert operators_of(lambda: report.update(*BATCH), operators) <= 60
    assert operators_of(lambda: report(*BATCH), operators) <= 118


@pytest.mark.parametrize(
    ("metric", "batch", "most"),
    [
        (CrossEntropyReport(input="losses"), (torch.rand(64, 1024), torch.zeros(64, 1024, dtype=torch.int64)), 45),
        (BinaryCrossEntropy(), (torch.randn(64, 32), torch.zeros(64, 32)), 59),
        (CrossEntropy(), (torch.randn(256, 4000), torch.zeros(256, dtype=torch.int64)), 77),
        (GroupedCrossEntropy(3), (*BATCH, torch.zeros(2, 8, dtype=torch.int64)), 57),
    ],
    ids=["losses", "binary", "two blocks of rows", "groups"],
)
def test_update(metric: CrossEntropy, batch: tuple[Tensor, ...], most: int, operators: Operators) -> None:
    """Other metrics and sizes are not far from that."""
    assert operators_of(lambda: metric.update(**named(metric.update, *batch)), operators) <= most
