"""Sequences that are packed into rows: which target belongs to which, and which are the first of theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from xent_metrics._validate import describe, is_integral


def sequence_ids(cu_seqlens: Tensor) -> Tensor:
    """Return the number of the sequence that each packed position belongs to, for `sequence` of an update.

    Args:
        cu_seqlens: Where the sequences begin, and at last where the last one ends, as kernels for packed attention take
            it: `[0, n1, n1 + n2, ...]`, one dimension of integers that do not fall.

    Returns:
        int64 of shape `(cu_seqlens[-1],)`: `n1` times 0, `n2` times 1, and so on; nothing for an empty sequence.

    Raises:
        TypeError: If `cu_seqlens` is no tensor of integers.
        ValueError: If it has another number of dimensions, does not begin with 0, or falls.

    Waits for the device, which has to tell how many positions there are.

    >>> sequence_ids(torch.tensor([0, 2, 2, 5]))
    tensor([0, 0, 2, 2, 2])
    """
    if not isinstance(cu_seqlens, Tensor) or not is_integral(cu_seqlens):
        raise TypeError(
            f"`cu_seqlens` must be a tensor of integers, got {describe(cu_seqlens)}; convert it with .int()."
        )
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(
            f"`cu_seqlens` must have one dimension and begin with 0, got {describe(cu_seqlens)}; pass [0, n1, n1 + n2, "
            "...]."
        )
    lengths = cu_seqlens.to(torch.int64).diff()
    if cu_seqlens[0] != 0 or (lengths < 0).any():
        raise ValueError(
            f"`cu_seqlens` must begin with 0 and not fall, got {cu_seqlens.tolist()[:8]}; pass the sums of the lengths."
        )
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def continues_sequence(sequence: Tensor) -> Tensor:
    """Return which positions follow another one of their own sequence in their row.

    In a packed row the first token of a document is predicted from the end of another document. This mask, as the
    `weight` of an update, leaves that target out. With `shift=True` pass the whole mask; where targets are one position
    ahead of their inputs, pass its `[..., 1:]`.

    Args:
        sequence: Integers of shape `(..., T)`; positions side by side with one number belong together.

    Returns:
        A boolean mask of the same shape, False at the first position of each row.

    Raises:
        TypeError: If `sequence` is no tensor of integers.

    >>> continues_sequence(torch.tensor([[5, 5, 7, 7], [7, 7, 7, 9]]))
    tensor([[False,  True, False,  True],
            [False,  True,  True, False]])
    """
    if not isinstance(sequence, Tensor) or not is_integral(sequence):
        raise TypeError(f"`sequence` must be a tensor of integers, got {describe(sequence)}; convert it with .long().")
    if sequence.dim() == 0:
        raise ValueError("`sequence` must have a dimension of positions, got a scalar; pass one number for each.")
    mask = torch.zeros_like(sequence, dtype=torch.bool)
    mask[..., 1:] = sequence[..., 1:] == sequence[..., :-1]
    return mask
