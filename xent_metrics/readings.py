"""From a tally to numbers: nats, bits, perplexity, an interval, counts.

`Reading` defines every number once, in terms of the mean, its standard error and `exp`. The subclasses say how these
are made. `ExactReading` works on the host in integers and rationals and rounds once, so its numbers are the same on
every device and for any batching. `GroupReading` does so for each of many groups. `DeviceReading` never waits for the
device: it computes in floating point, some 1e-16 off.

All arithmetic is in nats. A unit changes once, at the very end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._intervals import device_margin, device_stderr, exact_margin, exact_stderr
from xent_metrics._rounding import Unit, exp, in_unit, nonfinite_sum
from xent_metrics.losses.mistakes import CLASS_TARGETS, MISTAKES, counted_mistake
from xent_metrics.tally.limbs import FRACTION_BITS
from xent_metrics.tally.tally import TARGET_COUNTS, GroupTally, GroupTotals, Tally, Totals

NanPolicy = Literal["propagate", "omit", "raise"]
Average = Literal["none", "macro"]
# The compiler of PyTorch 2.6 cannot trace `get_args`.
_NAN_POLICIES, _AVERAGES, _UNITS = map(get_args, (NanPolicy, Average, Unit))


_NONFINITE = ("positive_infinite", "negative_infinite", "nan")
assert TARGET_COUNTS[-len(_NONFINITE) :] == _NONFINITE

# A mean on the device has to become an infinity or NaN without a branch. So each of `TARGET_COUNTS` adds something to
# the sum of losses: one number if it is not 0, and another if it is.
_MISTAKES_ADD = {"out_of_range": math.nan, "improper": math.nan, "invalid_weight": math.nan}
_NONFINITE_ADD: dict[NanPolicy, tuple[float, float, float]] = {
    "propagate": (math.inf, -math.inf, math.nan),
    "omit": (0.0, 0.0, 0.0),
    "raise": (math.nan, math.nan, math.nan),
}
_IF_COUNTED = {
    policy: [{**_MISTAKES_ADD, **dict(zip(_NONFINITE, own, strict=True))}.get(name, 0.0) for name in TARGET_COUNTS]
    for policy, own in _NONFINITE_ADD.items()
}
_IF_NOT_COUNTED = [math.nan if name == "scored" else 0.0 for name in TARGET_COUNTS]

# Limbs wrap at 2**127 nats. What is read is infinite long before, where no sum of real losses gets to.
_SUM_LIMIT = 2 ** (110 + FRACTION_BITS)

Value = TypeVar("Value")
Count = TypeVar("Count")


class Reading(Generic[Value, Count]):
    """What a tally says: each number is defined here, once.

    Attributes:
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"`, or `"raise"`.
        confidence: Probability that the intervals cover the mean of all sequences.
    """

    nan_policy: NanPolicy
    confidence: float

    @property
    def mean(self) -> Any:
        """Sum of `weight * loss` over the sum of `weight`, in nats, not rounded yet; NaN without targets."""
        raise NotImplementedError

    def in_unit(self, unit: Unit) -> Value:
        """Return the cross-entropy in nats or in bits."""
        raise NotImplementedError

    def _exp(self, nats: Any) -> Value:
        raise NotImplementedError

    def _count(self, name: str) -> Count:
        raise NotImplementedError

    @property
    def cross_entropy(self) -> Value:
        """Sum of `weight * loss` over the sum of `weight`, in nats; NaN without targets."""
        return self.in_unit("nats")

    @property
    def bits_per_token(self) -> Value:
        """Cross-entropy in bits: nats over ln 2."""
        return self.in_unit("bits")

    @property
    def perplexity(self) -> Value:
        """`exp` of the cross-entropy in nats; `inf` only where it exceeds the largest float."""
        return self._exp(self.mean)

    @property
    def cross_entropy_stderr(self) -> Value:
        """Standard error of the cross-entropy, clustered by sequence; NaN for fewer than two sequences."""
        raise NotImplementedError

    @property
    def cross_entropy_lower(self) -> Value:
        """Lower end of the interval, some standard errors below the cross-entropy.

        How many is a quantile of Student's distribution with `n - 1` degrees of freedom, where
        `n = W^2 / sum(W_c^2)` is the effective number of sequences of weight W_c (Kish, Survey Sampling, section 11.7):
        C where they weigh the same. Then the sum of squared residuals has `n - 1` degrees of freedom if the variance of
        a sequence's loss grows with its weight (Satterthwaite, An approximate distribution of estimates of variance
        components, 1946). An n below 1.25 is read as 1.25.
        """
        return self._bounds()[0]

    @property
    def cross_entropy_upper(self) -> Value:
        """Upper end of the interval."""
        return self._bounds()[1]

    @property
    def perplexity_lower(self) -> Value:
        """`exp` of `cross_entropy_lower`."""
        return self._exp(self.cross_entropy_lower)

    @property
    def perplexity_upper(self) -> Value:
        """`exp` of `cross_entropy_upper`."""
        return self._exp(self.cross_entropy_upper)

    @property
    def num_tokens(self) -> Count:
        """Number of targets scored, those of non-finite loss included."""
        return self._count("scored")

    @property
    def num_ignored(self) -> Count:
        """Number of targets not scored: `ignore_index`, weight 0, or masked."""
        return self._count("ignored")

    @property
    def num_nonfinite(self) -> Count:
        """Number of scored targets with an infinite or NaN loss."""
        return self._count("nonfinite")

    def _bounds(self) -> tuple[Value, Value]:
        raise NotImplementedError


@dataclass(frozen=True)
class ExactReading(Reading[float, int]):
    """Readings of a tally on the host, correctly rounded."""

    totals: Totals
    nan_policy: NanPolicy = "propagate"
    confidence: float = 0.95

    def require_finite(self) -> None:
        """Raise ValueError if there were infinite or NaN losses and `nan_policy` is `"raise"`."""
        totals = self.totals
        if totals.nonfinite and self.nan_policy == "raise":
            raise ValueError(
                f"`nan_policy='raise'` allows finite losses only, but of {totals.scored} losses {totals.nan} were NaN, "
                f"{totals.positive_infinite} infinite and {totals.negative_infinite} minus infinite; look "
                "for the cause, or pass nan_policy='omit' to leave them out; this repeats until a metric is reset."
            )

    @cached_property
    def mean(self) -> Fraction | float:
        """Cross-entropy in nats as a rational, or NaN or an infinity."""
        self.require_finite()
        totals = self.totals
        if totals.nonfinite and self.nan_policy == "propagate":
            return nonfinite_sum(totals.positive_infinite, totals.negative_infinite, totals.nan)
        # The weight of no targets may be positive: bytes that were given for a text of which nothing was scored.
        return _ratio(totals.loss, totals.weight) if totals.weight and totals.scored else math.nan

    def in_unit(self, unit: Unit) -> float:
        """Return the cross-entropy in nats or in bits."""
        return in_unit(self.mean, unit)

    @cached_property
    def cross_entropy_stderr(self) -> float:
        """Standard error of the cross-entropy, clustered by sequence; NaN for fewer than two sequences.

        It is right to 1e-3 relative, and mostly to 1e-9, or NaN: S_c and W_c are squared in units of `2**-36`, and
        where these are too coarse for the residuals, nothing is known of them. But residuals that may all be 0, and
        must be less than 6e-8 of the losses, are 0.

        The ratio estimator: `se^2 = C / (C - 1) * sum((S_c - m * W_c)^2) / W^2` over C sequences of loss S_c and
        weight W_c, with m = S / W (Cochran, Sampling Techniques, 3rd ed., section 2.11).
        """
        return exact_stderr(self.totals, self.mean) if isinstance(self.mean, Fraction) else math.nan

    @cached_property
    def _interval(self) -> tuple[float, float]:
        margin = exact_margin(self.totals, self.cross_entropy_stderr, self.confidence)
        return self.cross_entropy - margin, self.cross_entropy + margin

    def _bounds(self) -> tuple[float, float]:
        return self._interval

    def _exp(self, nats: Fraction | float) -> float:
        return exp(nats)

    def _count(self, name: str) -> int:
        number: int = getattr(self.totals, name)
        return number


@dataclass(frozen=True)
class GroupReading(Reading[list[float], list[int]]):
    """Readings of a group tally on the host: one correctly rounded number for each group, and no intervals.

    `nan_policy` holds for each group by itself, but `"raise"` for all.
    """

    totals: GroupTotals
    nan_policy: NanPolicy = "propagate"

    def require_finite(self) -> None:
        """Raise ValueError if there were infinite or NaN losses and `nan_policy` is `"raise"`."""
        self.overall.require_finite()

    @cached_property
    def mean(self) -> list[Fraction | float]:
        """Cross-entropy of each group in nats as a rational, or NaN or an infinity."""
        self.require_finite()
        totals, propagates = self.totals, self.nan_policy == "propagate"
        return [
            nonfinite_sum(*bad) if propagates and any(bad) else _ratio(loss, weight) if weight else math.nan
            for loss, weight, bad in zip(totals.loss, totals.weight, totals.nonfinite, strict=True)
        ]

    def in_unit(self, unit: Unit) -> list[float]:
        """Return the cross-entropy of each group in nats or in bits."""
        return [in_unit(mean, unit) for mean in self.mean]

    def macro_in_unit(self, unit: Unit) -> float:
        """Return the unweighted mean over the groups that have targets, in nats or in bits; NaN if none has."""
        rows = zip(self.in_unit(unit), self.totals.weight, self.totals.nonfinite, strict=True)
        propagates = self.nan_policy == "propagate"
        return macro_mean([value for value, weight, bad in rows if weight or (propagates and any(bad))])

    @property
    def overall(self) -> ExactReading:
        """What all targets together read."""
        return ExactReading(self.totals.everything, self.nan_policy)

    def _exp(self, nats: list[Fraction | float]) -> list[float]:
        return [exp(x) for x in nats]

    def _count(self, name: str) -> list[int]:
        if name == "nonfinite":
            return [sum(counts) for counts in self.totals.nonfinite]
        number: list[int] = getattr(self.totals, name)
        return number


class DeviceReading(Reading[Tensor, Tensor]):
    """Readings as tensors, without waiting for the device: NaN where the exact readings raise.

    Args:
        tally: The tally; or one of groups, which reads as one value for each group, without intervals.
        nan_policy: See `Reading`.
        confidence: See `Reading`.
    """

    def __init__(
        self, tally: Tally | GroupTally, nan_policy: NanPolicy = "propagate", confidence: float = 0.95
    ) -> None:
        self.tally = tally
        self.nan_policy = nan_policy
        self.confidence = confidence
        self.sums = tally.float_sums(_runtime.widest_float(tally.state.device))
        self._mean = self._compute_mean()
        # Not cached properties, whose lock compiled code cannot take.
        self._stderr: Tensor | None = None
        self._interval: tuple[Tensor, Tensor] | None = None

    def _compute_mean(self) -> Tensor:
        loss, weight, seen = self.sums["loss"], self.sums["weight"], self.tally.target_counts() > 0
        if isinstance(self.tally, GroupTally) and self.nan_policy == "raise":
            seen = seen | seen[-len(_NONFINITE) :].any()  # One group makes all of them NaN.
        columns = (-1, *(1 for _ in loss.shape))
        counted = _runtime.constant(_IF_COUNTED[self.nan_policy], loss, loss.dtype).view(columns)
        not_counted = _runtime.constant(_IF_NOT_COUNTED, loss, loss.dtype).view(columns)
        added = torch.where(seen, counted, not_counted).sum(0)
        # 0 / 0 is NaN, as is a finite sum over no weight, and inf / 0 is inf.
        return (loss.masked_fill(weight == 0, 0.0) + added) / weight

    @property
    def mean(self) -> Tensor:
        """Cross-entropy in nats."""
        return self._mean

    def in_unit(self, unit: Unit) -> Tensor:
        """Return the cross-entropy in nats or in bits."""
        return self._mean if unit == "nats" else self._mean / math.log(2)

    def macro_in_unit(self, unit: Unit) -> Tensor:
        """Return the unweighted mean over the groups that have targets, in nats or in bits; NaN if none has."""
        has_targets = self.sums["weight"] != 0
        if self.nan_policy == "propagate":
            has_targets = has_targets | (self._count("nonfinite") > 0)
        return self.in_unit(unit).masked_fill(~has_targets, 0.0).sum() / has_targets.sum()

    @property
    def cross_entropy_stderr(self) -> Tensor:
        """See `ExactReading.cross_entropy_stderr`; here the square is expanded in floats, some 1e-8 nats off.

        What floats cancel makes it NaN as what was cut does: where the residuals are less than 1e-6 of the losses.
        """
        if self._stderr is None:
            assert isinstance(self.tally, Tally)
            self._stderr = device_stderr(self._mean, self.sums, *self.tally.sequence_counts())
        return self._stderr

    def _exp(self, nats: Tensor) -> Tensor:
        return nats.exp()

    def _bounds(self) -> tuple[Tensor, Tensor]:
        if self._interval is None:
            nats, margin = self._mean, device_margin(self.sums, self.cross_entropy_stderr, self.confidence)
            self._interval = nats - margin, nats + margin
        return self._interval

    def _count(self, name: str) -> Tensor:
        counts = self.tally.target_counts()
        return counts[-len(_NONFINITE) :].sum(0) if name == "nonfinite" else counts[TARGET_COUNTS.index(name)]


def _ratio(loss: int, weight: int) -> Fraction | float:
    """Return a sum of losses over one of weights; an infinity if the former is too large to be trusted."""
    return Fraction(loss, weight) if abs(loss) < _SUM_LIMIT else math.copysign(math.inf, loss)


def macro_mean(values: list[float]) -> float:
    """Return the mean of numbers, rounded once but for the division; NaN of none."""
    if not all(map(math.isfinite, values)):
        return sum(values)  # An infinity, or NaN; `fsum` raises where infinities meet.
    return math.fsum(values) / len(values) if values else math.nan


def check_reading(nan_policy: NanPolicy, confidence: float = 0.95) -> None:
    """Raise ValueError if an argument is not one that a reading understands."""
    if nan_policy not in _NAN_POLICIES:
        raise ValueError(f"`nan_policy` must be one of {list(_NAN_POLICIES)}, got {nan_policy!r}.")
    if isinstance(confidence, bool) or not isinstance(confidence, float) or not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must be a float between 0 and 1, got {confidence!r}; 0.95 is usual.")


def check_unit(unit: Unit) -> None:
    """Raise ValueError if `unit` is not one that a cross-entropy can be read in."""
    if unit not in _UNITS:
        raise ValueError(f"`unit` must be one of {list(_UNITS)}, got {unit!r}.")


def check_average(average: Average) -> None:
    """Raise ValueError if `average` is not one that groups can be read with."""
    if average not in _AVERAGES:
        raise ValueError(f"`average` must be one of {list(_AVERAGES)}, got {average!r}.")


def check_valid(
    totals: Totals, groupless: int = 0, kept: bool = True, targets: str = CLASS_TARGETS, weights: str = "`weight`"
) -> None:
    """Raise ValueError if targets, probabilities, weights or groups were counted that no reading can be trusted with.

    Args:
        totals: What was counted.
        groupless: Number of scored targets without a valid group.
        kept: Whether a metric keeps the counts until it is reset.
        targets: What targets must be.
        weights: What the denominator is made of.
    """
    counts = {**totals._asdict(), "groupless": groupless}
    for mistake in MISTAKES:
        if counts[mistake.name]:
            raise ValueError(counted_mistake(mistake, counts[mistake.name], kept, targets, weights))


def read_exactly(
    tally: Tally | GroupTally,
    nan_policy: NanPolicy = "propagate",
    confidence: float = 0.95,
    targets: str = CLASS_TARGETS,
    weights: str = "`weight`",
    kept: bool = True,
) -> ExactReading | GroupReading:
    """Copy a tally to the host and read it; the other arguments, and what is raised, are those of `check_valid`."""
    totals = tally.totals()
    if isinstance(totals, GroupTotals):
        check_valid(totals.everything, totals.groupless, kept, targets, weights)
        return GroupReading(totals, nan_policy)
    check_valid(totals, 0, kept, targets, weights)
    return ExactReading(totals, nan_policy, confidence)
