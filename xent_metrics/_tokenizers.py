"""What is asked of a tokenizer, whatever library it is of: the bytes of each token, and the ids of a text.

No tokenizer library is imported. A tokenizer is known by its methods, and a Hugging Face one is read as its own JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

# GPT-2's alphabet of bytes: a printable character of Latin-1 is its own byte, the other 68 bytes follow from U+0100.
_BYTE_LEVEL_ALPHABET = frozenset(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)]))
_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # What SentencePiece makes of a space.
_FALLBACK_BYTE = re.compile("<0x[0-9A-F]{2}>")
_MODELS = {"BPE", "Unigram", "WordLevel", "WordPiece"}
_DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}

_KINDS = (
    "a `tokenizers.Tokenizer`, a fast tokenizer of transformers, a tiktoken `Encoding` or a `SentencePieceProcessor`"
)
_BUILD_IT = (
    "build the table yourself and pass it as `token_bytes=`, or pass `num_bytes=` to the metric's update with the "
    "texts' own bytes"
)


def lengths_of_tokens(tokenizer: Any) -> dict[int, int]:
    """Return how many bytes of text each id stands for; see `token_byte_lengths`."""
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return _tiktoken_lengths(tokenizer)
    if _is_sentencepiece(tokenizer):
        return _sentencepiece_lengths(tokenizer)
    return _fast_lengths(_pipeline(tokenizer), _normaliser(tokenizer))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, without special tokens around it."""
    if hasattr(tokenizer, "encode_ordinary"):
        return list(tokenizer.encode_ordinary(text))
    if _is_sentencepiece(tokenizer):
        return list(tokenizer.encode(text, out_type=int, add_bos=False, add_eos=False, enable_sampling=False))
    if not hasattr(tokenizer, "token_to_id") and not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise TypeError(
            f"`tokenizer` must be {_KINDS.replace('a fast', 'a')}, got {type(tokenizer).__name__}; for any other, "
            "compare the sums yourself."
        )
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))  # transformers returns the ids themselves.


def _tiktoken_lengths(encoding: Any) -> dict[int, int]:
    """Return the length of each id, special tokens included, of a tiktoken `Encoding`."""
    # Not `is_special_token`, which old releases do not have, or which fails (up to 0.12).
    special, lengths = {*encoding._special_tokens.values()}, {}
    for token in range(encoding.n_vocab):
        try:
            raw = encoding.decode_single_token_bytes(token)
        except KeyError:  # There is no such token.
            continue
        lengths[token] = 0 if token in special else len(raw)
    return lengths


def _is_sentencepiece(tokenizer: Any) -> bool:
    """Return whether a tokenizer is a `SentencePieceProcessor`."""
    return all(hasattr(tokenizer, name) for name in ("id_to_piece", "piece_to_id", "is_byte"))


def _sentencepiece_lengths(processor: Any) -> dict[int, int]:
    """Return the length of each id, control symbols included, of a `SentencePieceProcessor`."""

    def length(token: int) -> int:
        if processor.is_control(token) or processor.is_unknown(token):
            return 0
        return 1 if processor.is_byte(token) else _num_bytes(processor.id_to_piece(token), False, {_MARK})

    return {token: length(token) for token in range(processor.get_piece_size())}


def _pipeline(tokenizer: Any) -> dict[str, Any]:
    """Return what a fast tokenizer consists of."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise TypeError(f"`tokenizer` must be {_KINDS}, got {type(tokenizer).__name__}; for any other, {_BUILD_IT}.")
    try:
        pipeline: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # The library raises no narrower one for parts that are written in Python.
        raise ValueError(
            f"`tokenizer` must be one that can be saved, got one whose to_str() fails ({error}); {_BUILD_IT}."
        ) from error
    return pipeline


def _normaliser(tokenizer: Any) -> Callable[[str], str]:
    """Return what a fast tokenizer does to a text before it looks for tokens in it."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "normalizer", None)
    return str if normalizer is None else normalizer.normalize_str


def _fast_lengths(pipeline: dict[str, Any], normalise: Callable[[str], str]) -> dict[int, int]:
    """Return the length of each id, special tokens included, of a fast tokenizer."""
    model, marks = pipeline["model"], _space_marks(pipeline)
    byte_level = any(_is_byte_level(pipeline[stage]) for stage in ("normalizer", "pre_tokenizer", "decoder"))
    _check_mapping(pipeline, byte_level, marks)
    prefix = model.get("continuing_subword_prefix") or ""

    def length(piece: str) -> int:
        piece = piece.removeprefix(prefix)
        if not byte_level and model.get("byte_fallback") and _FALLBACK_BYTE.fullmatch(piece):
            return 1
        return _num_bytes(piece, byte_level, marks)

    if model["type"] == "Unigram":
        lengths = {token: length(piece) for token, (piece, _) in enumerate(model["vocab"])}
        unknown = model["unk_id"]
    else:
        lengths = {token: length(piece) for piece, token in model["vocab"].items()}
        unknown = model["vocab"].get(model["unk_token"])
    if unknown is not None:
        lengths[unknown] = 0
    normal_marks = {mark for mark in marks if mark in normalise("a b")}  # Others are made after added tokens are found.
    for added in pipeline["added_tokens"]:
        token, content = added["id"], added["content"]
        if added["special"]:
            lengths[token] = 0
        # Gemma's runs of U+2581 are in the model as well, and there they stand for spaces.
        elif not byte_level and token in lengths:
            continue
        elif added["normalized"]:  # It is normalised itself, and found in the normalised text.
            lengths[token] = _num_bytes(normalise(content), _is_byte_level(pipeline["normalizer"]), normal_marks)
        else:  # It is found in the text as it is written.
            lengths[token] = len(content.encode("utf-8"))
    return lengths


def _num_bytes(piece: str, byte_level: bool, marks: set[str]) -> int:
    """Return how many bytes of text a string stands for, in which characters are bytes or marks are spaces."""
    if byte_level and _BYTE_LEVEL_ALPHABET.issuperset(piece):
        return len(piece)
    for mark in marks:
        piece = piece.replace(mark, " ")
    return len(piece.encode("utf-8"))


def _is_byte_level(stage: dict[str, Any] | None) -> bool:
    """Return whether a normaliser, a pre-tokenizer or a decoder makes characters of bytes, or bytes of characters."""
    return any(part["type"] == "ByteLevel" for part in _parts(stage))


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


def mark_in_bytes(tokenizer: Any, text: str) -> str | None:
    """Return what stands for a space, if the tokens of a text are its bytes; None if they are not."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if _is_sentencepiece(backend):
        marks, id_of = {_MARK}, backend.piece_to_id
    elif hasattr(backend, "to_str"):
        marks, id_of = _space_marks(_pipeline(backend)), backend.token_to_id
    else:
        return None
    ids = encode(tokenizer, text)
    for mark in marks:
        spelt = [id_of(f"<0x{byte:02X}>") for byte in mark.encode("utf-8")]
        if any(ids[i : i + len(spelt)] == spelt for i in range(len(ids))):
            return mark
    return None
