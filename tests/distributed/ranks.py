"""Real ranks for a test: processes that form a process group, and a recorder of what they exchange."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xent_metrics._compat import TORCH

# What takes seconds to import is imported once, by a server process that every rank is forked from.
_SLOW_IMPORTS = [
    "torch._dynamo", "torch.distributed.tensor.parallel", "torchmetrics", "pytest", "lightning.pytorch",
    "pytorch_lightning", "torch.utils.tensorboard", "torch.distributed.checkpoint", "xent_metrics.lightning",
    "tests.cases", "tests.lightning.worlds",
]  # fmt: skip
_GRACE = 5.0  # Seconds that ranks get to end by themselves when one of them has failed.


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    tmp_path: Path,
    timeout: float = 120.0,
    rank_first: bool = True,
    together: bool = True,
) -> list[Any]:
    """Call `function(rank, *args)` in a process for each rank, with a gloo group of all of them; return the results.

    A process is a fork of a server that has imported what is slow: a world of two takes a fifth of a second. If not
    `rank_first`, the function is called without its rank; if not `together`, a rank ends without waiting for others.
    Arguments and results are pickled, the function by its name. If a rank fails, or the time in seconds is over, all
    of them are ended and what they wrote is shown: tracebacks of errors, and of where the others were.
    """
    directory = Path(tempfile.mkdtemp(dir=tmp_path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_SLOW_IMPORTS)
    common = (world_size, directory, timeout, function, args, rank_first, together)
    ranks = [context.Process(target=_run_rank, args=(rank, *common), daemon=True) for rank in range(world_size)]
    deadline = time.monotonic() + timeout
    try:
        for process in ranks:
            process.start()
        while (running := [process for process in ranks if process.is_alive()]) and time.monotonic() < deadline:
            wait([process.sentinel for process in running], deadline - time.monotonic())
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + _GRACE)
    finally:
        for process in ranks:
            if process.is_alive():
                process.terminate()
    for process in ranks:
        process.join(_GRACE)
        if process.is_alive():
            process.kill()
            process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        logs = [f"rank {rank}:\n{_log(directory, rank).read_text(errors='replace')}" for rank in range(world_size)]
        raise AssertionError(f"exit codes of the ranks: {codes}\n" + "\n".join(logs))
    return [pickle.loads(_result(directory, rank).read_bytes()) for rank in range(world_size)]


def _log(directory: Path, rank: int) -> Path:
    return directory / f"{rank}.log"


def _result(directory: Path, rank: int) -> Path:
    return directory / f"{rank}.pickle"


def _run_rank(
    rank: int,
    world_size: int,
    directory: Path,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank_first: bool,
    together: bool,
) -> None:
    """Do what a rank does, in its own process."""
    log = os.open(_log(directory, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.register(signal.SIGTERM, chain=True)  # Says where the rank was, and then ends it.
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(directory / "store").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size)
    try:
        result = function(rank, *args) if rank_first else function(*args)
        _result(directory, rank).write_bytes(pickle.dumps(result))
    except BaseException:
        if together:
            raise
        traceback.print_exc()
        os._exit(1)
    if not together:
        os._exit(0)
    dist.barrier()  # Nobody leaves while others are still talking.
    if TORCH < (2, 7):
        time.sleep(0.05)  # What ends the group may wait for a thread of its own that needs the interpreter.
    dist.destroy_process_group()


class Collective(NamedTuple):
    """What a rank exchanged at once.

    Attributes:
        name: Such as `allreduce_`, `allgather_`, `barrier`.
        operation: How it reduces, such as `SUM`; empty where it does not.
        dtype: Of the tensor.
        num_bytes: Of all tensors that it takes.
    """

    name: str
    operation: str
    dtype: torch.dtype
    num_bytes: int


class Collectives(TorchDispatchMode):
    """Records every collective of this rank, whichever function asked for it.

    All go through the dispatcher: those of `torch.distributed`, the functional ones that a DTensor makes, and the
    parts of those that exchange objects.
    """

    def __init__(self) -> None:
        """Start with nothing recorded."""
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record, and run; a DTensor first says which collectives it needs."""
        if any(t is torch.distributed.tensor.DTensor for t in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            num_bytes = sum(x.numel() * x.element_size() for x in tensors)
            name = func._schema.name.split("::")[1]
            self.calls.append(Collective(name, _operation(name, args), tensors[0].dtype, num_bytes))
        return func(*args, **(kwargs or {}))

    def taken(self) -> list[Collective]:
        """Return what has been recorded since the last time."""
        calls, self.calls = self.calls, []
        return calls


needs_fsdp2 = pytest.mark.skipif(TORCH < (2, 7), reason="FSDP2 of PyTorch 2.6 needs an accelerator")

_asked_for = ""
_allreduce = dist.ProcessGroup.allreduce


def _noting_the_operation(group: Any, tensors: Any, *others: Any, **named: Any) -> Any:
    global _asked_for  # noqa: PLW0603
    options = named.get("opts", others[0] if others else None)
    _asked_for = options.reduceOp.op.name if isinstance(options, dist.AllreduceOptions) else ""
    return _allreduce(group, tensors, *others, **named)


if TORCH < (2, 11):  # Its dispatcher does not say how a collective reduces.
    dist.ProcessGroup.allreduce = _noting_the_operation


def _operation(name: str, args: Any) -> str:
    if name != "allreduce_":
        return ""
    return dist.ReduceOp.RedOpType(args[2].op()).name if TORCH >= (2, 11) else _asked_for
