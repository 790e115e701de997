"""From tallies of all ranks to values under the tags that they are logged with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from xent_metrics.lightning.step_outputs import OutputReader, Tallies
from xent_metrics.lightning.windows import add_tallies
from xent_metrics.readings import ExactReading, GroupReading, NanPolicy, check_valid
from xent_metrics.tags import BITS_PER_BYTE, BOUNDS, LOGGED_READINGS, NUM_TOKENS, Tag
from xent_metrics.tally.tally import GroupTally
from xent_metrics.validation_stats import ValidationPoint


class EvaluationValues(NamedTuple):
    """What a validation or a test reads.

    Attributes:
        whole: The values of all targets and of each group, by tag.
        by_loader: Those of each loader that has targets, by its index; empty unless several have.
        total: The tally of all targets.
    """

    whole: dict[str, float]
    by_loader: dict[int, dict[str, float]]
    total: Tallies


class TaggedReadings:
    """Reads tallies; raises ValueError if they counted targets or groups that no reading can be trusted with.

    Args:
        outputs: The reader of what was tallied.
        nan_policy: See `CrossEntropyMonitor`.
        confidence: See `CrossEntropyMonitor`.
        prefix: The text before all tags.
    """

    def __init__(self, outputs: OutputReader, nan_policy: NanPolicy, confidence: float, prefix: str) -> None:
        self._outputs = outputs
        self._nan_policy: NanPolicy = nan_policy
        self._confidence = confidence
        self._prefix = prefix
        bytes_known = outputs.token_bytes is not None
        self.names = (*LOGGED_READINGS, BITS_PER_BYTE) if bytes_known else LOGGED_READINGS

    def read(
        self, stage: str, tallies: Tallies, suffix: str = "", bounds: bool = False
    ) -> tuple[dict[str, float], ExactReading]:
        """Return the values of some tallies by tag, of all targets and of each group that has some; and the former."""
        whole, by_group = self.read_exactly(tallies[:1]), self.read_exactly(tallies[1:])
        values = _whole_values(whole)
        # Two sequences have an interval. Where all losses are infinite or NaN, so is the interval, and its curves still
        # have points where their value has one.
        totals = whole[0].totals
        if bounds and (totals.sequences > 1 or (totals.nonfinite and not self._outputs.reads_means)):
            values |= {name: getattr(whole[0], name) for name in BOUNDS}
        tagged = {self._tag(stage, f"{name}{suffix}"): value for name, value in values.items()}
        for name, each in _values(by_group).items():
            for group, value, num_tokens in zip(self._outputs.groups, each, by_group[0].num_tokens, strict=True):
                if num_tokens:
                    tagged[self._tag(stage, f"{name}{suffix}", "group", group)] = value
        return tagged, whole[0]

    def count(self, stage: str, num_tokens: int, suffix: str = "") -> dict[str, float]:
        """Return a number of targets by tag."""
        return {self._tag(stage, f"{NUM_TOKENS}{suffix}"): num_tokens}

    def read_loaders(self, stage: str, loaders: Sequence[Tallies]) -> EvaluationValues:
        """Return the values of all loaders together and of each by itself."""
        total = add_tallies(*loaders)
        # Loaders that are read side by side have their targets in the first, and one that has all says nothing new.
        each = {i: whole for i, (whole, *_) in enumerate(loaders) if whole.unbind()[0].totals().scored}
        by_loader = {
            i: {
                self._tag(stage, name, "loader", f"dataloader_idx_{i}"): value
                for name, value in _whole_values(self.read_exactly((whole,))).items()
            }
            for i, whole in (each.items() if len(each) > 1 else ())
        }
        values, whole = self.read(stage, total, bounds=True)
        return EvaluationValues(values | self.count(stage, whole.num_tokens), by_loader, total[:1])

    def _tag(self, stage: str, name: str, by: Literal["group", "loader"] | None = None, part: str = "") -> str:
        return Tag(stage, name, by, part).text(self._prefix)

    def read_exactly(self, tallies: Tallies) -> list[Any]:
        """Return readings of tallies, which are copied to the host: per token, then per byte."""
        readings: list[Any] = []
        for part in (part for tally in tallies for part in tally.cpu().unbind()):
            if isinstance(part, GroupTally):
                groups = part.totals()
                check_valid(groups.everything, kept=False)
                if groups.groupless:
                    raise ValueError(
                        f"`group` must hold names of `groups`, which are {list(self._outputs.groups)}, or their "
                        f"indices, but {groups.groupless} scored targets had others; add to `groups`, or ignore the "
                        "targets."
                    )
                readings.append(GroupReading(groups, self._nan_policy))
            else:
                totals = part.totals()
                check_valid(totals, kept=False)
                readings.append(ExactReading(totals, self._nan_policy, self._confidence))
        return readings

    def validation_point(self, step: int, values: Mapping[str, float]) -> ValidationPoint:
        """Return the result of a validation in bits per token."""
        tag = f"{self._prefix}val/cross_entropy"
        return ValidationPoint(
            step, *(values.get(f"{tag}{end}", math.nan) / math.log(2) for end in ("", "_lower", "_upper"))
        )


def _whole_values(readings: Sequence[Any]) -> dict[str, float]:
    """Return the logged readings of tokens and of bytes, each of all targets."""
    return {name: value for name, [value] in _values(readings).items()}


def _values(readings: Sequence[Any]) -> dict[str, list[float]]:
    """Return the logged readings of tokens and of bytes: a list of one number, or of one for each group."""
    if not readings:
        return {}
    values = {name: getattr(readings[0], name) for name in LOGGED_READINGS}
    if len(readings) > 1:
        values[BITS_PER_BYTE] = readings[1].bits_per_token
    return {name: value if isinstance(value, list) else [value] for name, value in values.items()}
