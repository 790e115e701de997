"""Whether scores look like something else than `input` says, such as probabilities that are read as logits."""

from __future__ import annotations

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.distributed import is_dtensor

_ROWS = 64  # Rows, or binary scores, that decide.
_BLOCK = 2**18  # Scores that are read together.


def input_mismatch_hint(preds: Tensor, input: str, class_dim: int | None, if_probs: str = "pass input='probs'") -> str:
    """Return what the first rows of `preds` look like, if that is not what `input` says; otherwise an empty string.

    Only on the CPU, where values can be read, and only what most of the rows agree on, since some may be masked.

    Args:
        preds: The scores.
        input: What they are said to be.
        class_dim: The dimension of classes; None for binary scores.
        if_probs: What to do if what is read as logits looks like probabilities.
    """
    if input == "losses" or preds.numel() == 0 or not _runtime.can_read_values(preds) or is_dtensor(preds):
        return ""
    with torch.no_grad():
        if class_dim is None:
            return _hint_on_binary(_first_rows(preds, -1).reshape(-1)[:_ROWS], input, if_probs)
        return _hint_on_rows(_first_rows(preds, class_dim), input, if_probs)


def _first_rows(preds: Tensor, class_dim: int) -> Tensor:
    """Return the first rows of classes, without copying the rest."""
    rows = preds.movedim(class_dim, -1) if preds.dim() else preds.view(1, 1)
    while rows.dim() > 2:
        inner = rows.shape[1:-1].numel()
        rows = rows[: -(-_ROWS // inner)]
        rows = rows[0] if inner >= _ROWS else rows.flatten(0, -2)
    return rows.reshape(-1, rows.shape[-1])[:_ROWS]


def _hint_on_rows(rows: Tensor, input: str, if_probs: str) -> str:
    if rows.shape[1] < 2:
        return ""
    # A few rows at a time: all of them, of a large vocabulary, would be as large as a batch.
    blocks = rows.split(max(1, _BLOCK // rows.shape[1]))
    in_range, excess, log_sum = (torch.cat(facts) for facts in zip(*map(_row_stats, blocks), strict=True))
    if input == "logits" and _is_majority(in_range & (excess < 1e-2)):
        return f"look like probabilities (in [0, 1], with sums of 1) but are read as logits; {if_probs}."
    if input == "probs" and _is_majority(in_range & (excess > 5e-2)):
        return (
            "are read as probabilities but do not sum to 1, and are not renormalised; if they are scores, pass "
            "input='logits'."
        )
    if input == "log_probs" and _is_majority(log_sum.abs() > 0.1):
        return (
            "are read as log-probabilities but their exponentials do not sum to 1; pass input='logits' to normalise "
            "them."
        )
    return ""


def _row_stats(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each row whether it is in [0, 1], how far its sum is from 1, and its log-sum-exp."""
    rows = rows.float()
    low, high = rows.aminmax(dim=1)
    return (low >= 0) & (high <= 1), (rows.sum(1) - 1).abs(), rows.logsumexp(1)


def _is_majority(rows: Tensor) -> bool:
    return int(rows.sum()) * 2 > len(rows)


def _hint_on_binary(values: Tensor, input: str, if_probs: str) -> str:
    """Ask for several logits, all in [0, 1] and on both sides of 0.5: those of an untrained model are around 0."""
    if input != "logits" or len(values) < _ROWS // 4:
        return ""
    low, high = values.float().aminmax()
    if 0 <= low < 0.5 < high <= 1:
        return f"look like probabilities (all in [0, 1]) but are read as logits; {if_probs}."
    return ""
