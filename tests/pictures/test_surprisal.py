"""The picture of the page and its HTML: colours, lines, scripts, and what no font has."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from xent_metrics.page import Page, Piece
from xent_metrics.pictures import surprisal
from xent_metrics.pictures.surprisal import draw_page
from xent_metrics.pictures.surprisal_html import write_html


def page_of(*sequences: list[tuple[str, float]]) -> Page:
    """Return a page of texts and bits."""
    return [[Piece(text, bits, (i,)) for i, (text, bits) in enumerate(sequence)] for sequence in sequences]


def drawn(page: Page) -> Image.Image:
    """Draw a page, and read it back."""
    image = Image.open(BytesIO(draw_page(page, "A title", most=8.0)))
    return image.convert("RGB")


def colour_at(image: Image.Image, row: int, column: int) -> tuple[int, ...]:
    """Return the colour in a corner of a character's cell, where no glyph reaches."""
    return image.getpixel((14 + 9 * column + 8, 74 + 19 * row))  # type: ignore[return-value]


WHITE = (255, 255, 255)


def test_the_page_is_darker_where_a_token_cost_more() -> None:
    """Every character has its token's colour: white at 0, darkest at the end of the scale and beyond."""
    image = drawn(page_of([("ab", 0.0), ("c", 4.0), ("d", 8.0), ("e", 99.0)]))
    colours = [sum(colour_at(image, 0, column)) for column in range(5)]
    assert colours[0] == colours[1] == 3 * 255
    assert colours[0] > colours[2] > colours[3] == colours[4]


def test_lines_end_where_the_text_does_and_where_they_are_full() -> None:
    """A newline is shown, and ends the line; a long line goes on in the next; each paragraph begins one."""
    image = drawn(page_of([("x", 8.0), ("\n", 8.0), ("y" * 100, 8.0)], [("z", 8.0)], [("z", 8.0)] * 4))
    dark = colour_at(image, 0, 0)
    assert (colour_at(image, 0, 1), colour_at(image, 0, 2)) == (dark, WHITE)  # The newline, and the end.
    assert (colour_at(image, 1, 87), colour_at(image, 2, 11), colour_at(image, 2, 12)) == (dark, dark, WHITE)
    assert (colour_at(image, 3, 0), colour_at(image, 3, 1)) == (dark, WHITE)
    assert image.height == 74 + 5 * 19 + 14


def test_full_windows_run_on() -> None:
    """What follows one stands in its line, behind a grey line; what follows a shorter one begins a line."""
    full, short = [("a", 8.0), ("b", 0.0)], [("c", 8.0)]
    page = page_of(full, full, short, short)
    lines = surprisal._break_lines(page)
    assert ["".join(cell.text for cell in line) for line in lines] == ["ababc", "c"]
    assert [cell.begins for line in lines for cell in line] == [True, False, True, False, True, True]
    parsed = Spans(write_html(page, "A title", most=8.0))
    assert (parsed.tags.count("p"), parsed.tags.count("i")) == (2 + 2, 2)  # Two of them say what the page is.


def test_the_picture_has_a_largest_size() -> None:
    """A text without end is no trouble."""
    png = draw_page(page_of([("word ", 1.0)] * 5000), "A title", 8.0)
    assert Image.open(BytesIO(png)).size == (820, 74 + 26 * 19 + 14)
    assert len(png) < 60_000


def shown(text: str) -> str:
    """Return what the cells of a line show, from left to right."""
    [line] = surprisal._break_lines(page_of([(text, 1.0)]))
    return "|".join(cell.text for cell in surprisal._in_visual_order(line))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", "a|b"),
        ("אבג", "ג|ב|א"),
        ("אב 123 גד", "ד|ג| |1|2|3| |ב|א"),
        ("x אב, גד y", "x| |ד|ג| |,|ב|א| |y"),
        ("אב 12.5", "1|2|.|5| |ב|א"),
        ("12 אב", "1|2| |ב|א"),
        ("e\N{COMBINING ACUTE ACCENT}a", "e\N{COMBINING ACUTE ACCENT}|a"),
        ("a\N{ZERO WIDTH JOINER}b", "a\N{ZERO WIDTH JOINER}|b"),
        ("\t", "→"),
    ],
)
def test_scripts_and_marks(text: str, expected: str) -> None:
    """What is written from right to left is turned, but for its numbers; marks stay on their character."""
    assert shown(text) == expected


def test_a_character_that_no_font_has_is_its_code_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which that are depends on the system."""
    own = surprisal._font_with
    monkeypatch.setattr(surprisal, "_font_with", lambda character: None if character == "字" else own(character))
    assert shown("a字b") == "a|U|+|5|B|5|7|b"


def test_wide_characters_take_two_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do where there is a font; else their code points are shown."""
    monkeypatch.setattr(surprisal, "_font_with", lambda _: surprisal._own_font())
    image = drawn(page_of([("字", 8.0), ("a", 0.0)]))
    assert colour_at(image, 0, 1) == colour_at(image, 0, 0) != WHITE
    assert colour_at(image, 0, 2) == WHITE


class Spans(HTMLParser):
    """Collects attributes and text of the pieces of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.pieces: list[tuple[dict[str, str | None], str]] = []
        self._attributes: dict[str, str | None] | None = None
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if "data-about" in dict(attrs):
            self._attributes = dict(attrs)

    def handle_data(self, data: str) -> None:
        if self._attributes is not None:
            self.pieces.append((self._attributes, data))
            self._attributes = None


def test_the_html_has_every_piece_with_what_it_cost() -> None:
    """Text, tokens, bits and ranks are read back as they were; what could be markup is text."""
    text = "<script>alert('x')</script> & \"q\""
    page = [[Piece(text, 1.234, (7,), (3,)), Piece("😀", 9.0, (8, 9), (1, 20))], [Piece("", 0.5, (2,))]]
    html = write_html(page, "A <title>", most=8.0)
    parsed = Spans(html)
    assert [data for _, data in parsed.pieces] == [text, "😀", "∅"]
    assert [attributes["data-about"] for attributes, _ in parsed.pieces] == [
        f"token 7: {text!r}\n1.23 bits\nrank 3",
        "tokens 8, 9: '😀'\n9.00 bits\nrank 1, 20",
        "token 2: ''\n0.50 bits",
    ]
    assert "script" not in parsed.tags
    assert unescape(re.findall("<h1>(.*)</h1>", html)[0]) == "A <title>"
    assert html.count('dir="auto"') == 1


def test_half_a_character_can_be_written() -> None:
    """`surrogateescape` makes such of bytes that are no text."""
    page = page_of([("\udc80", 1.0)])
    [(_, text)] = Spans(write_html(page, "A title", most=8.0).encode().decode()).pieces
    assert text == r"\udc80"
    assert drawn(page).width > 0


def test_the_colours_of_html_are_those_of_the_picture() -> None:
    """White where a piece cost nothing, dark with white letters where it cost much."""
    pieces = Spans(write_html(page_of([("a", 0.0), ("b", 8.0)]), "A title", most=8.0)).pieces
    assert [attributes["style"] for attributes, _ in pieces] == ["background:#ffffff", "background:#6e140a"]
    assert [attributes.get("class") for attributes, _ in pieces] == [None, "dark"]
