"""What may be passed in: the checks of arguments, each with one sentence that says what to do instead.

Types, shapes and devices are checked always, since that costs nothing. Values are checked here only where an argument
is given once, such as a class weight; those of a batch get a status each (`losses/mistakes.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.distributed import is_dtensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

WEIGHT_LIMIT = 2.0**47
"""Weights of targets and of classes are below this, so that their product fits the limbs of a tally."""

BYTES_LIMIT = 2**47
"""Numbers of bytes of a batch are below this, so that they can be summed for ever."""

_TOKEN_BYTES_LIMIT = 2**24  # Exact in float32 too.

TO_BINARY = "one column of scores with yes-or-no targets goes to BinaryCrossEntropy"


def on_host(values: Any) -> Any:
    """Copy a tensor to the host if there is anything to copy: a metric that is being made may wait for its device."""
    return values.cpu() if isinstance(values, Tensor) and not values.is_meta else values


def check_has_values(name: str, value: Tensor) -> None:
    """Raise if a tensor is on the meta device, where what is kept has no values."""
    if value.is_meta:
        raise ValueError(
            f"`{name}` must have values, got {describe(value)} on the meta device; make it with device='cpu', and the "
            "metric with it."
        )


def check_class_weight(class_weight: Tensor | None, input: str) -> None:
    """Raise unless `class_weight` is None or a vector of finite weights that are not negative."""
    if class_weight is None:
        return
    if input == "losses":
        raise ValueError("`class_weight` must be None with `input='losses'`: weigh where the losses are made.")
    if not isinstance(class_weight, Tensor) or not class_weight.is_floating_point() or class_weight.dim() != 1:
        raise TypeError(
            f"`class_weight` must be a 1-D float tensor with a weight for each class, got {describe(class_weight)}; "
            "make it with torch.tensor."
        )
    _check_dense("class_weight", class_weight)
    _check_weights("class_weight", class_weight)


def check_pos_weight(pos_weight: Tensor | None) -> None:
    """Raise unless `pos_weight` is None or holds finite weights that are not negative."""
    if pos_weight is None:
        return
    if not isinstance(pos_weight, Tensor) or not pos_weight.is_floating_point():
        raise TypeError(
            f"`pos_weight` must be a float tensor that is broadcastable to `target`, got {describe(pos_weight)}; make "
            "it with torch.tensor."
        )
    _check_dense("pos_weight", pos_weight)
    _check_weights("pos_weight", pos_weight)


def _check_weights(name: str, weights: Tensor) -> None:
    if not _runtime.can_read_values(weights):
        return
    bad = weights[~((weights >= 0) & (weights < WEIGHT_LIMIT))]
    if bad.numel():
        raise ValueError(
            f"`{name}` must hold finite numbers that are not negative (and below 2**47), got {bad[0].item()}."
        )


def as_token_table(token_bytes: Tensor) -> Tensor:
    """Return `token_bytes` as int64; raise unless it is a vector of integers that can be numbers of bytes."""
    if not isinstance(token_bytes, Tensor) or token_bytes.dim() != 1 or not is_integral(token_bytes):
        raise TypeError(
            f"`token_bytes` must be a 1-D integer tensor with the bytes of each token, got {describe(token_bytes)}; "
            "build it with token_byte_lengths(tokenizer)."
        )
    _check_dense("token_bytes", token_bytes)
    table = token_bytes.to(torch.int64)
    if _runtime.can_read_values(table):
        bad = table[(table < 0) | (table >= _TOKEN_BYTES_LIMIT)]
        if bad.numel():
            raise ValueError(
                f"`token_bytes` must hold numbers of bytes, not negative and below 2**24, got {bad[0].item()}; use 0 "
                "for tokens that stand for no text."
            )
    return table


def as_num_classes(name: str, value: Any, minimum: int = 1) -> int:
    """Return a number of classes or groups as a Python number; raise unless it is a number of some."""
    number = as_plain(value)
    if not is_integer(number) or number < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")
    return int(number)


def check_tensors(
    preds: Tensor, target: Tensor, input: str, class_dim: int, class_weight: Tensor | None, shift: bool
) -> None:
    """Raise on dtypes, shapes and devices that do not fit, and say what would."""
    _check_pair(preds, target, may_be_spread=("preds",))
    if target.dtype == torch.bool or target.is_complex():
        fix = (
            TO_BINARY
            if target.dtype == torch.bool and preds.shape[class_dim:][:1] == (1,)
            else "convert it with .long()"
        )
        raise TypeError(f"`target` must hold integers (or floats for soft targets), got {target.dtype}; {fix}.")
    if input == "losses":
        _check_losses(preds, target)
        return
    if not -preds.dim() <= class_dim < preds.dim():
        raise ValueError(f"`class_dim` must be a dimension of `preds`, got {class_dim} for shape {tuple(preds.shape)}.")
    num_classes = preds.shape[class_dim]
    if num_classes == 0:
        raise ValueError(f"`preds` must have at least one class, got shape {tuple(preds.shape)}; check `class_dim`.")
    if class_weight is not None:
        check_device("class_weight", class_weight, preds)
        if class_weight.shape != (num_classes,):
            raise ValueError(
                f"`class_weight` must have one weight for each of the {num_classes} classes, got "
                f"{class_weight.numel()}."
            )
    _check_shapes(preds, target, class_dim)
    if shift and preds.dim() < 2:
        raise ValueError(
            f"`preds` must have a dimension of time beside the classes with `shift=True`, got shape "
            f"{tuple(preds.shape)}; leave `shift` out."
        )


def check_binary(preds: Tensor, target: Tensor, pos_weight: Tensor | None) -> None:
    """Raise on dtypes, shapes and devices that do not fit binary predictions."""
    _check_pair(preds, target)
    if target.is_complex():
        raise TypeError(f"`target` must hold 0, 1 or numbers between them, got {target.dtype}.")
    if preds.shape != target.shape:
        fix = _reshaping("target", target.shape, preds.shape) or "two columns of scores go to CrossEntropy"
        raise ValueError(
            f"`preds` and `target` must have one shape, got {tuple(preds.shape)} and {tuple(target.shape)}; {fix}."
        )
    if pos_weight is not None:
        check_device("pos_weight", pos_weight, preds)
        check_broadcastable("pos_weight", pos_weight, target.shape, "give one weight, or one for each column")


def check_broadcastable(name: str, value: Tensor, shape: torch.Size, hint: str) -> None:
    """Raise unless a tensor can be expanded to target's shape."""
    last = shape[max(len(shape) - value.dim(), 0) :]
    fits = len(last) == value.dim() and all(own in (1, size) for own, size in zip(value.shape, last, strict=True))
    if not fits:
        hint = _reshaping(name, value.shape, shape) or hint
        raise ValueError(
            f"`{name}` must be broadcastable to target's shape {tuple(shape)}, got {tuple(value.shape)}; {hint}."
        )


