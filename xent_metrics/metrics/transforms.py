"""Calls inside the transforms of `torch.func` (`grad`, `jvp`, `jacrev`, `vmap`, ...), and forward-mode differentiation.

A tensor stands for others there, has no memory of its own, and cannot be read or written to. But a metric measures: to
every transform its values are constants. So a call is made outside of them, with the tensors that are stood for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from xent_metrics import _runtime
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.tally import GroupTally, Tally

P = ParamSpec("P")
R = TypeVar("R")
Tensors = tuple[Tensor, ...]


def outside_transforms(call: Callable[P, R]) -> Callable[P, R]:
    """Let a call be made inside transforms: its values have no derivative, and `vmap` makes one for each example."""

    @wraps(call)
    def constant(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _runtime.is_transformed() or _runtime.is_traced():
            return call(*args, **kwargs)
        value: R = _call(call, (args, kwargs))
        return value

    return constant


def _call(call: Callable[..., Any], arguments: tuple[Any, Any]) -> Any:
    given, structure = tree_flatten(_packed(arguments))
    returned: list[Any] = []

    def of_tensors(*tensors: Tensor) -> Tensors:
        args, kwargs = _unpacked(tree_unflatten(_replaced(given, tensors), structure))
        value = _packed(call(*args, **kwargs))
        returned[:] = tree_flatten(tree_map(lambda x: torch.as_tensor(x) if isinstance(x, int | float) else x, value))
        return _tensors_in(returned[0])

    tensors: Tensors = _Constant.apply(of_tensors, *_tensors_in(given))  # type: ignore[no-untyped-call]
    return _unpacked(tree_unflatten(_replaced(returned[0], tensors), returned[1]))


class _Constant(torch.autograd.Function):
    """Calls a function of tensors, whose values are constants."""

    @staticmethod
    def forward(call: Callable[..., Tensors], *tensors: Tensor) -> Tensors:
        return call(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensors) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.num_outputs = len(output)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * int(ctx.num_outputs)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, call: Callable[..., Tensors], *tensors: Tensor
    ) -> tuple[Tensors, tuple[int, ...]]:
        if not info.batch_size:
            raise ValueError("`preds` must not be those of no example inside torch.func.vmap; leave the call out.")
        each = []
        for i in range(info.batch_size):
            example = (x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims[1:], strict=True))
            each.append(_Constant.apply(call, *example))  # type: ignore[no-untyped-call]
        stacked = tuple(torch.stack(values) for values in zip(*each, strict=True))
        return stacked, (0,) * len(stacked)


class _Packed(NamedTuple):
    """What is no collection as one: how it is made, and of what."""

    make: Callable[..., Any]
    parts: tuple[Tensor | None, ...]


def _packed(values: Any) -> Any:
    def pack(x: Any) -> Any:
        if isinstance(x, LinearLogits):
            return _Packed(*x.__reduce__())  # With its scale and its cap.
        return _Packed(type(x), (x.state,)) if isinstance(x, Tally | GroupTally) else x

    return tree_map(pack, values)


def _unpacked(values: Any) -> Any:
    def is_packed(x: Any) -> bool:
        return isinstance(x, _Packed)

    return tree_map(lambda x: x.make(*x.parts) if is_packed(x) else x, values, is_leaf=is_packed)


def _tensors_in(values: Iterable[Any]) -> Tensors:
    return tuple(x for x in values if isinstance(x, Tensor))


def _replaced(values: Iterable[Any], tensors: Tensors) -> list[Any]:
    """Return values with other tensors, in their order."""
    others = iter(tensors)
    return [next(others) if isinstance(x, Tensor) else x for x in values]
