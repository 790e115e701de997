"""Quantiles of Student's t distribution, for any number of degrees of freedom, without a library of statistics.

With `s = sqrt(v) * sinh(w / sqrt(v))` the density of t with v degrees of freedom becomes `cosh(w / sqrt(v)) ** -v`, up
to a constant. This is smooth, bell-shaped for every v, and can be computed without a gamma function and without
cancellation. A double exponential rule (Takahasi and Mori, Double exponential formulas for numerical integration, 1974)
integrates its tail. A quantile is where the logarithm of the tail is that of a probability, which Halley's method finds
in two or three steps.

An interval needs the quantile for one confidence and many degrees of freedom, also on a device. So its logarithm is
interpolated once, in Chebyshev points, as a polynomial of `1 / (v + 1)`, in which it is smooth down to a normal
distribution (`1 / (v + 1) = 0`).
"""

from __future__ import annotations

import math
from statistics import NormalDist

MOST_SHARE = 0.8
"""The greatest `1 / (v + 1)` that the series hold for: v = 1/4."""

NUM_TERMS = 40
"""So many terms are within 1e-12 up to a confidence of 0.999999, and within 1e-8 for all that a float can say."""

_STEP = 1 / 8
# `x = exp(s - exp(-s))` for equidistant s, and what each of them stands for: `dx / ds`.
_NODES = [
    (x, _STEP * (1 + math.exp(-s)) * x)
    for s in (_STEP * i for i in range(-27, 38))
    for x in (math.exp(s - math.exp(-s)),)
]
_NEGLIGIBLE = 42.0  # `exp` of minus this is 6e-19.
_LEAST = 1e-300  # In place of a quantile of 0, which has no logarithm.


def student_quantile(confidence: float, freedom: float) -> float:
    """Return t so that a variable of Student's distribution is in `[-t, t]` with this probability.

    Args:
        confidence: Between 0 and 1.
        freedom: Degrees of freedom, from 1/4.
    """
    outside, root = 1 - confidence, math.sqrt(freedom)
    # Wallace, Bounds on normal approximations to Student's and the chi-square distributions, 1959: a first guess.
    normal = -NormalDist().inv_cdf(outside / 2)
    log_cosh = (normal * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / (2 * freedom)
    w = root * (log_cosh + math.log1p(math.sqrt(-math.expm1(-2 * log_cosh))))
    wanted = math.log(outside * _tail(0.0, freedom)[0])
    for _ in range(20):
        # The logarithm of the tail has the derivative -1 / ratio, and ratio has that of slope * ratio - 1.
        ratio, log_density, slope = _tail(w, freedom)
        excess = math.log(ratio) + log_density - wanted
        step = excess * ratio / (1 - excess * (slope * ratio - 1) / 2)
        w = max(w + step, 0.0)
        if abs(step) <= 1e-5 * w:  # The next one would be of the order of its cube.
            break
    return root * math.sinh(w / root)


def _tail(w: float, freedom: float) -> tuple[float, float, float]:
    """Integrate `h = cosh(w / sqrt(v)) ** -v` from w on.

    Returns:
        The tail over `h(w)`, and the logarithm of `h(w)` and its negated derivative.
    """
    root = math.sqrt(freedom)
    slope, log_density = root * math.tanh(w / root), -freedom * _log_cosh(w / root)
    scale = 1 / max(slope, 1.0)
    total = 0.0
    for x, weight in _NODES:
        drop = log_density + freedom * _log_cosh((w + x * scale) / root)
        if drop > _NEGLIGIBLE:
            break
        total += weight * math.exp(-drop)
    return total * scale, log_density, slope


def _log_cosh(x: float) -> float:
    return x - math.log(2) if x > 20 else math.log1p(2 * math.sinh(x / 2) ** 2)


_series: dict[float, list[float]] = {}


def quantile_series(confidence: float) -> list[float]:
    """Return coefficients of a polynomial that is the logarithm of a quantile.

    Its variable is `2 * r / MOST_SHARE - 1`, where `r = 1 / (v + 1)` for v degrees of freedom.

    Args:
        confidence: The series of each is kept, and so is the list.
    """
    if confidence not in _series:
        points = [math.pi * (i + 0.5) / NUM_TERMS for i in range(NUM_TERMS)]
        shares = [MOST_SHARE / 2 * (1 + math.cos(x)) for x in points]
        logs = [math.log(max(student_quantile(confidence, 1 / r - 1), _LEAST)) for r in shares]
        chebyshev = [
            2 / NUM_TERMS * math.fsum(y * math.cos(j * x) for x, y in zip(points, logs, strict=True))
            for j in range(NUM_TERMS)
        ]
        chebyshev[0] /= 2
        _series.setdefault(confidence, _monomials(chebyshev))  # If another thread was faster, its list.
    return _series[confidence]


# Compiled code takes the list as a constant. This is all that `torch.compiler.assume_constant_result` does, but for
# importing the compiler first, which takes a second.
quantile_series._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _monomials(chebyshev: list[float]) -> list[float]:
    """Return the coefficients of the powers of x, from those of the Chebyshev polynomials of x."""
    terms: list[list[float]] = [[] for _ in chebyshev]
    before, now = [1], [0, 1]  # Integers, so that nothing is rounded before all terms are there.
    for factor in chebyshev:
        for power, number in enumerate(before):
            terms[power].append(factor * number)
        after = [0, *(2 * number for number in now)]
        for power, number in enumerate(before):
            after[power] -= number
        before, now = now, after
    return [math.fsum(x) for x in terms]


def quantile_of_share(confidence: float, share: float) -> float:
    """Return the quantile of `1 / share - 1` degrees of freedom.

    Args:
        confidence: Between 0 and 1.
        share: In `[0, 1]`; more than `MOST_SHARE` is read as that.
    """
    x = 2 * min(share, MOST_SHARE) / MOST_SHARE - 1
    log = 0.0
    for coefficient in reversed(quantile_series(confidence)):
        log = log * x + coefficient
    return math.exp(log)
