"""Bytes behind the pieces of a raw `SentencePieceProcessor`, judged by the texts' own bytes."""

from __future__ import annotations

import io
from typing import Any

import pytest

from tests.test_token_bytes import MARK, TEXTS
from xent_metrics.token_bytes import check_token_bytes, token_byte_lengths

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

LINES = [text.replace("\0", "").replace("\n", " ") for text in TEXTS if text]
LOSSLESS = {
    "add_dummy_prefix": False,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "character_coverage": 0.98,
    "vocab_size": 340,
    "minloglevel": 2,
}


def train(**options: Any) -> Any:
    """Train on the texts; without options, such that all of any text is in the pieces."""
    model = io.BytesIO()
    options = {**LOSSLESS, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES * 3), model_writer=model, **options)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_stand_for_all_bytes_of_a_text(kind: str) -> None:
    """U+2581 is a space, a piece of a byte is one byte, control symbols and the unknown piece are nothing."""
    processor = train(model_type=kind, user_defined_symbols=["<x>", MARK * 3], control_symbols=["<pad>"])
    check_token_bytes(processor, [*LINES, "a<x>b   c 𓆣"])
    table = token_byte_lengths(processor)
    assert len(table) == 340
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "<x>", MARK * 3, MARK, "<0x0A>", "<0xFF>", "é"]
    assert [int(table[processor.piece_to_id(piece)]) for piece in pieces] == [0, 0, 0, 0, 3, 3, 1, 1, 1, 2]
    table[:3] = 5  # Would count what is put around a text, were it there.
    for extra in ({"add_bos": True, "add_eos": True}, {"out_type": str}):
        model = processor.serialized_model_proto()
        check_token_bytes(sentencepiece.SentencePieceProcessor(model_proto=model, **extra), LINES, table)


def test_what_a_processor_changes_is_seen() -> None:
    """A space in front of each text, and spaces that are dropped, are in no table."""
    with pytest.raises(ValueError, match=r"got 5 in 'hello' and 6 in its tokens.* a space that the tokenizer puts"):
        check_token_bytes(train(add_dummy_prefix=True), ["hello"])
    with pytest.raises(ValueError, match=r"got 14 in 'hello {4}hello' and 11 in its tokens.* whitespace that no token"):
        check_token_bytes(train(remove_extra_whitespaces=True), ["hello    hello"])


def test_a_model_without_a_piece_for_the_space() -> None:
    """A space is then three pieces of a byte, and the check says so."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(train().serialized_model_proto())
    for i, piece in enumerate(proto.pieces):
        if MARK in piece.piece:
            piece.piece = f"unused{i}"
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    with pytest.raises(
        ValueError, match=f"got 3 in 'h h' and 5 in its .* likely because of spaces that become '{MARK}'"
    ):
        check_token_bytes(processor, ["h h"])
