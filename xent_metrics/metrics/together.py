"""Several metrics in one collective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch  # noqa: F401  # The example needs it.
from torchmetrics import Metric, MetricCollection

from xent_metrics.metrics.base import TallyMetric
from xent_metrics.tally import sum_tallies_over_ranks


def compute_together(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Compute several metrics of this library in one collective, where each `compute` would be one of its own.

    Args:
        metrics: The metrics by name, the same on every rank; a `MetricCollection` is fine.

    Returns:
        What `compute` returns, by the same names. The metrics are left as they are.

    Raises:
        TypeError: If a metric is not of this library.
        ValueError: If they have different process groups, or synchronize by a function of their own; on every rank,
            if other ranks have other names or metrics that are configured otherwise, and whatever `compute` raises.

    >>> from xent_metrics import CrossEntropy, Perplexity
    >>> metrics = {"train": CrossEntropy(), "val": Perplexity()}
    >>> for metric in metrics.values():
    ...     metric.update(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    >>> compute_together(metrics)
    {'train': tensor(2.0794, dtype=torch.float64), 'val': tensor(8.0000, dtype=torch.float64)}
    """
    if not isinstance(metrics, Mapping | MetricCollection):
        raise TypeError(
            f"`metrics` must be a dict of metrics, or a MetricCollection, got {type(metrics).__name__}; name each of "
            "them."
        )
    named = dict(metrics.items())
    for name, metric in named.items():
        if not isinstance(metric, TallyMetric):
            raise TypeError(
                f"`metrics` must be metrics of xent_metrics, got {type(metric).__name__} as {name!r}; compute it by "
                "itself."
            )
        if not metric.has_own("compute"):
            raise TypeError(
                f"`metrics` must be metrics whose `compute` is that of xent_metrics, got {type(metric).__name__} as "
                f"{name!r}, which has another; compute it by itself."
            )
    own = {name: metric for name, metric in named.items() if isinstance(metric, TallyMetric)}
    # By name, since the order of a dict may be another on another rank.
    reduced = {name: metric for name, metric in sorted(own.items()) if metric.is_to_be_reduced()}
    groups = {id(metric.process_group) for metric in reduced.values()}
    if len(groups) > 1 or any(metric.dist_sync_fn for metric in reduced.values()):
        raise ValueError(
            "`metrics` must have one `process_group` and no `dist_sync_fn`, got several; compute them one by one."
        )
    about = " and ".join(f"{name!r}: {metric.about()}" for name, metric in reduced.items())
    group = next((metric.process_group for metric in reduced.values()), None)
    totals = sum_tallies_over_ranks([metric.tally for metric in reduced.values()], about, group)
    tallies = {id(metric): total for metric, total in zip(reduced.values(), totals, strict=True)}
    return {name: metric.read(tallies.get(id(metric), metric.tally)) for name, metric in own.items()}
