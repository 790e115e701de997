"""The surprisal page: text, each token on a colour that says how many bits it cost. A PNG file as bytes."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any, NamedTuple

from xent_metrics.validation_stats import PAGE_COLUMNS, PAGE_ROWS, Page

_CELL = (9, 19)  # Pixels of a character.
_MARGIN = 14
_HEAD = 74  # Pixels above the text, for the title and the scale.
_FONT_SIZE = 15
_NUM_COLOURS = 96  # A palette makes the file a third as large, and no colour is seen to change.


def draw_page(page: Page, title: str, most: float) -> bytes:
    """Draw text with every token on a colour that says how many bits it cost; dark is hard.

    Args:
        page: The text. A grey line stands where a sequence begins.
        title: The line above the text.
        most: The bits from which on a token has the darkest colour.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415  # Installed with matplotlib, and needed only for drawing.

    lines = _break_lines(page)
    width, height = PAGE_COLUMNS * _CELL[0] + 2 * _MARGIN, _HEAD + len(lines) * _CELL[1] + _MARGIN
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font, small = _font(_FONT_SIZE), _font(_FONT_SIZE - 3)
    draw.text((_MARGIN, 8), title, font=small, fill="black")
    _draw_scale(draw, small, most)
    for row, line in enumerate(lines):
        for column, cell in enumerate(line):
            _draw_cell(draw, font, _MARGIN + column * _CELL[0], _HEAD + row * _CELL[1], cell, most)
    buffer = BytesIO()
    image.quantize(_NUM_COLOURS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class _Cell(NamedTuple):
    """One character, the bits of its token, and whether a sequence begins with it."""

    character: str
    bits: float
    begins: bool


def _break_lines(page: Page) -> list[list[_Cell]]:
    """Break the tokens of all sequences into lines of single characters, as many lines as fit on a page."""
    drawable = _drawable_characters()
    lines: list[list[_Cell]] = [[]]
    for texts, costs in zip(page.texts, page.bits, strict=True):
        begins = True
        for character, bits in ((c, bits) for text, bits in zip(texts, costs, strict=True) for c in text):
            if len(lines[-1]) == PAGE_COLUMNS:
                lines.append([])
            shown = {"\n": "⏎", "\t": "→"}.get(character, character)
            lines[-1].append(_Cell(shown if ord(shown) in drawable else "□", bits, begins))
            begins = False
            if character == "\n":
                lines.append([])
        if len(lines) > PAGE_ROWS:
            break
    return [line for line in lines if line][:PAGE_ROWS]


def _draw_cell(draw: Any, font: Any, x: int, y: int, cell: _Cell, most: float) -> None:
    bottom, background = y + _CELL[1] - 1, _colour(cell.bits / most)
    draw.rectangle((x, y, x + _CELL[0] - 1, bottom), fill=background)
    draw.text((x, y), cell.character, font=font, fill="white" if sum(background) < 380 else "black")
    if cell.begins:
        draw.line((x, y, x, bottom), fill="#7f7f7f")


def _draw_scale(draw: Any, font: Any, most: float) -> None:
    """Draw the colours from 0 bits to `most`, with figures."""
    left, top, length = _MARGIN, 32, 330
    for i in range(length):
        draw.line((left + i, top, left + i, top + 12), fill=_colour(i / length))
    draw.rectangle((left, top, left + length, top + 12), outline="#888888")
    every = max(1, math.ceil(most / 8))
    for bits in range(0, math.floor(most) + 1, every):
        draw.text((left + bits * length / most, top + 15), str(bits), font=font, fill="black", anchor="ma")
    for line, words in enumerate(("bits: light was expected, dark was a surprise", "| a sequence begins")):
        draw.text((left + length + 20, top - 4 + 18 * line), words, font=font, fill="black")


def _colour(share: float) -> tuple[int, int, int]:
    """Return a colour between white, orange and dark red; NaN and shares above 1 have the darkest."""
    stops = ((255, 255, 255), (254, 217, 142), (217, 95, 14), (110, 20, 10))
    share = 1.0 if math.isnan(share) else min(1.0, max(0.0, share))
    index = min(int(share * 3), 2)
    rest = share * 3 - index
    low, high = stops[index], stops[index + 1]
    return tuple(round(a + (b - a) * rest) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def _font_path() -> str:
    from matplotlib import get_data_path  # noqa: PLC0415  # Its own font of fixed width is on every machine.

    return f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf"


def _font(size: int) -> Any:
    from PIL import ImageFont  # noqa: PLC0415

    return ImageFont.truetype(_font_path(), size)


def _drawable_characters() -> set[int]:
    from matplotlib.ft2font import FT2Font  # noqa: PLC0415

    return set(FT2Font(_font_path()).get_charmap())
