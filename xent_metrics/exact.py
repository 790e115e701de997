"""Floats to integers and back, without losing a bit.

A running float sum drifts, depends on the order of its terms, and is cast to bfloat16 together with the module
that holds it. A sum of integers does none of this. So each float is cut into *limbs*, int64 numbers that count
multiples of `2**64`, `2**32`, `1`, `2**-32` and `2**-64`, and limbs are summed. Every step below is exact in binary
floating point, hence the law that everything else stands on: the limbs of a sum are the sum of
`round(x * 2**64)` as unbounded integers, for every finite `|x| < 2**94`, float32 or float64, of either sign.

A float32 of `2**-40 <= |x| < 2**94` and a float64 of `2**-12 <= |x| < 2**94` have no bits below `2**-64`; any other
is rounded by at most `2**-65`. Bounds: limbs of a value are at most `2**32` (a rounded one may be that), so fewer
than `2**31` values can be summed before a carry; carried limbs are below it, so `2**31` such sums can be added before
the next one; and the total must stay below `2**127`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xent_metrics.checks import add_to, namespace, zeros_beside

NUM_LIMBS = 5
NUM_LOW_LIMBS = 2
LIMB_BITS = 32
LIMB_MASK = 2**LIMB_BITS - 1

FRACTION_BITS = 64
"""The lowest limb counts multiples of `2**-FRACTION_BITS`."""

_HALVES = 0x8000_8000_8000_8000 - 2**64
"""The highest bit of each 16 bits of an int64."""

_FEW = 64
"""Up to so many rows of integers NumPy's plain loop is done before a matrix product of floats has begun."""

LIMIT = 2.0**94
"""The first magnitude that is counted as infinite instead of being summed."""


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def split(x: Tensor) -> Tensor:
    """Cut finite floats of magnitude below `LIMIT` into limbs, the top one first, on a new first dimension."""
    return torch.stack(cut(x)).to(torch.int64)


def cut(x: Any, num_limbs: int = NUM_LIMBS) -> list[Any]:
    """Cut finite floats, a tensor or an array, into limbs that are floats still, the top one first.

    `trunc`, not `floor`: a small negative number minus its floor is not representable. So the limbs of a value
    all carry its sign, and only `carry` makes them digits.

    Args:
        x: Of magnitude below `LIMIT`.
        num_limbs: `NUM_LIMBS`; or `NUM_LOW_LIMBS`, the two lowest, for numbers that are known to be below `2**31`. The
            upper one, `trunc(x * 2**32)`, then stands for the three that are not there too.
    """
    trunc = namespace(x).trunc
    if num_limbs == NUM_LOW_LIMBS:
        limbs, x = [], x * 2.0**32
    else:  # The top limb is taken off before anything is scaled down, for which a float32 may be too small.
        limbs = [trunc(x * 2.0**-64)]
        x = (x - limbs[0] * 2.0**64) * 2.0**-32
    while len(limbs) < num_limbs - 1:
        limbs.append(trunc(x))
        x = (x - limbs[-1]) * 2.0**32
    return [*limbs, x.round()]


def carry(limbs: Tensor) -> Tensor:
    """Bring limbs (on the last dimension, the top one first) into canonical form: all but the top in `[0, 2**32)`."""
    canonical = limbs.clone()
    carry_in_place(canonical)
    return canonical


def carry_in_place(limbs: Any) -> None:
    """Do what `carry` does without a copy, to a tensor or an array."""
    for i in range(limbs.shape[-1] - 1, 0, -1):
        add_to(limbs[..., i - 1], limbs[..., i] >> LIMB_BITS)
    digits = limbs[..., 1:]
    digits &= LIMB_MASK  # What was carried is above these bits.


