"""Arguments that constructors elsewhere take, and what does the same here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xent_metrics._validate import describe

_OF_ALL_DATA = "leave it out, since a value is that of all the data (functional.per_target_losses has each target's)"
_CLASS_DIM = "pass class_dim=..., where classes are not on the last dimension"
_NOT_NEEDED = "leave it out, since `preds` have it"
_INPUT = "pass input='logits' or input='probs'"
_IGNORED = "pass ignore_index=..."
_SMOOTHING = "pass label_smoothing=..., to CrossEntropy or another class that has it"
_WEIGHT = (
    "pass weights of targets to update(preds, target, weight=...), and weights of classes as `class_weight` to "
    "CrossEntropy or GroupedCrossEntropy"
)
_BITS = "use BitsPerToken, or CrossEntropy(unit='bits'), for base 2, and CrossEntropy for base e"
_INSTEAD = {
    "reduction": _OF_ALL_DATA,
    "average": _OF_ALL_DATA,
    "multidim_average": _OF_ALL_DATA,
    "size_average": _OF_ALL_DATA,
    "reduce": _OF_ALL_DATA,
    "weight": _WEIGHT,
    "weights": _WEIGHT,
    "sample_weight": _WEIGHT,
    "class_weight": _WEIGHT,
    "class_weights": _WEIGHT,
    "mask": _WEIGHT,
    "pos_weight": "pass it to BinaryCrossEntropy",
    "dim": _CLASS_DIM,
    "axis": _CLASS_DIM,
    "class_axis": _CLASS_DIM,
    "class_dim": "leave it out, since yes-or-no targets have no dimension of classes",
    "from_logits": _INPUT,
    "logits": _INPUT,
    "normalize": _INPUT,
    "log_base": _BITS,
    "base": _BITS,
    "unit": _BITS,
    "num_classes": _NOT_NEEDED,
    "num_labels": _NOT_NEEDED,
    "num_outputs": _NOT_NEEDED,
    "num_groups": "use GroupedCrossEntropy",
    "num_bytes": "pass it to BitsPerByte().update(preds, target, num_bytes=...)",
    "token_bytes": "use BitsPerByte or CrossEntropyReport",
    "accuracy": "use CrossEntropyReport",
    "entropy": "use CrossEntropyReport",
    "confidence": "use CrossEntropyReport or CrossEntropyDifference",
    "sequence_group": "use CrossEntropyReport or CrossEntropyDifference",
    "label_smoothing": _SMOOTHING,
    "label_smoothing_over": _SMOOTHING,
    "smoothing": _SMOOTHING,
    "shift": "pass preds[:, :-1] and target[:, 1:], where those are logits and labels of one length",
    "ignore_idx": _IGNORED,
    "padding_idx": _IGNORED,
    "pad_token_id": _IGNORED,
    "validate_args": "leave it out, since what costs nothing is always checked",
    "task": "use BinaryCrossEntropy for yes-or-no targets, also of many labels, and CrossEntropy for classes",
    "threshold": "leave it out, since a likelihood needs none",
    "top_k": "leave it out, since a likelihood needs none",
}
"""What to do instead. An argument that a class has is never looked up for it."""


def check_names(metric: str, unknown: Mapping[str, Any]) -> None:
    """Raise ValueError, as torchmetrics does, if an argument that a class has not is known by another name here."""
    for name, value in unknown.items():
        if name in _INSTEAD:
            raise ValueError(
                f"`{name}` must not be passed to {metric}, which has no such argument, got {describe(value)}; "
                f"{_INSTEAD[name]}."
            )
