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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Input = Literal["logits", "log_probs", "probs", "losses"]

_BUFFER_BYTES = {"cpu": 4 * 2**20}  # About the size of two cores' L2, which was fastest of 0.25 to 16 MiB.
_ACCELERATOR_BUFFER_BYTES = 64 * 2**20  # Enough rows to fill the device, small beside its memory.


WEIGHT_LIMIT = 2.0**47
"""Weights of targets and of classes are below this, so that their product fits the limbs of a tally."""


@dataclass(frozen=True)
class LossOptions:
    """What decides the loss of a target, apart from the class weights; two equal options give equal losses.

    Attributes:
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"`, or per-target `"losses"` in nats.
        class_dim: The dimension of `preds` that counts classes: -1, or 1 for PyTorch's `(N, C, ...)`.
        label_smoothing: `a` in the target `(1 - a) * onehot + a / K`.
        ignore_index: The integer target that is not scored; None for none.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
    """

    input: Input = "logits"
    class_dim: int = -1
    label_smoothing: float = 0.0
    ignore_index: int | None = -100
    eps: float | None = None

    def __post_init__(self) -> None:
        if self.input not in get_args(Input):
            raise ValueError(f"`input` must be one of {list(get_args(Input))}, got {self.input!r}.")
        if not _is_integer(self.class_dim):
            raise TypeError(f"`class_dim` must be an integer, got {self.class_dim!r}.")
        if self.ignore_index is not None and not _is_integer(self.ignore_index):
            raise TypeError(f"`ignore_index` must be an integer or None, got {self.ignore_index!r}.")
        if not _is_number(self.label_smoothing) or not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"`label_smoothing` must be a number in [0, 1], got {self.label_smoothing!r}.")
        object.__setattr__(self, "label_smoothing", float(self.label_smoothing))  # 0 and 0.0 are one option.
        if self.eps is not None and (not _is_number(self.eps) or not 0.0 < self.eps < 0.5):
            raise ValueError(f"`eps` must be None or a number in (0, 0.5), got {self.eps!r}.")
        if self.eps is not None and self.input != "probs":
            raise ValueError(
                f"`eps` clips probabilities: it goes with `input='probs'`, not {self.input!r}; leave it out."
            )
        if self.input == "losses" and self.label_smoothing:
            raise ValueError(
                f"`label_smoothing` must be 0 with `input='losses'`, got {self.label_smoothing!r}: smooth "
                "where the losses are made."
            )


class TargetLosses(NamedTuple):
    """The losses of a batch and which of them count; each of shape (sequences, targets in a sequence).

    Attributes:
        loss: Loss of each target in nats, class weights included; anything where the target is not scored.
        norm: What the target adds to the denominator: its class weight, or None for 1.
        ignored: Where the target is `ignore_index`.
        out_of_range: Where the target is neither that nor a class.
    """

    loss: Tensor
    norm: Tensor | None
    ignored: Tensor
    out_of_range: Tensor

    def at(self, index: slice | tuple[slice, slice]) -> TargetLosses:
        """Return a part of the batch."""
        norm = None if self.norm is None else self.norm[index]
        return TargetLosses(self.loss[index], norm, self.ignored[index], self.out_of_range[index])

    def as_sequences(self, shape: torch.Size) -> TargetLosses:
        """View flat targets of this shape as rows: a sequence is a row, or one target where there are no rows."""
        rows = (shape[0], -1) if len(shape) > 1 and self.loss.numel() else (-1, 1)
        norm = None if self.norm is None else self.norm.view(rows)
        return TargetLosses(self.loss.view(rows), norm, self.ignored.view(rows), self.out_of_range.view(rows))


def target_losses(
    preds: Tensor, target: Tensor, options: LossOptions, class_weight: Tensor | None = None
) -> TargetLosses:
    """Compute the loss of every target, without synchronising with the device and without autograd.

    Args:
        preds: Scores with classes on `options.class_dim`, or losses of target's shape with `input="losses"`.
        target: Class indices of any integer dtype, of `preds`' shape without the class dimension; or soft targets,
            floats of `preds`' shape.
        options: How losses are made.
        class_weight: One weight for each class.

    Raises:
        TypeError: If a dtype is not one of those named above.
        ValueError: If shapes or devices do not fit.
    """
    check_tensors(preds, target, options, class_weight)
    with torch.no_grad():
        if class_weight is not None:
            class_weight = class_weight.to(compute_dtype(preds))
        if target.is_floating_point():
            return _score_soft(preds, target, options, class_weight).as_sequences(
                without(preds.shape, options.class_dim)
            )
        index = target.reshape(-1).to(torch.int64)
        return _score_hard(preds, index, options, class_weight).as_sequences(target.shape)


