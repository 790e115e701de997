"""The page of a validation: its first text, cut where tokens end, and what each piece of it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

Decode = Callable[[list[int]], str]
"""Turns a list of tokens into text."""

PAGE_COLUMNS, PAGE_ROWS = 88, 26
"""Size of the picture of a page, in characters."""

NUM_CHARACTERS = 4 * PAGE_COLUMNS * PAGE_ROWS
"""Length of a page: what is beyond the picture is on the HTML page only."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # What a tokenizer shows for the first bytes of a character.
_MOST_BYTES = 4  # Of a character in UTF-8, hence of the tokens that may share one.


class Piece(NamedTuple):
    """Text, and what it cost.

    Attributes:
        text: The characters that end with the last of its tokens; none for one that has no text.
        bits: The losses of its tokens together, in bits.
        tokens: Its tokens: one, or several that make one character.
        ranks: Of each token, its place among all classes, 1 for the most likely one; empty if it is not known.
    """

    text: str
    bits: float
    tokens: tuple[int, ...]
    ranks: tuple[int, ...] = ()


Page = list[list[Piece]]
"""The pieces of each sequence."""


class Row(NamedTuple):
    """The targets of a sequence.

    Attributes:
        ids: Their classes: tokens.
        losses: The loss of each in nats.
        scored: Whether each is scored; the others, such as padding, are left out.
        ranks: The place of each among all classes, 0 if it is not known; None if none is.
    """

    ids: Sequence[int]
    losses: Sequence[float]
    scored: Sequence[bool]
    ranks: Sequence[int] | None = None


def write_page(rows: Iterable[Row], decode: Decode | None, num_characters: int = NUM_CHARACTERS) -> Page:
    """Return the page of some sequences, as long as there is room.

    Args:
        rows: The sequences.
        decode: Turns a list of tokens into text; None shows their numbers.
        num_characters: How many characters there is room for.

    Raises:
        ValueError: If `decode` raises, returns no text, or looks at the first token only.
    """
    page: Page = []
    for row in rows:
        kept = [i for i, is_scored in enumerate(row.scored) if is_scored]
        tokens = [row.ids[i] for i in kept]
        sequence: list[Piece] = []
        first = 0
        for last, text in _cut(tokens, decode):
            if num_characters <= 0:
                return [*page, sequence] if sequence else page
            of_piece = kept[first:last]
            bits = sum(row.losses[i] for i in of_piece) / math.log(2)
            places = () if row.ranks is None else tuple(row.ranks[i] for i in of_piece)
            sequence.append(Piece(text, bits, tuple(tokens[first:last]), places if all(places) else ()))
            num_characters -= max(1, len(text))
            first = last
        if sequence:
            page.append(sequence)
    return page


def paragraphs(page: Page) -> list[Page]:
    """Group the sequences of a page that run on.

    After a sequence that is as long as the longest one, the text may go on in the next, as windows over a long text do.
    """
    lengths = [sum(len(piece.tokens) for piece in sequence) for sequence in page]
    longest = max(lengths, default=0)
    grouped: list[Page] = []
    for i, sequence in enumerate(page):
        if i and lengths[i - 1] == longest:
            grouped[-1].append(sequence)
        else:
            grouped.append([sequence])
    return grouped


def _cut(tokens: list[int], decode: Decode | None) -> Iterator[tuple[int, str]]:
    """Yield where each piece of text ends among the tokens, and the piece.

    Tokens are decoded after the piece before them: alone, some lose the space that they begin with, and the bytes of
    one character are no text.
    """
    if decode is None:
        yield from ((i, f"{token} ") for i, token in enumerate(tokens, start=1))
        return
    context = first = 0
    for last in range(1, len(tokens) + 1):
        before = _decoded(tokens[context:first], decode) if context < first else ""
        both = _decoded(tokens[context:last], decode)
        if both.endswith(_UNFINISHED) and last - first < _MOST_BYTES and last < len(tokens):
            continue
        text = both[len(before) :] if both.startswith(before) else _decoded(tokens[first:last], decode)
        # Bytes that are no text may all be shown as one.
        if not text and before and _decoded(tokens[first:last], decode).replace(_UNFINISHED, "").strip():
            raise ValueError(
                f"`decode` must turn a list of tokens into text, but of {tokens[context:last]} it shows the first ones "
                "only; decode all of them, and join the texts."
            )
        yield last, text
        context, first = first, last


def _decoded(tokens: list[int], decode: Decode) -> str:
    try:
        text = decode(tokens)
    except Exception as error:
        raise ValueError(
            f"`decode` must turn a list of tokens into text, but for {tokens} it raised {type(error).__name__}: "
            f"{error}; mend it, or pass None to see numbers"
        ) from error
    if not isinstance(text, str):
        raise ValueError(
            f"`decode` must turn a list of tokens into text, but for {tokens} it returned {type(text).__name__}; "
            "return one str for the whole list."
        )
    return text
