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


def test_there_are_two_quick_starts_of_the_promised_length() -> None:
    """A quick start that grows is none."""
    assert [len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS[:2]] == [15, 8]


def test_the_example_in_why_is_right() -> None:
    """The mean of means and the pooled value are those of the table."""
    batches = [(1000, 2.0), (1000, 2.0), (10, 6.0)]
    mean_of_means = sum(mean for _, mean in batches) / 3
    pooled = sum(n * mean for n, mean in batches) / sum(n for n, _ in batches)
    for value in (f"{mean_of_means:.2f}", f"{math.exp(mean_of_means):.1f}", f"{pooled:.2f}", f"{math.exp(pooled):.1f}"):
        assert value in README


def test_the_tree_names_every_module() -> None:
    """A file without a purpose in the README is missing there, or here."""
    tree = README.split("## What is where")[1]
    for path in (ROOT / "xent_metrics").glob("*.py"):
        assert path.name in tree or path.name == "__init__.py"


def test_the_reading_of_the_worked_values() -> None:
    """The numbers under Definitions are what the library says."""
    assert f"{functional.cross_entropy(torch.tensor([2.0, 1.0, 0.1]), torch.tensor(0)):.4f}" == "0.4170"
    assert f"{functional.cross_entropy(torch.zeros(8), torch.tensor(3)):.4f}" == "2.0794"
