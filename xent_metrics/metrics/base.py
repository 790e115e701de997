"""What all metrics share: a tally that grows with every update, as a torchmetrics `Metric`.

The state is one int64 tensor. It is added to, summed over ranks, saved and read; nothing else happens to it. All but
the reading is in `state.py`. A subclass names the function that tallies a batch, and says what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn

from xent_metrics import _runtime
from xent_metrics._validate import as_plain, as_token_table, on_host
from xent_metrics.losses.input_hint import input_mismatch_hint
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import CLASS_TARGETS
from xent_metrics.losses.options import BinaryOptions, LossOptions
from xent_metrics.metrics.atomic import atomic
from xent_metrics.metrics.other_names import check_names
from xent_metrics.metrics.plot import plot_values
from xent_metrics.metrics.state import TallyState
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import DeviceReading, NanPolicy, Reading, check_reading, read_exactly
from xent_metrics.tally import GroupTally, Tally

# What `update` and `compute` consist of, and what else decides what is tallied.
_PARTS = {"update": {"update", "_wrap_update", "_add_batch"}, "compute": {"compute", "_wrap_compute", "read"}}
_TALLIES = {*_PARTS["update"], "_looked_at_batch", "_tally_batch", "_tally_function"}


class TallyMetric(TallyState):
    """A tally with a reading.

    A subclass sets `_tally_function`, and defines `update`, whose arguments are those of that function, and `_read`.
    One outside this library may override what torchmetrics lets it override, and add states.

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
    __jit_ignored_attributes__: ClassVar[list[str]] = [*Metric.__jit_ignored_attributes__, "options", "_calls"]
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "tally"]

    _TARGETS, _WEIGHTS = CLASS_TARGETS, "`weight`"  # What errors say of them.
    _QUANTITY, _UNIT = "cross-entropy", "nats"  # On the axis of a plot.
    _NUM_POSITIONAL = 2  # Arguments of an update: predictions, then targets.
    _overridden: ClassVar[dict[str, type]] = {}  # What classes outside the library define, and which one does.
    _own: ClassVar[frozenset[str]] = frozenset(_PARTS)  # Which of `update` and `compute` they leave alone.
    _calls: dict[str, Callable[..., Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        library = __name__.partition(".")[0] + "."
        bases = [*takewhile(lambda base: base is not TallyMetric, cls.__mro__)]
        others = [base for base in reversed(bases) if not base.__module__.startswith(library)]
        cls._overridden = {name: base for base in others for name in vars(base)}
        cls._own = frozenset(name for name, parts in _PARTS.items() if parts.isdisjoint(cls._overridden))

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
        others = {str(base) for name, base in self._overridden.items() if name in _TALLIES}
        update = " ".join([self._tally_function.__name__, *sorted(others)])
        zero = Tally.zero() if zero is None else zero
        super().__init__(update, {"options": options, **(decides or {})}, zero, **kwargs)
        confidence = as_plain(confidence)
        check_reading(nan_policy, confidence)
        self.nan_policy = nan_policy
        self.confidence = confidence
        self._looked_at_preds = False
        self._remember_calls()

    def _remember_calls(self) -> None:
        self.__dict__["_calls"] = {name: self.__dict__[name] for name in ("update", "compute")}

    def has_own(self, name: str) -> bool:
        """Return whether `update` or `compute` is that of the library: it was not overridden, nor replaced here."""
        return name in self._own and self.__dict__.get(name) is self._calls[name]

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold."""
        return {name: value for name, value in super().__getstate__().items() if name != "_calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a copy or a pickle holds."""
        super().__setstate__(state)
        self._remember_calls()

    @torch.jit.unused
    @outside_transforms
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return its own value, in one pass and without waiting for the device.

        On the CPU the value has the bits that `compute` would give; elsewhere, and for groups, it is read in floating
        point, some 1e-16 off (a standard error 1e-8). It is NaN where `compute` would raise. With
        `dist_sync_on_step=True` it waits, for the device and for the other ranks, and raises if their metrics differ.

        Where a subclass overrides `update` or `compute`, or an object has others, it is they that are called.
        """
        if not self.has_own("update") or not self.has_own("compute"):
            return self._atomically(super().forward, *args, **kwargs)
        self._check_positional(args)
        batch: Any = self._looked_at_batch(*args, **kwargs)
        value = self._value_on_all_ranks(batch) if self.dist_sync_on_step else self._value_of_batch(batch)
        return self._add(batch, value=value)

    @atomic
    def _value_on_all_ranks(self, batch: Any) -> Any:
        self._require_unsynced()
        own = self.tally
        self._keep(batch)
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            value = self._value_of_batch(self.tally)
        self._keep(own)
        return value

    def _value_of_batch(self, batch: Any) -> Any:
        if "read" in self._overridden:
            return self.read(batch)
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
        in_forward = self._enable_grad  # As torchmetrics tells its own ones.
        return self._value_of_batch(self.tally) if in_forward else self.read(self.tally)

    def read(self, tally: Any) -> Any:
        """Return what `compute` returns, and raise as it does, for a tally that was kept elsewhere."""
        parts = self._parts(tally.cpu())
        rules = self.nan_policy, self.confidence, self._TARGETS, self._WEIGHTS
        return self._read(*(read_exactly(part, *rules) for part in parts))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values with matplotlib, on an axis with their unit, and return figure and axes.

        Intervals are bands. Of readings with intervals, the first one is drawn, which is the one in nats. What an own
        `compute` of a subclass returns, torchmetrics draws: its unit is not known here.

        Args:
            val: What `forward` or `compute` returned, or a list of that, each a step; None for the present value.
            ax: Where to draw; None for a new figure.

        Raises:
            TypeError: If `val` is neither.
        """
        return self._plot_values(val, ax)

    def _plot_values(self, val: Any, ax: Any, group_names: Sequence[str] | None = None) -> Any:
        if not self.has_own("compute") and group_names is None:
            return self._plot(val, ax)
        unit = getattr(self, "unit", self._UNIT)
        label = f"{self._QUANTITY} ({unit} per target)" if unit else self._QUANTITY
        values = self.compute() if val is None else val
        is_difference = self.plot_lower_bound is None
        return plot_values(
            values, ax, label=label, confidence=self.confidence, group_names=group_names, has_zero=is_difference
        )

    def _wrap_update(self, update: Callable[..., None]) -> Callable[..., None]:
        if "update" not in self._own:
            # Others may do anything: they are called one at a time, and torchmetrics counts them.
            return outside_transforms(super()._wrap_update(update))

        @wraps(update)
        def checked(*args: Any, **kwargs: Any) -> None:
            self._check_positional(args)
            update(*args, **kwargs)

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
        batch = self._looked_at_batch(*args, **kwargs)
        self._add(batch, num_updates=int("update" in self._own))

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
