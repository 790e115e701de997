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

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_LIMBS = 5
LIMB_BITS = 32
LIMB_MASK = 2**LIMB_BITS - 1

FRACTION_BITS = 64
"""The lowest limb counts multiples of `2**-FRACTION_BITS`."""

LIMIT = 2.0**94
"""The first magnitude that is counted as infinite instead of being summed."""


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def split(x: Tensor) -> Tensor:
    """Cut finite floats of magnitude below `LIMIT` into limbs, the top one first, on a new first dimension.

    `trunc`, not `floor`: a small negative number minus its floor is not representable. So the limbs of a value
    all carry its sign, and only `carry` makes them digits.
    """
    top = (x * 2.0**-64).trunc()
    limbs = [top]
    x = torch.sub(x, top, alpha=2.0**64) * 2.0**-32
    for _ in range(3):
        whole = x.trunc()
        limbs.append(whole)
        x = (x - whole) * 2.0**32
    limbs.append(x.round())
    return torch.stack(limbs).to(torch.int64)


def carry(limbs: Tensor) -> Tensor:
    """Bring limbs (on the last dimension, the top one first) into canonical form: all but the top in `[0, 2**32)`."""
    digits = list(limbs.unbind(-1))
    for i in range(len(digits) - 1, 0, -1):
        digits[i - 1] = digits[i - 1] + (digits[i] >> LIMB_BITS)
        digits[i] = digits[i] & LIMB_MASK
    return torch.stack(digits, -1)


def to_int(limbs: Sequence[int]) -> int:
    """Read limbs, canonical or not, as one integer: the multiple of the lowest limb's unit that they stand for."""
    total = 0
    for limb in limbs:
        total = (total << LIMB_BITS) + limb
    return total


def to_float(limbs: Tensor, dtype: torch.dtype) -> Tensor:
    """Read limbs on their device as floats, the lowest as multiples of `2**-64`, some rounding errors off.

    The digits of a small negative number (-1, 2**32 - 1, ...) would cancel. Balanced digits, in
    `[-2**31, 2**31)`, cannot.
    """
    digits = list(limbs.unbind(-1))
    for i in range(len(digits) - 1, 0, -1):
        excess = (digits[i] + 2 ** (LIMB_BITS - 1)) >> LIMB_BITS
        digits[i] = digits[i] - (excess << LIMB_BITS)
        digits[i - 1] = digits[i - 1] + excess
    value = digits[-1].to(dtype) * 2.0**-FRACTION_BITS
    for power, digit in enumerate(reversed(digits[:-1]), start=1):
        value = torch.add(value, digit.to(dtype), alpha=2.0 ** (power * LIMB_BITS - FRACTION_BITS))
    return value
