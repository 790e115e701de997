"""Rows of logits on which a float32 cross-entropy may go wrong, and what is right: the judge of accuracy.

The fault to look for: a running float32 sum of a long row rounds away terms that are small beside the sum so far, in a
direction that is the same for rows alike, so that no amount of data averages it out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIZES = (2, 50, 1000, 32000, 50257, 128256, 262144)
"""Numbers of classes: tiny ones, those of real vocabularies, and one that no chunk divides."""

# What is promised of each loss, and of the mean error of many.
ABSOLUTE, RELATIVE, BIAS = 5e-7, 2e-7, 2e-8


def _flat_tail(shallow: float, deep: float) -> Callable[[int, int, torch.Generator], Tensor]:
    def make(num_rows: int, num_classes: int, generator: torch.Generator) -> Tensor:
        """One likely class, and all others as unlikely as each other: so far below it, another depth in each row."""
        depth = torch.rand(num_rows, 1, generator=generator) * (deep - shallow) + shallow
        logits = (-depth).repeat(1, num_classes)
        logits[:, num_classes // 3] = torch.rand(num_rows, generator=generator)
        return logits

    return make


def _normal(scale: float) -> Callable[[int, int, torch.Generator], Tensor]:
    def make(num_rows: int, num_classes: int, generator: torch.Generator) -> Tensor:
        return scale * torch.randn(num_rows, num_classes, generator=generator)

    return make


def _of_a_model(num_rows: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """As logits of a language model lie: Zipf's law of the vocabulary, noise, and a few classes that fit the text."""
    logits = -torch.arange(1.0, num_classes + 1).log() + 1.5 * torch.randn(num_rows, num_classes, generator=generator)
    fitting = torch.randint(0, num_classes, (num_rows, 5), generator=generator)
    return logits.scatter_add_(1, fitting, 12 * torch.rand(num_rows, 5, generator=generator))


KINDS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "flat tail, 6 to 10 below": _flat_tail(6, 10),
    "flat tail, 10 to 14 below": _flat_tail(10, 14),
    "flat tail, 14 to 20 below": _flat_tail(14, 20),
    "peaked": _normal(10),
    "normal": _normal(3),
    "as of a model": _of_a_model,
}


def make_rows(kind: str, num_rows: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make float32 logits, and a target for each row: the likely class where there is one, and any class elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    logits = KINDS[kind](num_rows, num_classes, generator)
    if kind.startswith("flat"):
        return logits, torch.full((num_rows,), num_classes // 3)
    return logits, torch.randint(0, num_classes, (num_rows,), generator=generator)


def true_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each row in float64, a few rows at a time."""
    losses = []
    for rows, index in zip(logits.split(64), target.split(64), strict=True):
        wide = rows.double()
        losses.append(wide.logsumexp(1) - wide.gather(1, index.unsqueeze(1)).squeeze(1))
    return torch.cat(losses)


def worst(error: Tensor, true: Tensor) -> float:
    """Return the largest error as a share of what is promised of a loss; 1 is just allowed."""
    return (error.abs() / (ABSOLUTE + RELATIVE * true.abs())).max().item()
