"""What every test starts from. The process that deals tests out imports it too: nothing slow is imported at the top."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.instruments import Operators


def pytest_collection_finish() -> None:
    """Search what is there before the first test for garbage no more: it is much, and stays."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    """Run every test on one thread with the same random numbers, in whatever order."""
    import torch  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)  # Lightning's command line leaves it, and its samplers shuffle by it.
    torch.default_generator.manual_seed(20)  # `torch.manual_seed` keeps a stack trace for each absent accelerator.
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _constants_are_where_they_are_needed() -> None:
    """Copy the constants of a tally to the devices of the tests, which happens once and is no part of an update."""
    from tests.instruments import copy_constants  # noqa: PLC0415

    for device in ("cpu", "meta"):
        copy_constants(device)


@pytest.fixture(name="hide_values")
def _hide_values(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Hide, from the moment it is called, the values of every tensor, as those on an accelerator are hidden."""
    return lambda: monkeypatch.setattr("xent_metrics._runtime.can_read_values", lambda _: False)


@pytest.fixture(name="hidden_values")
def _hidden_values(hide_values: Callable[[], None]) -> None:
    """Hide the values of every tensor from the library, as on an accelerator: bad ones are counted, nothing waits."""
    hide_values()


@pytest.fixture(name="operators")
def _operators() -> Operators:
    """Record operators, where a test says `with operators:`."""
    from tests.instruments import Operators  # noqa: PLC0415

    return Operators()


@pytest.fixture(name="peak_bytes")
def _peak_bytes(tmp_path: Path) -> Callable[[Callable[[], object]], int]:
    """Measure the most memory that a call holds beyond what it found, temporaries inside operators included."""
    from tests.instruments import allocator_peak  # noqa: PLC0415

    def measure(call: Callable[[], object]) -> int:
        call()  # The first call of an operator may fill caches of its own.
        return allocator_peak(call, tmp_path)

    return measure