def _score_hard(preds: Tensor, index: Tensor, options: LossOptions, class_weight: Tensor | None) -> TargetLosses:
    """Score flat class indices."""
    ignored = torch.zeros_like(index, dtype=torch.bool)
    if options.ignore_index is not None:
        ignored = index == options.ignore_index
    if options.input == "losses":
        return TargetLosses(preds.reshape(-1).to(compute_dtype(preds)), None, ignored, torch.zeros_like(ignored))
    out_of_range = ~((index >= 0) & (index < preds.shape[options.class_dim]) | ignored)
    index = index.masked_fill(ignored | out_of_range, 0)
    loss = torch.empty(index.shape, dtype=compute_dtype(preds), device=index.device)
    norm = None if class_weight is None else class_weight[index]
    smoothing = options.label_smoothing
    for rows, log_probs, _ in _log_prob_blocks(preds, None, options):
        count = rows.stop - rows.start
        nll = torch.neg(log_probs[:count].gather(1, index[rows, None]).squeeze(1))
        if norm is not None:
            nll.mul_(norm[rows]).masked_fill_(norm[rows] == 0, 0.0)
        if smoothing:
            _weigh(log_probs, class_weight)
            nll.mul_(1 - smoothing) if smoothing < 1 else nll.zero_()  # Not 0 * inf.
            nll.sub_(log_probs.sum(1)[:count], alpha=smoothing / log_probs.shape[1])
        loss[rows] = nll
    return TargetLosses(loss, norm, ignored, out_of_range)


def _score_soft(preds: Tensor, target: Tensor, options: LossOptions, class_weight: Tensor | None) -> TargetLosses:
    """Score targets that are distributions."""
    rows_total = preds.numel() // preds.shape[options.class_dim]
    loss = torch.empty(rows_total, dtype=compute_dtype(preds), device=preds.device)
    smoothing = options.label_smoothing
    for rows, log_probs, probs in _log_prob_blocks(preds, target, options):
        if smoothing:
            probs.mul_(1 - smoothing).add_(smoothing / probs.shape[1])
        if class_weight is not None:
            probs.mul_(class_weight)
        _weigh(log_probs, probs)
        loss[rows] = log_probs.sum(1)[: rows.stop - rows.start].neg_()
    nothing = torch.zeros(rows_total, dtype=torch.bool, device=preds.device)
    return TargetLosses(loss, None, nothing, nothing)


def _weigh(log_probs: Tensor, coefficient: Tensor | None) -> None:
    """Multiply in place; a class of coefficient 0 adds nothing, even where its log-probability is `-inf`."""
    if coefficient is not None:
        log_probs.mul_(coefficient).masked_fill_(coefficient == 0, 0.0)


