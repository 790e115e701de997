"""The torchmetrics classes: a tally that grows with every update, and a reading of it.

All of them share one state, a single int64 tensor, and one update. They differ in what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from xent_metrics.exact import widest_float
from xent_metrics.functional import tally_batch
from xent_metrics.losses import Input, LossOptions, check_class_weight
from xent_metrics.readings import DeviceReading, ExactReading, NanPolicy, Unit, check_reading, check_unit, check_valid
from xent_metrics.tally import Tally


class _TallyMetric(Metric):
    """A tally with a reading; subclasses say which reading."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(
        self,
        options: LossOptions,
        class_weight: Tensor | None = None,
        nan_policy: NanPolicy = "propagate",
        confidence: float = 0.95,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_reading(nan_policy, confidence)
        check_class_weight(class_weight, options)
        self.options = options
        self.class_weight = None if class_weight is None else class_weight.detach().clone()
        self.nan_policy = nan_policy
        self.confidence = confidence
        # A MetricCollection merges metrics whose states have equal names and, after one batch, equal values.
        # So the name carries all that decides an update, and nothing that only decides a reading.
        configuration = (options, None if class_weight is None else class_weight.tolist())
        self._state_name = f"tally_{blake2b(repr(configuration).encode(), digest_size=8).hexdigest()}"
        self.add_state(self._state_name, default=Tally.zero().state, dist_reduce_fx="sum")

    @property
    def tally(self) -> Tally:
        """What has been seen since the last reset."""
        return Tally(getattr(self, self._state_name))

    @tally.setter
    def tally(self, tally: Tally) -> None:
        # Rebound, never changed in place: compute groups and wrappers hold the old state, and one made in
        # inference mode must not be written to outside it.
        setattr(self, self._state_name, tally.state)

    def update(self, preds: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64.
            target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft
                targets, floats of `preds`' shape.
            weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape
                (for soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep
                them well above it: what is below some 1e-12 has few bits left.

        Raises:
            TypeError: If a dtype is not one of those named.
            ValueError: If shapes or devices do not fit; on the CPU also if a target is neither a class nor
                `ignore_index`, or a weight is negative, infinite or NaN (elsewhere `compute` raises). The state is
                then as it was.
        """
        try:
            batch = self._tally_batch(preds, target, weight)
        except Exception:
            self._update_count -= 1  # torchmetrics counts the call before it is made.
            raise
        self.tally = self.tally + batch

    def add(self, batch: Tally) -> None:
        """Add a tally that was made elsewhere, by `xent_metrics.functional.tally` or another metric."""
        self.tally = self.tally + batch
        self._computed = None
        self._update_count += 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return its own value, in one pass and without waiting for the device.

        The value is read in floating point, some 1e-16 off, and is NaN where `compute` would raise.
        """
        if self._is_synced:
            raise TorchMetricsUserError("The metric is synced; call unsync() before adding a batch.")
        batch = self._tally_batch(*args, **kwargs)
        accumulated = self.tally + batch
        self.tally = batch
        try:
            with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.dist_sync_on_step):
                value = self._read(DeviceReading(self.tally, self.nan_policy, self.confidence))
        finally:
            self.tally = accumulated
        self._update_count += 1
        self._computed = None
        self._forward_cache = value
        return value

    def compute(self) -> Any:
        """Read the tally; see the class for what the numbers mean.

        Raises:
            ValueError: If targets out of range or invalid weights were counted, or non-finite losses
                under `nan_policy="raise"`. The state is kept.
        """
        totals = self.tally.totals()
        check_valid(totals)
        return self._read(ExactReading(totals, self.nan_policy, self.confidence))

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the tally of another metric that is configured alike."""
        incoming = incoming_state.metric_state if isinstance(incoming_state, _TallyMetric) else incoming_state
        if isinstance(incoming, dict) and self._state_name not in incoming:
            other = incoming_state.options if isinstance(incoming_state, _TallyMetric) else list(incoming)
            raise ValueError(
                "`incoming_state` must come from a metric with the same options and class weights, here "
                f"{self.options}, got {other}; merge metrics whose updates are configured alike."
            )
        super().merge_state(incoming_state)
        self.tally = Tally.zero(self.device) + self.tally
        self._computed = None
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot `val`, one value or several from `forward` or `compute`, or the present value, with matplotlib."""
        return self._plot(val, ax)

    def _tally_batch(self, preds: Tensor, target: Tensor, weight: Tensor | None = None) -> Tally:
        return tally_batch(preds, target, weight, self.options, self.class_weight)

    def _read(self, reading: ExactReading | DeviceReading) -> Any:
        """Return what the class reports, as tensors on its device."""
        raise NotImplementedError

    def _as_tensors(self, values: dict[str, Any]) -> dict[str, Tensor]:
        """Move Python numbers to the device, floats in one copy and integers in another."""
        moved: dict[str, Tensor] = {}
        for kind, dtype in ((float, widest_float(self.device)), (int, torch.int64)):
            names = [name for name, value in values.items() if isinstance(value, kind)]
            if names:  # None where the reading is on the device already.
                numbers = torch.tensor([values[name] for name in names], dtype=dtype, device=self.device)
                moved.update(zip(names, numbers.unbind(), strict=True))
        return {name: moved.get(name, value) for name, value in values.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        """Move to another device, but let nothing cast: `module.to(torch.bfloat16)` would cast readings and weights."""

        def move(x: Tensor) -> Tensor:
            return x.to(fn(x.new_empty(0)).device)

        moved = super()._apply(move, exclude_state)
        if self.class_weight is not None:
            self.class_weight = move(self.class_weight)
        return moved


class CrossEntropy(_TallyMetric):
    """Cross-entropy of a model's distribution and the targets, over all the data at once.

    `H = sum(weight * loss) / sum(weight)` with `loss = -log q[target]`, the value of `F.cross_entropy` on all
    batches of all ranks concatenated. The mean of batch means, which loops usually log, is another number as soon as
    batches differ in their number of targets.

    Sums are exact integers, so the value is the same to the last bit for any batch size, order or number of
    ranks, given the same losses.

    Args:
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        class_weight: A weight for each class, as `weight` in `F.cross_entropy`: the denominator is the sum of
            `class_weight[target] * weight` for class indices, of `weight` for soft targets.
        label_smoothing: `a` in the target `(1 - a) * onehot + a / K`, as in `F.cross_entropy`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        unit: `"nats"`, or `"bits"`, which divides by ln 2.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and
            their weights) out, `"raise"` lets `compute` raise. Losses of `2**94` nats or more count as infinite.
        **kwargs: torchmetrics' own, such as `process_group` and `sync_on_compute`.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        A float64 scalar (float32 where the device has no float64), in `unit`. NaN without targets.

    Raises:
        ValueError: If an argument is not one of those named; see `update` and `compute` for the rest.

    Source:
        Shannon, A Mathematical Theory of Communication, 1948; Goodfellow et al., Deep Learning, section 3.13.

    >>> metric = CrossEntropy()
    >>> metric.update(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    >>> metric.compute()  # log(e**2 + e**1 + e**0.1) - 2
    tensor(0.4170, dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = -100,
        eps: float | None = None,
        unit: Unit = "nats",
        nan_policy: NanPolicy = "propagate",
        **kwargs: Any,
    ) -> None:
        check_unit(unit)
        options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps)
        super().__init__(options, class_weight, nan_policy, **kwargs)
        self.unit = unit

    def _read(self, reading: ExactReading | DeviceReading) -> Tensor:
        value = reading.cross_entropy if self.unit == "nats" else reading.bits_per_token
        return self._as_tensors({"value": value})["value"]


class BitsPerToken(_TallyMetric):
    """Cross-entropy in bits: nats over ln 2, the bits that a code built on the model spends on a token.

    Of the model's distribution, hence without label smoothing and class weights. Arguments, shapes and errors are
    those of `CrossEntropy`; NaN without targets.

    >>> metric = BitsPerToken()
    >>> metric.update(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    >>> metric.compute()  # log2(8): uniform over 8
    tensor(3.0000, dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        nan_policy: NanPolicy = "propagate",
        **kwargs: Any,
    ) -> None:
        super().__init__(LossOptions(input, class_dim, 0.0, ignore_index, eps), None, nan_policy, **kwargs)

    def _read(self, reading: ExactReading | DeviceReading) -> Tensor:
        return self._as_tensors({"value": reading.bits_per_token})["value"]


class Perplexity(_TallyMetric):
    """Exponential of the cross-entropy in nats: the number of equally likely tokens that would be as surprising.

    `exp(H in nats) = 2 ** (H in bits)`, of the pooled cross-entropy, never a mean of perplexities. Of the model's
    distribution, hence without label smoothing and class weights. Arguments, shapes and errors are those of
    `CrossEntropy`; NaN without targets, `inf` only where the value exceeds the largest float64.

    Source:
        Jelinek et al., Perplexity: a measure of the difficulty of speech recognition tasks, 1977.

    >>> metric = Perplexity()
    >>> metric.update(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    >>> metric.compute()  # uniform over 8
    tensor(8.0000, dtype=torch.float64)
    """

    plot_lower_bound = 1.0

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        nan_policy: NanPolicy = "propagate",
        **kwargs: Any,
    ) -> None:
        super().__init__(LossOptions(input, class_dim, 0.0, ignore_index, eps), None, nan_policy, **kwargs)

    def _read(self, reading: ExactReading | DeviceReading) -> Tensor:
        return self._as_tensors({"value": reading.perplexity})["value"]


class CrossEntropyReport(_TallyMetric):
    """Every reading of one tally: nats, bits and perplexity with their uncertainty, and the counts behind them.

    One pass, one state and one synchronisation, where a collection of metrics needs one of each.

    The interval is that of a sample of sequences (rows of `target`; of targets, where it has one dimension): tokens
    of one text are not independent, and an interval that pretends they are is too narrow. With C sequences of
    positive weight, loss S_c and weight W_c, `m = S / W` and `se^2 = C / (C - 1) * sum((S_c - m * W_c)^2) / W^2`
    (the ratio estimator; Cochran, Sampling Techniques, section 2.11), and a normal quantile.

    Args:
        confidence: Probability that the interval covers the mean over all sequences that might have been drawn.

    The other arguments, shapes and errors are those of `CrossEntropy`.

    Returns:
        A dict of scalar tensors: `cross_entropy` (nats), `bits_per_token`, `perplexity`, `cross_entropy_stderr`,
        `cross_entropy_lower`, `cross_entropy_upper`, `perplexity_lower`, `perplexity_upper`; and as int64 `num_tokens`
        (scored, those of non-finite loss included), `num_ignored`, `num_nonfinite`. Without targets the floats are
        NaN and the counts 0. The interval is NaN for fewer than two sequences, where the cross-entropy is not
        finite, where weights are too small to square (below some 1e-9 on average), and where a sequence sums to
        `2**26` nats or weight.

    >>> metric = CrossEntropyReport()
    >>> metric.update(torch.zeros(2, 3, 8), torch.tensor([[0, 1, 2], [3, 4, -100]]))
    >>> {name: round(value.item(), 4) for name, value in metric.compute().items() if "lower" not in name}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'cross_entropy': 2.0794, 'bits_per_token': 3.0, 'perplexity': 8.0, 'cross_entropy_stderr': 0.0,
     'cross_entropy_upper': 2.0794, 'perplexity_upper': 8.0, 'num_tokens': 5, 'num_ignored': 1, 'num_nonfinite': 0}
    """

    _NAMES = (
        "cross_entropy",
        "bits_per_token",
        "perplexity",
        "cross_entropy_stderr",
        "cross_entropy_lower",
        "cross_entropy_upper",
        "perplexity_lower",
        "perplexity_upper",
        "num_tokens",
        "num_ignored",
        "num_nonfinite",
    )

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        nan_policy: NanPolicy = "propagate",
        confidence: float = 0.95,
        **kwargs: Any,
    ) -> None:
        super().__init__(LossOptions(input, class_dim, 0.0, ignore_index, eps), None, nan_policy, confidence, **kwargs)

    def _read(self, reading: ExactReading | DeviceReading) -> dict[str, Tensor]:
        return self._as_tensors({name: getattr(reading, name) for name in self._NAMES})
