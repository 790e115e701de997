"""What the project asks for is what docs/compatibility.md says and what `make compat` tries, and how that is shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import compat

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
PAGE = (ROOT / "docs" / "compatibility.md").read_text()


def cells(line: str) -> list[str]:
    """Return the cells of a row of a table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def rows_of_the_page() -> list[dict[str, str]]:
    """Return the rows that `make compat` printed, by the names of its columns."""
    found = [cells(line) for line in PAGE.splitlines() if line.count("|") == len(compat.HEAD) + 1]
    return [dict(zip(compat.HEAD, row, strict=True)) for row in found if row[0] in compat.COMBINATIONS]


def number(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without zeros at its end, so that 2.8.0 is 2.8."""
    found = [int(part) for part in re.match(r"[\d.]+", version)[0].split(".")]  # type: ignore[index]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def bound(name: str) -> str:
    """Return the oldest version that the project asks for."""
    return re.search(rf'"{name}(?:\[\w+\])?>=([\d.]+)', PROJECT)[1]  # type: ignore[index]


def test_every_row_passed_with_the_versions_of_its_combination() -> None:
    """Whoever shows a run that failed, or of something else, sees it here."""
    for row in rows_of_the_page():
        python, pins = compat.COMBINATIONS[row["combination"]]
        assert number(row["Python"])[:2] == number(python)
        for name, version in (pin.split("==") for pin in pins):
            assert name not in row or row[name].split("+")[0] == version
        assert int(row["passed"]) > 5000
        assert row["failed"] == "0"


@pytest.mark.parametrize("name", ["torch", "torchmetrics", "lightning", "tensorboard", "matplotlib", "jsonargparse"])
def test_the_lower_bounds_are_the_oldest_that_are_tried(name: str) -> None:
    """Neither the project, nor the script, nor the page says another one."""
    tried = [pin.split("==")[1] for pin in compat.COMBINATIONS["oldest"].pins if pin.startswith(f"{name}==")]
    of_page = {row[0].lower().partition(",")[0]: row[1] for row in map(cells, PAGE.splitlines()) if len(row) == 3}
    assert (
        [number(bound(name))] == list(map(number, tried)) == [number(of_page["pytorch" if name == "torch" else name])]
    )


def test_the_oldest_python_is_tried() -> None:
    """The project asks for no older one."""
    python = compat.COMBINATIONS["oldest"].python
    assert f'requires-python = ">={python}"' in PROJECT
    assert f"| Python | {python} |" in PAGE


def test_compromised_releases_are_refused() -> None:
    """Lightning 2.6.2 and 2.6.3 were published by somebody else."""
    assert re.search(r'"lightning>=[\d.]+,!=2\.6\.2,!=2\.6\.3"', PROJECT)


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("==== 7200 passed, 12 skipped in 250.03s (0:04:10) ====", ["7200", "0", "12"]),
        ("2 failed, 7198 passed, 1 skipped, 3 warnings, 1 error in 9s", ["7198", "3", "1"]),
        ("!!!! Interrupted: 2 errors during collection !!!!", ["0", "2", "0"]),
    ],
)
def test_what_pytest_says_is_counted(summary: str, expected: list[str]) -> None:
    """An error while a test is collected or set up is a failure."""
    assert compat.counts(summary) == expected


def test_the_table_has_a_row_as_soon_as_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The environment of a row is gone before the next one is made; a failure is in the table and in the exit code."""
    folders: list[Path] = []

    def install(folder: Path, _: Any) -> Path:
        assert not any(path.exists() for path in folders)
        folders.append(folder)
        return Path(sys.executable)

    monkeypatch.setattr(compat, "install", install)
    monkeypatch.setattr(compat, "run_suite", lambda _, log: ["7", str(int(log.name == "newest.log")), "0"])
    assert compat.main(["oldest", "--logs", str(tmp_path)]) == 0
    assert compat.main(["--logs", str(tmp_path)]) == 1
    assert not any(path.exists() for path in folders)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 2 + len(compat.COMBINATIONS)
    assert {line.count("|") for line in lines} == {len(compat.HEAD) + 1}
    assert lines[-1].startswith("| newest | 3.")
