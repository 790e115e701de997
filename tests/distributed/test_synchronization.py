"""The same bits for any number of ranks, few collectives, and torchmetrics' options."""

from __future__ import annotations

import itertools
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics.text
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchmetrics import MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from tests.cases import CASES, Case, K
from tests.distributed.ranks import Collective, Collectives, run_ranks
from xent_metrics import (
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyReport,
    Perplexity,
    compute_together,
    num_unpadded_samples,
)
from xent_metrics.distributed import _FIRST
from xent_metrics.tally.tally import GROUP_SIZE, STATE_SIZE

if TYPE_CHECKING:
    from pathlib import Path
from tests.distributed.shares import (
    FUNCTIONS,
    METRICS,
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
    own_rows,
    rows_of,
    update,
)

DTYPES = (torch.float32, torch.bfloat16)


def state_size(case: Case) -> int:
    """Return how many numbers a state has; each is 8 bytes."""
    if "num_groups" in case.options or "num_classes" in case.options:
        return GROUP_SIZE * (case.options.get("num_groups", K) + 1)
    if case.metric_class is CrossEntropyDecomposition:
        return 3 * STATE_SIZE
    more = ("token_bytes", "accuracy", "entropy") if case.metric_class is CrossEntropyReport else ()
    return STATE_SIZE * (1 + sum(name in case.options for name in more))


STATE_SIZES = {name: state_size(CASES[name]) for name in METRICS}


