"""NumPy's scalars, and whatever else stands for a number, are taken where an int or a float is asked for."""

from __future__ import annotations

from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.cases import QUANTITIES, Quantity
from tests.metrics.bad_input import KINDS, K, each_kind, make_batch, raised
from xent_metrics import BitsPerByte, CrossEntropyReport, functional

INTEGERS = {"class_dim": -1, "ignore_index": 1, "num_groups": 3, "num_classes": K}
NUMBERS = {"label_smoothing": 0.125, "eps": 0.125, "confidence": 0.5}


class Mark(IntEnum):
    """An integer by another name."""

    CLASSES, PADDING, GROUPS, ALL = -1, 1, 3, K


AS_INTEGERS = [np.int64, np.int8, np.array, Mark, lambda x: np.array([x])[0]]
AS_NUMBERS = [np.float64, np.float32, np.float16, Fraction]


def options_of(quantity: Quantity, form: Any) -> list[str]:
    """Return the options of a class or function that are numbers."""
    return sorted(quantity.options(form) & {*INTEGERS, *NUMBERS})


CASES = [
    pytest.param(quantity, name, id=f"{quantity_name}-{name}")
    for quantity_name, quantity in QUANTITIES.items()
    for name in options_of(quantity, quantity.metric)
]


@pytest.mark.parametrize(("quantity", "name"), CASES)
def test_options(quantity: Quantity, name: str) -> None:
    """Options become Python numbers, so a metric is configured as one that was given those, and so is a function."""
    value = (INTEGERS | NUMBERS)[name]
    kind = KINDS.get(quantity.metric.__name__, KINDS.get(f"{quantity.metric.__name__}(a)"))
    assert kind is not None
    others = {"input": "probs"} if name == "eps" else {}
    batch = make_batch(quantity.metric.__name__ if "preds" in kind.arguments else f"{quantity.metric.__name__}(a)")
    if others:
        batch = {key: x.sigmoid() if key.startswith("preds") else x for key, x in batch.items()}
    expected = kind.make(**others, **{name: value})
    for convert in AS_INTEGERS if name in INTEGERS else AS_NUMBERS:
        metric = kind.make(**others, **{name: convert(value)})
        own = getattr(metric.options, name) if hasattr(metric.options, name) else getattr(metric, name)
        assert type(own) is type(value)
        assert own == value
        assert metric._state_name == expected._state_name
        if quantity.function is not None and name in quantity.options(quantity.function):
            kind.call(batch, **others, **{name: convert(value)})


@pytest.mark.parametrize("convert", [np.int64, np.array, np.uint64])
def test_number_of_bytes(convert: Any) -> None:
    """A number of bytes, as NumPy counts it."""
    batch = torch.zeros(2, K), torch.tensor([0, 1])
    metric = BitsPerByte()
    assert metric(*batch, num_bytes=convert(4)).item() == functional.bits_per_byte(*batch, num_bytes=4).item() == 1.0
    metric.update(*batch, num_bytes=convert(4))
    assert metric.compute().item() == functional.bits_per_byte(*batch, num_bytes=convert(4)).item() == 1.0


@pytest.mark.parametrize("bad", [True, np.bool_(True), torch.tensor(True), 2.0, np.float64(2.0), "2", np.array([1, 2])])
def test_what_is_no_integer_is_refused(bad: Any) -> None:
    """Booleans and floats are no integers, whoever makes them."""
    batch = torch.zeros(2, K), torch.tensor([0, 1])
    for name in ("class_dim", "ignore_index"):
        assert f"`{name}` must be an integer" in raised(TypeError, lambda n=name: CrossEntropyReport(**{n: bad}))
    raised(TypeError, lambda: functional.bits_per_byte(*batch, num_bytes=bad))


@each_kind
@pytest.mark.parametrize("bad", [True, np.bool_(True), "0.5", 0.5j, torch.tensor(0.5), np.array([0.5])])
def test_what_is_no_number_is_refused(name: str, bad: Any) -> None:
    """Nor are tensors and arrays numbers."""
    for option in {*options_of(QUANTITIES_OF[KINDS[name].metric], KINDS[name].metric)} & {"label_smoothing", "eps"}:
        raised(ValueError, lambda o=option: KINDS[name].make(**{o: bad}))


QUANTITIES_OF = {quantity.metric: quantity for quantity in QUANTITIES.values()}


def test_label_smoothing_is_converted() -> None:
    """The conversion takes them too."""
    assert functional.convert_label_smoothing(np.float64(0.1), np.int32(3)) == pytest.approx(0.15)  # type: ignore[arg-type]
