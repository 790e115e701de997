"""The page of text at the end of a run."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xent_metrics.readings import ExactReading
from xent_metrics.tags import BOUNDS, Tag, parse_tag


def summarise(
    configuration: Mapping[str, Any],
    values: Mapping[str, float],
    counts: Mapping[str, ExactReading],
    num_repeated: int = 0,
    prefix: str = "",
) -> str:
    """Return a page of HTML: the last values of a run, how many targets they were read of, and its setup.

    HTML is what all loggers show: TensorBoard too, as a part of Markdown.

    Args:
        configuration: Names and values.
        values: The last values, by tag.
        counts: For each stage, a reading of all its targets.
        num_repeated: Number of samples of the last validation that were left out because another rank has them too.
        prefix: The text before all tags.
    """
    targets = [
        (stage, f"{reading.num_tokens:,}", f"{reading.num_ignored:,}", f"{reading.num_nonfinite:,}")
        for stage, reading in counts.items()
    ]
    settings = [(f"<code>{_escaped(name)}</code>", _escaped(str(value))) for name, value in configuration.items()]
    return "\n".join(
        (
            _table("What was reached, at the end", ("tag", "value", "interval"), _rows(values, prefix)),
            _table("What that is read of", ("targets of", "scored", "ignored", "of infinite or NaN loss"), targets),
            f"<p>Samples that ranks drew twice, left out of the last validation: {num_repeated:,}.</p>",
            _table("Configuration", ("name", "value"), settings),
        )
    )


def _rows(values: Mapping[str, float], prefix: str) -> list[tuple[str, str, str]]:
    """Return tag, value and interval of everything but the ends of intervals, which have no row of their own."""
    rows = []
    for tag, value in values.items():
        ours = parse_tag(tag, prefix)
        if ours is None or ours.name in BOUNDS:
            continue
        ends: list[float | None] = []
        unit = 1.0
        if ours.by is None:
            # No interval is logged in bits: it is that of the cross-entropy, in another unit.
            base, unit = ("cross_entropy", math.log(2)) if ours.name == "bits_per_token" else (ours.name, 1.0)
            ends = [values.get(Tag(ours.stage, f"{base}_{end}").text(prefix)) for end in ("lower", "upper")]
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        rows.append((f"<code>{tag}</code>", shown, " to ".join(f"{end / unit:.6g}" for end in ends if end is not None)))
    return rows


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table under a heading."""
    head, body = _row("th", header), "\n".join(_row("td", row) for row in rows)
    return f"<h2>{title}</h2>\n<table>\n<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _row(element: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{element}>{cell}</{element}>' for cell in cells)}</tr>"


def _escaped(text: str) -> str:
    """Return any text as HTML that reads as the text does, and names no picture or link for a browser to fetch."""
    lines = ("".join(map(_printable, line)) for line in text.splitlines())
    # In ASCII, as nothing says how a file is encoded.
    escaped = (html.escape(line).encode("ascii", "xmlcharrefreplace").decode() for line in lines)
    # Spaces that HTML would leave out: at an end, and next to others.
    return "<br>".join(re.sub("^ | (?= )| $", "&#160;", line) for line in escaped)


def _printable(character: str) -> str:
    """Return a character; one that cannot be printed, or is half of one, as Python writes it."""
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
