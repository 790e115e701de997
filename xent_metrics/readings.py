"""From a tally to the numbers that people want: nats, bits, perplexity, an interval.

Two readers with the same properties. `ExactReading` works on the host in integers and rationals, and rounds once: its
numbers are the same on every device and for any batching. `DeviceReading` never leaves the device, for the places that
must not wait for it (the value of a batch, functional forms): floating point, some 1e-16 off.

All arithmetic is in nats; a unit changes once, at the very end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from functools import cached_property
from statistics import NormalDist
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.losses.mistakes import CLASS_TARGETS, MISTAKES, counted_mistake
from xent_metrics.tally.limbs import FRACTION_BITS
from xent_metrics.tally.tally import SEQUENCE_BITS, GroupTally, GroupTotals, Tally, Totals

NanPolicy = Literal["propagate", "omit", "raise"]
Unit = Literal["nats", "bits"]

DIFFERENCE = {
    "difference": "cross_entropy",
    "difference_stderr": "cross_entropy_stderr",
    "difference_lower": "cross_entropy_lower",
    "difference_upper": "cross_entropy_upper",
    "perplexity_ratio": "perplexity",
    "perplexity_ratio_lower": "perplexity_lower",
    "perplexity_ratio_upper": "perplexity_upper",
}
"""What the readings of a tally are called if its losses are differences of two models' losses."""

# Irrational functions are evaluated to 40 digits, so that rounding to a float64 happens once.
_DECIMAL = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX)
_LN_2 = Fraction(_DECIMAL.ln(Decimal(2)))

_MIN_SEQUENCE_BITS = 8
"""The root mean square of the sequences' weights needs this many bits, or the interval is noise and reads NaN."""


def check_reading(nan_policy: NanPolicy, confidence: float = 0.95) -> None:
    """Raise unless both arguments are ones that a reading understands."""
    if nan_policy not in get_args(NanPolicy):
        raise ValueError(f"`nan_policy` must be one of {list(get_args(NanPolicy))}, got {nan_policy!r}.")
    if isinstance(confidence, bool) or not isinstance(confidence, float) or not 0.0 < confidence < 1.0:
        raise ValueError(f"`confidence` must be a float between 0 and 1, got {confidence!r}; 0.95 is usual.")


def check_unit(unit: Unit) -> None:
    """Raise unless `unit` is one that a cross-entropy can be read in."""
    if unit not in get_args(Unit):
        raise ValueError(f"`unit` must be one of {list(get_args(Unit))}, got {unit!r}.")


def check_valid(
    totals: Totals, groupless: int = 0, kept: bool = True, targets: str = CLASS_TARGETS, weights: str = "`weight`"
) -> None:
    """Raise if something was seen that no reading can be trusted with: targets, probabilities, weights or groups.

    Args:
        totals: What was seen.
        groupless: Number of scored targets without a valid group.
        kept: Whether a metric keeps it until it is reset.
        targets: What targets must be.
        weights: What the denominator is made of.
    """
    counts = {**totals._asdict(), "groupless": groupless}
    for mistake in MISTAKES:
        if counts[mistake.count]:
            raise ValueError(counted_mistake(mistake, counts[mistake.count], kept, targets, weights))


