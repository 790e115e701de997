"""Metrics are left out of `torch.jit.script`, as torchmetrics' own are, and are not in the way of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tests.cases import CASES, Case, bits, filled
from xent_metrics import CrossEntropy

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # Of PyTorch, about all of this.
    pytest.mark.filterwarnings("ignore:.*to_torchscript` has been deprecated"),  # Of Lightning.
    pytest.mark.filterwarnings("ignore:This property will be removed:DeprecationWarning"),  # Of torchmetrics' own.
]
ONE_OF_EACH_CLASS = {case.metric_class.__name__: case for case in CASES.values()}
each_class = pytest.mark.parametrize("case", ONE_OF_EACH_CLASS.values(), ids=ONE_OF_EACH_CLASS)


class Module(LightningModule):
    """A layer, and metrics that its steps update."""

    def __init__(self, metrics: nn.Module) -> None:
        """Hold both."""
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.metrics = metrics
        self.example_input_array = torch.ones(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return self.layer(x)

    def training_step(self, batch: Any, _: int) -> None:
        """Update the metrics."""
        self.metrics(**batch)


@each_class
def test_metrics_are_scripted(case: Case) -> None:
    """By itself or in a Lightning module, which stays what it was; and the metric goes on."""
    metric, batches, x = case.metric(), case.batches(), torch.randn(4, 3)
    torch.jit.script(metric)
    module = Module(metric)
    assert torch.equal(module.to_torchscript()(x), module(x))
    module.training_step(batches[0], 0)
    assert bits(filled(metric, *batches[1:]).compute()) == bits(case.filled(*batches).compute())


@pytest.mark.parametrize("hold", [lambda x: nn.ModuleDict({"x": x}), MetricCollection])
def test_what_holds_a_metric_is_scripted(hold: Any) -> None:
    """A container or a collection of metrics is no more in the way, also of a trace."""
    module, x = Module(hold(CrossEntropy())), torch.randn(4, 3)
    for method in ("script", "trace"):
        assert torch.equal(module.to_torchscript(method=method)(x), module(x))
