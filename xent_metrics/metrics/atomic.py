"""A torchmetrics `Metric` whose calls are atomic: each happens as a whole, or not at all.

Threads that call one metric wait for each other where its state changes or is read, and after an error, whatever raised
it, the metric is what it was before the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from torch import Tensor
from torchmetrics import Metric

from xent_metrics import _runtime

_P = ParamSpec("_P")
_R = TypeVar("_R")
_M = TypeVar("_M", bound="AtomicMetric")

_metrics: WeakValueDictionary[int, AtomicMetric] = WeakValueDictionary()  # By identity: their hash changes.


def atomic(method: Callable[Concatenate[_M, _P], _R]) -> Callable[Concatenate[_M, _P], _R]:
    """Let a method run while no other thread changes the metric, and undo what it has changed if it raises."""

    @wraps(method)
    def call(self: _M, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if _runtime.is_traced():  # A compiler knows no locks.
            return method(self, *args, **kwargs)
        with self._lock:
            before = self._snapshot()
            try:
                return method(self, *args, **kwargs)
            except BaseException:
                self.__dict__.update(before)
                raise

    return call


class AtomicMetric(Metric):
    """What torchmetrics' calls need to be atomic; a subclass marks its own ones with `atomic`.

    The lock is not copied, nor pickled: a copy has one of its own. In a forked process it is free.
    """

    _lock: AbstractContextManager[bool]  # Of a kind that a thread may take again while it holds it.

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._make_lock()

    def _make_lock(self) -> None:
        self.__dict__["_lock"] = RLock()
        _metrics[id(self)] = self

    def _snapshot(self) -> dict[str, Any]:
        """Return all attributes, to go back to them."""
        attributes = self.__dict__.copy()
        attributes["_defaults"] = self._defaults.copy()
        attributes.update(self._copies())
        return attributes

    def _copies(self) -> dict[str, Any]:
        """Return copies of the states that may be changed in place: all but the first, which is the tally."""
        if len(self._defaults) == 1:
            return {}
        added = {name: getattr(self, name) for name in [*self._defaults][1:]}
        return {name: x.detach().clone() if isinstance(x, Tensor) else x.copy() for name, x in added.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold."""
        with self._lock:
            state = {**super().__getstate__(), **self._copies()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a copy or a pickle holds."""
        super().__setstate__(state)
        self._make_lock()

    @atomic
    def _atomically(self, function: Callable[..., _R], *args: Any, **kwargs: Any) -> _R:
        return function(*args, **kwargs)

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        counted = super()._wrap_update(update)

        @wraps(update)
        def whole(*args: Any, **kwargs: Any) -> None:
            self._atomically(counted, *args, **kwargs)

        return whole

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        synced = super()._wrap_compute(compute)

        @wraps(compute)
        def whole(*args: Any, **kwargs: Any) -> Any:
            return self._atomically(synced, *args, **kwargs)

        return whole

    @property
    @atomic
    def metric_state(self) -> dict[str, Any]:
        """The states by name: what `merge_state` takes."""
        return super().metric_state

    @atomic
    def reset(self) -> None:
        """Forget everything that was added."""
        super().reset()

    @atomic
    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Let the state be that of all ranks together, until `unsync`."""
        super().sync(*args, **kwargs)

    @atomic
    def unsync(self, should_unsync: bool = True) -> None:
        """Let the state be that of this rank again."""
        super().unsync(should_unsync)

    def sync_context(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:  # type: ignore[override]
        """Synchronize as torchmetrics does, and go back to the tally of this rank also after an error."""
        return self._synced(*args, **kwargs)

    @contextmanager
    def _synced(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> Iterator[None]:
        with self._lock:  # All the while: what another thread would add to the sum of all ranks would be lost.
            was_synced = self._is_synced
            try:
                self.sync(dist_sync_fn, process_group, should_sync, distributed_available)
                yield
                self.unsync(should_unsync=self._is_synced and should_unsync)
            except BaseException:
                self.unsync(should_unsync=self._is_synced and not was_synced)
                raise

    @atomic
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load what `state_dict` returned."""
        return super().load_state_dict(state_dict, *args, **kwargs)


def _free_locks() -> None:
    """Free all locks: those who held them in the parent do not exist in a forked process."""
    for metric in _metrics.values():
        metric._make_lock()


if hasattr(os, "register_at_fork"):  # Not on Windows.
    os.register_at_fork(after_in_child=_free_locks)
