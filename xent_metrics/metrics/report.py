"""Every reading of one tally in one metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics.losses.options import Backend, Input, LossOptions
from xent_metrics.metrics.base import token_table
from xent_metrics.metrics.cross_entropy import CrossEntropyMetric
from xent_metrics.reading_info import OF_OTHER_TALLIES, READINGS
from xent_metrics.readings import NanPolicy, Reading
from xent_metrics.tally import Tally

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CrossEntropyReport(CrossEntropyMetric):
    """Every reading of one tally: nats, bits and perplexity with their uncertainty, and the counts behind them.

    One pass, one state and one synchronisation, where a collection of metrics needs one of each.

    The interval is that of a sample of sequences (rows of `target`; of targets, where it has one dimension): tokens of
    one text are not independent, and an interval that pretends they are is too narrow. With C sequences of positive
    weight, loss S_c and weight W_c, `m = S / W` and `se^2 = C / (C - 1) * sum((S_c - m * W_c)^2) / W^2` (the ratio
    estimator). The interval is a quantile of Student's distribution to either side, of an effective number of sequences
    `W^2 / sum(W_c^2)` less 1; `docs/intervals.md` says what it covers.

    Args:
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        shift: Let position t of `preds` score target t + 1, for logits and labels as Hugging Face models have them. The
            time is the last dimension of `target` (not counting classes).
        token_bytes: Bytes of each token, integers, one for each token id, as
            `xent_metrics.token_byte_lengths(tokenizer)` builds them; adds `bits_per_byte` to the values. Ids beyond its
            end are as wrong as ids beyond the classes.
        accuracy: Adds `accuracy`, the share of targets that are the most likely class, to the values; not for soft
            targets, nor for classes that are sharded.
        entropy: Adds `entropy`, the mean entropy of the model's own distribution, in nats; not for classes that are
            sharded.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and their
            weights) out, `"raise"` lets `compute` raise. Losses of `2**94` nats or more count as infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer. `"compile"` compiles that with
            `torch.compile` when it is first needed: some seconds for each dtype, number of classes and set of options,
            whatever the batch sizes (and again in another mode of PyTorch, such as autocast). Its losses agree with the
            others' to a relative 1e-6 and have the same bits in any batch. What it gains is in `docs/benchmarks.md`.
            `"auto"` never compiles: it is `"eager"`, but for a function that you compile, of which it becomes a part
            that the compiler can fuse. Metrics of different backends have different states.
        confidence: Probability that the interval covers the mean over all sequences that might have been drawn.
        sequence_group: The ranks that hold other targets of the same sequences, as with context or sequence
            parallelism; all of them update with the same number of sequences, and each update is one small collective.
            Without it, the part of a sequence that is on one rank counts as a sequence, and the interval is too narrow.
        **kwargs: torchmetrics' own, such as `process_group` and `sync_on_compute`. Only ranks that hold different
            targets are to be added up: pass the data-parallel group where others hold the same targets.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        A dict of scalar tensors: `cross_entropy` (nats), `bits_per_token`, `perplexity`, `cross_entropy_stderr`,
        `cross_entropy_lower`, `cross_entropy_upper`, `perplexity_lower`, `perplexity_upper`; and as int64 `num_tokens`
        (scored, those of non-finite loss included), `num_ignored`, `num_nonfinite`; with `token_bytes` also
        `bits_per_byte`, and what else was asked for. `xent_metrics.reading_info.READINGS` describes each. Without
        targets the floats are NaN and the counts 0. The interval is NaN for fewer than two sequences, where the
        cross-entropy is not finite, where a sequence sums to `2**26` nats or weight, and where weights or deviations
        are too small to square (some 1e-8).

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Cochran, Sampling Techniques, 3rd ed., section 2.11, for the standard error; Kish, Survey Sampling, section
        11.7, for the effective number of sequences; for the rest, Shannon, A Mathematical Theory of Communication,
        1948.

    >>> metric = CrossEntropyReport()
    >>> metric.update(torch.zeros(2, 3, 8), torch.tensor([[0, 1, 2], [3, 4, -100]]))
    >>> {name: round(value.item(), 4) for name, value in metric.compute().items() if "lower" not in name}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'cross_entropy': 2.0794, 'bits_per_token': 3.0, 'perplexity': 8.0, 'cross_entropy_stderr': 0.0,
     'cross_entropy_upper': 2.0794, 'perplexity_upper': 8.0, 'num_tokens': 5, 'num_ignored': 1, 'num_nonfinite': 0}
    """

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        token_bytes: Tensor | None = None,
        accuracy: bool = False,
        entropy: bool = False,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        confidence: float = 0.95,
        sequence_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        options = LossOptions(
            input=input,
            class_dim=class_dim,
            ignore_index=ignore_index,
            eps=eps,
            shift=shift,
            backend=backend,
            accuracy=accuracy,
            entropy=entropy,
        )
        wanted = {"bits_per_byte": token_bytes is not None, "accuracy": accuracy, "entropy": entropy}
        self._others = [name for name, is_wanted in wanted.items() if is_wanted]
        zero = Tally.zero(num_tallies=1 + len(self._others) if self._others else None)
        decides = {"token_bytes": token_table(token_bytes), "sequence_group": sequence_group}
        super().__init__(options, nan_policy, decides, zero, confidence, **kwargs)

    def _read(  # type: ignore[override]
        self, reading: Reading[Any, Any], *others: Reading[Any, Any]
    ) -> dict[str, Tensor]:
        values = {name: getattr(reading, name) for name in READINGS if name not in OF_OTHER_TALLIES}
        for name, other in zip(self._others, others, strict=True):
            values[name] = getattr(other, OF_OTHER_TALLIES[name])
        return self._as_tensors(values)
