"""Logits that are never there as a whole: the head of a language model, multiplied where it is scored."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xent_metrics._compat import has_autocast
from xent_metrics._validate import FLOATS, as_plain, as_tensor_hint, check_not_nested, describe, is_number
from xent_metrics.distributed import VocabShard, is_dtensor, vocab_shard


@dataclass(init=False, eq=False)
class LinearLogits:
    """The logits of a language model's head, `hidden @ weight.T + bias`, which are never there as a whole.

    Pass it for `preds` wherever they are logits with classes last. Some hundred rows are multiplied at a time, turned
    into losses and forgotten, so that the `(N, V)` logits, the largest tensor there is, need not fit into memory:

        metric.update(LinearLogits(hidden, model.lm_head.weight), target)

    Some models scale or cap what their head returns. Without these steps the losses are those of another model. With
    them logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`:

        LinearLogits(hidden, weight, softcap=model.config.final_logit_softcapping)  # Gemma 2 and later
        LinearLogits(hidden, weight, scale=model.config.logit_scale)  # Cohere
        LinearLogits(hidden, weight, scale=1 / model.config.logits_scaling)  # Granite

    Args:
        hidden: What goes into the head, of shape `(..., D)`.
        weight: The head's, of shape `(V, D)`, as `torch.nn.Linear` has it; or a DTensor of that shape, sharded over the
            classes.
        bias: The head's, of shape `(V,)`, sharded as `weight` or not at all; None for none.
        scale: What products are multiplied by; None for none.
        softcap: What scaled products are squashed below, in magnitude, by a tanh; None for none.

    Shapes:
        The logits are `(..., V)`; `target` is `(...)`, or `(..., V)` for soft targets.

    Values:
        The matmul is in the dtype of its factors, or in autocast's, as `F.linear` would do it; in half precision logits
        are rounded as the model's own. Each step of `scale` and `softcap` is in the dtype of the logits too, as models
        have it; for one that casts its logits to float32 first, cast `hidden` and `weight`. All that follows is in
        float32 (float64 for float64). A matmul gives a row other last bits in another batch, so values agree with those
        of `F.linear` to 1e-6, and not to the bit.

        The factors are read when they are scored. After an optimizer's step, as in the callback's training hooks, the
        weight is no longer the one that `hidden` goes with: return `losses` there.

        Of a sharded weight each rank multiplies the classes that it has, and the ranks exchange sums (tensor
        parallelism): nothing is gathered. They all need the same `hidden` and targets. Ranks of FSDP have other data;
        there pass `weight.full_tensor()`.

        It is one thing, and no collection: it has no length, it equals only itself, and its parts cannot be replaced.
        `.to()` moves all of them. Wrappers that choose rows of every tensor, such as torchmetrics'
        `BootStrapper`, would choose rows of the weight too, and are refused.

    Costs:
        On the CPU the time of `F.linear` and some 10 % more, and 66 MiB; more only above 129,024 classes (twice as many
        in half precision), as fewer than 128 rows at a time would be slow: 129 MiB for 256,000 classes in float32. On
        accelerators, where nothing was measured, 320 MiB. Under autocast, a copy of a weight that has another dtype
        for each call. Targets that are `ignore_index` are not multiplied on the CPU, unless the weight is sharded;
        elsewhere the host would have to wait to know them, and they are. `scale` and `softcap` work in place: they need
        no memory, and on the CPU some 5 % more time.

    Raises:
        TypeError: Where it is used: if one of the three is no tensor of floats, if `hidden` is a DTensor, or if they
            differ in dtype outside autocast.
        ValueError: Where it is made: if `scale` or `softcap` is not positive and finite. Where it is used: if shapes or
            devices do not fit, with `input` other than `"logits"`, with `class_dim` other than the last, and if a
            sharded weight is so in any other way or meets soft targets, or the targets of its ranks differ.

    >>> from xent_metrics import CrossEntropy
    >>> metric = CrossEntropy()
    >>> metric.update(LinearLogits(torch.ones(2, 1), weight=torch.tensor([[2.0], [1.0], [0.1]])), torch.tensor([0, 0]))
    >>> metric.compute()  # Of the logits [2.0, 1.0, 0.1], twice
    tensor(0.4170, dtype=torch.float64)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        scale, softcap = _as_factor("scale", scale), _as_factor("softcap", softcap)
        for name, value in zip(_PARTS, (hidden, weight, bias, scale, softcap), strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse other parts. Tools that map over dataclasses may only detach them, or move them to another device."""
        own = getattr(self, name, None)
        if name not in _PARTS or not (value is own or _is_elsewhere(own, value)):
            raise TypeError(
                f"`preds` must not be changed if they are LinearLogits, whose `{name}` was to become "
                f"{describe(value)}, but may be scored as they are; make other ones, or pass F.linear(hidden, weight, "
                "bias) where something resamples or selects rows of every tensor."
            )
        object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(LinearLogits, **self._steps), (self.hidden, self.weight, self.bias)

    def to(self, *args: Any, **kwargs: Any) -> LinearLogits:
        """Return the same on another device, or in another dtype: of each part what `Tensor.to` returns."""
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        return LinearLogits(self.hidden.to(*args, **kwargs), self.weight.to(*args, **kwargs), bias, **self._steps)

    @property
    def shape(self) -> torch.Size:
        """That of the logits, classes last."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits, as `F.linear` would make them here."""
        return _multiplied_in(self.hidden)

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
        return LinearLogits(self.hidden.narrow(dim, start, length), self.weight, self.bias, **self._steps)

    def finish(self, products: Tensor) -> None:
        """Make logits of products, in place, in the steps of a model, each of which rounds as there."""
        if self.scale is not None:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)

    @property
    def _steps(self) -> dict[str, Any]:
        """What is done to products."""
        return {"scale": self.scale, "softcap": self.softcap}


_PARTS = tuple(part.name for part in fields(LinearLogits))


def _as_factor(name: str, value: Any) -> float | None:
    """Return a factor as a Python number; raise unless it is None or positive and finite."""
    factor: float | None = as_plain(value)
    if factor is not None and not (is_number(factor) and 0.0 < factor < math.inf):
        raise ValueError(
            f"`{name}` must be None or a positive and finite number, got {value!r}; leave it out if the head has none."
        )
    return factor


def _is_elsewhere(own: Any, value: Any) -> bool:
    """Return whether a tensor holds the numbers of another one: in the same memory, or on another device."""
    if not isinstance(own, Tensor) or not isinstance(value, Tensor) or own.shape != value.shape:
        return False
    if is_dtensor(own) != is_dtensor(value) or own.device != value.device:
        return own.device != value.device
    return _local(own).data_ptr() == _local(value).data_ptr()


def _local(x: Any) -> Tensor:
    """Return what of a tensor is on this rank: a DTensor has no memory of its own."""
    part: Tensor = x.to_local() if is_dtensor(x) else x
    return part


def local_head(preds: LinearLogits) -> tuple[LinearLogits, VocabShard | None]:
    """Return the logits of the classes that are on this rank, and which these are; None if they are all.

    Raises:
        ValueError: If `weight` is spread in any way but over the classes, or `bias` otherwise than it.
    """
    if not (is_dtensor(preds.weight) or is_dtensor(preds.bias)):
        return preds, None
    weight, shard = _placed("weight", preds.weight)
    bias, own = _placed("bias", preds.bias)
    if own is not None and (shard is None or own.group != shard.group):
        raise ValueError(
            "`bias` of `preds` must be spread over ranks as `weight` is, or not at all, got "
            f"{_placements(preds.bias)} and {_placements(preds.weight)}; pass its full_tensor()."
        )
    if shard is not None and bias is not None:
        bias = bias[shard.offset : shard.offset + len(weight)] if own is None else bias
        if len(bias) != len(weight):  # Not raised here: the other ranks would wait for this one.
            bias, shard = None, shard._replace(mismatch=shard.mismatch or ", here another number of `bias`")
    return LinearLogits(preds.hidden, weight, bias, **preds._steps), shard


def _placed(name: str, x: Any) -> tuple[Any, VocabShard | None]:
    """Return the part of a factor that is on this rank, and which classes it has; None if they are all."""
    return vocab_shard(f"`{name}` of `preds`", x, 0) if is_dtensor(x) else (x, None)


def _placements(x: Any) -> str:
    """Return where a tensor is, for an error message."""
    return f"{x.placements} on {x.device_mesh}" if is_dtensor(x) else "a plain tensor"


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, input: str, class_dim: int) -> None:
    """Raise unless three tensors are a linear layer and what goes into it, and its outputs are read as logits."""
    factors = {"hidden": hidden, "weight": weight}
    if bias is not None:
        factors["bias"] = bias
    for name, value in factors.items():
        _check_factor(name, value)
    if input != "logits":
        raise ValueError(
            f"`input` must be 'logits' with LinearLogits, got {input!r}; leave it out, since a matmul makes logits."
        )
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        transposed = weight.dim() == 2 and hidden.shape[-1:] == weight.shape[:1]
        raise ValueError(
            f"`weight` of `preds` must have the shape (classes, D) for `hidden` of shape (..., D), got "
            f"{tuple(weight.shape)} and {tuple(hidden.shape)}; "
            f"{'pass weight.t()' if transposed else 'pass what the head is given, and its weight'}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`bias` of `preds` must have the shape {tuple(weight.shape[:1])}, one number for each class, got "
            f"{tuple(bias.shape)}; leave it out if the head has none."
        )
    devices = [str(value.device) for value in factors.values()]
    if len(set(devices)) > 1:
        raise ValueError(
            f"`hidden` of `preds` must be on the device of `{'`, `'.join(list(factors)[1:])}`, got "
            f"{', '.join(devices)}; move one with .to()."
        )
    if len({_multiplied_in(value) for value in factors.values()}) > 1:
        dtypes = [str(value.dtype) for value in factors.values()]
        raise TypeError(
            f"`hidden` of `preds` must have the dtype of `{'`, `'.join(list(factors)[1:])}`, got {', '.join(dtypes)}; "
            "convert one with .to(), or score under the autocast that the model ran under."
        )
    if class_dim not in (-1, hidden.dim() - 1):
        raise ValueError(
            f"`class_dim` must be the last dimension with LinearLogits, got {class_dim} for logits of shape "
            f"{(*hidden.shape[:-1], weight.shape[0])}; leave it out."
        )


def _check_factor(name: str, value: Any) -> None:
    """Raise unless a value is a dense tensor of floats, and a plain one where it is not of the head."""
    if not isinstance(value, Tensor):
        fix = as_tensor_hint(value, ("last_hidden_state", name, "data"))  # Of a model's output, and of its head.
        raise TypeError(f"`{name}` of `preds` must be a tensor, got {type(value).__name__}; {fix}.")
    if name == "hidden" and is_dtensor(value):
        raise TypeError(f"`{name}` of `preds` must be a plain tensor, got a DTensor; pass its full_tensor().")
    check_not_nested(name, value)
    if value.layout != torch.strided:
        raise TypeError(
            f"`{name}` of `preds` must be a dense tensor, got layout {value.layout}; call .to_dense() on it."
        )
    if value.dtype not in FLOATS:
        raise TypeError(
            f"`{name}` of `preds` must be float16, bfloat16, float32 or float64, got {value.dtype}; convert it with "
            ".float()."
        )


def _multiplied_in(x: Tensor) -> torch.dtype:
    """Return the dtype that a tensor is multiplied in: its own, or what autocast casts it to."""
    device = x.device.type
    if x.dtype == torch.float64 or not has_autocast(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
