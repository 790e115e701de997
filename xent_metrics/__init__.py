"""Likelihood metrics for PyTorch whose numbers can be trusted to the last bit."""

from xent_metrics import functional
from xent_metrics.metrics import BitsPerToken, CrossEntropy, CrossEntropyReport, Perplexity
from xent_metrics.tally import Tally

__version__ = "0.1.0"

__all__ = ["BitsPerToken", "CrossEntropy", "CrossEntropyReport", "Perplexity", "Tally", "functional"]