def products(numbers: Any) -> Any:
    """Sum the products of each two columns of integers, exactly.

    Each is cut into four digits of 16 bits, balanced ones, so that a product is at most `2**30`, and a sum of as many
    as there may be at most `2**44`. Sums of integers below `2**53` are exact in float64, in whatever order they are
    made and fused with the products or not, and so can be left to a matrix product. Of a power of `2**16` there are
    four such sums at most, so that they fit an int64 also when they are shifted by 16 bits.

    Args:
        numbers: int64 below `2**62` in magnitude, of shape (at most `2**14`, columns); overwritten.

    Returns:
        Limbs in units of 1, not carried, of shape (columns, columns, `NUM_LIMBS`).
    """
    columns = numbers.shape[1]
    # What is added makes every digit positive and carries what is then above it; to flip the same bits, which takes
    # them out again, makes them what `view` reads: signed numbers of 16 bits.
    numbers += _HALVES
    numbers ^= _HALVES
    square = _gram(numbers.view(namespace(numbers).int16)).reshape(columns, 4, columns, 4)
    if sys.byteorder == "little":  # To the highest digit first.
        square = square.flip(1, 3) if isinstance(square, Tensor) else square[:, ::-1, :, ::-1]
    # Products of one power of 2**16 are on a diagonal; in rows that are one place longer they would be in a column.
    rows = zeros_beside(square, columns, columns, 4, 2 * NUM_LIMBS + 1)
    rows[..., 3:7] = square.swapaxes(1, 2)
    skewed = rows.reshape(columns, columns, -1)[..., : 8 * NUM_LIMBS].reshape(columns, columns, 4, 2 * NUM_LIMBS)
    powers = skewed.sum(-2)  # Of 2**16, the highest first.
    return (powers[..., 0::2] << 16) + powers[..., 1::2]


def _gram(digits: Any) -> Any:
    """Sum the products of each two columns."""
    if isinstance(digits, Tensor):  # On a device where integers have no matrix product, and float64 may be missing.
        integers = digits.to(torch.int64)
        return (integers.unsqueeze(-1) * integers.unsqueeze(-2)).sum(0)
    numbers = digits.astype(np.int64 if digits.shape[0] <= _FEW else np.float64)
    return (numbers.T @ numbers).astype(np.int64)


def to_int(limbs: Sequence[int]) -> int:
    """Read limbs, canonical or not, as one integer: the multiple of the lowest limb's unit that they stand for."""
    total = 0
    for limb in limbs:
        total = (total << LIMB_BITS) + limb
    return total


def to_float(limbs: Any, dtype: torch.dtype) -> Any:
    """Read limbs on their device as floats, the lowest as multiples of `2**-64`, some rounding errors off.

    In float64 they can be added as they are, from the top: as long as those so far stand for an integer below `2**53`
    (in units of the last one) they are exact, and beyond that the next one, which is canonical or a sum of no more than
    `2**21` values, is too small to cancel them. In float32 the digits of a small negative number
    (-1, 2**32 - 1, ...) would cancel.

    Args:
        limbs: A tensor, or an array, which is read as float64.
        dtype: float64, or float32 where there is none.
    """
    if isinstance(limbs, Tensor):
        digits = (limbs if dtype == torch.float64 else _balanced(limbs)).to(dtype)
    else:
        digits = limbs.astype(np.float64)
    unit = 2.0 ** (LIMB_BITS * (NUM_LIMBS - 1) - FRACTION_BITS)
    value = digits[..., 0] * unit
    for i in range(1, NUM_LIMBS):
        unit /= 2.0**LIMB_BITS
        value = value + digits[..., i] * unit
    return value


def _balanced(limbs: Tensor) -> Tensor:
    """Bring limbs into another form, all but the top in `[-2**31, 2**31)`, so that they cannot cancel."""
    digits = list(limbs.unbind(-1))
    for i in range(len(digits) - 1, 0, -1):
        excess = (digits[i] + 2 ** (LIMB_BITS - 1)) >> LIMB_BITS
        digits[i] = digits[i] - (excess << LIMB_BITS)
        digits[i - 1] = digits[i - 1] + excess
    return torch.stack(digits, -1)
