"""Sequences that are split over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.ranks import Collectives, run_ranks
from xent_metrics import CrossEntropyReport

if TYPE_CHECKING:
    from pathlib import Path
from tests.distributed.shares import (
    LENGTH,
    NUM_ROWS,
    Data,
    alone,
    arguments,
    assert_close,
    bits,
    distributed,
    made,
    make_data,
    one_sum,
    update,
)


def split_time(rank: int) -> dict[str, Any]:
    """Read sequences that pairs of ranks hold together, the first of them 3 of 5 targets and the second 2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "time"))
    group, part = mesh["time"].get_group(), mesh["time"].get_local_rank()
    data = make_data().rows(slice(mesh["data"].get_local_rank(), None, 2))
    time = slice(None, 3) if part == 0 else slice(3, None)
    own = Data(*(x[:, time] if x.dim() > 1 and x.shape[1] == LENGTH else x for x in data))
    seen = {}
    for name in SPLIT:
        metric, unaware = made(name, sequence_group=group), made(name)
        with Collectives() as collectives:
            for rows in (slice(5), slice(5, None)):
                update(metric, name, own.rows(rows))
                update(unaware, name, own.rows(rows))
            calls = collectives.taken()
        fields = arguments(name, own)
        stepped = made(name, sequence_group=group, dist_sync_on_step=True)
        seen[name] = {
            "value": bits(metric.compute()),
            "forward": bits(stepped(**fields)),
            "unaware": bits(unaware.compute()),
            "calls": calls,
        }
    for name, losses in long_and_many().items():
        share = losses[mesh["data"].get_local_rank() :: 2, time]
        metric = CrossEntropyReport(input="losses", sequence_group=group)
        metric.update(share, torch.zeros_like(share, dtype=torch.int64))
        seen[name] = bits(metric.compute())
    return seen


SPLIT = ("CrossEntropyReport", "CrossEntropyReport-bytes", "CrossEntropyDifference")


def long_and_many() -> dict[str, Tensor]:
    """Losses of more sequences, and of longer ones, than are worked on at once; and of sums that do not fit."""
    generator = torch.Generator().manual_seed(3)
    return {
        "many": torch.randn(20_000, LENGTH, generator=generator).exp(),
        "long": torch.randn(2, 140_001, generator=generator).exp(),
        "wide": torch.full((6, LENGTH), 2.0**24),
        "negative": -torch.randn(6, LENGTH, generator=generator).exp(),
    }


@distributed
def test_sequences_split_over_ranks(tmp_path: Path) -> None:
    """With `sequence_group` the parts of a sequence count as one: every reading has the bits of whole sequences."""
    for rank, seen in enumerate(run_ranks(4, split_time, tmp_path=tmp_path)):
        for name in SPLIT:
            expected = alone(name, make_data())
            mean, stderr = [x for x in expected if x in ("cross_entropy", "difference") or x.endswith("stderr")][:2]
            sequences = [5, len(range(rank // 2, NUM_ROWS, 2)) - 5]

            assert seen[name]["value"] == expected, name
            assert_close(seen[name]["forward"], expected)
            assert seen[name]["unaware"][mean] == expected[mean]
            assert seen[name]["unaware"][stderr] != expected[stderr]
            assert seen[name]["calls"] == [one_sum(10 * number)[0] for number in sequences]
        for name, losses in long_and_many().items():
            report = CrossEntropyReport(input="losses")
            report.update(losses, torch.zeros_like(losses, dtype=torch.int64))

            assert seen[name] == bits(report.compute()), name


def split_short_time(rank: int) -> list[Any]:
    """Read sequences of one target that two ranks hold together; and once more where others make their tensors."""
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    with pytest.raises(ValueError, match="`process_group` must hold the ranks of `sequence_group`"):
        CrossEntropyReport(process_group=alone, sequence_group=dist.group.WORLD)
    data = make_data()
    time = slice(0, 1) if rank == 0 else slice(1, 1)
    values = []
    for default in ("cpu", "meta"):
        metric = CrossEntropyReport(sequence_group=dist.group.WORLD)
        with torch.device(default):
            metric.update(data.logits[:, time], data.target[:, time])
            values.append(bits(metric.compute()))
            assert metric(data.logits[:, time], data.target[:, time])["cross_entropy"].is_cpu
    return values


@distributed
def test_sequences_of_which_a_rank_has_nothing(tmp_path: Path) -> None:
    """A rank of a `sequence_group` may have no targets of the sequences, whatever the default device."""
    data = make_data()
    report = CrossEntropyReport()
    report.update(data.logits[:, :1], data.target[:, :1])

    assert run_ranks(2, split_short_time, tmp_path=tmp_path, timeout=60) == [[bits(report.compute())] * 2] * 2
