"""What older versions of PyTorch do in another way. Each function says with which version it can go.

Nothing else in the library asks for a version. `docs/compatibility.md` says which versions were tried.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
if TORCH < (2, 6):  # Where an installer did not look.
    raise ImportError(
        f"xent_metrics needs PyTorch 2.6 or newer, got {torch.__version__}: its numbers were not verified there; "
        "install torch>=2.6."
    )


# What the limit is called in the configuration; can go with `compile_often`.
RECOMPILE_LIMIT = "recompile_limit" if TORCH >= (2, 7) else "cache_size_limit"


def compile_often(function: Callable[..., Result], limit: int) -> Callable[..., Result]:
    """Return a function that is compiled as one graph for any sizes, and again as often as a limit says.

    Can go with PyTorch 2.12, which has `torch.compile(recompile_limit=)`.
    """
    own: dict[str, Any] = {"recompile_limit": limit} if TORCH >= (2, 12) else {}
    compiled: Callable[..., Result] = torch.compile(function, dynamic=True, fullgraph=True, **own)
    if own:
        return compiled

    @wraps(function)
    def call(*args: Any) -> Result:
        with torch._dynamo.config.patch({RECOMPILE_LIMIT: limit}):
            return compiled(*args)

    return call


# Whether a call is being exported; in PyTorch 2.6 also if it is being compiled. Chosen once: every update asks often.
# Can go with PyTorch 2.7, which has `torch.compiler.is_exporting`.
is_exporting: Callable[[], bool] = torch.compiler.is_exporting if TORCH >= (2, 7) else torch.compiler.is_compiling


def can_view_digits() -> bool:
    """Return whether a view of int64 as int16 has the digits of each number side by side.

    Can go with PyTorch 2.13: compilers before it view numbers in whatever order they have laid them out.
    """
    return TORCH >= (2, 13) or not (torch.compiler.is_dynamo_compiling() or is_exporting())


def digits_by_shifts(numbers: Tensor) -> Tensor:
    """Return what `numbers.view(torch.int16)` is of int64, as int64: four signed digits of each, the lowest first.

    Can go with `can_view_digits`.
    """
    return torch.stack([(numbers << shift) >> 48 for shift in (48, 32, 16, 0)], -1).flatten(-2)


def where_true(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x[mask]`, also of unsigned integers wider than a byte.

    Can go with PyTorch 2.11. 2.9 and older cannot index them by a mask; 2.10 was not tried.
    """
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}.get(x.dtype)
    return x[mask] if signed is None or TORCH >= (2, 11) else x.view(signed)[mask].view(x.dtype)


def set_at_once(obj: object, values: dict[str, Any]) -> None:
    """Set attributes in one step, past `__setattr__`; a step of traced code is one anyway.

    Can go with PyTorch 2.13: compilers before it cannot trace `__dict__.update`.
    """
    if TORCH < (2, 13) and torch.compiler.is_dynamo_compiling():
        for name, value in values.items():
            setattr(obj, name, value)
    else:
        obj.__dict__.update(values)


def has_autocast(device: str) -> bool:
    """Return whether autocast may be asked about on a type of device.

    Can go with PyTorch 2.13: compilers before it cannot trace `torch.amp.is_autocast_available`.
    """
    if TORCH < (2, 13) and torch.compiler.is_dynamo_compiling():
        return device != "meta"
    return torch.amp.is_autocast_available(device)