def check_weight(weight: Tensor, shape: torch.Size, preds: Tensor) -> None:
    """Raise unless `weight` is a tensor of numbers or booleans for targets of this shape."""
    check_not_nested("weight", weight)
    if not isinstance(weight, Tensor) or weight.is_complex() or weight.layout != torch.strided:
        raise TypeError(
            f"`weight` must be a dense tensor of real numbers or booleans, got {describe(weight)}; make it with "
            "torch.tensor."
        )
    check_device("weight", weight, preds)
    check_broadcastable(
        "weight",
        weight,
        shape,
        "weights of sequences go in as weight[:, None], those of classes as `class_weight`",
    )


def check_distributions(input: str) -> None:
    """Raise if `input` does not say what the model's distribution is."""
    if input == "losses":
        raise ValueError(
            "`input` must be 'logits', 'log_probs' or 'probs', got 'losses': a loss does not say what the entropy was."
        )


def check_hard(target: Tensor, reason: str) -> None:
    """Raise unless targets are class indices."""
    if target.is_floating_point():
        raise TypeError(f"`target` must hold integer class indices, got {target.dtype}: {reason}.")


def as_num_bytes(num_bytes: int | Tensor, preds: Tensor, looks: bool) -> int | Tensor:
    """Return a number of bytes, or a tensor of such numbers; raise unless it is one, and look only if asked to."""
    if not isinstance(num_bytes, Tensor):
        num_bytes = as_plain(num_bytes)
    check_not_nested("num_bytes", num_bytes)
    if isinstance(num_bytes, Tensor):
        if not is_integral(num_bytes):
            raise TypeError(f"`num_bytes` must hold integers, got {describe(num_bytes)}; convert it with .long().")
        _check_dense("num_bytes", num_bytes)
        check_device("num_bytes", num_bytes, preds)
        each = num_bytes.to(torch.int64)  # Unsigned ones cannot be compared.
        bad = looks and bool(((each < 0) | (each >= BYTES_LIMIT)).any())
    elif not is_integer(num_bytes):
        raise TypeError(
            f"`num_bytes` must be an integer or a tensor of integers, got {describe(num_bytes)}; pass their sum."
        )
    else:
        bad = looks and not 0 <= num_bytes < BYTES_LIMIT
    if bad:
        raise ValueError(
            f"`num_bytes` must not be negative (and below 2**47), got {num_bytes}; count the UTF-8 bytes of the text."
        )
    return num_bytes


