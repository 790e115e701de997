"""What functions return is new, has no graph, and is on the device of the tensors, whatever the default device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import CASES, FORMS, Batch, Case, Form, bits
from tests.metrics.conformance import each_case
from xent_metrics import functional, token_byte_lengths

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def wanting_gradients(batch: Batch) -> Batch:
    """Let every tensor of floats want a gradient."""
    return {
        name: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
    }


def tensors(value: Any) -> list[Tensor]:
    """List the tensors of a value."""
    if isinstance(value, dict):
        return [*value.values()]
    return [value if isinstance(value, Tensor) else value.state]


@each_form
def test_functions_return_no_graph(form: Form) -> None:
    """Whatever wants a gradient, a value wants none, and shares no memory with an argument."""
    batch, options = wanting_gradients(form.batches()[0]), wanting_gradients(form.options)
    arguments = [x.untyped_storage().data_ptr() for x in (batch | options).values() if isinstance(x, Tensor)]
    for x in tensors(form.function(**batch, **options)):
        assert not x.requires_grad
        assert x.grad_fn is None
        assert x.untyped_storage().data_ptr() not in arguments


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ignored", [False, True])
def test_losses_that_are_given_are_copied(dtype: torch.dtype, shape: tuple[int, ...], ignored: bool) -> None:
    """To change what comes back does not change what went in."""
    losses = torch.rand(shape, dtype=dtype, requires_grad=True)
    before = losses.detach().clone()
    value = functional.per_target_losses(losses, torch.full(shape, -100 * ignored), input="losses")
    assert not value.requires_grad
    value.add_(1)
    assert torch.equal(losses, before)


@contextmanager
def default_device(way: str) -> Iterator[None]:
    """Make tensors that name no device on one without data."""
    if way == "with":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        del torch._GLOBAL_DEVICE_CONTEXT.device_context  # `get_default_device` of PyTorch 2.8 and older fails by None.


each_way = pytest.mark.parametrize("way", ["with", "set"])


@each_way
@each_case
def test_metrics_elsewhere_than_the_default_device(case: Case, way: str) -> None:
    """Every tensor of an update and of a reading is where the batch and the metric are."""
    batches = case.batches(weighed=True)
    metric, expected = case.metric(), case.filled(*batches)
    with default_device(way):
        values = [metric(**batches[0])]
        for batch in batches[1:]:
            metric.update(**batch)
        values.append(metric.compute())
    assert bits(values[1]) == bits(expected.compute())
    assert {x.device.type for value in values for x in tensors(value)} == {"cpu"}


@each_way
@each_form
def test_functions_elsewhere_than_the_default_device(form: Form, way: str) -> None:
    """The same of functions."""
    batch = form.batches()[0]
    expected = tensors(form.function(**batch, **form.options))
    with default_device(way):
        values = tensors(form.function(**batch, **form.options))
    for value, other in zip(values, expected, strict=True):
        assert bits(value) == bits(other)


class Tokenizer:
    """The methods of tiktoken that a table is read by."""

    n_vocab = 3

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token."""
        return [b"a", b"bc", b"def"][token]

    @property
    def _special_tokens(self) -> dict[str, int]:
        return {"<end>": 1}


@each_way
def test_tables_are_on_the_cpu(way: str) -> None:
    """A table of bytes is on the CPU, as documented."""
    with default_device(way):
        table = token_byte_lengths(Tokenizer())
    assert table.tolist() == [1, 0, 3]


def test_every_case_is_here() -> None:
    """The loops above run over the tables of all metrics and functions."""
    assert CASES
    assert {name for name in functional.__all__ if name != "convert_label_smoothing"} == {
        form.function.__name__ for form in FORMS.values()
    }
