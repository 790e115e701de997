"""From losses to exact sums."""

from xent_metrics.tally.accumulate import tally_groups, tally_losses, tally_mean, tally_sequences
from xent_metrics.tally.tally import GroupTally, Tally, sum_tallies_over_ranks

__all__ = [
    "GroupTally",
    "Tally",
    "sum_tallies_over_ranks",
    "tally_groups",
    "tally_losses",
    "tally_mean",
    "tally_sequences",
]