def deal(world_size: int, split: str) -> list[Tensor]:
    """Deal all sequences to ranks in a random order; the ranks may have unequally many, or one of them none."""
    generator = torch.Generator().manual_seed(world_size)
    order = torch.randperm(NUM_ROWS, generator=generator)
    if split == "even" or world_size == 1:
        return list(order.tensor_split(world_size))
    if split == "uneven":
        cuts = 1 + torch.randperm(NUM_ROWS - 2, generator=generator)[: world_size - 1].sort().values
        return list(order.tensor_split(cuts))
    shares = list(order.tensor_split(world_size - 1))
    return [*shares[: world_size // 2], order[:0], *shares[world_size // 2 :]]


def read_all(data: Data, batches: list[Tensor]) -> dict[str, Any]:
    """Read every metric of the table after some batches."""
    values = {}
    for name in METRICS:
        metric = made(name)
        for rows in batches:
            update(metric, name, data.rows(rows))
        values[name] = bits(metric.compute())
    return values


# How many ranks, how unequal their shares, and the type of the logits: most pairs of two of these, and 8 ranks.
WORLDS = {
    1: [("even", torch.float32)],
    2: [("uneven", torch.float32), ("one empty", torch.bfloat16)],
    3: [("even", torch.bfloat16), ("uneven", torch.bfloat16), ("one empty", torch.float32)],
    8: [("one empty", torch.bfloat16)],
}


def read_shares(rank: int) -> dict[tuple[str, torch.dtype], dict[str, Any]]:
    """Read every metric on ranks that go through their shares in batches of 3, the last one smaller."""
    values = {}
    for split, dtype in WORLDS[dist.get_world_size()]:
        rows = deal(dist.get_world_size(), split)[rank]
        values[split, dtype] = read_all(make_data(dtype), [*rows.split(3)] if len(rows) else [])
    return values


@distributed
@pytest.mark.parametrize("world_size", WORLDS)
def test_any_number_of_ranks_reads_the_bits_of_one_process(world_size: int, tmp_path: Path) -> None:
    """1, 2, 3 and 8 ranks read the bits of one process, however unequal their shares."""
    alone = {dtype: read_all(make_data(dtype), [torch.arange(NUM_ROWS)]) for dtype in DTYPES}
    for values in run_ranks(world_size, read_shares, tmp_path=tmp_path):
        assert list(values) == WORLDS[world_size]
        for (split, dtype), readings in values.items():
            assert readings == alone[dtype], (split, dtype)
    assert "nan" not in str(alone)
    assert len({str(x) for x in alone.values()}) == len(DTYPES)


def count_collectives(rank: int) -> dict[str, list[Collective]]:
    """Record what each call exchanges."""
    data = make_data().rows(slice(rank * 5, rank * 5 + 5))
    calls = {}
    with Collectives() as collectives:
        metrics = {name: made(name) for name in METRICS}
        for name, metric in metrics.items():
            update(metric, name, data)
            metric(**arguments(name, data))
            calls["update and forward", name] = collectives.taken()
            metric.compute()
            calls["compute", name] = collectives.taken()
            if rank == 0:
                update(metric, name, data)
            metric.compute()  # Also on the rank that has seen nothing since.
            calls["compute again", name] = collectives.taken()
        for name, function in FUNCTIONS.items():
            function(data)
            calls["function", name] = collectives.taken()
        compute_together(metrics)
        calls["together", "all"] = collectives.taken()
        collection = MetricCollection([CrossEntropy(), BitsPerToken(), Perplexity(), CrossEntropyReport()])
        collection.update(data.logits, data.target)
        compute_together(collection)
        calls["together", "collection"] = collectives.taken()
        reference = torchmetrics.text.Perplexity(ignore_index=-100)
        reference.update(data.logits, data.target)
        reference.compute()
        calls["torchmetrics", "one"] = collectives.taken()
        references = MetricCollection({str(i): torchmetrics.text.Perplexity(ignore_index=i) for i in (-100, 0, 1)})
        references.update(data.logits, data.target.clamp(min=0))
        references.compute()
        calls["torchmetrics", "three"] = collectives.taken()
    return calls


@distributed
def test_one_collective_for_each_reading(tmp_path: Path) -> None:
    """`compute` is one sum of 4 KiB, whatever a rank has in store, and of what is more a second; an update is nothing.

    For comparison, torchmetrics makes a barrier and a gather for each of the two states of its perplexity.
    """
    for calls in run_ranks(2, count_collectives, tmp_path=tmp_path):
        for (when, name), made_calls in calls.items():
            if when in ("compute", "compute again"):
                assert made_calls == one_sum(_FIRST), name
            elif when in ("update and forward", "function"):
                assert made_calls == [], (when, name)

        assert calls["together", "all"] == one_sum(_FIRST) + one_sum(1 + sum(STATE_SIZES.values()) - _FIRST)
        assert calls["together", "collection"] == one_sum(_FIRST)
        assert [call.name for call in calls["torchmetrics", "one"]] == ["barrier", "allgather_"] * 2
        assert [call.name for call in calls["torchmetrics", "three"]] == ["barrier", "allgather_"] * 6
    assert 8 * _FIRST == 4096
    assert 8 * STATE_SIZE == 280
    assert 8 * GROUP_SIZE == 144


def use_options(rank: int, name: str) -> dict[str, Any]:
    """Read a metric under each of torchmetrics' options for synchronization."""
    data, seen = own_rows(rank), {}
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    fields = arguments(name, data)
    metric = update(made(name, process_group=group), name, data)
    with Collectives() as collectives:
        seen["process_group"] = bits(metric.compute())
        seen["together in process_group"] = bits(compute_together({"": metric})[""])
        seen["collectives in process_group"] = collectives.taken()
        metric = made(name, dist_sync_on_step=True)
        seen["forward"] = bits(metric(**fields))
        seen["collectives of forward"] = collectives.taken()
    seen["second forward"] = bits(metric(**fields))
    seen["after forward"] = bits(metric.compute())
    seen["forward alone"] = bits(made(name)(**fields))
    seen["sync_on_compute"] = bits(update(made(name, sync_on_compute=False), name, data).compute())
    unavailable = made(name, distributed_available_fn=lambda: False)
    seen["distributed_available_fn"] = bits(update(unavailable, name, data).compute())

    asked = []

    def twice(state: Tensor, group: Any) -> list[Tensor]:
        asked.append(group)
        return [state, state]

    seen["dist_sync_fn"] = bits(update(made(name, dist_sync_fn=twice), name, data).compute())
    seen["asked for"] = [x is None for x in asked]
    gathered = made(name, dist_sync_fn=partial(gather_all_tensors))
    seen["gathered"] = bits(update(gathered, name, data).compute())

    metric = update(made(name), name, data)
    before = metric.tally.state.clone()
    with metric.sync_context():
        seen["synced"] = bits(metric.read(metric.tally))
    metric.sync()
    metric.unsync()
    seen["unsynced"] = torch.equal(metric.tally.state, before) and not metric._is_synced
    seen["pickled"] = pickle.dumps(metric)
    return seen


@distributed
@pytest.mark.parametrize("name", ["CrossEntropyReport", "GroupedCrossEntropy"])
def test_synchronization_options(name: str, tmp_path: Path) -> None:
    """`process_group`, `dist_sync_fn`, `sync_on_compute`, `dist_sync_on_step` do what they do in torchmetrics."""
    ranks = run_ranks(4, use_options, name, tmp_path=tmp_path)
    everything = alone(name, rows_of([0, 1, 2, 3]))
    merged = made(name)
    for rank, seen in enumerate(ranks):
        own = rows_of([rank])

        assert (
            seen["process_group"] == seen["together in process_group"] == alone(name, rows_of([rank % 2, rank % 2 + 2]))
        )
        assert seen["collectives in process_group"] == 2 * one_sum(_FIRST)
        assert seen["collectives of forward"] == one_sum(_FIRST)
        assert_close(seen["forward"], everything)
        assert seen["second forward"] == seen["forward"]
        assert seen["after forward"] == alone(name, rows_of([0, 1, 2, 3, 0, 1, 2, 3]))
        assert_close(seen["forward alone"], alone(name, own))
        assert seen["sync_on_compute"] == seen["distributed_available_fn"] == alone(name, own)
        assert seen["dist_sync_fn"] == alone(name, rows_of([rank, rank]))
        assert seen["asked for"] == [True]
        assert seen["gathered"] == seen["synced"] == everything
        assert seen["unsynced"]
        merged.merge_state(pickle.loads(seen["pickled"]))
    assert bits(merged.compute()) == everything


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_samples_that_a_sampler_repeats(shuffle: bool, drop_last: bool) -> None:
    """Over all ranks, every sample that is drawn is kept exactly once, whatever the number of samples and ranks."""
    for size, world_size in itertools.product((*range(1, 20), 64, 97), (1, 2, 3, 4, 5, 8, 16)):
        samplers = [
            DistributedSampler(range(size), world_size, rank, shuffle=shuffle, seed=size, drop_last=drop_last)
            for rank in range(world_size)
        ]
        for batch_size, epoch in ((1, 0), (3, 1), (4, 2), (100, 3)):
            drawn, kept = [], []
            for sampler in samplers:
                sampler.set_epoch(epoch)
                own = list(sampler)
                drawn += own
                for start in range(0, len(own), batch_size):
                    batch = own[start : start + batch_size]
                    keep = num_unpadded_samples(sampler, start=start, num_samples=len(batch))

                    assert 0 <= keep <= len(batch)
                    kept += batch[:keep]

            assert sorted(kept) == sorted(set(drawn)), (size, world_size, batch_size)
            assert drop_last or sorted(kept) == list(range(size)), (size, world_size, batch_size)


def fail_on_one(rank: int) -> None:
    """Raise on rank 1; the others wait for it."""
    if rank == 1:
        raise KeyError("on purpose")
    dist.barrier()


@distributed
def test_failures_of_ranks_are_shown(tmp_path: Path) -> None:
    """A rank that raises fails the test with its traceback, also while others wait for it."""
    with pytest.raises(AssertionError, match=r"(?s)^exit codes of the ranks: .*rank 1:.*KeyError: 'on purpose'"):
        run_ranks(3, fail_on_one, tmp_path=tmp_path)


def name_states(rank: int) -> list[str]:
    """Return the names that a checkpoint has for the state of a metric with a sequence group."""
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    metric = CrossEntropyReport(sequence_group=group)
    metric.persistent(True)
    return list(metric.state_dict())


@distributed
def test_checkpoints_of_one_rank_load_on_another(tmp_path: Path) -> None:
    """A metric's state has one name on all ranks, so that what one of them saved can be loaded and merged by others."""
    first, *others = run_ranks(4, name_states, tmp_path=tmp_path)

    assert others == [first] * 3


def test_what_unrepeated_refuses() -> None:
    """Another sampler, or a position before the first."""
    with pytest.raises(TypeError, match="`sampler` must be a DistributedSampler, got RandomSampler"):
        num_unpadded_samples(torch.utils.data.RandomSampler(range(3)), 0, 1)
    sampler = torch.utils.data.DistributedSampler(range(3), num_replicas=2, rank=0)
    for start, number in ((-1, 1), (0, -1)):
        with pytest.raises(ValueError, match=f"must not be negative, got {start} and {number}"):
            num_unpadded_samples(sampler, start, number)
