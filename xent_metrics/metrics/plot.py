"""Figures of values: of one, or of several one after another. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b")
_MOST_BARS = 24  # More groups than these, such as positions, are points of a line.


def plot_values(
    val: Any,
    ax: Any,
    *,
    label: str,
    confidence: float,
    group_names: Sequence[str] | None = None,
    has_zero: bool = False,
) -> tuple[Any, Any]:
    """Draw values of a metric, and return figure and axes.

    Args:
        val: A value, or a list of values, each a step. A value is a scalar; a vector, of which each entry is a group's;
            or a dict of scalars, of which those with an interval are drawn, or all if none has one.
        ax: Where to draw; None for a new figure.
        label: Of the axis of values, with its unit.
        confidence: That of the intervals.
        group_names: Of the entries of a vector; None numbers them.
        has_zero: Whether to draw a line at 0.

    Raises:
        TypeError: If `val` is nothing of that kind.
        ValueError: If a group has no name of its own.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415  # Slow to import, and needed only for drawing.
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    values = list(val) if isinstance(val, (list, tuple)) else [val]
    kind = _kind(values)
    if kind == "vector":
        group_names = _checked_names(group_names, values)
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
        ax.spines[["top", "right"]].set_visible(False)
    if has_zero:
        ax.axhline(0.0, color="#888888", linewidth=1, linestyle="--")
    ax.set_ylabel(label)
    curves = _curves(kind, values, group_names)
    if len(values) == 1 and (kind == "vector" or len(curves) > 1):
        _draw_bars(ax, {name: points[0][0] for name, points in curves.items()})
        return ax.figure, ax
    for i, (name, points) in enumerate(curves.items()):
        _draw_curve(ax, name, points, _COLOURS[i % len(_COLOURS)], f"{100 * confidence:g} % interval")
    if len(values) == 1:
        ax.set_xticks([])
        ax.set_xlim(-1, 1)
    else:
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(frameon=False)
    return ax.figure, ax


def _kind(values: list[Any]) -> str:
    """Return which kind of value these are: `"dict"`, `"vector"` or `"scalar"`."""
    kinds = {
        "dict" if isinstance(value, Mapping) else ("vector" if value.dim() == 1 else "scalar")
        for value in values
        if isinstance(value, Mapping) or (isinstance(value, Tensor) and value.dim() < 2)
    }
    if len(kinds) != 1 or any(not isinstance(value, (Mapping, Tensor)) for value in values):
        found = ", ".join(sorted({type(value).__name__ for value in values})) or "an empty list"
        raise TypeError(
            f"`val` must be what `forward` or `compute` returned, or a list of that, got {found}; pass None for the "
            "present value."
        )
    return kinds.pop()


def _checked_names(group_names: Sequence[str] | None, values: list[Any]) -> Sequence[str]:
    """Return a name of its own for each group."""
    num_groups = len(values[0])
    if group_names is None:
        return [str(group) for group in range(num_groups)]
    if len(set(group_names)) != num_groups or len(group_names) != num_groups:
        raise ValueError(
            f"`group_names` must have a name of its own for each of {num_groups} groups, got {list(group_names)}; name "
            "all of them, also those without targets."
        )
    return group_names


Points = list[tuple[float, ...]]
"""What a curve goes through, for each step: a value, or a value with the two ends of its interval."""


def _curves(kind: str, values: list[Any], group_names: Sequence[str] | None) -> dict[str, Points]:
    """Return the curves of values by name; one that needs no name is called `value`."""
    if kind == "scalar":
        return {"value": [(float(value),) for value in values]}
    if kind == "vector":
        rows = [torch.as_tensor(value).tolist() for value in values]
        return {name: [(row[i],) for row in rows] for i, name in enumerate(group_names or ())}
    bounded = [name for name in values[0] if f"{name}_lower" in values[0]]
    if bounded:  # The first one: another has another unit.
        names = [bounded[0], f"{bounded[0]}_lower", f"{bounded[0]}_upper"]
        return {bounded[0]: [tuple(float(value[name]) for name in names) for value in values]}
    return {name: [(float(value[name]),) for value in values] for name in values[0]}


def _draw_curve(ax: Any, name: str, points: Points, colour: str, interval: str) -> None:
    """Draw one curve: points for single steps, and a band or a bar for intervals."""
    steps, middle = range(len(points)), [point[0] for point in points]
    if len(points[0]) == 3:
        lower, upper = ([point[i] for point in points] for i in (1, 2))
        if len(points) > 1:
            ax.fill_between(steps, lower, upper, color=colour, alpha=0.25, linewidth=0, label=interval)
        else:
            ax.vlines(steps, lower, upper, color=colour, alpha=0.4, linewidth=8, label=interval)
    ax.plot(steps, middle, color=colour, marker="o", markersize=4 if len(points) < 50 else 0, label=name)


def _draw_bars(ax: Any, heights: Mapping[str, float]) -> None:
    """Draw a named bar for each value, or a line where there are too many."""
    places = range(len(heights))
    if len(heights) > _MOST_BARS:
        ax.plot(places, heights.values(), color=_COLOURS[0], linewidth=1.2)
        ax.set_xlabel("group")
        return
    ax.bar(
        places, [height if math.isfinite(height) else 0.0 for height in heights.values()], color=_COLOURS[0], width=0.7
    )
    turned = max(map(len, heights)) * len(heights) > 60
    ax.set_xticks(places, list(heights), rotation=45 if turned else 0, ha="right" if turned else "center")
    for place, height in zip(places, heights.values(), strict=True):
        if not math.isfinite(height):
            ax.text(place, 0, str(height), ha="center", va="bottom", color="#888888")
