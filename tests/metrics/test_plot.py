"""What the figures of values show: units, intervals, names of groups, and nothing that is not there."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt

from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    Perplexity,
)

mpl.use("Agg")


@pytest.fixture(name="axes")
def _axes() -> Any:
    """Return axes to draw on."""
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and targets of some sequences."""
    return torch.randn(size, 4, 9), torch.randint(9, (size, 4))


def curve(axes: Any, label: str) -> list[tuple[float, float]]:
    """Return the points of a curve by its label."""
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return list(zip(*map(list, line.get_data()), strict=True))


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        (CrossEntropy(), "cross-entropy (nats per target)"),
        (CrossEntropy(unit="bits"), "cross-entropy (bits per target)"),
        (BinaryCrossEntropy(unit="bits"), "binary cross-entropy (bits per target)"),
        (BitsPerToken(), "bits per token"),
        (Perplexity(), "perplexity"),
        (CrossEntropyReport(), "cross-entropy (nats per target)"),
        (CrossEntropyDifference(), "cross-entropy of b less a (nats per target)"),
    ],
)
def test_the_axis_has_a_unit(metric: Any, label: str, axes: Any) -> None:
    """It is that of the values that are drawn."""
    scores, target = batch()
    if isinstance(metric, BinaryCrossEntropy):
        metric.update(scores, (scores > 0).float())
    else:
        metric.update(*[scores] * (1 + isinstance(metric, CrossEntropyDifference)), target)
    metric.plot(ax=axes)
    assert axes.get_ylabel() == label
    assert axes.get_xlabel() == ""


@pytest.mark.parametrize("value", [torch.tensor(3.0), {"a": torch.tensor(1.0), "b": torch.tensor([2.0, 3.0])}])
def test_the_axis_claims_no_unit_of_a_compute_of_the_users_own(value: Any, axes: Any) -> None:
    """Whatever it returns is drawn as torchmetrics draws it."""

    class Own(CrossEntropy):
        def compute(self) -> Any:
            return value

    metric = Own()
    metric.update(*batch())
    metric.plot(ax=axes)
    metric.plot([value, value])
    plt.close()
    assert "nats" not in axes.get_ylabel()
    assert axes.lines


def test_steps_are_drawn_on_axes_with_ticks_of_their_own(axes: Any) -> None:
    """Such as those of a single value, or of a logarithmic scale."""
    metric = CrossEntropy()
    metric.update(*batch())
    metric.plot(ax=axes)
    metric.plot([metric.compute()] * 3, ax=axes)
    axes.set_xscale("log")
    metric.plot([metric.compute()] * 3, ax=axes)
    assert [len(line.get_xdata()) for line in axes.lines] == [1, 3, 3]


def test_several_values_are_steps_with_a_band(axes: Any) -> None:
    """The curve goes through the cross-entropies, and the band is their interval."""
    metric = CrossEntropyReport(confidence=0.9)
    history = [metric(*batch()) for _ in range(3)]
    metric.plot(history, ax=axes)
    assert curve(axes, "cross_entropy") == [(i, value["cross_entropy"].item()) for i, value in enumerate(history)]
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}
    for step, value in enumerate(history):
        assert {(step, value["cross_entropy_lower"].item()), (step, value["cross_entropy_upper"].item())} <= corners
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["90 % interval", "cross_entropy"]
    assert axes.get_xlabel() == "step"


def test_one_value_has_a_bar_for_its_interval(axes: Any) -> None:
    """It goes from the lower end to the upper one; a difference is drawn beside 0."""
    metric = CrossEntropyDifference()
    scores, target = batch()
    metric.update(scores, scores + 0.1 * torch.randn_like(scores), target)
    metric.plot(ax=axes)
    value = metric.compute()
    ((low, high),) = axes.collections[0].get_segments()
    assert [low[1], high[1]] == [value["difference_lower"].item(), value["difference_upper"].item()]
    assert [0.0, 0.0] in [list(line.get_ydata()) for line in axes.lines]


def test_an_interval_that_is_not_there_is_not_drawn(axes: Any) -> None:
    """One sequence has none."""
    metric = CrossEntropyReport()
    metric.plot([metric(*batch(1)), metric(*batch(1))], ax=axes)
    assert all(len(path.vertices) == 0 for path in axes.collections[0].get_paths())
    assert len(curve(axes, "cross_entropy")) == 2


def grouped(num_groups: int = 4) -> GroupedCrossEntropy:
    """Return values of groups; that of group 2 has no targets."""
    metric = GroupedCrossEntropy(num_groups)
    metric.update(*batch(), group=torch.tensor([0, 1, 3, 0, 1, 3])[:, None])
    return metric


def test_groups_are_bars_with_names(axes: Any) -> None:
    """Each bar is as high as its value; a group without targets says so in place of a bar."""
    metric = grouped()
    metric.plot(ax=axes, group_names=["web", "books", "code", "wiki"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["web", "books", "code", "wiki"]
    expected = [0.0 if math.isnan(x) else x for x in metric.compute().tolist()]
    assert [bar.get_height() for bar in axes.patches] == expected
    assert [(text.get_text(), text.get_position()[0]) for text in axes.texts] == [("nan", 2)]


def test_groups_over_steps_are_curves_with_names(axes: Any) -> None:
    """One curve for each group; without names they have numbers."""
    metric = grouped()
    value = metric.compute()
    metric.plot([value, value + 1], ax=axes)
    assert curve(axes, "3") == [(0, value[3].item()), (1, value[3].item() + 1)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1", "2", "3"]


def test_many_groups_are_a_line(axes: Any) -> None:
    """A thousand bars with names cannot be read."""
    metric = GroupedCrossEntropy(100)
    metric.update(torch.randn(2, 100, 9), torch.randint(9, (2, 100)), group=torch.arange(100))
    metric.plot(ax=axes)
    assert list(axes.lines[0].get_ydata()) == metric.compute().tolist()
    assert not axes.patches


def test_readings_without_an_interval_are_all_drawn(axes: Any) -> None:
    """A bar for each."""
    metric = CrossEntropyDecomposition(label_smoothing=0.1)
    metric.update(*batch())
    metric.plot(ax=axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cross_entropy", "entropy", "kl_divergence"]
    assert [bar.get_height() for bar in axes.patches] == [value.item() for value in metric.compute().values()]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c", "c"], []])
def test_each_group_needs_a_name_of_its_own(names: list[str]) -> None:
    """Otherwise a curve would have that of another."""
    with pytest.raises(ValueError, match="`group_names` must have a name of its own for each of 4 groups, got"):
        grouped().plot(group_names=names)


@pytest.mark.parametrize(("value", "found"), [("nonsense", "str"), ([1.0], "float"), ([], "an empty list")])
def test_what_is_no_value_is_refused(value: Any, found: str) -> None:
    """The error says what it is."""
    with pytest.raises(TypeError, match=f"`val` must be what `forward` or `compute` returned.*got {found};"):
        CrossEntropy().plot(value)
