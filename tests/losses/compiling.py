"""What tests of compiled losses share: counts of compilations, and scores."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor

from tests.cases import numbers
from xent_metrics.losses import compiled

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


def compilations() -> int:
    """Count the graphs that were compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def forget() -> None:
    """Compile everything again."""
    torch._dynamo.reset()
    compiled._compiled.cache_clear()


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Compile in full: code that is kept on disk may have been made for another first batch."""
    with ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        forget()
        yield
        forget()


def assert_near(value: Any, expected: Any) -> None:
    """Compare every number to 1e-6; what is a difference, or the root of one, has fewer digits."""
    value, expected = numbers(value), numbers(expected)
    assert list(value) == list(expected)
    for name, number in value.items():
        loose = name.endswith(("stderr", "lower", "upper", "entropy", "divergence"))
        tolerance = {"rel": 1e-5, "abs": 1e-5} if loose else {"rel": 1e-6, "abs": 1e-6}
        assert number == pytest.approx(expected[name], nan_ok=True, **tolerance), name


def bits_of(losses: Tensor) -> bytes:
    """Return every bit."""
    return losses.contiguous().numpy().tobytes()
