"""What every test starts from, and two instruments to look at what the library asks of PyTorch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xent_metrics import _intervals, _runtime, _student, readings
from xent_metrics.losses.target_losses import NUM_STATUSES
from xent_metrics.tally import accumulate, limbs, tally


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    """Run every test on one thread with the same random numbers, in whatever order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)  # Lightning's command line leaves it, and its samplers shuffle by it.
    torch.default_generator.manual_seed(20)  # `torch.manual_seed` keeps a stack trace for each absent accelerator.
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _constants_are_where_they_are_needed() -> None:
    """Copy the constants of a tally to the devices of the tests, which happens once and is no part of an update."""
    for device in ("cpu", "meta"):
        copy_constants(device)


def copy_constants(device: str) -> None:
    """Copy the constants of a tally to a device."""
    floats = [limbs._SCALES, tally.UNITS, tally.GROUP_UNITS, readings._IF_NOT_COUNTED, *readings._IF_COUNTED.values()]
    floats += [_intervals._POWERS, _intervals._START, *map(_student.quantile_series, (0.95, 0.8))]  # Of all cases.
    integers = [limbs._POWERS, accumulate._COUNTS, accumulate._TO_UNITS, accumulate._SHIFTS]
    integers += [accumulate._TOO_WIDE, accumulate._TOO_WIDE_IF_LONG]
    beside = torch.empty(0, device=device)
    for values, dtype in (*((x, torch.float64) for x in floats), *((x, torch.int64) for x in integers)):
        _runtime.constant(values, beside, dtype)
    _runtime.constant(accumulate._STATUS_OF_KIND, beside, torch.int8)
    for of_dtype in (accumulate._GREATEST_OF_KIND, _intervals._CONDITIONS):
        for dtype, values in of_dtype.items():
            _runtime.constant(values, beside, dtype)
    for dtype in (torch.float32, torch.float64):
        _runtime.constant(0, beside, dtype)
    for code in range(NUM_STATUSES):
        _runtime.constant(code, beside, torch.int8)


@pytest.fixture(name="hide_values")
def _hide_values(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Hide, from the moment it is called, the values of every tensor, as those on an accelerator are hidden."""
    return lambda: monkeypatch.setattr(_runtime, "can_read_values", lambda _: False)


@pytest.fixture(name="hidden_values")
def _hidden_values(hide_values: Callable[[], None]) -> None:
    """Hide the values of every tensor from the library, as on an accelerator: bad ones are counted, nothing waits."""
    hide_values()


class Operators(TorchDispatchMode):
    """Records each operator that PyTorch runs, and the types of device that its tensors are on."""

    def __init__(self) -> None:
        """Start with nothing recorded."""
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record, and run."""
        result = func(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        self.devices |= {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        return result

    def count(self, part: str) -> int:
        """Return how many operators ran whose name contains this."""
        return sum(number for name, number in self.counts.items() if part in name)


@pytest.fixture(name="operators")
def _operators() -> Operators:
    """Record operators, where a test says `with operators:`."""
    return Operators()


def allocator_peak(call: Callable[[], object], folder: Path) -> int:
    """Return the most memory that torch holds during a call beyond what was there; a trace is written to a folder."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    held, peak = 0, 0
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event["name"] == "[memory]":
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak


@pytest.fixture(name="peak_bytes")
def _peak_bytes(tmp_path: Path) -> Callable[[Callable[[], object]], int]:
    """Measure the most memory that a call holds beyond what it found, temporaries inside operators included."""

    def measure(call: Callable[[], object]) -> int:
        call()  # The first call of an operator may fill caches of its own.
        return allocator_peak(call, tmp_path)

    return measure
