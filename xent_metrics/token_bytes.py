"""How many bytes of text a token stands for: what turns nats per token into bits per byte.

The lengths come from the raw bytes of each token. Decoding a token and encoding the string again is wrong: a token that
holds a part of a character decodes to U+FFFD, which has 3 bytes, whatever the token had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from xent_metrics._tokenizers import encode, lengths_of_tokens, mark_in_bytes
from xent_metrics._validate import as_token_table, describe

_TOO_FEW = (
    "whitespace that no token carries (as in WordPiece), normalisation (lowercase, NFKC), unknown tokens, U+2581, "
    "special tokens or tokens of bytes written in the text, or truncation"
)
"""What makes the tokens of a text stand for fewer bytes than it has."""


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
    | a `SentencePieceProcessor` | a byte is one byte, any other piece its UTF-8 with U+2581 for a space |

    The table knows tokens, not texts. It cannot account for whitespace that no token carries (WordPiece), for what a
    normaliser changed (lowercase, NFKC), for a space that the tokenizer puts in front of a text, or for a literal
    U+2581, which becomes a space, or a literal `<0x0A>` in a Unigram model, which becomes a byte: `check_token_bytes`
    tells whether any of this happens.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, a fast tokenizer of transformers, a tiktoken `Encoding`, or a
            `sentencepiece.SentencePieceProcessor`.

    Returns:
        An int64 tensor on the CPU with an entry for each id up to the largest: 0 for special tokens and the unknown
        token, which stand for no text of their own, and for ids without a token. An added token that is not special
        stands for its content, normalised if it is looked for in normalised text. A model may have more classes than
        its tokenizer has ids; pad the table with 0 then.

    Raises:
        TypeError: If `tokenizer` is anything else, such as a slow tokenizer.
        ValueError: If its tokens cannot be mapped to text, as with an `end_of_word_suffix` (CLIP), which stands for a
            space or for none. Pass `num_bytes=` to the metric's update then.

    Example::

        tokenizer = transformers.AutoTokenizer.from_pretrained("gpt2")
        token_bytes = token_byte_lengths(tokenizer)
        check_token_bytes(tokenizer, texts, token_bytes)
    """
    lengths = lengths_of_tokens(tokenizer)
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
        TypeError: If an argument is not one of those named above; a single string is not, nor is a dict of columns.
        ValueError: If the bytes of a text and those of its tokens differ, if there are no texts, or if a text has no
            UTF-8 or a token that is not in the table.

    Example::

        check_token_bytes(tokenizer, ["A text of the evaluation set.", "Another one, with 漢字 and 🙂."])
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"`texts` must be a list of strings, got {type(texts).__name__}; pass [text] for a single one.")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):  # Of which the names would be checked.
        raise TypeError(
            f"`texts` must be a list of strings, got {type(texts).__name__} of columns; pass one of them, such as "
            "texts['text']."
        )
    lengths = as_token_table(token_byte_lengths(tokenizer) if token_bytes is None else token_bytes).tolist()
    first: tuple[str, int, int] | None = None
    num_texts, total, total_by_tokens = 0, 0, 0
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"`texts` must hold strings, got {describe(text)}; pass the text, before tokenization.")
        own, by_tokens = _num_bytes_of_text(text), _sum(lengths, encode(tokenizer, text))
        num_texts, total, total_by_tokens = num_texts + 1, total + own, total_by_tokens + by_tokens
        if own != by_tokens and first is None:
            first = text, own, by_tokens
    if num_texts == 0:
        raise ValueError("`texts` must hold at least one text, got none; a generator can be read only once.")
    if first is not None:
        text, own, by_tokens = first
        cause = _too_many(tokenizer, text, token_bytes is not None) if by_tokens > own else _TOO_FEW
        raise ValueError(
            f"`texts` must have as many UTF-8 bytes as their tokens stand for, got {own} in "
            f"{text if len(text) <= 40 else text[:40] + '...'!r} and {by_tokens} in its tokens ({total} and "
            f"{total_by_tokens} over all texts, {num_texts} in number), likely because of {cause}; "
            "pass `num_bytes=` to the metric's update with the text's own bytes."
        )


def _num_bytes_of_text(text: str) -> int:
    """Return how many bytes of UTF-8 a text has."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`texts` must hold text that has UTF-8, got the lone surrogate {text[error.start]!r} at index "
            f"{error.start}; read it again with errors='replace', or leave the text out."
        ) from None


def _too_many(tokenizer: Any, text: str, is_own_table: bool) -> str:
    """Say what makes the tokens of a text stand for more bytes than it has."""
    mark = mark_in_bytes(tokenizer, text)
    if mark:
        return f"spaces that become {mark!r}, for which the vocabulary has no token but one for each of its bytes"
    table = ", or a table in which a space or a part of a character has several bytes" if is_own_table else ""
    return f"a space that the tokenizer puts in front of each text, or normalisation that makes the text longer{table}"


def _sum(lengths: list[int], ids: list[int]) -> int:
    """Add up the lengths of the tokens of a text."""
    if ids and max(ids) >= len(lengths):
        raise ValueError(
            f"`token_bytes` must have an entry for each token id, got {len(lengths)} entries and the id {max(ids)}; "
            "make it with token_byte_lengths(tokenizer)."
        )
    return sum(lengths[i] for i in ids)
