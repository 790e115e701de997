"""Each recipe prints the number of all the data, on one process and on several, and the one that is usually logged."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from tests import reference
from tests.distributed.ranks import needs_fsdp2, run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
# Of each recipe the function that returns its numbers, and the module that makes logits.
RECIPES = {
    "class_weights": ("evaluate", nn.Linear),
    "segmentation": ("evaluate", nn.Conv2d),
    "multi_label": ("evaluate", nn.Linear),
    "fabric_loop": ("run", nn.Sequential),
    "fsdp_tp_loop": ("train", nn.Sequential),
}
SHARED = ("fsdp_tp_loop",)  # Those that have something for four processes.
EACH = [pytest.param(name, marks=needs_fsdp2 if name in SHARED else ()) for name in RECIPES]
Ranks = list[list[Tensor]]  # Of each rank, one tensor a batch.


class Run(NamedTuple):
    """What a recipe did on a rank: the numbers that it found, the logits that it saw, and what it printed."""

    found: list[Any]
    logits: list[Tensor]
    printed: str


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str) -> Run:
    """Run a recipe's `main`."""
    recipe, (function, model) = load(name), RECIPES[name]
    original, found, logits = getattr(recipe, function), [], []

    def call(*args: Any) -> Any:
        values = original(*args)
        found.append(tree_map_only(Tensor, Tensor.tolist, values))
        return values

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(module, model):
            logits.append((output.full_tensor() if hasattr(output, "full_tensor") else output).detach().double())

    hook = register_module_forward_hook(record)
    with hook, mock.patch.object(recipe, function, call), contextlib.redirect_stdout(io.StringIO()) as printed:
        recipe.main()
    return Run(found, logits, printed.getvalue())


def run_on_a_rank(rank: int, names: list[str]) -> dict[str, Run]:
    """Run recipes as torchrun would, in a world that is there."""
    world_size = dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "", "MASTER_PORT": "0"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "recipes"}
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        return {name: run(name) for name in names}


def pool(ranks: Ranks) -> Tensor:
    return torch.cat([batch for rank in ranks for batch in rank])


def mean_of_means(ranks: list[list[float]]) -> float:
    return fmean(map(fmean, ranks))


def judge_class_weights(recipe: ModuleType, logits: Ranks, num_ranks: int) -> list[Any]:
    targets = [[target for _, target in recipe.make_batches(rank, num_ranks)] for rank in range(num_ranks)]

    def loss(logits: Tensor, target: Tensor) -> float:
        return F.cross_entropy(logits, target, weight=recipe.CLASS_WEIGHT.double()).item()

    means = [list(map(loss, *pair)) for pair in zip(logits, targets, strict=True)]
    return [(loss(pool(logits), pool(targets)), mean_of_means(means))]


def judge_segmentation(recipe: ModuleType, logits: Ranks, num_ranks: int) -> list[Any]:
    targets = [[target for _, target in recipe.make_batches(rank, num_ranks)] for rank in range(num_ranks)]
    target = pool(targets)
    losses = F.cross_entropy(pool(logits), target, ignore_index=255, reduction="none")
    images = [list(map(reference.Target, x[y != 255].tolist())) for x, y in zip(losses, target, strict=True)]
    means = [
        [F.cross_entropy(*batch, ignore_index=255).item() for batch in zip(*pair, strict=True)]
        for pair in zip(logits, targets, strict=True)
    ]
    readings = {
        "cross_entropy": losses[target != 255].mean().item(),
        "cross_entropy_stderr": reference.stderr(images),
        "num_tokens": (target != 255).sum().item(),
    }
    by_class = [losses[target == i].mean().item() for i in range(recipe.NUM_CLASSES)]
    return [(readings, by_class, mean_of_means(means))]


def judge_multi_label(recipe: ModuleType, logits: Ranks, num_ranks: int) -> list[Any]:
    labels = [[target for _, target in recipe.make_batches(rank, num_ranks)] for rank in range(num_ranks)]

    def losses(logits: Tensor, labels: Tensor) -> list[Tensor]:
        loss = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).double(), reduction="none")
        return [x[known] for x, known in zip(loss.T, labels.T >= 0, strict=True)]

    of_all = losses(pool(logits), pool(labels))
    batches = [[losses(*batch) for batch in zip(*pair, strict=True)] for pair in zip(logits, labels, strict=True)]
    usual = [
        mean_of_means([[batch[i].mean().item() for batch in rank if len(batch[i])] for rank in batches])
        for i in range(len(recipe.LABELS))
    ]
    return [(torch.cat(of_all).mean().item(), [x.mean().item() for x in of_all], usual)]


