"""What decides a loss, apart from the tensors: the options of a call, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

from xent_metrics._validate import as_num_classes, as_plain, is_integer, is_number
from xent_metrics.losses.linear import LinearLogits

Input = Literal["logits", "log_probs", "probs", "losses"]
BinaryInput = Literal["logits", "probs"]
Backend = Literal["auto", "eager", "compile"]
SmoothingOver = Literal["all", "others"]
# The compiler of PyTorch 2.6 cannot trace `get_args`.
_INPUTS, _BINARY_INPUTS, _BACKENDS, _SMOOTHING_OVER = map(get_args, (Input, BinaryInput, Backend, SmoothingOver))
Scores = TypeVar("Scores", bound=Tensor | LinearLogits)


@dataclass(frozen=True)
class LossOptions:
    """The options of a loss over classes; two equal ones give equal losses.

    Attributes:
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"`, or per-target `"losses"` in nats.
        class_dim: The dimension of `preds` that counts classes: -1, or 1 for PyTorch's `(N, C, ...)`.
        label_smoothing: The share of a target that is spread over classes.
        ignore_index: The integer target that is not scored; None for none.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        label_smoothing_over: The classes that the smoothing is spread over: `"all"`, or `"others"` than the true one.
        shift: Whether position t of `preds` scores target t + 1.
        backend: Whether a compiler makes the losses.
        accuracy: Whether the most likely class is looked for too.
        entropy: Whether the entropy of the model's distribution is made too.
    """

    input: Input = "logits"
    class_dim: int = -1
    label_smoothing: float = 0.0
    ignore_index: int | None = -100
    eps: float | None = None
    label_smoothing_over: SmoothingOver = "all"
    shift: bool = False
    backend: Backend = "auto"
    accuracy: bool = False
    entropy: bool = False

    def __post_init__(self) -> None:
        _check_choice("input", self.input, _INPUTS)
        _check_choice("backend", self.backend, _BACKENDS)
        _check_choice("label_smoothing_over", self.label_smoothing_over, _SMOOTHING_OVER)
        _make_plain(self, "class_dim", "ignore_index", "label_smoothing", "eps")
        if not is_integer(self.class_dim):
            raise TypeError(f"`class_dim` must be an integer, got {self.class_dim!r}.")
        for name in ("shift", "accuracy", "entropy"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
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
        for name in ("accuracy", "entropy"):
            if self.input == "losses" and getattr(self, name):
                raise ValueError(f"`{name}` must be False with `input='losses'`, got True: it is read from scores.")

    def smoothing(self, num_classes: int) -> float:
        """Return the share of a target that is spread evenly over all classes."""
        if self.label_smoothing_over == "all" or not self.label_smoothing:
            return self.label_smoothing
        return convert_label_smoothing(self.label_smoothing, num_classes)

    def shifted(self, preds: Scores, target: Tensor) -> tuple[Scores, Tensor]:
        """Drop the last position of `preds` and the first of `target`, as views, if `shift` asks for it."""
        if not self.shift:
            return preds, target
        time = max(dim for dim in range(preds.dim()) if dim != self.class_dim % preds.dim())
        length = max(0, preds.shape[time] - 1)
        first: Any = preds.narrow(time, 0, length)
        if target.is_floating_point():
            return first, target.narrow(time, target.shape[time] - length, length)
        return first, target[..., 1:]

    def aligned(self, labels: Tensor) -> Tensor:
        """Return the part of a tensor of target's shape (without classes) that is scored."""
        return labels[..., 1:] if self.shift else labels


@dataclass(frozen=True)
class BinaryOptions:
    """The options of a binary loss; two equal ones (and an equal `pos_weight`) give equal losses.

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
        _check_choice("input", self.input, _BINARY_INPUTS)
        _check_choice("backend", self.backend, _BACKENDS)
        _make_plain(self, "ignore_index", "label_smoothing", "eps")
        _check_ignore_index(self.ignore_index)
        _check_smoothing(self.label_smoothing)
        object.__setattr__(self, "label_smoothing", float(self.label_smoothing))
        _check_eps(self.eps, self.input)


def convert_label_smoothing(over_others: float, num_classes: int) -> float:
    """Convert label smoothing over the other classes to the `label_smoothing` of `F.cross_entropy`.

    Two conventions go by one name. PyTorch's, `a`, gives every class `a / K` and the true one `1 - a` more
    (Szegedy et al., Rethinking the Inception Architecture, 2016, section 7). The other, `b`, leaves `1 - b` on the true
    class and gives every other one `b / (K - 1)`, as fairseq does. They agree for `a = b * K / (K - 1)`.

    Args:
        over_others: `b`, the share that is taken from the true class.
        num_classes: `K`.

    Returns:
        `a`.

    Raises:
        ValueError: If `b` is not a number in [0, 1], or above `(K - 1) / K`: the true class would then get less
            than the others, which no `a` in [0, 1] gives.

    For b = 0.1 and K = 3 the target is `[0.9, 0.05, 0.05]`. PyTorch's `a = 0.15` gives `[0.85 + 0.05, 0.05, 0.05]`:

    >>> round(convert_label_smoothing(0.1, num_classes=3), 15)
    0.15
    """
    over_others, num_classes = as_plain(over_others), as_num_classes("num_classes", num_classes)
    _check_smoothing(over_others)
    if over_others > (num_classes - 1) / num_classes:
        raise ValueError(
            f"`label_smoothing` over the other classes must be at most (K - 1) / K = {num_classes - 1}/{num_classes}, "
            f"got {over_others!r}: the true class would get less than the others; lower it."
        )
    return min(1.0, over_others * num_classes / (num_classes - 1)) if over_others else 0.0


def _make_plain(options: LossOptions | BinaryOptions, *names: str) -> None:
    """Let numbers be Python's, which saved states and the names of states are made of."""
    for name in names:
        object.__setattr__(options, name, as_plain(getattr(options, name)))


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
