"""Heads whose classes are spread over ranks: each rank multiplies its own, and nothing is gathered."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.memory import recursive_detach
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.distributed.ranks import Collectives, run_ranks
from tests.distributed.shares import distributed, error
from tests.distributed.test_spread_logits import cases, make_head, spread
from tests.losses.test_linear import Matmuls, factors
from xent_metrics import CrossEntropy, CrossEntropyReport, LinearLogits, functional
from xent_metrics.readings import ExactReading

STEPS: list[dict[str, float]] = [{}, {"scale": 0.5}, {"softcap": 4.0}, {"scale": 2.0, "softcap": 3.0}]


def score_cases(rank: int, sizes: list[int]) -> dict[str, Any]:
    """Tally every case with classes last from a head on this rank, and from one that is spread over all ranks."""
    mesh, seen = init_device_mesh("cpu", (torch.distributed.get_world_size(),)), {}
    for num_classes in sizes:
        for i, (name, (logits, target, weight, options)) in enumerate(cases(num_classes)):
            if "class_dim" in options or logits.dtype.itemsize < 4 or not (logits.abs() < 100).all():
                continue
            torch.manual_seed(i)
            head = factors(logits)
            parts = spread(head.weight, mesh, 0), (head.bias, spread(head.bias, mesh, 0))[i % 2]
            whole = LinearLogits(head.hidden, head.weight, head.bias, **STEPS[i % 4])
            preds = LinearLogits(head.hidden, *parts, **STEPS[i % 4])
            expected = functional.tally(whole, target, weight=weight, **options)
            with Collectives() as collectives, Matmuls() as matmuls:
                tally = functional.tally(preds, target, weight=weight, **options)
            calls = [call.operation for call in collectives.taken()]
            seen[f"{num_classes}: {name}"] = (expected.totals(), tally.totals(), calls, matmuls.columns)
    return seen


def assert_agree(ranks: list[dict[str, Any]], num_cases: int) -> None:
    """Counts and weights are equal, mean losses to 1e-6, and all ranks agree; a maximum and a sum were exchanged."""
    assert len(ranks[0]) == num_cases
    for name, (whole, parts, calls, _) in ranks[0].items():
        exact = dict.fromkeys(("loss", "loss_loss", "loss_weight"), 0)
        assert parts._replace(**exact) == whole._replace(**exact), name
        values = [ExactReading(totals, "omit").cross_entropy for totals in (parts, whole)]
        assert values[0] == pytest.approx(values[1], rel=1e-6, nan_ok=True), name
        assert calls == ["MAX", "SUM"], name
    for name in ranks[0]:
        assert all(rank[name][1] == ranks[0][name][1] for rank in ranks), name


@distributed
def test_heads_spread_over_ranks(tmp_path: Path) -> None:
    """Losses are those of the whole head, for any option; each rank multiplies the rows of its own classes."""
    ranks = run_ranks(2, score_cases, [7, 8], tmp_path=tmp_path)
    assert_agree(ranks, 2 * 25)
    for rank, columns in zip(ranks, ({4}, {3, 4}), strict=True):
        assert {width for *_, widths in rank.values() for width in widths} == columns


@distributed
def test_more_ranks_than_parts(tmp_path: Path) -> None:
    """A rank may have no class at all: 5 on 4 ranks are 2, 2, 1 and none, which multiplies nothing."""
    ranks = run_ranks(4, score_cases, [5], tmp_path=tmp_path)
    assert_agree(ranks, 25)
    assert [{width for *_, widths in rank.values() for width in widths} for rank in ranks] == [{2}, {2}, {1}, set()]


def use_column_parallel_head(rank: int) -> dict[str, Any]:
    """Score with the weight of a column-parallel layer in training, also detached as what a step returns."""
    mesh = init_device_mesh("cpu", (2,))
    head, hidden, target = make_head(7)
    head = parallelize_module(head, mesh, ColwiseParallel())
    preds = LinearLogits(hidden.requires_grad_(), head.weight, head.bias, softcap=3.0)
    metric = CrossEntropy(sync_on_compute=False, shift=True)
    with Collectives() as collectives:
        metric.update(preds, target)
        operations = [call.operation for call in collectives.taken()]
    detached = recursive_detach({"logits": preds})["logits"]
    kept = detached.weight.to_local().data_ptr() == head.weight.to_local().data_ptr()
    with pytest.raises(TypeError, match="must not be changed"):
        preds.weight = head.weight * 1
    value = functional.cross_entropy(copy.copy(detached), target, shift=True).item()
    return {"value": metric.compute().item(), "detached": value, "operations": operations, "kept": kept}


@distributed
def test_column_parallel_head(tmp_path: Path) -> None:
    """What `ColwiseParallel` makes of a head can be scored as it is."""
    head, hidden, target = make_head(7)
    logits = 3 * torch.tanh(head(hidden) / 3)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten()).item()
    for seen in run_ranks(2, use_column_parallel_head, tmp_path=tmp_path):
        assert seen["value"] == pytest.approx(expected, rel=1e-12)
        assert seen["detached"] == seen["value"]
        assert seen["operations"] == ["MAX", "SUM"]
        assert seen["kept"]


def misplace(rank: int) -> dict[str, str]:
    """Pass heads that are spread in ways that are refused, and one that is not spread."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((4, 6, 5), (7, 5), (7,)))
    target = torch.zeros(4, 6, dtype=torch.int64)
    parts, biases = (distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, bias))
    crooked = DTensor.from_local(bias.split([3, 4])[rank], mesh, [Shard(0)], shape=(7,), stride=(1,))
    replicated = distribute_tensor(weight, mesh, [Replicate()])
    sharded = nn.Linear(5, 7, bias=False)
    with torch.no_grad():
        sharded.weight.copy_(weight)
    fully_shard(sharded, mesh=mesh)
    heads = {
        "columns": (distribute_tensor(weight, mesh, [Shard(1)]), None),
        "bias alone": (weight, biases),
        "bias alone, of a DTensor": (replicated, biases),
        "crooked bias": (parts, crooked),
    }
    seen = {
        name: error(lambda h=head: CrossEntropy().update(LinearLogits(hidden, *h), target))
        for name, head in heads.items()
    }
    seen["soft"] = error(lambda: CrossEntropy().update(LinearLogits(hidden, parts), torch.full((4, 6, 7), 1 / 7)))
    metric = CrossEntropyReport(accuracy=True)
    seen["accuracy"] = error(lambda: metric.update(LinearLogits(hidden, parts), target))
    own = hidden[2 * rank : 2 * rank + 2], (target + rank)[:2]
    seen["fsdp"] = error(lambda: CrossEntropy().update(LinearLogits(own[0], sharded.weight), own[1]))
    values = [LinearLogits(hidden, *head) for head in ((weight, bias), (replicated, bias), (replicated, None))]
    with Collectives() as collectives:
        bits = [functional.cross_entropy(x, target).item().hex() for x in values]
        assert not collectives.taken()
    assert bits[0] == bits[1] != bits[2]
    gathered = functional.cross_entropy(LinearLogits(own[0], sharded.weight.full_tensor()), own[1])
    assert gathered.item() == functional.cross_entropy(LinearLogits(own[0], weight), own[1]).item()
    return seen


@distributed
def test_heads_that_are_spread_otherwise(tmp_path: Path) -> None:
    """A head that is not spread over the classes, or whose ranks have other data, is refused on every rank."""
    expected = {
        "columns": "`weight` of `preds` must be a DTensor that is sharded over the classes only, on dimension 0",
        "bias alone": "`bias` of `preds` must be spread over ranks as `weight` is, or not at all, got (Shard(dim=0),",
        "bias alone, of a DTensor": "`bias` of `preds` must be spread over ranks as `weight` is, or not at all",
        "crooked bias": "`weight` of `preds` must be a DTensor of the parts that torch.chunk gives",
        "soft": "`preds` that are sharded over the classes must be logits with integer targets, got ",
        "accuracy": "`weight` of `preds` must hold all classes for `accuracy` and `entropy`, got a DTensor",
        "fsdp": "`target` must be the same on all ranks that share the classes of `weight` of `preds`",
    }
    for seen in run_ranks(2, misplace, tmp_path=tmp_path):
        assert seen.keys() == expected.keys()
        for name, text in expected.items():
            assert seen[name].startswith(f"ValueError: {text}"), name
