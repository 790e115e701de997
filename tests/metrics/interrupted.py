"""Interrupts a call at every line of it, to see what it leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchmetrics.metric

import xent_metrics

LIBRARY = Path(xent_metrics.__file__).parent
METRICS, TORCHMETRICS = LIBRARY / "metrics", Path(torchmetrics.metric.__file__)

Line = tuple[str, int]


class Interrupted(BaseException):
    """Raised where nothing raises by itself; no error, so that nobody handles it."""


class _Lines:
    """Notes the lines that a call runs for the first time, or raises at one of them.

    Not when a line is met again: that of a `with` is, when it is left, and then an error would leave the lock closed.
    """

    def __init__(self, folders: tuple[Path, ...], interrupt_at: Line | None = None) -> None:
        self.seen: dict[Line, None] = {}
        self._folders, self._interrupt_at = tuple(map(str, folders)), interrupt_at

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(self._folders):
            return None
        line = name, frame.f_lineno
        if event == "line" and line not in self.seen:
            self.seen[line] = None
            if line == self._interrupt_at:
                raise Interrupted
        return self


def run_traced(call: Callable[[], Any], lines: _Lines) -> bool:
    """Call; return whether it was interrupted."""
    before, grad = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(lines)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(grad)  # Which PyTorch's own `with` leaves off where it is interrupted as it is entered.
    return False


def check_interruptions(make: Callable[[], tuple[Any, Callable[[], Any]]], *folders: Path) -> Any:
    """Interrupt a call at each line that it runs: the metric has to be what it was. Then let it run to its end.

    Args:
        make: Makes a metric, the same one each time, and a call that changes or reads it.
        folders: Where the files are whose lines are meant.

    Returns:
        The metric.
    """
    _, call = make()
    lines = _Lines(folders)
    assert not run_traced(call, lines)
    assert len(lines.seen) > 2
    metric, call = make()
    before = attributes(metric)
    for line in lines.seen:
        assert run_traced(call, _Lines(folders, line)), line
        assert attributes(metric) == before, line
    call()
    return metric


def attributes(metric: Any) -> dict[str, Any]:
    """Return what a metric holds, such that it may be compared."""
    return {name: comparable(value) for name, value in vars(metric).items() if name != "_lock"}


def comparable(value: Any) -> Any:
    """Return a value, or the same for tensors in it."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.device),
            value.dtype,
            value.shape,
            None if value.is_meta else str(value.tolist()),
        )  # NaN is NaN.
    if isinstance(value, dict):
        return {name: comparable(x) for name, x in value.items()}
    return [*map(comparable, value)] if isinstance(value, list) else value
