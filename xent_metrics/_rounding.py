"""Functions of exact numbers that are rounded once, at the end: on the host, in integers, rationals and decimals."""

from __future__ import annotations

import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from typing import Literal

Unit = Literal["nats", "bits"]

# Irrational functions are evaluated to 40 digits, so that rounding to a float64 happens once.
_DECIMAL = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX)
_EXP_BITS = 160  # For `exp`, which Python's integers make in a third of the time.
_LN_2 = int(Fraction(Context(prec=60).ln(Decimal(2))) * 2**_EXP_BITS)
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
    if not -1000 <= x <= 1000:  # Far beyond what a float64 holds (709.8 and -745.1).
        return math.inf if x > 0 else 0.0
    # In multiples of 2**-_EXP_BITS, of which no more than 20 bits are lost: 2**power * exp(rest / 2**8)**(2**8).
    numerator, denominator = x.as_integer_ratio()
    power, rest = divmod((numerator << _EXP_BITS) // denominator, _LN_2)
    total = term = 1 << _EXP_BITS
    i = 0
    while term:
        i += 1
        term = (term * rest >> _EXP_BITS + 8) // i
        total += term
    for _ in range(8):
        total = total * total >> _EXP_BITS
    shift = _EXP_BITS - power
    try:
        return (total << max(-shift, 0)) / (1 << max(shift, 0))
    except OverflowError:
        return math.inf


def root_of_ratio(above: int, below: int) -> float:
    """Return the square root of one integer over another, correctly rounded."""
    return float(_DECIMAL.sqrt(_DECIMAL.divide(Decimal(above), Decimal(below))))
