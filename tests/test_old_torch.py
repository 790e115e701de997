"""What is done in another way with an older PyTorch, tried with whichever is here."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xent_metrics import _compat

LIBRARY = Path(__file__).parents[1] / "xent_metrics"


@pytest.fixture(autouse=True)
def _of_what_is_here() -> Iterator[None]:
    """Let the module be of the version that is here again, once nothing else is replaced."""
    yield
    importlib.reload(_compat)


@pytest.mark.parametrize("version", ["2.5.1+cu124", "2.4.0", "1.13.1"])
def test_one_that_was_not_verified_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever installs without looking at what is asked for gets an error, and no number."""
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs PyTorch 2.6 .*, got {re.escape(version)}: .* install torch>="):
        importlib.reload(_compat)


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0a0+git1234567", "3.0.0"])
def test_newer_ones_are_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are compared, not letters; what was built from sources has a version too."""
    monkeypatch.setattr(torch, "__version__", version)
    importlib.reload(_compat)
    assert tuple(map(int, version.split(".")[:2])) == _compat.TORCH


@pytest.mark.parametrize("torch_version", [(2, 11), (2, 12)])
def test_the_limit_of_compilations_is_that_of_the_kernel(
    torch_version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one takes it from the process, where it is ours only while a kernel runs."""

    def limit_here() -> int:
        return int(getattr(torch._dynamo.config, _compat.RECOMPILE_LIMIT))

    before = limit_here()

    def compiler(function: Any, recompile_limit: int | None = None, **options: Any) -> Any:
        assert options == {"dynamic": True, "fullgraph": True}
        return lambda *args: (recompile_limit or limit_here(), *function(*args))

    monkeypatch.setattr(_compat, "TORCH", torch_version)
    monkeypatch.setattr(torch, "compile", compiler)
    assert _compat.compile_often(lambda *args: args, 77)(1, 2) == (77, 1, 2)
    assert limit_here() == before


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (50, 2)])
def test_digits_by_shifts_are_those_of_a_view(shape: tuple[int, int]) -> None:
    """Of any integers, also the extremes."""
    numbers = torch.randint(-(2**62), 2**62, shape)
    extremes = torch.tensor([-(2**63), 2**63 - 1, -1, 0, -(2**15), 2**15])
    for x in (numbers, extremes.view(3, 2)):
        assert torch.equal(_compat.digits_by_shifts(x), x.view(torch.int16).to(torch.int64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32], ids=str)
def test_unsigned_integers_are_picked_by_a_mask(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are negative as signed ones."""
    monkeypatch.setattr(_compat, "TORCH", (2, 10))
    least = -1 if dtype == torch.int32 else 0
    numbers = torch.tensor([least, 1, torch.iinfo(dtype).max, 3], dtype=dtype)
    picked = _compat.where_true(numbers, torch.tensor([True, False, True, False]))
    assert picked.dtype == dtype
    assert picked.tolist() == [least, torch.iinfo(dtype).max]


def test_exporting_is_seen_by_an_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.6 has `is_compiling` only, which is also true of what is exported."""
    assert not _compat.is_exporting()
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    importlib.reload(_compat)
    assert _compat.is_exporting()


def test_no_other_module_asks_for_a_version() -> None:
    """What depends on one is found in one place."""
    asking = {
        path.name for path in LIBRARY.rglob("*.py") if re.search(r"\bTORCH\b|torch\.__version__", path.read_text())
    }
    assert asking == {"_compat.py"}