@dataclass(frozen=True)
class ExactReading:
    """Readings of a tally on the host, correctly rounded.

    Attributes:
        totals: The tally.
        nan_policy: What non-finite losses do: `"propagate"` as IEEE addition would, `"omit"`, or `"raise"`.
        confidence: Probability that the intervals cover the mean of all sequences.
    """

    totals: Totals
    nan_policy: NanPolicy = "propagate"
    confidence: float = 0.95

    def require_finite(self) -> None:
        """Raise if there were infinite or NaN losses and `nan_policy` does not allow them."""
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
            if totals.nan or (totals.positive_infinite and totals.negative_infinite):
                return math.nan
            return math.inf if totals.positive_infinite else -math.inf
        # The weight of no targets may be positive: bytes that were given for a text of which nothing was scored.
        return Fraction(totals.loss, totals.weight) if totals.weight and totals.scored else math.nan

    @property
    def cross_entropy(self) -> float:
        """Sum of `weight * loss` over the sum of `weight`, in nats; NaN without targets."""
        return float(self.mean)

    @property
    def bits_per_token(self) -> float:
        """Cross-entropy in bits: nats over ln 2."""
        mean = self.mean
        if not isinstance(mean, Fraction):
            return mean
        return mean.numerator * _LN_2.denominator / (mean.denominator * _LN_2.numerator)  # Integers: rounded once.

    @property
    def perplexity(self) -> float:
        """`exp` of the cross-entropy in nats; `inf` only where it exceeds the largest float64."""
        return _exp(self.mean)

    @cached_property
    def cross_entropy_stderr(self) -> float:
        """Standard error of the cross-entropy, clustered by sequence; NaN for fewer than two sequences.

        The ratio estimator: `se^2 = C / (C - 1) * sum((S_c - m * W_c)^2) / W^2` over C sequences of loss S_c and
        weight W_c, with m = S / W (Cochran, Sampling Techniques, 3rd ed., section 2.11). Expanding the square would
        cancel in floating point; here its terms are integers.
        """
        totals, mean = self.totals, self.mean
        count = totals.sequences
        too_coarse = totals.weight_weight < count << 2 * _MIN_SEQUENCE_BITS
        if count < 2 or not isinstance(mean, Fraction) or totals.wide_sequences or too_coarse:
            return math.nan
        # With m = up / down, all in integers: rationals would be reduced again and again.
        up, down = mean.numerator, mean.denominator
        squares = totals.loss_loss * down**2 - 2 * totals.loss_weight * up * down + totals.weight_weight * up**2
        # Each S_c and W_c was cut by less than one unit, so a residual of less than that is none.
        if squares <= count * (down + abs(up)) ** 2:
            return 0.0
        # The weight is in units of 2**-64, S_c and W_c in units of 2**-36.
        above = Decimal(count * squares << 2 * (FRACTION_BITS - SEQUENCE_BITS))
        return float(_DECIMAL.sqrt(_DECIMAL.divide(above, Decimal((count - 1) * (down * totals.weight) ** 2))))

    @property
    def cross_entropy_lower(self) -> float:
        """Lower end of the interval: so many standard errors of a normal distribution below the cross-entropy."""
        return self.cross_entropy - self._margin

    @property
    def cross_entropy_upper(self) -> float:
        """Upper end of the interval."""
        return self.cross_entropy + self._margin

    @property
    def perplexity_lower(self) -> float:
        """`exp` of `cross_entropy_lower`."""
        return _exp(self.cross_entropy_lower)

    @property
    def perplexity_upper(self) -> float:
        """`exp` of `cross_entropy_upper`."""
        return _exp(self.cross_entropy_upper)

    @property
    def num_tokens(self) -> int:
        """Number of targets scored, those of non-finite loss included."""
        return self.totals.scored

    @property
    def num_ignored(self) -> int:
        """Number of targets not scored: `ignore_index`, weight 0, or masked."""
        return self.totals.ignored

    @property
    def num_nonfinite(self) -> int:
        """Number of scored targets with an infinite or NaN loss."""
        return self.totals.nonfinite

    @property
    def _margin(self) -> float:
        return normal_quantile(self.confidence) * self.cross_entropy_stderr


