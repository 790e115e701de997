"""What torchmetrics' wrappers, its arithmetic and plots, and Lightning do with every class."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MetricTracker, MinMaxMetric, Running

from tests.cases import (
    CASES,
    SCALAR,
    Case,
    bits,
    filled,
    some_rows,
)
from tests.metrics.conformance import assert_close, each_state
from xent_metrics import CrossEntropy, GroupedCrossEntropy, Perplexity

# A number for a whole batch cannot be resampled.
RESAMPLED = {name: case for name, case in SCALAR.items() if case.data.get("extra") != "number"}
each_scalar_case = pytest.mark.parametrize("case", SCALAR.values(), ids=SCALAR)


@each_state
@pytest.mark.parametrize("call", ["update", "forward"])
def test_running(case: Case, call: str) -> None:
    """A window holds the pooled value of its last batches."""
    batches = case.batches() * 2
    running = Running(case.metric(), window=2)
    for before, batch in zip([None, *batches], batches, strict=False):
        getattr(running, call)(**batch)
        window = [x for x in (before, batch) if x is not None]
        assert bits(running.compute()) == bits(case.filled(*window).compute())
    running.reset()
    running.update(**batches[0])
    assert bits(running.compute()) == bits(case.filled(batches[0]).compute())


@each_state
def test_tracker(case: Case) -> None:
    """A tracker keeps every step, and its best is the lowest."""
    batches = case.batches()[:2]
    steps = [case.filled(batch).compute() for batch in batches]
    scalar = case in SCALAR.values()
    tracker = MetricTracker(case.metric()) if scalar else MetricTracker(case.metric(), maximize=False)
    for batch in batches:
        tracker.increment()
        tracker.update(**batch)
    every = tracker.compute_all()
    if isinstance(steps[0], dict):
        assert {name: bits(x) for name, x in every.items()} == {
            name: [float(step[name]).hex() for step in steps] for name in steps[0]
        }
    else:
        assert bits(every) == bits(torch.stack(steps))
    assert tracker.n_steps == 2
    if scalar:
        assert tracker.maximize is False
        best, index = tracker.best_metric(return_step=True)
        values = [step.item() for step in steps]
        assert (best, index) == (min(values), values.index(min(values)))


def test_one_group_is_a_vector() -> None:
    """The value of one group has the shape (1,), from `compute` as from `forward`."""
    metric = GroupedCrossEntropy(num_groups=1)
    batch = {**CASES["CrossEntropy"].batches()[1], "group": torch.zeros(4, 1, dtype=torch.int64)}
    assert metric(**batch).shape == (1,)
    assert metric.compute().shape == (1,)


@each_scalar_case
def test_min_max(case: Case) -> None:
    """Extremes are those of the values computed, from `update` as from `forward`."""
    batches = case.batches()
    extremes, seen = MinMaxMetric(case.metric()), []
    for i, batch in enumerate(batches):
        extremes.update(**batch)
        value = extremes.compute()
        seen.append(case.filled(*batches[: i + 1]).compute().item())
        assert {name: x.item() for name, x in value.items()} == {"raw": seen[-1], "max": max(seen), "min": min(seen)}
    extremes.reset()
    assert_close(extremes(**batches[2])["raw"], case.expected(batches[2]))


@pytest.mark.parametrize("case", RESAMPLED.values(), ids=RESAMPLED)
@pytest.mark.parametrize("call", ["update", "forward"])
def test_bootstrap(case: Case, call: str) -> None:
    """Bootstraps hold resampled sequences: of one sequence, the same again; of several, their mean and spread."""
    batches = case.batches()
    bootstrap = BootStrapper(case.metric(), num_bootstraps=3, raw=True, sampling_strategy="multinomial")
    getattr(bootstrap, call)(**batches[0])
    assert bits(bootstrap.compute()["raw"]) == bits(case.filled(batches[0]).compute().expand(3))
    getattr(bootstrap, call)(**batches[2])
    value = bootstrap.compute()
    each = torch.stack([metric.compute() for metric in bootstrap.metrics])
    assert bits(value["raw"]) == bits(each)
    assert len(set(each.tolist())) == 3
    assert value["mean"].item() == pytest.approx(each.mean().item())
    assert value["std"].item() == pytest.approx(each.std().item())
    losses = case.filled(batches[0], *(some_rows(batches[2], slice(i, i + 1)) for i in range(7))).compute()
    assert bits(losses) == bits(case.filled(batches[0], batches[2]).compute())


def test_quantiles_of_bootstraps() -> None:
    """They are asked for by a number, or by a tensor of the dtype of values; PyTorch refuses one of another."""
    quantiles = torch.tensor([0.1, 0.5], dtype=torch.float64)
    bootstrap = BootStrapper(Perplexity(), num_bootstraps=5, raw=True)
    bootstrap.update(**CASES["Perplexity"].batches()[2])
    for quantile in (quantiles, 0.5):
        bootstrap.quantile = quantile
        value = bootstrap.compute()
        assert bits(value["quantile"]) == bits(value["raw"].quantile(quantile))
    bootstrap.quantile = quantiles.float()
    with pytest.raises(RuntimeError, match="same dtype"):
        bootstrap.compute()


@pytest.mark.parametrize("num_groups", [2, 4])
def test_classwise(num_groups: int) -> None:
    """Groups may be given names."""
    case = CASES["GroupedCrossEntropy"]
    case = case._replace(options={"num_groups": num_groups})
    batches = [{**batch, "group": batch["group"] % num_groups} for batch in case.batches()]
    labels = [f"part {i}" for i in range(num_groups)]
    wrapper = ClasswiseWrapper(case.metric(), labels=labels, prefix="loss of ")
    value = wrapper(**batches[0])
    filled(wrapper, *batches[1:])
    assert list(value) == list(wrapper.compute()) == [f"loss of {label}" for label in labels]
    assert_close([*value.values()], case.expected(batches[0]))
    assert bits(next(iter(wrapper.compute().values()))) == bits(case.filled(*batches).compute()[0])
    assert_close([*wrapper.compute().values()], case.expected(*batches))


@each_scalar_case
def test_arithmetic(case: Case) -> None:
    """Metrics can be added, scaled and compared, with numbers and with each other, before they are updated."""
    batches = case.batches()
    value = case.filled(*batches).compute()
    two = torch.tensor(2.0, dtype=torch.float64)
    for make, expected in (
        (lambda a, b: a + b, 2 * value),
        (lambda a, b: a - b, 0 * value),
        (lambda a, b: a / b, value / value),
        (lambda a, b: a * 2.0 - 1, 2 * value - 1),
        (lambda a, b: two**a, 2**value),
        (lambda a, b: abs(-a), value.abs()),
        (lambda a, b: a < b, torch.tensor(False)),
    ):
        composed = make(case.metric(), case.metric())
        filled(composed, *batches)
        assert composed.compute().item() == pytest.approx(expected.item(), rel=1e-15)
        composed.reset()
        composed(**batches[0])
        filled(composed, *batches[1:])
        assert composed.compute().item() == pytest.approx(expected.item(), rel=1e-15)


def test_perplexity_is_two_to_the_power_of_bits() -> None:
    """Arithmetic on metrics gives metrics: 2 to the power of one is the other."""
    batches = CASES["Perplexity"].batches()
    composed = torch.tensor(2.0, dtype=torch.float64) ** CrossEntropy(unit="bits")
    value = filled(composed, *batches).compute()
    assert value.item() == pytest.approx(filled(Perplexity(), *batches).compute().item(), rel=1e-14)


@each_state
def test_plot(case: Case) -> None:
    """Every class plots its present value, one value, and a list of values, on given axes too."""
    metric = case.metric()
    history = [metric(**batch) for batch in case.batches()]
    for value in (None, history[0], history):
        figure, _ = metric.plot(value)
        assert figure is not None
        mpl.pyplot.close(figure)
    figure, axes = mpl.pyplot.subplots()
    metric.plot(ax=axes)
    assert axes.has_data()
    mpl.pyplot.close(figure)


class Logging(LightningModule):
    """Logs every scalar case by `self.log`, as metric objects."""

    def __init__(self, on_step: bool) -> None:
        """Hold a metric for each case and stage."""
        super().__init__()
        self.on_step = on_step
        self.metrics = nn.ModuleDict(
            {f"{stage} {name}": case.metric() for name, case in SCALAR.items() for stage in ("train", "val")}
        )
        self.batches = {name: case.batches() for name, case in SCALAR.items()}
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, index: Tensor, _: int) -> Tensor:
        """Call every metric."""
        for name, batches in self.batches.items():
            metric = self.metrics[f"train {name}"]
            metric(**batches[index])
            self.log(f"train {name}", metric, on_step=self.on_step, on_epoch=True)
        return self.weight.sum()

    def validation_step(self, index: Tensor, _: int) -> None:
        """Update every metric."""
        for name, batches in self.batches.items():
            metric = self.metrics[f"val {name}"]
            metric.update(**batches[index])
            self.log(f"val {name}", metric)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train the one weight."""
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("on_step", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_lightning_logs_metrics(precision: Any, on_step: bool) -> None:
    """`self.log` of a metric logs the value of the epoch, pooled, to the last bit and in any precision, and resets."""
    trainer = Trainer(
        fast_dev_run=3,
        accelerator="cpu",
        logger=False,
        precision=precision,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Logging(on_step)
    loader = torch.utils.data.DataLoader(range(3), batch_size=None)
    trainer.fit(module, loader, loader)
    logged = trainer.callback_metrics
    for name, case in SCALAR.items():
        expected = case.filled(*module.batches[name]).compute()
        assert bits(logged[f"val {name}"]) == bits(expected)
        assert bits(logged[f"train {name}_epoch" if on_step else f"train {name}"]) == bits(expected)
        if on_step:
            assert_close(logged[f"train {name}_step"], case.expected(module.batches[name][2]))
        assert module.metrics[f"train {name}"].update_count == 0
