"""Bits per byte."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._validate import BYTES_LIMIT, as_num_bytes, as_token_table, check_omitted_bytes
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.mistakes import raise_mistakes
from xent_metrics.losses.options import Backend, Input, LossOptions
from xent_metrics.losses.score import per_byte_losses, score_unweighted
from xent_metrics.metrics.base import TallyMetric, token_table
from xent_metrics.metrics.batch_tallies import read_batch
from xent_metrics.metrics.transforms import outside_transforms
from xent_metrics.readings import NanPolicy, Reading, check_reading
from xent_metrics.tally import Tally, tally_losses


def tally_per_byte(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    num_bytes: int | Tensor | None = None,
    weight: Tensor | None = None,
    options: LossOptions,
    token_bytes: Tensor | None = None,
) -> Tally:
    """Tally a batch whose denominator is bytes: those of its tokens, or `num_bytes`."""
    if (token_bytes is None) == (num_bytes is None):
        raise ValueError(
            "`num_bytes` must be given exactly if there is no `token_bytes` table, got "
            f"{'neither' if num_bytes is None else 'both'}; pass the table once, or the bytes with every batch."
        )
    with _runtime.no_graph():
        losses, weights = score_unweighted(preds, target, weight, options)
        if token_bytes is not None:
            losses = per_byte_losses(losses, target, options, token_bytes).weighted(weights)
            raise_mistakes(losses, preds, target, options, weights, len(token_bytes))
            return tally_losses(losses)
        assert num_bytes is not None
        num_bytes = as_num_bytes(num_bytes, losses.loss, _runtime.raises_eagerly(losses.loss))
        losses = losses.weighted(weights)
        raise_mistakes(losses, preds, target, options, weights)
        return tally_losses(losses).with_weight(total_bytes(num_bytes, losses.loss.device))


def total_bytes(num_bytes: int | Tensor, device: torch.device) -> Tensor:
    """Return the sum of numbers of bytes, on a device; -1 if one of them is none."""
    if isinstance(num_bytes, Tensor):
        each = num_bytes.to(torch.int64)
    else:  # Not as_tensor, of which compiled code makes a constant.
        each = torch.full((), max(-1, min(num_bytes, BYTES_LIMIT)), dtype=torch.int64, device=device)
    invalid = ((each < 0) | (each >= BYTES_LIMIT)).any()
    return torch.where(invalid, -1, each.sum())


class BitsPerByte(TallyMetric):
    """Total bits over the total UTF-8 bytes that the tokens stand for: comparable between tokenizers.

    `sum(weight * loss) / ln 2 / sum(weight * bytes)`, loss in nats. A model whose tokens are longer spends more bits on
    each of them; per byte of text the two can be compared.

    The bytes come from one of two sources: a table of the bytes of each token, given once, or the bytes of the text,
    given with every batch. A token of zero bytes (a special token, which stands for no text) is left out of both sums
    with the table; without it, `ignore_index` or `weight` has to leave it out. `nan_policy="omit"` needs the table,
    since of a target that is left out the bytes are to be left out too.

    Args:
        token_bytes: Integers, one for each token id; `xent_metrics.token_byte_lengths(tokenizer)` builds them from the
            raw bytes of the tokens. Ids beyond its end are as wrong as ids beyond the classes. None, if `num_bytes`
            comes with every batch.
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
        **kwargs: torchmetrics' own, such as `process_group` and `sync_on_compute`. Only ranks that hold different
            targets are to be added up: pass the data-parallel group where others hold the same targets.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        A float64 scalar (float32 where the device has no float64), in bits. NaN without targets, and without bytes.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Graves, Generating sequences with recurrent neural networks, 2013; Gao et al., The Pile, 2020, section 3.1.

    >>> metric = BitsPerByte(token_bytes=torch.tensor([0, 1, 1, 1, 1, 2, 2, 2]))
    >>> metric.update(torch.zeros(4, 8), torch.tensor([0, 1, 5, 6]))
    >>> metric.compute()  # the special token 0 left out: 9 bits for 5 bytes
    tensor(1.8000, dtype=torch.float64)
    """

    _QUANTITY, _UNIT = "bits per byte", ""
    _TARGETS = "class indices in [0, number of classes), for which `token_bytes` has an entry"
    _WEIGHTS = "`weight` (or `num_bytes`)"
    _tally_function = staticmethod(tally_per_byte)

    def __init__(
        self,
        *,
        token_bytes: Tensor | None = None,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        options = LossOptions(
            input=input, class_dim=class_dim, ignore_index=ignore_index, eps=eps, shift=shift, backend=backend
        )
        super().__init__(options, nan_policy, {"token_bytes": token_table(token_bytes)}, **kwargs)

    def update(
        self,
        preds: Tensor | LinearLogits,
        target: Tensor,
        *,
        num_bytes: int | Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
            target: Token ids of any integer dtype and `preds`' shape without the class dimension.
            num_bytes: The bytes of the text that the scored targets stand for, of the whole batch (an integer) or of
                its parts (a tensor, which is summed). Exactly if there is no `token_bytes`.
            weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape
                (for soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep
                them well above it: what is below some 1e-12 has few bits left. None for 1.

        Raises:
            TypeError: If a dtype is not one of those named, or targets are soft where a table is to be looked up.
            ValueError: If shapes or devices do not fit; on the CPU also if a target is neither a class nor
                `ignore_index`, a probability is outside [0, 1], or a weight is negative, infinite or NaN (elsewhere
                `compute` raises). Also if there is both a table and `num_bytes`, or neither, or `num_bytes` is
                negative. The state is then as it was.
        """
        self._add_batch(preds, target, num_bytes=num_bytes, weight=weight)

    def _tally_batch(
        self,
        preds: Tensor | LinearLogits,
        target: Tensor,
        *,
        num_bytes: int | Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tally:
        check_omitted_bytes(self.nan_policy, num_bytes)
        tally: Tally = super()._tally_batch(preds, target, num_bytes=num_bytes, weight=weight)
        return tally

    def _read(self, reading: Reading[Any, Any]) -> Tensor:  # type: ignore[override]
        return self._as_tensor(reading.bits_per_token)


@outside_transforms
def bits_per_byte(
    preds: Tensor | LinearLogits,
    target: Tensor,
    *,
    num_bytes: int | Tensor | None = None,
    weight: Tensor | None = None,
    token_bytes: Tensor | None = None,
    input: Input = "logits",
    class_dim: int = -1,
    ignore_index: int | None = -100,
    eps: float | None = None,
    shift: bool = False,
    nan_policy: NanPolicy = "propagate",
    backend: Backend = "auto",
) -> Tensor:
    """Total bits over the total UTF-8 bytes that the tokens stand for: comparable between tokenizers.

    `sum(weight * loss) / ln 2 / sum(weight * bytes)`, loss in nats. A model whose tokens are longer spends more bits on
    each of them; per byte of text the two can be compared.

    The bytes come from one of two sources: a table of the bytes of each token, given once, or the bytes of the text,
    given with every batch. A token of zero bytes (a special token, which stands for no text) is left out of both sums
    with the table; without it, `ignore_index` or `weight` has to leave it out. `nan_policy="omit"` needs the table,
    since of a target that is left out the bytes are to be left out too.

    Args:
        preds: Scores with classes on `class_dim`: float16, bfloat16, float32 or float64; or `LinearLogits`.
        target: Token ids of any integer dtype and `preds`' shape without the class dimension.
        num_bytes: The bytes of the text that the scored targets stand for, of the whole batch (an integer) or of its
            parts (a tensor, which is summed). Exactly if there is no `token_bytes`.
        weight: Weights that are not negative, or a boolean mask of what to score, broadcastable to target's shape (for
            soft targets, to that without the class dimension). They are summed in units of `2**-64`, so keep them well
            above it: what is below some 1e-12 has few bits left. None for 1.
        token_bytes: Integers, one for each token id; `xent_metrics.token_byte_lengths(tokenizer)` builds them from the
            raw bytes of the tokens. Ids beyond its end are as wrong as ids beyond the classes. None, if `num_bytes`
            comes with every batch.
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

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

    Returns:
        A float64 scalar (float32 where the device has no float64) without a graph: it measures, it does not train. In
        bits; NaN without targets, and without bytes.

    Raises:
        TypeError: If a dtype is not one of those named, or targets are soft where a table is to be looked up.
        ValueError: If an argument is not one of those named, or shapes or devices do not fit; on the CPU also if a
            target is neither a class nor `ignore_index`, a probability is outside [0, 1], a weight is negative,
            infinite or NaN, or a loss is not finite under `nan_policy="raise"` (elsewhere the value is NaN). Also if
            there is both a table and `num_bytes`, or neither, or `num_bytes` is negative.

    Source:
        Graves, Generating sequences with recurrent neural networks, 2013; Gao et al., The Pile, 2020, section 3.1.

    Four tokens of 3 bits each that stand for 6 bytes:

    >>> bits_per_byte(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]), num_bytes=6)
    tensor(2., dtype=torch.float64)
    """
    check_reading(nan_policy)
    check_omitted_bytes(nan_policy, num_bytes)
    table = None if token_bytes is None else as_token_table(token_bytes)
    options = LossOptions(
        input=input, class_dim=class_dim, ignore_index=ignore_index, eps=eps, shift=shift, backend=backend
    )
    batch = tally_per_byte(preds, target, num_bytes=num_bytes, weight=weight, options=options, token_bytes=table)
    return read_batch(batch, nan_policy).bits_per_token
