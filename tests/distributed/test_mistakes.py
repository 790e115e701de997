"""What one rank did wrong raises on every rank; nobody waits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tests.cases import TOKEN_BYTES, K, named
from tests.distributed.ranks import Collectives, run_ranks
from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    NormalizedCrossEntropy,
    Perplexity,
    compute_together,
    functional,
)

if TYPE_CHECKING:
    from pathlib import Path
from tests.distributed.shares import bits, distributed, error, make_data


class Mistake(NamedTuple):
    """An update that is wrong, and the start of what is said of it."""

    make: Callable[[], Any]
    good: tuple[Tensor, ...]
    bad: tuple[Tensor, ...]
    says: str
    function: Callable[..., object] | None = None


def mistakes() -> dict[str, Mistake]:
    """Return one of each mistake that is a matter of values."""
    data = make_data(num_rows=4)
    logits, target, weight = data.logits, data.target.clamp(min=0), data.weight
    probs = logits.softmax(-1)
    infinite = logits.index_fill(-1, target[0, :1], -math.inf)
    zeros = torch.zeros_like(target)
    return {
        "target": Mistake(
            CrossEntropyReport,
            (logits, target),
            (logits, target.clone().fill_(99)),
            "ValueError: `target` must hold class indices",
            functional.cross_entropy,
        ),
        "weight": Mistake(
            Perplexity,
            (logits, target, weight),
            (logits, target, -weight),
            "ValueError: `weight` must hold finite numbers",
            functional.perplexity,
        ),
        "probability": Mistake(
            lambda: CrossEntropy(input="probs"),
            (probs, target),
            (probs * 2, target),
            "ValueError: `preds` must hold probabilities in [0, 1]",
            lambda **batch: functional.cross_entropy(**batch, input="probs"),
        ),
        "soft target": Mistake(
            CrossEntropyDecomposition,
            (logits, probs),
            (logits, probs * 2),
            "ValueError: `target` must hold",
            functional.cross_entropy_decomposition,
        ),
        "binary target": Mistake(
            BinaryCrossEntropy,
            (data.score, data.label),
            (data.score, data.label + 2),
            "ValueError: `target` must hold",
            functional.binary_cross_entropy,
        ),
        "group": Mistake(
            lambda: GroupedCrossEntropy(K),
            (logits, target, zeros),
            (logits, target, zeros - 1),
            "ValueError: `group` must hold integers",
            lambda **batch: functional.grouped_cross_entropy(**batch, num_groups=K),
        ),
        "class": Mistake(
            lambda: NormalizedCrossEntropy(K),
            (logits, target),
            (logits, target + K),
            "ValueError: `target` must hold class indices",
            lambda **batch: functional.normalized_cross_entropy(**batch, num_classes=K),
        ),
        "token": Mistake(
            lambda: BitsPerByte(token_bytes=TOKEN_BYTES + 1),
            (logits, target),
            (logits, target + K),
            "ValueError: `target` must hold class indices",
            lambda **batch: functional.bits_per_byte(**batch, token_bytes=TOKEN_BYTES + 1),
        ),
        "bytes": Mistake(
            BitsPerByte,
            (logits, target, data.num_bytes),
            (logits, target, -1 - data.num_bytes),
            "ValueError: ",
        ),
        "difference": Mistake(
            CrossEntropyDifference,
            (logits, data.other, target),
            (logits, data.other, target - K),
            "ValueError: `target` must hold class indices",
            functional.cross_entropy_difference,
        ),
        "infinite loss": Mistake(
            lambda: CrossEntropy(nan_policy="raise"),
            (logits, target),
            (infinite, target),
            "ValueError: ",
            lambda **batch: functional.cross_entropy(**batch, nan_policy="raise"),
        ),
    }


def make_mistakes(rank: int) -> dict[str, dict[str, Any]]:
    """Make every mistake on rank 1 only; rank 2 sees nothing in between."""
    return {name: make_mistake(rank, mistake) for name, mistake in mistakes().items()}


def make_mistake(rank: int, mistake: Mistake) -> dict[str, Any]:
    """Make a mistake, and go on."""
    seen: dict[str, Any] = {}
    metric = mistake.make()
    metric.update(**named(metric.update, *mistake.good))
    if rank < 2:
        batch = mistake.bad if rank == 1 else mistake.good
        seen["update"] = error(lambda: metric.update(**named(metric.update, *batch)))
        seen["forward"] = error(lambda: mistake.make()(**named(metric.update, *batch)))
    before = metric.tally.state.clone()
    with Collectives() as collectives:
        seen["compute"] = [error(metric.compute) for _ in range(2)]
        seen["together"] = error(lambda: compute_together({"": metric}))
        seen["collectives"] = len(collectives.taken())
        if mistake.function is not None:
            seen["function"] = error(
                lambda: mistake.function(**named(metric.update, *(mistake.bad if rank == 1 else mistake.good)))
            )
        seen["collectives of the function"] = len(collectives.taken())
    seen["intact"] = torch.equal(metric.tally.state, before) and not metric._is_synced
    metric.update(**named(metric.update, *mistake.good))
    seen["compute after an update"] = error(metric.compute)
    metric.reset()
    metric.update(**named(metric.update, *mistake.good))
    seen["healed"] = bits(metric.compute())
    return seen


@distributed
def test_mistake_on_one_rank(tmp_path: Path) -> None:
    """Bad values on one rank raise on every rank, at `compute`, in the same words until a reset; nobody waits.

    Rank 0 has made no mistake, rank 1 has, and rank 2 has seen nothing since.
    """
    ranks = run_ranks(3, make_mistakes, tmp_path=tmp_path)
    for name, mistake in mistakes().items():
        metric = mistake.make()
        for _ in range(3):
            metric.update(**named(metric.update, *mistake.good))
        said = {text for seen in ranks for text in (*seen[name]["compute"], seen[name]["together"])}

        assert len(said) == 1, name
        assert next(iter(said)).startswith(mistake.says), name
        for rank, seen in enumerate(ranks):
            assert not seen[name].get("update"), name
            assert not seen[name].get("forward"), name
            assert seen[name]["collectives"] == 3, name
            assert seen[name]["intact"], name
            assert seen[name]["compute after an update"].startswith(mistake.says), name
            assert seen[name]["healed"] == bits(metric.compute()), name
            assert bool(seen[name].get("function")) == (rank == 1 and mistake.function is not None), name
            assert seen[name].get("function", "").startswith("ValueError" if rank == 1 and mistake.function else "")
            assert seen[name]["collectives of the function"] == 0, name


def make_other_mistakes(rank: int) -> dict[str, list[str]]:
    """Pass a negative number of bytes on rank 1, and a target out of range to `per_target_losses` on both."""
    data, metric = make_data(), BitsPerByte()
    raised = error(lambda: metric.update(data.logits, data.target, num_bytes=-1 if rank == 1 else 1))
    losses = error(lambda: functional.per_target_losses(data.logits, data.target + K))
    return {"bytes": [raised, error(metric.compute)], "losses": losses}


@distributed
def test_other_mistakes_on_one_rank(tmp_path: Path) -> None:
    """A number of bytes that is negative on one rank raises on all at `compute`; functions raise by themselves."""
    first, second = run_ranks(2, make_other_mistakes, tmp_path=tmp_path)

    assert first["bytes"] == second["bytes"] == ["", first["bytes"][1]]
    assert first["bytes"][1].startswith("ValueError")
    assert first["losses"].startswith("ValueError: `target` must hold class indices")
