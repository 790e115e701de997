"""Sums of many ranks and many tokens are exact."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from tests.strategies import UNIT, tally_of
from xent_metrics import Tally
from xent_metrics.readings import ExactReading
from xent_metrics.tally import tally_mean
from xent_metrics.tally.tally import COUNTS


def simulated_ranks(total: int) -> tuple[Tally, dict[str, Fraction | int]]:
    """Stand the tallies of 16,384 ranks side by side, with so many tokens in total, and work out their sum.

    Each rank has its own number of repetitions of one of 256 batches of 16 tokens; one in 64 knows only a mean.
    """
    chance = random.Random(9)
    losses = torch.randn(256, 4, 4, generator=torch.Generator().manual_seed(9)).exp()
    losses = (losses * 2**20).round() / 2**20  # So that sums over sequences are exact too.
    batches = torch.stack([tally_of(batch).state for batch in losses])
    num_ranks, known = 2**14, 2**14 - 2**8
    average = total // 16 // num_ranks
    repetitions = [average + chance.randint(-1000, 1000) for _ in range(known)]
    means = [(chance.uniform(0, 12), chance.randint(0, 30 * average)) for _ in range(num_ranks - known - 1)]
    missing = total - 16 * sum(repetitions) - sum(count for _, count in means)
    means.append((1.0, missing))

    state = Tally.zero(num_tallies=known)
    own = batches[torch.arange(known) % 256]
    factors = torch.tensor(repetitions)
    for bit in reversed(range(max(repetitions).bit_length())):
        state = state + state + Tally(own * ((factors >> bit) & 1)[:, None])
    rest = torch.stack([tally_mean(torch.tensor(x, dtype=torch.float64), torch.tensor(n)).state for x, n in means])
    tallies = Tally(torch.cat([state.state, rest]))

    rows = [[[Fraction(x) for x in row] for row in batch] for batch in losses.tolist()]
    sums = [(sum(map(sum, batch)), sum(sum(row) ** 2 for row in batch)) for batch in rows]
    expected = dict.fromkeys(("loss", "loss_loss"), Fraction(0))
    for i, times in enumerate(repetitions):
        expected["loss"] += times * sums[i % 256][0]
        expected["loss_loss"] += times * sums[i % 256][1]
    expected["loss"] += sum(Fraction(round(Fraction(x * n) * UNIT), UNIT) for x, n in means)
    return tallies, expected | {"sequences": 4 * sum(repetitions)}


def fold(tallies: Tally, seed: int) -> Tally:
    """Add up tallies in pairs of a random order, and again, until one is left."""
    generator = torch.Generator().manual_seed(seed)
    while len(tallies.state) > 1:
        state = tallies.state[torch.randperm(len(tallies.state), generator=generator)]
        odd, half = len(state) % 2, len(state) // 2
        pairs = Tally(state[:half]) + Tally(state[half : 2 * half])
        tallies = Tally(torch.cat([pairs.state, state[len(state) - odd :]]))
    return Tally(tallies.state[0]) + Tally.zero()


@pytest.mark.slow
def test_many_ranks_and_tokens() -> None:
    """16,384 ranks with `10**13` tokens in total give the same bits in any tree of sums, and those are exact."""
    total = 10**13
    tallies, expected = simulated_ranks(total)
    sums = [fold(tallies, seed) for seed in range(5)]
    sums += [Tally(tallies.state.sum(0)) + Tally.zero()]  # As one collective adds them.
    order = tallies.unbind()
    random.Random(1).shuffle(order)
    sums += [sum(order, Tally.zero()), fold(Tally(tallies.state[:-5000]), 1) + fold(Tally(tallies.state[-5000:]), 2)]
    totals = sums[0].totals()

    assert len(tallies.state) == 16_384
    assert len({str(tally.state.tolist()) for tally in sums}) == 1
    assert totals.scored == total
    assert totals.sequences == expected["sequences"]
    assert totals.loss == expected["loss"] * UNIT
    assert totals.loss_loss == expected["loss_loss"] * 2**72
    assert totals.weight == total * UNIT
    assert totals._asdict().keys() >= set(COUNTS)
    assert ExactReading(totals).cross_entropy == float(expected["loss"] / total)
