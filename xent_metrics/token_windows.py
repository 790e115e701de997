"""Windows over texts that are longer than a model's context: what goes into the model, and what is scored of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from xent_metrics._validate import as_num_classes, describe, is_integral

_IGNORED = -100


class TokenWindow(NamedTuple):
    """A window of T positions, or a batch of B of them; all int64.

    Attributes:
        inputs: Token ids, of shape `(T,)` or `(B, T)`.
        target: The token after each input, or -100 where it is not scored; of the shape of `inputs`.
        document: The index of the document; of shape `()` or `(B,)`.
    """

    inputs: Tensor
    target: Tensor
    document: Tensor


class TokenWindows(Dataset[TokenWindow]):
    """A data set of windows over documents, in which each token is scored once, however long a document is.

    A model takes `context` tokens at most. A longer document is read in windows that overlap, each of which ends
    `stride` tokens after the one before it. What two of them share is only context in the second one, where its targets
    are -100:

        windows = TokenWindows(documents, context=1024, stride=512, prefix=tokenizer.bos_token_id)
        for inputs, target, document in DataLoader(windows, batch_size=8, collate_fn=windows.collate):
            metric.update(model(inputs).logits, target)

    Targets are one token ahead of their inputs already, so leave out `shift`. Tokens are easier to predict the more
    context they have, so compare values of one `context` and one `stride`. `stride=context` is the fastest, and what
    lm-evaluation-harness does. `stride=1` gives each token all the context that fits, and costs `context` times as
    much.

    Args:
        documents: The token ids of each document: lists, arrays or 1-D tensors of integers, which are copied. With
            `prefix`, encode them without special tokens, or they may begin with two of them.
        context: How many tokens go into the model at most.
        stride: How many tokens a window scores; the first one of a document scores all of its own, and the last one
            what is left. At most `context`.
        prefix: A token that is put before each document, so that the first token is scored too; None for none.
        repeat_prefix: Whether every window begins with `prefix`, in place of the token that would be first. Models that
            were trained with it at the beginning of each text expect it there.

    Shapes:
        `windows[i]` is `TokenWindow(inputs, target, document)` of shapes `(T,)`, `(T,)` and `()`, with `T <= context`.
        A batch of `collate` has the shapes `(B, T)`, `(B, T)` and `(B,)`.

    Returns:
        Each target follows at least `context - stride` tokens of its document, or all that there are. Where the last
        window has few left to score, it begins earlier, and has the context of the others. An empty document has no
        window; nor has one of a single token without `prefix`, as there is nothing to predict it from.

    Raises:
        TypeError: If a document is no sequence of integers.
        ValueError: If an id is negative, `context` or `stride` is no integer of at least 1, `stride` is above
            `context`, `prefix` is no integer of at least 0, or it is to be repeated and there is none.

    >>> windows = TokenWindows([[5, 6, 7, 8]], context=3, stride=1, prefix=0)
    >>> for inputs, target, document in windows:
    ...     print(inputs.tolist(), target.tolist(), document.item())
    [0, 5, 6] [5, 6, 7] 0
    [5, 6, 7] [-100, -100, 8] 0
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int] | Tensor],
        *,
        context: int,
        stride: int,
        prefix: int | None = None,
        repeat_prefix: bool = False,
    ) -> None:
        self.context, self.stride = as_num_classes("context", context), as_num_classes("stride", stride)
        if self.stride > self.context:
            raise ValueError(
                f"`stride` must be at most `context`, {self.context}, got {self.stride}; a larger one would leave out "
                "tokens between two windows."
            )
        self.prefix = None if prefix is None else as_num_classes("prefix", prefix, minimum=0)
        self.repeat_prefix = bool(repeat_prefix)
        if self.repeat_prefix and prefix is None:
            raise ValueError("`repeat_prefix` must be False without a `prefix`, got True; pass the token to repeat.")
        self._first_target = int(prefix is None)  # Of a document.
        if not isinstance(documents, Iterable):
            raise TypeError(f"`documents` must be a list of documents, got {describe(documents)}; pass [ids] for one.")
        ids = [_as_ids(document, number) for number, document in enumerate(documents)]
        # One tensor, as workers that are not forked get a file handle for each.
        self._ids = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64, device="cpu")
        self._tokens_before = [0, *accumulate(len(x) for x in ids)]
        self._windows_before = [0, *accumulate(self._num_windows(len(x)) for x in ids)]

    def _num_windows(self, num_tokens: int) -> int:
        """Return how many windows a document has."""
        num_targets = num_tokens - self._first_target
        return 1 + max(0, -(-(num_targets - self.context) // self.stride)) if num_targets > 0 else 0

    def __len__(self) -> int:
        """Return the number of windows."""
        return self._windows_before[-1]

    def __getitem__(self, index: int) -> TokenWindow:
        """Return a window."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be in [{-len(self)}, {len(self)}), got {index}.")
        index %= len(self)
        document = bisect_right(self._windows_before, index) - 1
        number = index - self._windows_before[document]
        ids = self._ids[self._tokens_before[document] : self._tokens_before[document + 1]]
        # Of the document's tokens the targets are [start, end), of which those from `scored` on are new.
        first_end = self._first_target + self.context
        end = min(first_end + number * self.stride, len(ids))
        start = max(self._first_target, end - self.context)
        scored = first_end + (number - 1) * self.stride if number else start
        inputs, target = ids.new_empty(end - start), ids[start:end].clone()
        inputs[0] = ids[start - 1] if self.prefix is None or (start and not self.repeat_prefix) else self.prefix
        inputs[1:] = ids[start : end - 1]
        target[: scored - start] = _IGNORED
        return TokenWindow(inputs, target, ids.new_tensor(document))

    @staticmethod
    def collate(windows: Sequence[TokenWindow]) -> TokenWindow:
        """Make a batch of windows, for the `collate_fn` of a `DataLoader`.

        Shorter windows are padded at their ends: inputs with 0, which no position before them sees in a causal model,
        and targets with -100.
        """
        inputs = pad_sequence([window.inputs for window in windows], batch_first=True)
        target = pad_sequence([window.target for window in windows], batch_first=True, padding_value=_IGNORED)
        return TokenWindow(inputs, target, torch.stack([window.document for window in windows]))


def _as_ids(document: Any, number: int) -> Tensor:
    """Return the ids of a document as int64 on the host; raise unless they are a sequence of ids."""
    try:
        ids = document if isinstance(document, Tensor) else torch.tensor(document, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or ids.dim() != 1 or not (is_integral(ids) or not len(ids)):
        raise TypeError(
            f"`documents` must hold lists or 1-D tensors of integers, got {describe(document)} as document {number}; "
            "encode texts, and pass [ids] for a single document."
        )
    ids = ids.to("cpu", torch.int64)
    if len(ids) and ids.min() < 0:
        raise ValueError(
            f"`documents` must hold token ids that are not negative, got {int(ids.min())} in document {number}; leave "
            "padding and ignored tokens out."
        )
    return ids
