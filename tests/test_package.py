"""What several files say about the package is the same, and what a user writes is all that is public."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import xent_metrics
from tests import user
from xent_metrics import functional, lightning, tensorboard

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def read(path: str) -> Any:
    """Read a file of YAML."""
    return yaml.safe_load((ROOT / path).read_text())


def test_the_version_is_the_same_everywhere() -> None:
    """The library has it, the citation repeats it, and the changelog says what is in it."""
    headings = re.findall(r"^## \[(.*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", xent_metrics.__version__]
    assert read("CITATION.cff")["version"] == xent_metrics.__version__


def test_workflows_test_the_oldest_versions_that_are_allowed() -> None:
    """And others beside them."""
    python, torch_bound = (re.search(rf'{name}>=([\d.]+)"', PYPROJECT)[1] for name in ('requires-python = "', '"torch'))
    matrix = read(".github/workflows/test.yml")["jobs"]["versions"]["strategy"]["matrix"]
    assert len(matrix["python"]) == len(matrix["torch"]) == 2
    assert matrix["python"][0] == python
    assert matrix["torch"] == [f"torch=={torch_bound}.*", "torch"]


def test_each_verb_has_one_recipe() -> None:
    """Of two make takes the second, and warns."""
    verbs = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(verbs) == len(set(verbs)) > 10


def test_workflows_run_what_there_is() -> None:
    """Each verb is one of the Makefile, and its variables are."""
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        step["run"]
        for path in (ROOT / ".github" / "workflows").iterdir()
        for job in read(str(path))["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    verbs = re.findall(r"^make (\w+)", "\n".join(commands), flags=re.MULTILINE)
    assert sorted(verbs) == ["test", "wheel", "wheel"]
    for verb in verbs:
        assert f"\n{verb}: " in makefile
    for variable in re.findall(r" ([A-Z]+)=", "\n".join(commands)):
        assert f"\n{variable} ?= " in makefile


@pytest.mark.parametrize(("repository", "package"), [("ruff-pre-commit", "ruff"), ("check-jsonschema",) * 2])
def test_pre_commit_runs_the_versions_of_the_tests(repository: str, package: str) -> None:
    """A hook of another version would change what `make lint` calls good."""
    revisions = {hooks["repo"].rpartition("/")[2]: hooks["rev"] for hooks in read(".pre-commit-config.yaml")["repos"]}
    assert f"\n{package}=={revisions[repository].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_a_user_writes_every_public_name() -> None:
    """So `make wheel` checks the types of all of them."""
    tree = ast.parse(Path(user.__file__).read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    public = {*xent_metrics.__all__, *functional.__all__, *lightning.__all__, *tensorboard.__all__}
    assert public - used == set()


def test_what_a_user_writes_runs(tmp_path: Path) -> None:
    """All but the fit, which `make wheel` runs."""
    logits, target = torch.randn(4, 6, 50), torch.randint(50, (4, 6))
    assert set(user.use_metrics(logits, target)) > {"perplexity", "a", "by_group", "binary"}
    assert user.use_functions(logits, target) > 0
    assert user.use_data().tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert "Cross-entropy in **nats**" in user.use_dashboards(str(tmp_path))
