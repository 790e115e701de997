"""The page of `make gpu` runs to its end without a GPU, and ends with 1 if a number is wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import gpu
from xent_metrics.losses import kernels

SMALL = gpu.Sizes((50, 129), (50, 129), (), 2**13, (16, 200), (8, 4, 50), 1)


@pytest.fixture(name="run")
def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[int, str]]:
    """Return what runs it on the CPU with tiny sizes, and returns the exit code and the page."""
    monkeypatch.setattr(gpu, "TINY", SMALL)
    return lambda: (gpu.main(["--device", "cpu"]), capsys.readouterr().out)


def test_every_section_is_there(run: Callable[[], tuple[int, str]]) -> None:
    """What needs a GPU says that it is left out; all the rest is measured, and no number is wrong."""
    code, page = run()
    assert code == 0
    assert "**compiled losses are left out: not asked for on the CPU**" in page
    _, tests, bits, errors, waits, wide, half, of_head, result = re.split(r"^## .*\n", page, flags=re.MULTILINE)
    assert "Left out: without a CUDA device" in tests
    assert len(re.findall(r"eager \| 0 \| 0 \| 0 \| 0 \| 0 \| 0 \| yes \|", bits)) == 4
    assert len(re.findall(r"eager \|.*\| yes \|", errors)) == 4 * len(gpu.KINDS)
    assert "Left out: the CPU has no" in waits
    for part in (wide, half):
        for name in (gpu.EAGER, gpu.COPY, gpu.bench.UPCAST, gpu.bench.FULL, gpu.bench.TORCHMETRICS):
            assert f"| {name} | " in part
    assert f"| {gpu.HEAD} | " in of_head
    assert f"| {gpu.MATMUL} | " in of_head
    assert all(": yes\n" in part for part in (wide, half, of_head))
    assert "- 0 numbers are wrong" in result


def test_every_row_of_a_table_has_its_cells(run: Callable[[], tuple[int, str]]) -> None:
    """A cell too many would be cut off by whatever shows the table."""
    _, page = run()
    for table in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def off(losses: Tensor) -> Tensor:
    """Return losses that are off by twice what is promised."""
    return losses + 2e-6


def next_to(losses: Tensor) -> Tensor:
    """Return losses whose last bit depends on how many there are."""
    return losses if len(losses) % 2 else torch.nextafter(losses, torch.tensor(torch.inf, dtype=losses.dtype))


@pytest.mark.parametrize(
    ("change", "section"), [(off, "errors of"), (off, "the value of"), (next_to, "bits of")], ids=["", "value", "bits"]
)
def test_a_wrong_number_ends_with_1(
    change: Callable[[Tensor], Tensor], section: str, run: Callable[[], tuple[int, str]], monkeypatch: Any
) -> None:
    """Losses that are off, or that have other bits in another batch, are wrong and named."""
    kernel = kernels.losses_of_hard
    monkeypatch.setattr(kernels, "losses_of_hard", lambda *args, **kwargs: change(kernel(*args, **kwargs)))
    code, page = run()
    assert code == 1
    assert f"\n- wrong: {section}" in page
    assert "**NO**" in page


def test_what_raises_is_wrong_and_the_rest_runs(run: Callable[[], tuple[int, str]], monkeypatch: Any) -> None:
    """A library that fails costs one section, and the exit code."""

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no | such thing")

    monkeypatch.setattr(kernels, "losses_of_hard", broken)
    code, page = run()
    assert code == 1
    assert page.count("## ") == 8
    assert "cannot run: RuntimeError: no / such thing" in page


def test_a_goal_that_is_missed_is_no_wrong_number() -> None:
    """Times are only printed; what has nothing to stand beside is not judged."""
    run = gpu.Run("cpu", SMALL)
    run.on_gpu = True
    costs = {"ours": gpu.Cost(2.0, 2.0, 2**20), "theirs": gpu.Cost(1.0, 0.5, None), "third": "cannot run"}
    lines = [*gpu.table(run, costs, 1.0, {"ours": (1.0, 1.5), "third": (1.0, 1.0)})]
    assert lines[2] == "| ours | 2 s | 2 s | 2.00 x | 1.0 MiB | <= 1.50 x: no |"
    assert lines[3] == "| theirs | 1 s | 500 ms | 1.00 x | not counted |  |"
    assert lines[4] == "| third | cannot run |  |  |  | not reached |"
    assert run.wrong == []


def test_tests_are_run_in_a_process_of_their_own(monkeypatch: Any) -> None:
    """A failure ends with its code and its output; one that hangs is ended, and said to hang."""
    run = gpu.Run("cpu", SMALL)
    run.on_gpu = True
    call = gpu.subprocess.call
    code = "print('1 failed'); raise SystemExit(1)"
    monkeypatch.setattr(gpu.subprocess, "call", lambda _, **kwargs: call([sys.executable, "-c", code], **kwargs))
    assert "`1 failed`; all passed: **NO**" in [*gpu.cuda_tests(run)]
    code, run.wrong = "print('started', flush=True); import time; time.sleep(60)", []
    monkeypatch.setattr(gpu, "SECONDS_OF_TESTS", 0.5)
    assert "`not done after 0.5 s`; all passed: **NO**" in [*gpu.cuda_tests(run)]
    assert run.wrong == ["the tests marked cuda: not done after 0.5 s"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device would run them all")
def test_the_marked_tests_are_found() -> None:
    """Without a device all are skipped, and none fails to be collected."""
    code, lines = gpu.run_pytest()
    assert code == 0
    assert re.search(r"\d{3} skipped", lines[-1])
