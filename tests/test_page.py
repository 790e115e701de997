"""Text is cut where tokens end, whatever the tokenizer, and every loss is on the piece that it belongs to."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from torch import Tensor

from tests.instruments import allocator_peak
from xent_metrics.page import NUM_CHARACTERS, Decode, Piece, Row, write_page
from xent_metrics.validation_stats import ValidationStats

LN_2 = math.log(2)
TEXT = "Hello wörld, this is 😀 a test 漢字 of it. Hello hello world"


def decode_bytes(tokens: list[int]) -> str:
    """Decode tokens that are bytes."""
    return bytes(tokens).decode("utf-8", "replace")


def byte_level() -> tuple[list[int], Decode]:
    """Return a text as bytes."""
    return list(TEXT.encode()), decode_bytes


def word_piece() -> tuple[list[int], Decode]:
    """Return a text as pieces of words: `##` begins one that goes on."""
    words = ["[UNK]", "hello", "wor", "##ld", "this", "is", "a", "test", "of", "it", ".", ","]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    return tokenizer.encode("hello world this is a test of it hello world").ids, tokenizer.decode


def sentence_piece() -> tuple[list[int], Decode]:
    """Return a text as pieces that begin with their space, which a piece alone loses, and bytes for the rest."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world this is a test of it"] * 20),
        model_writer=model,
        vocab_size=275,
        byte_fallback=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return processor.encode("hello world 😀 this is 漢字 a test"), processor.decode


KINDS = {"bytes": byte_level, "word pieces": word_piece, "sentence pieces": sentence_piece}


def page_of(tokens: list[int], decode: Decode | None, room: int = NUM_CHARACTERS) -> list[Piece]:
    """Return the pieces of one sequence; the first token cost 0 bits, the next one 1, and so on."""
    losses = [i * LN_2 for i in range(len(tokens))]
    ranks = [1 + 10 * i for i in range(len(tokens))]
    page = write_page([Row(tokens, losses, [True] * len(tokens), ranks)], decode, room)
    return page[0] if page else []


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_pieces_are_the_text(make: Callable[[], tuple[list[int], Decode]]) -> None:
    """Joined they are the whole text, decoded at once; no token is lost or shown twice."""
    tokens, decode = make()
    pieces = page_of(tokens, decode)
    assert "".join(piece.text for piece in pieces) == decode(tokens)
    assert [token for piece in pieces for token in piece.tokens] == tokens
    assert "\N{REPLACEMENT CHARACTER}" not in decode(tokens)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_costs_are_those_of_the_tokens(make: Callable[[], tuple[list[int], Decode]]) -> None:
    """Tokens that make one character together have their sum, and their ranks in order."""
    tokens, decode = make()
    first = 0
    for piece in page_of(tokens, decode):
        of_piece = range(first, first + len(piece.tokens))
        assert piece.bits == pytest.approx(sum(of_piece), abs=1e-9)
        assert piece.ranks == tuple(1 + 10 * i for i in of_piece)
        first = of_piece.stop


def test_the_bytes_of_a_character_are_one_piece() -> None:
    """An emoji of four bytes is one, and its neighbours stay alone."""
    pieces = page_of(list("a😀é.".encode()), decode_bytes)
    assert [(piece.text, len(piece.tokens)) for piece in pieces] == [("a", 1), ("😀", 4), ("é", 2), (".", 1)]


def test_bytes_that_are_no_text_do_not_swallow_what_follows() -> None:
    """No character has more than four bytes."""
    pieces = page_of([0x80] * 6 + list(b"ab"), decode_bytes)
    assert len(pieces[0].tokens) == 4
    assert "".join(piece.text for piece in pieces) == "\N{REPLACEMENT CHARACTER}" * 6 + "ab"
    assert pieces[-1].text == "b"


def test_bytes_that_belong_to_a_piece_before_them_are_no_mistake_of_decode() -> None:
    """A text that is cut within a character, after bytes that are none."""
    pieces = page_of([0xF0, 0x9F, 0xF0, 0x9F, 0x98], decode_bytes)
    assert [(piece.text, len(piece.tokens)) for piece in pieces] == [("\N{REPLACEMENT CHARACTER}" * 2, 4), ("", 1)]


def test_infinite_losses_in_one_character_are_no_trouble() -> None:
    """They add up to NaN."""
    [[piece]] = write_page([Row([*"é".encode()], [math.inf, -math.inf], [True] * 2)], decode_bytes)
    assert math.isnan(piece.bits)


def test_a_token_without_text_is_a_piece_of_its_own() -> None:
    """A special token that a tokenizer hides has a cost too."""
    pieces = page_of([1, 0, 2], lambda tokens: "".join("?ab"[token] for token in tokens if token))
    assert [(piece.text, piece.bits) for piece in pieces] == [("a", 0.0), ("", 1.0), ("b", 2.0)]


def test_what_is_not_scored_is_left_out() -> None:
    """Padding has no text; without `decode` numbers are shown."""
    padded = Row([-100, 1, 2, 1], [9.0, LN_2, 2 * LN_2, 0.0], [False, True, True, True])
    page = write_page([padded, Row([7] * 4, [1.0] * 4, [False] * 4)], None)
    assert page == [[Piece("1 ", 1.0, (1,)), Piece("2 ", 2.0, (2,)), Piece("1 ", 0.0, (1,))]]


