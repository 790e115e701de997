"""How many bytes of text a token stands for: what turns nats per token into bits per byte.

The lengths come from the raw bytes of each token. Decoding a token and encoding the string again is wrong: a token that
holds a part of a character decodes to U+FFFD, which has 3 bytes, whatever the token had.

No tokenizer library is imported. A tokenizer is known by its methods, and a Hugging Face one is read as its own JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from xent_metrics._validate import as_token_table, describe

# GPT-2's alphabet of bytes: a printable character of Latin-1 is its own byte, the other 68 bytes follow from U+0100.
_BYTE_LEVEL_ALPHABET = frozenset(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)]))
_FALLBACK_BYTE = re.compile("<0x[0-9A-F]{2}>")
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}
_DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}

_BUILD_IT = "build the table yourself and pass it as `token_bytes=`"


def token_byte_lengths(tokenizer: Any) -> Tensor:
    """Count the UTF-8 bytes of text that each token of a vocabulary stands for.

    Warning:
        Never make this table with `len(tokenizer.decode([token]).encode())`. A token that holds a part of a character
        decodes to U+FFFD and would count 3 bytes, a space in front may be stripped, and all bytes per token and bits
        per byte are wrong without a sign of it.

    What a token stands for is read from how the tokenizer encodes:

    | tokenizer | a token's bytes |
    |---|---|
    | byte-level BPE, as in GPT-2 and Llama 3 | each character of the token's string is one byte |
    | byte fallback, as in Llama 2 | `<0x0A>` is one byte, any other string its UTF-8 |
    | Metaspace, or a `Replace` of spaces, as in SentencePiece | U+2581 is a space |
    | WordPiece | the prefix `##` is nothing |
    | tiktoken | the token's own bytes |

    The table knows tokens, not texts. It cannot account for whitespace that no token carries (WordPiece), for what a
    normaliser changed (lowercase, NFKC), for a space that the tokenizer puts in front of a text, or for a literal
    U+2581, which becomes a space, or a literal `<0x0A>` in a Unigram model, which becomes a byte: `check_token_bytes`
    tells whether any of this happens.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, a fast tokenizer of transformers, or a tiktoken `Encoding`.

    Returns:
        An int64 tensor on the CPU with an entry for each id up to the largest: 0 for special tokens and the unknown
        token, which stand for no text of their own, and for ids without a token. An added token that is not special
        stands for its content. A model may have more classes than its tokenizer has ids; pad the table with 0 then.

    Raises:
        TypeError: If `tokenizer` is anything else, such as a slow tokenizer.
        ValueError: If its tokens cannot be mapped to text, as with an `end_of_word_suffix`.

    Example::

        tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2")
        token_bytes = token_byte_lengths(tokenizer)
        check_token_bytes(tokenizer, texts, token_bytes)
    """
    if hasattr(tokenizer, "decode_single_token_bytes"):
        lengths = _tiktoken_lengths(tokenizer)
    else:
        lengths = _fast_lengths(_pipeline(tokenizer))
    table = torch.zeros(max(lengths, default=-1) + 1, dtype=torch.int64, device="cpu")
    if lengths:
        table[torch.tensor(list(lengths), device="cpu")] = torch.tensor(list(lengths.values()), device="cpu")
    return table


def check_token_bytes(tokenizer: Any, texts: Iterable[str], token_bytes: Tensor | None = None) -> None:
    """Raise unless the tokens of each text stand for exactly the UTF-8 bytes that the text has.

    Run it on some texts of the data before trusting a value per byte: many tokenizers change or drop a part of a text,
    or put a space in front of it (Llama 2), and no table of token lengths can account for that. Use more than one
    text, since errors of opposite sign within one text cancel.

    Args:
        tokenizer: What `token_byte_lengths` takes; with `token_bytes`, a slow tokenizer of transformers too.
        texts: Strings, each encoded by itself and without added special tokens.
        token_bytes: Bytes for each token id, a vector of integers; None for `token_byte_lengths(tokenizer)`.

    Raises:
        TypeError: If an argument is not one of those named above; a single string is not.
        ValueError: If the bytes of a text and those of its tokens differ, if there are no texts, or if a text has a
            token that is not in the table.

    Example::

        check_token_bytes(tokenizer, ["A text of the evaluation set.", "Another one, with 漢字 and 🙂."])
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"`texts` must be a list of strings, got {type(texts).__name__}; pass [text] for a single one.")
    if token_bytes is None:
        token_bytes = token_byte_lengths(tokenizer)
    lengths = as_token_table(token_bytes).tolist()
    first: tuple[str, int, int] | None = None
    num_texts, total, total_by_tokens = 0, 0, 0
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"`texts` must hold strings, got {describe(text)}; pass the text, before tokenization.")
        own, by_tokens = len(text.encode("utf-8")), _sum(lengths, _encode(tokenizer, text))
        num_texts, total, total_by_tokens = num_texts + 1, total + own, total_by_tokens + by_tokens
        if own != by_tokens and first is None:
            first = text, own, by_tokens
    if num_texts == 0:
        raise ValueError("`texts` must hold at least one text, got none; a generator can be read only once.")
    if first is not None:
        text, own, by_tokens = first
        raise ValueError(
            f"`texts` must have as many UTF-8 bytes as their tokens stand for, got {own} in "
            f"{text if len(text) <= 40 else text[:40] + '...'!r} and {by_tokens} in its tokens ({total} and "
            f"{total_by_tokens} over all texts, {num_texts} in number), likely because of {_cause(own, by_tokens)}; "
            "pass `num_bytes=` to the metric's update with the text's own bytes."
        )


