"""How often an interval of 95 % covers the true mean: with a normal quantile and with Student's.

`python -m tests.coverage` prints the table of `docs/intervals.md`, in some minutes.
"""

from __future__ import annotations

from statistics import NormalDist

import torch

from xent_metrics.losses import TargetLosses
from xent_metrics.readings import ExactReading
from xent_metrics.tally import tally_losses

MEAN = 3.0
LENGTH = 20
NORMAL = NormalDist().inv_cdf(0.975)
NUMBERS = (2, 3, 5, 10, 30, 100)
LENGTHS = ("equal", "unequal")
KINDS = ("normal", "skewed", "very skewed")
_SHAPES = {"skewed": 4.0, "very skewed": 1.0}  # Of gamma distributions, of skewness 2 / sqrt(shape): 1 and 2.


def draw(sets: int, sequences: int, lengths: str, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw sets of sequences whose targets are alike: losses of mean 3 nats, and which of them are there.

    A sequence has a mean of its own, of standard deviation 0.5, and its targets have as much around it. Unequal lengths
    are from 2 to 20, each as likely.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (sets, sequences, LENGTH)
    own = torch.randn(shape[:2], generator=generator, dtype=torch.float64)
    if kind in _SHAPES:  # Sums of exponential variables.
        size = int(_SHAPES[kind])
        drawn = torch.rand((size, *shape[:2]), generator=generator, dtype=torch.float64)
        own = (-(1 - drawn).log().sum(0) - size) / size**0.5
    losses = MEAN + (own.unsqueeze(-1) + torch.randn(shape, generator=generator, dtype=torch.float64)) / 2
    number = torch.randint(2, LENGTH + 1, shape[:2], generator=generator)
    there = torch.arange(LENGTH) < (number if lengths == "unequal" else torch.full_like(number, LENGTH)).unsqueeze(-1)
    return losses, there


def covered(sets: int, sequences: int, lengths: str, kind: str, seed: int = 0) -> tuple[float, float]:
    """Return the shares of sets whose interval covers the mean, with a normal quantile and as it is read."""
    before = now = 0
    for losses, there in zip(*draw(sets, sequences, lengths, kind, seed), strict=True):
        reading = ExactReading(tally_losses(TargetLosses(losses).weighted(there.double())).totals())
        before += abs(reading.cross_entropy - MEAN) <= NORMAL * reading.cross_entropy_stderr
        now += reading.cross_entropy_lower <= MEAN <= reading.cross_entropy_upper
    return before / sets, now / sets


def table(sets: int) -> list[str]:
    """Return the rows of a Markdown table."""
    columns = [(lengths, kind) for lengths in LENGTHS for kind in KINDS]
    rows = [
        "| sequences | " + " | ".join(f"{lengths}, {kind}" for lengths, kind in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for number in NUMBERS:
        shares = [covered(sets, number, *column) for column in columns]
        cells = [f"{100 * before:.1f} -> {100 * now:.1f}" for before, now in shares]
        rows.append(f"| {number} | " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    print("\n".join(table(4000)))  # noqa: T201
