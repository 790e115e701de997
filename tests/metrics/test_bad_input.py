"""Bad input is tested for every class and function."""

from __future__ import annotations

from tests.metrics.bad_input import CLASSES, KINDS
from xent_metrics import functional


def test_every_class_and_function_is_tested() -> None:
    """What is public has a kind here; the three functions without a class of their own have tests elsewhere."""
    assert {kind.metric for kind in KINDS.values()} == set(CLASSES)
    functions = {kind.function.__name__ for kind in KINDS.values() if kind.function is not None}
    assert set(functional.__all__) - functions == {"tally", "per_target_losses", "convert_label_smoothing"}
