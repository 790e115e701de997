"""Standard errors and intervals of a tally's mean, from the sums over its sequences: on the host and on the device.

The standard error is the ratio estimator of `Reading.cross_entropy_stderr`, the number of standard errors a quantile of
Student's distribution. A tally holds the products of S_c and W_c, loss and weight of a sequence, each cut down to a
multiple of `2**-36`. So the residuals `S_c - m * W_c` are each off by less than `1 + |m|` of these units, and their
norm (the root of the sum of their squares) by less than `sqrt(C) * (1 + |m|)`. Where that is more than a thousandth of
the norm, a standard error is NaN. It is 0 where all residuals may be 0 and are certain to be negligible.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._rounding import root_of_ratio
from xent_metrics._student import MOST_SHARE, NUM_TERMS, quantile_of_share, quantile_series
from xent_metrics.tally.limbs import FRACTION_BITS
from xent_metrics.tally.tally import SEQUENCE_BITS, Totals

_RATIO = 1000
"""The norm of the residuals must be so many times what cutting sequences may change."""

_MIN_SEQUENCE_BITS = 8
"""The root mean square of the sequences' weights needs this many bits, or it is noise, and so is their number."""

_ZERO_BITS = 24
"""Residuals are negligible if their norm is below `2**-_ZERO_BITS` of that of the sequences' losses."""

# The weight of a tally is in units of `2**-64`; S_c and W_c are in units of `2**-36`.
_SHIFT = 2 * (FRACTION_BITS - SEQUENCE_BITS)

# On a device the squared norm of the residuals is off by some 8 rounding errors of that of the losses. Each row makes a
# number that is negative where the standard error is not right to 1e-3, where not all residuals may be 0, where they
# might not be negligible, and where weights are too coarse. It is made of the squared norms of residuals, losses and
# weights, of the number C of sequences, and of `C * (1 + |m|)^2` twice (the second is 0 where the mean m is).
_UNIT = 2.0 ** (-2 * SEQUENCE_BITS)
_CONDITIONS = {
    dtype: [
        [1.0, -(2.0**12) * torch.finfo(dtype).eps, 0.0, 0.0, -_UNIT * _RATIO**2, 0.0],
        [-1.0, 16 * torch.finfo(dtype).eps, 0.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0, 0.0, -_UNIT * 2 ** (2 * _ZERO_BITS + 2)],
        [0.0, 0.0, 1.0, -_UNIT * 2 ** (2 * _MIN_SEQUENCE_BITS), 0.0, 0.0],
    ]
    for dtype in (torch.float32, torch.float64)
}
_POWERS = [float(i) for i in range(NUM_TERMS)]


def exact_stderr(totals: Totals, mean: Fraction) -> float:
    """Return the standard error of a mean, in integers: in floats, expanding the square would cancel."""
    count = totals.sequences
    too_coarse = totals.weight_weight < count << 2 * _MIN_SEQUENCE_BITS
    if count < 2 or totals.wide_sequences or too_coarse:
        return math.nan
    # With m = up / down, all in integers: rationals would be reduced again and again.
    up, down = mean.numerator, mean.denominator
    loss_loss = totals.loss_loss * down**2
    squares = loss_loss - 2 * totals.loss_weight * up * down + totals.weight_weight * up**2
    cut = count * (down + abs(up)) ** 2
    if squares >= cut * _RATIO**2:
        return root_of_ratio(count * squares << _SHIFT, (count - 1) * (down * totals.weight) ** 2)
    # Where no residual is left, all that was cut off (none of it negative) adds up to less than |m| * C.
    most = (count * up) ** 2 if squares == 0 else cut
    return 0.0 if squares <= cut and most << 2 * _ZERO_BITS + 2 <= loss_loss else math.nan


def exact_margin(totals: Totals, stderr: float, confidence: float) -> float:
    """Return how far the ends of an interval are from the mean."""
    if math.isnan(stderr):
        return math.nan
    # W^2 / sum(W_c^2) is the effective number of sequences; this is one over it.
    share = (totals.weight_weight << _SHIFT) / totals.weight**2
    return quantile_of_share(confidence, share) * stderr


def device_stderr(mean: Tensor, sums: dict[str, Tensor], count: Tensor, wide: Tensor) -> Tensor:
    """Return the standard error of a mean on its device, where the square is expanded in floats.

    Args:
        mean: In nats.
        sums: What `Tally.float_sums` returns.
        count: Number of sequences.
        wide: Number of those that are too wide to be multiplied.
    """
    inner = torch.addcmul(sums["loss_weight"], mean, sums["weight_weight"], value=-0.5)
    squares = torch.addcmul(sums["loss_loss"], mean, inner, value=-2).clip(min=0)
    number = count.to(mean.dtype)
    cut = (mean.abs() + 1).square() * number
    norms = squares, sums["loss_loss"], sums["weight_weight"]
    terms = torch.stack([*norms, number, cut, cut * (mean != 0)])
    wrong = (terms * _runtime.constant(_CONDITIONS[mean.dtype], mean, mean.dtype)).sum(1) < 0
    inexact, not_zero, not_negligible, too_coarse = wrong.unbind()
    # A wide sequence outweighs all others, in one comparison.
    too_few = count.sub(wide, alpha=2**48) < 2
    bad = inexact & (not_zero | not_negligible) | too_coarse | too_few
    stderr = (squares * not_zero * number / (number - 1)).sqrt() / sums["weight"]
    return stderr.masked_fill(bad, math.nan) + (mean - mean)  # NaN where the mean is infinite.


def device_margin(sums: dict[str, Tensor], stderr: Tensor, confidence: float) -> Tensor:
    """Return how far the ends of an interval are from the mean; see `quantile_series`."""
    series, powers, start = (
        _runtime.constant(values, stderr, stderr.dtype) for values in (quantile_series(confidence), _POWERS, _START)
    )
    x = torch.addcdiv(start, sums["weight_weight"], sums["weight"].square(), value=2 / MOST_SHARE).clip(max=1.0)
    return (x**powers * series).sum().exp() * stderr


_START = [-1.0]  # The series' variable is this for a share of 0.
