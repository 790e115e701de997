"""Pure functions: losses, a tally, a reading, for one batch or for all the data at once.

Nothing here keeps state or builds a graph, and nothing waits for an accelerator. Bad values raise at once where
looking at them is free, on the CPU; elsewhere, and in compiled code, they are counted in the tally and read as NaN.
Scores that only look like something else than `input` says draw no warning here, as they do in the metrics.
"""

from __future__ import annotations

import math

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import (
    as_token_table,
    check_class_weight,
    check_distributions,
    check_num_classes,
    check_omitted_bytes,
    check_pos_weight,
)
from xent_metrics.batch import (
    decomposed,
    tally_batch,
    tally_binary,
    tally_by_class,
    tally_decomposition,
    tally_difference,
    tally_grouped,
    tally_per_byte,
)
from xent_metrics.distributed import is_distributed
from xent_metrics.losses.dense import target_losses
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import raise_mistakes
from xent_metrics.losses.options import (
    Backend,
    BinaryInput,
    BinaryOptions,
    Input,
    LossOptions,
    SmoothingOver,
    convert_label_smoothing,
)
from xent_metrics.losses.score import target_shape
from xent_metrics.losses.target_losses import IGNORED, SCORED
from xent_metrics.readings import (
    DIFFERENCE,
    DeviceReading,
    ExactReading,
    NanPolicy,
    Unit,
    check_reading,
    check_unit,
    check_valid,
    decomposition,
)
from xent_metrics.tally.tally import GroupTally, Tally

__all__ = [
    "binary_cross_entropy",
    "bits_per_byte",
    "bits_per_token",
    "convert_label_smoothing",
    "cross_entropy",
    "cross_entropy_decomposition",
    "cross_entropy_difference",
    "grouped_cross_entropy",
    "normalized_cross_entropy",
    "per_target_losses",
    "perplexity",
    "tally",
]


