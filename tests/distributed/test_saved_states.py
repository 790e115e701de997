"""A saved state is counted once, whichever number of ranks saved it and whichever loads it; or it is refused."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchmetrics import MetricCollection

from tests.distributed.ranks import run_ranks
from tests.distributed.shares import Data, alone, bits, distributed, error, made, own_rows, rows_of, update
from xent_metrics import CrossEntropy

NAMES = ("CrossEntropyReport", "GroupedCrossEntropy")
OLD = json.loads(Path(__file__).parent.with_name("fixtures").joinpath("states_before_0_1_0.json").read_text())


def make_model(name: str) -> Any:
    """Make a model with a metric that is saved, in a collection."""
    metric = made(name)
    metric.persistent(True)
    return nn.Sequential(nn.Linear(2, 2), MetricCollection({"metric": metric}))


def metric_of(model: Any) -> Any:
    """Return the metric in a model."""
    return model[1]["metric"]


def save(rank: int, folder: Path) -> None:
    """Save a model in every way; rank 0 writes what is one file, and has an empty metric too."""
    for name in NAMES:
        model = make_model(name)
        metric = update(metric_of(model), name, own_rows(rank))
        torch.save(model.state_dict(), folder / f"{name} of {rank}.pt")
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / f"{name} alone")
        with metric.sync_context():
            state = model.state_dict()
            dcp.save({"model": model.state_dict()}, checkpoint_id=folder / f"{name} together")
            assert "unsync" in error(lambda model=model, state=state: model.load_state_dict(deepcopy(state)))
        if rank == 0:
            torch.save(state, folder / f"{name} together.pt")
            torch.save(make_model(name).state_dict(), folder / f"{name} empty.pt")
    dist.barrier()


def load(rank: int, name: str, num_saved: int, folder: Path) -> dict[str, Any]:
    """Load what so many ranks saved of a metric, in every way: what is read, or what is raised."""
    size, own = dist.get_world_size(), f"{name} of {rank}.pt"

    def read(file: str, *more: Data) -> Any:
        model = make_model(name)
        model.load_state_dict(torch.load(folder / file, weights_only=True))
        for data in more:
            update(metric_of(model), name, data)
        return bits(metric_of(model).compute())

    def refuse(file: str) -> str:
        model = make_model(name)
        before = metric_of(model).tally.state
        raised = error(lambda: model.load_state_dict(torch.load(folder / file, weights_only=True)))
        assert not raised or metric_of(model).tally.state is before
        return raised

    def load_distributed(way: str) -> tuple[str, Any]:
        model = make_model(name)
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=folder / f"{name} {way}")
        return error(lambda: model.load_state_dict(state["model"])), metric_of(model)

    merged = made(name)
    for other in range(rank, num_saved, size):
        file = torch.load(folder / f"{name} of {other}.pt", weights_only=True)
        merged.merge_state({"tally": file["1.metric.tally"]})
    raised, distributed_metric = load_distributed("together")
    assert not raised
    return {
        "together": read(f"{name} together.pt"),
        "distributed together": bits(distributed_metric.compute()),
        "merged": bits(merged.compute()),
        "goes on": read(f"{name} together.pt", own_rows(rank)),
        "empty": read(f"{name} empty.pt"),
        "of rank 0": refuse(f"{name} of 0.pt"),
        "own": read(own) if num_saved == size else refuse(own) if rank < num_saved else "",
        "distributed alone": load_distributed("alone")[0],
    }


def load_all(rank: int, folders: dict[int, Path]) -> dict[tuple[int, str], dict[str, Any]]:
    """Load what worlds of some sizes saved."""
    return {(num, name): load(rank, name, num, folder) for num, folder in folders.items() for name in NAMES}


@distributed
def test_a_state_of_all_ranks_loads_on_any_number_of_them(tmp_path: Path) -> None:
    """Saved within `sync_context` by 2 and by 4 ranks, in a file or distributed, it reads the same on 2, on 4 and on 1.

    The state of one rank loads on that rank of as many, and nowhere else; what is merged by hand is right.
    """
    folders = {num_saved: tmp_path / f"{num_saved}" for num_saved in (2, 4)}
    for num_saved, folder in folders.items():
        folder.mkdir()
        run_ranks(num_saved, save, folder, tmp_path=tmp_path)
    worlds = {size: run_ranks(size, load_all, folders, tmp_path=tmp_path) for size in (2, 4)}
    for (num_saved, folder), name in itertools.product(folders.items(), NAMES):
        saved = [*range(num_saved)]
        expected, nothing = alone(name, rows_of(saved)), alone(name, own_rows(0).rows(slice(0)))
        model = make_model(name)
        model.load_state_dict(torch.load(folder / f"{name} together.pt", weights_only=True))
        assert bits(metric_of(model).compute()) == expected
        for size, ranks in worlds.items():
            for rank, result in enumerate(ranks):
                seen, where = result[num_saved, name], (num_saved, name, size, rank)
                assert seen["together"] == seen["distributed together"] == seen["merged"] == expected, where
                assert seen["goes on"] == alone(name, rows_of([*saved, *range(size)])), where
                assert seen["empty"] == nothing, where
                said = f"the rank that loads it, {rank} of {size}, but this one is of rank {{}} of {num_saved} alone"
                fits = (rank, size) == (0, num_saved)
                assert (seen["of rank 0"] == "") if fits else (said.format(0) in seen["of rank 0"]), where
                if size == num_saved:
                    assert seen["own"] == expected, where
                elif rank < num_saved:
                    assert said.format(rank) in seen["own"], where
            # Who wrote which part of it is up to PyTorch.
            refused = [bool(result[num_saved, name]["distributed alone"]) for result in ranks]
            assert sum(refused) >= (size - 1 if size == num_saved else size), (num_saved, name, size)


def load_in_groups(rank: int) -> dict[str, Any]:
    """Save and load a metric of half of the ranks; load what does not say whose it is."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    seen: dict[str, Any] = {}
    metric = CrossEntropy(process_group=groups[rank % 2])
    metric.persistent(True)
    update(metric, "CrossEntropy", own_rows(rank))
    seen["share"] = metric.state_dict()["tally"]["share"]
    with metric.sync_context():
        saved = metric.state_dict()
    other = CrossEntropy(process_group=groups[rank % 2])
    other.load_state_dict(deepcopy(saved))
    seen["group"] = bits(other.compute())
    seen["alone"] = CrossEntropy(distributed_available_fn=lambda: False)
    seen["alone"].load_state_dict(deepcopy(saved))
    seen["alone"] = bits(seen["alone"].compute())
    unknown = deepcopy(saved)
    del unknown["tally"]["share"]
    seen["unknown"] = error(lambda: CrossEntropy().load_state_dict(unknown))
    old = OLD["CrossEntropy"]
    seen["before 0.1.0"] = error(lambda: CrossEntropy().load_state_dict({old["key"]: torch.tensor(old["state"])}))
    return seen


@distributed
def test_a_state_of_some_ranks_loads_on_these(tmp_path: Path) -> None:
    """A `process_group` counts its own ranks, a metric without others is one; an old state does not say whose it is."""
    for rank, seen in enumerate(run_ranks(4, load_in_groups, tmp_path=tmp_path)):
        expected = alone("CrossEntropy", rows_of([rank % 2, rank % 2 + 2]))
        assert seen["share"] == [rank // 2, 2]
        assert seen["group"] == seen["alone"] == expected
        for name in ("unknown", "before 0.1.0"):
            assert f"loads it, {rank} of 4, but this one does not say of which rank it is; save" in seen[name], name