def _cause(own: int, by_tokens: int) -> str:
    """Say what makes the tokens of a text stand for more bytes than it has, or for fewer."""
    if by_tokens > own:
        return "a space that the tokenizer puts in front of each text, or normalisation that makes the text longer"
    return (
        "whitespace that no token carries (as in WordPiece), normalisation (lowercase, NFKC), unknown tokens, "
        "U+2581, special tokens or tokens of bytes written in the text, or truncation"
    )


def _sum(lengths: list[int], ids: list[int]) -> int:
    """Add up the lengths of the tokens of a text."""
    if ids and max(ids) >= len(lengths):
        raise ValueError(
            f"`token_bytes` must have an entry for each token id, got {len(lengths)} entries and the id {max(ids)}; "
            "make it with token_byte_lengths(tokenizer)."
        )
    return sum(lengths[i] for i in ids)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it."""
    if hasattr(tokenizer, "encode_ordinary"):
        return list(tokenizer.encode_ordinary(text))
    if not hasattr(tokenizer, "token_to_id") and not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise TypeError(
            "`tokenizer` must be a `tokenizers.Tokenizer`, a tokenizer of transformers or a tiktoken `Encoding`, got "
            f"{type(tokenizer).__name__}; for any other, compare the sums yourself."
        )
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))  # transformers returns the ids themselves.


def _tiktoken_lengths(encoding: Any) -> dict[int, int]:
    """Return the length of each id, special tokens included, of a tiktoken `Encoding`."""
    lengths = {}
    for token in range(encoding.n_vocab):
        try:
            raw = encoding.decode_single_token_bytes(token)
        except KeyError:  # There is no such token.
            continue
        lengths[token] = 0 if encoding.is_special_token(token) else len(raw)
    return lengths


def _pipeline(tokenizer: Any) -> dict[str, Any]:
    """Return what a fast tokenizer consists of."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise TypeError(
            "`tokenizer` must be a `tokenizers.Tokenizer`, a fast tokenizer of transformers or a tiktoken `Encoding`, "
            f"got {type(tokenizer).__name__}; for any other, {_BUILD_IT}."
        )
    try:
        pipeline: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # The library raises no narrower one for parts that are written in Python.
        raise ValueError(
            f"`tokenizer` must be one that can be saved, got one whose to_str() fails ({error}); {_BUILD_IT}."
        ) from error
    return pipeline


