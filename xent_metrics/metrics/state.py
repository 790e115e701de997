"""The state of a metric, a tally: what is added to it, summed over ranks, merged, saved and moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from xent_metrics import _runtime
from xent_metrics._compat import set_at_once
from xent_metrics._validate import check_has_values, describe
from xent_metrics.distributed import check_group_of_ranks, holds_ranks, place_among_ranks
from xent_metrics.losses.options import BinaryOptions, LossOptions
from xent_metrics.metrics.atomic import AtomicMetric, atomic
from xent_metrics.metrics.saved_state import (
    changed_settings,
    in_words,
    name_before_0_1_0,
    pack,
    part_of_rank,
    state_name,
    unpack,
)
from xent_metrics.readings import NanPolicy
from xent_metrics.tally import GroupTally, Tally, sum_tallies_over_ranks

SAVED_AS = "tally"
"""The key of a state in a `state_dict`."""


class TallyState(AtomicMetric):
    """A torchmetrics `Metric` whose state is a tally, one int64 tensor; a subclass may add others.

    Args:
        update: Says which update this is; metrics with different ones share no state.
        decides: The keyword arguments of the tally function.
        zero: The tally of nothing.
        **kwargs: torchmetrics' own.
    """

    _tally_function: ClassVar[Callable[..., Any]]  # A static method. Saved states hold its name.
    options: LossOptions | BinaryOptions
    nan_policy: NanPolicy

    def __init__(self, update: str, decides: Mapping[str, Any], zero: Tally | GroupTally, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sharing = decides.get("sequence_group")
        check_group_of_ranks("sequence_group", sharing)
        if sharing is not None and not holds_ranks(self.process_group, sharing):
            raise ValueError(
                "`process_group` must hold the ranks of `sequence_group`, which have other targets, got "
                f"{self.process_group!r} and {sharing!r}; pass a group of all of them."
            )
        self._decides = tuple(decides)
        for name, value in decides.items():
            setattr(self, name, value.detach().clone() if isinstance(value, Tensor) else value)
        self._tally_type = type(zero)
        self._settings = changed_settings(decides)
        self._state_name = state_name(update, self._settings)
        self.add_state(self._state_name, default=zero.state, dist_reduce_fx="sum")

    @property
    def tally(self) -> Any:
        """What has been seen since the last reset: a `Tally`, or a `GroupTally` for a metric of groups."""
        with nullcontext() if _runtime.is_traced() else self._lock:
            return self._tally_type(self.__dict__[self._state_name])

    @tally.setter
    def tally(self, tally: Tally | GroupTally) -> None:
        set_at_once(self, {self._state_name: tally.state, "_computed": None})

    def _keep(self, tally: Tally | GroupTally) -> None:
        # Rebound, never changed in place: compute groups and wrappers hold the old state, and one made in
        # inference mode must not be written to outside it.
        self.__dict__[self._state_name] = tally.state

    def add(self, batch: Any) -> None:
        """Add a tally that was made elsewhere, by `xent_metrics.functional.tally` or another metric."""
        own = self.tally
        if type(batch) is not type(own) or batch.state.shape != own.state.shape:
            raise ValueError(
                f"`batch` must be a tally of the shape {tuple(own.state.shape)} that this metric keeps, got "
                f"{describe(batch)}; take it from a metric that is configured alike."
            )
        self._add(batch)

    @atomic
    def _add(self, batch: Any, num_updates: int = 1, value: Any = None) -> Any:
        """Add a tally, and the value that `forward` returns of it, in one step."""
        self._require_unsynced()
        state, count = (self.tally + batch).state, self._update_count + num_updates
        cache = self._forward_cache if value is None else value
        # Past the `__setattr__` of modules, which would do the same after it has looked for parameters.
        set_at_once(self, {self._state_name: state, "_update_count": count, "_computed": None, "_forward_cache": cache})
        return value

    def _update_options(self) -> dict[str, Any]:
        own = self.__dict__  # `getattr` of a module looks long for what is None.
        return {name: own[name] for name in self._decides}

    def _require_unsynced(self) -> None:
        """Raise where what is added would be lost, as the tally of all ranks gives way to that of this one."""
        if self._is_synced:
            raise TorchMetricsUserError("The metric is synced; call unsync() before adding a batch or loading a state.")

    @atomic
    def is_to_be_reduced(self) -> bool:
        """Return whether `compute` would add up the tallies of several ranks."""
        return bool(self.sync_on_compute and not self._is_synced and self._has_ranks())

    def _has_ranks(self) -> bool:
        available = self.distributed_available_fn
        return bool(available and available())

    def about(self) -> str:
        """Say what decides the tally, and who raises: ranks that say different things do not add up theirs."""
        return in_words(type(self).__name__, {**self._settings, "nan_policy": self.nan_policy})

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        """Add up the tallies of all ranks: one collective of a fixed size, and no barrier."""
        if dist_sync_fn is not gather_all_tensors:
            super()._sync_dist(dist_sync_fn, process_group)
            return
        [total] = sum_tallies_over_ranks([self.tally], self.about(), process_group or self.process_group)
        self._keep(total)
        if len(self._defaults) > 1:  # A subclass has added states.
            every = self._reductions
            self._reductions = {name: reduction for name, reduction in every.items() if name != self._state_name}
            super()._sync_dist(dist_sync_fn, process_group)
            self._reductions = every

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the tally of another metric that is configured alike, or what its `metric_state` or `state_dict` was.

        Raises:
            ValueError: If it is neither, or was configured otherwise.
            TypeError: If a state is no tensor.
            RuntimeError: With `dist_sync_on_step=True`, as in torchmetrics.
        """
        if not isinstance(incoming_state, dict | TallyState):
            raise ValueError(
                f"`incoming_state` must be a metric of xent_metrics or its state, got {type(incoming_state).__name__}; "
                "merge metrics that are configured alike."
            )
        if self.dist_sync_on_step or self.full_state_update:
            raise RuntimeError(
                "`dist_sync_on_step` and `full_state_update` must be False for `merge_state`, as in torchmetrics, got "
                f"{self.dist_sync_on_step} and {self.full_state_update}; merge into another metric."
            )
        # Before this metric is locked: two that are merged into each other would wait for ever.
        incoming, count = incoming_state._contents() if isinstance(incoming_state, TallyState) else (incoming_state, 1)
        if SAVED_AS in incoming:
            options = self._tally_function.__name__, self._update_options(), self._settings
            state, _ = unpack(incoming[SAVED_AS], *options, self.tally.state)
            incoming = {**incoming, self._state_name: state}
        if self._state_name not in incoming:
            other: Any = list(incoming)
            if isinstance(incoming_state, TallyState):
                other = f"{type(incoming_state).__name__} with {incoming_state.options}"
            raise ValueError(
                "`incoming_state` must come from a metric with the same options, weights, tables and groups as "
                f"this {type(self).__name__} with {self.options}, got {other}; merge metrics that are configured alike."
            )
        state = incoming[self._state_name]
        if not isinstance(state, Tensor):
            raise TypeError(f"`incoming_state` must hold a tensor, got {type(state).__name__}; pass a metric's state.")
        self._merge(incoming, count)

    @atomic
    def _contents(self) -> tuple[dict[str, Any], int]:
        """Return the states, and how many updates they are from."""
        return self.metric_state | self._copies(), self._update_count

    @atomic
    def _merge(self, incoming: dict[str, Any], num_updates: int) -> None:
        self._require_unsynced()
        self._reduce_states(incoming)
        self.__dict__.update(_update_count=self._update_count + num_updates, _computed=None)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Add other states: the tally as tallies are added, and those that a subclass has added as they say."""
        total = self.tally + self._tally_type(incoming_state[self._state_name].to(self.device))
        if len(self._defaults) > 1:
            super()._reduce_states(incoming_state)
        self._keep(total)

    @atomic
    def state_dict(  # type: ignore[override]
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return what is to be saved: after `persistent(True)`, the state with what decides an update, as `tally`."""
        saved = super().state_dict(destination, prefix, keep_vars)
        if prefix + self._state_name in saved:
            state = saved.pop(prefix + self._state_name)
            share = [0, 1] if self._is_synced else self._place()
            saved[prefix + SAVED_AS] = pack(state, self._tally_function.__name__, self._settings, share)
        return saved

    def _place(self) -> list[int]:
        return place_among_ranks(self.process_group) if self._has_ranks() else [0, 1]

    @atomic
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a saved state; raise ValueError if a metric with another update, or another rank, saved it."""
        update, decides, own, share = self._tally_function.__name__, self._update_options(), self.tally.state, None
        old_name = name_before_0_1_0(update, decides, own)
        old_keys = [key for key in state_dict if key.startswith(f"{prefix}tally_") and key != prefix + self._state_name]
        state = state_dict.pop(prefix + old_name, None)
        if prefix + SAVED_AS in state_dict:
            saved = state_dict.pop(prefix + SAVED_AS)
            state, share = unpack(saved, update, decides, self._settings, own)
        elif state is None and old_keys:
            raise ValueError(
                f"`{SAVED_AS}` must come from a metric with the same options, but a version before 0.1.0 saved "
                f"{', '.join(old_keys)}, where {prefix}{old_name} belongs to this {type(self).__name__} with "
                f"{self.options}; load it into a metric that is configured as the one that saved it."
            )
        if state is not None:
            self._require_unsynced()
            state = part_of_rank(state, share, self._place())
            if own.is_meta:
                self.to_empty(device=state.device)  # The metric goes where there are values.
            self.tally = self._tally_type(state.to(self.device))
            self._update_count = max(1, self._update_count)  # Or `compute` would warn.
        super()._load_from_state_dict(state_dict, prefix, *args)

    @atomic
    def _apply(  # type: ignore[override]  # As torchmetrics' has it, and `to_empty` calls it.
        self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "", recurse: bool = True
    ) -> Any:
        """Move to another device, but let nothing cast: `module.to(torch.bfloat16)` would cast readings and weights.

        On the meta device nothing has values. What comes from there is empty, like a new metric.
        """
        for name, x in self._update_options().items():
            if isinstance(x, Tensor):
                moved = _runtime.moved(x, fn)
                if not moved.is_meta:
                    check_has_values(name, x)
                self.__dict__[name] = moved
        had_values = not self.tally.state.is_meta
        super()._apply(lambda x: _runtime.moved(x, fn), exclude_state)
        if not had_values and not self.tally.state.is_meta:
            self.reset()
        return self
