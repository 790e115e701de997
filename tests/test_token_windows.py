"""Every token of a document is scored once, with the context it was promised, whatever its length.

The judges are loops over windows as others write them, and a model whose logits depend on all that is before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from tests.metrics.bad_input import raised
from tests.strategies import relaxed
from xent_metrics import BitsPerByte, CrossEntropyReport, TokenWindows, num_unpadded_samples

START = 256  # No byte.
TEXTS = ["", "a", "Zwölf Boxkämpfer", "jagen Viktor quer über den großen Sylter Deich. " * 3, "x" * 33, "ω" * 16]
DOCUMENTS = [list(text.encode()) for text in TEXTS]
NUM_BYTES = sum(map(len, DOCUMENTS))


class Model(torch.nn.Module):
    """Logits of the next byte in float64, which depend on every byte before it in the window."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.GRU(12, 12, batch_first=True, dtype=torch.float64)
        self.embedding = torch.nn.Embedding(257, 12, dtype=torch.float64)
        self.head = torch.nn.Linear(12, 257, dtype=torch.float64)
        for parameter in self.body.parameters():
            torch.nn.init.normal_(parameter, std=0.8)
        torch.nn.init.normal_(self.head.weight)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of each next token."""
        return self.head(self.body(self.embedding(ids))[0])

    def losses(self, ids: list[int], targets: list[int]) -> list[float]:
        """Return the nats of the last tokens of a window, each after the one before it."""
        log_probs = self(torch.tensor([ids]))[0].log_softmax(-1)[-len(targets) :]
        return [-log_probs[i, target].item() for i, target in enumerate(targets)]


def batches(windows: TokenWindows, batch_size: int = 4) -> Iterator[Any]:
    """Yield padded batches."""
    yield from DataLoader(windows, batch_size=batch_size, collate_fn=windows.collate)


# Windows.


@relaxed
@given(st.data())
def test_every_token_is_scored_once_with_its_context(data: st.DataObject) -> None:
    """In order, after the token before it, with at least `context - stride` tokens, or all there are, before it."""
    lengths = data.draw(st.lists(st.integers(0, 25), max_size=4))
    context = data.draw(st.integers(1, 9))
    stride = data.draw(st.one_of(st.just(1), st.just(context), st.integers(1, context)))
    prefix = data.draw(st.sampled_from([None, 7]))
    repeated = prefix is not None and data.draw(st.booleans())
    # A token tells where it is.
    documents = [list(range(100 * i, 100 * i + length)) for i, length in enumerate(lengths, 1)]
    windows = TokenWindows(documents, context=context, stride=stride, prefix=prefix, repeat_prefix=repeated)

    seen: list[list[int]] = [[] for _ in lengths]
    for inputs, target, document in windows:
        first = 100 * (int(document) + 1)
        assert len(inputs) == len(target) <= context
        begins = bool(inputs[0] == prefix)
        is_first = not seen[int(document)]
        assert begins == (prefix is not None and (is_first or repeated))
        assert is_first or len(inputs) == context
        scored = (target != -100).nonzero().squeeze(1).tolist()
        assert scored == [*range(scored[0], len(target))]
        for position in scored:
            token = int(target[position])
            before = inputs[begins : position + 1].tolist()
            assert before == [*range(token - len(before), token)]
            assert len(before) >= min(context - stride, token - first)
            seen[int(document)].append(token)
    assert seen == [document[prefix is None :] for document in documents]
    assert len(windows) == sum(1 for _ in windows)


@pytest.mark.parametrize(
    ("document", "options", "expected"),
    [
        ([], {"prefix": 0}, []),
        ([5], {}, []),
        ([5], {"prefix": 0}, [([0], [5])]),
        ([5, 6], {}, [([5], [6])]),
        ([5, 6, 7, 8], {}, [([5, 6, 7], [6, 7, 8])]),
        ([5, 6, 7, 8, 9], {"stride": 3}, [([5, 6, 7], [6, 7, 8]), ([6, 7, 8], [-100, -100, 9])]),
        ([5, 6, 7, 8, 9], {"prefix": 0, "stride": 3}, [([0, 5, 6], [5, 6, 7]), ([6, 7, 8], [-100, 8, 9])]),
        (
            [5, 6, 7, 8, 9],
            {"prefix": 0, "stride": 1},
            [([0, 5, 6], [5, 6, 7]), ([5, 6, 7], [-100, -100, 8]), ([6, 7, 8], [-100, -100, 9])],
        ),
        (
            [5, 6, 7, 8, 9],
            {"prefix": 0, "stride": 3, "repeat_prefix": True},
            [([0, 5, 6], [5, 6, 7]), ([0, 7, 8], [-100, 8, 9])],
        ),
        ([5, 6, 7], {"prefix": 0, "context": 1, "stride": 1}, [([0], [5]), ([5], [6]), ([6], [7])]),
    ],
)
def test_windows(document: list[int], options: dict[str, Any], expected: list[tuple[list[int], list[int]]]) -> None:
    """Small ones, written out."""
    windows = TokenWindows([document], **{"context": 3, "stride": 2, **options})
    assert [(inputs.tolist(), target.tolist()) for inputs, target, _ in windows] == expected


def test_batches_are_padded() -> None:
    """At the ends, with an id that there is and targets that are not scored; documents without windows are no rows."""
    windows = TokenWindows([[], [5, 6], [], [7, 8, 9, 10], []], context=3, stride=3, prefix=0)
    first, second = batches(windows, 2)
    assert [x.tolist() for x in first] == [[[0, 5, 0], [0, 7, 8]], [[5, 6, -100], [7, 8, 9]], [1, 3]]
    assert [x.tolist() for x in second] == [[[7, 8, 9]], [[-100, -100, 10]], [3]]
    assert {x.dtype for batch in (first, second) for x in batch} == {torch.int64}
    windows[0].inputs.zero_(), windows[0].target.zero_()
    assert windows[-3].target.tolist() == [5, 6]
    for index in (3, -4):
        with pytest.raises(IndexError):
            windows[index]


def test_no_documents() -> None:
    """There is nothing to score."""
    assert len(TokenWindows([], context=3, stride=2)) == 0
    assert list(batches(TokenWindows([[], []], context=3, stride=2, prefix=0))) == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_several_workers_share_the_windows() -> None:
    """The same batches in the same order."""
    windows = TokenWindows(DOCUMENTS, context=16, stride=5, prefix=START)
    alone = list(batches(windows))
    for one, other in zip(alone, DataLoader(windows, 4, collate_fn=windows.collate, num_workers=2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_ranks_share_the_windows() -> None:
    """Without those that the sampler repeats, each token is scored on one rank."""
    windows = TokenWindows(DOCUMENTS, context=16, stride=5, prefix=START)
    scored = 0
    for rank in range(3):
        sampler = DistributedSampler(windows, 3, rank, shuffle=False)
        for i, batch in enumerate(DataLoader(windows, 4, sampler=sampler, collate_fn=windows.collate)):
            keep = num_unpadded_samples(sampler, start=4 * i, num_samples=len(batch.target))
            scored += int((batch.target[:keep] != -100).sum())
    assert len(windows) % 3  # Some are repeated.
    assert scored == NUM_BYTES


AS_IDS: list[Any] = [tuple, torch.tensor, np.array, lambda x: torch.tensor(x).int(), lambda x: np.array(x, np.uint16)]


@pytest.mark.parametrize("convert", AS_IDS)
def test_what_documents_may_be(convert: Any) -> None:
    """Whatever holds integers; NumPy's numbers are numbers."""
    documents = [[], [1, 2, 3], [65535]]
    windows = TokenWindows(map(convert, documents), context=np.int64(2), stride=np.int8(1), prefix=np.uint8(0))
    expected = TokenWindows(documents, context=2, stride=1, prefix=0)
    assert [[x.tolist() for x in window] for window in windows] == [[x.tolist() for x in window] for window in expected]


