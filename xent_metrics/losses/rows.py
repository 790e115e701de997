"""Blocks of contiguous rows: how the scores of a batch are fed to a kernel, a few rows at a time, in one reused buffer.

The obvious `F.cross_entropy(preds.float())` makes up to four more tensors of the size of the logits. The buffer is a
few MiB, whatever the shape, dtype or strides of `preds`. And a loss must not depend on how its batch lies in memory:
`log_softmax` over contiguous rows gives a row the same bits in any batch, which other layouts do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.losses.compiled import fuses
from xent_metrics.losses.kernels import Results, padded_width, score_dtype
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import LossOptions
from xent_metrics.losses.target_losses import SCORED

Rows = slice | Tensor
"""Which of the rows: a range, or their indices."""

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

# Rows that are left out can be skipped if the others are gathered, which costs more than it saves while they are few.
_MOST_SCORED = 0.75
_FEW_SCORES = 2**17  # Less than these are made in the time that it takes to find out which.


Block = tuple[Rows, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""A few rows, as kernels take them: contiguous, and two at least, of which the second repeats one that is alone.

It has the rows; their scores; a buffer of the shape of the scores, to be written to, or None where a compiler needs
none; their soft targets, if there are any; and a buffer for those. It is a plain tuple: a named one fixes the number
of rows in traced code.
"""


class RowResults:
    """What a kernel returns of one block after the other, in whole tensors: many small ones would litter the memory."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows, self._next = num_rows, 0
        self.joined: Results | None = None  # Until there is a block.

    def add(self, rows: Rows, results: Results) -> None:
        """Add what was returned of the next rows."""
        count = num_rows_in(rows)
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


def rows_to_score(preds: Tensor | LinearLogits, index: Tensor, status: Tensor | None) -> Tensor | None:
    """Return the indices of rows to score, where that can be known and saves something; None for all rows."""
    if not _runtime.can_read_values(index):
        return None
    linear = isinstance(preds, LinearLogits)
    if not linear and preds.numel() < _FEW_SCORES:
        return None
    if status is None:  # All are scored. Rows of `hidden` that are apart are gathered, so that one matmul takes many.
        apart = isinstance(preds, LinearLogits) and not preds.hidden.is_contiguous()
        return torch.arange(len(index), device=index.device) if apart else None
    scored = (status == SCORED).nonzero().squeeze(1)
    return scored if linear or len(scored) <= _MOST_SCORED * len(index) else None


def of_rows(values: Tensor, rows: Rows) -> Tensor:
    """Return the values of the rows of a block, of which there are two at least."""
    some = values if values.shape[0] == num_rows_in(rows) else values[rows]
    return some.repeat(2) if some.shape[0] == 1 else some


def score_blocks(
    preds: Tensor | LinearLogits,
    target: Tensor | None,
    options: LossOptions,
    scored: Tensor | None = None,
    temporaries: int = 0,
) -> Iterator[Block]:
    """Yield all rows, or those that are `scored`, a few at a time; or at once, where a compiler needs no buffers.

    Args:
        preds: The scores.
        target: Soft targets, whose rows come along; None for none.
        options: How losses are made.
        scored: The rows to score; None for all.
        temporaries: How many tensors of the buffer's size the kernel makes, for which there must be room too.
    """
    num_classes, dtype = preds.shape[options.class_dim], score_dtype(preds)
    last, linear = options.class_dim in (-1, preds.dim() - 1), isinstance(preds, LinearLogits)
    tensors = [x if last else x.movedim(options.class_dim, -1) for x in (preds, target) if isinstance(x, Tensor)]
    num_rows, num_buffers = preds.numel() // num_classes, 1 if target is None else 2
    fused = fuses(options.backend)
    if fused and (linear or (scored is None and _all_at_once(tensors))):
        max_rows = max(1, num_rows)
    else:
        max_rows = rows_in_buffer(preds, (num_buffers + temporaries) * num_classes * dtype.itemsize)
    readable = fused or (options.input == "logits" and preds.dtype == dtype)
    buffers: list[Tensor | None] = [None, None]
    if not fused:
        some = max(2, min(max_rows, num_rows))
        buffers = [padded_rows(some, num_classes, dtype, preds.device) if i < num_buffers else None for i in (0, 1)]
    if isinstance(preds, LinearLogits):
        blocks = _linear_blocks(preds, tensors, max_rows, scored)
    elif scored is None:
        blocks = row_blocks(tensors, max_rows)
    else:
        blocks = _chosen_blocks(tensors[0], max_rows, scored, buffers[0])
    for rows, parts in blocks:
        count = max(2, num_rows_in(rows))
        buffer, target_buffer = (None if x is None else _first(x, count) for x in buffers)
        scores = _as_rows(parts[0], buffer, readable)
        soft = None if target is None else _as_rows(parts[1], target_buffer, fused)
        yield rows, scores, buffer, soft, target_buffer


def padded_rows(num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a buffer for rows, padded with zeros as the sums of kernels need them."""
    width = padded_width(num_classes)
    buffer = torch.empty(num_rows, width, dtype=dtype, device=device)
    if width > num_classes:
        buffer[:, num_classes:].zero_()
    return buffer


