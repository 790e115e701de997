"""Floats to integers and back, judged by rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from operator import mul

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import UNIT, finite_losses, relaxed
from xent_metrics import _runtime
from xent_metrics.losses.target_losses import LIMIT
from xent_metrics.tally.limbs import (
    NUM_LIMBS,
    NUM_LOW_LIMBS,
    cut,
    normalise_in_place,
    products,
    split_at_once,
    to_float,
    to_int,
    to_limbs,
    units_of,
)

BELOW_LIMIT = {torch.float32: LIMIT - 2.0**70, torch.float64: math.nextafter(LIMIT, 0.0)}
HALF = 2.0**-65


def split(x: torch.Tensor) -> torch.Tensor:
    """Cut floats into limbs on a new first dimension."""
    return torch.stack(cut(x)).to(torch.int64)


def normalise(limbs: torch.Tensor) -> torch.Tensor:
    """Bring a copy of limbs into canonical form."""
    canonical = limbs.clone()
    normalise_in_place(canonical)
    return canonical


def split_sum(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    """Sum the limbs of a list of floats, not normalised."""
    return split(torch.tensor(values, dtype=dtype)).sum(-1)


@relaxed
@given(finite_losses(torch.float32))
@example(BELOW_LIMIT[torch.float32])
@example(-BELOW_LIMIT[torch.float32])
@example(2.0**-149)
@example(3 * HALF)
def test_split_float32(x: float) -> None:
    """The limbs of a float32 stand for `round(x * 2**64)`, ties to even."""
    assert to_int(split_sum([x], torch.float32).tolist()) == round(Fraction(x) * UNIT)


@relaxed
@given(finite_losses(torch.float64))
@example(BELOW_LIMIT[torch.float64])
@example(-BELOW_LIMIT[torch.float64])
@example(math.nextafter(HALF, 1))
@example(math.nextafter(2.0**-32, 0))
@example(5e-324)
def test_split_float64(x: float) -> None:
    """The limbs of a float64 stand for `round(x * 2**64)`, ties to even."""
    assert to_int(split_sum([x], torch.float64).tolist()) == round(Fraction(x) * UNIT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_split_many(dtype: torch.dtype) -> None:
    """The law holds for 20,000 random floats of all magnitudes at once, one after the other and as a sum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator, dtype=torch.float64)
    x = (x * 2.0 ** torch.randint(-80, 91, x.shape, generator=generator)).clamp(-(2.0**93), 2.0**93).to(dtype)
    limbs = split(x)

    expected = [round(Fraction(value) * UNIT) for value in x.tolist()]

    assert [to_int(column) for column in limbs.T.tolist()] == expected
    assert to_int(limbs.sum(-1).tolist()) == sum(expected)


