"""Blank pictures for tests that look at numbers: drawing takes four fifths of the time of a small fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xent_metrics.pictures import validation

_DRAWERS = ("draw_distribution", "draw_positions", "draw_interval", "draw_page")
_BLANK = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + 2 * b"\0\0\0\1"  # As much of a file as its size is read from.


def leave_blank(patch: pytest.MonkeyPatch) -> None:
    """Write every picture without drawing it; `tests/tensorboard` draws them."""
    for name in _DRAWERS:
        patch.setattr(validation, name, lambda *_: _BLANK)


def without_drawing(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, where nothing is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        leave_blank(patch)
        return function(*args)
