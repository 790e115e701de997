"""Who catches an error of torchmetrics' metrics catches ours: misuse raises the same class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics.text
from torch import Tensor
from torchmetrics import MetricCollection, SumMetric

from xent_metrics import CrossEntropy

PREDS, TARGET = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))


def twice(state: Tensor, group: Any) -> list[Tensor]:
    """Gather a state from another rank, which has the same."""
    return [state, state]


def nothing(state: Tensor, group: Any) -> None:
    """Gather nothing."""


def synced(make: Any) -> Any:
    """Return a metric that is synchronized with a rank that has the same."""
    metric = make(distributed_available_fn=lambda: True, dist_sync_fn=twice)
    metric.update(PREDS, TARGET)
    metric.sync(twice)
    return metric


def merge_states_of(make: Any, value: Any) -> None:
    """Merge a state that holds something else than tensors."""
    metric = make()
    metric.merge_state(dict.fromkeys(metric.metric_state, value))


MISUSES: dict[str, Callable[[Any], Any]] = {
    "merge no metric": lambda make: make().merge_state("state"),
    "merge nothing": lambda make: make().merge_state(None),
    "merge a tensor": lambda make: make().merge_state(TARGET),
    "merge a collection": lambda make: make().merge_state(MetricCollection([make()])),
    "merge another class": lambda make: make().merge_state(SumMetric()),
    "merge an empty state": lambda make: make().merge_state({}),
    "merge a string": lambda make: merge_states_of(make, "1"),
    "merge None": lambda make: merge_states_of(make, None),
    "merge into one that syncs each step": lambda make: make(dist_sync_on_step=True).merge_state(make()),
    "the same with no metric": lambda make: make(dist_sync_on_step=True).merge_state("state"),
    "the same with an empty state": lambda make: make(dist_sync_on_step=True).merge_state({}),
    "unsync first": lambda make: make().unsync(),
    "sync twice": lambda make: synced(make).sync(twice),
    "enter a context while synced": lambda make: synced(make).sync_context().__enter__(),
    "forward while synced": lambda make: synced(make)(PREDS, TARGET),
    "compute while synced": lambda make: synced(make).compute(),
    "sync by no function": lambda make: make(distributed_available_fn=lambda: True).sync(3),
    "sync by a function of nothing": lambda make: make(distributed_available_fn=lambda: True).sync(
        lambda x, group: None
    ),
    "add a state that is a number": lambda make: make().add_state("more", 1),
    "add a state that is a full list": lambda make: make().add_state("more", [1]),
    "add a state with an unknown reduction": lambda make: make().add_state("more", TARGET, "product"),
    "an unknown option": lambda make: make(nonsense=1),
    "another type of option": lambda make: make(sync_on_compute=3),
    "set a constant": lambda make: setattr(make(), "higher_is_better", True),
    "set the state": lambda make: setattr(make(), "metric_state", {}),
    "update with nothing": lambda make: make().update(),
    "update without a target": lambda make: make().update(PREDS),
    "update with too much": lambda make: make().update(PREDS, TARGET, None, None),
    "update with something unknown": lambda make: make().update(PREDS, TARGET, nonsense=1),
    "forward with nothing": lambda make: make()(),
    "forward with too much": lambda make: make()(PREDS, TARGET, None, None),
    "shapes that do not fit": lambda make: make().update(PREDS, TARGET[:, 1:]),
    "predictions that are integers": lambda make: make().update(PREDS.long(), TARGET),
    "targets that are floats": lambda make: make().update(PREDS, TARGET.float()),
    "compute something": lambda make: make().compute(1),
    "reset something": lambda make: make().reset(1),
    "load no dict": lambda make: make().load_state_dict("state"),
    "load something unknown": lambda make: make().load_state_dict({"nonsense": TARGET}),
    "cast to nonsense": lambda make: make().set_dtype("nonsense"),
    "move to nonsense": lambda make: make().to("nonsense"),
    "iterate": lambda make: iter(make()),
    "plot nonsense": lambda make: make().plot("nonsense"),
}


def class_of_error(misuse: Callable[[Any], Any], make: Any) -> type[Exception] | None:
    """Return the class of what a misuse raises."""
    try:
        misuse(make)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_errors_are_of_the_same_class(misuse: Callable[[Any], Any]) -> None:
    """Each class that torchmetrics raises is the one that we raise."""
    expected = class_of_error(misuse, torchmetrics.text.Perplexity)
    assert expected is not None
    assert class_of_error(misuse, CrossEntropy) is expected
