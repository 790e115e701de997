"""What tests of bad input share: every quantity, and a good batch."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xent_metrics
from tests.cases import QUANTITIES

K = 4
SPOT = (0, 1)  # Of the six targets, the one that is made bad; its class is 1.
Batch = dict[str, Any]


class Kind(NamedTuple):
    """A metric class, its function, the options that both need, and what is special about its batches."""

    metric: Any
    function: Callable[..., Any] | None
    options: Mapping[str, Any]
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    binary: bool
    soft: bool

    def make(self, **options: Any) -> Any:
        """Make a metric."""
        return self.metric(**{**self.options, **options})

    def call(self, batch: Batch, **options: Any) -> Any:
        """Call the function."""
        assert self.function is not None
        return self.function(**self.chosen(batch), **{**self.options, **options})

    def chosen(self, batch: Batch) -> Batch:
        """Choose the arguments of an update."""
        return {name: batch[name] for name in self.arguments}


TABLE = torch.tensor([2, 1, 3, 1])


def kinds() -> Iterator[tuple[str, Kind]]:
    """Yield every quantity; twice where bytes may come from a table too, and where either model may be the bad one."""
    for quantity in QUANTITIES.values():
        name, required = quantity.metric.__name__, {"num_groups": 3, "num_classes": K}
        options = {option: required[option] for option in quantity.required}
        kind = Kind(quantity.metric, quantity.function, options, *quantity[2:4], quantity.binary, quantity.soft)
        yield from [(f"{name}(a)", kind), (f"{name}(b)", kind)] if "preds_a" in kind.arguments else [(name, kind)]
        if "token_bytes" in quantity.options(quantity.metric):
            arguments = tuple(argument for argument in kind.arguments if argument != "num_bytes")
            yield f"{name}(token_bytes)", kind._replace(options={"token_bytes": TABLE}, arguments=arguments, soft=False)


KINDS = dict(kinds())
OF_CLASSES = [name for name, kind in KINDS.items() if not kind.binary]
SOFT = [name for name, kind in KINDS.items() if kind.soft]
FUNCTIONS = [name for name, kind in KINDS.items() if kind.function is not None]
each_kind = pytest.mark.parametrize("name", KINDS)
each_call = pytest.mark.parametrize("call", ["update", "forward"])


def make_batch(name: str, form: str = "logits", soft: bool = False) -> Batch:
    """Make a good batch of 2 by 3 targets, with everything that any metric takes."""
    shape = (2, 3) if KINDS[name].binary or form == "losses" else (2, 3, K)
    fill = {"probs": 1 / K, "log_probs": -math.log(K)}
    generator = torch.Generator().manual_seed(7)
    preds = torch.full(shape, fill[form]) if form in fill else 4 * torch.rand(shape, generator=generator)
    target = torch.tensor([[0, 1, 0], [1, 0, 1]])
    target = F.one_hot(target, K).float() if soft else target
    group = torch.tensor([[0, 1, 2], [0, 1, 1]])
    return with_preds(name, preds, {"target": target, "group": group, "num_bytes": 9, "weight": None})


def with_preds(name: str, preds: Any, batch: Batch) -> Batch:
    """Give a batch predictions; of two models, the other one's are the same, as a tensor of their own."""
    other = preds.clone() if isinstance(preds, Tensor) else preds
    bad, good = ("preds_a", "preds_b") if name.endswith("(a)") else ("preds_b", "preds_a")
    return {**batch, "preds": preds, bad: preds, good: other}


def ones() -> Tensor:
    """Weights that change nothing."""
    return torch.ones(2, 3)


def numbers(value: Any) -> list[float]:
    """List every floating-point number of a value."""
    values = value.values() if isinstance(value, dict) else [value]
    return [x for tensor in values if tensor.is_floating_point() for x in tensor.reshape(-1).tolist()]


def main(value: Any) -> list[float]:
    """List the first number of a dict, or every number of a tensor."""
    return numbers(value)[:1] if isinstance(value, dict) else numbers(value)


def bits(value: Any) -> list[str]:
    """List every bit of every floating-point number of a value."""
    return [x.hex() for x in numbers(value)]


def raised(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any]) -> str:
    """Return the message of an error, which must be one sentence about an argument, raised by the library itself."""
    with pytest.raises(error) as caught:
        call()
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert Path(xent_metrics.__file__).parent in Path(last.filename).parents
    assert (last.line or "").startswith("raise")
    message = str(caught.value)
    assert re.match(r"`\w+(='\w+')?`", message), message
    assert re.search(r"\b(must|allows|goes with|clips|over the other classes)\b", message), message
    assert re.search(r"\b(got|but|not)\b|with `input='losses'`", message), message
    assert re.fullmatch(r"(?:[^.]|\.(?!\s)|\.(?=\.\.))*\.", message, re.DOTALL), f"not one sentence: {message}"
    return message


def assert_no_trace(name: str, batch: Batch, options: Mapping[str, Any], good: Batch, error: Any) -> str:
    """Refuse a batch before a good one, and after one: state, count and value stay, and so does whatever comes later.

    A new metric is to refuse it in `update`, and one with a state in `forward`.
    """
    message = ""
    for call in ("update", "forward"):
        metric, expected = KINDS[name].make(**options), KINDS[name].make(**options)
        fresh = call == "update"
        for each in (metric, expected):
            if not fresh:
                each.update(**KINDS[name].chosen(good))
        before = None if fresh else bits(metric.compute())
        state, count = metric.tally.state.clone(), metric.update_count
        message = raised(error, lambda m=metric, c=call: getattr(m, c)(**KINDS[name].chosen(batch)))
        assert torch.equal(metric.tally.state, state)
        assert metric.update_count == count
        assert fresh or bits(metric.compute()) == before
        assert bits(metric(**KINDS[name].chosen(good))) == bits(expected(**KINDS[name].chosen(good)))
        assert torch.equal(metric.tally.state, expected.tally.state)
        assert metric.update_count == expected.update_count == count + 1
        assert bits(metric.compute()) == bits(expected.compute())
    return message


# Values: at once on the CPU, counted elsewhere.

A_TARGET = "a target that is neither a class nor `ignore_index` (K, -1, 2**40; -100 with `ignore_index=None`)"
A_GROUP = "a group outside `[0, num_groups)` for a target that is scored"
CLASSES = [x for x in map(vars(xent_metrics).get, xent_metrics.__all__) if hasattr(x, "merge_state")]
