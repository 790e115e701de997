"""From what a model returns to one loss per target, in nats.

Every layout goes through one kernel: a few rows at a time are copied (and widened to float32) into one reused buffer of
contiguous rows and turned into log-probabilities in place. The obvious `F.cross_entropy(preds.float())` makes up to
four more tensors of the size of the logits. The buffer is a few MiB, whatever the shape, dtype or strides of `preds`.

The second reason is that a loss must not depend on its neighbours: `log_softmax` over contiguous rows gives a row
the same bits in any batch, while other layouts, matmuls and a `sum` over one long row alone (which threads share) do
not.

All losses are `-sum_k t[k] * log q[k]` with target t and model q, in float32 (float64 for float64 `preds`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from xent_metrics import kernels
from xent_metrics.checks import (
    any_of,
    at_hand,
    being_compiled,
    check_binary,
    check_linear,
    check_num_classes,
    check_tensors,
    extremes,
    free_to_look,
    is_integer,
    is_number,
    may_hold,
    multiplied_in,
    no_graph,
    outside,
    present,
    without,
)
from xent_metrics.distributed import VocabShard, is_dtensor, max_over_ranks, sum_over_ranks, vocab_shard
from xent_metrics.exact import LIMIT, widest_float
from xent_metrics.kernels import Backend, Input, Results, compiles, fuses, loss_dtype, run

BinaryInput = Literal["logits", "probs"]
SmoothingOver = Literal["all", "others"]

# Rows in the buffer of a kernel: on the CPU 4 MiB of them, about the size of two cores' L2, fastest of 0.25 to 16 MiB;
# and one for each thread, if that is more. On accelerators, where nothing was measured, a quarter of the 256 MiB that
# Liger Kernel allows itself for temporary logits: to read and write that takes tens of microseconds at 3 TB/s, some
# times as long as starting a kernel.
_BUFFER_BYTES = {"cpu": 4 * 2**20}
_ACCELERATOR_BUFFER_BYTES = 64 * 2**20

# Of logits that are made where they are scored, so many at once, together 64 MiB with a smaller buffer than that above.
# Each matmul reads all of the head's weight: below 128 rows that shows, and above 512 nothing is gained any more.
_LINEAR_BYTES = 63 * 2**20
_LINEAR_BUFFER_BYTES = {"cpu": 2**20}
_FEWEST_LINEAR_ROWS, _MOST_LINEAR_ROWS = 128, 512

# How far the sum of a soft target may be from 1: float32 rounds very little, halves keep 3 digits of each probability.
_SOFT_EXCESS = {torch.float32: 1e-3, torch.float64: 1e-3}
_LOW_PRECISION_SOFT_EXCESS = 1e-2

# Rows that are left out can be skipped if the others are gathered, which costs more than it saves while they are few.
_MOST_SCORED = 0.75
_FEW_SCORES = 2**17  # Less than these are made in the time that it takes to find out which.


@dataclass(frozen=True)
class LossOptions:
    """What decides the loss of a target, apart from the class weights; two equal options give equal losses.

    Attributes:
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"`, or per-target `"losses"` in nats.
        class_dim: The dimension of `preds` that counts classes: -1, or 1 for PyTorch's `(N, C, ...)`.
        label_smoothing: How much of a target is spread over classes.
        ignore_index: The integer target that is not scored; None for none.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        label_smoothing_over: Which classes the smoothing is spread over: `"all"`, or `"others"` than the true one.
        shift: Whether position t of `preds` scores target t + 1.
        backend: Whether a compiler makes the losses.
    """

    input: Input = "logits"
    class_dim: int = -1
    label_smoothing: float = 0.0
    ignore_index: int | None = -100
    eps: float | None = None
    label_smoothing_over: SmoothingOver = "all"
    shift: bool = False
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        _check_choice("input", self.input, get_args(Input))
        _check_choice("backend", self.backend, get_args(Backend))
        _check_choice("label_smoothing_over", self.label_smoothing_over, get_args(SmoothingOver))
        if not is_integer(self.class_dim):
            raise TypeError(f"`class_dim` must be an integer, got {self.class_dim!r}.")
        if not isinstance(self.shift, bool):
            raise TypeError(f"`shift` must be True or False, got {self.shift!r}.")
        _check_ignore_index(self.ignore_index)
        _check_smoothing(self.label_smoothing)
        object.__setattr__(self, "label_smoothing", float(self.label_smoothing))  # 0 and 0.0 are one option.
        _check_eps(self.eps, self.input)
        if self.input == "losses" and self.label_smoothing:
            raise ValueError(
                f"`label_smoothing` must be 0 with `input='losses'`, got {self.label_smoothing!r}: smooth "
                "where the losses are made."
            )
        if self.input == "losses" and self.shift:
            raise ValueError("`shift` must be False with `input='losses'`: they have been aligned with their targets.")

    def smoothing(self, num_classes: int) -> float:
        """Return the share of a target that is spread evenly over all classes."""
        if self.label_smoothing_over == "all" or not self.label_smoothing:
            return self.label_smoothing
        return convert_label_smoothing(self.label_smoothing, num_classes)

    def aligned(self, labels: Tensor) -> Tensor:
        """Return the part of a tensor of target's shape (without classes) that is scored."""
        return labels[..., 1:] if self.shift else labels


