"""What property tests draw from: losses, weights, batches, and the ways to cut and shuffle them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import Quantity
from xent_metrics import Tally, functional
from xent_metrics.losses.target_losses import LIMIT

THOROUGH = "THOROUGH" in os.environ
"""Whether to take one's time, as continuous integration does."""


def examples(number: int) -> int:
    """Return how many examples to try: a fifth where nobody takes their time."""
    return number if THOROUGH else number // 5


relaxed = settings(deadline=None, max_examples=examples(60))
"""Settings of every property test: the first call of a torch operator is slow, which says nothing of the library."""

UNIT = 2**64
"""Sums are kept in units of `2**-64`: `round(Fraction(x) * UNIT)` is what a tally adds for a loss x."""

UNSUMMED = (math.inf, -math.inf, math.nan, LIMIT, -LIMIT, 3e38, -3e38)
"""Losses that are counted and not summed; `LIMIT` itself is the first of its sign."""


class Batch(NamedTuple):
    """Losses of shape (sequences, targets in each), and what each of them weighs."""

    losses: Tensor
    weight: Tensor | None

    def rows(self, index: object) -> Batch:
        """Return some of the sequences, whole."""
        return Batch(self.losses[index], None if self.weight is None else self.weight[index])

    def tally(self) -> Tally:
        """Tally the batch through the library's front door."""
        return tally_of(self.losses, self.weight)


def tally_of(losses: Tensor, weight: Tensor | None = None) -> Tally:
    """Tally losses that are all scored."""
    return functional.tally(losses, torch.zeros_like(losses, dtype=torch.int64), weight=weight, input="losses")


