"""`LinearLogits` is one thing: nothing takes it for a collection, of which it would map or choose the rows."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.memory import recursive_detach
from lightning_utilities import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import default_convert
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MultioutputWrapper

from tests.metrics.bad_input import raised
from xent_metrics import BitsPerToken, CrossEntropy, LinearLogits, Perplexity, functional

N, D = 6, 4
Parts = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(params=[False, True], ids=["", "bias, scaled and capped"])
def preds(request: pytest.FixtureRequest) -> LinearLogits:
    """Return as many rows as there are classes, so that what chooses rows of both would go unnoticed."""
    bias, steps = (torch.randn(N), {"scale": 0.5, "softcap": 2.0}) if request.param else (None, {})
    return LinearLogits(torch.randn(N, D), torch.randn(N, D), bias, **steps)


TARGET = torch.arange(N)
WRAPPERS: dict[str, Callable[[], Any]] = {
    "poisson": lambda: BootStrapper(CrossEntropy(), num_bootstraps=3),
    "multinomial": lambda: BootStrapper(CrossEntropy(), num_bootstraps=3, sampling_strategy="multinomial"),
    "outputs": lambda: MultioutputWrapper(CrossEntropy(), 2),
}


@pytest.mark.parametrize("names", [("preds", "target"), ("target", "preds"), ()])
@pytest.mark.parametrize("call", ["update", "forward"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_choose_rows_of_the_head(
    wrapper: str, call: str, names: tuple[str, ...], preds: LinearLogits
) -> None:
    """They raise our error, wherever it stands among the arguments, and the metric has seen nothing."""
    batch = {"preds": preds, "target": TARGET}
    args = [] if names else [preds, TARGET]
    metric = WRAPPERS[wrapper]()
    message = raised(TypeError, lambda: getattr(metric, call)(*args, **{name: batch[name] for name in names}))
    assert "pass F.linear(hidden, weight, bias)" in message
    assert all(m.update_count == 0 for m in metric.metrics)


def test_wrappers_of_collections(preds: LinearLogits) -> None:
    """What passes arguments on passes it on as it is."""
    collection = MetricCollection({"a": MetricCollection([BitsPerToken(), Perplexity()]), "b": CrossEntropy()})
    collection.update(preds, TARGET)
    logits = torch.nn.functional.linear(preds.hidden, preds.weight, preds.bias)
    if preds.scale and preds.softcap:
        logits = preds.softcap * torch.tanh(preds.scale * logits / preds.softcap)
    assert collection.compute()["b"].item() == pytest.approx(functional.cross_entropy(logits, TARGET).item(), rel=1e-6)


@pytest.mark.parametrize("change", [lambda x: x[:3], lambda x: x * 1, len, lambda x: x.double(), lambda x: None])
def test_maps_over_its_parts_are_refused(change: Callable[[Tensor], Any], preds: LinearLogits) -> None:
    """A tool that maps over dataclasses must not make other logits of it."""
    before = preds.hidden.clone()
    raised(TypeError, lambda: apply_to_collection({"x": [preds]}, Tensor, change))
    assert torch.equal(preds.hidden, before)


def test_its_parts_may_be_detached_and_moved(preds: LinearLogits) -> None:
    """That leaves the numbers what they are; Lightning does so to what a step returns."""
    factors = LinearLogits(*(None if x is None else x.requires_grad_() for x in parts(preds)), **steps(preds))  # type: ignore[arg-type]
    detached = recursive_detach({"logits": factors})["logits"]
    assert type(detached) is LinearLogits
    assert not any(x.requires_grad for x in parts(detached) if x is not None)
    assert all(x.requires_grad for x in parts(factors) if x is not None)
    assert apply_to_collection(factors, Tensor, lambda x: x.to("meta")).device.type == "meta"
    assert factors.to("meta").weight.device.type == "meta"
    assert factors.to(torch.bfloat16).dtype == torch.bfloat16
    assert (factors.to("meta").bias is None) == (factors.bias is None)
    for other in (detached, factors.to("meta"), factors.narrow(0, 1, 2)):
        assert steps(other) == steps(preds)


def parts(preds: LinearLogits) -> Parts:
    """Return the three parts."""
    return preds.hidden, preds.weight, preds.bias


def steps(preds: LinearLogits) -> dict[str, float | None]:
    """Return what is done to the products."""
    return {"scale": preds.scale, "softcap": preds.softcap}


def test_it_is_no_collection(preds: LinearLogits) -> None:
    """It has no length and no items, and is a leaf of trees."""
    for take in (len, iter, list, lambda x: x[0]):
        with pytest.raises(TypeError):
            take(preds)
    assert tree_flatten({"x": [preds]})[0] == [preds]
    assert tree_map(lambda x: x, (preds,)) == (preds,)
    assert default_convert([preds]) == [preds]
    assert not isinstance(preds, tuple | Tensor)


def test_it_is_equal_to_itself_only(preds: LinearLogits) -> None:
    """Equality does not compare tensors; a copy and a pickle hold the same numbers."""
    for other in (copy.copy(preds), copy.deepcopy(preds), pickle.loads(pickle.dumps(preds))):
        assert other != preds
        assert hash(other) != hash(preds)
        assert steps(other) == steps(preds)
        for a, b in zip(parts(other), parts(preds), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert preds == preds
    assert copy.copy(preds).weight is preds.weight
    assert preds.to("cpu").weight is preds.weight


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "scale", "softcap", "other"])
def test_its_parts_are_fixed(name: str, preds: LinearLogits) -> None:
    """No part is replaced by assignment, by one of its shape neither."""
    for value in (torch.zeros(N, D), 4.0):
        raised(TypeError, lambda v=value: setattr(preds, name, v))
    assert not hasattr(preds, "other")


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_scale_or_cap_is_a_positive_number(name: str) -> None:
    """Anything else raises where it is made; NumPy's numbers become Python's."""
    bad = (0, -1.0, math.nan, math.inf, -math.inf, True, "30", 1j, torch.tensor(30.0), np.array([30.0]), np.float32(-1))
    for value in bad:
        message = raised(ValueError, lambda v=value: LinearLogits(torch.ones(N, D), torch.ones(N, D), **{name: v}))
        assert message.startswith(f"`{name}` must be None or a positive and finite number, got {value!r}; leave")
    for convert in (np.float32, np.float64, np.int64, int, Fraction):
        own = getattr(LinearLogits(torch.ones(N, D), torch.ones(N, D), **{name: convert(30)}), name)
        assert type(own) in (int, float)
        assert own == 30


@pytest.mark.parametrize("preds", [True], indirect=True)
@pytest.mark.slow
def test_compiled_code_makes_and_takes_it(preds: LinearLogits) -> None:
    """In one graph, with the same value."""

    def make(*factors: Any) -> Tensor:
        return functional.cross_entropy(LinearLogits(*factors, **steps(preds)), TARGET)

    def take(logits: LinearLogits) -> Tensor:
        return functional.cross_entropy(logits, TARGET)

    expected = take(preds)
    for value in (
        torch.compile(make, fullgraph=True, backend="aot_eager")(*parts(preds)),
        torch.compile(take, fullgraph=True, backend="aot_eager")(preds),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
