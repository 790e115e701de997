"""Ranks that share a model are counted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.distributed.ranks import needs_fsdp2
from tests.lightning.worlds import (
    Sharded,
    Table,
    about_us,
    assert_logged,
    both,
    loader,
    logged,
    make_trainer,
    messages,
    own,
    pooled,
    run_ranks,
)
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = pytest.mark.distributed


class Parallel(Table):
    """The table's classes are spread over the tensor-parallel ranks, and gathered for the loss."""

    spread = False

    def configure_model(self) -> None:
        layout = Shard(-1) if self.spread else Replicate()
        plan = ColwiseParallel(output_layouts=layout, use_local_output=not self.spread)
        parallelize_module(self.table, self.device_mesh["tensor_parallel"], plan)


class Spread(Parallel):
    """The logits stay spread."""

    spread = True


def fit_model_parallel(folder: Path, module_class: type[Table], data_parallel: int | None) -> dict[str, Any]:
    """Fit with `ModelParallelStrategy`, or plainly, and then validate without training."""
    world_size = torch.distributed.get_world_size()

    def trainer(**kwargs: Any) -> Trainer:
        if data_parallel is not None:
            kwargs["strategy"] = ModelParallelStrategy(data_parallel, world_size // data_parallel)
        return make_trainer(CrossEntropyMonitor(), **kwargs)

    with messages() as said:
        module, fitter = module_class("logits"), trainer(folder=folder)
        fitter.fit(module, loader(16), loader(5))
        fresh, validator = module_class("logits"), trainer()
        validator.validate(fresh, loader(5), verbose=False)
    val = {tag: x for tag, x in own(validator.callback_metrics).items() if tag.startswith("val")}
    return {"seen": module.seen, "fit": own(fitter.callback_metrics), "val": val, "said": about_us(said)}


@pytest.mark.parametrize(
    ("module_class", "world_size", "data_parallel"),
    [pytest.param(Sharded, 2, 2, marks=needs_fsdp2), (Parallel, 2, 1), (Spread, 2, 1), (Parallel, 4, 2)],
    ids=["fsdp2", "tensor parallel", "tensor parallel, logits spread", "two by two"],
)
def test_model_parallel_ranks_are_counted_once(tmp_path, module_class, world_size, data_parallel) -> None:
    """Readings are those of the data-parallel ranks, equal on all ranks, and those of one process."""
    ranks = run_ranks(world_size, fit_model_parallel, tmp_path / "log", module_class, data_parallel, tmp_path=tmp_path)
    [one] = run_ranks(1, fit_model_parallel, tmp_path / "one", Table, None, tmp_path=tmp_path)
    different = ranks[:: world_size // data_parallel]
    points, batches = logged(tmp_path / "log"), 8 // data_parallel
    windows = [(1 + start, pooled(both(different, "train", start, start + 2))) for start in range(0, batches, 2)]
    assert_logged(points, "train", windows)
    assert_logged(points, "train", [(batches - 1, pooled(both(different, "train", 0, batches)))], suffix="_epoch")
    for rank in ranks:
        assert rank["fit"] == ranks[0]["fit"]
        assert rank["said"] == []
        if module_class is Spread:  # The softmax of parts of a row rounds differently.
            values, expected = ([float.fromhex(x) for x in each["val"].values()] for each in (rank, one))
            assert values == pytest.approx(expected, rel=1e-6)
        else:
            assert rank["val"] == one["val"]


def fit_fsdp(folder: Path) -> dict[str, Any]:
    """Fit with FSDP of the first kind, on GPUs."""
    module, settings = Table("logits"), {"accelerator": "cuda", "strategy": "fsdp"}
    trainer = make_trainer(CrossEntropyMonitor(), folder=folder, **settings)
    trainer.fit(module, loader(16), loader(5))
    return {"seen": module.seen, "metrics": own(trainer.callback_metrics)}


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDPStrategy takes no CPU, and two ranks need two GPUs")
def test_fsdp_logs_pooled_readings(tmp_path) -> None:
    """FullyShardedDataParallel's ranks hold different data, all of them."""
    ranks = run_ranks(2, fit_fsdp, tmp_path / "log", tmp_path=tmp_path)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert_logged(logged(tmp_path / "log"), "train", [(3, pooled(both(ranks, "train", 0, 4)))], suffix="_epoch")