def check_omitted_bytes(nan_policy: str, num_bytes: int | Tensor | None) -> None:
    """Raise if losses are to be left out whose bytes cannot be."""
    if nan_policy == "omit" and num_bytes is not None:
        raise ValueError(
            "`nan_policy` must not be 'omit' with `num_bytes`, which hold the bytes of the targets that would be left "
            "out; pass `token_bytes`, or another policy."
        )


def check_ids(name: str, ids: Tensor, shape: torch.Size, preds: Tensor) -> None:
    """Raise unless `group` or `sequence` is a tensor of integers for targets of this shape."""
    check_not_nested(name, ids)
    if not isinstance(ids, Tensor) or not is_integral(ids) or ids.layout != torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor of integers, got {describe(ids)}; convert it with .long().")
    check_device(name, ids, preds)
    check_broadcastable(name, ids, shape, f"give each target, or each row as a column, its {name}")


def _check_pair(preds: Tensor, target: Tensor, may_be_spread: tuple[str, ...] = ()) -> None:
    for name, value in (("preds", preds), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}; {as_tensor_hint(value)}.")
        if is_dtensor(value) and name not in may_be_spread:
            raise TypeError(f"`{name}` must be a plain tensor, got a DTensor; pass its to_local() or full_tensor().")
        _check_dense(name, value)
    if preds.dtype not in FLOATS:
        swapped = target.is_floating_point() and target.dim() > preds.dim()
        fix = "pass predictions first, then targets" if swapped else "convert it with .float()"
        raise TypeError(f"`preds` must be float16, bfloat16, float32 or float64, got {preds.dtype}; {fix}.")
    if preds.device != target.device:
        raise ValueError(
            f"`preds` and `target` must be on one device, got {preds.device} and {target.device}; move one with .to()."
        )


def as_tensor_hint(value: Any, parts: tuple[str, ...] = ("logits", "data")) -> str:
    """Return how to get a tensor of what was passed for one; `parts` are attributes that may be it."""
    for part in parts:
        if isinstance(getattr(value, part, None), Tensor):
            return f"pass its .{part}"
    if isinstance(value, Mapping):
        return f"pass one of its values, which are {[*value][:9]}"
    if isinstance(value, (tuple, list)) and any(isinstance(x, Tensor) for x in value):
        return "pass one of its tensors, or torch.cat of them"
    return "convert it with torch.as_tensor"


def check_not_nested(name: str, value: Any) -> None:
    """Raise if a value is a nested tensor, of which the strided ones do not even have a shape."""
    if isinstance(value, Tensor) and value.is_nested:
        raise TypeError(
            f"`{name}` must be a dense tensor, got a nested one of {value.dtype} and layout {value.layout}; pass "
            f"torch.cat({name}.unbind()), and the others alike."
        )


