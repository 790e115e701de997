"""What is public says what it is: definition, every argument, value, errors, source and an example."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import xent_metrics
from tests.cases import metric_classes
from xent_metrics import functional
from xent_metrics.metrics.base import TallyMetric
from xent_metrics.reading_info import OF_OTHER_TALLIES, READINGS
from xent_metrics.readings import DeviceReading, ExactReading

CLASSES = sorted(metric_classes(xent_metrics), key=lambda x: x.__name__)
FUNCTIONS = [getattr(functional, name) for name in functional.__all__ if name != "convert_label_smoothing"]


def documented(docstring: str) -> list[str]:
    """Return the arguments that a docstring explains, in its order."""
    section = re.search(r"\n( *)Args:\n(.*?)(\n\n|\Z)", docstring, re.DOTALL)
    assert section
    return re.findall(rf"^ {{{len(section[1]) + 4}}}(\**\w+): ", section[2], flags=re.MULTILINE)


def parameters(call: Any) -> list[str]:
    """Return the names of the arguments of a call."""
    stars = {inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(p.kind, "") + name for name, p in inspect.signature(call).parameters.items() if name != "self"]


@pytest.mark.parametrize("public", [*CLASSES, *FUNCTIONS], ids=lambda x: x.__name__)
def test_docstring_is_complete(public: Any) -> None:
    """Every argument is explained where it is used, in the order of the signature, with all the other sections."""
    assert sorted(documented(public.__doc__)) == sorted(parameters(public))
    for section in ("Shapes:", "Returns:", "Raises:", "Source:", ">>> "):
        assert section in public.__doc__, section
    assert "as in `CrossEntropy`" not in public.__doc__


@pytest.mark.parametrize("metric", CLASSES, ids=lambda x: x.__name__)
def test_update_is_documented(metric: type[TallyMetric]) -> None:
    """So is `update`, whose arguments come in any order of mention."""
    assert documented(metric.update.__doc__) == parameters(metric.update)
    assert "Raises:" in metric.update.__doc__


@pytest.mark.parametrize("name", [name for name in READINGS if name not in OF_OTHER_TALLIES])
def test_readings_are_described_once(name: str) -> None:
    """The table has what readings have, and a sentence for each."""
    info = READINGS[name]
    assert info.name == name
    assert info.definition.endswith(".")
    assert info.is_count == name.startswith("num_")
    for reading in (ExactReading, DeviceReading):
        assert isinstance(
            inspect.getattr_static(reading, name), property | type(inspect.getattr_static(ExactReading, "mean"))
        )


def test_no_reading_is_missing_from_the_table() -> None:
    """What a reading has that is public and a number is in the table."""
    helpers = {"in_unit", "mean", "require_finite", "nan_policy", "confidence", "totals"}
    public = {name for name in dir(ExactReading) if not name.startswith("_")} - helpers
    assert public == set(READINGS) - set(OF_OTHER_TALLIES)


@pytest.mark.parametrize("name", READINGS)
def test_a_report_documents_each_of_its_readings(name: str) -> None:
    """A reading that is added to the table is one of the values of a report."""
    assert f"`{name}`" in xent_metrics.CrossEntropyReport.__doc__
