"""Where the code runs: may values be read here, is the call traced, which float is the widest.

Nothing else in the library asks PyTorch these questions, but for `_compat.py`, whose answers change no value. So a
test that replaces `can_read_values` puts the whole library into the state that it has on an accelerator. Call these
functions through the module for that reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from xent_metrics._compat import is_exporting
from xent_metrics.distributed import is_distributed

_NOTHING_TO_DO = nullcontext()


def is_traced() -> bool:
    """Return whether this call is being compiled or exported.

    `torch.compiler.is_compiling` of newer versions is also true for all that runs while another thread compiles.
    """
    return torch.compiler.is_dynamo_compiling() or is_exporting()


def is_transformed() -> bool:
    """Return whether this call is inside a transform of `torch.func`, or in forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def can_read_values(x: Tensor) -> bool:
    """Return whether the host may read the values of a tensor here.

    On an accelerator it would have to wait for the device, and traced code cannot branch on values.
    """
    return x.is_cpu and not is_traced()


def raises_eagerly(x: Tensor) -> bool:
    """Return whether bad values raise at once, instead of being counted and raising when they are read.

    Among several ranks one that raised would let the others wait for it; what is counted raises on all of them.
    """
    return can_read_values(x) and not is_distributed()


def no_graph() -> AbstractContextManager[None]:
    """Return a context that builds no graph; where none is built anyway, one that costs nothing."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING_TO_DO


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def moved(x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor where a function that a module applies to its tensors moves them; zeros, if it has no values."""
    if not x.is_meta:
        return x.to(move(x.new_empty(0)).device)
    try:
        device = move(x.new_empty(0)).device
    except NotImplementedError:  # There is nothing to copy.
        device = move(torch.empty(0, dtype=x.dtype, device="cpu")).device
    return torch.zeros_like(x, device=device)


def least_and_greatest(x: Tensor) -> tuple[float, float] | None:
    """Return the extremes of a tensor, NaNs if it has one; None if they may not be read, or there are no values."""
    if not can_read_values(x) or not x.numel():
        return None
    low, high = torch.aminmax(x)
    return low.item(), high.item()


Constant = int | list[float] | list[int] | list[list[int]] | list[list[float]]
# Each with what it was made of, so that no other list gets its address.
_constants: dict[tuple[Any, torch.device, torch.dtype], tuple[Constant, Tensor]] = {}


def constant(values: Constant, beside: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a constant on the device of another tensor; it is copied there once.

    Args:
        values: An integer, or a list that never changes, such as one of a module; it is never freed.
        beside: A tensor of the same device.
        dtype: That of the constant.
    """
    if type(beside) is not Tensor or is_traced():
        return torch.tensor(values, dtype=dtype, device=beside.device)  # It belongs to what is being traced.
    key = (values, int) if isinstance(values, int) else (id(values), list), beside.device, dtype
    if key not in _constants:
        with torch.inference_mode(False):
            _constants[key] = values, torch.tensor(values, dtype=dtype, device=beside.device)
    return _constants[key][1]
