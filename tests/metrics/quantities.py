"""What the tests of single quantities share: data, batches of unequal size, and judges."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import named

K, T, ROWS, GROUPS = 6, 5, 9, 4
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
TABLE = torch.tensor([0, 1, 3, 2, 1, 7])


def bits(value: Any) -> Any:
    """Every bit of a value, of a vector, or of a dict of values."""
    if isinstance(value, dict):
        return {name: bits(x) for name, x in value.items()}
    return [float(x).hex() for x in value.flatten().tolist()]


def filled(metric: Any, batches: Any) -> Any:
    """Update a metric with batches."""
    for batch in batches:
        metric.update(**named(metric.update, *batch))
    return metric


def read(metric: Any, *batch: Any) -> Any:
    """Update a metric with one batch and read it, as Python numbers."""
    value = filled(metric, [batch]).compute()
    return {name: x.item() for name, x in value.items()} if isinstance(value, dict) else value.tolist()


def ragged(*tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Cut tensors alike into batches of unequal size, one of them empty."""
    cuts = [0, 1, 1, 4, *([len(tensors[0])] if tensors[0] is not None else [])]
    return [tuple(None if x is None else x[i:j] for x in tensors) for i, j in itertools.pairwise(cuts)]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Some roundings of the type in which losses are computed."""
    return {"rel": 1e-13, "abs": 1e-13} if dtype == torch.float64 else {"rel": 1e-6, "abs": 1e-6}


def distributions(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Soft targets, some of which give some classes nothing."""
    probs = torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) < 0.7)
    probs[..., 0] += 0.1
    return (probs / probs.sum(-1, keepdim=True)).to(dtype)


def losses_of(logits: Tensor, target: Tensor) -> Tensor:
    """Losses of `F.cross_entropy` in float64, of target's shape; 0 where it is ignored."""
    return F.cross_entropy(logits.double().flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


def smoothed_row(true: int, share: float, num_classes: int, over: str) -> list[float]:
    """Write a smoothed target out as a distribution, as its convention has it."""
    if over == "all":
        return [(1 - share) * (k == true) + share / num_classes for k in range(num_classes)]
    return [1 - share if k == true else share / (num_classes - 1) for k in range(num_classes)]


def make_data(seed: int = 7, rows: int = ROWS, length: int = T) -> dict[str, Tensor]:
    """Make everything that an update may take, a sequence to a row."""
    torch.manual_seed(seed)
    shape = (rows, length)
    return {
        "preds": torch.randn(*shape, K),
        "other": torch.randn(*shape, K),
        "target": torch.randint(0, K, shape).masked_fill(torch.rand(shape) < 0.2, -100),
        "soft": distributions(*shape, K, dtype=torch.float32),
        "weight": 2 * torch.rand(shape),
        "mask": torch.rand(shape) < 0.7,
        "column": torch.rand(rows, 1),
        "group": torch.randint(0, GROUPS, shape),
        "dataset": torch.randint(0, 2, (rows, 1)),
        "num_bytes": torch.randint(1, 9, (rows, 1)),
        "logits": 3 * torch.randn(shape),
        "probs": torch.rand(shape),
        "labels": torch.randint(-1, 2, shape),
        "soft_labels": torch.rand(shape),
    }