def _check_dense(name: str, value: Tensor) -> None:
    check_not_nested(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor, got layout {value.layout}; call .to_dense() on it.")


def check_device(name: str, value: Tensor, preds: Tensor) -> None:
    """Raise unless a tensor is where `preds` are."""
    if value.device != preds.device:
        raise ValueError(
            f"`{name}` must be on the device of `preds`, {preds.device}, got {value.device}; move it, or the metric, "
            "with .to()."
        )


def _check_losses(preds: Tensor, target: Tensor) -> None:
    if target.is_floating_point():
        raise TypeError(f"`target` must hold integers with `input='losses'`, got {target.dtype}: it gives the mask.")
    if preds.shape != target.shape:
        fix = _reshaping("target", target.shape, preds.shape)
        fix = fix or "compute them with reduction='none', or pass `input='logits'`"
        raise ValueError(
            f"`preds` must have target's shape with `input='losses'`, got {tuple(preds.shape)} and "
            f"{tuple(target.shape)}; {fix}."
        )


def _check_shapes(preds: Tensor, target: Tensor, class_dim: int) -> None:
    expected = without(preds.shape, class_dim)
    if target.is_floating_point():
        if target.shape == preds.shape:
            return
        if target.shape == expected:
            fix = TO_BINARY if preds.shape[class_dim] == 1 else "convert it with .long()"
            raise TypeError(f"`target` must hold integer class indices, got {target.dtype}; {fix}.")
        raise ValueError(
            f"`target` of dtype {target.dtype} is read as soft targets and must have preds' shape "
            f"{tuple(preds.shape)}, got {tuple(target.shape)}; pass class indices as integers."
        )
    if target.shape != expected:
        raise ValueError(
            f"`target` must have the shape {tuple(expected)} for `preds` of shape {tuple(preds.shape)} with classes on "
            f"dimension {class_dim}, got {tuple(target.shape)}; {_shape_hint(preds.shape, target.shape, class_dim)}."
        )


def _shape_hint(preds: torch.Size, target: torch.Size, class_dim: int) -> str:
    """Return which change would make the shapes fit."""
    expected = without(preds, class_dim)
    fitting = [dim for dim in range(len(preds)) if without(preds, dim) == target]
    if fitting:
        return f"it would fit with class_dim={fitting[0]}"
    if target == preds and preds[class_dim] == 1:
        return TO_BINARY
    if target == preds:
        return (
            "integers of preds' shape look like one-hot targets: pass their argmax, or floats for soft targets; losses "
            "need input='losses', and yes-or-no targets BinaryCrossEntropy"
        )
    if len(target) == len(expected):
        differing = [dim for dim in range(len(target)) if target[dim] != expected[dim]]
        if len(differing) == 1 and abs(target[differing[0]] - expected[differing[0]]) == 1:
            longer = "target[:, 1:]" if target[differing[0]] > expected[differing[0]] else "preds[:, :-1]"
            return (
                f"they are one apart in time: to score each position's next target pass {longer}, or both as they came "
                "from the model and the data with shift=True"
            )
    for dim in (class_dim % len(preds), *range(len(preds))):
        change = _reshaping("target", target, without(preds, dim))
        if change:
            return change if dim == class_dim % len(preds) else f"{change}, and class_dim={dim}"
    return "give every row of classes in `preds` one target"


def _reshaping(name: str, shape: torch.Size, wanted: torch.Size) -> str:
    """Return what to pass if shapes differ by a dimension of 1 only; otherwise an empty string."""
    longer, shorter = (shape, wanted) if len(shape) > len(wanted) else (wanted, shape)
    for dim in reversed(range(len(longer))):
        if longer[dim] == 1 and without(longer, dim) == shorter:
            method = "squeeze" if longer is shape else "unsqueeze"
            return f"pass {name}.{method}({dim if dim < len(longer) - 1 else -1})"
    return ""


def describe(value: Any) -> str:
    """Return what was passed, for an error message."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested tensor of {value.dtype}"
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def without(shape: torch.Size, dim: int) -> torch.Size:
    """Return a shape without one of its dimensions."""
    dim %= len(shape)
    return shape[:dim] + shape[dim + 1 :]


def is_integral(x: Tensor) -> bool:
    """Return whether a tensor holds integers, which booleans are not."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def as_plain(value: Any) -> Any:
    """Return the Python number that a value stands for, such as a scalar of NumPy; anything else as it is."""
    # Tuples of types: the compiler of PyTorch 2.8 cannot trace unions.
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return value if type(value) in (int, float) else int(value) if isinstance(value, int) else float(value)
    # A tensor may be on a device that would be waited for; and some booleans have an index.
    if isinstance(value, Tensor) or str(getattr(value, "dtype", "")).endswith("bool"):
        return value
    try:
        return int(operator.index(value))
    except TypeError:
        return float(value) if isinstance(value, Real) else value


def is_integer(value: Any) -> bool:
    """Return whether a value is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class InWordsOf:
    """Lets errors about the arguments of a metric use the words of whoever passed them on.

    Args:
        caller: What it says in place of what.
        source: What it says first.
    """

    # The compiler of PyTorch 2.6 cannot trace `contextmanager`.

    def __init__(self, caller: Mapping[str, str], source: str = "") -> None:
        self._caller, self._source = caller, source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (TypeError, ValueError)):
            message = str(error)
            for words, others in self._caller.items():
                message = message.replace(words, others)
            raise type(error)(self._source + message) from None
