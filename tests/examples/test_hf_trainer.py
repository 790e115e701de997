"""The recipe for the Trainer of Hugging Face logs the loss of all tokens of all processes; `make recipes` runs this."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tests.distributed.ranks import run_ranks

pytest.importorskip("transformers", reason="transformers is in the environment of `make recipes` only")

SCRIPT = Path(__file__).parents[2] / "examples" / "hf_trainer.py"
LOG_EVERY = 5


def run(rank: int) -> dict[str, Any]:
    """Run the recipe as torchrun would, in a world that is there; also score every training batch in float64."""
    world_size = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    spec = importlib.util.spec_from_file_location("hf_trainer", SCRIPT)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    steps = []

    def record(module: nn.Module, args: Any, batch: dict[str, Any], outputs: Any) -> None:
        if isinstance(module, recipe.LlamaForCausalLM) and module.training:
            logits, target = outputs.logits[:, :-1].detach().double(), batch["labels"][:, 1:]
            steps.append((F.cross_entropy(logits.mT, target, reduction="sum").item(), (target >= 0).sum().item()))

    with register_module_forward_hook(record, with_kwargs=True):
        trainer = recipe.main()
    model, losses = trainer.model.double().eval(), []
    for row in trainer.eval_dataset:
        with torch.no_grad():
            logits = model(row["input_ids"][None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits, row["labels"][1:], reduction="none")[row["labels"][1:] >= 0])
    return {"logged": trainer.state.log_history, "steps": steps, "evaluation": torch.cat(losses).tolist()}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_all_tokens_count_alike(world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training between two logs, and in evaluation, where a row that a sampler repeats counts once."""
    monkeypatch.chdir(tmp_path)
    ranks = run_ranks(world_size, run, tmp_path=tmp_path)
    logged, losses = ranks[0]["logged"], ranks[0]["evaluation"]
    points = [point for point in logged if "cross_entropy" in point]
    assert [point["step"] for point in points] == [5, 10, 15]
    for i, point in enumerate(points):
        window = [x for rank in ranks for x in rank["steps"][i * LOG_EVERY : (i + 1) * LOG_EVERY]]
        expected = sum(nats for nats, _ in window) / sum(number for _, number in window)
        assert point["cross_entropy"] == pytest.approx(expected, rel=2e-6)
    numbers = [sum(number for _, number in rank["steps"]) for rank in ranks]
    assert len({*numbers}) == world_size
    last = [point for point in logged if "eval_cross_entropy" in point][-1]
    assert last["step"] == 15
    assert last["eval_num_tokens"] == len(losses)
    assert last["eval_cross_entropy"] == pytest.approx(fmean(losses), rel=2e-6)
    assert last["eval_loss"] != pytest.approx(fmean(losses), rel=1e-2)
    keys = ("cross_entropy", "eval_cross_entropy", "eval_num_tokens")
    values = [[point[key] for point in rank["logged"] for key in keys if key in point] for rank in ranks]
    assert all(x == values[0] for x in values)
