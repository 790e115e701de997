"""The page of text at the end of a run."""

from __future__ import annotations

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
    """Return a page of Markdown: the setup of a run, its last values, and how many targets they were read of.

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
            f"Samples that ranks drew twice, left out of the last validation: {num_repeated:,}.\n",
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
        rows.append((f"`{tag}`", shown, " to ".join(f"{end / unit:.6g}" for end in ends if end is not None)))
    return rows


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table under a heading."""
    lines = (" | ".join(cells) for cells in (header, ["---"] * len(header), *rows))
    return f"## {title}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def _escaped(text: str) -> str:
    """Return any text as Markdown that reads as the text does: TensorBoard would fetch a picture that it names."""
    lines = ("".join(map(_escaped_character, line)) for line in text.splitlines())
    # Spaces that HTML would leave out: at an end, and next to others.
    return "<br>".join(re.sub("^ | (?= )| $", "&#160;", line) for line in lines)


def _escaped_character(character: str) -> str:
    """Return a character as Markdown and HTML in which it stands for nothing else."""
    if character.isalnum() or character in " .,-":
        return character
    # What cannot be printed, or is half a character, as Python writes it.
    shown = character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
    return "".join(f"&#{ord(each)};" for each in shown)
