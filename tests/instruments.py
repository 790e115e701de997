"""Instruments to look at what the library asks of PyTorch, and the constants that it keeps on each device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xent_metrics import _intervals, _runtime, _student, readings
from xent_metrics.losses.target_losses import NUM_STATUSES
from xent_metrics.tally import accumulate, limbs, tally


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