def judge_tokens(logits: Ranks, tokens: Ranks) -> tuple[float, int, list[list[float]]]:
    """Return the loss of all tokens, their number, and of each rank the mean losses of its batches."""
    targets = [[x[:, 1:].flatten() for x in rank] for rank in tokens]
    logits = [[x.flatten(0, 1) for x in rank] for rank in logits]
    means = [
        [F.cross_entropy(*batch).item() for batch in zip(*pair, strict=True)]
        for pair in zip(logits, targets, strict=True)
    ]
    return F.cross_entropy(pool(logits), pool(targets)).item(), (pool(targets) >= 0).sum().item(), means


def judge_fabric_loop(recipe: ModuleType, logits: Ranks, num_ranks: int) -> list[Any]:
    expected, start = [], 0
    for num in (40, 14):
        tokens = [recipe.make_batches(num, rank, num_ranks) for rank in range(num_ranks)]
        stop = start + len(tokens[0])
        loss, _, means = judge_tokens([rank[start:stop] for rank in logits], tokens)
        expected.append([math.exp(loss), math.exp(fmean(means[0]))])
        start = stop
    return expected


def judge_fsdp_tp_loop(recipe: ModuleType, logits: Ranks, num_ranks: int) -> list[Any]:
    different = logits[:: 2 if num_ranks == 4 else 1]  # Pairs of ranks have the same tokens.
    tokens = [recipe.make_batches(rank, len(different)) for rank in range(len(different))]
    loss, num_tokens, means = judge_tokens(different, tokens)
    return [({"cross_entropy": loss, "num_tokens": num_tokens}, mean_of_means(means))]


def assert_right(name: str, ranks: list[Run]) -> None:
    """What was found is what float64 says, the usual number is another one, and the first rank prints both."""
    judge = globals()[f"judge_{name}"]
    expected = judge(load(name), [rank.logits for rank in ranks], len(ranks))
    assert len(ranks[0].found) == len(expected)
    for values, judged in zip(ranks[0].found, expected, strict=True):
        for value, wanted in zip(values, judged, strict=True):
            known = {key: value[key] for key in wanted} if isinstance(wanted, dict) else value
            assert known == pytest.approx(wanted, rel=2e-6)
        *right, usual = (values[0]["cross_entropy"], *values[1:]) if isinstance(values[0], dict) else values
        assert usual != pytest.approx(right[-1] if isinstance(usual, list) else right[0], rel=1e-2)
        for number in tree_leaves([right, usual]):
            assert f"{number:.4f}" in ranks[0].printed
    for rank in ranks[1:]:
        assert [values[:-1] for values in rank.found] == [values[:-1] for values in ranks[0].found]
        assert rank.printed == ""


@pytest.mark.parametrize("name", EACH)
def test_a_process_alone_prints_what_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python examples/x.py` runs it."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    assert_right(name, [run(name)])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "names"), [(2, sorted({*RECIPES} - {*SHARED})), pytest.param(4, SHARED, marks=needs_fsdp2)]
)
def test_several_processes_print_what_is_right(world_size: int, names: list[str], tmp_path: Path) -> None:
    """Whatever their shares, they read the loss of all the data; all of them read the same."""
    ranks = run_ranks(world_size, run_on_a_rank, list(names), tmp_path=tmp_path)
    for name in names:
        assert_right(name, [rank[name] for rank in ranks])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_torchrun_prints_what_is_right(name: str) -> None:
    """As its docstring says; models that were not trained read what one process reads."""
    world_size = 4 if name in SHARED else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    script = EXAMPLES / f"{name}.py"
    assert f"torchrun --nproc-per-node {world_size} examples/{name}.py" in script.read_text()
    outputs = [
        subprocess.run([*start, script], capture_output=True, text=True, check=True, timeout=120).stdout
        for start in ([sys.executable], command)
    ]
    first = [output.splitlines()[0].split(";")[0] for output in outputs]
    assert "nats" in first[0] or "perplexity" in first[0]
    assert (first[0] == first[1]) == (RECIPES[name][0] == "evaluate")


def test_recipes_are_short_and_on_their_page() -> None:
    """They can be pasted; the two longer examples are programs."""
    page = (EXAMPLES.parent / "docs" / "recipes.md").read_text()
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert [name for name in lengths if f"`{name}`" not in page] == []
    assert {name for name, length in lengths.items() if length > 60} == {"custom_loop.py", "evaluate_lm.py"}
