"""The table of errors has its cells, and shows what the page says of it."""

import pytest
import torch

from tests import accuracy, bench


@pytest.fixture(name="quick", scope="module")
def _quick(tmp_path_factory) -> tuple[list[str], str]:
    """Return the lines of a quick report, and the page that it was put into."""
    page = tmp_path_factory.mktemp("accuracy") / "page.md"
    page.write_text(f"before\n{bench.MARK}\nan older run\n{bench.MARK}\nafter\n")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "print", lambda line, **_: lines.append(line), raising=False)
        accuracy.main(["--quick", "--into", str(page)])
    return lines, page.read_text()


def tables(lines: list[str]) -> list[list[dict[str, str]]]:
    """Return each table as rows of cells by the name of their column."""
    found = []
    for text in "\n".join(lines).split("### ")[1:]:
        names, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
        )
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


def test_every_row_has_its_cells(quick) -> None:
    """One row a case, for each dtype; all peers are installed here, so none is left out."""
    lines, _ = quick
    assert [len(rows) for rows in tables(lines)] == [len(accuracy.CASES)] * len(accuracy.DTYPES)
    assert "cannot run" not in "\n".join(lines)
    for rows in tables(lines):
        for row in rows:
            assert all(row.values())


def test_ours_is_within_what_is_promised_and_the_usual_sum_is_not(quick) -> None:
    """Bold is what has an error above it."""
    of_float32, of_bfloat16 = tables(quick[0])
    for row in (*of_float32, *of_bfloat16):
        assert not row[accuracy.OURS].startswith("**"), row
    for row in of_float32:
        if "flat tail" in row["rows"]:
            assert row[accuracy.FULL].startswith("**"), row
    for row in of_bfloat16:
        assert row[accuracy.NATIVE].startswith("**"), row


def test_errors_are_those_that_were_made() -> None:
    """The sign is that of the mean, and the largest has none."""
    logits, target = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    true = torch.full((4,), 8.0, dtype=torch.float64).log()
    wrong = torch.tensor([1e-3, -3e-3, 0.0, 0.0])

    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not today")

    found = accuracy.errors(logits, target, {"wrong": lambda *_: true + wrong, "broken": broken})
    assert found["wrong"][:2] == pytest.approx((-5e-4, 3e-3))
    assert accuracy.cell(found["wrong"]) == "**-5.0e-04, 3.0e-03**"
    assert accuracy.cell(found["broken"]).startswith("cannot run: RuntimeError: not today")


def test_a_run_takes_the_place_of_an_older_one(quick) -> None:
    """What stands around it is left alone, and the page of the documentation has a place for one."""
    lines, page = quick
    text = "\n".join(lines)
    assert page == f"before\n{bench.MARK}\n\n{text}\n\n{bench.MARK}\nafter\n"
    assert (bench.ROOT / "docs" / "accuracy.md").read_text().count(f"\n{bench.MARK}\n") == 2
