"""Prints, as Markdown, how wrong the usual numbers are: errors of losses against float64. It asserts nothing.

python -m tests.accuracy
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torcheval.metrics import Perplexity as OfTorcheval
from torchmetrics.text import Perplexity

from tests.bench import MARK, TORCHEVAL, TORCHMETRICS, UPCAST, describe_machine, head, publish, reason, row
from tests.score_rows import make_rows, true_losses, worst
from xent_metrics.functional import per_target_losses

SCORES, MOST_ROWS = 2**24, 1024  # Of a case: 64 MiB in float32.
QUICK_SCORES, QUICK_CLASSES = 2**17, 32_000  # Enough classes for a float32 sum to go wrong.
DTYPES = (torch.float32, torch.bfloat16)

OURS, COMPILED = "ours", 'ours, `backend="compile"`'
FULL, NATIVE = "`F.cross_entropy`", "`F.cross_entropy` on bfloat16"

Losses = Callable[[Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Rows of one kind.

    Attributes:
        kind: A key of `tests.score_rows.KINDS`.
        num_classes: Of each row.
        peaks: How many classes of a row are the likeliest, all equally so.
    """

    kind: str
    num_classes: int
    peaks: int = 1

    def rows(self, quick: bool) -> tuple[Tensor, Tensor]:
        """Make float32 logits, and targets."""
        num_classes = min(self.num_classes, QUICK_CLASSES) if quick else self.num_classes
        num_rows = min(MOST_ROWS, (QUICK_SCORES if quick else SCORES) // num_classes)
        logits, target = make_rows(self.kind, num_rows, num_classes)
        if self.peaks == 2:
            logits[:, -1] = logits[:, target[0]]
        return logits, target

    def __str__(self) -> str:
        return f"two peaks, {self.kind}" if self.peaks == 2 else self.kind


class Error(NamedTuple):
    """How wrong losses are.

    Attributes:
        mean: With its sign. It is what is left of the error in a mean over any number of targets.
        largest: Of one loss, without its sign.
        share: The largest, of what is promised; 1 is just allowed.
    """

    mean: float
    largest: float
    share: float


CASES = (
    Case("flat tail, 6 to 10 below", 128_256),
    *(Case("flat tail, 10 to 14 below", num_classes) for num_classes in (1000, 32_000, 128_256, 262_144)),
    Case("flat tail, 14 to 20 below", 128_256),
    Case("flat tail, 6 to 10 below", 128_256, peaks=2),
    Case("peaked", 128_256),
    *(Case("normal", num_classes) for num_classes in (50_257, 128_256)),
    Case("as of a model", 128_256),
)


def ways(dtype: torch.dtype, quick: bool) -> dict[str, Losses]:
    """Return all ways to a loss. A quick run compiles nothing."""
    usual: Losses = partial(F.cross_entropy, reduction="none")
    found: dict[str, Losses] = {OURS: per_target_losses}
    if not quick:
        found[COMPILED] = partial(per_target_losses, backend="compile")
    if dtype == torch.float32:
        found[FULL] = usual
    else:
        found |= {NATIVE: usual, UPCAST: lambda logits, target: usual(logits.float(), target)}
    found[TORCHMETRICS] = partial(row_by_row, Perplexity(), "total_log_probs")
    found[TORCHEVAL] = partial(row_by_row, OfTorcheval(), "sum_log_probs")
    return found


def row_by_row(metric: Any, total: str, logits: Tensor, target: Tensor) -> Tensor:
    """Return what a perplexity has summed after each row, which is the logarithm of what it would read, unrounded."""
    losses = []
    for scores, index in zip(logits, target, strict=True):
        metric.reset()
        metric.update(scores[None, None], index[None, None])
        losses.append(float(getattr(metric, total)))
    return torch.tensor(losses, dtype=torch.float64)


def errors(logits: Tensor, target: Tensor, losses_of: Mapping[str, Losses]) -> dict[str, Error | str]:
    """Compare losses with those of the same logits in float64. What cannot be made says why."""
    true = true_losses(logits, target)
    found: dict[str, Error | str] = {}
    for name, losses in losses_of.items():
        try:
            error = losses(logits, target).double() - true
        except Exception as exception:
            found[name] = reason(exception)
        else:
            found[name] = Error(error.mean().item(), error.abs().max().item(), worst(error, true))
    return found


def cell(error: Error | str) -> str:
    if isinstance(error, str):
        return error
    text = f"{error.mean:+.1e}, {error.largest:.1e}"
    return text if error.share <= 1 else f"**{text}**"


def report(quick: bool) -> Iterator[str]:
    """Yield the lines of the report as they are known."""
    yield from describe_machine()
    yield f"- sums of {torch.backends.cpu.get_cpu_capability()}: in how many parts a row is summed depends on it"
    if quick:
        yield "- **a quick run: few rows of few classes**"
    for dtype in DTYPES:
        losses_of = ways(dtype, quick)
        yield from ("", f"### Logits in {str(dtype).removeprefix('torch.')}", "")
        yield from head("rows", "classes", "how many", *losses_of)
        for case in CASES:
            logits, target = case.rows(quick)
            found = errors(logits.to(dtype), target, losses_of)
            yield row(str(case), f"{logits.shape[1]:,}", f"{len(target):,}", *map(cell, found.values()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, nothing compiled: shows only that it runs")
    parser.add_argument("--into", type=Path, help=f"also put the report between the {MARK} lines of a page")
    options = parser.parse_args(arguments)
    publish(report(options.quick), options.into)


if __name__ == "__main__":
    main()