class DeviceReading:
    """The same readings as tensors, without waiting for the device: NaN where `ExactReading` raises.

    Args:
        tally: The tally, or one of groups: `cross_entropy` and `bits_per_token` are then one value a group.
        nan_policy: As in `ExactReading`.
        confidence: As in `ExactReading`.
    """

    def __init__(
        self,
        tally: Tally | GroupTally,
        nan_policy: NanPolicy = "propagate",
        confidence: float = 0.95,
    ) -> None:
        self.tally = tally
        self.nan_policy = nan_policy
        self.confidence = confidence
        self.sums = tally.float_sums(_runtime.widest_float(tally.state.device))
        self.counts = tally.counts()
        self.cross_entropy: Tensor = self._mean(self.sums["loss"], self.sums["weight"])
        self._stderr: Any = None  # Not cached properties, whose lock compiled code cannot take.
        self._margin: Any = None

    def _mean(self, loss: Any, weight: Any) -> Any:
        """See `ExactReading.cross_entropy`."""
        count = self.counts
        mean = _replace(loss / weight, (weight == 0) | (count["scored"] == 0), math.nan)
        if self.nan_policy == "propagate":
            positive, negative = count["positive_infinite"] > 0, count["negative_infinite"] > 0
            mean = _replace(_replace(mean, positive, math.inf), negative, -math.inf)
            mean = _replace(mean, (count["nan"] > 0) | (positive & negative), math.nan)
        elif self.nan_policy == "raise":
            mean = _replace(mean, (self.num_nonfinite > 0).any(), math.nan)
        invalid = count["out_of_range"] + count["improper"] + count["invalid_weight"]
        if isinstance(self.tally, GroupTally):
            invalid = invalid + self.tally.num_groupless()
        return _replace(mean, invalid > 0, math.nan)

    @property
    def mean(self) -> Tensor:
        """See `ExactReading.mean`."""
        return self.cross_entropy

    @property
    def bits_per_token(self) -> Tensor:
        """See `ExactReading.bits_per_token`."""
        return self.cross_entropy / math.log(2)

    @property
    def perplexity(self) -> Tensor:
        """See `ExactReading.perplexity`."""
        return _exp_on_device(self.cross_entropy)

    @property
    def cross_entropy_stderr(self) -> Tensor:
        """See `ExactReading.cross_entropy_stderr`; here the square is expanded in floats, some 1e-8 nats off."""
        if self._stderr is None:
            self._stderr = self._compute_stderr()
        stderr: Tensor = self._stderr
        return stderr

    def _compute_stderr(self) -> Any:
        mean, sums = self.cross_entropy, self.sums
        count = self.counts["sequences"]
        squares = sums["loss_loss"] - 2 * mean * sums["loss_weight"] + mean * mean * sums["weight_weight"]
        stderr = torch.sqrt(squares.clip(min=0) * count / (count - 1)) / sums["weight"]
        too_coarse = sums["weight_weight"] < count * 2.0 ** (2 * _MIN_SEQUENCE_BITS - 2 * SEQUENCE_BITS)
        invalid = (count < 2) | (self.counts["wide_sequences"] > 0) | too_coarse | ~torch.isfinite(mean)
        return _replace(stderr, invalid, math.nan)

    @property
    def cross_entropy_lower(self) -> Tensor:
        """See `ExactReading.cross_entropy_lower`."""
        return self.cross_entropy - self._half_width()

    @property
    def cross_entropy_upper(self) -> Tensor:
        """See `ExactReading.cross_entropy_upper`."""
        return self.cross_entropy + self._half_width()

    def _half_width(self) -> Tensor:
        if self._margin is None:
            self._margin = normal_quantile(self.confidence) * self.cross_entropy_stderr
        margin: Tensor = self._margin
        return margin

    @property
    def perplexity_lower(self) -> Tensor:
        """See `ExactReading.perplexity_lower`."""
        return _exp_on_device(self.cross_entropy_lower)

    @property
    def perplexity_upper(self) -> Tensor:
        """See `ExactReading.perplexity_upper`."""
        return _exp_on_device(self.cross_entropy_upper)

    @property
    def normalized_cross_entropy(self) -> Tensor:
        """See `GroupReading.normalized_cross_entropy`."""
        assert isinstance(self.tally, GroupTally)
        overall = DeviceReading(self.tally.overall(), self.nan_policy).cross_entropy
        weight = self.sums["weight"]
        entropy = torch.special.entr(weight / weight.sum()).sum()
        value = torch.where(overall.isinf(), overall, (overall / entropy).masked_fill(entropy == 0, math.nan))
        return value.masked_fill(self.tally.num_groupless() > 0, math.nan)

    @property
    def num_tokens(self) -> Tensor:
        """See `ExactReading.num_tokens`."""
        count: Tensor = self.counts["scored"]
        return count

    @property
    def num_ignored(self) -> Tensor:
        """See `ExactReading.num_ignored`."""
        count: Tensor = self.counts["ignored"]
        return count

    @property
    def num_nonfinite(self) -> Tensor:
        """See `ExactReading.num_nonfinite`."""
        count: Tensor = sum(self.counts[name] for name in ("positive_infinite", "negative_infinite", "nan"))
        return count


