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
from typing import Literal, get_args

from torch import Tensor

from xent_metrics.exact import FRACTION_BITS, widest_float
from xent_metrics.tally import SEQUENCE_BITS, Tally, Totals

NanPolicy = Literal["propagate", "omit", "raise"]
Unit = Literal["nats", "bits"]

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


def check_valid(totals: Totals) -> None:
    """Raise if a target or a weight was seen that no reading can be trusted with."""
    if totals.out_of_range:
        raise ValueError(
            f"`target` must hold class indices in [0, number of classes), but {totals.out_of_range} "
            "targets were outside; "
            "map them to `ignore_index`, or mask them with `weight`, then call reset(): this repeats until then."
        )
    if totals.invalid_weight:
        raise ValueError(
            f"`weight` must hold finite numbers that are not negative, but {totals.invalid_weight} were not; "
            "mend them, then call reset(): this repeats until then."
        )


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
                "for the cause, "
                "or pass nan_policy='omit' to leave them out."
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
        return Fraction(totals.loss, totals.weight) if totals.weight else math.nan

    @property
    def cross_entropy(self) -> float:
        """Sum of `weight * loss` over the sum of `weight`, in nats; NaN without targets."""
        return float(self.mean)

    @property
    def bits_per_token(self) -> float:
        """Cross-entropy in bits: nats over ln 2."""
        return float(self.mean / _LN_2) if isinstance(self.mean, Fraction) else self.mean

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
        squares = totals.loss_loss - 2 * mean * totals.loss_weight + mean * mean * totals.weight_weight
        # Each S_c and W_c was cut by less than one unit, so a residual of less than that is none.
        if squares <= count * (1 + abs(mean)) ** 2:
            return 0.0
        weight = Fraction(totals.weight, 2 ** (FRACTION_BITS - SEQUENCE_BITS))
        variance = Fraction(count, count - 1) * squares / (weight * weight)
        return float(_DECIMAL.sqrt(_DECIMAL.divide(Decimal(variance.numerator), Decimal(variance.denominator))))

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


@dataclass(frozen=True)
class DeviceReading:
    """The same readings as tensors, without waiting for the device: NaN where `ExactReading` raises."""

    tally: Tally
    nan_policy: NanPolicy = "propagate"
    confidence: float = 0.95

    @cached_property
    def _sums(self) -> dict[str, Tensor]:
        return self.tally.sums_on_device(widest_float(self.tally.state.device))

    @cached_property
    def cross_entropy(self) -> Tensor:
        """See `ExactReading.cross_entropy`."""
        count = self.tally.count_on_device
        weight = self._sums["weight"]
        mean = (self._sums["loss"] / weight).masked_fill(weight == 0, math.nan)
        if self.nan_policy == "propagate":
            mean = mean.masked_fill(count("positive_infinite") > 0, math.inf)
            mean = mean.masked_fill(count("negative_infinite") > 0, -math.inf)
            both = (count("positive_infinite") > 0) & (count("negative_infinite") > 0)
            mean = mean.masked_fill((count("nan") > 0) | both, math.nan)
        elif self.nan_policy == "raise":
            mean = mean.masked_fill(self.num_nonfinite > 0, math.nan)
        return mean.masked_fill((count("out_of_range") + count("invalid_weight")) > 0, math.nan)

    @property
    def bits_per_token(self) -> Tensor:
        """See `ExactReading.bits_per_token`."""
        return self.cross_entropy / math.log(2)

    @property
    def perplexity(self) -> Tensor:
        """See `ExactReading.perplexity`."""
        return self.cross_entropy.exp()

    @cached_property
    def cross_entropy_stderr(self) -> Tensor:
        """See `ExactReading.cross_entropy_stderr`; here the square is expanded in floats, some 1e-8 nats off."""
        mean, sums = self.cross_entropy, self._sums
        count = self.tally.count_on_device("sequences")
        squares = sums["loss_loss"] - 2 * mean * sums["loss_weight"] + mean * mean * sums["weight_weight"]
        stderr = (count / (count - 1) * squares.clamp(min=0)).sqrt() / sums["weight"]
        too_coarse = sums["weight_weight"] < count * 2.0 ** (2 * _MIN_SEQUENCE_BITS - 2 * SEQUENCE_BITS)
        invalid = (count < 2) | (self.tally.count_on_device("wide_sequences") > 0) | too_coarse | ~mean.isfinite()
        return stderr.masked_fill(invalid, math.nan)

    @cached_property
    def cross_entropy_lower(self) -> Tensor:
        """See `ExactReading.cross_entropy_lower`."""
        return self.cross_entropy - normal_quantile(self.confidence) * self.cross_entropy_stderr

    @cached_property
    def cross_entropy_upper(self) -> Tensor:
        """See `ExactReading.cross_entropy_upper`."""
        return self.cross_entropy + normal_quantile(self.confidence) * self.cross_entropy_stderr

    @property
    def perplexity_lower(self) -> Tensor:
        """See `ExactReading.perplexity_lower`."""
        return self.cross_entropy_lower.exp()

    @property
    def perplexity_upper(self) -> Tensor:
        """See `ExactReading.perplexity_upper`."""
        return self.cross_entropy_upper.exp()

    @property
    def num_tokens(self) -> Tensor:
        """See `ExactReading.num_tokens`."""
        return self.tally.count_on_device("scored")

    @property
    def num_ignored(self) -> Tensor:
        """See `ExactReading.num_ignored`."""
        return self.tally.count_on_device("ignored")

    @property
    def num_nonfinite(self) -> Tensor:
        """See `ExactReading.num_nonfinite`."""
        count = self.tally.count_on_device
        return count("positive_infinite") + count("negative_infinite") + count("nan")


def normal_quantile(confidence: float) -> float:
    """Return how many standard errors on either side cover a normal mean with this probability."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _exp(x: Fraction | float) -> float:
    """Return `exp(x)` correctly rounded, `inf` where it exceeds the largest float64."""
    if isinstance(x, float):
        if not math.isfinite(x):
            return math.exp(x)
        x = Fraction(x)
    if abs(x) > 1000:  # Far beyond what a float64 holds (709.8 and -745.1), and slow to compute.
        return math.inf if x > 0 else 0.0
    return float(_DECIMAL.exp(_DECIMAL.divide(Decimal(x.numerator), Decimal(x.denominator))))
