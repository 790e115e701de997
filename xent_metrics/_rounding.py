"""Functions of exact numbers that are rounded once, at the end: on the host, in integers, rationals and decimals."""

from __future__ import annotations

import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from typing import Literal

Unit = Literal["nats", "bits"]

# Irrational functions are evaluated to 40 digits, so that rounding to a float64 happens once.
_DECIMAL = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX)
_NATS_IN: dict[Unit, Fraction] = {"nats": Fraction(1), "bits": Fraction(_DECIMAL.ln(Decimal(2)))}


def nonfinite_sum(positive: int, negative: int, nan: int) -> float:
    """Return what IEEE addition makes of so many infinities, minus infinities and NaNs, of which there are some."""
    return math.nan if nan or (positive and negative) else math.inf if positive else -math.inf


def in_unit(nats: Fraction | float, unit: Unit) -> float:
    """Return nats in a unit, rounded once: an integer over an integer."""
    if not isinstance(nats, Fraction):
        return nats
    per = _NATS_IN[unit]
    return nats.numerator * per.denominator / (nats.denominator * per.numerator)


def exp(x: Fraction | float) -> float:
    """Return `exp(x)` correctly rounded, `inf` where it exceeds the largest float64."""
    if isinstance(x, float) and not math.isfinite(x):
        return math.exp(x)
    if not -1000 <= x <= 1000:  # Far beyond what a float64 holds (709.8 and -745.1), and slow to compute.
        return math.inf if x > 0 else 0.0
    exact = Decimal(x) if isinstance(x, float) else _DECIMAL.divide(Decimal(x.numerator), Decimal(x.denominator))
    return float(_DECIMAL.exp(exact))


def root_of_ratio(above: int, below: int) -> float:
    """Return the square root of one integer over another, correctly rounded."""
    return float(_DECIMAL.sqrt(_DECIMAL.divide(Decimal(above), Decimal(below))))