@pytest.mark.parametrize("halves", range(-7, 9, 2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_split_rounds_half_to_even(halves: int, dtype: torch.dtype) -> None:
    """A float halfway between two units goes to the even one, for either sign."""
    assert to_int(split_sum([halves * HALF], dtype).tolist()) == round(Fraction(halves, 2))


@relaxed
@given(st.lists(finite_losses(torch.float64), min_size=1, max_size=6), st.data())
def test_normalised_limbs_are_canonical(values: list[float], data: st.DataObject) -> None:
    """Carried limbs depend on the total alone: not on the order, nor on what was carried before."""
    limbs = normalise(split_sum(values, torch.float64))
    cut = data.draw(st.integers(0, len(values)))
    shuffled = data.draw(st.permutations(values))
    parts = normalise(split_sum(shuffled[:cut], torch.float64)) + split_sum(shuffled[cut:], torch.float64)

    assert to_int(limbs.tolist()) == sum(round(Fraction(x) * UNIT) for x in values)
    assert torch.equal(normalise(parts), limbs)
    assert torch.equal(normalise(limbs), limbs)
    assert torch.equal(normalise(torch.stack([parts, parts])), torch.stack([limbs, limbs]))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (BELOW_LIMIT[torch.float32], torch.float32),
        (BELOW_LIMIT[torch.float64], torch.float64),
        *((math.nextafter(2.0**power, 0), torch.float64) for power in (64, 32, 0, -32, -63)),
    ],
)
def test_values_before_a_carry(x: float, dtype: torch.dtype, sign: int) -> None:
    """Limbs of fewer than `2**31` values fit, however full: every bit set below a power that starts a limb."""
    limbs = normalise(split_sum([sign * x], dtype) * (2**31 - 1))

    assert to_int(limbs.tolist()) == sign * round(Fraction(x) * UNIT) * (2**31 - 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_full_limbs_before_a_carry(sign: int) -> None:
    """Fewer than `2**31` values fit even if every limb of each is the largest that a limb can be, `2**32`."""
    limbs = torch.full_like(split_sum([0.0], torch.float64), sign * 2**32) * (2**31 - 1)

    assert to_int(normalise(limbs).tolist()) == to_int(limbs.tolist())


@pytest.mark.parametrize("total", [-1, 2**125 - 1, -(2**125), 2**160 - 1, -(2**160)])
def test_carried_sums_before_the_next_carry(total: int) -> None:
    """`2**31` carried sums can be added before the next carry, even if every digit is as large as a digit can be."""
    one = normalise(split_sum([2.0**-64], torch.float64))
    limbs = one * 0
    for bit in reversed(range(abs(total).bit_length())):  # Horner's rule, by doubling.
        limbs = normalise(2 * limbs + one * (abs(total) >> bit & 1))
    limbs = normalise(limbs if total > 0 else -limbs)

    assert to_int(limbs.tolist()) == total
    assert to_int(normalise(limbs * 2**31).tolist()) == total * 2**31


@relaxed
@given(st.lists(finite_losses(torch.float64), min_size=1, max_size=4))
@example([2.0**93, -1.0])
@example([-(2.0**-64)])
def test_to_float(values: list[float]) -> None:
    """Limbs, carried or not, read as floats to some rounding errors, small negative totals included."""
    limbs = split_sum(values, torch.float64)
    expected = Fraction(to_int(limbs.tolist()), 2**64)

    for dtype, relative in ((torch.float64, 2.0**-50), (torch.float32, 2.0**-21)):
        for form in (normalise(limbs), limbs) if abs(expected) < torch.finfo(dtype).max / 2 else ():
            actual = to_float(form[None], dtype, units_of([2.0**-64]))[0]
            assert actual.dtype == dtype
            assert abs(Fraction(actual.item()) - expected) <= abs(expected) * Fraction(relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_limbs_stand_for_all(dtype: torch.dtype) -> None:
    """Of numbers below `2**30`, the two lowest limbs hold what all five do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20_000, generator=generator, dtype=torch.float64) * 2 - 1
    x = (x * 2.0 ** torch.randint(-100, 31, x.shape, generator=generator)).to(dtype)
    low = torch.stack(cut(x, NUM_LOW_LIMBS)).to(torch.int64)

    assert [to_int(column) for column in low.T.tolist()] == [to_int(column) for column in split(x).T.tolist()]


def test_all_limbs_at_once_are_those_of_one_after_the_other() -> None:
    """Float64 numbers of all magnitudes below the limit have the same limbs when they are cut in few operators."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(20_000, generator=generator, dtype=torch.float64) * 2 - 1
    x = x * 2.0 ** torch.randint(-100, 95, x.shape, generator=generator)
    at_once = split_at_once(x.view(2, -1)).to(torch.int64)

    assert torch.equal(at_once.movedim(1, 0).reshape(NUM_LIMBS, -1), split(x))


@pytest.mark.parametrize("total", [0, 1, -1, 2**32 - 1, 2**158 + 5, -(2**158) - 5])
def test_integers_are_written_as_canonical_limbs(total: int) -> None:
    """Limbs of a Python integer stand for it, and are already normalised."""
    limbs = torch.tensor(to_limbs(total))

    assert to_int(limbs.tolist()) == total
    assert torch.equal(normalise(limbs), limbs)


@pytest.mark.parametrize("wide_floats", [True, False])
@pytest.mark.parametrize("size", [1, 2, 64, 65, 2**14])
def test_products(size: int, wide_floats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of products of integers of 62 bits are those of Python, also of many as large as can be, of either sign."""
    generator = torch.Generator().manual_seed(size)
    largest = 2**62 - 1
    numbers = torch.randint(-largest, largest, (size, 3), generator=generator)
    numbers[:, 2] = largest * numbers[:, 2].sign()
    if not wide_floats:
        monkeypatch.setattr(_runtime, "widest_float", lambda _: torch.float32)
    for columns in (numbers, torch.full_like(numbers, largest), torch.full_like(numbers, -largest), numbers >> 40):
        for i, j in ((0, 1), (1, 2), (2, 0)):
            pair = columns[:, [i, j]].contiguous()
            s, w = pair.T.tolist()
            limbs = products(pair).view(3, NUM_LIMBS).tolist()
            expected = [sum(map(mul, *both)) for both in ((s, s), (s, w), (w, w))]
            assert [to_int(each) for each in limbs] == expected