def _log_prob_blocks(
    preds: Tensor, target: Tensor | None, options: LossOptions
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield ranges of rows, their log-probabilities, and their soft targets where there are any.

    Both are views of one buffer and have at least two rows, the second one meaningless if the range has one: threads
    would share the `sum` over a long row that is alone, and round it differently.
    """
    tensors = [x.movedim(options.class_dim, -1) for x in (preds, target) if x is not None]
    num_classes = tensors[0].shape[-1]
    dtype = compute_dtype(preds)
    size = _BUFFER_BYTES.get(preds.device.type, _ACCELERATOR_BUFFER_BYTES)
    max_rows = max(2, size // (len(tensors) * num_classes * dtype.itemsize))
    num_rows = max(2, min(max_rows, preds.numel() // num_classes))
    buffers = torch.empty(len(tensors), num_rows, num_classes, dtype=dtype, device=preds.device)
    for rows, parts in _row_blocks(tensors, max_rows):
        count = rows.stop - rows.start
        filled = buffers[0, :count]
        source = parts[0]
        if options.input == "logits" and source.dtype == dtype and source.is_contiguous():
            source = source.view(filled.shape)  # The kernel can read these where they are.
        else:
            filled.view(source.shape).copy_(source)
            source = filled
        if target is not None:
            buffers[1, :count].view(parts[1].shape).copy_(parts[1])
        if options.input == "logits":
            torch.log_softmax(source, 1, out=filled)
        elif options.input == "probs":
            if options.eps is not None:
                filled.clamp_(options.eps, 1 - options.eps)
            filled.log_()
        yield rows, buffers[0, : max(2, count)], buffers[-1, : max(2, count)]


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


def compute_dtype(preds: Tensor) -> torch.dtype:
    """Return the dtype that losses of `preds` are computed in: float64 for float64, float32 for the rest."""
    return torch.float64 if preds.dtype == torch.float64 else torch.float32


def raises_now(values: Tensor) -> bool:
    """Decide, for the whole library, whether bad values raise at once or are counted and raise when they are read.

    Looking at a value on an accelerator would stall it, and compiled code cannot raise.
    """
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_class_weight(class_weight: Tensor | None, options: LossOptions) -> None:
    """Raise unless `class_weight` is None or a vector of finite weights that are not negative."""
    if class_weight is None:
        return
    if options.input == "losses":
        raise ValueError("`class_weight` must be None with `input='losses'`: weigh where the losses are made.")
    if not isinstance(class_weight, Tensor) or not class_weight.is_floating_point() or class_weight.dim() != 1:
        raise TypeError(
            f"`class_weight` must be a 1-D float tensor with a weight for each class, got {describe(class_weight)}."
        )
    if not raises_now(class_weight):
        return
    bad = class_weight[~((class_weight >= 0) & (class_weight < WEIGHT_LIMIT))]
    if bad.numel():
        raise ValueError(
            f"`class_weight` must hold finite numbers that are not negative (and below 2**47), got {bad[0].item()}."
        )


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(preds: Tensor, target: Tensor, options: LossOptions, class_weight: Tensor | None) -> None:
    """Raise on dtypes, shapes and devices that do not fit, and say what would."""
    for name, value in (("preds", preds), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}; convert it with torch.as_tensor.")
        if value.layout != torch.strided:
            raise TypeError(f"`{name}` must be a dense tensor, got layout {value.layout}; call .to_dense() on it.")
    if preds.dtype not in _FLOATS:
        raise TypeError(
            f"`preds` must be float16, bfloat16, float32 or float64, got {preds.dtype}; convert it with .float()."
        )
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(
            f"`target` must hold integers (or floats for soft targets), got {target.dtype}; convert it with .long()."
        )
    if preds.device != target.device:
        raise ValueError(
            f"`preds` and `target` must be on one device, got {preds.device} and {target.device}; move one with .to()."
        )
    if options.input == "losses":
        _check_losses(preds, target)
        return
    if not -preds.dim() <= options.class_dim < preds.dim():
        raise ValueError(
            f"`class_dim` must be a dimension of `preds`, got {options.class_dim} for shape {tuple(preds.shape)}."
        )
    num_classes = preds.shape[options.class_dim]
    if num_classes == 0:
        raise ValueError(f"`preds` must have at least one class, got shape {tuple(preds.shape)}; check `class_dim`.")
    if class_weight is not None and class_weight.device != preds.device:
        raise ValueError(
            f"`class_weight` must be on the device of `preds`, {preds.device}, got {class_weight.device}; "
            "move it, or the metric, with .to()."
        )
    if class_weight is not None and class_weight.shape != (num_classes,):
        raise ValueError(
            f"`class_weight` must have one weight for each of the {num_classes} classes, got {class_weight.numel()}."
        )
    _check_shapes(preds, target, options.class_dim)


def _check_losses(preds: Tensor, target: Tensor) -> None:
    if target.is_floating_point():
        raise TypeError(f"`target` must hold integers with `input='losses'`, got {target.dtype}: it gives the mask.")
    if preds.shape != target.shape:
        raise ValueError(
            f"`preds` must have target's shape with `input='losses'`, got {tuple(preds.shape)} and "
            f"{tuple(target.shape)}; "
            "compute them with reduction='none', or pass `input='logits'`."
        )


def _check_shapes(preds: Tensor, target: Tensor, class_dim: int) -> None:
    if target.is_floating_point():
        if target.shape == preds.shape:
            return
        if target.shape == without(preds.shape, class_dim):
            raise TypeError(f"`target` must hold integer class indices, got {target.dtype}; convert it with .long().")
        raise ValueError(
            f"`target` of dtype {target.dtype} is read as soft targets and must have preds' shape "
            f"{tuple(preds.shape)}, "
            f"got {tuple(target.shape)}; pass class indices as integers."
        )
    expected = without(preds.shape, class_dim)
    if target.shape != expected:
        raise ValueError(
            f"`target` must have the shape {tuple(expected)} for `preds` of shape {tuple(preds.shape)} with classes on "
            f"dimension {class_dim}, got {tuple(target.shape)}; {_shape_hint(preds.shape, target.shape, expected)}."
        )


def _shape_hint(preds: torch.Size, target: torch.Size, expected: torch.Size) -> str:
    """Say which change would make the shapes fit."""
    fitting = [dim for dim in range(len(preds)) if without(preds, dim) == target]
    if fitting:
        return f"it would fit with class_dim={fitting[0]}"
    if target == preds:
        return "integers of preds' shape look like one-hot targets: pass their argmax, or floats for soft targets"
    if len(target) == len(expected):
        differing = [dim for dim in range(len(target)) if target[dim] != expected[dim]]
        if len(differing) == 1 and abs(target[differing[0]] - expected[differing[0]]) == 1:
            return "they are one apart: shift, so that preds[:, :-1] is scored against target[:, 1:]"
    return "give every row of classes in `preds` one target"


def describe(value: Any) -> str:
    """Say what was passed, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def without(shape: torch.Size, dim: int) -> torch.Size:
    """Return a shape without one of its dimensions."""
    dim %= len(shape)
    return shape[:dim] + shape[dim + 1 :]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
