"""Names of the logged values.

The tag of all targets of a stage is `{prefix}{stage}/{name}`, that of a group is
`{prefix}{stage}_by_group/{name}/{group}`, and that of a loader `{prefix}{stage}_by_loader/{name}/dataloader_idx_{i}`,
or with the name of the loader at the end.
So no tag is a folder of another: MLflow keeps a file for each tag, and a file is no folder. TensorBoard shows each of
the three as a section.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

from xent_metrics.reading_info import READINGS

LOGGED_READINGS = ("cross_entropy", "bits_per_token", "perplexity")
"""What is logged of every stage."""

BITS_PER_BYTE = "bits_per_byte"
"""What is logged of every stage too if the bytes of tokens are known."""

BOUNDED_READINGS = tuple(name for name in LOGGED_READINGS if f"{name}_lower" in READINGS)
"""Readings that have an interval, under `{name}_lower` and `{name}_upper`."""

BOUNDS = tuple(f"{name}_{end}" for name in BOUNDED_READINGS for end in ("lower", "upper"))
"""The ends of those intervals."""

NUM_TOKENS = "num_tokens"
"""How many targets were scored: in training since the fit began, in validation and test in all."""

OF_SCORES = ("accuracy", "entropy")
"""What is read of logits only, if it is asked for."""

LoggedReading = Literal["cross_entropy", "bits_per_token", "perplexity", "num_tokens", "accuracy", "entropy"]
"""What can be chosen to be logged of every stage."""

DEFAULT_READINGS: tuple[LoggedReading, ...] = ("cross_entropy", "bits_per_token", "perplexity", "num_tokens")
"""What is logged of every stage unless others are chosen."""

MACRO = {"macro_cross_entropy": "cross_entropy", "macro_bits_per_byte": "bits_per_byte"}
"""Unweighted means over groups, or over loaders, and the reading that each is the mean of."""

BEST, UNIFORM, UNIGRAM = "best_bits_per_token", "uniform_bits_per_token", "unigram_bits_per_token"
"""The lowest validation so far, and two reference lines; of validations only."""

ENDS = ("", "_epoch")
"""What follows the name of a reading of training: nothing for one within an epoch, `_epoch` for one of all of it."""

Stage = Literal["train", "val", "test"]
"""A stage of a run."""

STAGES: tuple[Stage, ...] = get_args(Stage)

_PREFIX = re.compile(r"((?!\.{1,2}/)[\w.-]+/)*[\w.-]*", re.ASCII)


class Tag(NamedTuple):
    """What a tag is of.

    Attributes:
        stage: One of `STAGES`.
        name: The name of a reading, with `_epoch` where it is of an epoch of training.
        by: What the targets are divided by; None for all of them.
        part: The name of a group or of a loader, or `dataloader_idx_{i}`.
    """

    stage: str
    name: str
    by: Literal["group", "loader"] | None = None
    part: str = ""

    def text(self, prefix: str = "") -> str:
        """Return the tag as it is logged.

        >>> Tag("val", "perplexity").text(), Tag("val", "perplexity", "loader", "dataloader_idx_0").text()
        ('val/perplexity', 'val_by_loader/perplexity/dataloader_idx_0')
        """
        return "/".join((f"{prefix}{self.section}", self.name, *([self.part] if self.by else [])))

    @property
    def section(self) -> str:
        """What stands before the name: the section of TensorBoard that shows the tag, unless there is a prefix."""
        return self.stage if self.by is None else f"{self.stage}_by_{self.by}"


def check_prefix(prefix: str) -> str:
    """Return the text before all tags; raise ValueError if a logger would refuse it."""
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
        raise ValueError(
            "`prefix` must be a path of letters, digits, '_', '.', '-' and '/', without empty parts or '..', which "
            f"all loggers accept, got {prefix!r}."
        )
    return prefix


def check_own(prefix: str, prefixes: Sequence[str]) -> None:
    """Raise ValueError if several callbacks of a Trainer have this prefix."""
    if prefixes.count(prefix) > 1:
        raise ValueError(
            f"`prefix` must be another for each CrossEntropyMonitor of a Trainer, got {prefix!r} twice; their values "
            "would be averaged under one tag."
        )


def as_choices(name: str, values: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return the different ones of some names; raise ValueError if they are not a list, or not all known."""
    is_list = isinstance(values, Iterable) and not isinstance(values, str)
    wrong = [value for value in values if value not in known] if is_list else [values]
    if wrong:
        fix = f"write [{values!r}]" if values in known else "() names none"
        raise ValueError(f"`{name}` must be a list of some of {list(known)}, got {wrong[0]!r}; {fix}.")
    return tuple(dict.fromkeys(values))


def is_part(name: object) -> bool:
    """Return whether a name can be the last part of a tag, and is not mistaken for Lightning's number of a loader."""
    return isinstance(name, str) and re.fullmatch(r"(?!dataloader_idx|\.{1,2}$)[\w.-]+", name, re.ASCII) is not None


def is_reserved(name: str) -> bool:
    """Return whether a name is that of a value of ours."""
    name = name.removesuffix("_epoch")
    return name in READINGS or name in MACRO or name in (BEST, UNIFORM, UNIGRAM)


def parse_tag(text: str, prefix: str = "") -> Tag | None:
    """Return what a tag is of; None if it cannot be ours."""
    stages = "|".join(STAGES)
    found = re.fullmatch(rf"({stages})(?:/([^/]+)|_by_(group|loader)/([^/]+)/([^/]+))", text.removeprefix(prefix))
    if not found or not text.startswith(prefix):
        return None
    stage, name, by, name_of_part, part = found.groups()
    return Tag(stage, name) if by is None else Tag(stage, name_of_part, by, part)  # type: ignore[arg-type]  # As matched.