def test_a_page_ends_where_there_is_no_room() -> None:
    """As few tokens are decoded as are shown."""
    asked: list[list[int]] = []

    def decode(tokens: list[int]) -> str:
        asked.append(tokens)
        return "ab" * len(tokens)

    assert len(page_of([0] * 1000, decode, room=10)) == 5
    assert len(asked) < 15


def test_a_decode_that_shows_the_first_token_only_is_refused() -> None:
    """All others would be blank."""
    with pytest.raises(ValueError, match=r"`decode` must turn a list of tokens into text, but of \[0, 1\] it shows"):
        page_of([0, 1], lambda tokens: "ab"[tokens[0]])


def test_an_error_of_decode_names_the_tokens() -> None:
    """It is the user's function."""
    with pytest.raises(ValueError, match=r"for \[3\] it raised KeyError: 3; mend it"):
        page_of([3], lambda tokens: {}[tokens[0]])


@pytest.mark.parametrize("text", [b"a", ["a"], None])
def test_what_decode_returns_is_text(text: Any) -> None:
    """Bytes and lists would be shown as Python writes them."""
    with pytest.raises(ValueError, match=rf"for \[3\] it returned {type(text).__name__}; return one str"):
        page_of([3], lambda _: text)


def stats_of(scores: Tensor, ids: Tensor) -> ValidationStats:
    """Return statistics of a batch of logits."""
    stats = ValidationStats(torch.device("cpu"), counts_classes=False)
    loss = torch.full(ids.shape, LN_2, dtype=torch.float64)
    stats.add(loss, torch.ones(ids.shape, dtype=torch.bool), ids, scores.shape[-1], scores)
    return stats


@pytest.mark.parametrize("most", [2**24, 40])
def test_ranks_are_places_in_the_order_of_the_scores(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are compared at a time."""
    monkeypatch.setattr("xent_metrics.validation_stats._MOST_COMPARED", most)
    scores, ids = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    page = stats_of(scores, ids).page(None)
    for row in range(3):
        for column in range(5):
            order = sorted(range(7), key=lambda c: -scores[row, column, c].item())
            assert page[row][column].ranks == (1 + order.index(int(ids[row, column])),)


@pytest.mark.parametrize("shape", [(1, 600), (600, 1), (20, 30)])
def test_ranks_are_bounded_in_number_and_memory(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the shape of a batch: each rank is a look at all classes, of which no copy is large."""
    monkeypatch.setattr("xent_metrics.validation_stats._MOST_COMPARED", 1000)
    monkeypatch.setattr("xent_metrics.validation_stats._NUM_RANKS", 110)
    scores, ids = torch.randn(*shape, 300), torch.randint(300, shape)
    peak = allocator_peak(lambda: stats_of(scores, ids), tmp_path)
    assert peak < scores.nbytes / 2
    stats = stats_of(scores, ids)
    assert [piece.ranks != () for sequence in stats.page(None) for piece in sequence] == [True] * 110 + [False] * 490


def test_a_loss_that_is_none_has_no_rank() -> None:
    """NaN is not the most likely class."""
    scores = torch.tensor([[[math.nan, 1.0], [2.0, 1.0]]])
    page = stats_of(scores, torch.zeros(1, 2, dtype=torch.long)).page(None)
    assert [piece.ranks for piece in page[0]] == [(), (1,)]


def test_what_nobody_draws_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks one has loggers; the others keep no text and look for no ranks."""
    monkeypatch.setattr("xent_metrics.validation_stats._ranks", None)  # Nobody calls it.
    stats = ValidationStats(torch.device("cpu"), counts_classes=False, has_text=False)
    ones = torch.ones(2, 3, dtype=torch.float64)
    stats.add(ones, ones > 0, torch.zeros(2, 3, dtype=torch.long), 7, torch.randn(2, 3, 7))
    assert stats.page(None) == []


def test_scores_of_another_shape_have_no_ranks() -> None:
    """Those of pictures have two dimensions of places."""
    assert stats_of(torch.randn(2, 2, 2, 7), torch.randint(7, (2, 4))).page(None)[0][0].ranks == ()


def test_a_page_is_the_first_text_and_bounded() -> None:
    """However much is validated, as much is kept as fits a page."""
    stats = ValidationStats(torch.device("cpu"), counts_classes=False)
    ones = torch.ones(2, 1000, dtype=torch.float64)
    for start in range(0, 400, 10):
        ids = torch.arange(start, start + 10).view(2, 5).repeat(1, 200)
        stats.add(2 * LN_2 * ones, ones > 0, ids, None)
    page = stats.page(lambda tokens: "".join(chr(ord("a") + token % 26) for token in tokens))
    assert "".join(piece.text for piece in page[0][:6]) == "abcdea"
    assert "".join(piece.text for piece in page[1][:2]) == "fg"
    assert sum(map(len, page)) == NUM_CHARACTERS
    assert {round(piece.bits, 9) for sequence in page for piece in sequence} == {2.0}
