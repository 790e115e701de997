"""From tallies of all ranks to values under the tags that they are logged with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from xent_metrics._rounding import Unit
from xent_metrics.lightning.step_outputs import OutputReader, Tallies
from xent_metrics.lightning.windows import add_tallies
from xent_metrics.reading_info import OF_OTHER_TALLIES
from xent_metrics.readings import ExactReading, GroupReading, NanPolicy, check_valid, macro_mean
from xent_metrics.tags import BITS_PER_BYTE, BOUNDED_READINGS, LOGGED_READINGS, MACRO, NUM_TOKENS, Tag, is_part
from xent_metrics.tally.tally import GroupTally
from xent_metrics.validation_stats import ValidationPoint

_UNITS: dict[str, Unit] = {"cross_entropy": "nats", BITS_PER_BYTE: "bits"}


class EvaluationValues(NamedTuple):
    """What a validation or a test reads.

    Attributes:
        whole: The values of all targets and of each group, by tag.
        by_loader: Those of each loader that has targets, by its index; empty unless several have.
        total: The tally of all targets.
        reading: What it reads.
    """

    whole: dict[str, float]
    by_loader: dict[int, dict[str, float]]
    total: Tallies
    reading: ExactReading

    def point(self, step: int) -> ValidationPoint:
        """Return the result in bits per token."""
        reading = self.reading
        nats = (reading.cross_entropy, reading.cross_entropy_lower, reading.cross_entropy_upper)
        return ValidationPoint(step, *(x / math.log(2) for x in nats))


class TaggedReadings:
    """Reads tallies; raises ValueError if they counted targets or groups that no reading can be trusted with.

    Args:
        readings: What is read; bytes and extras are read wherever they are tallied.
        outputs: The reader of what was tallied.
        nan_policy: See `CrossEntropyMonitor`.
        confidence: See `CrossEntropyMonitor`.
        prefix: The text before all tags.

    Attributes:
        names: The names of what is read, but for the number of targets.
    """

    def __init__(
        self, readings: Sequence[str], outputs: OutputReader, nan_policy: NanPolicy, confidence: float, prefix: str
    ) -> None:
        self._outputs = outputs
        self._nan_policy: NanPolicy = nan_policy
        self._confidence = confidence
        self._prefix = prefix
        self._of_first = [name for name in readings if name in LOGGED_READINGS]
        self._counts = NUM_TOKENS in readings
        self._bounds = [f"{name}_{end}" for name in BOUNDED_READINGS if name in readings for end in ("lower", "upper")]
        self.names = (*self._of_first, *outputs.units[1:])
        self._macro = {macro: name for macro, name in MACRO.items() if name in self.names}

    def read(
        self, stage: str, tallies: Tallies, suffix: str = "", bounds: bool = False
    ) -> tuple[dict[str, float], ExactReading]:
        """Return the values of some tallies by tag, of all targets and of each group that has some; and the former."""
        whole, by_group = self.read_exactly(tallies[:1]), self.read_exactly(tallies[1:])
        values = self._values_of_one(whole)
        # Two sequences have an interval. Where all losses are infinite or NaN, so is the interval, and its curves still
        # have points where their value has one.
        totals = whole[0].totals
        if bounds and (totals.sequences > 1 or (totals.nonfinite and not self._outputs.reads_means)):
            values |= {name: getattr(whole[0], name) for name in self._bounds}
        tagged = {self._tag(stage, f"{name}{suffix}"): value for name, value in values.items()}
        for name, each, counts in self._values(by_group):
            for group, value, num_tokens in zip(self._outputs.groups, each, counts, strict=True):
                if num_tokens:
                    tagged[self._tag(stage, f"{name}{suffix}", "group", group)] = value
        return tagged, whole[0]

    def count(self, stage: str, num_tokens: int, suffix: str = "") -> dict[str, float]:
        """Return a number of targets by tag, if it is to be logged."""
        return {self._tag(stage, f"{NUM_TOKENS}{suffix}"): num_tokens} if self._counts else {}

    def read_loaders(self, stage: str, loaders: Sequence[Tallies], given: Any) -> EvaluationValues:
        """Return the values of all loaders together and of each by itself, under its name where a dict was given."""
        names = _loader_names(given, len(loaders))
        total = add_tallies(*loaders)
        # Loaders that are read side by side have their targets in the first, and one that has all says nothing new.
        each = {i: whole for i, (whole, *_) in enumerate(loaders) if whole.unbind()[0].totals().scored}
        readings = {i: self.read_exactly((whole,)) for i, whole in (each.items() if len(each) > 1 else ())}
        by_loader = {
            i: {
                self._tag(stage, name, "loader", names[i]): value
                for name, value in self._values_of_one(of_loader).items()
            }
            for i, of_loader in readings.items()
        }
        values, reading = self.read(stage, total, bounds=True)
        values |= self.count(stage, reading.num_tokens)
        macro = self._macro_means(self.read_exactly(total[1:]), [*readings.values()])
        values |= {self._tag(stage, name): value for name, value in macro.items()}
        return EvaluationValues(values, by_loader, total[:1], reading)

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

    def _values_of_one(self, readings: Sequence[ExactReading]) -> dict[str, float]:
        """Return values of all targets, without what no step returned: an accuracy where there are no logits."""
        always = (*self._of_first, BITS_PER_BYTE)
        return {name: value for name, [value], [count] in self._values(readings) if count or name in always}

    def _values(self, readings: Sequence[Any]) -> Iterator[tuple[str, list[float], list[int]]]:
        """Yield name, value and number of targets of what is logged; one of each for every group, if they have such."""
        for name in self._of_first if readings else ():
            yield name, _listed(getattr(readings[0], name)), _listed(readings[0].num_tokens)
        for name, reading in zip(self._outputs.units[1:], readings[1:], strict=False):  # Groups have no extras.
            counted = readings[0] if name == BITS_PER_BYTE else reading  # A token without bytes is a target too.
            yield (
                name,
                _listed(getattr(reading, OF_OTHER_TALLIES.get(name, "cross_entropy"))),
                _listed(counted.num_tokens),
            )

    def _macro_means(self, by_group: Sequence[Any], by_loader: Sequence[Sequence[ExactReading]]) -> dict[str, float]:
        """Return the unweighted means over the groups, or without any over the loaders, that have targets."""
        means = {}
        for macro, of in self._macro.items():
            at, unit = self._outputs.units.index(of), _UNITS[of]
            if by_group:
                means[macro] = by_group[at].macro_in_unit(unit)
            elif by_loader:
                parts = [readings[at] for readings in by_loader]
                keeps = self._nan_policy == "propagate"
                read = [x for x in parts if x.totals.weight or (keeps and x.totals.nonfinite)]
                means[macro] = macro_mean([x.in_unit(unit) for x in read])
        return means


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _loader_names(loaders: Any, num_loaders: int) -> list[str]:
    """Return the names of loaders that were given as a dict, if they can be parts of tags; else Lightning's numbers."""
    names = list(loaders) if isinstance(loaders, Mapping) else []
    if len(names) == num_loaders and all(map(is_part, names)):
        return names
    return [f"dataloader_idx_{i}" for i in range(num_loaders)]
