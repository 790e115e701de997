"""Documents in packed rows: each is one sequence of the standard error, wherever its targets lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from tests import reference
from tests.reference import Target
from xent_metrics import (
    CrossEntropy,
    CrossEntropyDifference,
    CrossEntropyReport,
    continues_sequence,
    functional,
    sequence_ids,
)

K = 5
LENGTHS = (3, 7, 1, 12, 40, 2)


class Documents:
    """Logits of two models, targets and weights of some documents."""

    def __init__(self, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.lengths = lengths
        size = sum(lengths)
        self.preds_a, self.preds_b = 3 * torch.randn(2, size, K, dtype=torch.float64)
        self.target = torch.randint(0, K, (size,)).masked_fill(torch.rand(size) < 0.2, -100)
        self.weight = torch.rand(size)
        self.ids = sequence_ids(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]))

    def one_by_one(self) -> list[tuple[Tensor, ...]]:
        """Return logits of both models, targets and weights of one document after the other, each of which is a row."""
        columns = self.preds_a, self.preds_b, self.target, self.weight
        return list(zip(*([part[None] for part in x.split(self.lengths)] for x in columns), strict=True))


def report(documents: Documents, order: Tensor | slice = slice(None), ids: Tensor | None = None) -> CrossEntropyReport:
    """Score all documents at once, in one row, with the positions in any order."""
    metric = CrossEntropyReport()
    ids = documents.ids if ids is None else ids
    metric.update(
        documents.preds_a[order][None],
        documents.target[order][None],
        weight=documents.weight[order][None],
        sequence=ids[order][None],
    )
    return metric


def test_packed_documents_have_the_bits_of_rows() -> None:
    """Sums, counts and the standard error are those of one document a row."""
    documents = Documents()
    alone = CrossEntropyReport()
    for preds, _, target, weight in documents.one_by_one():
        alone.update(preds, target, weight=weight)
    assert report(documents).tally.state.equal(alone.tally.state)


def test_the_standard_error_is_that_of_documents() -> None:
    """It is judged by plain floats."""
    documents = Documents()
    log_probs = documents.preds_a.log_softmax(1).tolist()
    rows: list[list[Target]] = [[] for _ in LENGTHS]
    for x, y, w, document in zip(
        log_probs, documents.target.tolist(), documents.weight.tolist(), documents.ids.tolist(), strict=True
    ):
        if y != -100:
            rows[document].append(Target(-x[y], 1.0, w))
    value = report(documents).compute()["cross_entropy_stderr"].item()
    assert value == pytest.approx(reference.stderr([row for row in rows if row]), rel=1e-9)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_order_of_positions_does_not_matter(elsewhere: bool, hide_values: Any) -> None:
    """Nor does what the numbers are: windows of a document may lie anywhere in an update."""
    documents = Documents()
    expected = report(documents).tally.state
    if elsewhere:
        hide_values()
    order = torch.randperm(len(documents.ids))
    other_ids = torch.tensor([5, -(2**40), 0, 2**62, -1, 17])[documents.ids]
    assert report(documents, order, other_ids).tally.state.equal(expected)


def test_many_targets() -> None:
    """More than a block has, in few sequences and in many."""
    for ids in (torch.arange(40_000) // 30_000, torch.arange(40_000) // 2):
        losses = torch.rand(40_000, dtype=torch.float64)
        packed, rows = (CrossEntropyReport(input="losses") for _ in range(2))
        packed.update(losses, torch.zeros_like(ids), sequence=ids)
        for part in losses.split(ids.bincount().tolist()) if ids[-1] == 1 else [losses.view(-1, 2)]:
            sequences = part if part.dim() == 2 else part[None]
            rows.update(sequences, torch.zeros_like(sequences, dtype=torch.int64))
        assert packed.tally.state.equal(rows.tally.state)


def test_windows_of_one_update_are_one_sequence() -> None:
    """A column of ids says which document a row is of."""
    losses, ids = torch.rand(4, 6), torch.tensor([[0], [0], [1], [2]])
    metric, joined = CrossEntropyReport(input="losses"), CrossEntropyReport(input="losses")
    metric.update(losses, torch.zeros(4, 6, dtype=torch.int64), sequence=ids)
    for part in (losses[:2].reshape(1, -1), losses[2:3], losses[3:]):
        joined.update(part, torch.zeros_like(part, dtype=torch.int64))
    assert metric.tally.state.equal(joined.tally.state)


def test_differences() -> None:
    """Two models are compared by document too."""
    documents = Documents()
    batch = {name: getattr(documents, name)[None] for name in ("preds_a", "preds_b", "target", "weight")}
    packed, alone = CrossEntropyDifference(), CrossEntropyDifference()
    for preds_a, preds_b, target, weight in documents.one_by_one():
        alone.update(preds_a, preds_b, target, weight=weight)
    packed.update(**batch, sequence=documents.ids[None])
    assert packed.tally.state.equal(alone.tally.state)
    value = functional.cross_entropy_difference(**batch, sequence=documents.ids[None])["difference_stderr"]
    torch.testing.assert_close(value, packed.compute()["difference_stderr"])


def test_functions_and_collections_take_it() -> None:
    """Metrics that share a state share the sequences."""
    documents = Documents()
    batch = {"preds": documents.preds_a[None], "target": documents.target[None], "sequence": documents.ids[None]}
    collection = MetricCollection([CrossEntropy(), CrossEntropyReport()])
    for _ in range(2):
        collection.update(**batch)
    one = functional.tally(**batch)
    assert (one + one).state.equal(collection["CrossEntropyReport"].tally.state)


def test_shift_and_boundaries() -> None:
    """With a shift the mask leaves out the first target of each document, which another document comes before."""
    documents = Documents()
    packed, alone = CrossEntropyReport(shift=True), CrossEntropyReport(shift=True)
    packed.update(
        documents.preds_a[None],
        documents.target[None],
        weight=continues_sequence(documents.ids[None]),
        sequence=documents.ids[None],
    )
    for preds, _, target, _ in documents.one_by_one():
        alone.update(preds, target)
    ours, theirs = packed.compute(), alone.compute()
    for name in ("cross_entropy", "cross_entropy_stderr", "cross_entropy_upper", "num_tokens"):
        assert ours[name] == theirs[name]


def test_nothing_at_all() -> None:
    """No targets are no sequences."""
    metric = CrossEntropyReport()
    none = torch.zeros(0, 3, dtype=torch.int64)
    metric.update(torch.zeros(0, 3, K), none, sequence=none)
    assert not metric.tally.state.any()


@pytest.mark.parametrize(
    ("sequence", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "`sequence` must be a dense tensor of integers, got"),
        (torch.zeros(3, 2, dtype=torch.int64), ValueError, "`sequence` must be broadcastable"),
        ([[0, 0, 0]] * 2, TypeError, "`sequence` must be a dense tensor of integers, got"),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), ValueError, "`sequence` must be"),
    ],
)
def test_what_is_wrong_is_said(sequence: Any, error: type[Exception], message: str) -> None:
    """And nothing is added."""
    metric = CrossEntropyReport()
    with pytest.raises(error, match=message):
        metric.update(torch.zeros(2, 3, K), torch.zeros(2, 3, dtype=torch.int64), sequence=sequence)
    assert not metric.tally.state.any()


@pytest.mark.parametrize(
    ("call", "argument", "error"),
    [
        (sequence_ids, torch.tensor([0, 3, 2]), ValueError),
        (sequence_ids, torch.tensor([1, 3]), ValueError),
        (sequence_ids, torch.tensor([[0, 3]]), ValueError),
        (sequence_ids, torch.tensor([], dtype=torch.int64), ValueError),
        (sequence_ids, torch.tensor([0.0, 3.0]), TypeError),
        (sequence_ids, [0, 3], TypeError),
        (continues_sequence, torch.tensor([0.0]), TypeError),
        (continues_sequence, torch.tensor(0), ValueError),
    ],
)
def test_helpers_say_what_is_wrong(call: Any, argument: Any, error: type[Exception]) -> None:
    """The argument, the rule, the value and the fix."""
    with pytest.raises(error, match=r"^`(cu_seqlens|sequence)` must .*, got .*; "):
        call(argument)
