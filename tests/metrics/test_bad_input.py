"""Every row of the README's table of bad input has a test, and every class and function is tested."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.metrics.bad_input import CLAIMED, CLASSES, KINDS, ROWS
from xent_metrics import functional


def test_every_row_of_the_table_has_a_test() -> None:
    """A row without a test is a promise without proof, and a test of no row a promise that was not made."""
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.metrics.{path.stem}")  # Where rows are claimed.
    assert len(ROWS) == len(set(ROWS)) > 20
    assert sorted(CLAIMED) == sorted(ROWS)


def test_every_class_and_function_is_tested() -> None:
    """What is public has a kind here; the three functions without a class of their own have tests elsewhere."""
    assert {kind.metric for kind in KINDS.values()} == set(CLASSES)
    functions = {kind.function.__name__ for kind in KINDS.values() if kind.function is not None}
    assert set(functional.__all__) - functions == {"tally", "per_target_losses", "convert_label_smoothing"}
