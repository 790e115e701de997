"""From what a model returns to one loss per target."""

from xent_metrics.losses.binary import binary_losses
from xent_metrics.losses.dense import target_entropies, target_losses
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import BinaryOptions, LossOptions
from xent_metrics.losses.target_losses import TargetLosses

__all__ = [
    "BinaryOptions",
    "LinearLogits",
    "LossOptions",
    "TargetLosses",
    "binary_losses",
    "target_entropies",
    "target_losses",
]
