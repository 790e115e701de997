"""Text that every CPython brings along, cut into rows for a character language model.

A text is a list of documents. A row is at most `window` characters of one document, and its input is what stands one
character earlier; a newline stands before a document. So every character is a target, also the first one, and rows are
of unequal length: a batch is padded on the right, with targets that are not scored.
"""

import hashlib
import platform
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

IGNORE_INDEX = -100
"""The target of padding: what `F.cross_entropy` and `xent_metrics` leave out unless told otherwise."""

Row = tuple[Tensor, Tensor]
"""Input and target, or a batch of them."""


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to validate on.

    Attributes:
        source: Where the text is from, in words.
        split: What is held out, in words.
        train: The documents to train on.
        validation: The documents that are held out.
        sha256: Of all documents, joined in the order of the source: whose figures may be compared.
        by_line: Whether a document is a line, so that a sample of the model ends with the line.
    """

    source: str
    split: str
    train: list[str]
    validation: list[str]
    sha256: str
    by_line: bool = False

    @property
    def alphabet(self) -> str:
        """All characters that occur, and the newline that stands before a document."""
        return "".join(sorted({"\n"}.union(*self.train, *self.validation)))


def read_topics() -> Corpus:
    """Return the help texts of this Python: prose with some code. They differ between versions of Python."""
    # Imported here, since some small distributions of Python leave it out.
    from pydoc_data.topics import topics  # noqa: PLC0415

    documents = [topics[name] for name in sorted(topics)]
    return Corpus(
        source=f"pydoc_data.topics of Python {platform.python_version()}",
        split="every 8th topic",
        train=[text for i, text in enumerate(documents) if i % 8 != 4],
        validation=documents[4::8],
        sha256=_sha256(documents),
    )


def read_names() -> Corpus:
    """Return the character names of Unicode 3.2: the same text on every Python, formulaic, one name a document."""
    frozen = unicodedata.ucd_3_2_0
    # Names that only spell out a code point, and whose number has changed between versions of Python.
    numbered = ("CJK UNIFIED IDEOGRAPH-", "HANGUL SYLLABLE ", "CJK COMPATIBILITY IDEOGRAPH-")
    names = (frozen.name(chr(code), "") for code in range(0x110000))
    documents = [f"{name}\n" for name in names if name and not name.startswith(numbered)]
    # Neighbours are near copies of each other, so whole blocks are held out: single names would be given away.
    return Corpus(
        source="unicodedata.ucd_3_2_0",
        split="every 10th block of 64 names",
        train=[name for i, name in enumerate(documents) if i // 64 % 10 != 5],
        validation=[name for i, name in enumerate(documents) if i // 64 % 10 == 5],
        sha256=_sha256(documents),
        by_line=True,
    )


def read_file(path: Path) -> Corpus:
    """Return the text of a file, whose last tenth is held out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`path` must be a text file in UTF-8, got {str(path)!r} ({error}); name another file."
        ) from error
    if len(text) < 10:
        raise ValueError(
            f"`path` must hold at least 10 characters, got {len(text)} in {str(path)!r}; name a longer file."
        )
    held_out = len(text) * 9 // 10
    return Corpus(
        source=path.name,
        split="the last tenth",
        train=[text[:held_out]],
        validation=[text[held_out:]],
        sha256=_sha256([text]),
    )


class Rows(Dataset[Row]):
    """The rows of some documents, as `(input, target)`: `target` is `input` one character later.

    Args:
        documents: Character codes, one tensor a document.
        window: The most characters that a row may have.
        stride: How many characters lie between the starts of two rows of a document. With `stride=window` every
            character is the target of one row; with `stride=1` there is a row for every window.
        newline: The code of what stands before a document.
    """

    def __init__(self, documents: list[Tensor], window: int, stride: int, newline: int) -> None:
        self._window = window
        before = torch.tensor([newline])
        self._documents = [torch.cat((before, document)) for document in documents]
        # A document that is not longer than the window is one row.
        self._starts = [
            (number, start)
            for number, document in enumerate(documents)
            for start in range(0, max(len(document) - window, 0) + stride, stride)
        ]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        number, start = self._starts[index]
        characters = self._documents[number][start : start + self._window + 1]
        return characters[:-1], characters[1:]


def pad_rows(rows: list[Row]) -> Row:
    """Stack rows to a batch `[rows, longest row]`, padded on the right."""
    inputs, targets = zip(*rows, strict=True)
    # What the padding of the input holds does not matter: a causal model never looks to the right.
    return (
        pad_sequence(inputs, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
    )


class CharData(LightningDataModule):
    """Batches of rows of characters.

    Args:
        text: Which text to read: `topics` (the help texts of this Python) or `names` (the character names of
            Unicode 3.2, one a row, the same on every Python).
        path: A file in UTF-8 to read instead.
        window: The most characters that a row may have.
        batch_size: How many rows a batch has.
    """

    def __init__(
        self,
        text: Literal["topics", "names"] = "topics",
        path: Path | None = None,
        window: int = 64,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        for name, value in (("window", window), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}; 64 and 16 are what the configs use.")
        self.window = window
        self.batch_size = batch_size
        # Read here and not in `setup`: the model is built with the size of the alphabet.
        self.corpus = read_file(path) if path is not None else _read(text)
        self.alphabet = self.corpus.alphabet
        self._codes = {character: code for code, character in enumerate(self.alphabet)}

    @property
    def vocab_size(self) -> int:
        """How many characters the alphabet has."""
        return len(self.alphabet)

    def encode(self, text: str) -> Tensor:
        """Return the codes of a text's characters: their places in the alphabet."""
        return torch.tensor([self._codes[character] for character in text])

    def decode(self, codes: list[int]) -> str:
        """Return the text that has these codes."""
        return "".join(self.alphabet[code] for code in codes)

    def setup(self, stage: str) -> None:
        """Cut the text into rows: all windows to train on, but each character only once to validate on."""
        newline = self.alphabet.index("\n")
        train = [self.encode(document) for document in self.corpus.train]
        validation = [self.encode(document) for document in self.corpus.validation]
        self.train_rows = Rows(train, self.window, stride=1, newline=newline)
        self.validation_rows = Rows(validation, self.window, stride=self.window, newline=newline)

    def train_dataloader(self) -> DataLoader[Row]:
        """Return the rows to train on, in an order that `seed_everything` decides."""
        return DataLoader(self.train_rows, self.batch_size, shuffle=True, collate_fn=pad_rows)

    def val_dataloader(self) -> DataLoader[Row]:
        """Return the rows to validate on."""
        return DataLoader(self.validation_rows, self.batch_size, collate_fn=pad_rows)


def _read(text: Literal["topics", "names"]) -> Corpus:
    if text == "topics":
        try:
            return read_topics()
        except ImportError:
            warnings.warn(
                "This Python has no `pydoc_data.topics`, so `text='names'` is read, whose figures are lower; "
                "install the full standard library for `text='topics'`.",
                stacklevel=3,
            )
    return read_names()


def _sha256(documents: list[str]) -> str:
    return hashlib.sha256("".join(documents).encode()).hexdigest()
