"""The kernels through `torch.compile`: when they are compiled, for what, and what goes into them.

The only module that knows `torch._dynamo`. A loss must have the same bits in any batch. Compiled code takes several
short rows at a time, and rounds the rows that are left over in another way; so it is given a multiple of `_LANES` rows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from threading import Lock, RLock
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._compat import compile_often
from xent_metrics.losses.kernels import Results
from xent_metrics.losses.options import Backend

_LANES = 64  # A multiple of as many numbers as any processor does at a time.
_MANY = 256  # Compilations of a kernel for other numbers of threads, in other modes: more than anybody has.
_MOST_KERNELS = 64  # As many are kept, for kinds of tensors and options: more than a program is likely to need.

_one_at_a_time = Lock()  # Threads would compile the same kernel, each for itself; so they also run it in turns.


def _free_locks() -> None:
    """Free the locks of compiling: the threads that held them do not exist in a forked process."""
    global _one_at_a_time  # noqa: PLW0603  # A lock cannot be freed by who does not hold it.
    _one_at_a_time = Lock()
    compiler: Any = sys.modules.get("torch._dynamo.convert_frame")
    if compiler is not None:
        compiler.compile_lock = RLock()  # PyTorch does not free it.


if hasattr(os, "register_at_fork"):  # Not on Windows.
    os.register_at_fork(after_in_child=_free_locks)


def compiles(backend: Backend) -> bool:
    """Return whether kernels are compiled here; in traced code they are a part of that instead."""
    return backend == "compile" and not _runtime.is_traced() and not torch._dynamo.config.disable


def fuses(backend: Backend) -> bool:
    """Return whether kernels need no buffers, as a compiler fuses their steps: that of our caller, or ours."""
    if backend == "auto":
        return _runtime.is_traced()
    return backend == "compile" and (_runtime.is_traced() or compiles(backend))


def run(
    backend: Backend,
    kernel: Callable[..., Results],
    rows: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    **constants: Hashable,
) -> Results:
    """Call a kernel, compiled if that is asked for and there is anything to do.

    Args:
        backend: Whether to compile it.
        kernel: One of `kernels`.
        rows: Its tensors that have a row for each target.
        others: Those that have not.
        **constants: Its other arguments.

    Raises:
        ValueError: If it cannot be compiled.
    """
    if not compiles(backend) or not all(x is None or x.numel() for x in rows):
        return kernel(*rows, *others, **constants)
    assert rows[0] is not None
    count = len(rows[0])
    # The last rows, which do not fill the lanes, are padded with zeros, so that no row is left over.
    left = count % _LANES if rows[0].shape[1:].numel() < _LANES else 0
    parts = []
    if left < count:
        parts.append(_run_compiled(kernel, [x if x is None else x[: count - left] for x in rows], others, constants))
    if left:
        rest = [x if x is None else torch.cat([x[-left:], x.new_zeros(_LANES - left, *x.shape[1:])]) for x in rows]
        parts.append(tuple(x if x is None else x[:left] for x in _run_compiled(kernel, rest, others, constants)))
    return (
        parts[0]
        if len(parts) == 1
        else tuple(None if x is None else torch.cat((x, y)) for x, y in zip(*parts, strict=True))
    )


def _run_compiled(
    kernel: Callable[..., Results],
    rows: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    constants: Mapping[str, Hashable],
) -> Results:
    """Call a kernel that is compiled for any number of rows, but for one number of classes.

    The compiler chooses code by the shape that it sees first. The bits of a loss must not depend on which came first.
    """
    # The compiler would compile again for a view, and for other strides.
    tensors = [None if x is None else x.contiguous().data for x in [*rows, *others]]
    for x in tensors:
        if x is not None and x.dim() == 2:
            torch._dynamo.mark_static(x, 1)
    kinds = tuple(None if x is None else (x.dtype, x.device, x.shape[1:]) for x in tensors)
    try:
        with _one_at_a_time:
            return _compiled(kernel, kinds, **constants)(*tensors)
    except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # The latter of the compiler's cache.
        first, _, rest = str(error).partition("\n")
        cause = rest.partition("\n")[0] if first.endswith("raised:") else first
        raise ValueError(
            f"`backend` must be 'auto' or 'eager' where the losses cannot be compiled, got 'compile' and {cause!r}; "
            "install the compiler if it is missing (C++, on CUDA Triton), or look at the error above."
        ) from error


@lru_cache(maxsize=_MOST_KERNELS)
def _compiled(kernel: Callable[..., Results], _: Hashable, **constants: Any) -> Callable[..., Results]:
    """Return a compiled kernel for tensors of one kind, in place of the one that was not called for longest.

    Each has code of its own. PyTorch keeps with a function's code what it compiled, and refuses to compile one code too
    often, as it counts threads, autocast and inference mode too.
    """

    def bound(*tensors: Tensor | None) -> Results:
        return kernel(*tensors, **constants)

    bound.__code__ = bound.__code__.replace()
    compiled = compile_often(bound, _MANY)
    # What was compiled refers to the code that it is kept with, so that it would not be freed with it.
    finalize(compiled, torch._dynamo.eval_frame.remove_from_cache, bound.__code__).atexit = False
    return compiled
