"""Bytes of text behind each token, judged by the texts' own bytes and by lengths that are known by construction.

No vocabulary is downloaded: every tokenizer is trained here, or put together by hand where its entries matter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.strategies import relaxed
from xent_metrics.token_bytes import check_token_bytes, token_byte_lengths

MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""U+2581, which stands for a space in the tokens of SentencePiece."""

TEXTS = [
    "hello hello world, the hello of the world",
    "family 👩‍👩‍👧‍👦 and flag 🏳️‍🌈, skin 👍🏽",
    "combining e\N{COMBINING ACUTE ACCENT} n\N{COMBINING TILDE}\N{COMBINING DOT BELOW}, composed é ñ",
    "漢字かな交じり文と한국어",
    "مرحبا بالعالم",
    "\ttabs\tand\r\nlines\n\n\n",
    "   runs    of  spaces   ",
    "a replacement \ufffd\ufffd and a byte order mark \ufeff, NUL \0",
    "<0x0A> is written out, <0xZZ> is not a byte",
    "astral 𓀀𒀀𐍈 \U0010ffff",
    "",
]


class Wrapped:
    """What is used of a fast tokenizer of transformers: a backend, and an `encode` that returns the ids themselves."""

    def __init__(self, tokenizer: Tokenizer, *special: str) -> None:
        """Wrap a tokenizer, and declare tokens special."""
        self.backend_tokenizer = tokenizer
        tokenizer.add_special_tokens(list(special))

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of a token."""
        return self.backend_tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


class Frame(list[str]):
    """A table of pandas, which iterates over the names of its columns."""

    columns = ("text",)


class Slow:
    """The same of a slow one, which has no backend: a tokenizer of ASCII."""

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of a token."""
        return ord(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with one around it if that is not declined."""
        return [*text.encode("ascii"), *([0] if add_special_tokens else [])]


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
"""Any text that has UTF-8: astral characters, controls, unassigned code points, all but lone surrogates."""

texts = st.lists(anything | st.sampled_from(TEXTS), max_size=4).map("".join)
"""Any text, some of it made of what the tokenizers have merges for."""


def train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    """Train on the texts, all of them a few times."""
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def byte_level(size: int = 330, **options: Any) -> Tokenizer:
    """Byte-level BPE as in Llama 3, whose pre-tokenizer is a sequence; some merges cut characters."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(tokenizer, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **options))


FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
"""The tokens of bytes, as Llama 2 has them."""

PIECES = [MARK, "h", "e", "l", "o", "é", "漢", "🙂", "he", "ll", "hell", "hello", MARK + "hello", MARK * 2, MARK * 4]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (MARK, "hello"), (MARK, MARK), (MARK * 2, MARK * 2)]


def byte_fallback(normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    """BPE with byte fallback; without arguments, spaces become U+2581 in the way of Gemma, with none in front."""
    vocab = {piece: token for token, piece in enumerate(["<unk>", "<s>", *FALLBACK, *PIECES])}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    if normalizer is None and pre_tokenizer is None:
        normalizer = normalizers.Replace(" ", MARK)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def llama2() -> Tokenizer:
    """Byte fallback with the pipeline of Llama 2, which puts a space in front of each text."""
    return byte_fallback(normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]))


def metaspace(prepend: str = "never") -> pre_tokenizers.PreTokenizer:
    """Make spaces U+2581 in the pre-tokenizer, as newer conversions do."""
    return pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)