@dataclass(frozen=True)
class BinaryOptions:
    """What decides a binary loss, apart from `pos_weight`; two equal options give equal losses.

    Attributes:
        input: What `preds` holds: `"logits"`, or `"probs"`, the probabilities of 1.
        label_smoothing: `a` in the target `(1 - a) * y + a / 2`.
        ignore_index: The target that is not scored; None for none.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing.
        backend: Whether a compiler makes the losses.
    """

    input: BinaryInput = "logits"
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    eps: float | None = None
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        _check_choice("input", self.input, get_args(BinaryInput))
        _check_choice("backend", self.backend, get_args(Backend))
        _check_ignore_index(self.ignore_index)
        _check_smoothing(self.label_smoothing)
        object.__setattr__(self, "label_smoothing", float(self.label_smoothing))
        _check_eps(self.eps, self.input)


def convert_label_smoothing(over_others: float, num_classes: int) -> float:
    """Return the `label_smoothing` of `F.cross_entropy` that equals smoothing over the other classes.

    Two conventions go by one name. PyTorch's, `a`, gives every class `a / K` and the true one `1 - a` more
    (Szegedy et al., Rethinking the Inception Architecture, 2016, section 7). The other, `b`, leaves `1 - b` on the true
    class and gives every other one `b / (K - 1)`, as fairseq does. They agree for `a = b * K / (K - 1)`.

    Args:
        over_others: `b`, the share that is taken from the true class.
        num_classes: `K`.

    Raises:
        ValueError: If `b` is not a number in [0, 1], or above `(K - 1) / K`: the true class would then get less
            than the others, which no `a` in [0, 1] gives.

    For b = 0.1 and K = 3 the target is `[0.9, 0.05, 0.05]`. PyTorch's `a = 0.15` gives `[0.85 + 0.05, 0.05, 0.05]`:

    >>> round(convert_label_smoothing(0.1, num_classes=3), 15)
    0.15
    """
    _check_smoothing(over_others)
    check_num_classes("num_classes", num_classes)
    if over_others > (num_classes - 1) / num_classes:
        raise ValueError(
            f"`label_smoothing` over the other classes must be at most (K - 1) / K = {num_classes - 1}/{num_classes}, "
            f"got {over_others!r}: the true class would get less than the others; lower it."
        )
    return min(1.0, over_others * num_classes / (num_classes - 1)) if over_others else 0.0


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")


def _check_ignore_index(value: int | None) -> None:
    if value is not None and not is_integer(value):
        raise TypeError(f"`ignore_index` must be an integer or None, got {value!r}.")
    if value is not None and not -(2**63) <= value < 2**63:
        raise ValueError(f"`ignore_index` must be an integer that a tensor can hold, got {value!r}; -100 is usual.")


def _check_smoothing(value: float) -> None:
    if not is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"`label_smoothing` must be a number in [0, 1], got {value!r}.")


def _check_eps(eps: float | None, input: str) -> None:
    if eps is None:
        return
    if not is_number(eps) or not 0.0 < eps < 0.5:
        raise ValueError(f"`eps` must be None or a number in (0, 0.5), got {eps!r}.")
    if input != "probs":
        raise ValueError(f"`eps` clips probabilities: it goes with `input='probs'`, not {input!r}; leave it out.")


