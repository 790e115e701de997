"""The pages of the site: their code prints what they say, they name all that is public, and quote real messages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import xent_metrics
from xent_metrics import functional
from xent_metrics.losses.mistakes import MISTAKES

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
# A block of code, and what it prints if a block of text comes right behind it.
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", flags=re.DOTALL)
BLOCKS = [
    pytest.param(code, output, id=f"{name}-{i}")
    for name, page in PAGES.items()
    for i, (code, output) in enumerate(BLOCK.findall(page))
]


@pytest.mark.filterwarnings("ignore:.*sequence is treated as leaf.*")
@pytest.mark.parametrize(("code", "output"), BLOCKS)
def test_every_block_runs_as_written(code: str, output: str, tmp_path, monkeypatch, capsys) -> None:
    """Each is a program of its own. It prints what the page says, or at least prints or logs something."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "a block", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    if output:
        assert printed == output
    assert printed.strip() or list(tmp_path.glob("lightning_logs/**/events.*"))


def test_every_public_name_is_on_one_page() -> None:
    """Whoever looks for a name finds its docstring, once."""
    from xent_metrics import lightning, tensorboard  # noqa: PLC0415  # Slow to import.

    names = [f"xent_metrics.{name}" for name in xent_metrics.__all__ if name != "functional"]
    for module in (functional, lightning, tensorboard):
        names += [f"{module.__name__}.{name}" for name in module.__all__]
    documented = re.findall(r"^::: (\S+)$", "\n".join(PAGES.values()), flags=re.MULTILINE)
    assert sorted(documented) == sorted(names)


def strings_of_source() -> str:
    """Return every string of the library's source, with an ellipsis for each value that is put into one."""
    texts = []
    for path in (ROOT / "xent_metrics").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(x.value) if isinstance(x, ast.Constant) else "..." for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"\{\w+\}", "...", node.value))
    return "\n".join(texts)


BAD_TARGETS = {
    "large": lambda: functional.cross_entropy(torch.zeros(2, 8), torch.tensor([0, 9])),
    "negative": lambda: functional.cross_entropy(torch.zeros(2, 8), torch.tensor([0, -1])),
    "soft": lambda: functional.cross_entropy(torch.zeros(1, 2), torch.tensor([[0.5, 0.6]])),
    "binary": lambda: functional.binary_cross_entropy(torch.zeros(2), torch.tensor([0, 2])),
}


def test_messages_on_the_page_of_errors_are_those_of_the_library() -> None:
    """A sentence that somebody searches for is found, and one that was reworded is mended on the page too."""
    source, raised = strings_of_source(), []
    for mistake in BAD_TARGETS.values():  # Their sentences are put together of several strings.
        with pytest.raises(ValueError, match="`target` must hold") as error:
            mistake()
        raised.append(str(error.value))
    quoted = re.findall(r"^\| `` (.*?) `` \|", PAGES["errors.md"], flags=re.MULTILINE)
    assert len(quoted) > 50
    for message in quoted:
        pattern = ".*".join(map(re.escape, message.split("...")))
        in_source = [part.strip(" ;,") in source for part in message.split("...")]
        assert all(in_source) or any(re.search(pattern, text) for text in raised), message
    for text in raised:
        assert any(re.search(".*".join(map(re.escape, message.split("..."))), text) for message in quoted), text


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_every_mistake_that_is_counted_is_on_the_page_of_errors(mistake) -> None:
    """What may be wrong with a target is found by the words of the rule."""
    for part in re.split(r"\{\w+\}", mistake.rule):
        assert part.strip() in PAGES["errors.md"]


def test_every_plot_of_a_page_can_be_drawn_again() -> None:
    """A metric without a picture is missing in the script, or the script was not run."""
    from tests import site_pictures  # noqa: PLC0415  # Slow to import.

    drawn = {path.stem for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert drawn == set(site_pictures.METRICS)
    shown = re.findall(r"\.\./pictures/(\w+)\.svg", "\n".join(PAGES.values()))
    assert sorted(shown) == sorted(drawn)