@cache
def finite_losses(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Every float below `LIMIT`, as `mantissa * 2**exponent`: both signs, subnormals, ties at `2**-65`, and -0.0.

    For example 0.0, 5e-324, -1.355e-20 (an odd multiple of `2**-65`), 7.0, -1.98e28.
    """
    digits, lowest = (24, -149) if dtype == torch.float32 else (53, -1074)
    highest = 94 - digits
    mantissas = st.integers(1 - 2**digits, 2**digits - 1) | st.integers(-9, 9)
    exponents = st.integers(-66, highest) | st.integers(lowest, highest) | st.just(-65)
    return st.builds(math.ldexp, mantissas, exponents) | st.just(-0.0)


@cache
def weights() -> st.SearchStrategy[float]:
    """Valid weights: 0, 1, and anything up to `2**47`, the smallest of which round to nothing."""
    return st.sampled_from([0.0, 1.0]) | st.floats(0.0, 2.0**47, exclude_max=True) | st.floats(0.5, 2.0)


@cache
def ordinary_losses() -> st.SearchStrategy[float]:
    """Losses as models have them, a few of them negative as densities have them, all of them float32."""
    return st.floats(0.0, 16.0, width=32) | st.floats(-1024.0, 1024.0, width=32)


@cache
def ordinary_weights() -> st.SearchStrategy[float]:
    """Weights as people have them: 0, or neither negligible nor huge."""
    return st.just(0.0) | st.floats(2.0**-10, 2.0**10)


@st.composite
def batches(
    draw: st.DrawFn,
    losses: st.SearchStrategy[float] | None = None,
    weight: st.SearchStrategy[float] | None = None,
    min_rows: int = 0,
) -> Batch:
    """Batches of up to 5 by 5 targets, float32 or float64, with weights or without.

    For example losses `[[0.5, inf], [-3.0, 0.0]]` of weight `[[1.0, 1.0], [0.0, 2.5]]`. Without `losses`, they
    are anything that a float can be.
    """
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shape = (draw(st.integers(min_rows, 5)), draw(st.integers(1, 5)))
    if losses is None:
        losses = finite_losses(dtype) | st.sampled_from(UNSUMMED)
    values = _tensors(shape, losses, dtype)
    optional = st.none() | _tensors(shape, weights() if weight is None else weight, torch.float64)
    return Batch(draw(values), draw(optional))


@lru_cache(1000)
def _tensors(shape: tuple[int, ...], values: st.SearchStrategy[Any], dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """Tensors of a shape."""
    size = math.prod(shape)
    return st.lists(values, min_size=size, max_size=size).map(lambda x: torch.tensor(x, dtype=dtype).view(shape))


@st.composite
def partitions(draw: st.DrawFn, size: int) -> list[list[int]]:
    """Ways to deal `size` rows into batches of any order, some of them empty; for example `[[2, 0], [], [1]]`."""
    order = draw(st.permutations(range(size)))
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    return [order[start:stop] for start, stop in pairwise([0, *cuts, size])]


# Calls of the public entry points: mostly valid ones, and damage.


class Call(NamedTuple):
    """Options, and batches that are passed one after the other, each a dict of arguments."""

    options: dict[str, Any]
    batches: list[dict[str, Any]]


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8]
OTHERS = [torch.bool, torch.complex64, torch.int8, torch.uint16]

_LARGEST = torch.finfo(torch.float32).max

EXTREMES = {
    "logits": (0.0, -0.0, 1e4, -1e4, -1e9, math.inf, -math.inf, math.nan, _LARGEST, -_LARGEST),
    "log_probs": (0.0, -0.0, -1e4, -1e9, 0.5, -math.inf, math.nan, -_LARGEST),
    "probs": (0.0, -0.0, 1.0, 1e-30, math.nan),
    "losses": (0.0, -0.0, -3.0, 1e9, math.inf, -math.inf, math.nan, _LARGEST),
}
"""What may be in `preds` beside ordinary numbers, by what they are said to be."""

PLANTED = (math.nan, math.inf, -math.inf, -1, -0.25, 1.5, 2, 3, 7, -100, 2**40, 1e30, -1e9)
"""What damage puts into a tensor."""

JUNK: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 5, -100, 0.5, 0.25, -0.5, 1.5, math.nan, "logits", "losses", "probs", "omit"),
    *("raise", "others", "bits", "", (), [0.5], 1j, torch.tensor(1.0), torch.ones(2), torch.tensor([1, 2])),
    *(torch.tensor([1.0, -1.0]), torch.ones(2, 2), torch.ones(2, dtype=torch.bool), torch.ones(0, dtype=torch.int64)),
)
"""What damage passes as an option: a few of these fit some of them."""


@cache
def scores(shape: tuple[int, ...], form: str, spice: bool) -> st.SearchStrategy[Tensor]:
    """Tensors of scores in float64, as `form` says, with `EXTREMES` if there is spice.

    For example, as logits of shape (1, 3), `[[0.5, -inf, 12.25]]`; as probabilities `[[0.25, 1.0, 0.0]]`, which need
    not sum to 1.
    """
    low, high = {"logits": (-20, 20), "log_probs": (-20, 0), "probs": (0, 1), "losses": (-2, 20)}[form]
    values = st.floats(low, high, width=16)
    return _tensors(shape, values | st.sampled_from(EXTREMES[form]) if spice else values, torch.float64)


@st.composite
def distributions(draw: st.DrawFn, shape: tuple[int, ...], num_classes: int) -> Tensor:
    """Soft targets with classes on the last dimension, in float64; for example `[[0.25, 0.75], [1.0, 0.0]]`."""
    counts = _tensors((*shape, num_classes), st.integers(0, 3), torch.float64)
    parts = draw(counts)
    parts[..., 0] += parts.sum(-1) == 0
    return parts / parts.sum(-1, keepdim=True)


@st.composite
def weightings(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor | None:
    """Weights that are broadcastable to a shape, or None: floats, counts, or masks; `[[1.0], [0.0]]` for (2, 3)."""
    kind = draw(st.sampled_from(["none", "float", "mask", "count"]))
    if kind == "none":
        return None
    own = tuple(side if draw(st.booleans()) else 1 for side in shape)[draw(st.integers(0, len(shape))) :]
    if kind == "float":
        return draw(_tensors(own, ordinary_weights(), draw(st.sampled_from([torch.float64, torch.float32]))))
    return draw(_tensors(own, st.integers(0, 2), draw(st.sampled_from(INTEGERS)) if kind == "count" else torch.bool))


@st.composite
def calls(draw: st.DrawFn, entry: Quantity, num_batches: int = 1, damage: bool = True) -> Call:
    """Calls of an entry point, of targets with 0 to 3 dimensions, about half of them damaged somewhere.

    For example options `{"input": "probs", "class_dim": 1, "ignore_index": None, "eps": 0.25}` and a batch `{"preds":
    tensor of shape (2, 3, 1), "target": tensor([[0], [2]]), "weight": None}`; damaged, the target holds `2**40`.
    """
    form = draw(st.sampled_from(entry.inputs))
    shape = tuple(draw(st.lists(st.sampled_from([2, 1, 3, 2, 0]), max_size=3)))
    num_classes = draw(st.integers(2 if "num_classes" in _all_options(entry) else 1, 4))
    class_dim = draw(st.integers(-len(shape) - 1, len(shape)))
    options = draw(_options(entry, form, shape, num_classes, class_dim))
    soft = entry.soft and form != "losses" and "token_bytes" not in options and draw(st.integers(0, 3)) == 0
    batches = [draw(_batch(entry, options, shape, num_classes, soft)) for _ in range(num_batches)]
    call = Call(options, batches)
    for _ in range(draw(st.sampled_from([0, 1, 1, 2])) if damage else 0):
        call = draw(_damaged(entry, call))
    return call


def _all_options(entry: Quantity) -> set[str]:
    return set().union(*(entry.options(form) for form in (entry.function, entry.metric) if form is not None))


@cache
def _valid_options(form: str, shape: tuple[int, ...], num_classes: int) -> dict[str, st.SearchStrategy[Any]]:
    """What each option may be."""
    losses = form == "losses"
    most = (num_classes - 1) / num_classes
    return {
        "label_smoothing": st.just(0) if losses else st.sampled_from([0.0, 0, 0.5 * most, most]),
        "label_smoothing_over": st.sampled_from(["all", "others"]),
        "ignore_index": st.sampled_from([-100, None, 0, 1, -1, 2**40]),
        "eps": st.sampled_from([None, 1e-7, 0.125]) if form == "probs" else st.none(),
        "shift": st.booleans() if shape and not losses else st.just(False),
        "unit": st.sampled_from(["nats", "bits"]),
        "nan_policy": st.sampled_from(["propagate", "omit", "raise"]),
        "backend": st.sampled_from(["auto", "eager"]),
        "confidence": st.sampled_from([0.5, 0.95]),
        "class_weight": st.none() if losses else st.none() | _class_weights(num_classes),
        "pos_weight": st.none() | _class_weights(shape[-1] if shape else 1).map(lambda x: x if shape else x[0]),
        "token_bytes": st.none() | _tables(num_classes),
    }


@st.composite
def _options(
    draw: st.DrawFn, entry: Quantity, form: str, shape: tuple[int, ...], num_classes: int, class_dim: int
) -> dict[str, Any]:
    """Draw valid options, some of them left out."""
    valid = _valid_options(form, shape, num_classes)
    options: dict[str, Any] = {"input": form} if entry.inputs[0] != form or draw(st.booleans()) else {}
    if "class_dim" in _all_options(entry) and (class_dim != -1 or draw(st.booleans())):
        options["class_dim"] = class_dim
    for name in sorted(_all_options(entry) & set(valid)):
        if draw(st.integers(0, 2)) == 0:
            options[name] = draw(valid[name])
    required = {"num_classes": num_classes, "num_groups": draw(st.integers(1, 3))}
    options |= {name: value for name, value in required.items() if name in _all_options(entry)}
    return {name: value for name, value in options.items() if name != "token_bytes" or value is not None}


@cache
def _class_weights(num_classes: int) -> st.SearchStrategy[Tensor]:
    values = st.sampled_from([0.0, 0.5, 1.0, 3.0, 2.0**40])
    return st.sampled_from(FLOATS[:2]).flatmap(lambda dtype: _tensors((num_classes,), values, dtype))


@cache
def _tables(num_classes: int) -> st.SearchStrategy[Tensor]:
    lengths = st.integers(num_classes, num_classes + 1)
    return lengths.flatmap(lambda length: _tensors((length,), st.integers(0, 3), torch.int64))


@st.composite
def _batch(
    draw: st.DrawFn, entry: Quantity, options: dict[str, Any], shape: tuple[int, ...], num_classes: int, soft: bool
) -> dict[str, Any]:
    """Draw the arguments of one valid batch."""
    form, class_dim = options.get("input", entry.inputs[0]), options.get("class_dim", -1)
    flat = entry.binary or form == "losses"
    batch: dict[str, Any] = {}
    for name in entry.arguments:
        if name.startswith("preds"):
            size = shape if flat else (*shape, num_classes)
            preds = draw(scores(size, form, draw(st.booleans()))).to(draw(st.sampled_from(FLOATS)))
            batch[name] = preds if flat else preds.movedim(-1, class_dim)
    if soft:
        target = draw(distributions(shape, num_classes)).to(draw(st.sampled_from(FLOATS))).movedim(-1, class_dim)
    elif entry.binary and draw(st.booleans()):
        target = draw(_tensors(shape, st.sampled_from([0.0, 1.0, 0.25]), draw(st.sampled_from(FLOATS))))
    else:
        limit = 2 if entry.binary else num_classes
        target = draw(_tensors(shape, st.integers(0, limit - 1), draw(st.sampled_from(INTEGERS))))
        ignored = options.get("ignore_index", None if entry.binary else -100)
        if ignored is not None and ignored < 128 and draw(st.booleans()):
            mask = draw(_tensors(shape, st.booleans(), torch.bool))
            target = torch.where(mask, ignored, target.to(torch.int64))
    batch["target"] = target
    if "weight" in entry.arguments:
        batch["weight"] = draw(weightings(shape))
    if "group" in entry.arguments:
        size = shape[draw(st.integers(0, len(shape))) :]
        batch["group"] = draw(_tensors(size, st.integers(0, options["num_groups"] - 1), torch.int64))
    if "num_bytes" in entry.arguments:
        number = st.integers(0, 9) | _tensors((2,), st.integers(0, 9), torch.int64)
        batch["num_bytes"] = None if "token_bytes" in options else draw(number)
    return batch


@st.composite
def _damaged(draw: st.DrawFn, entry: Quantity, call: Call) -> Call:
    """Replace one thing of a call: an option, or in the last batch a value, a dtype, a shape, or a whole argument."""
    if draw(st.integers(0, 3)) == 0:
        # What a report says of predictions, and sequences, have tests of their own.
        name = draw(st.sampled_from(sorted(_all_options(entry) - {"accuracy", "entropy", "sequence"})))
        return call._replace(options={**call.options, name: draw(st.sampled_from(JUNK))})
    batch = dict(call.batches[-1])
    name = draw(st.sampled_from(sorted(batch)))
    batch[name] = draw(_damaged_argument(batch[name]))
    return call._replace(batches=[*call.batches[:-1], batch])


@st.composite
def _damaged_argument(draw: st.DrawFn, value: Any) -> Any:
    """Replace something of one argument; for example the value `[0, 1]` by `[0, 7]`, `[[0, 1]]` or `[0.0, 1.0]`."""
    kind = draw(st.sampled_from(["value", "value", "shape", "dtype", "other"]))
    if not isinstance(value, Tensor) or value.layout != torch.strided or kind == "other":
        fit = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype != torch.uint16
        sparse = value.to_sparse() if fit else None
        return draw(st.sampled_from([None, sparse, 1.5, 3, -1, True, "1", [1.0], torch.ones(()), torch.ones(2, 2)]))
    if kind == "dtype":
        value = value.real if value.is_complex() else value  # It may have been damaged before; a cast would warn.
        return value.to(draw(st.sampled_from([*FLOATS, *INTEGERS, *OTHERS])))
    if kind == "value":
        bad = torch.tensor(draw(st.sampled_from(PLANTED))).to(value.dtype)
        value = value.clone(memory_format=torch.contiguous_format)
        if value.numel():
            value.view(-1)[draw(st.integers(0, value.numel() - 1))] = bad
        return value
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[None],
        lambda x: x[..., None],
        lambda x: x.reshape(-1),
        lambda x: x[:1] if x.dim() else x,
        lambda x: x[..., 1:] if x.dim() else x,
        lambda x: x[0] if len(x.shape) and len(x) else x,
        lambda x: torch.cat([x, x], -1) if x.dim() else x,
        lambda x: x.movedim(0, -1) if x.dim() else x,
        lambda x: x.expand(2, *x.shape),
    ]
    return draw(st.sampled_from(ways))(value)
