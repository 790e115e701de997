"""Pure functions: losses, a tally, a reading, for one batch or for all the data at once.

Nothing here keeps state or builds a graph, and nothing waits for an accelerator. Bad values raise at once where
values can be read, on the CPU; elsewhere, and in compiled code, they are counted in the tally and read as NaN.
Scores that only look like something else than `input` says draw a warning in the metrics, which look at their first
batch, and none here: to look at every batch would take a fifth of a call, or nearly half of a small one.
"""

from xent_metrics.losses.options import convert_label_smoothing
from xent_metrics.metrics.binary_cross_entropy import binary_cross_entropy
from xent_metrics.metrics.bits_per_byte import bits_per_byte
from xent_metrics.metrics.bits_per_token import bits_per_token
from xent_metrics.metrics.cross_entropy import cross_entropy, per_target_losses, tally
from xent_metrics.metrics.decomposition import cross_entropy_decomposition
from xent_metrics.metrics.difference import cross_entropy_difference
from xent_metrics.metrics.grouped import grouped_cross_entropy
from xent_metrics.metrics.normalized import normalized_cross_entropy
from xent_metrics.metrics.perplexity import perplexity

__all__ = [
    "binary_cross_entropy",
    "bits_per_byte",
    "bits_per_token",
    "convert_label_smoothing",
    "cross_entropy",
    "cross_entropy_decomposition",
    "cross_entropy_difference",
    "grouped_cross_entropy",
    "normalized_cross_entropy",
    "per_target_losses",
    "perplexity",
    "tally",
]
