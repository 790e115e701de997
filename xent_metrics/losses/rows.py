"""Contiguous rows: how the scores of a batch are fed to a kernel, a few rows at a time, in buffers that are reused.

The obvious `F.cross_entropy(preds.float())` makes up to four more tensors of the size of the logits. The buffers are a
few MiB, whatever the shape, dtype or strides of `preds`. And a loss must not depend on how its batch lies in memory: a
kernel gives a contiguous row the same bits in any batch.

A *group* of rows is what losses are finished for at once; a kernel reads it in *blocks* that fit a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xent_metrics import _runtime
from xent_metrics.losses.compiled import fuses, run
from xent_metrics.losses.kernels import Results, aligned, num_chunks, score_dtype
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import LossOptions
from xent_metrics.losses.target_losses import SCORED

Rows = slice | Tensor
"""Which of the rows: a range, or their indices."""


class Sizes(NamedTuple):
    """How much a device works on at a time: the only place that knows devices.

    Attributes:
        buffer: Bytes of the rows that a kernel is given.
        head_buffer: The same where the rows are logits that were just made.
        products: Bytes of logits that are made at once from hidden states.
        product_rows: Rows of them, at most.
        chunks: Sums of chunks that are finished at once, of which there are copies in float64.
        rows: Rows that are finished at once, at most; 64 terms of each are made in float64.
    """

    buffer: int
    head_buffer: int
    products: int
    product_rows: int
    chunks: int
    rows: int

    @classmethod
    def of(cls, device: torch.device) -> Sizes:
        """Return those of a device."""
        return _SIZES.get(device.type, _ACCELERATOR_SIZES)


# Buffers of 1 to 3 MiB, about the size of a core's L2, are the fastest of 0.25 to 16 MiB: in bfloat16, which is first
# converted there, by a quarter. Above 512 rows nothing is gained in a matmul.
_SIZES = {"cpu": Sizes(2 * 2**20, 2**20, 63 * 2**20, 512, 2**17, 512)}
# Nothing was measured. A quarter of the 256 MiB that Liger Kernel allows itself for temporary logits takes tens of
# microseconds to be read and written at 3 TB/s, some times as long as starting a kernel. A matmul reads all of the
# head's weight, the fewer times the better.
_ACCELERATOR_SIZES = Sizes(64 * 2**20, 64 * 2**20, 256 * 2**20, 1024, 2**22, 2**14)
_FEWEST_PRODUCT_ROWS = 128  # Below that it shows that each matmul reads all of the head's weight.

# Rows that are left out can be skipped if the others are gathered, which costs more than it saves while they are few.
_MOST_SCORED = 0.75
_FEW_SCORES = 2**17  # Less than these are made in the time that it takes to find out which.


Group = tuple[Rows, list[Tensor]]
"""Which rows, and their scores, and soft targets if there are any, as matrices: two rows at least, of which the second
repeats one that is alone."""


class RowResults:
    """Results of some rows after others, in whole tensors: many small ones would litter the memory."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows, self._next = num_rows, 0
        self.joined: Results | None = None  # Until there is something.

    def add(self, count: int, results: Results) -> None:
        """Add the first so many of the results of the next rows."""
        results = tuple(None if x is None else _first(x, count) for x in results)
        if count == self._num_rows:
            self.joined = results
            return
        if self.joined is None:
            self.joined = tuple(None if x is None else x.new_empty(self._num_rows, *x.shape[1:]) for x in results)
        for whole, x in zip(self.joined, results, strict=True):
            if x is not None:
                whole[self._next : self._next + count] = x
        self._next += count


