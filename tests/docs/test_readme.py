"""The README's code runs as written, its arithmetic is right, and its tree lists what there is."""

import math
import re
from pathlib import Path

import pytest
import torch

from xent_metrics import functional

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*sequence is treated as leaf.*")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.sub(r"\W+", " ", block)[-30:])
def test_every_block_runs_as_written(block, tmp_path, monkeypatch, capsys) -> None:
    """Each Python block is a program of its own that prints or logs something."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a block", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() or list(tmp_path.glob("lightning_logs/**/events.*"))


def test_it_is_short() -> None:
    """A README of more than 900 words is not read to its end."""
    assert len(README.split()) <= 900
    assert [len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS[:2]] == [8, 15]


def line_with(words: str) -> list[str]:
    """Return the cells of numbers in the line of the table of wrong numbers that has these words."""
    (line,) = (line for line in README.splitlines() if line.startswith("|") and words in line)
    return [cell.strip() for cell in line.split("|")[2:4]]


def test_the_mean_of_batch_means() -> None:
    """Its wrong perplexity, and the right one."""
    batches = [(1000, 2.0), (1000, 2.0), (10, 6.0)]
    mean_of_means = sum(mean for _, mean in batches) / 3
    pooled = sum(n * mean for n, mean in batches) / sum(n for n, _ in batches)
    assert line_with("batch means") == [f"{math.exp(mean_of_means):.1f}", f"{math.exp(pooled):.1f}"]


def test_the_bias_of_float32() -> None:
    """PyTorch's loss of a flat tail, and the closed form."""
    logits, target = torch.full((1, 128_256), -17.0), torch.tensor([0])
    logits[0, 0] = 0.0
    wrong = torch.nn.functional.cross_entropy(logits, target).item()
    assert line_with("in float32") == [f"{wrong:.4f}", f"{math.log1p(128_255 * math.exp(-17)):.4f}"]
    assert f"{functional.cross_entropy(logits, target):.4f}" == line_with("in float32")[1]


def test_the_rounding_of_bfloat16() -> None:
    """PyTorch's loss of equal logits, and the closed form."""
    logits, target = torch.zeros(1, 50_257, dtype=torch.bfloat16), torch.tensor([0])
    wrong = torch.nn.functional.cross_entropy(logits, target).item()
    assert line_with("in bfloat16") == [f"{wrong:.4f}", f"{math.log(50_257):.4f}"]
    assert f"{functional.cross_entropy(logits, target):.4f}" == line_with("in bfloat16")[1]


def test_what_a_sampler_draws_twice() -> None:
    """The mean over all samples that two ranks draw, and that of each sample once."""
    losses = [6.0, 1.0, 1.0, 1.0, 1.0]
    samplers = [torch.utils.data.DistributedSampler(range(5), 2, rank, shuffle=False) for rank in (0, 1)]
    drawn = [losses[i] for sampler in samplers for i in sampler]
    assert line_with("five documents") == [f"{sum(drawn) / len(drawn):.2f}", f"{sum(losses) / len(losses):.2f}"]


def test_the_architecture_names_every_module() -> None:
    """A module without a purpose is missing there, or here."""
    tree = (ROOT / "ARCHITECTURE.md").read_text().split("## What is where")[1]
    for path in (ROOT / "xent_metrics").glob("*.py"):
        assert path.name in tree or path.name == "__init__.py"
