"""What all metrics share: a tally that grows with every update, as a torchmetrics `Metric`.

The state is one int64 tensor. It is added to, summed over ranks, saved and read; nothing else happens to it. A subclass
names the function that tallies a batch, and says what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError
from torchmetrics.utilities.prints import rank_zero_warn

from xent_metrics import _runtime
from xent_metrics._validate import as_plain, as_token_table, check_has_values, describe, on_host
from xent_metrics.distributed import check_group_of_ranks, place_among_ranks, sum_alike_over_ranks
from xent_metrics.losses.input_hint import input_mismatch_hint
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import CLASS_TARGETS
from xent_metrics.losses.options import BinaryOptions, LossOptions
from xent_metrics.metrics.other_names import check_names
from xent_metrics.metrics.saved_state import (
    changed_settings,
    in_words,
    name_in_0_1_0,
    pack,
    part_of_rank,
    state_name,
    unpack,
)
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import DeviceReading, NanPolicy, Reading, check_reading, read_exactly
from xent_metrics.tally import GroupTally, Tally

SAVED_AS = "tally"
"""The key of a state in a `state_dict`."""


class TallyMetric(Metric):
    """A tally with a reading.

    A subclass sets `_tally_function`, and defines `update`, whose arguments are those of that function, and `_read`.

    Args:
        options: What decides the losses.
        nan_policy: What infinite and NaN losses do: `"propagate"`, `"omit"` or `"raise"`.
        decides: The other keyword arguments of the tally function: tensors, sizes, process groups. They become
            attributes of the same names.
        zero: The tally of nothing; None for `Tally.zero()`.
        confidence: Probability that the intervals cover the mean over all sequences that might have been drawn.
        **kwargs: torchmetrics' own, such as `process_group` and `sync_on_compute`.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    # As torchmetrics, for `torch.jit.script` of a module that holds a metric.
    __jit_ignored_attributes__: ClassVar[list[str]] = [*Metric.__jit_ignored_attributes__, "options"]
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "tally"]

    _tally_function: ClassVar[Callable[..., Any]]  # A static method. Saved states hold its name.
    options: LossOptions | BinaryOptions
    _TARGETS, _WEIGHTS = CLASS_TARGETS, "`weight`"  # What errors say of them.
    _NUM_POSITIONAL = 2  # Arguments of an update: predictions, then targets.

    def __init__(
        self,
        options: LossOptions | BinaryOptions,
        nan_policy: NanPolicy,
        decides: Mapping[str, Any] | None = None,
        zero: Tally | GroupTally | None = None,
        confidence: float = 0.95,
        /,  # So that no class takes them by these names without saying so.
        **kwargs: Any,
    ) -> None:
        # Whether a rank has a value in store must not decide whether it meets the others in the next `compute`.
        kwargs.setdefault("compute_with_cache", False)
        check_names(type(self).__name__, kwargs)
        super().__init__(**kwargs)
        confidence = as_plain(confidence)
        check_reading(nan_policy, confidence)
        decides = {"options": options, **(decides or {})}
        check_group_of_ranks("sequence_group", decides.get("sequence_group"))
        self.nan_policy = nan_policy
        self.confidence = confidence
        self._decides = tuple(decides)
        for name, value in decides.items():
            setattr(self, name, value.detach().clone() if isinstance(value, Tensor) else value)
        zero = Tally.zero() if zero is None else zero
        self._tally_type = type(zero)
        self._looked_at_preds = False
        self._settings = changed_settings(decides)
        self._state_name = state_name(self._tally_function.__name__, self._settings)
        self.add_state(self._state_name, default=zero.state, dist_reduce_fx="sum")

    @property
    def tally(self) -> Any:
        """What has been seen since the last reset: a `Tally`, or a `GroupTally` for a metric of groups."""
        return self._tally_type(getattr(self, self._state_name))

    @tally.setter
    def tally(self, tally: Tally | GroupTally) -> None:
        self._keep(tally)

    def _keep(self, tally: Tally | GroupTally) -> None:
        # Rebound, never changed in place: compute groups and wrappers hold the old state, and one made in
        # inference mode must not be written to outside it. Past the `__setattr__` of modules, which would do the same
        # after it has looked for parameters.
        self.__dict__[self._state_name] = tally.state

    def add(self, batch: Any) -> None:
        """Add a tally that was made elsewhere, by `xent_metrics.functional.tally` or another metric."""
        self._require_unsynced()
        own = self.tally
        if type(batch) is not type(own) or batch.state.shape != own.state.shape:
            raise ValueError(
                f"`batch` must be a tally of the shape {tuple(own.state.shape)} that this metric keeps, got "
                f"{describe(batch)}; take it from a metric that is configured alike."
            )
        self.tally = own + batch
        self._computed = None
        self._update_count += 1

    @torch.jit.unused
    @outside_transforms
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return its own value, in one pass and without waiting for the device.

        On the CPU the value has the bits that `compute` would give; elsewhere, and for groups, it is read in floating
        point, some 1e-16 off (a standard error 1e-8). It is NaN where `compute` would raise. With
        `dist_sync_on_step=True` it waits, for the device and for the other ranks, and raises if their metrics differ.
        """
        self._require_unsynced()
        self._check_positional(args)
        batch: Any = self._looked_at_batch(*args, **kwargs)
        before = self.tally
        accumulated = before + batch
        if self.dist_sync_on_step:
            self.tally = batch
            try:
                with self.sync_context(dist_sync_fn=self.dist_sync_fn):
                    value = self._value_of_batch(self.tally)
            except BaseException:
                self.tally = before
                raise
            self.tally = accumulated
        else:
            value = self._value_of_batch(batch)
            self._keep(accumulated)
        # Past the `__setattr__` of modules too.
        self.__dict__.update(_update_count=self._update_count + 1, _computed=None, _forward_cache=value)
        return value

    def _value_of_batch(self, batch: Any) -> Any:
        # Groups may be as many as a vocabulary has tokens, which Python would read one by one.
        if isinstance(batch, Tally) and _runtime.can_read_values(batch.state):
            try:
                return self.read(batch)
            except ValueError:  # What is wrong reads as NaN here.
                pass
        parts = self._parts(batch)
        return self._read(*(DeviceReading(part, self.nan_policy, self.confidence) for part in parts))

    def compute(self) -> Any:
        """Read the tally, of all ranks together; see the class for what the numbers mean.

        Ranks exchange the tally in one `all_reduce`, and all of them have to call this.

        Raises:
            ValueError: If targets or probabilities out of range, or invalid weights or groups, were counted, or
                non-finite losses under `nan_policy="raise"`, on any rank; if ranks have metrics that are configured
                differently. The state is kept.
        """
        return self.read(self.tally)

    def is_to_be_reduced(self) -> bool:
        """Return whether `compute` would add up the tallies of several ranks."""
        return bool(self.sync_on_compute and not self._is_synced and self._has_ranks())

    def _has_ranks(self) -> bool:
        available = self.distributed_available_fn
        return bool(available and available())

    def about(self) -> str:
        """Say what decides the tally, and who raises: ranks that say different things do not add up theirs."""
        return in_words(type(self).__name__, {**self._settings, "nan_policy": self.nan_policy})

    def read(self, tally: Any) -> Any:
        """Return what `compute` returns, and raise as it does, for a tally that was kept elsewhere."""
        parts = self._parts(tally.cpu())
        rules = self.nan_policy, self.confidence, self._TARGETS, self._WEIGHTS
        return self._read(*(read_exactly(part, *rules) for part in parts))

    def sync_context(self, **kwargs: Any) -> AbstractContextManager[None]:  # type: ignore[override]
        """Synchronize as torchmetrics does, and go back to the tally of this rank also after an error."""
        return self._synced(**kwargs)

    @contextmanager
    def _synced(self, should_unsync: bool = True, **kwargs: Any) -> Iterator[None]:
        self.sync(**kwargs)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        """Add up the tallies of all ranks: one collective of a fixed size, and no barrier."""
        if dist_sync_fn is not gather_all_tensors:
            super()._sync_dist(dist_sync_fn, process_group)
            return
        state = self.tally.state
        total = sum_alike_over_ranks(state.flatten(), self.about(), process_group or self.process_group)
        self.tally = self._tally_type(total.view_as(state))

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the tally of another metric that is configured alike, or what its `state_dict` returned."""
        self._require_unsynced()
        incoming = incoming_state.metric_state if isinstance(incoming_state, TallyMetric) else incoming_state
        if isinstance(incoming, dict) and SAVED_AS in incoming:
            options = self._tally_function.__name__, self._update_options(), self._settings
            incoming = {self._state_name: unpack(incoming[SAVED_AS], *options, self.tally.state)[0]}
        if isinstance(incoming, dict) and self._state_name not in incoming:
            other: Any = list(incoming)
            if isinstance(incoming_state, TallyMetric):
                other = f"{type(incoming_state).__name__} with {incoming_state.options}"
            raise ValueError(
                "`incoming_state` must come from a metric with the same options, weights, tables and groups as "
                f"this {type(self).__name__} with {self.options}, got {other}; merge metrics that are configured alike."
            )
        if not isinstance(incoming, dict):
            raise TypeError(
                f"`incoming_state` must be a metric of xent_metrics or its state, got {type(incoming_state).__name__}."
            )
        if self.dist_sync_on_step:
            raise RuntimeError("`merge_state` is not supported with `dist_sync_on_step=True`, as in torchmetrics.")
        state = incoming[self._state_name]
        if not isinstance(state, Tensor):
            raise TypeError(f"`incoming_state` must hold a tensor, got {type(state).__name__}; pass a metric's state.")
        self.tally = self.tally + self._tally_type(state.to(self.device))
        self._computed = None
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a saved state; raise ValueError if a metric with another update, or another rank, saved it."""
        update, decides, own, share = self._tally_function.__name__, self._update_options(), self.tally.state, None
        old_name = name_in_0_1_0(update, decides, own)
        old_keys = [key for key in state_dict if key.startswith(f"{prefix}tally_") and key != prefix + self._state_name]
        state = state_dict.pop(prefix + old_name, None)
        if prefix + SAVED_AS in state_dict:
            saved = state_dict.pop(prefix + SAVED_AS)
            state, share = unpack(saved, update, decides, self._settings, own)
        elif state is None and old_keys:
            raise ValueError(
                f"`{SAVED_AS}` must come from a metric with the same options, but version 0.1.0 saved "
                f"{', '.join(old_keys)}, where {prefix}{old_name} belongs to this {type(self).__name__} with "
                f"{self.options}; load it into a metric that is configured as the one that saved it."
            )
        if state is not None:
            self._require_unsynced()
            state = part_of_rank(state, share, self._place())
            if own.is_meta:
                self.to_empty(device=state.device)  # The metric goes where there are values.
            self._keep(self._tally_type(state.to(self.device)))
            self._computed, self._update_count = None, max(1, self._update_count)  # Or `compute` would warn.
        super()._load_from_state_dict(state_dict, prefix, *args)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot `val`, one value or several from `forward` or `compute`, or the present value, with matplotlib."""
        return self._plot(val, ax)

    def _update_options(self) -> dict[str, Any]:
        own = self.__dict__  # `getattr` of a module looks long for what is None.
        return {name: own[name] for name in self._decides}

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        counted = super()._wrap_update(update)  # torchmetrics counts a call before it is made.

        @wraps(update)
        def checked(*args: Any, **kwargs: Any) -> None:
            count = self._update_count
            try:
                self._check_positional(args)
                counted(*args, **kwargs)
            except Exception:
                self._update_count = count
                raise

        return outside_transforms(checked)

    def _check_positional(self, args: tuple[Any, ...]) -> None:
        """Raise if more than predictions and targets come by position: the rest means something else elsewhere."""
        if len(args) <= self._NUM_POSITIONAL:
            return
        parameters = list(self._update_signature.parameters)
        positional, named = parameters[: self._NUM_POSITIONAL], parameters[self._NUM_POSITIONAL :]
        raise TypeError(
            f"`{'` and `'.join(named)}` must be passed by name, got {len(args)} arguments by position; call it with "
            f"({', '.join(positional)}, {', '.join(f'{name}=...' for name in named)})."
        )

    def _add_batch(self, *args: Any, **kwargs: Any) -> None:
        """Tally a batch and add it: the body of every `update`."""
        self._require_unsynced()
        self._keep(self.tally + self._looked_at_batch(*args, **kwargs))

    def _require_unsynced(self) -> None:
        """Raise where what is added would be lost, as the tally of all ranks gives way to that of this one."""
        if self._is_synced:
            raise TorchMetricsUserError("The metric is synced; call unsync() before adding a batch or loading a state.")

    def _looked_at_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Tally a batch; if it is the first one, warn if its scores look like something else."""
        batch = self._tally_batch(*args, **kwargs)
        if batch.state.device != self.tally.state.device:
            raise ValueError(
                f"`preds` must be on the device of the metric, {self.tally.state.device}, got {batch.state.device}; "
                f"move the metric with .to({str(batch.state.device)!r})."
            )
        if not self._looked_at_preds:
            self._look_at(*args, **kwargs)
        return batch

    def _look_at(self, preds: Tensor | LinearLogits, *_: Any, **__: Any) -> None:
        """Warn if scores look like something else than `input` says."""
        if isinstance(preds, LinearLogits):
            return  # A matmul does not make probabilities.
        class_dim = self.options.class_dim if isinstance(self.options, LossOptions) else None
        self._looked_at_preds |= preds.numel() > 0
        found = input_mismatch_hint(preds, self.options.input, class_dim)
        if found:
            rank_zero_warn(f"`preds` {found}", UserWarning)

    def _tally_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Tally a batch; the arguments are those of `update`."""
        return self._tally_function(*args, **kwargs, **self._update_options())

    def _parts(self, tally: Any) -> Any:
        """Return what is read of what is tallied."""
        return tally.unbind()

    def _read(self, *readings: Reading[Any, Any]) -> Any:
        """Return what the class reports, as tensors on its device."""
        raise NotImplementedError

    def _as_tensor(self, value: float | list[float] | Tensor) -> Tensor:
        """Move a number, or one for each group, to the device."""
        if isinstance(value, Tensor):
            return value
        return torch.tensor(value, dtype=_runtime.widest_float(self.device), device=self.device)

    def _as_tensors(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """Move numbers to the device, floats in one copy and integers in another."""
        moved: dict[str, Tensor] = {}
        for kind, dtype in ((float, _runtime.widest_float(self.device)), (int, torch.int64)):
            names = [name for name, value in values.items() if isinstance(value, kind)]
            if names:  # None where the reading is on the device already.
                numbers = torch.tensor([values[name] for name in names], dtype=dtype, device=self.device)
                moved.update(zip(names, numbers.unbind(), strict=True))
        return {name: moved.get(name, value) for name, value in values.items()}

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


class LossMetric(TallyMetric):
    """A metric of predictions, targets and weights."""

    def update(self, preds: Tensor | LinearLogits, target: Tensor, *, weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
            target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft
                targets, floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
            weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape
                (for soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep
                them well above it: what is below some 1e-12 has few bits left.

        Raises:
            TypeError: If a dtype is not one of those named.
            ValueError: If shapes or devices do not fit; on the CPU also if a target is neither a class nor
                `ignore_index`, a probability is outside [0, 1], or a weight is negative, infinite or NaN (elsewhere
                `compute` raises). The state is then as it was.
        """
        self._add_batch(preds, target, weight=weight)


def token_table(token_bytes: Tensor | None) -> Tensor | None:
    """Return the bytes of tokens where they were, checked."""
    return None if token_bytes is None else as_token_table(on_host(token_bytes)).to(token_bytes.device)