def test_a_document_may_be_read_only_and_is_copied() -> None:
    """Token files are mapped into memory like that."""
    ids = np.arange(5, dtype=np.uint16)
    ids.flags.writeable = False
    tensor = torch.arange(5)
    windows = TokenWindows([ids, tensor], context=8, stride=8)
    tensor.zero_()
    assert windows[0].target.tolist() == windows[1].target.tolist() == [1, 2, 3, 4]


GOOD = {"documents": [[1, 2]], "context": 4, "stride": 2}


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"context": 0}, ValueError, "`context` must be an integer of at least 1, got 0"),
        ({"context": True}, ValueError, "`context` must be an integer"),
        ({"context": 4.0}, ValueError, "`context` must be an integer"),
        ({"stride": 0}, ValueError, "`stride` must be an integer of at least 1, got 0"),
        ({"stride": None}, ValueError, "`stride` must be an integer"),
        ({"stride": 5}, ValueError, "`stride` must be at most `context`, 4, got 5; a larger one would leave out"),
        ({"prefix": -1}, ValueError, "`prefix` must be an integer of at least 0, got -1"),
        ({"prefix": "<s>"}, ValueError, "`prefix` must be an integer"),
        ({"repeat_prefix": True}, ValueError, "`repeat_prefix` must be False without a `prefix`"),
        ({"documents": 3}, TypeError, "`documents` must be a list of documents, got int 3; pass"),
        ({"documents": [1, 2]}, TypeError, r"got int 1 as document 0; encode texts, and pass \[ids\] for a single"),
        ({"documents": torch.arange(3)}, TypeError, r"got a tensor of torch.int64 and shape \(\) as document 0"),
        ({"documents": "text"}, TypeError, "got str 't' as document 0; encode texts"),
        ({"documents": ["text"]}, TypeError, "got str 'text' as document 0"),
        ({"documents": {"input_ids": [1]}}, TypeError, "got str 'input_ids' as document 0"),
        ({"documents": [[1], [1.5]]}, TypeError, r"got list \[1.5\] as document 1"),
        ({"documents": [[True]]}, TypeError, r"got list \[True\] as document 0"),
        ({"documents": [[[1, 2]]]}, TypeError, r"got list \[\[1, 2\]\] as document 0"),
        ({"documents": [[1], [[1, 2], [3]]]}, TypeError, "as document 1"),
        (
            {"documents": [[1], [3, -100]]},
            ValueError,
            "must hold token ids that are not negative, got -100 in doc",
        ),
    ],
)
def test_bad_arguments(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    """Each with what to do instead."""
    with pytest.raises(error, match=text):
        TokenWindows(**{**GOOD, **bad})
    raised(error, lambda: TokenWindows(**{**GOOD, **bad}))


# Agreement with others.


def rolling_windows(ids: list[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield inputs and targets of the rolling windows of lm-evaluation-harness with a context of one token.

    The first window predicts the first `length` tokens from the prefix and each other. Every other predicts as many new
    ones, or what is left of them; its inputs end before the last of them and are `length` tokens.
    """
    text = [prefix, *ids]
    done = min(length, len(ids))
    if ids:
        yield text[:done], ids[:done]
    while done < len(ids):
        end = min(done + length, len(ids))
        yield text[end - length : end], ids[done:end]
        done = end


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33, 200])
def test_bits_per_byte_are_those_of_the_harness(length: int) -> None:
    """To 1e-9, with the prefix of the harness and windows that overlap by nothing but what the last one lacks."""
    model = Model()
    nats = sum(
        sum(model.losses(inputs, targets))
        for document in DOCUMENTS
        for inputs, targets in rolling_windows(document, START, length)
    )
    windows = TokenWindows(DOCUMENTS, context=length, stride=length, prefix=START)
    metric = BitsPerByte(token_bytes=torch.tensor([1] * 256 + [0]))
    for inputs, target, _ in batches(windows):
        metric.update(model(inputs), target)
    assert metric.compute().item() == pytest.approx(nats / math.log(2) / NUM_BYTES, rel=1e-9)


def strided_losses(model: Model, ids: list[int], max_length: int, stride: int) -> list[list[float]]:
    """Return the nats of the tokens that each window of Hugging Face's guide to perplexity scores.

    A window is `max_length` tokens and begins `stride` after the one before it. Labels are -100 but for what is new,
    and the model shifts them: a token is predicted from what is before it in the window, so the first one is not.
    """
    losses, done = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        first = max(done - begin, 1)
        losses.append(model.losses(ids[begin : end - 1], ids[begin + first : end]))
        done = end
        if end == len(ids):
            break
    return losses


@pytest.mark.parametrize(("max_length", "stride"), [(9, 4), (9, 8), (9, 1), (17, 5)])
@pytest.mark.parametrize("rest", [0, 1, 3])
def test_losses_are_those_of_the_strided_guide(max_length: int, stride: int, rest: int) -> None:
    """Of all windows of one size; a last one that has fewer new tokens has more context here than there."""
    model, ids = Model(), DOCUMENTS[3][: max_length + 7 * stride + rest]
    expected = strided_losses(model, ids, max_length, stride)
    windows = TokenWindows([ids], context=max_length - 1, stride=stride)
    report = CrossEntropyReport()
    for inputs, target, _ in batches(windows):
        report.update(model(inputs), target)
    values = report.compute()
    assert values["num_tokens"] == sum(map(len, expected)) == len(ids) - 1
    own = [model.losses(x.tolist(), [t for t in y.tolist() if t != -100]) for x, y, _ in windows]
    whole = len(expected) - (rest % stride > 0)
    torch.testing.assert_close(own[:whole], expected[:whole], rtol=1e-9, atol=1e-9)
    total = sum(map(sum, expected[:whole] + own[whole:]))
    assert values["cross_entropy"].item() == pytest.approx(total / (len(ids) - 1), rel=1e-12)
    if whole < len(expected) and max_length - stride > 1:
        assert own[whole] != expected[whole]


def test_the_mean_of_window_means_is_another_number() -> None:
    """The guide averages them; its windows score different numbers of tokens, the first one more than others."""
    model, ids = Model(), DOCUMENTS[3]
    losses = strided_losses(model, ids, 17, 5)
    means = [sum(x) / len(x) for x in losses]
    windows = TokenWindows([ids], context=16, stride=5)
    report = CrossEntropyReport()
    for inputs, target, _ in batches(windows):
        report.update(model(inputs), target)
    assert abs(report.compute()["cross_entropy"].item() - sum(means) / len(means)) > 1e-3
