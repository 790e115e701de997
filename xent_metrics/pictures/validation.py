"""All pictures of one validation, and its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from xent_metrics.page import Decode
from xent_metrics.pictures.figures import draw_distribution, draw_interval, draw_positions
from xent_metrics.pictures.surprisal import draw_page
from xent_metrics.pictures.surprisal_html import write_html
from xent_metrics.tags import UNIFORM
from xent_metrics.validation_stats import ValidationPoint, ValidationStats

_MOST_BITS = 10.0  # The darkest colour of the surprisal page, or the uniform line if that is lower.


def draw_validation(
    stats: ValidationStats,
    history: Sequence[ValidationPoint],
    references: Mapping[str, float],
    decode: Decode | None = None,
) -> tuple[dict[str, bytes], str | None]:
    """Draw the pictures of a validation; what it has nothing for is left out.

    Args:
        stats: Its statistics; the histogram is of all ranks together.
        history: Its result, after those of the validations before it.
        references: Names and bits of the reference lines.
        decode: Turns a list of tokens into text; None shows their numbers.

    Returns:
        PNG files by name: `distribution`, `by_position`, `interval`, `surprisal`; and the page of HTML.
    """
    caption = _caption(history[-1])
    lines = {name.partition("_")[0]: bits for name, bits in references.items()}
    pictures = {}
    if any(stats.histogram.shares()):  # Steps that return means have no losses of single targets.
        pictures["distribution"] = draw_distribution(stats.histogram, f"Losses: {caption}", lines)
    if len(stats.histogram.by_position()[0]) > 1:
        pictures["by_position"] = draw_positions(stats.histogram, f"By position: {caption}", lines)
    bounded = [point for point in history if math.isfinite(point.lower) and math.isfinite(point.upper)]
    if len(bounded) > 1:
        pictures["interval"] = draw_interval(bounded, f"Validation: {caption}")
    page = stats.page(decode)
    html = None
    if page:
        most = min(references.get(UNIFORM) or 8.0, _MOST_BITS)  # One class alone costs 0 bits.
        title = f"What each cost: {caption}"
        pictures["surprisal"], html = draw_page(page, title, most), write_html(page, title, most)
    return pictures, html


def _caption(point: ValidationPoint) -> str:
    """Return the result of a validation in words."""
    interval = "" if math.isnan(point.lower) else f" (interval {point.lower:.3f} to {point.upper:.3f})"
    return f"{point.bits:.3f} bits a target{interval}, step {point.step}"