def unigram(fallback: bool = True, prepend: str = "never") -> Tokenizer:
    """A Unigram model with the pieces of the others, with byte fallback or without."""
    pieces = [*(FALLBACK if fallback else []), *PIECES]
    vocab = [("<unk>", 0.0), *((piece, -float(token)) for token, piece in enumerate(pieces, 5))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=fallback))
    tokenizer.pre_tokenizer = metaspace(prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return tokenizer


def word_piece() -> Tokenizer:
    """WordPiece as in BERT."""
    vocab = ["[UNK]", "[CLS]", "[SEP]", "hello", "##s", "##é", "漢", "#", "###", "İ", "C##"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def tik() -> tiktoken.Encoding:
    """A tiktoken encoding of the bytes, of parts of characters, and of a word; 262 to 299 and 301 are holes."""
    merged = [b"\xf0\x9f", b"\xf0\x9f\x91", b"he", b"ll", b"hell", b"hello"]
    ranks = {bytes([i]): i for i in range(256)} | {raw: 256 + i for i, raw in enumerate(merged)}
    special = {"<|end|>": 300, "<|middle|>": 302}
    return tiktoken.Encoding("made", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens=special)


LOSSLESS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "byte-level normaliser": lambda: byte_level_in("normalizer"),
    "byte-level, transformers": lambda: Wrapped(byte_level(), "<eos>"),
    "byte fallback": byte_fallback,
    "byte fallback, Metaspace": lambda: byte_fallback(pre_tokenizer=metaspace()),
    "byte fallback, transformers": lambda: Wrapped(byte_fallback()),
    "Unigram with byte fallback": unigram,
    "tiktoken": tik,
}
"""Tokenizers whose tokens stand for all of any text, but for U+2581 where that is a space.

A Unigram model also takes a `<0x0A>` that is written in a text for its token of the byte; merges never make one.
"""


def byte_level_in(stage: str) -> Tokenizer:
    """Byte-level BPE whose only sign of it is one part of the pipeline."""
    tokenizer = Tokenizer(byte_level().model)
    part = {
        "normalizer": normalizers.ByteLevel,
        "pre_tokenizer": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "decoder": decoders.ByteLevel,
    }
    setattr(tokenizer, stage, part[stage]())
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text as a user would."""
    if isinstance(tokenizer, tiktoken.Encoding):
        return tokenizer.encode(text, disallowed_special=())
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return encoded if isinstance(encoded, list) else encoded.ids


def length_of(tokenizer: Any, *pieces: str) -> list[int]:
    """Return what the table says of the tokens with these strings."""
    table = token_byte_lengths(tokenizer)
    return [int(table[tokenizer.token_to_id(piece)]) for piece in pieces]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_tokens_stand_for_all_bytes_of_any_text(kind: str) -> None:
    """Where nothing is normalised or added, the lengths of a text's tokens add up to its UTF-8 bytes, for any text."""
    tokenizer = LOSSLESS[kind]()
    table = token_byte_lengths(tokenizer)

    def exact(text: str) -> None:
        if "fallback" in kind:
            text = text.replace(MARK, "")
        if "Unigram" in kind:
            text = text.replace("<0x", "")
        assert int(table[encode(tokenizer, text)].sum()) == len(text.encode("utf-8"))
        check_token_bytes(tokenizer, [text])

    for text in TEXTS:
        exact(text)
    relaxed(given(texts)(exact))()


def test_byte_level_lengths_follow_from_the_merges() -> None:
    """The 256 letters of the alphabet are one byte each, and a merge is as long as its two parts."""
    tokenizer = byte_level(400)
    expected = dict.fromkeys(pre_tokenizers.ByteLevel.alphabet(), 1)
    assert len(expected) == 256
    for left, right in model_of(tokenizer)["merges"]:
        expected[left + right] = expected[left] + expected[right]
    table = token_byte_lengths(tokenizer)
    assert table.dtype == torch.int64
    assert table.device.type == "cpu"
    assert table.tolist() == [expected[tokenizer.id_to_token(token)] for token in range(400)]


def model_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the model of a tokenizer as JSON has it."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


@pytest.mark.parametrize("stage", ["normalizer", "pre_tokenizer", "decoder"])
def test_byte_level_is_seen_wherever_it_is(stage: str) -> None:
    """A byte-level part in any stage makes the characters of tokens bytes: `é` is the byte 0xE9 alone."""
    assert length_of(byte_level_in(stage), "é", "Ġ", "Ł", "a") == [1, 1, 1, 1]


def test_bytes_that_are_no_text_alone() -> None:
    """Tokens of 0xFF and 0xFE, and parts of a character, have the bytes they have and not those of U+FFFD."""
    table = token_byte_lengths(tik())
    assert tik().decode_bytes([255, 254]) == b"\xff\xfe"
    assert table[[255, 254]].tolist() == [1, 1]
    assert table[[256, 257]].tolist() == [2, 3]
    assert length_of(byte_level(), "ÿ", "þ") == [1, 1]
    assert length_of(byte_fallback(), "<0xFF>", "<0xFE>") == [1, 1]
    assert length_of(unigram(), "<0xFF>", "<0xFE>") == [1, 1]


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback", "tiktoken"])
def test_decoding_tokens_one_by_one_is_wrong(kind: str) -> None:
    """A table from decoded strings counts 3 bytes for each part of a character; ours does not."""
    tokenizer = LOSSLESS[kind]()
    text = "👩🏽‍🚀 مرحبا ᚠᛇᚻ"
    ids = encode(tokenizer, text)
    decoded = sum(len(tokenizer.decode([token]).encode("utf-8")) for token in ids)
    size = len(text.encode("utf-8"))
    assert decoded > 1.5 * size
    assert int(token_byte_lengths(tokenizer)[ids].sum()) == size


def test_byte_fallback_lengths() -> None:
    """A token of a byte is one byte, U+2581 is a space, anything else is its UTF-8."""
    pieces = ["<0x0A>", "<0x00>", MARK, MARK * 4, MARK + "hello", "é", "漢", "🙂", "hell", "<unk>", "<s>"]
    expected = [1, 1, 1, 4, 6, 2, 3, 4, 4, 0, 0]
    for tokenizer in (byte_fallback(), llama2(), byte_fallback(pre_tokenizer=metaspace("first"))):
        assert length_of(tokenizer, *pieces) == expected
    assert length_of(unigram(), *pieces[:-1]) == expected[:-1]


@pytest.mark.parametrize("model", [models.BPE, models.WordLevel])
def test_byte_tokens_without_byte_fallback_are_text(model: Any) -> None:
    """Where the model does not fall back to bytes, `<0x0A>` is six characters that somebody wrote."""
    assert length_of(Tokenizer(model({"<0x0A>": 0, "<unk>": 1}, *([[]] if model is models.BPE else []))), "<0x0A>") == [
        6
    ]
    pieces = [("<unk>", 0.0), ("<0x0A>", -1.0)]
    assert length_of(Tokenizer(models.Unigram(pieces, unk_id=0)), "<0x0A>") == [6]


def test_what_looks_like_a_byte_token_is_text() -> None:
    """With byte fallback too, only `<0x` with two upper-case hexadecimal digits and `>` is a byte."""
    vocab = {piece: i for i, piece in enumerate(["<0x0a>", "<0x0A", "x<0x0A>", "<0x0A>>", "<0xGG>", "<0x0A>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    assert token_byte_lengths(tokenizer).tolist() == [6, 5, 7, 7, 6, 1]


def test_unigram_without_byte_fallback() -> None:
    """Pieces are their UTF-8 with U+2581 for a space, and the unknown token stands for nothing."""
    tokenizer = unigram(fallback=False)
    assert token_byte_lengths(tokenizer).tolist() == [0, 1, 1, 1, 1, 1, 2, 3, 4, 2, 2, 4, 5, 6, 2, 4]
    check_token_bytes(tokenizer, ["hello  hello", "漢🙂é"])


def test_trained_unigram() -> None:
    """A Unigram model that was trained without normalisation accounts for text of its alphabet."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = metaspace()
    train(tokenizer, trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>"))
    text = "the hello of world 漢字 مرحبا e\N{COMBINING ACUTE ACCENT}"
    assert tokenizer.token_to_id("<unk>") not in encode(tokenizer, text)
    check_token_bytes(tokenizer, [text])


def test_word_piece_lengths() -> None:
    """The prefix of a continuing piece stands for nothing, and only where it is a prefix."""
    assert token_byte_lengths(word_piece()).tolist() == [0, 0, 0, 5, 1, 2, 3, 1, 1, 2, 3]
    check_token_bytes(word_piece(), ["hellos", "漢", "helloé"])


def test_plain_words_and_plain_bpe_are_their_utf8() -> None:
    """Without a decoder, a token is the text it says; the prefix of a BPE's continuing pieces is not in it."""
    words = Tokenizer(models.WordLevel({"né": 0, "##a": 1, "[UNK]": 2, MARK: 3}, unk_token="[UNK]"))
    assert token_byte_lengths(words).tolist() == [3, 3, 0, 3]
    pieces = {"n": 0, "é": 1, "né": 2}
    assert token_byte_lengths(Tokenizer(models.BPE(pieces, [("n", "é")]))).tolist() == [1, 2, 3]
    pieces = {"n": 0, "##é": 1, "né": 2}
    continuing = Tokenizer(models.BPE(pieces, [("n", "##é")], continuing_subword_prefix="##"))
    assert token_byte_lengths(continuing).tolist() == [1, 2, 3]
    check_token_bytes(continuing, ["né"])


def test_empty_vocabulary() -> None:
    """A tokenizer without tokens has an empty table."""
    table = token_byte_lengths(Tokenizer(models.BPE()))
    assert table.shape == (0,)
    assert table.dtype == torch.int64


def test_holes_and_special_tokens_of_tiktoken() -> None:
    """Special tokens and ids without a token are 0, all others the length of their bytes."""
    expected = [1] * 256 + [2, 3, 2, 2, 4, 5] + [0] * 41
    assert token_byte_lengths(tik()).tolist() == expected
    assert tik().encode("<|end|>", allowed_special="all") == [300]
    check_token_bytes(tik(), ["hello <|end|> is text here"])


def test_special_token_of_tiktoken_with_the_text_of_an_ordinary_one() -> None:
    """The special one of two tokens with the same text is 0, the ordinary one is not."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("made", pat_str=r"\S", mergeable_ranks=ranks, special_tokens={"a": 256})
    assert token_byte_lengths(encoding)[[97, 256]].tolist() == [1, 0]


class OldEncoding:
    """What tiktoken 0.5 has of what is used, and 0.9, whose `is_special_token` fails."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        """Take over the attributes of an encoding."""
        self.n_vocab, self._special_tokens = encoding.n_vocab, encoding._special_tokens
        self.decode_single_token_bytes = encoding.decode_single_token_bytes
        self.encode_ordinary = encoding.encode_ordinary

    def is_special_token(self, token: int) -> bool:
        """Fail."""
        raise AttributeError("_special_token_values")


def test_old_releases_of_tiktoken() -> None:
    """They have the same table, and the same check."""
    old: Any = OldEncoding(tik())
    assert token_byte_lengths(old).tolist() == token_byte_lengths(tik()).tolist()
    check_token_bytes(old, TEXTS)
    del OldEncoding.is_special_token
    assert token_byte_lengths(old).tolist() == token_byte_lengths(tik()).tolist()


def test_holes_of_a_fast_tokenizer() -> None:
    """Ids without a token are 0, and the table goes up to the largest id."""
    assert token_byte_lengths(Tokenizer(models.WordLevel({"ab": 1, "é": 4}, unk_token="x"))).tolist() == [0, 2, 0, 0, 2]


def test_added_tokens() -> None:
    """Special ones are 0; the others are found in the text as they are written, byte-level or not."""
    for tokenizer in (byte_level(special_tokens=["<s>"]), byte_fallback()):
        tokenizer.add_special_tokens(["<x>"])
        tokenizer.add_tokens([" héé", AddedToken("né", normalized=False), "漢字", "\n\n", "  "])
        assert length_of(tokenizer, "<s>", "<x>", " héé", "né", "漢字", "\n\n", "  ") == [0, 0, 6, 3, 6, 2, 2]
        text = "a hééz né漢字\n\n   "
        assert tokenizer.token_to_id("né") in encode(tokenizer, text)
        check_token_bytes(tokenizer, [text])


def test_added_token_with_the_string_of_a_byte_level_token() -> None:
    """Where `né` is both the bytes 6E E9 of a model and added as text, it is what is found in texts: 3 bytes."""
    tokenizer = Tokenizer(models.BPE({"n": 0, "é": 1, "né": 2}, [("n", "é")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert token_byte_lengths(tokenizer).tolist() == [1, 1, 2]
    tokenizer.add_tokens(["né"])
    assert token_byte_lengths(tokenizer).tolist() == [1, 1, 3]
    check_token_bytes(tokenizer, ["né"])


def test_added_runs_of_spaces_that_the_model_has_too() -> None:
    """Gemma lists its runs of U+2581 as added tokens; as the model makes them from spaces, they are spaces."""
    tokenizer = byte_fallback()
    tokenizer.add_tokens([AddedToken(MARK * 2, normalized=False)])
    assert length_of(tokenizer, MARK * 2, MARK * 4) == [2, 4]
    assert tokenizer.token_to_id(MARK * 2) in encode(tokenizer, "hello  漢")
    check_token_bytes(tokenizer, ["hello  漢"])


def normalised() -> Iterator[Any]:
    """Tokenizers, tokens that are added to them, texts without an error of their own, and what each token is then."""
    replace = normalizers.Replace(" ", MARK)
    yield pytest.param(byte_fallback, [MARK * 3, MARK + "zz", " yy"], "a   zz b zz yy", [3, 3, 3], id="Gemma")
    as_written = [AddedToken(MARK * 3, normalized=False), AddedToken(MARK + "zz", normalized=False)]
    yield pytest.param(byte_fallback, as_written, f"a  b{MARK * 3}zz{MARK}zz", [9, 5], id="Gemma, as written")
    yield pytest.param(unigram, [MARK + "zz", "  "], f"hello zz{MARK}zz  h", [5, 2], id="Metaspace, as written")
    by_pattern = normalizers.Replace(Regex(r"\s"), MARK)
    yield pytest.param(lambda: byte_fallback(by_pattern), [MARK + "zz"], "a\n\tzz", [3], id="a pattern of spaces")
    strip = normalizers.Sequence([normalizers.Strip(), replace])
    yield pytest.param(lambda: byte_fallback(strip), [" zz"], "hello zz zzh", [2], id="stripped")
    yield pytest.param(lambda: byte_level_in("normalizer"), ["né", " né"], "né né", [3, 4], id="byte-level normaliser")


@pytest.mark.parametrize(("make", "tokens", "text", "expected"), list(normalised()))
def test_added_tokens_that_are_looked_for_in_normalised_text(
    make: Any, tokens: list[Any], text: str, expected: list[int]
) -> None:
    """They are normalised too: where the normaliser makes U+2581 of a space, it is one. The text is all there."""
    tokenizer = make()
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(tokens)
    assert token_byte_lengths(tokenizer)[size:].tolist() == expected
    assert {*range(size, size + len(tokens))} <= {*encode(tokenizer, text)}
    check_token_bytes(tokenizer, [text])


def test_added_token_behind_a_prefix_that_the_normaliser_puts_in_front() -> None:
    """Llama 2 looks for ` zz` if `zz` is added: with the space in front of the text, each is a byte too many."""
    tokenizer = llama2()
    tokenizer.add_tokens(["zz"])
    assert length_of(tokenizer, "zz") == [3]
    with pytest.raises(ValueError, match="got 8 in 'hello zz' and 9 in its tokens"):
        check_token_bytes(tokenizer, ["hello zz"])


def test_added_special_token_in_the_vocabulary() -> None:
    """A token of the model that is declared special afterwards stands for no text."""
    tokenizer = byte_level()
    assert length_of(tokenizer, "h") == [1]
    tokenizer.add_special_tokens(["h"])
    assert length_of(tokenizer, "h") == [0]


def test_transformers_wrapper_has_the_table_of_its_tokenizer() -> None:
    """The wrapper's special tokens, old and new, are 0, and tokens added to it are their text."""
    plain = token_byte_lengths(byte_level()).tolist()
    wrapper = Wrapped(byte_level(), "<eos>", "<pad>")
    assert token_byte_lengths(wrapper).tolist() == [*plain, 0, 0]
    wrapper.backend_tokenizer.add_tokens(["né"])
    wrapper.backend_tokenizer.add_special_tokens(["<cls>"])
    assert token_byte_lengths(wrapper).tolist() == [*plain, 0, 0, 3, 0]
    check_token_bytes(wrapper, ["a né 🙂"])


def test_added_special_tokens_are_left_out_of_the_check() -> None:
    """Neither the tokens that a post-processor puts around a text nor padding stand for text."""
    tokenizer = word_piece()
    assert tokenizer.encode("hello").tokens == ["[CLS]", "hello", "[SEP]"]
    check_token_bytes(tokenizer, ["hello"])
    check_token_bytes(Wrapped(tokenizer), ["hello"])
    lengths = torch.full((11,), 5)  # Would count them, were they there.
    check_token_bytes(tokenizer, ["hello"], lengths)
    tokenizer.enable_padding(length=7, pad_id=1, pad_token="[CLS]")
    check_token_bytes(tokenizer, ["hello"])


def lossy() -> Iterator[Any]:
    """Tokenizers, texts that their tokens do not account for, both counts, and a word of the cause."""
    dummy = "a space that the tokenizer puts in front"
    yield pytest.param(llama2(), "hello", 5, 6, dummy, id="Llama 2")
    yield pytest.param(byte_fallback(pre_tokenizer=metaspace("first")), "é", 2, 3, dummy, id="Metaspace, first")
    yield pytest.param(unigram(prepend="always"), "hello", 5, 6, dummy, id="Metaspace, always")
    spaced = byte_level()
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    yield pytest.param(spaced, "hello", 5, 6, dummy, id="byte-level, prefix space")
    yield pytest.param(Wrapped(llama2()), "hello", 5, 6, dummy, id="transformers")
    composed = byte_level()
    composed.normalizer = normalizers.NFKC()
    yield pytest.param(composed, "㎏", 3, 2, "NFKC", id="NFKC, shorter")
    yield pytest.param(composed, "ﷺ", 3, 33, "normalisation that makes the text longer", id="NFKC, longer")
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    yield pytest.param(lower, "\N{KELVIN SIGN}", 3, 1, "lowercase", id="lowercase")
    yield pytest.param(word_piece(), "hello hello", 11, 10, "whitespace that no token carries", id="WordPiece")
    yield pytest.param(word_piece(), "hello漢世", 11, 8, "unknown tokens", id="unknown")
    yield pytest.param(byte_fallback(), MARK, 3, 1, "U+2581, special tokens or tokens", id="literal U+2581, normaliser")
    yield pytest.param(
        unigram(), MARK + "hello", 8, 6, "U+2581, special tokens or tokens", id="literal U+2581, Metaspace"
    )
    yield pytest.param(unigram(), "<0x0A>", 6, 1, "tokens of bytes", id="byte written out, Unigram")
    yield pytest.param(
        byte_fallback(), "<s>hello", 8, 5, "special tokens or tokens of bytes written", id="special token in the text"
    )
    short = byte_level()
    short.enable_truncation(1)
    yield pytest.param(short, "zq", 2, 1, "truncation", id="truncation")


@pytest.mark.parametrize(("tokenizer", "text", "own", "by_tokens", "cause"), list(lossy()))
def test_bytes_that_tokens_do_not_account_for(tokenizer: Any, text: str, own: int, by_tokens: int, cause: str) -> None:
    """The check tells both counts of the text, both totals, why, and what to do."""
    assert len(text.encode("utf-8")) == own
    with pytest.raises(ValueError, match="`texts` must have as many UTF-8 bytes as their tokens") as caught:
        check_token_bytes(tokenizer, ["", text, text])
    message = str(caught.value)
    assert f"got {own} in {text!r} and {by_tokens} in its tokens" in message
    assert f"({2 * own} and {2 * by_tokens} over all texts, 3 in number)" in message
    assert cause in message
    assert message.endswith("pass `num_bytes=` to the metric's update with the text's own bytes.")


def test_first_of_many_texts_is_shown_shortened() -> None:
    """The first text that does not fit is shown, up to 40 characters of it, and all texts are counted."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Replace("a", "")
    with pytest.raises(ValueError, match=re.escape(f"got 100 in {'ab' * 20 + '...'!r} and 50 in its")) as caught:
        check_token_bytes(tokenizer, iter(["bé", "ab" * 50, "a", "b"]))
    assert "(105 and 54 over all texts, 4 in number)" in str(caught.value)
    assert "ab" * 21 not in str(caught.value)


def test_errors_of_two_texts_do_not_cancel() -> None:
    """Each text is checked by itself: one with a byte too many and one with a byte too few do not make up for it."""
    table = token_byte_lengths(byte_level())
    for letter, error in (("h", 1), ("e", -1)):
        table[byte_level().token_to_id(letter)] += error
    for texts, first in ((["h", "e"], "got 1 in 'h' and 2 in its"), (["a", "e", "h"], "got 1 in 'e' and 0 in its")):
        with pytest.raises(ValueError, match=first) as caught:
            check_token_bytes(byte_level(), texts, table)
        number = len(texts)
        assert f"({number} and {number} over all texts, {number} in number)" in str(caught.value)


def test_a_table_of_ones_own() -> None:
    """The table that is passed is the one that is checked, of any integer dtype, and for slow tokenizers too."""
    table = token_byte_lengths(byte_level())
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.uint16):
        check_token_bytes(byte_level(), TEXTS, table.to(dtype))
    table[byte_level().token_to_id("h")] += 1
    with pytest.raises(ValueError, match="got 1 in 'h' and 2 in its tokens"):
        check_token_bytes(byte_level(), ["h"], table)

    slow = Slow()
    check_token_bytes(slow, ["abc", "\x7f"], torch.ones(128, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 1 in 'a' and 3 in its tokens"):
        check_token_bytes(slow, ["a"], torch.full((128,), 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], torch.ones(3)), TypeError, "`token_bytes` must be a 1-D integer tensor.*torch.float32"),
        ((["a"], torch.ones(400, dtype=torch.bool)), TypeError, "`token_bytes` must be a 1-D integer tensor.*bool"),
        ((["a"], torch.ones(400, 1, dtype=torch.int64)), TypeError, r"`token_bytes` must be a 1-D .*\(400, 1\)"),
        ((["a"], [1] * 400), TypeError, r"`token_bytes` must be a 1-D integer tensor.*got list"),
        (
            (["a"], torch.ones(64, dtype=torch.int64)),
            ValueError,
            r"`token_bytes` must have an .*64 entries and the id 64",
        ),
        (("a text",), TypeError, r"`texts` must be a list of strings, got str; pass \[text\]"),
        ((3,), TypeError, "`texts` must be a list of strings, got int"),
        ((["a", 3],), TypeError, "`texts` must hold strings, got int 3"),
        (([[1, 2]],), TypeError, r"`texts` must hold strings, got list \[1, 2\]"),
        (([],), ValueError, "`texts` must hold at least one text, got none"),
        (({"text": ["a", "b"]},), TypeError, r"`texts` must be a list of strings, got dict of col.*texts\['text'\]"),
        ((Frame(),), TypeError, "`texts` must be a list of strings, got Frame of columns"),
        ((["a", "h\ud83d"],), ValueError, r"`texts` must hold text that has UTF-8, got .* '\\ud83d' at index 1;"),
    ],
)
def test_arguments_of_the_check(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    """What cannot be checked is refused: a single string, no texts, ids instead of texts, what is no table."""
    tokenizer = byte_level()
    assert encode(tokenizer, "a") == [64]
    with pytest.raises(error, match=message):
        check_token_bytes(tokenizer, *arguments)


OF_A_TABLE = "a table in which a space or a part of a character has several bytes"


def test_a_vocabulary_without_a_token_for_the_space() -> None:
    """Each space is then three tokens of a byte, which count three where the text has one: no table can mend that."""
    tokenizer = byte_fallback()
    pipeline = json.loads(tokenizer.to_str())
    for piece in [x for x in PIECES if MARK in x]:
        del pipeline["model"]["vocab"][piece]
    pipeline["model"]["merges"] = [pair for pair in MERGES if MARK not in "".join(pair)]
    tokenizer = Tokenizer.from_str(json.dumps(pipeline))
    assert [tokenizer.id_to_token(i) for i in encode(tokenizer, " h")] == ["<0xE2>", "<0x96>", "<0x81>", "h"]
    for one in (tokenizer, Wrapped(tokenizer)):
        with pytest.raises(ValueError, match="got 7 in 'hello h' and 9 in its tokens") as caught:
            check_token_bytes(one, ["hello", "hello h"])
        assert f"likely because of spaces that become '{MARK}', for which the vocabulary has no" in str(caught.value)


@pytest.mark.parametrize("kind", ["byte fallback", "byte fallback, transformers"])
def test_a_table_that_counts_the_leading_space_twice(kind: str) -> None:
    """Once as U+2581 in the piece, and once more because the piece begins with it."""
    tokenizer = LOSSLESS[kind]()
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    table = token_byte_lengths(tokenizer)
    for piece, token in backend.get_vocab().items():
        table[token] += piece.startswith(MARK)
    with pytest.raises(ValueError, match="got 11 in 'hello hello' and 12 in its") as caught:
        check_token_bytes(tokenizer, ["hello hello"], table)
    assert OF_A_TABLE in str(caught.value)


def test_a_table_in_which_tokens_of_a_byte_count_three() -> None:
    """As they do where each is decoded to U+FFFD."""
    table = token_byte_lengths(byte_fallback())
    table[[byte_fallback().token_to_id(piece) for piece in FALLBACK]] = 3
    with pytest.raises(ValueError, match="got 4 in 'x é' and 6 in its") as caught:
        check_token_bytes(byte_fallback(), ["x é"], table)
    assert OF_A_TABLE in str(caught.value)


@pytest.mark.parametrize("other", ["gpt2", None, {"a": 0}, Slow(), object()], ids=lambda x: type(x).__name__)
def test_other_tokenizers_are_refused(other: Any) -> None:
    """Neither a name nor a slow tokenizer has raw bytes to read: it is a `TypeError` that says what to do."""
    message = f"`tokenizer` must be a .*got {type(other).__name__}; for any other, build the table yourself and pass"
    with pytest.raises(TypeError, match=message):
        token_byte_lengths(other)
    with pytest.raises(TypeError, match=message):
        check_token_bytes(other, ["a"])


@pytest.mark.parametrize("other", ["gpt2", None, object()], ids=lambda x: type(x).__name__)
def test_other_tokenizers_cannot_encode(other: Any) -> None:
    """With a table of one's own too, a tokenizer has to be one that is known to encode."""
    with pytest.raises(TypeError, match=r"`tokenizer` must be a .*got .*; for any other, compare the sums yourself"):
        check_token_bytes(other, ["a"], torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("decoder", [decoders.Replace(MARK, " "), decoders.Metaspace()])
def test_decoder_tells_what_stands_for_a_space(decoder: Any) -> None:
    """Where spaces become U+2581 in a way that is not read, such as by a pattern, the decoder says it."""
    tokenizer = byte_fallback(normalizers.Replace(Regex(r"\s"), MARK))
    tokenizer.decoder = decoder
    check_token_bytes(tokenizer, ["hello hello\n 漢"])


class Reverse:
    """A part of a pipeline that is written in Python."""

    def pre_tokenize(self, _: Any) -> None:
        """Do nothing."""


def unmapped() -> Iterator[Any]:
    """Tokenizers whose strings are not known to be text, and the reason."""
    suffix = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    yield pytest.param(suffix, "end_of_word_suffix '</w>'", id="suffix")
    clip = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    clip.pre_tokenizer = pre_tokenizers.ByteLevel()
    clip.decoder = decoders.ByteLevel()
    yield pytest.param(Wrapped(clip), "end_of_word_suffix '</w>'", id="CLIP")
    for decoder, reason in [
        (decoders.BPEDecoder(), "a decoder of the type BPEDecoder"),
        (decoders.CTC(), "a decoder of the type CTC"),
        (decoders.Sequence([decoders.Fuse(), decoders.Sequence([decoders.CTC()])]), "a decoder of the type CTC"),
        (decoders.Replace("@@", ""), "a decoder that replaces .*@@.* with ''"),
        (decoders.Replace(Regex("_+"), " "), "a decoder that replaces .*_.* with ' '"),
    ]:
        tokenizer = Tokenizer(models.BPE({"a": 0}, []))
        tokenizer.decoder = decoder
        yield pytest.param(tokenizer, reason, id=reason)
    both = byte_level()
    both.normalizer = normalizers.Replace(" ", MARK)
    yield pytest.param(both, f"byte-level tokens in which '{MARK}' stands for a space", id="both")
    python = Tokenizer(models.BPE({"a": 0}, []))
    python.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Reverse())
    yield pytest.param(python, "to_str\\(\\) fails .*Custom PreTokenizer", id="custom")


@pytest.mark.parametrize(("tokenizer", "reason"), list(unmapped()))
def test_tokens_that_are_not_known_to_be_text(tokenizer: Any, reason: str) -> None:
    """Where the bytes of a token would be a guess, the error says why, and what to do."""
    fix = "build the table yourself and pass it as `token_bytes=`, or pass `num_bytes=` to the metric's update"
    with pytest.raises(ValueError, match=f"`tokenizer` must .*got .*{reason}.*; {fix}"):
        token_byte_lengths(tokenizer)


def test_a_model_that_is_not_known() -> None:
    """A type of model that is newer than the library is refused."""

    class Newer:
        def to_str(self) -> str:
            return byte_level().to_str().replace('"type":"BPE"', '"type":"Newer"')

    with pytest.raises(ValueError, match="got a model of the type Newer"):
        token_byte_lengths(Newer())


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        (normalizers.Replace(" ", ""), 3),
        (normalizers.Replace(MARK, " "), 3),
        (normalizers.Replace("a", MARK), 3),
        (normalizers.Replace(" ", MARK), 1),
    ],
)
def test_only_what_replaces_a_space_stands_for_it(normalizer: Any, expected: int) -> None:
    """A normaliser that deletes spaces or makes them of something else gives no token another length."""
    tokenizer = Tokenizer(models.WordLevel({MARK: 0}, unk_token="x"))
    tokenizer.normalizer = normalizer
    assert token_byte_lengths(tokenizer).tolist() == [expected]


@pytest.mark.slow
def test_no_tokenizer_library_is_needed() -> None:
    """The module imports, and refuses a string, where none of the libraries can be imported."""
    script = """
import sys
import torchmetrics  # It imports transformers itself, where that is installed.
libraries = {"tokenizers", "tiktoken", "transformers", "sentencepiece"}
for name in [name for name in sys.modules if name.partition(".")[0] in libraries]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(libraries))
from xent_metrics.token_bytes import token_byte_lengths
try:
    token_byte_lengths("gpt2")
except TypeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "got str" in result.stdout