def _fast_lengths(pipeline: dict[str, Any]) -> dict[int, int]:
    """Return the length of each id, special tokens included, of a fast tokenizer."""
    model = pipeline["model"]
    byte_level = any(
        part["type"] == "ByteLevel"
        for stage in ("normalizer", "pre_tokenizer", "decoder")
        for part in _parts(pipeline[stage])
    )
    marks = _space_marks(pipeline)
    _check_mapping(pipeline, byte_level, marks)
    prefix = model.get("continuing_subword_prefix") or ""

    def length(piece: str) -> int:
        piece = piece.removeprefix(prefix)
        if byte_level and _BYTE_LEVEL_ALPHABET.issuperset(piece):
            return len(piece)
        if model.get("byte_fallback") and _FALLBACK_BYTE.fullmatch(piece):
            return 1
        for mark in marks:
            piece = piece.replace(mark, " ")
        return len(piece.encode("utf-8"))

    if model["type"] == "Unigram":
        lengths = {token: length(piece) for token, (piece, _) in enumerate(model["vocab"])}
        unknown = model["unk_id"]
    else:
        lengths = {token: length(piece) for piece, token in model["vocab"].items()}
        unknown = model["vocab"].get(model["unk_token"])
    if unknown is not None:
        lengths[unknown] = 0
    for added in pipeline["added_tokens"]:
        if added["special"]:
            lengths[added["id"]] = 0
        # Added tokens are found in the text as they are written. Gemma's runs of U+2581 are in the model as well, and
        # there they stand for spaces.
        elif byte_level or added["id"] not in lengths:
            lengths[added["id"]] = len(added["content"].encode("utf-8"))
    return lengths


def _parts(stage: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normaliser, a pre-tokenizer or a decoder, in whatever sequences they are."""
    if stage is None:
        return
    if stage["type"] != "Sequence":
        yield stage
        return
    for value in stage.values():  # The list is under a name of its own in each of the three.
        if isinstance(value, list):
            for part in value:
                yield from _parts(part)


def _space_marks(pipeline: dict[str, Any]) -> set[str]:
    """Return what stands for a space in a token: usually U+2581, or nothing at all."""
    marks = {
        part["replacement"]
        for stage in ("pre_tokenizer", "decoder")
        for part in _parts(pipeline[stage])
        if part["type"] == "Metaspace"
    }
    for part in _parts(pipeline["normalizer"]):
        if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
            marks.add(part["content"])
    for part in _parts(pipeline["decoder"]):
        if part["type"] == "Replace":  # By a space: any other is refused.
            marks.add(part["pattern"].get("String", ""))
    return marks - {""}  # A normaliser may delete spaces.


def _check_mapping(pipeline: dict[str, Any], byte_level: bool, marks: set[str]) -> None:
    """Raise if the strings of the tokens are not known to be text."""
    model, decoders = pipeline["model"], list(_parts(pipeline["decoder"]))
    reason = None
    if model["type"] not in _MODELS:
        reason = f"a model of the type {model['type']}"
    elif model.get("end_of_word_suffix"):
        reason = f"a model with the end_of_word_suffix {model['end_of_word_suffix']!r}, which may stand for a space"
    elif byte_level and marks:
        reason = f"byte-level tokens in which {min(marks)!r} stands for a space"
    for part in decoders:
        if part["type"] not in _DECODERS:
            reason = reason or f"a decoder of the type {part['type']}"
        elif part["type"] == "Replace" and (part["content"] != " " or "String" not in part["pattern"]):
            reason = reason or f"a decoder that replaces {part['pattern']} with {part['content']!r}"
    if reason:
        raise ValueError(f"`tokenizer` must have tokens that can be mapped to text, got {reason}; {_BUILD_IT}.")