def cross_entropy(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    unit: Unit = "nats",
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of all targets at once: the sum of `weight * loss` over the sum of `weight`.

    Arguments, errors and the value without targets (NaN) are those of `xent_metrics.CrossEntropy`. The result is a
    float64 scalar (float32 where the device has no float64) without a graph: it measures, it does not train.

    >>> cross_entropy(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    tensor(0.4170, dtype=torch.float64)
    """
    check_unit(unit)
    check_class_weight(class_weight, input)
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, shift, backend)
    reading = _read(tally_batch(preds, target, weight, options, class_weight), nan_policy)
    return reading.cross_entropy if unit == "nats" else reading.bits_per_token


def bits_per_token(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy in bits, nats over ln 2; see `xent_metrics.BitsPerToken`.

    >>> bits_per_token(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    tensor(3.0000, dtype=torch.float64)
    """
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend)
    return _read(tally_batch(preds, target, weight, options), nan_policy).bits_per_token


def perplexity(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Exponential of the cross-entropy in nats; see `xent_metrics.Perplexity`.

    >>> perplexity(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    tensor(8.0000, dtype=torch.float64)
    """
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend)
    return _read(tally_batch(preds, target, weight, options), nan_policy).perplexity


def bits_per_byte(
    preds: Tensor | LinearLogits,
    target: Tensor,
    num_bytes: int | Tensor | None = None,
    weight: Tensor | None = None,
    *,
    token_bytes: Tensor | None = None,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Total bits over total UTF-8 bytes; see `xent_metrics.BitsPerByte`.

    Four tokens of 3 bits each that stand for 6 bytes:

    >>> bits_per_byte(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]), num_bytes=6)
    tensor(2.0000, dtype=torch.float64)
    """
    check_reading(nan_policy)
    check_omitted_bytes(nan_policy, num_bytes)
    if token_bytes is not None:
        token_bytes = as_token_table(token_bytes)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend)
    return _read(tally_per_byte(preds, target, num_bytes, weight, options, token_bytes), nan_policy).bits_per_token


def binary_cross_entropy(
    preds: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: BinaryInput = "logits",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    eps: float | None = None,
    unit: Unit = "nats",
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Binary cross-entropy of all targets at once; see `xent_metrics.BinaryCrossEntropy`.

    >>> binary_cross_entropy(torch.tensor([0.99, 0.01, 0.99]), torch.tensor([1, 0, 1]), input="probs")
    tensor(0.0101, dtype=torch.float64)
    """
    check_unit(unit)
    check_pos_weight(pos_weight)
    check_reading(nan_policy)
    options = BinaryOptions(input, label_smoothing, ignore_index, eps, backend)
    reading = _read(tally_binary(preds, target, weight, options, pos_weight), nan_policy)
    return reading.cross_entropy if unit == "nats" else reading.bits_per_token


def cross_entropy_decomposition(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> dict[str, Tensor]:
    """Cross-entropy, entropy and KL divergence; see `xent_metrics.CrossEntropyDecomposition`.

    >>> values = cross_entropy_decomposition(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
    >>> [round(value.item(), 4) for value in values.values()]
    [0.6931, 0.6931, 0.0]
    """
    check_reading(nan_policy)
    check_distributions(input)
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, backend=backend)
    batch = tally_decomposition(preds, target, weight, options)
    return decomposition(*(_read(part, nan_policy) for part in decomposed(batch, nan_policy)))


def grouped_cross_entropy(
    preds: Tensor | LinearLogits,
    target: Tensor,
    group: Tensor,
    weight: Tensor | None = None,
    *,
    num_groups: int,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    unit: Unit = "nats",
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of each group of targets; see `xent_metrics.GroupedCrossEntropy`.

    >>> grouped_cross_entropy(torch.zeros(3, 8), torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2]), num_groups=3)
    tensor([2.0794,    nan, 2.0794], dtype=torch.float64)
    """
    check_unit(unit)
    check_num_classes("num_groups", num_groups)
    check_class_weight(class_weight, input)
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, shift, backend)
    batch = tally_grouped(preds, target, group, weight, options, class_weight, num_groups)
    reading = _read(batch, nan_policy)
    return reading.cross_entropy if unit == "nats" else reading.bits_per_token


def normalized_cross_entropy(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    num_classes: int,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy over the entropy of the class frequencies; see `xent_metrics.NormalizedCrossEntropy`.

    >>> normalized_cross_entropy(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]), num_classes=2)
    tensor(1.0000, dtype=torch.float64)
    """
    check_num_classes("num_classes", num_classes, 2)
    check_reading(nan_policy)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, backend=backend)
    return _read(tally_by_class(preds, target, weight, options, num_classes), nan_policy).normalized_cross_entropy


def cross_entropy_difference(
    preds_a: Tensor | LinearLogits,
    preds_b: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
    confidence: float = 0.95,
) -> dict[str, Tensor]:
    """By how much model b is better or worse than model a; see `xent_metrics.CrossEntropyDifference`.

    >>> uniform, certain = torch.zeros(4, 8), torch.eye(8)[:4].log()
    >>> cross_entropy_difference(uniform, certain, torch.arange(4))["difference"]  # -log(8)
    tensor(-2.0794, dtype=torch.float64)
    """
    check_reading(nan_policy, confidence)
    options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend)
    reading = _read(tally_difference(preds_a, preds_b, target, weight, options), nan_policy, confidence)
    return {name: getattr(reading, attribute) for name, attribute in DIFFERENCE.items()}


def per_target_losses(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Loss of every target in nats, as `F.cross_entropy(..., reduction="none")` but without its copies of the logits.

    Returns:
        Losses of target's shape (for soft targets, without the class dimension), float32, or float64 for float64
        `preds`; 0 where the target is ignored. Without a graph.

    Raises:
        ValueError: On the CPU, if a target or a probability is out of range; elsewhere its loss is NaN.

    >>> per_target_losses(torch.tensor([[2.0, 1.0, 0.1], [0.0, 0.0, 0.0]]), torch.tensor([0, -100]))
    tensor([0.4170, 0.0000])
    """
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, backend=backend)
    check_class_weight(class_weight, input)
    losses = target_losses(preds, target, options, class_weight)
    raise_mistakes(losses, preds, target, options, counted=False)
    loss, status = losses.loss, losses.status
    if status is not None:
        loss = loss.masked_fill(status == IGNORED, 0.0).masked_fill((status != SCORED) & (status != IGNORED), math.nan)
    return loss.reshape(target_shape(target, options))


def tally(
    preds: Tensor | LinearLogits,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    input: Input = "logits",
    class_dim: int = -1,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    label_smoothing_over: SmoothingOver = "all",
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    backend: Backend = "auto",
) -> Tally:
    """Exact sums and counts of a batch, to be added to other tallies; see `xent_metrics.tally.Tally`.

    >>> batch = tally(torch.zeros(4, 8), torch.tensor([0, 1, 2, -100]))
    >>> (batch + batch).totals().scored
    6
    """
    options = LossOptions(input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, shift, backend)
    check_class_weight(class_weight, input)
    batch = tally_batch(preds, target, weight, options, class_weight)
    return Tally.zero(batch.state.device) + batch


def _read(batch: Tally | GroupTally, nan_policy: NanPolicy, confidence: float = 0.95) -> DeviceReading:
    """Read the tally of a batch; raise on losses that are not finite where that is asked for, and free."""
    counted = is_distributed() and _runtime.can_read_values(batch.state)  # Instead of raised already.
    if counted or (nan_policy == "raise" and _runtime.raises_eagerly(batch.state)):
        if isinstance(batch, GroupTally):
            totals, groupless = batch.overall().totals(), int(batch.num_groupless())
        else:
            totals, groupless = batch.totals(), 0
        check_valid(totals, groupless, kept=False)
        ExactReading(totals, nan_policy).require_finite()
    return DeviceReading(batch, nan_policy, confidence)
