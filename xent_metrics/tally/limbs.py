"""Floats to integers and back, without losing a bit.

A running float sum drifts, depends on the order of its terms, and is cast to bfloat16 together with the module
that holds it. A sum of integers does none of this. So each float is cut into *limbs*, int64 numbers that count
multiples of `2**64`, `2**32`, `1`, `2**-32` and `2**-64`, and limbs are summed. Every step below is exact in binary
floating point, hence the law that everything else stands on: the limbs of a sum are the sum of
`round(x * 2**64)` as unbounded integers, for every finite `|x| < 2**94`, float32 or float64, of either sign.

A float32 of `2**-40 <= |x| < 2**94` and a float64 of `2**-12 <= |x| < 2**94` have no bits below `2**-64`; any other
is rounded by at most `2**-65`. Bounds: limbs of a value are at most `2**32` (a rounded one may be that), so fewer
than `2**31` values can be summed before they are normalised; normalised limbs are below it, so `2**31` such sums can be
added before the next time; and the total must stay below `2**127`, or it wraps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._compat import can_view_digits, digits_by_shifts

NUM_LIMBS = 5
NUM_LOW_LIMBS = 2
LIMB_BITS = 32
LIMB_MASK = 2**LIMB_BITS - 1

FRACTION_BITS = 64
"""The lowest limb counts multiples of `2**-FRACTION_BITS`."""

_HALVES = 0x8000_8000_8000_8000 - 2**64
"""The highest bit of each 16 bits of an int64."""

_CANONICAL = Struct(">q4I")
"""Canonical limbs, one after the other, as the digits of one integer."""

_SCALES = [2.0 ** (LIMB_BITS * i - FRACTION_BITS) for i in range(NUM_LIMBS)]
"""What turns a number into multiples of each limb's unit, the top one first."""


def split_at_once(x: Tensor) -> Tensor:
    """Cut finite float64 into limbs that are floats still, on a new second dimension, in few operators.

    `x * 2**64` is below `2**158`, which a float32 does not hold. `trunc`, not `floor`: a small negative number minus
    its floor is not representable. So the limbs of a value all carry its sign.
    """
    limbs = x.unsqueeze(1) * _runtime.constant(_SCALES, x, torch.float64).view(NUM_LIMBS, *(1 for _ in x.shape[1:]))
    limbs[:, :-1].trunc_()
    limbs[:, -1].round_()
    limbs[:, 1:].sub_(limbs[:, :-1] * 2.0**LIMB_BITS)
    return limbs


def cut(x: Tensor, num_limbs: int = NUM_LIMBS) -> list[Tensor]:
    """Cut finite floats into limbs that are floats still, one after the other, the top one first.

    Args:
        x: Of magnitude below `2**94`, float32 or float64.
        num_limbs: `NUM_LIMBS`; or `NUM_LOW_LIMBS`, the two lowest, for numbers that are known to be below `2**31`. The
            upper one, `trunc(x * 2**32)`, then stands for the three that are not there too.
    """
    if num_limbs == NUM_LOW_LIMBS:
        limbs, x = [], x * 2.0**32
    else:  # The top limb is taken off before anything is scaled down, for which a float32 may be too small.
        limbs = [(x * 2.0**-64).trunc_()]
        x = (x - limbs[0] * 2.0**64) * 2.0**-32
    while len(limbs) < num_limbs - 1:
        limbs.append(x.trunc())
        x.sub_(limbs[-1]).mul_(2.0**32)
    return [*limbs, x.round_()]


def normalise_in_place(limbs: Tensor) -> None:
    """Bring limbs (on the last dimension, the top one first) into canonical form: all but the top in `[0, 2**32)`."""
    for i in range(limbs.shape[-1] - 1, 0, -1):
        upper = limbs[..., i - 1]
        upper += limbs[..., i] >> LIMB_BITS
    digits = limbs[..., 1:]
    digits &= LIMB_MASK  # What was carried is above these bits.