class RowReader:
    """The rows of scores, and of soft targets, in groups: where they are if they can be read there, or in copies.

    Args:
        preds: The scores.
        target: Soft targets, whose rows come along; None for none.
        options: How losses are made.
        scored: The rows to score; None for all.
    """

    def __init__(
        self, preds: Tensor | LinearLogits, target: Tensor | None, options: LossOptions, scored: Tensor | None = None
    ) -> None:
        self.preds, self.backend, self._scored = preds, options.backend, scored
        self._sizes = Sizes.of(preds.device)
        self.num_classes, self.dtype = preds.shape[options.class_dim], score_dtype(preds)
        last = options.class_dim in (-1, preds.dim() - 1)
        self._tensors = [
            x if last else x.movedim(options.class_dim, -1) for x in (preds, target) if isinstance(x, Tensor)
        ]
        copied = scored is not None or not all(x.is_contiguous() for x in self._tensors)
        self._num_copies = len(self._tensors) if copied and not _runtime.is_traced() else 0
        self.num_rows = preds.numel() // max(1, self.num_classes) if scored is None else len(scored)
        self.rows_in_group = max(2, min(self._rows_at_once(), self.num_rows))

    def rows_in_buffer(self, num_buffers: int) -> int:
        """Return how many rows a kernel is given at a time, eagerly."""
        if not num_chunks(self.num_classes, self.dtype):
            num_buffers += 2  # A float64 sum makes a copy.
        is_linear = isinstance(self.preds, LinearLogits)
        return self._rows_in(self._sizes.head_buffer if is_linear else self._sizes.buffer, num_buffers)

    def groups(self) -> Iterator[Group]:
        """Yield the groups, in order."""
        copies: list[Tensor | None] = [None] * len(self._tensors)
        if self._num_copies and (self._scored is None or self._tensors[0].is_contiguous()):
            copies = [x.new_empty(self.rows_in_group, self.num_classes) for x in self._tensors]
        if isinstance(self.preds, LinearLogits):
            copies.insert(0, None)  # Its logits are made as rows.
            blocks = _linear_blocks(self.preds, self._tensors, self.rows_in_group, self._scored)
        elif self._scored is None:
            blocks = row_blocks(self._tensors, self.rows_in_group)
        else:
            blocks = _chosen_blocks(self._tensors[0], self._scored, self.rows_in_group, copies[0])
        for rows, parts in blocks:
            yield rows, [_as_rows(x, copy) for x, copy in zip(parts, copies, strict=True)]

    def _rows_in(self, size: int, num_tensors: int) -> int:
        """Return how many rows of so many tensors fit a number of bytes, two at least, and one for each thread."""
        num_rows = size // max(1, num_tensors * self.num_classes * self.dtype.itemsize)
        shared = isinstance(self.preds, Tensor) and _runtime.can_read_values(self.preds)
        return max(2, num_rows, torch.get_num_threads() if shared else 0)

    def _rows_at_once(self) -> int:
        """Return how many rows may be finished at once."""
        if _runtime.is_traced() and fuses(self.backend):
            return self.num_rows
        chunks = num_chunks(self.num_classes, self.dtype)
        if chunks:
            most = min(self._sizes.chunks // chunks, self._sizes.rows)
        else:
            most = self.num_rows if fuses(self.backend) else self.rows_in_buffer(1)
        return min(most, self._rows_in(self._sizes.buffer // 2, self._num_copies)) if self._num_copies else most


class Reduction:
    """Calls a kernel with a few rows at a time, in buffers that are reused; or with all, where a compiler needs none.

    Args:
        kernel: One of `kernels`.
        reader: What reads the rows.
        num_tensors: How many tensors the kernel gets, with a buffer for each.
        temporaries: How many tensors of a buffer's size it makes, for which there must be room too.
        **constants: Its other arguments.
    """

    def __init__(
        self,
        kernel: Callable[..., Results],
        reader: RowReader,
        num_tensors: int = 1,
        temporaries: int = 0,
        **constants: Hashable,
    ) -> None:
        self._kernel, self._backend, self._constants = kernel, reader.backend, constants
        self._buffers: list[Tensor | None] = [None] * num_tensors
        self._max_rows = reader.rows_in_group
        if not fuses(reader.backend):
            self._max_rows = min(self._max_rows, reader.rows_in_buffer(num_tensors + temporaries))
        chunked = num_chunks(reader.num_classes, reader.dtype) > 0  # Others need none for a single block.
        reused = chunked or reader.num_rows > self._max_rows
        if reused and not fuses(reader.backend) and not _runtime.is_traced():
            shape = self._max_rows, reader.num_classes
            self._buffers = [_make_buffer(*shape, reader.dtype, reader.preds.device) for _ in range(num_tensors)]

    def __call__(self, tensors: list[Tensor], *others: Tensor | None) -> Results:
        """Return what the kernel returns of two rows or more."""
        count = len(tensors[0])
        max_rows, results = self._max_rows, RowResults(count)
        if count <= max_rows and self._buffers[0] is None:
            return run(self._backend, self._kernel, [*tensors, *self._buffers], others, **self._constants)
        for start in range(0, count, max_rows):
            first = min(start, count - 2)  # A row that is left alone is read once more with the one before it.
            block = [x[first : first + max_rows] if count > max_rows else x for x in tensors]
            size = len(block[0])
            buffers = [None if x is None else _first(x, size) for x in self._buffers]
            found = self._kernel(*block, *buffers, *others, **self._constants)
            again = start - first
            results.add(size - again, tuple(None if x is None else x[again:] for x in found) if again else found)
        assert results.joined is not None
        return results.joined


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
    """Return the values of the rows of a group, of which there are two at least."""
    some = values if values.shape[0] == num_rows_in(rows) else values[rows]
    return some.repeat(2) if some.shape[0] == 1 else some


def _make_buffer(num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a buffer for rows, each of which starts at a multiple of 16 bytes where that matters."""
    if device.type == "cpu":
        return torch.empty(num_rows, num_classes, dtype=dtype, device=device)
    return torch.empty(num_rows, aligned(num_classes), dtype=dtype, device=device)[:, :num_classes]


def _as_rows(part: Tensor, copy: Tensor | None) -> Tensor:
    """Return a part as a matrix: where it is, if it is contiguous, or in a copy."""
    num_classes = part.shape[-1]
    if part.numel() == num_classes:
        part = part.reshape(1, num_classes).expand(2, num_classes)
        return part.contiguous()
    if copy is None or part.is_contiguous():
        return part.contiguous().view(-1, num_classes)
    rows = copy[: part.numel() // num_classes]
    rows.view(part.shape).copy_(part)
    return rows


def _chosen_blocks(
    scores: Tensor, chosen: Tensor, max_rows: int, copy: Tensor | None
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Gather some of the rows, in the copy if there is one."""
    for rows in chosen.split(max_rows) if len(chosen) else ():
        if copy is None:
            yield rows, [_gathered(scores, rows)]
        else:
            flat = scores.view(-1, scores.shape[-1])
            yield rows, [torch.index_select(flat, 0, rows, out=_first(copy, len(rows)))]


def _linear_blocks(
    preds: LinearLogits, soft: list[Tensor], max_rows: int, scored: Tensor | None
) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Make logits of many rows at once, in one buffer; yield at most `max_rows` of them, and their soft targets."""
    num_classes, dtype = preds.shape[-1], preds.dtype
    weight = preds.weight.to(dtype).t()  # Cast once, as autocast does.
    bias = None if preds.bias is None else preds.bias.to(dtype)
    sizes = Sizes.of(preds.device)
    at_once = min(sizes.products // (num_classes * dtype.itemsize), sizes.product_rows)
    at_once = max(_FEWEST_PRODUCT_ROWS, at_once)
    num_rows = min(at_once, preds.numel() // num_classes)
    buffer = torch.empty(num_rows, num_classes, dtype=dtype, device=preds.device)
    for rows, (hidden, *targets) in _hidden_blocks(preds.hidden, soft, at_once, scored):
        logits, flat = buffer[: num_rows_in(rows)], hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        if bias is None:
            torch.mm(flat, weight, out=logits)
        else:
            torch.addmm(bias, flat, weight, out=logits)
        preds.finish(logits)
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
            yield rows, [_gathered(hidden, rows)]


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    """Gather rows, whatever the strides. `torch.unravel_index` would import SymPy, which takes 35 MiB and a second."""
    index: list[Tensor] = []
    for size in reversed(x.shape[1:-1]):
        index, rows = [rows % size, *index], rows // size
    return x[(rows, *index)]


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
        if rows > 0:  # Of `if rows` PyTorch 2.6 compiles one graph for each number.
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
