"""Likelihood metrics for PyTorch whose numbers can be trusted to the last bit."""

from xent_metrics import functional
from xent_metrics.distributed import num_unpadded_samples
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    NormalizedCrossEntropy,
    Perplexity,
    compute_together,
)
from xent_metrics.packing import continues_sequence, sequence_ids
from xent_metrics.tally import GroupTally, Tally
from xent_metrics.token_bytes import check_token_bytes, token_byte_lengths
from xent_metrics.token_windows import TokenWindows

__version__ = "0.1.0"

__all__ = [
    "BinaryCrossEntropy",
    "BitsPerByte",
    "BitsPerToken",
    "CrossEntropy",
    "CrossEntropyDecomposition",
    "CrossEntropyDifference",
    "CrossEntropyReport",
    "GroupTally",
    "GroupedCrossEntropy",
    "LinearLogits",
    "NormalizedCrossEntropy",
    "Perplexity",
    "Tally",
    "TokenWindows",
    "check_token_bytes",
    "compute_together",
    "continues_sequence",
    "functional",
    "num_unpadded_samples",
    "sequence_ids",
    "token_byte_lengths",
]