def gram_of_digits(numbers: Tensor) -> Tensor:
    """Sum the products of each two digits of two columns of integers, exactly.

    Each integer is cut into four digits of 16 bits, balanced ones, so that a product is at most `2**30`, and a sum of
    as many as there may be at most `2**44`. Sums of integers below `2**53` are exact in float64, in whatever order they
    are made and fused with the products or not, and so can be left to a matrix product.

    Args:
        numbers: int64 below `2**62` in magnitude, contiguous, of shape (at most `2**14`, columns); overwritten.

    Returns:
        int64 of shape (4 * columns, 4 * columns): digit i of a column stands for multiples of `2**(16 * i)`.
    """
    # Adding 2**15 to each digit carries into the next one what a balanced digit cannot hold. Flipping the highest bit
    # of each digit takes 2**15 off again, so that `view` reads signed digits of 16 bits.
    numbers += _HALVES
    numbers ^= _HALVES
    if can_view_digits():
        digits = numbers.view(torch.int16)
        if sys.byteorder == "big":
            digits = digits.view(*numbers.shape, 4).flip(-1).view(digits.shape)
    else:
        digits = digits_by_shifts(numbers)
    if _runtime.widest_float(digits.device) != torch.float64:  # Nor is there a matrix product of integers.
        integers = digits.to(torch.int64)
        return (integers.unsqueeze(-1) * integers.unsqueeze(-2)).sum(0)
    floats = digits.to(torch.float64)
    return (floats.t() @ floats).to(torch.int64)


def products(numbers: Tensor) -> Tensor:
    """Sum the products of two columns S and W of integers, exactly.

    Args:
        numbers: As `gram_of_digits` takes them.

    Returns:
        Limbs of the sums of `S * S`, `S * W` and `W * W` in units of 1, not normalised, one after the other.
    """
    gram = gram_of_digits(numbers).view(-1, 1)
    return (gram * _runtime.constant(_POWERS, gram, torch.int64)).sum(0)


def _powers_of_products() -> list[list[int]]:
    """Return what each product of two digits adds to each limb of each of the three sums: `2**0`, `2**16` or nothing.

    Four sums of products at most have one power of `2**16`, so that they fit an int64 also after multiplication.
    """
    table = [[0] * (3 * NUM_LIMBS) for _ in range(64)]
    for which, (left, right) in enumerate([(0, 0), (0, 1), (1, 1)]):
        for i in range(4):
            for j in range(4):
                limb = NUM_LIMBS * which + NUM_LIMBS - 1 - (i + j) // 2
                table[8 * (4 * left + i) + 4 * right + j][limb] = 2**16 if (i + j) % 2 else 1
    return table


_POWERS = _powers_of_products()


def units_of(lowest: Sequence[float]) -> list[list[float]]:
    """Return what one of each limb stands for, the top one first, of sums with such a lowest unit."""
    return [[unit * 2.0 ** (LIMB_BITS * i) for i in reversed(range(NUM_LIMBS))] for unit in lowest]


def to_limbs(number: int) -> tuple[int, ...]:
    """Write a multiple of the lowest limb's unit as canonical limbs, the top one first."""
    return _CANONICAL.unpack(number.to_bytes(_CANONICAL.size, "big", signed=True))


def to_int(limbs: Sequence[int]) -> int:
    """Read limbs, canonical or not, as one integer: the multiple of the lowest limb's unit that they stand for."""
    total = 0
    for limb in limbs:
        total = (total << LIMB_BITS) + limb
    return total


def to_float(limbs: Tensor, dtype: torch.dtype, units: list[list[float]]) -> Tensor:
    """Read limbs on their device as floats, some rounding errors off.

    In float64 they can be added as they are, from the top: as long as those so far stand for an integer below `2**53`
    (in units of the last one) they are exact, and beyond that the next one, which is canonical or a sum of no more than
    `2**21` values, is too small to cancel them. In float32 the digits of a small negative number
    (-1, 2**32 - 1, ...) would cancel.

    Args:
        limbs: On the last dimension; the first one counts sums.
        dtype: float64, or float32 where there is none.
        units: What one of each limb of each sum stands for; see `units_of`.
    """
    digits = (limbs if dtype == torch.float64 else _balanced(limbs)).to(dtype)
    scales = _runtime.constant(units, digits, dtype).view(len(units), *(1 for _ in limbs.shape[2:]), NUM_LIMBS)
    top, *others = (digits * scales).unbind(-1)
    for x in others:
        top = top + x
    return top


def _balanced(limbs: Tensor) -> Tensor:
    """Bring limbs into another form, all but the top in `[-2**31, 2**31)`, so that they cannot cancel."""
    digits = list(limbs.unbind(-1))
    for i in range(len(digits) - 1, 0, -1):
        excess = (digits[i] + 2 ** (LIMB_BITS - 1)) >> LIMB_BITS
        digits[i] = digits[i] - (excess << LIMB_BITS)
        digits[i - 1] = digits[i - 1] + excess
    return torch.stack(digits, -1)
