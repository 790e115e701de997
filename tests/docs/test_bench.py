"""The benchmark runs; nothing is said about its figures, which are those of whatever else the machine does."""

import re

import pytest
import torch

from tests import bench


@pytest.fixture(name="quick", scope="module")
def _quick(tmp_path_factory) -> tuple[str, str]:
    """Return a quick report, and the page that it was put into."""
    page = tmp_path_factory.mktemp("bench") / "page.md"
    page.write_text(f"before\n{bench.MARK}\nan older run\n{bench.MARK}\nafter\n")
    capture = pytest.MonkeyPatch()
    lines: list[str] = []
    capture.setattr(bench, "print", lambda line, **_: lines.append(line), raising=False)
    threads = torch.get_num_threads()
    try:
        bench.main(["--quick", "--into", str(page)])
    finally:
        capture.undo()
        torch.set_num_threads(threads)
    return "\n".join(lines), page.read_text()


@pytest.mark.slow
def test_a_quick_run_prints_every_row(quick) -> None:
    """Every case has its rows, and so have memory and allocators; all peers are installed here, so none is left out."""
    report, _ = quick
    time, memory, allocators = re.split(r"### .*\n", report)[1:]
    for case in bench.CASES:
        assert f"| **{case.what}**, " in time
    for index in bench.MEMORY:
        assert f"| **{bench.CASES[index].what}** |" in memory
    for case in bench.CASES[: bench.BIG]:
        assert f"| **{case.what}** |" in allocators
    assert "cannot run" not in report


@pytest.mark.slow
def test_all_that_has_a_target_stands_beside_something(quick) -> None:
    """A target for a row that is not there would be no target."""
    report, _ = quick
    num_targets = len(bench.MEMORY)
    for case in bench.CASES:
        num_targets += len(case.targets or {}) + (case.at_most is not None)
        assert case.targets or case.at_most
        for name in case.targets or {}:
            assert f"|  | {name} | " in report
    assert len(re.findall(r"<= .*?: (yes|no) \|", report)) == num_targets


@pytest.mark.slow
def test_every_row_of_a_table_has_its_cells(quick) -> None:
    """A cell too many would be cut off by whatever shows the table."""
    report, _ = quick
    for table in re.findall(r"(?:^\|.*\n)+", report + "\n", flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.slow
def test_a_run_takes_the_place_of_an_older_one(quick) -> None:
    """What stands around it is left alone."""
    report, page = quick
    assert page == f"before\n{bench.MARK}\n\n{report}\n\n{bench.MARK}\nafter\n"


def test_a_page_without_marks_is_left_alone(tmp_path) -> None:
    """Nobody knows where a run would go."""
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="must have two lines"):
        bench.put_between_marks(page, "a run")
    assert page.read_text() == "nothing\n"


def test_the_page_has_a_place_for_a_run() -> None:
    """The page of the documentation has the two lines."""
    assert (bench.ROOT / "docs" / "benchmarks.md").read_text().count(f"\n{bench.MARK}\n") == 2


def test_what_fails_says_so_and_the_rest_is_measured() -> None:
    """A peer that cannot run costs its own row only."""

    def broken() -> None:
        raise RuntimeError("no | such\nthing")

    case = bench.Case("a case", lambda _: {"ours": lambda: None, "theirs": broken, "third": "not there"}, (), rounds=1)
    ours, theirs, third = bench.time_rows(case, bench.measure(case))
    assert re.match(r"\| \*\*a case\*\*, 2 threads \| ours \| .* us \|", ours)
    assert "cannot run: RuntimeError: no / such |" in theirs
    assert "not there" in third


def test_medians_are_of_rounds_and_slow_functions_run_once(monkeypatch) -> None:
    """A function may say itself what it took."""
    monkeypatch.setattr(bench, "SLOW", 10.0)
    taken = {"steady": iter([1.0, 9.0, 2.0]), "slow": iter([11.0])}
    costs = bench.interleave({name: lambda it=it: bench.Taken(next(it), 0.5) for name, it in taken.items()}, rounds=3)
    assert [costs[name].seconds for name in taken] == [2.0, 11.0]
    assert costs["steady"].of_which == 0.5
