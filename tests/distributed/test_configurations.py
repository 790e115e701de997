"""Ranks whose metrics differ, or are computed in another order, add up nothing: all of them raise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tests.distributed.ranks import Collective, Collectives, run_ranks
from tests.distributed.shares import METRICS, alone, bits, distributed, error, made, own_rows, rows_of, update
from xent_metrics import CrossEntropy, GroupedCrossEntropy, compute_together
from xent_metrics.distributed import _FIRST, sum_alike_over_ranks

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [*METRICS]
LOSSES, TARGET = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64)
GROUP = torch.tensor([[0], [1], [1]])
# On all ranks but the last, and on the last one.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "smoothing": ({}, {"label_smoothing": 0.5}),
    "class weights": ({"class_weight": torch.tensor([1.0, 2.0])}, {"class_weight": torch.tensor([2.0, 1.0])}),
    "policy": ({}, {"nan_policy": "raise"}),
    "few groups": ({"num_groups": 2}, {"num_groups": 3}),
    "many groups": ({"num_groups": 40}, {"num_groups": 41}),
    "few and many groups": ({"num_groups": 2}, {"num_groups": 41}),
}
TOGETHER = {
    "other names": (["web", "code"], ["web", "zip"]),
    "fewer": (["web", "code"], ["web"]),
    "more than fit at once": ([str(i) for i in range(15)], [str(i) for i in range(16)]),
}


def updated(options: dict[str, Any]) -> Any:
    """Make a metric and give it a batch."""
    if "num_groups" in options:
        metric = GroupedCrossEntropy(**options, input="losses")
        metric.update(LOSSES, TARGET, group=GROUP)
        return metric
    metric = CrossEntropy(**options)
    metric.update(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    return metric


def see(metric: Any, call: Any) -> dict[str, Any]:
    """Return what a call raises and exchanges, and whether the metric is as it was."""
    before = metric.tally.state.clone()
    with Collectives() as collectives:
        raised = error(call)
    intact = torch.equal(metric.tally.state, before) and not metric._is_synced
    return {"raised": raised, "calls": collectives.taken(), "intact": intact}


def differ(rank: int) -> dict[str, Any]:
    """Compute what the last rank has not, in every way; then what all ranks have."""
    is_last, data, seen = rank == dist.get_world_size() - 1, own_rows(rank), {}
    for first, second in zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True):
        one, other = (update(made(name), name, data) for name in (first, second))
        metric = other if is_last else one
        if type(one) is not type(other) or one._state_name != other._state_name:
            seen[first] = see(metric, metric.compute) | {"class": type(metric).__name__}
    for name, options in DIFFERENT.items():
        metric = updated(options[is_last])
        seen[name] = see(metric, metric.compute) | {"class": type(metric).__name__}
        stepped = updated(options[is_last] | {"dist_sync_on_step": True})
        group = {"group": GROUP} if "num_groups" in options[0] else {}
        preds = LOSSES if group else torch.zeros(3, 2, 2)
        step = see(stepped, lambda stepped=stepped, preds=preds, group=group: stepped(preds, TARGET, **group))
        seen[f"{name}, on a step"] = step | {"class": type(metric).__name__}
    for name, keys in TOGETHER.items():
        metrics = {key: updated({}) for key in keys[is_last]}
        metric = metrics[keys[0][0]]
        seen[name] = see(metric, lambda metrics=metrics: compute_together(metrics)) | {"class": keys[is_last][-1]}
    seen["alike"] = {name: bits(update(made(name), name, data).compute()) for name in NAMES}
    return seen


@distributed
def test_metrics_that_differ_between_ranks_raise_on_all(tmp_path: Path) -> None:
    """Another class, option, size or name on one rank of three: one exchange, our error, and nothing has changed."""
    ranks = run_ranks(3, differ, tmp_path=tmp_path)
    for rank, seen in enumerate(ranks):
        assert seen.pop("alike") == {name: alone(name, rows_of([0, 1, 2])) for name in NAMES}
        assert len(seen) > 20
        for name, each in seen.items():
            assert each["raised"].startswith("ValueError: `compute` must add up the same on every rank"), (name, rank)
            assert each["class"] in each["raised"], (name, rank)
            assert each["calls"] == [Collective("allreduce_", "SUM", torch.int64, 8 * _FIRST)], (name, rank)
            assert each["intact"], (name, rank)
    assert "label_smoothing=0.5" in ranks[2]["smoothing"]["raised"]
    assert "nan_policy='raise'" in ranks[2]["policy"]["raised"]


SIZES = (0, 1, _FIRST - 2, _FIRST - 1, _FIRST, _FIRST + 1, 3 * _FIRST)


def sum_vectors(rank: int) -> list[tuple[Any, list[Collective]]]:
    """Sum vectors around the size of what is exchanged first, one on a group of ranks, and one of another size."""
    sums = []
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    with Collectives() as collectives:
        for size in SIZES:
            x = torch.arange(size) * 2**40 - rank
            sums.append((sum_alike_over_ranks(x, "numbers").tolist(), collectives.taken()))
            assert torch.equal(x, torch.arange(size) * 2**40 - rank)
        x = torch.tensor([rank])
        sums.append((sum_alike_over_ranks(x, f"{rank % 2}", groups[rank % 2]).tolist(), collectives.taken()))
        raised = error(lambda: sum_alike_over_ranks(x.new_zeros(600 + rank // 2), "numbers"))
        sums.append((raised, collectives.taken()))
    return sums


@distributed
def test_vectors_of_any_size_are_summed(tmp_path: Path) -> None:
    """What fits beside the mark is summed in one collective of 4 KiB, the rest in a second one."""
    for rank, sums in enumerate(run_ranks(3, sum_vectors, tmp_path=tmp_path)):
        for size, (total, calls) in zip(SIZES, sums, strict=False):
            assert total == [3 * 2**40 * i - 3 for i in range(size)]
            rest = size - (_FIRST - 1)
            assert [call.num_bytes for call in calls] == ([4096] if rest <= 0 else [4096, 8 * rest])
        assert sums[-2][0] == ([1] if rank == 1 else [2])
        assert sums[-1][0].startswith("ValueError: `compute` must add up the same")
        assert len(sums[-1][1]) == 1
