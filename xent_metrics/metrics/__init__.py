"""The torchmetrics classes, a module for each quantity: how a batch is tallied, the class, and the functional form."""

from xent_metrics.metrics.binary_cross_entropy import BinaryCrossEntropy
from xent_metrics.metrics.bits_per_byte import BitsPerByte
from xent_metrics.metrics.bits_per_token import BitsPerToken
from xent_metrics.metrics.cross_entropy import CrossEntropy
from xent_metrics.metrics.decomposition import CrossEntropyDecomposition
from xent_metrics.metrics.difference import CrossEntropyDifference
from xent_metrics.metrics.grouped import GroupedCrossEntropy
from xent_metrics.metrics.normalized import NormalizedCrossEntropy
from xent_metrics.metrics.perplexity import Perplexity
from xent_metrics.metrics.report import CrossEntropyReport
from xent_metrics.metrics.together import compute_together

__all__ = [
    "BinaryCrossEntropy",
    "BitsPerByte",
    "BitsPerToken",
    "CrossEntropy",
    "CrossEntropyDecomposition",
    "CrossEntropyDifference",
    "CrossEntropyReport",
    "GroupedCrossEntropy",
    "NormalizedCrossEntropy",
    "Perplexity",
    "compute_together",
]
