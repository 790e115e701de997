"""The surprisal page as a picture: text, each token on a colour that says how many bits it cost. A PNG file as bytes.

It is a grid of characters: wide ones take two cells, marks stand on the character before them. What no font has is
shown as its code point. Letters of Arabic are not joined; the HTML page joins them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple
from unicodedata import bidirectional, category, east_asian_width

from xent_metrics.page import PAGE_COLUMNS, PAGE_ROWS, Page, Piece, paragraphs

_CELL = (9, 19)  # Pixels of a character.
_MARGIN = 14
_HEAD = 74  # Pixels above the text, for the title and the scale.
_FONT_SIZE = 15
_NUM_COLOURS = 96  # A palette makes the file a third as large, and no colour is seen to change.
_SHOWN_AS = {"\n": "⏎", "\r": "␍", "\t": "→"}


def draw_page(page: Page, title: str, most: float) -> bytes:
    """Draw text with every token on a colour that says how many bits it cost; dark is hard.

    Args:
        page: The text. Each paragraph begins a line, and a grey line stands where a sequence begins.
        title: The line above the text.
        most: The bits from which on a token has the darkest colour.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415  # Installed with matplotlib, and needed only for drawing.

    lines = _break_lines(page)
    width, height = PAGE_COLUMNS * _CELL[0] + 2 * _MARGIN, _HEAD + len(lines) * _CELL[1] + _MARGIN
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    small = _font(_own_font(), _FONT_SIZE - 3)
    draw.text((_MARGIN, 8), title, font=small, fill="black")
    _draw_scale(draw, small, most)
    for row, line in enumerate(lines):
        x, y = _MARGIN, _HEAD + row * _CELL[1]
        for cell in _in_visual_order(line):
            _draw_cell(draw, x, y, cell, most)
            if cell.begins:
                draw.line((x - (x == _MARGIN) * 4, y, x - (x == _MARGIN) * 4, y + _CELL[1] - 1), fill="#7f7f7f")
            x += cell.width * _CELL[0]
    buffer = BytesIO()
    image.quantize(_NUM_COLOURS).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def surprisal_colour(share: float) -> tuple[int, int, int]:
    """Return a colour between white, orange and dark red; NaN and shares above 1 have the darkest."""
    stops = ((255, 255, 255), (254, 217, 142), (217, 95, 14), (110, 20, 10))
    share = 1.0 if math.isnan(share) else min(1.0, max(0.0, share))
    index = min(int(share * 3), 2)
    rest = share * 3 - index
    low, high = stops[index], stops[index + 1]
    return tuple(round(a + (b - a) * rest) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def is_dark(colour: tuple[int, int, int]) -> bool:
    """Return whether text on a colour must be white."""
    return sum(colour) < 380


class _Cell(NamedTuple):
    """A character with its marks, how many columns it takes, the bits of its piece, and whether a sequence begins."""

    text: str
    width: int
    bits: float
    begins: bool


def _break_lines(page: Page) -> list[list[_Cell]]:
    """Break the pieces of all sequences into lines, as many as fit on the picture."""
    lines: list[list[_Cell]] = []
    for paragraph in paragraphs(page):
        lines.append([])
        for sequence in paragraph:
            _add_sequence(lines, sequence)
        if len(lines) > PAGE_ROWS:
            break
    return [line for line in lines if line][:PAGE_ROWS]


def _add_sequence(lines: list[list[_Cell]], sequence: Sequence[Piece]) -> None:
    """Add a sequence to the last line, and to others after it."""
    begins = True
    for character, bits in ((character, piece.bits) for piece in sequence for character in piece.text):
        if category(character) in {"Mn", "Me", "Cf"}:  # A mark, or what joins characters.
            if lines[-1]:
                lines[-1][-1] = lines[-1][-1]._replace(text=lines[-1][-1].text + character)
            continue
        for shown, width in _shown(character):
            if sum(cell.width for cell in lines[-1]) + width > PAGE_COLUMNS:
                lines.append([])
            lines[-1].append(_Cell(shown, width, bits, begins))
            begins = False
        if character == "\n":
            lines.append([])


def _shown(character: str) -> list[tuple[str, int]]:
    """Return what is drawn of a character, and how many columns each part takes: itself, or its code point."""
    character = _SHOWN_AS.get(character, character)
    if _font_with(character) is None:
        return [(digit, 1) for digit in f"U+{ord(character):04X}"]
    return [(character, 2 if east_asian_width(character) in "WF" else 1)]


def _in_visual_order(line: list[_Cell]) -> list[_Cell]:
    """Turn what is written from right to left, and not the numbers in it."""
    letters, numbers = {"R", "AL"}, {"EN", "AN"}
    ordered: list[_Cell] = []
    for run in _runs(line, letters, letters | numbers, {"L"}):
        if bidirectional(run[0].text[0]) not in letters:
            ordered += run
            continue
        for part in _runs(run[::-1], numbers, numbers, letters | {"WS", "ON"}):
            ordered += part[::-1] if bidirectional(part[0].text[0]) in numbers else part
    return ordered


def _runs(line: list[_Cell], begin: set[str], end: set[str], outside: set[str]) -> Iterator[list[_Cell]]:
    """Cut a line into runs that begin and end with some kinds of characters and hold no others, and single cells."""
    kinds = [bidirectional(cell.text[0]) for cell in line]
    i = 0
    while i < len(line):
        stop = i + 1
        for j in range(i, len(line) if kinds[i] in begin else i):
            if kinds[j] in outside:
                break
            stop = j + 1 if kinds[j] in end else stop
        yield line[i:stop]
        i = stop


def _draw_cell(draw: Any, x: int, y: int, cell: _Cell, most: float) -> None:
    background = surprisal_colour(cell.bits / most)
    draw.rectangle((x, y, x + cell.width * _CELL[0] - 1, y + _CELL[1] - 1), fill=background)
    font = _font(_font_with(cell.text[0]) or _own_font(), _FONT_SIZE)
    # On one line whatever the font.
    draw.text((x, y + 14), cell.text, font=font, fill="white" if is_dark(background) else "black", anchor="ls")


def _draw_scale(draw: Any, font: Any, most: float) -> None:
    """Draw the colours from 0 bits to `most`, with figures."""
    left, top, length = _MARGIN, 32, 330
    for i in range(length):
        draw.line((left + i, top, left + i, top + 12), fill=surprisal_colour(i / length))
    draw.rectangle((left, top, left + length, top + 12), outline="#888888")
    every = max(1, math.ceil(most / 8))
    for bits in range(0, math.floor(most) + 1, every):
        draw.text((left + bits * length / most, top + 15), str(bits), font=font, fill="black", anchor="ma")
    for line, words in enumerate(("bits: light was expected, dark was a surprise", "| a sequence begins")):
        draw.text((left + length + 20, top - 4 + 18 * line), words, font=font, fill="black")


def _own_font() -> str:
    from matplotlib import get_data_path  # noqa: PLC0415  # Its own font of fixed width is on every machine.

    return f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf"


@lru_cache(maxsize=64)
def _font(path: str, size: int) -> Any:
    from PIL import ImageFont  # noqa: PLC0415

    return ImageFont.truetype(path, size)


@lru_cache(maxsize=4096)
def _font_with(character: str) -> str | None:
    """Return a font that has a character: our own, or one of the system; None if there is none."""
    from matplotlib.font_manager import fontManager  # noqa: PLC0415

    if ord(character) in _characters(_own_font()):
        return _own_font()
    paths = sorted({font.fname for font in fontManager.ttflist})
    return next((path for path in paths if ord(character) in _characters(path)), None)


@lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[int]:
    """Return the characters that can be drawn with a font: of pictures, such as emoji, none."""
    from matplotlib.ft2font import FT2Font  # noqa: PLC0415

    try:
        _font(path, _FONT_SIZE)
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # Such as a font of one size.
        return frozenset()
