"""Lightning: a callback that logs pooled likelihoods from what the steps already return."""

from xent_metrics.lightning.monitor import CrossEntropyMonitor

__all__ = ["CrossEntropyMonitor"]
