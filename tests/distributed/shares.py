"""What the tests on ranks share: data, the registry's metrics on them, and shares of ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.cases import CASES, GROUPS, TOKEN_BYTES, Case, K
from tests.distributed.ranks import Collective
from xent_metrics import functional

NUM_ROWS, LENGTH, NUM_GROUPS = 24, 5, GROUPS
distributed = pytest.mark.distributed


class Data(NamedTuple):
    """All that the metrics take, for some sequences; the first dimension counts them."""

    logits: Tensor
    other: Tensor
    target: Tensor
    soft: Tensor
    weight: Tensor
    group: Tensor
    num_bytes: Tensor
    score: Tensor
    label: Tensor

    def rows(self, index: Any) -> Data:
        """Return some of the sequences, whole."""
        return Data(*(x[index] for x in self))


def fields_of(case: Case) -> dict[str, str]:
    """Say which field of the data each argument of an update is; every other metric has weights."""
    binary = case.data.get("target", "").startswith("binary")
    weighed = [*CASES.values()].index(case) % 2
    fields = {
        "preds": "score" if binary else "logits",
        "preds_a": "logits",
        "preds_b": "other",
        "target": "label" if binary else "soft" if case.data.get("target") == "soft" else "target",
        "group": "group",
        "num_bytes": "num_bytes" if case.data.get("extra") else "",
        "weight": "weight" if weighed else "",
    }
    names = inspect.signature(case.metric_class.update).parameters
    return {name: fields[name] for name in names if fields.get(name)}


def fits(case: Case) -> bool:
    """Say whether a metric takes the data as they are: logits with classes last, of which -100 is ignored."""
    options = case.options
    return not ({"class_dim", "shift", "input", "pos_weight"} & set(options) or options.get("ignore_index") == 2) and (
        case.data.get("extra") != "number"
    )


# Each metric of the registry that takes these data, and what its update takes.
METRICS = {name: (case.metric, fields_of(case)) for name, case in CASES.items() if fits(case)}


def make_data(dtype: torch.dtype = torch.float32, num_rows: int = NUM_ROWS) -> Data:
    """Make the same data everywhere: sequences of unequal difficulty, some targets ignored."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num_rows, *shape, generator=generator) * torch.linspace(0.5, 4, num_rows).view(
            -1, *[1] * len(shape)
        )

    def draw_integers(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, (num_rows, *shape), generator=generator)

    target = draw_integers(K, LENGTH)
    target[draw(LENGTH) > 1.5] = -100
    return Data(
        logits=draw(LENGTH, K).to(dtype),
        other=draw(LENGTH, K).to(dtype),
        target=target,
        soft=draw(LENGTH, K).softmax(-1),
        weight=draw(LENGTH).abs(),
        group=draw_integers(NUM_GROUPS, 1),
        num_bytes=draw_integers(20),
        score=draw(LENGTH).to(dtype),
        label=draw_integers(2, LENGTH),
    )


def made(name: str, **kwargs: Any) -> Any:
    """Make a metric of the table."""
    return METRICS[name][0](**kwargs)


def update(metric: Any, name: str, data: Data) -> Any:
    """Update a metric of the table."""
    metric.update(**arguments(name, data))
    return metric


def arguments(name: str, data: Data) -> dict[str, Tensor]:
    """Return what an update of a metric takes of the data."""
    return {argument: getattr(data, field) for argument, field in METRICS[name][1].items()}


def bits(value: Any) -> Any:
    """Every bit of a value, or of a dict of values."""
    if isinstance(value, dict):
        return {name: bits(x) for name, x in value.items()}
    return " ".join(float(x).hex() for x in value.flatten().tolist())


def error(call: Callable[[], object]) -> str:
    """Return the type and text of the error of a call, or an empty string."""
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


FUNCTIONS: dict[str, Callable[[Data], object]] = {
    "cross_entropy": lambda d: functional.cross_entropy(d.logits, d.target, weight=d.weight),
    "bits_per_token": lambda d: functional.bits_per_token(d.logits, d.target),
    "perplexity": lambda d: functional.perplexity(d.logits, d.target),
    "bits_per_byte": lambda d: functional.bits_per_byte(d.logits, d.target, token_bytes=TOKEN_BYTES),
    "binary_cross_entropy": lambda d: functional.binary_cross_entropy(d.score, d.label),
    "cross_entropy_decomposition": lambda d: functional.cross_entropy_decomposition(d.logits, d.soft),
    "grouped_cross_entropy": lambda d: functional.grouped_cross_entropy(
        d.logits, d.target, group=d.group, num_groups=NUM_GROUPS
    ),
    "normalized_cross_entropy": lambda d: functional.normalized_cross_entropy(d.logits, d.target, num_classes=K),
    "cross_entropy_difference": lambda d: functional.cross_entropy_difference(d.logits, d.other, d.target),
    "per_target_losses": lambda d: functional.per_target_losses(d.logits, d.target),
    "tally": lambda d: functional.tally(d.logits, d.target),
}


def one_sum(size: int) -> list[Collective]:
    """One sum of so many int64 numbers, and nothing else."""
    return [Collective("allreduce_", "SUM", torch.int64, 8 * size)]


def own_rows(rank: int) -> Data:
    """Unequal shares of the sequences."""
    return make_data().rows(slice(rank * 3, rank * 3 + rank + 1))


def rows_of(ranks: list[int]) -> Data:
    """Return the sequences of several ranks together."""
    return Data(*(torch.cat(parts) for parts in zip(*map(own_rows, ranks), strict=True)))


def alone(name: str, data: Data) -> Any:
    """Read a metric in one process."""
    return bits(update(made(name, sync_on_compute=False), name, data).compute())


def numbers(value: Any) -> list[float]:
    """All the numbers of a value as `bits` gives it."""
    words = " ".join(value.values() if isinstance(value, dict) else [value]).split()
    return [float.fromhex(word) for word in words]


def assert_close(value: Any, expected: Any) -> None:
    """Compare what `forward` read in floating point with what `compute` rounded once."""
    assert numbers(value) == pytest.approx(numbers(expected), rel=1e-6, nan_ok=True)
