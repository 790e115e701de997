"""Whether one model is better than another on the same targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import InWordsOf, as_plain
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import raise_mistakes
from xent_metrics.losses.options import Backend, Input, LossOptions
from xent_metrics.losses.score import as_sequence, score_unweighted
from xent_metrics.losses.target_losses import difference
from xent_metrics.metrics.base import TallyMetric
from xent_metrics.metrics.batch_tallies import read_batch
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.reading_info import READINGS
from xent_metrics.readings import NanPolicy, Reading, check_reading
from xent_metrics.tally import Tally, tally_losses, tally_sequences

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# A tally of differences reads as one of losses does; of ratios, where that takes an exponential.
_READ_AS = {
    name.replace(reading, called): name
    for reading, called in (("cross_entropy", "difference"), ("perplexity", "perplexity_ratio"))
    for name in READINGS
    if name.startswith(reading)
}


def tally_difference(
    preds_a: Tensor | LinearLogits,
    preds_b: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    options: LossOptions,
    sequence_group: ProcessGroup | None = None,
    sequence: Tensor | None = None,
) -> Tally:
    """Tally by how much the losses of `preds_b` exceed those of `preds_a`."""
    with _runtime.no_graph():
        with InWordsOf({"`preds`": "`preds_a`"}):
            first, weights = score_unweighted(preds_a, target, weight, options)
            raise_mistakes(first.weighted(weights), preds_a, target, options, weights)
        with InWordsOf({"`preds`": "`preds_b`"}):
            second, weights = score_unweighted(preds_b, target, weight, options)
            raise_mistakes(second.weighted(weights), preds_b, target, options, weights)
        losses = difference(first, second).weighted(weights)
        if sequence is None:
            return tally_losses(losses, sequence_group)
        return tally_sequences(losses, as_sequence(sequence, target, options, losses, sequence_group))


class CrossEntropyDifference(TallyMetric):
    """Whether model b is better than model a on the same targets, and how sure one can be.

    `difference = H(b) - H(a)` in nats per target: negative where b is better. Its standard error is that of the paired
    differences, clustered by sequence as in `CrossEntropyReport`; what is hard for both models cancels, so it is far
    smaller than those of the two cross-entropies. An interval that does not hold 0 says that one of them is better.
    `perplexity_ratio = exp(difference)` is the perplexity of b over that of a.

    Where both losses are infinite their difference is NaN.

    Args:
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        shift: Let position t of `preds` score target t + 1, for logits and labels as Hugging Face models have them. The
            time is the last dimension of `target` (not counting classes).
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` lets `compute` raise. Losses of `2**94` nats or more count as infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer. `"compile"` compiles that with
            `torch.compile` when it is first needed: some seconds for each dtype, number of classes and set of options,
            whatever the batch sizes (and again in another mode of PyTorch, such as autocast). Its losses agree with the
            others' to a relative 1e-6 and have the same bits in any batch. What it gains is in `docs/benchmarks.md`.
            `"auto"` never compiles: it is `"eager"`, but for a function that you compile, of which it becomes a part
            that the compiler can fuse. Metrics of different backends have different states.
        confidence: Probability that the intervals cover the difference over all sequences that might have been drawn.
        sequence_group: The ranks that hold other targets of the same sequences, as with context or sequence
            parallelism; all of them update with the same number of sequences, and each update is one small collective.
            Without it, the part of a sequence that is on one rank counts as a sequence, and the interval is too narrow.
        **kwargs: torchmetrics' own, such as `process_group` and `sync_on_compute`. Only ranks that hold different
            targets are to be added up: pass the data-parallel group where others hold the same targets.

    Shapes:
        `preds_a` and `preds_b`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets;
        `weight`: broadcastable to `(...)`. A sequence is a row of `target`; a target, where it has one dimension.

    Returns:
        A dict of float64 scalars (float32 where the device has no float64): `difference`, `difference_stderr`,
        `difference_lower`, `difference_upper` (nats), `perplexity_ratio`, `perplexity_ratio_lower`,
        `perplexity_ratio_upper`. NaN without targets; the interval also for fewer than two sequences.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Cochran, Sampling Techniques, 3rd ed., sections 2.11 and 6.5.

    >>> metric = CrossEntropyDifference()
    >>> metric.update(torch.zeros(4, 8), torch.eye(8)[:4].log(), torch.arange(4))  # uniform against certain and right
    >>> values = metric.compute()
    >>> values["difference"], values["perplexity_ratio"]  # -log(8), and 1 / 8
    (tensor(-2.0794, dtype=torch.float64), tensor(0.1250, dtype=torch.float64))
    """

    _QUANTITY, _UNIT = "cross-entropy of b less a", "nats"
    plot_lower_bound = None
    _NUM_POSITIONAL = 3
    _tally_function = staticmethod(tally_difference)

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        confidence: float = 0.95,
        sequence_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        options = LossOptions(
            input=input, class_dim=class_dim, ignore_index=ignore_index, eps=eps, shift=shift, backend=backend
        )
        super().__init__(options, nan_policy, {"sequence_group": sequence_group}, None, confidence, **kwargs)

    def update(
        self,
        preds_a: Tensor | LinearLogits,
        preds_b: Tensor | LinearLogits,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        sequence: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            preds_a: Scores of the model to compare with, with classes on `class_dim`: float16, bfloat16, float32 or
                float64; or `LinearLogits`.
            preds_b: Scores of the model in question, of the same targets.
            target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft targets,
                floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
            weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape
                (for soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep
                them well above it: what is below some 1e-12 has few bits left. None for 1.
            sequence: Integers, broadcastable to target's shape (for soft targets, to that without the class dimension):
                targets of this update with the same number belong to one sequence, as the documents in packed rows do.
                `xent_metrics.sequence_ids` makes them of `cu_seqlens`. None if each row of `target` is a sequence.

        Raises:
            TypeError: If a dtype is not one of those named; it names `preds_a` or `preds_b`.
            ValueError: If shapes or devices do not fit; on the CPU also if a target is neither a class nor
                `ignore_index`, a probability is outside [0, 1], or a weight is negative, infinite or NaN (elsewhere
                `compute` raises). The state is then as it was.
        """
        self._add_batch(preds_a, preds_b, target, weight=weight, sequence=sequence)

    def _look_at(  # type: ignore[override]  # Its arguments are those of `update`.
        self, preds_a: Tensor | LinearLogits, preds_b: Tensor | LinearLogits, *_: Any, **__: Any
    ) -> None:
        super()._look_at(preds_a)
        super()._look_at(preds_b)

    def _read(self, reading: Reading[Any, Any]) -> dict[str, Tensor]:  # type: ignore[override]
        return self._as_tensors({called: getattr(reading, name) for called, name in _READ_AS.items()})


@outside_transforms
def cross_entropy_difference(
    preds_a: Tensor | LinearLogits,
    preds_b: Tensor | LinearLogits,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    sequence: Tensor | None = None,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
    confidence: float = 0.95,
) -> dict[str, Tensor]:
    """Whether model b is better than model a on the same targets, and how sure one can be.

    `difference = H(b) - H(a)` in nats per target: negative where b is better. Its standard error is that of the paired
    differences, clustered by sequence as in `CrossEntropyReport`; what is hard for both models cancels, so it is far
    smaller than those of the two cross-entropies. An interval that does not hold 0 says that one of them is better.
    `perplexity_ratio = exp(difference)` is the perplexity of b over that of a.

    Where both losses are infinite their difference is NaN.

    Args:
        preds_a: Scores of the model to compare with, with classes on `class_dim`: float16, bfloat16, float32 or
            float64; or `LinearLogits`.
        preds_b: Scores of the model in question, of the same targets.
        target: Class indices of any integer dtype and `preds`' shape without the class dimension, or soft targets,
            floats of `preds`' shape: probabilities with a sum of 1 (to 1e-3; to 1e-2 in half precision).
        weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape (for
            soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep them well
            above it: what is below some 1e-12 has few bits left. None for 1.
        sequence: Integers, broadcastable to target's shape (for soft targets, to that without the class dimension):
            targets with the same number belong to one sequence, as the documents in packed rows do. None if each row of
            `target` is a sequence.
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        shift: Let position t of `preds` score target t + 1, for logits and labels as Hugging Face models have them. The
            time is the last dimension of `target` (not counting classes).
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` raises on the CPU, and reads NaN elsewhere. Losses of `2**94` nats or more count as
            infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer; `"compile"` compiles that with
            `torch.compile` when it is first needed; `"auto"` is `"eager"`, but a part of a function that you compile.
        confidence: Probability that the intervals cover the difference over all sequences that might have been drawn.

    Shapes:
        `preds_a` and `preds_b`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets;
        `weight`: broadcastable to `(...)`. A sequence is a row of `target`; a target, where it has one dimension.

    Returns:
        A dict of float64 scalars (float32 where the device has no float64): `difference`, `difference_stderr`,
        `difference_lower`, `difference_upper` (nats), `perplexity_ratio`, `perplexity_ratio_lower`,
        `perplexity_ratio_upper`. NaN without targets; the interval also for fewer than two sequences. Without a graph.

    Raises:
        TypeError: If a dtype is not one of those named; it names `preds_a` or `preds_b`.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target is neither a class nor `ignore_index`, a probability is outside [0, 1], a weight is negative,
            infinite or NaN, or a loss is not finite under `nan_policy="raise"` (elsewhere the value is NaN).

    Source:
        Cochran, Sampling Techniques, 3rd ed., sections 2.11 and 6.5.

    >>> uniform, certain = torch.zeros(4, 8), torch.eye(8)[:4].log()
    >>> cross_entropy_difference(uniform, certain, torch.arange(4))["difference"]  # -log(8)
    tensor(-2.0794, dtype=torch.float64)
    """
    confidence = as_plain(confidence)
    check_reading(nan_policy, confidence)
    options = LossOptions(
        input=input, class_dim=class_dim, ignore_index=ignore_index, eps=eps, shift=shift, backend=backend
    )
    batch = tally_difference(preds_a, preds_b, target, weight=weight, options=options, sequence=sequence)
    reading = read_batch(batch, nan_policy, confidence)
    return {called: getattr(reading, name) for called, name in _READ_AS.items()}
