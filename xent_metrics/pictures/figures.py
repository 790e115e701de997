"""Diagrams of validations: PNG files as bytes, drawn without pyplot, whose global state belongs to the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from xent_metrics.validation_stats import BINS_PER_BIT, MAX_BITS, LossHistogram, ValidationPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE = "#4c78a8"
_REFERENCE_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#e45756", "linestyle": "--"},
    {"color": "#f0a030", "linestyle": "-."},
)


def draw_distribution(histogram: LossHistogram, title: str, references: Mapping[str, float]) -> bytes:
    """Draw how many targets had which loss, with reference lines (names and bits)."""
    figure, axes = _figure(title)
    shares = histogram.shares()
    shown = max(8 * BINS_PER_BIT, 1 + max((i for i, share in enumerate(shares) if share > 0), default=0))
    edges = [i / BINS_PER_BIT for i in range(shown)]
    axes.bar(edges, shares[:shown], width=1 / BINS_PER_BIT, align="edge", color=_BLUE)
    axes.axvline(histogram.mean, color="#333333", linestyle=":", label=f"mean, {histogram.mean:.2f} bits")
    for (name, bits), style in zip(references.items(), _REFERENCE_STYLES, strict=False):
        axes.axvline(bits, label=f"{name}, {bits:.2f} bits", **style)
    beyond = f"; {MAX_BITS} or more in the last bar" if shares[-1] else ""
    axes.set_xlabel(f"loss of a target in bits (0: it was certain and right{beyond})")
    axes.set_ylabel("share of the targets")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.legend(frameon=False)
    return _png(figure)


def draw_positions(histogram: LossHistogram, title: str, references: Mapping[str, float]) -> bytes:
    """Draw the mean loss by position in the sequence, with reference lines (names and bits)."""
    figure, axes = _figure(title)
    positions, bits = histogram.by_position()
    axes.plot([position + 1 for position in positions], bits, color=_BLUE, marker="o", markersize=3)
    for (name, level), style in zip(references.items(), _REFERENCE_STYLES, strict=False):
        axes.axhline(level, label=f"{name}, {level:.2f} bits", **style)
    if references:
        axes.legend(frameon=False)
    if positions and positions[-1] > 128:
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the sequence (it falls where the model uses its context)")
    axes.set_ylabel("mean loss in bits")
    return _png(figure)


def draw_interval(history: Sequence[ValidationPoint], title: str) -> bytes:
    """Draw all validations with their intervals, at a scale at which the last ones can be told apart."""
    figure, axes = _figure(title)
    steps = [point.step for point in history]
    bits, lower, upper = ([getattr(point, name) for point in history] for name in ("bits", "lower", "upper"))
    axes.fill_between(steps, lower, upper, color=_BLUE, alpha=0.25, label="interval")
    axes.plot(steps, bits, color=_BLUE, marker="o", markersize=3, label="validation")
    # The first validation is of a model that knows nothing; a scale that shows it would press the others flat.
    late = history[len(history) // 3 :]
    low, high = min(point.lower for point in late), max(point.upper for point in late)
    axes.set_ylim(low - 0.1 * (high - low) - 1e-6, high + 0.1 * (high - low) + 1e-6)
    axes.set_xlabel("step (the first ones may lie above the picture)")
    axes.set_ylabel("mean loss in bits")
    axes.legend(frameon=False)
    return _png(figure)


def _figure(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # noqa: PLC0415  # Slow to import, and needed only for drawing.

    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
