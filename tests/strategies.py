"""What property tests draw from: losses, weights, batches, and the ways to cut and shuffle them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from xent_metrics import Tally, functional
from xent_metrics.exact import LIMIT

relaxed = settings(deadline=None, max_examples=60)
"""Settings of every property test: the first call of a torch operator is slow, which says nothing of the library."""

UNIT = 2**64
"""Sums are kept in units of `2**-64`: `round(Fraction(x) * UNIT)` is what a tally adds for a loss x."""

UNSUMMED = (math.inf, -math.inf, math.nan, LIMIT, -LIMIT, 3e38, -3e38)
"""Losses that are counted and not summed; `LIMIT` itself is the first of its sign."""


class Batch(NamedTuple):
    """Losses of shape (sequences, targets in each), and what each of them weighs."""

    losses: Tensor
    weight: Tensor | None

    def rows(self, index: object) -> Batch:
        """Return some of the sequences, whole."""
        return Batch(self.losses[index], None if self.weight is None else self.weight[index])

    def tally(self) -> Tally:
        """Tally the batch through the library's front door."""
        return tally_of(self.losses, self.weight)


def tally_of(losses: Tensor, weight: Tensor | None = None) -> Tally:
    """Tally losses that are all scored."""
    return functional.tally(losses, torch.zeros_like(losses, dtype=torch.int64), weight, input="losses")


def finite_losses(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Every float below `LIMIT`, as `mantissa * 2**exponent`: both signs, subnormals, ties at `2**-65`, and -0.0.

    For example 0.0, 5e-324, -1.355e-20 (an odd multiple of `2**-65`), 7.0, -1.98e28.
    """
    digits, lowest = (24, -149) if dtype == torch.float32 else (53, -1074)
    highest = 94 - digits
    mantissas = st.integers(1 - 2**digits, 2**digits - 1) | st.integers(-9, 9)
    exponents = st.integers(-66, highest) | st.integers(lowest, highest) | st.just(-65)
    return st.builds(math.ldexp, mantissas, exponents) | st.just(-0.0)


def weights() -> st.SearchStrategy[float]:
    """Valid weights: 0, 1, and anything up to `2**47`, the smallest of which round to nothing."""
    return st.sampled_from([0.0, 1.0]) | st.floats(0.0, 2.0**47, exclude_max=True) | st.floats(0.5, 2.0)


def ordinary_losses() -> st.SearchStrategy[float]:
    """Losses as models have them, a few of them negative as densities have them, all of them float32."""
    return st.floats(0.0, 16.0, width=32) | st.floats(-1024.0, 1024.0, width=32)


def ordinary_weights() -> st.SearchStrategy[float]:
    """Weights as people have them: 0, or neither negligible nor huge."""
    return st.just(0.0) | st.floats(2.0**-10, 2.0**10)


@st.composite
def batches(
    draw: st.DrawFn,
    losses: st.SearchStrategy[float] | None = None,
    weight: st.SearchStrategy[float] | None = None,
    min_rows: int = 0,
) -> Batch:
    """Batches of up to 5 by 5 targets, float32 or float64, with weights or without.

    For example losses `[[0.5, inf], [-3.0, 0.0]]` of weight `[[1.0, 1.0], [0.0, 2.5]]`. Without `losses`, they
    are anything that a float can be.
    """
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shape = (draw(st.integers(min_rows, 5)), draw(st.integers(1, 5)))
    if losses is None:
        losses = finite_losses(dtype) | st.sampled_from(UNSUMMED)
    values = _tensors(shape, losses, dtype)
    optional = st.none() | _tensors(shape, weights() if weight is None else weight, torch.float64)
    return Batch(draw(values), draw(optional))


def _tensors(shape: tuple[int, int], values: st.SearchStrategy[float], dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """Tensors of a shape."""
    size = math.prod(shape)
    return st.lists(values, min_size=size, max_size=size).map(lambda x: torch.tensor(x, dtype=dtype).view(shape))


@st.composite
def partitions(draw: st.DrawFn, size: int) -> list[list[int]]:
    """Ways to deal `size` rows into batches of any order, some of them empty; for example `[[2, 0], [], [1]]`."""
    order = draw(st.permutations(range(size)))
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    return [order[start:stop] for start, stop in pairwise([0, *cuts, size])]