class LinearLogits(NamedTuple):
    """The logits `hidden @ weight.T + bias` of a language model's head, which are never there as a whole.

    Pass it for `preds` wherever they are logits with classes last. Some hundred rows are multiplied at a time, turned
    into losses and forgotten, so that the `(N, V)` logits, the largest tensor there is, need not fit into memory:

        metric.update(LinearLogits(hidden, model.lm_head.weight), target)

    Args:
        hidden: What goes into the head, of shape `(..., D)`.
        weight: The head's, of shape `(V, D)`, as `torch.nn.Linear` has it.
        bias: The head's, of shape `(V,)`; None for none.

    Shapes:
        The logits are `(..., V)`; `target` is `(...)`, or `(..., V)` for soft targets.

    Values:
        The matmul is in the dtype of its factors, or in autocast's, as `F.linear` would do it; in half precision logits
        are rounded as the model's own. All that follows is in float32 (float64 for float64). A matmul gives a row other
        last bits in another batch, so values agree with those of `F.linear` to 1e-6, and not to the bit.

        The factors are read when they are scored. After an optimizer's step, as in the callback's training hooks, the
        weight is no longer the one that `hidden` goes with: return `losses` there.

    Costs:
        On the CPU the time of `F.linear` and some 10 % more, and 64 MiB; more only above 129,024 classes (twice as many
        in half precision), as fewer than 128 rows at a time would be slow: 126 MiB for 256,000 classes in float32. On
        accelerators, where nothing was measured, 64 MiB more. Under autocast, a copy of a weight that has another dtype
        for each call. Targets that are `ignore_index` are not multiplied on the CPU; elsewhere the host would have to
        wait to know them, and they are.

    Raises:
        TypeError: Where it is used: if one of the three is no tensor of floats, is a DTensor, or they differ in dtype
            outside autocast.
        ValueError: Where it is used: if shapes or devices do not fit, with `input` other than `"logits"`, and with
            `class_dim` other than the last.

    >>> from xent_metrics import CrossEntropy
    >>> metric = CrossEntropy()
    >>> metric.update(LinearLogits(torch.ones(2, 1), weight=torch.tensor([[2.0], [1.0], [0.1]])), torch.tensor([0, 0]))
    >>> metric.compute()  # Of the logits [2.0, 1.0, 0.1], twice
    tensor(0.4170, dtype=torch.float64)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the logits, classes last."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits, as `F.linear` would make them here."""
        return multiplied_in(self.hidden)

    @property
    def device(self) -> torch.device:
        """That of the logits."""
        return self.hidden.device

    def dim(self) -> int:
        """Return the number of dimensions of the logits."""
        return self.hidden.dim()

    def numel(self) -> int:
        """Return the number of logits."""
        return self.shape.numel()

    def narrow(self, dim: int, start: int, length: int) -> LinearLogits:
        """Return some positions of the logits, as a view."""
        return self._replace(hidden=self.hidden.narrow(dim, start, length))


Scores = TypeVar("Scores", bound=Tensor | LinearLogits)
Rows = slice | Tensor  # Which of the rows: a range, or their indices.