def rows_in_buffer(preds: Tensor | LinearLogits, num_bytes: int) -> int:
    """Return how many rows of so many bytes a kernel is given at a time: the only place that knows devices."""
    if isinstance(preds, LinearLogits):
        return max(2, _LINEAR_BUFFER_BYTES.get(preds.device.type, _ACCELERATOR_BUFFER_BYTES) // num_bytes)
    num_rows = max(2, _BUFFER_BYTES.get(preds.device.type, _ACCELERATOR_BUFFER_BYTES) // num_bytes)
    return max(num_rows, torch.get_num_threads()) if _runtime.can_read_values(preds) else num_rows


def _all_at_once(tensors: list[Tensor]) -> bool:
    """Return whether a compiler can read the rows where they are."""
    return _runtime.is_traced() or all(x.is_contiguous() for x in tensors)


def _as_rows(part: Tensor, buffer: Tensor | None, readable: bool) -> Tensor:
    """Return a block as rows: where they are, if they are `readable` there, or in the buffer."""
    num_classes = part.shape[-1]
    if part.numel() == num_classes:
        part, readable = part.reshape(1, num_classes).expand(2, num_classes), False
    if buffer is None:
        return part.contiguous().view(-1, num_classes)
    if readable and (part.is_contiguous() or (part.dim() == 2 and part.stride(1) == 1)):
        return part.view(-1, num_classes)
    rows = buffer[:, :num_classes]
    rows.view(part.shape).copy_(part)
    return rows


def _chosen_blocks(
    scores: Tensor, max_rows: int, chosen: Tensor, buffer: Tensor | None
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Gather some of the rows, in the buffer if they fit."""
    if not scores.is_contiguous():
        for rows in chosen.split(max(1, max_rows // 4)) if len(chosen) else ():  # They come on top of the buffer.
            yield rows, [scores[torch.unravel_index(rows, scores.shape[:-1])]]
        return
    flat = scores.view(-1, scores.shape[-1])
    if buffer is None or buffer.dtype != scores.dtype:
        buffer = flat.new_empty(min(max_rows, len(chosen)), flat.shape[1])
    for rows in chosen.split(max_rows) if len(chosen) else ():
        yield rows, [torch.index_select(flat, 0, rows, out=_first(buffer, len(rows))[:, : flat.shape[1]])]


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
        logits, flat = buffer[: num_rows_in(rows)], hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        if bias is None:
            torch.mm(flat, weight, out=logits)
        else:
            torch.addmm(bias, flat, weight, out=logits)
        for some, parts in row_blocks([logits.view(*hidden.shape[:-1], num_classes), *targets], max_rows):
            yield _among(rows, some), parts


def _hidden_blocks(
    hidden: Tensor, soft: list[Tensor], max_rows: int, scored: Tensor | None
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Yield the rows to multiply at once, all or those that are `scored`, and their soft targets."""
    if scored is None or (hidden.is_contiguous() and len(scored) == hidden.shape[:-1].numel()):
        yield from row_blocks([hidden, *soft], max_rows)
    elif len(scored):
        for rows in scored.tensor_split(-(-len(scored) // max_rows)):
            yield rows, [hidden[torch.unravel_index(rows, hidden.shape[:-1])]]


def _among(rows: Rows, some: slice) -> Rows:
    """Return some of the rows."""
    return rows[some] if isinstance(rows, Tensor) else slice(rows.start + some.start, rows.start + some.stop)


def num_rows_in(rows: Rows) -> int:
    """Return how many rows there are."""
    return len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start


def _first(rows: Tensor, count: int) -> Tensor:
    """Return the first rows, without asking for a view of all of them."""
    return rows if rows.shape[0] == count else rows[:count]


def row_blocks(tensors: list[Tensor], max_rows: int, start: int = 0) -> Iterator[tuple[slice, list[Tensor]]]:
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
            yield from row_blocks([part[0] for part in parts], max_rows, start)
        else:
            yield slice(start, start + count), list(parts)
        start += count