@dataclass(frozen=True)
class GroupReading:
    """Readings of a group tally on the host, each correctly rounded but for the entropy, which is some 1e-15 off.

    Attributes:
        totals: The tally.
        nan_policy: As in `ExactReading`; it holds for each group by itself.
    """

    totals: GroupTotals
    nan_policy: NanPolicy = "propagate"

    @property
    def cross_entropy(self) -> list[float]:
        """Cross-entropy of each group in nats; NaN without targets."""
        return self._means(Fraction(1))

    @property
    def bits_per_token(self) -> list[float]:
        """Cross-entropy of each group in bits."""
        return self._means(_LN_2)

    @property
    def perplexity(self) -> list[float]:
        """`exp` of each group's cross-entropy."""
        return [_exp(mean) for mean in self.cross_entropy]

    @property
    def num_tokens(self) -> list[int]:
        """Number of targets of each group that were scored, those of non-finite loss included."""
        return self.totals.scored

    @property
    def overall(self) -> ExactReading:
        """What all targets together read."""
        return ExactReading(self.totals.everything, self.nan_policy)

    @property
    def entropy(self) -> float:
        """Entropy in nats of the frequencies of the groups, a target counting as its weight; NaN without targets."""
        whole = self.totals.everything.weight
        if not whole:
            return math.nan
        # Each logarithm is taken where it is accurate: log1p of what is missing for a group of more than half.
        return math.fsum(
            -part / whole * (math.log(part / whole) if 2 * part < whole else math.log1p((part - whole) / whole))
            for part in self.totals.weight
            if part
        )

    @property
    def normalized_cross_entropy(self) -> float:
        """Cross-entropy over the entropy of the frequencies; NaN where that is 0, and without targets."""
        overall, entropy = self.overall.cross_entropy, self.entropy
        if math.isinf(overall):
            return overall  # Whatever the frequencies: they lack the targets that made it so.
        return overall / entropy if entropy else math.nan

    def _means(self, unit: Fraction) -> list[float]:
        """Divide loss by weight for each group; an integer over an integer is rounded once."""
        self.overall.require_finite()
        up, down = unit.denominator, unit.numerator
        means = [
            loss * up / (weight * down) if weight else math.nan
            for loss, weight in zip(self.totals.loss, self.totals.weight, strict=True)
        ]
        if self.totals.everything.nonfinite and self.nan_policy == "propagate":
            for group, (positive, negative, nan) in enumerate(self.totals.nonfinite):
                if positive or negative or nan:
                    both = positive and negative
                    means[group] = math.nan if nan or both else math.inf if positive else -math.inf
        return means


def read_exactly(
    tally: Tally | GroupTally,
    nan_policy: NanPolicy = "propagate",
    confidence: float = 0.95,
    targets: str = CLASS_TARGETS,
    weights: str = "`weight`",
) -> ExactReading | GroupReading:
    """Copy a tally to the host and read it; raise if it counted what no reading can be trusted with."""
    if isinstance(tally, GroupTally):
        groups = tally.totals()
        check_valid(groups.everything, groups.groupless, targets=targets, weights=weights)
        return GroupReading(groups, nan_policy)
    totals = tally.totals()
    check_valid(totals, targets=targets, weights=weights)
    return ExactReading(totals, nan_policy, confidence)


def decomposition(total: Any, entropy: Any) -> dict[str, Any]:
    """Return cross-entropy, entropy and their difference, from exact readings of the two or from ones on the device."""
    cross_entropy, own = total.mean, entropy.mean
    if isinstance(total, DeviceReading) and total.nan_policy == "raise":
        own = _replace(own, total.num_nonfinite > 0, math.nan)
    return {"cross_entropy": cross_entropy, "entropy": own, "kl_divergence": cross_entropy - own}


def _exp_on_device(x: Tensor) -> Tensor:
    """Return `exp(x)` of a tensor."""
    return x.exp()


def _replace(x: Any, where: Any, value: float) -> Any:
    """Replace a tensor where a condition holds."""
    return x.masked_fill(where, value)


def normal_quantile(confidence: float) -> float:
    """Return how many standard errors on either side cover a normal mean with this probability."""
    quantile: float = _inverse_cdf((1 - confidence) / 2)  # Of the lower tail, which no confidence rounds to 0.
    return -quantile


def _inverse_cdf(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


# It is C, which compiled code cannot trace. This is all that `torch.compiler.assume_constant_result` does, but for
# importing the compiler first, which takes a second.
_inverse_cdf._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _exp(x: Fraction | float) -> float:
    """Return `exp(x)` correctly rounded, `inf` where it exceeds the largest float64."""
    if isinstance(x, float) and not math.isfinite(x):
        return math.exp(x)
    if not -1000 <= x <= 1000:  # Far beyond what a float64 holds (709.8 and -745.1), and slow to compute.
        return math.inf if x > 0 else 0.0
    exact = Decimal(x) if isinstance(x, float) else _DECIMAL.divide(Decimal(x.numerator), Decimal(x.denominator))
    return float(_DECIMAL.exp(exact))