class TargetLosses(NamedTuple):
    """The losses of a batch and which of them count; each of shape (sequences, targets in a sequence).

    Attributes:
        loss: Loss of each target in nats, class weights included; anything where the target is not scored.
        norm: What the target adds to the denominator: its class weight or its bytes, or None for 1.
        ignored: Where the target is not to be scored, such as `ignore_index`; None for nowhere, as below.
        out_of_range: Where the target is neither that nor a class, or is no distribution.
        improper: Where a probability of `preds` is outside [0, 1].
    """

    loss: Tensor
    norm: Tensor | None
    ignored: Tensor | None
    out_of_range: Tensor | None
    improper: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TargetLosses:
        """Change every tensor alike."""
        return TargetLosses(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

    @classmethod
    def join(cls, batches: Sequence[TargetLosses]) -> TargetLosses:
        """Put batches whose sequences are equally long one after the other."""

        def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
            if all(part is None for part in parts):
                return None
            pairs = zip(parts, batches, strict=True)
            return torch.cat([_nowhere(batch.loss) if part is None else part for part, batch in pairs])

        return cls(*(joined(parts) for parts in zip(*batches, strict=True)))  # type: ignore[arg-type]

    def at(self, index: slice | tuple[slice, slice]) -> TargetLosses:
        """Return a part of the batch."""
        return self.map(lambda x: x[index])

    def as_sequences(self, shape: torch.Size) -> TargetLosses:
        """View flat targets of this shape as rows: a sequence is a row, or one target where there are no rows."""
        rows = (shape[0], shape[1:].numel()) if len(shape) > 1 else (-1, 1)
        return self.map(lambda x: x.view(rows))

    def within(self, ids: Tensor, limit: int) -> TargetLosses:
        """Also count targets as out of range whose `ids` are not in `[0, limit)`."""
        beyond = outside((ids < 0) | (ids >= limit), self.ignored)
        return self._replace(out_of_range=any_of(self.out_of_range, beyond))

    def per_byte(self, ids: Tensor, token_bytes: Tensor) -> TargetLosses:
        """Let each target add its bytes to the denominator; one without bytes is not scored."""
        within = self.within(ids, len(token_bytes))
        if not len(token_bytes):
            token_bytes = token_bytes.new_zeros(1)  # Every target is out of range, but has to look somewhere.
        num_bytes = token_bytes[ids.masked_fill(any_of(within.ignored, within.out_of_range), 0)]
        silent = outside(num_bytes == 0, within.out_of_range)
        return within._replace(norm=num_bytes.to(widest_float(ids.device)), ignored=any_of(within.ignored, silent))


def _nowhere(loss: Tensor) -> Tensor:
    return torch.zeros_like(loss, dtype=torch.bool)


def target_losses(
    preds: Tensor | LinearLogits, target: Tensor, options: LossOptions, class_weight: Tensor | None = None
) -> TargetLosses:
    """Compute the loss of every target, without synchronising with the device and without autograd.

    Args:
        preds: Scores with classes on `options.class_dim`, or losses of target's shape with `input="losses"`; logits may
            be a DTensor that is sharded over the classes.
        target: Class indices of any integer dtype, of `preds`' shape without the class dimension; or soft targets,
            floats of `preds`' shape.
        options: How losses are made.
        class_weight: One weight for each class.

    Raises:
        TypeError: If a dtype is not one of those named above.
        ValueError: If shapes or devices do not fit.
    """
    check_tensors(_outline(preds, options), target, options.input, options.class_dim, class_weight, options.shift)
    with no_graph():
        if class_weight is not None:
            class_weight = class_weight.to(loss_dtype(preds))
        if isinstance(preds, Tensor) and is_dtensor(preds):
            shard = vocab_shard(preds, options.class_dim)
            if shard is not None:
                return _score_shard(shard, preds.shape, target, options, class_weight)
            preds = preds.to_local()  # type: ignore[attr-defined]
        preds, target = shifted(preds, target, options)
        if target.is_floating_point():
            return _score_soft(preds, target, options, class_weight).as_sequences(
                without(preds.shape, options.class_dim)
            )
        index = as_index(target).reshape(-1)
        return _score_hard(preds, index, options, class_weight).as_sequences(target.shape)


def target_entropies(preds: Tensor | LinearLogits, target: Tensor, options: LossOptions) -> Tensor:
    """Compute the entropy of every target's own distribution, smoothed; flat, and for what `target_losses` accepts."""
    with torch.no_grad():
        preds, target = shifted(preds, target, options)
        num_classes = preds.shape[options.class_dim]
        smoothing = options.smoothing(num_classes)
        if not target.is_floating_point():
            rest = smoothing / num_classes
            nats = _entropy_term(1 - smoothing + rest) + (num_classes - 1) * _entropy_term(rest)
            return torch.full((target.numel(),), nats, dtype=widest_float(preds.device), device=preds.device)
        results = _Results(target.numel() // num_classes)
        for rows, probs, buffer, _, _ in _blocks(target, None, replace(options, input="probs", eps=None)):
            results.add(rows, run(options.backend, kernels.entropy, (probs, buffer), [], smoothing=smoothing))
        return target.new_empty(0, dtype=loss_dtype(target)) if results.joined is None else results.joined[0]


def binary_losses(
    preds: Tensor, target: Tensor, options: BinaryOptions, pos_weight: Tensor | None = None
) -> TargetLosses:
    """Compute `-(pos_weight * y * log p + (1 - y) * log(1 - p))` of every target.

    Both logarithms come from the score itself, never from `1 - p`, and one whose coefficient is 0 adds nothing, so
    that a confident and right prediction costs 0 and a wrong one what it should, up to infinity.

    Args:
        preds: Logits, or probabilities of 1.
        target: 0 and 1 in any dtype, or soft labels between them; of `preds`' shape.
        options: How losses are made.
        pos_weight: Weight of the positive term, broadcastable to `target`.

    Raises:
        TypeError: If a dtype is not one of those named above.
        ValueError: If shapes or devices do not fit.
    """
    if isinstance(preds, LinearLogits):
        raise TypeError(
            "`preds` must be a tensor with yes-or-no targets, got LinearLogits; pass F.linear(hidden, weight, bias), "
            "which is no larger than the targets."
        )
    check_binary(preds, target, pos_weight)
    if not target.is_floating_point():
        target = as_index(target)  # Unsigned integers cannot be compared.
    with torch.no_grad():
        ignored = _is_ignored(target, options)
        out_of_range = _outside_unit(target, ignored)
        rows: tuple[Tensor | None, ...] = preds, target, pos_weight
        if compiles(options.backend):  # For one dimension, whatever the shape.
            rows = tuple(None if x is None else x.expand(target.shape).reshape(-1) for x in rows)
        constants: dict[str, Any] = {"input": options.input, "eps": options.eps, "smoothing": options.label_smoothing}
        loss, improper = run(options.backend, kernels.binary, rows, [], **constants)
        losses = TargetLosses(loss, None, ignored, out_of_range, improper)
        return losses.map(lambda x: x.reshape(-1)).as_sequences(target.shape)


def difference(first: TargetLosses, second: TargetLosses) -> TargetLosses:
    """Subtract the first losses from the second ones, target by target; both are of the same targets."""
    dtype = widest_float(first.loss.device)  # Where that is float64, two float32 losses differ without rounding.

    def wide(loss: Tensor) -> Tensor:
        """Widen; what counts as infinite is infinite also if the other one is as large."""
        return loss.to(dtype).masked_fill(loss >= LIMIT, math.inf).masked_fill(loss <= -LIMIT, -math.inf)

    return second._replace(
        loss=wide(second.loss) - wide(first.loss),
        out_of_range=any_of(first.out_of_range, second.out_of_range),
        improper=any_of(first.improper, second.improper),
    )


def shifted(preds: Scores, target: Tensor, options: LossOptions) -> tuple[Scores, Tensor]:
    """Drop the last position of `preds` and the first of `target`, as views, if that is asked for."""
    if not options.shift:
        return preds, target
    time = max(dim for dim in range(preds.dim()) if dim != options.class_dim % preds.dim())
    length = max(0, preds.shape[time] - 1)
    first: Any = preds.narrow(time, 0, length)
    if target.is_floating_point():
        return first, target.narrow(time, target.shape[time] - length, length)
    return first, target[..., 1:]


def as_index(integers: Tensor) -> Tensor:
    """Convert to int64; what a uint64 has above that becomes the largest index, instead of wrapping to a negative."""
    if integers.dtype == torch.int64:
        return integers
    index = integers.to(torch.int64)
    return index.masked_fill(index < 0, 2**63 - 1) if integers.dtype == torch.uint64 else index


def _entropy_term(p: float) -> float:
    return -p * math.log(p) if p else 0.0


def _is_ignored(target: Tensor, options: LossOptions | BinaryOptions) -> Tensor | None:
    """Say which targets are `ignore_index`; None for none."""
    if options.ignore_index is None:
        return None
    # In a wide type: a narrow one would round `ignore_index` to a target.
    exact = target.to(widest_float(target.device)) if target.is_floating_point() else target
    return exact == options.ignore_index if may_hold(at_hand(exact), options.ignore_index) else None


def _outside_unit(target: Tensor, ignored: Tensor | None) -> Tensor | None:
    """Say which binary targets are not in [0, 1]; None for none."""
    wide = target.dtype in (torch.float32, torch.float64, torch.int64)
    low, high = extremes(at_hand(target if wide else target.to(torch.float32)))
    return None if low >= 0 and high <= 1 else outside(~((target >= 0) & (target <= 1)), ignored)  # A NaN too.


def _sort_out(index: Tensor, num_classes: int, options: LossOptions) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return indices that can all be looked up, and which of the given ones were ignored or no classes."""
    low, high = extremes(at_hand(index))
    all_classes = low >= 0 and high < num_classes
    if all_classes and (options.ignore_index is None or not 0 <= options.ignore_index < num_classes):
        return index, None, None
    ignored, within = _is_ignored(index, options), index.clamp(0, num_classes - 1)
    beyond = None if all_classes else outside(within != index, ignored)
    return within, ignored, None if beyond is None or present(at_hand(beyond)) is None else beyond


def _outline(preds: Tensor | LinearLogits, options: LossOptions) -> Tensor:
    """Return what can be checked as `preds` are: of logits that are not there, one number with their shape."""
    if not isinstance(preds, LinearLogits):
        return preds
    check_linear(*preds, options.input, options.class_dim)
    return preds.hidden.detach().new_empty(()).expand(preds.shape)


def _score_hard(
    preds: Tensor | LinearLogits, index: Tensor, options: LossOptions, class_weight: Tensor | None
) -> TargetLosses:
    """Score flat class indices."""
    if options.input == "losses":
        assert isinstance(preds, Tensor)
        return TargetLosses(preds.reshape(-1).to(loss_dtype(preds)), None, _is_ignored(index, options), None)
    index, ignored, out_of_range = _sort_out(index, preds.shape[options.class_dim], options)
    norm = None if class_weight is None else class_weight[index]
    scored = _rows_to_score(preds, index, any_of(ignored, out_of_range))
    num_classes = preds.shape[options.class_dim]
    smooth, results = options.smoothing(num_classes) > 0, _Results(len(index) if scored is None else len(scored))
    kernel = kernels.reduced if compiles(options.backend) else kernels.looked_up
    constants: dict[str, Any] = {"input": options.input, "eps": options.eps, "smooth": smooth}
    for rows, scores, buffer, _, _ in _blocks(preds, None, options, scored):
        tensors = scores, _of_rows(index, rows), buffer
        results.add(rows, run(options.backend, kernel, tensors, [class_weight], **constants))
    if results.joined is None:
        return TargetLosses(index.new_zeros(index.shape, dtype=loss_dtype(preds)), norm, ignored, out_of_range)
    of_scored = norm if norm is None or scored is None else norm[scored]
    loss, improper = _finished(results.joined, of_scored, class_weight, num_classes, options)
    if scored is not None:  # The others were not made.
        loss = loss.new_zeros(index.shape).index_copy_(0, scored, loss)
        improper = None if improper is None else improper.new_zeros(index.shape).index_copy_(0, scored, improper)
    return TargetLosses(loss, norm, ignored, out_of_range, improper)


def _finished(
    found: Results, norm: Tensor | None, class_weight: Tensor | None, num_classes: int, options: LossOptions
) -> tuple[Tensor, Tensor | None]:
    """Return losses, and what is improper, of what either kernel for class indices returns."""
    if len(found) > 3:  # Of the one that leaves logarithms to be taken.
        weight_of_all = num_classes if class_weight is None else class_weight.sum()
        found = kernels.resolved(*found, input=options.input, weight_of_all=weight_of_all)
    loss, of_all, improper = found
    return kernels.weighted(loss, of_all, norm, options.smoothing(num_classes), num_classes), improper


def _rows_to_score(preds: Tensor | LinearLogits, index: Tensor, left_out: Tensor | None) -> Tensor | None:
    """Return which rows to make, where that can be known and saves something; None for all of them."""
    if not free_to_look(index):
        return None
    linear = isinstance(preds, LinearLogits)
    if not linear and preds.numel() < _FEW_SCORES:
        return None
    if left_out is None:  # Rows of `hidden` that are apart are gathered all the same, to be multiplied together.
        apart = isinstance(preds, LinearLogits) and not preds.hidden.is_contiguous()
        return torch.arange(len(index), device=index.device) if apart else None
    scored = (~left_out).nonzero().squeeze(1)
    return scored if linear or len(scored) <= _MOST_SCORED * len(index) else None


def _score_shard(
    shard: VocabShard, shape: torch.Size, target: Tensor, options: LossOptions, class_weight: Tensor | None
) -> TargetLosses:
    """Score class indices with logits of which each rank has some classes, in two small collectives.

    What ranks exchange is the largest logit of each row, and then the sums of exponentials and the target's logit.
    """
    if options.input != "logits" or target.is_floating_point():
        raise ValueError(
            f"`preds` that are sharded over the classes must be logits with integer targets, got input="
            f"{options.input!r} and {target.dtype} targets; gather them with full_tensor()."
        )
    num_classes = shape[options.class_dim]
    logits, target = shifted(shard.logits, target, options)
    index, ignored, out_of_range = _sort_out(as_index(target).reshape(-1), num_classes, options)
    smoothing = options.smoothing(num_classes)

    rows = logits.movedim(options.class_dim, -1)
    width = rows.shape[-1]
    max_rows = max(2, _BUFFER_BYTES.get(logits.device.type, _ACCELERATOR_BUFFER_BYTES) // (4 * max(1, width)))
    dtype = loss_dtype(logits)
    top = torch.full(index.shape, -math.inf, dtype=dtype, device=index.device)
    blocks = list(_row_blocks([rows], max_rows)) if width else []  # A rank may have no classes at all.
    for block, (part,) in blocks:
        top[block] = part.reshape(-1, width).amax(1).to(dtype)
    top, crooked = _max_and_misfit(top, shard, num_classes)
    out_of_range = any_of(out_of_range, outside(crooked.expand(index.shape), ignored))

    local = index - shard.offset
    here = (local >= 0) & (local < width)
    local = local.masked_fill(~here, 0)
    own_weight = None if class_weight is None else class_weight[shard.offset : shard.offset + width]
    # Of each row: the target's logit, the sum of exponentials, and that of all logits; each relative to the largest.
    sums = torch.zeros(3, len(index), dtype=dtype, device=index.device)
    constants: dict[str, Any] = {"input": "logits", "eps": None, "smooth": smoothing > 0}
    for block, (part,) in blocks:
        tensors = part.reshape(-1, width), local[block], top[block]
        found = run(options.backend, kernels.reduced, tensors, [own_weight], **constants)
        for total, x in zip(sums, found, strict=False):
            if x is not None:
                total[block] = x
    sums[0].masked_fill_(~here, 0.0)
    of_target, exponentials, of_all = sum_over_ranks(sums, shard.group)
    of_all = of_all if smoothing else None
    norm = None if class_weight is None else class_weight[index]
    loss = _finished((of_target, exponentials, of_all, None), norm, class_weight, num_classes, options)[0]
    return TargetLosses(loss, norm, ignored, out_of_range).as_sequences(target.shape)


def _max_and_misfit(top: Tensor, shard: VocabShard, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the largest of each number over ranks, and whether the parts of the ranks do not fit together.

    What has to be known of the parts travels with the numbers. If they do not fit, all ranks raise, where that is free.
    """
    # Not from a list, which the device would have to wait for.
    about = torch.stack([top.new_full((), x) for x in (bool(shard.misfit), num_classes, -num_classes)])
    packed = max_over_ranks(torch.cat([top, about]), shard.group)
    crooked, most, least = packed[-3:].unbind()
    misfit = (crooked > 0) | (most != -least)
    if free_to_look(misfit) and misfit:
        raise ValueError(
            f"`preds` must be a DTensor of the parts that torch.chunk gives, of as many classes on every rank"
            f"{shard.misfit}; pass `shape` and `stride` to DTensor.from_local if the last part is smaller."
        )
    return packed[:-3], misfit


def _score_soft(
    preds: Tensor | LinearLogits, target: Tensor, options: LossOptions, class_weight: Tensor | None
) -> TargetLosses:
    """Score targets that are distributions."""
    kernel = kernels.soft_reduced if compiles(options.backend) else kernels.soft
    results = _Results(target.numel() // preds.shape[options.class_dim])
    constants: dict[str, Any] = {
        "input": options.input,
        "eps": options.eps,
        "smoothing": options.smoothing(preds.shape[options.class_dim]),
        "excess": _SOFT_EXCESS.get(target.dtype, _LOW_PRECISION_SOFT_EXCESS),
    }
    for rows, scores, buffer, probs, probs_buffer in _blocks(preds, target, options):
        tensors = (scores, probs) if compiles(options.backend) else (scores, probs, buffer, probs_buffer)
        results.add(rows, run(options.backend, kernel, tensors, [class_weight], **constants))
    if results.joined is None:
        return TargetLosses(target.new_empty(0, dtype=loss_dtype(preds)), None, None, None)
    joined = results.joined
    loss, out_of_range, improper = kernels.soft_resolved(*joined) if compiles(options.backend) else joined
    return TargetLosses(loss, None, None, out_of_range, improper)


class _Results:
    """What a kernel returns of one block after the other, in whole tensors: many small ones would litter the memory."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows, self._next = num_rows, 0
        self.joined: Results | None = None  # Until there is a block.

    def add(self, rows: Rows, results: Results) -> None:
        """Add what was returned of the next rows."""
        count = _number_of(rows)
        results = tuple(None if x is None else _first(x, count) for x in results)
        if count == self._num_rows:
            self.joined = results
            return
        if self.joined is None:
            self.joined = tuple(None if x is None else x.new_empty(self._num_rows) for x in results)
        for whole, x in zip(self.joined, results, strict=True):
            if x is not None:
                whole[self._next : self._next + count] = x
        self._next += count


def _of_rows(values: Tensor, rows: Rows) -> Tensor:
    """Return what belongs to the rows of a block, of which there are two at least."""
    return _paired(values if values.shape[0] == _number_of(rows) else values[rows])


def _paired(values: Tensor) -> Tensor:
    """Return numbers; two of it, if it is one alone."""
    return values.repeat(2) if values.shape[0] == 1 else values


def _blocks(
    preds: Tensor | LinearLogits, target: Tensor | None, options: LossOptions, scored: Tensor | None = None
) -> Iterator[tuple[Rows, Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """Yield which rows, their scores and a buffer, their soft targets and a buffer, as kernels take them.

    They are all rows, or those that are `scored`, a few at a time; or at once, where a compiler needs no buffers. They
    are contiguous, and two at least, of which the second repeats one that is alone.
    """
    num_classes, dtype = preds.shape[options.class_dim], loss_dtype(preds)
    last, linear = options.class_dim in (-1, preds.dim() - 1), isinstance(preds, LinearLogits)
    tensors = [x if last else x.movedim(options.class_dim, -1) for x in (preds, target) if isinstance(x, Tensor)]
    num_rows, num_buffers = preds.numel() // num_classes, 1 if target is None else 2
    fused = fuses(options.backend)
    if fused and (linear or (scored is None and _all_at_once(tensors))):
        max_rows = max(1, num_rows)
    else:
        max_rows = _rows_in_buffer(preds, num_buffers * num_classes * dtype.itemsize)
    readable = fused or (options.input == "logits" and preds.dtype == dtype)
    whole = None if linear or target is not None or scored is not None else tensors[0]
    if whole is not None and readable and 1 < num_rows <= max_rows and whole.is_contiguous():
        # They are read where they are, and what a kernel makes of them is no larger than a buffer would be.
        yield slice(0, num_rows), whole.view(num_rows, num_classes), None, None, None
        return
    buffers: list[Tensor | None] = [None, None]
    in_place = linear and readable  # Logits that are made here may be written to.
    if not fused and not (in_place and target is None):
        shape = max(2, min(max_rows, num_rows)), num_classes
        buffers[:num_buffers] = [torch.empty(shape, dtype=dtype, device=preds.device) for _ in range(num_buffers)]
    if isinstance(preds, LinearLogits):
        blocks = _linear_blocks(preds, tensors, max_rows, scored)
    elif scored is None:
        blocks = _row_blocks(tensors, max_rows)
    else:
        blocks = _chosen_blocks(tensors[0], max_rows, scored, buffers[0])
    for rows, parts in blocks:
        count = max(2, _number_of(rows))
        buffer, target_buffer = (None if x is None else _first(x, count) for x in buffers)
        scores = _as_rows(parts[0], buffer, readable)
        soft = None if target is None else _as_rows(parts[1], target_buffer, fused)
        yield rows, scores, scores if in_place and not fused else buffer, soft, target_buffer


def _rows_in_buffer(preds: Tensor | LinearLogits, num_bytes: int) -> int:
    """Return how many rows of so many bytes a kernel is given at a time."""
    if isinstance(preds, LinearLogits):
        return max(2, _LINEAR_BUFFER_BYTES.get(preds.device.type, _ACCELERATOR_BUFFER_BYTES) // num_bytes)
    num_rows = max(2, _BUFFER_BYTES.get(preds.device.type, _ACCELERATOR_BUFFER_BYTES) // num_bytes)
    return max(num_rows, torch.get_num_threads()) if free_to_look(preds) else num_rows


def _all_at_once(tensors: list[Tensor]) -> bool:
    """Say whether a compiler can read the rows where they are."""
    return being_compiled() or all(x.is_contiguous() for x in tensors)


def _as_rows(part: Tensor, buffer: Tensor | None, readable: bool) -> Tensor:
    """Return a block as rows: where they are, if they are `readable` there, or in the buffer."""
    num_classes = part.shape[-1]
    if part.numel() == num_classes:
        part, readable = part.reshape(1, num_classes).expand(2, num_classes), False
    if buffer is None:
        return part.contiguous().view(-1, num_classes)
    if readable and part.is_contiguous():
        return part.view(-1, num_classes)
    buffer.view(part.shape).copy_(part)
    return buffer


def _chosen_blocks(
    scores: Tensor, max_rows: int, chosen: Tensor, buffer: Tensor | None
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Yield some of the rows: views where they follow each other in memory, or gathered, in the buffer if it fits."""
    if not len(chosen):
        return
    num_classes, strides = scores.shape[-1], scores.stride()
    if strides[-1] != 1 or any(stride % num_classes for stride in strides[:-1]):
        for rows in chosen.split(max(1, max_rows // 4)):  # What is gathered comes on top of the buffer.
            yield rows, [scores[torch.unravel_index(rows, scores.shape[:-1])]]
        return
    # Where they are in memory, which is all rows, whatever those between them belong to.
    steps = torch.tensor([stride // num_classes for stride in strides[:-1]], device=chosen.device)
    places = (torch.stack(torch.unravel_index(chosen, scores.shape[:-1]), 1) * steps).sum(1)
    memory = scores.as_strided((int(places.max()) + 1, num_classes), (num_classes, 1))
    if buffer is None or buffer.dtype != scores.dtype:
        buffer = scores.new_empty(min(max_rows, len(chosen)), num_classes)
    for rows, here in zip(chosen.split(max_rows), places.split(max_rows), strict=True):
        first = int(here[0])
        if bool((here.diff() == 1).all()):
            yield rows, [memory[first : first + len(rows)]]
        else:
            yield rows, [torch.index_select(memory, 0, here, out=_first(buffer, len(rows)))]


def _linear_blocks(
    preds: LinearLogits, soft: list[Tensor], max_rows: int, scored: Tensor | None
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Make logits of many rows at once, in one buffer; yield at most `max_rows` of them, and their soft targets."""
    num_classes, dtype = preds.shape[-1], preds.dtype
    weight = preds.weight.to(dtype).t()  # Cast once, as autocast does.
    bias = None if preds.bias is None else preds.bias.to(dtype)
    at_once = _LINEAR_BYTES // (num_classes * dtype.itemsize)
    at_once = max(_FEWEST_LINEAR_ROWS, min(at_once, _MOST_LINEAR_ROWS))
    num_rows = min(at_once, preds.numel() // num_classes)
    buffer = torch.empty(num_rows, num_classes, dtype=dtype, device=preds.device)
    for rows, (hidden, *targets) in _hidden_blocks(preds.hidden, soft, at_once, scored):
        logits, flat = buffer[: _number_of(rows)], hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        if bias is None:
            torch.mm(flat, weight, out=logits)
        else:
            torch.addmm(bias, flat, weight, out=logits)
        for some, parts in _row_blocks([logits.view(*hidden.shape[:-1], num_classes), *targets], max_rows):
            yield _among(rows, some), parts


def _hidden_blocks(
    hidden: Tensor, soft: list[Tensor], max_rows: int, scored: Tensor | None
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Yield the rows to multiply at once, all or those that are `scored`, and their soft targets."""
    if scored is None or (hidden.is_contiguous() and len(scored) == hidden.shape[:-1].numel()):
        yield from _row_blocks([hidden, *soft], max_rows)
    elif len(scored):
        for rows in scored.tensor_split(-(-len(scored) // max_rows)):
            yield rows, [hidden[torch.unravel_index(rows, hidden.shape[:-1])]]


def _among(rows: Rows, some: slice) -> Rows:
    """Return some of the rows."""
    return rows[some] if isinstance(rows, Tensor) else slice(rows.start + some.start, rows.start + some.stop)


def _number_of(rows: Rows) -> int:
    return len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start


def _first(rows: Tensor, count: int) -> Tensor:
    """Return the first rows, without asking for a view of all of them."""
    return rows if rows.shape[0] == count else rows[:count]


def _row_blocks(tensors: list[Tensor], max_rows: int, start: int = 0) -> Iterator[tuple[slice, list[Tensor]]]:
    """Cut tensors of one shape `(..., K)` alike into views of at most `max_rows` rows, in row-major order.

    Slicing one dimension at a time never copies, whatever the strides; flattening `(B, T, K)[:, :-1]` would.
    """
    if all(x.is_contiguous() for x in tensors):
        tensors = [x.view(-1, x.shape[-1]) for x in tensors]
    shape = tensors[0].shape[:-1]
    rows = shape.numel()
    if rows <= max_rows:
        if rows:
            yield slice(start, start + rows), tensors
        return
    inner = rows // shape[0]
    num_parts = -(-shape[0] // max(1, max_rows // inner))
    for parts in zip(*(x.split(-(-shape[0] // num_parts)) for x in tensors), strict=True):
        count = parts[0].shape[0] * inner
        if inner > max_rows:
            yield from _row_blocks([part[0] for part in parts], max_rows, start)
        else:
            yield slice(start, start + count), list(parts)
        start += count
