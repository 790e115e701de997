"""What the tests of conformance share."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pytest

from tests.cases import (
    CASES,
    numbers,
)

mpl.use("Agg")


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

# What becomes of a state depends on the class, on what else it tallies, and on tensors among the options.
_STATES = {
    *{case.metric_class: name for name, case in reversed(CASES.items())}.values(),
    "CrossEntropyReport-more",
    "CrossEntropy-weights",
    "BinaryCrossEntropy-weights",
}
each_state = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if name in _STATES]
)


def assert_close(value: Any, expected: Any, rel: float = 1e-12) -> None:
    """Compare every number; what is expanded in floating point, or exponentiated from it, has fewer digits."""
    value, expected = numbers(value), numbers(expected)
    assert list(value) == list(expected)
    for name, number in value.items():
        interval = name.endswith(("stderr", "lower", "upper"))
        tolerance = {"rel": max(rel, 1e-6), "abs": 1e-7} if interval else {"rel": rel, "abs": rel}
        assert number == pytest.approx(expected[name], nan_ok=True, **tolerance), name
