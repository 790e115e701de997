"""Position t scores label t + 1, for every metric that takes `shift`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import named
from tests.metrics.quantities import (
    FLOATS,
    GROUPS,
    TABLE,
    K,
    T,
    bits,
    filled,
    losses_of,
    make_data,
    ragged,
    read,
    tolerance,
)
from xent_metrics import (
    BitsPerByte,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    Perplexity,
)

LAST = slice(None, -1), slice(1, None)  # What a shift leaves of the predictions, and of the labels.

# Shift.

WITH_SHIFT: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "cross-entropy": (CrossEntropy, ("preds", "target", "weight")),
    "of soft targets": (CrossEntropy, ("preds", "soft", "weight")),
    "smoothed": (
        lambda **options: CrossEntropy(label_smoothing=0.1, class_weight=torch.linspace(0, 1, K), **options),
        ("preds", "target"),
    ),
    "bits": (BitsPerToken, ("preds", "target", "column")),
    "perplexity": (Perplexity, ("preds", "target", "mask")),
    "report": (CrossEntropyReport, ("preds", "target", "weight")),
    "report of soft targets": (CrossEntropyReport, ("preds", "soft", "mask")),
    "report with bytes": (
        lambda **options: CrossEntropyReport(token_bytes=TABLE, **options),
        ("preds", "target", "weight"),
    ),
    "bytes of a table": (lambda **options: BitsPerByte(token_bytes=TABLE, **options), ("preds", "target")),
    "bytes given": (BitsPerByte, ("preds", "target", "num_bytes", "weight")),
    "grouped": (lambda **options: GroupedCrossEntropy(GROUPS, **options), ("preds", "target", "group", "mask")),
    "grouped by column": (lambda **options: GroupedCrossEntropy(2, **options), ("preds", "target", "dataset")),
    "grouped soft": (lambda **options: GroupedCrossEntropy(GROUPS, **options), ("preds", "soft", "group")),
    "grouped and weighed": (
        lambda **options: GroupedCrossEntropy(GROUPS, **options),
        ("preds", "target", "group", "weight"),
    ),
    "difference": (CrossEntropyDifference, ("preds", "other", "target", "weight")),
    "difference of soft targets": (CrossEntropyDifference, ("preds", "other", "soft")),
}


def forward(metric: Any, *batch: Any) -> Any:
    """Call a metric with a batch."""
    return metric(**named(metric.update, *batch))


@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("case", WITH_SHIFT)
def test_shift_is_slicing(case: str, class_dim: int) -> None:
    """Position t scores label t + 1: the same bits as slicing the tensors yourself, and the same counts."""
    make, names = WITH_SHIFT[case]
    data = make_data()
    classes = ("preds", "other", "soft")

    def part(name: str, sliced: bool) -> Tensor:
        x = data[name]
        if sliced and x.shape[1] == T:
            x = x[:, LAST[0] if name in ("preds", "other") else LAST[1]]
        return x.movedim(-1, class_dim) if name in classes else x

    shifted = filled(make(shift=True, class_dim=class_dim), ragged(*(part(name, False) for name in names)))
    sliced = filled(make(class_dim=class_dim), ragged(*(part(name, True) for name in names)))
    assert torch.equal(shifted.tally.state, sliced.tally.state)
    assert bits(shifted.compute()) == bits(sliced.compute())
    unshifted = filled(make(class_dim=class_dim), ragged(*(part(name, False) for name in names)))
    assert bits(unshifted.compute()) != bits(shifted.compute())
    value = forward(make(shift=True, class_dim=class_dim), *(part(name, False) for name in names))
    expected = forward(make(class_dim=class_dim), *(part(name, True) for name in names))
    assert bits(value) == bits(expected)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("case", WITH_SHIFT)
def test_shift_leaves_nothing_of_one_position(case: str, class_dim: int, length: int) -> None:
    """A sequence of one position has no label to score: NaN, and nothing is added."""
    make, names = WITH_SHIFT[case]
    metric = make(shift=True, class_dim=class_dim)
    data = make_data(length=length)
    values = forward(metric, *(data[n].movedim(-1, class_dim) if data[n].dim() == 3 else data[n] for n in names))
    for value in (values, metric.compute()):
        numbers = value.values() if isinstance(value, dict) else [value]
        assert all(x.isnan().all() if x.is_floating_point() else x == 0 for x in numbers)


def test_shift_of_sequences_without_a_batch() -> None:
    """One sequence without a batch dimension, and a batch of several dimensions, shift along time."""
    preds, target = torch.randn(2, 3, T, K), torch.randint(0, K, (2, 3, T))
    expected = losses_of(preds[..., :-1, :], target[..., 1:])
    assert read(CrossEntropy(shift=True), preds, target) == pytest.approx(expected.mean().item(), rel=1e-6)
    one = read(CrossEntropy(shift=True), preds[0, 0], target[0, 0])
    assert one == pytest.approx(expected[0, 0].mean().item(), rel=1e-6)
    moved = read(CrossEntropy(shift=True, class_dim=1), preds.movedim(-1, 1), target)
    assert moved == pytest.approx(expected.mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="`shift` must be False with `input='losses'`"):
        CrossEntropy(shift=True, input="losses")
    with pytest.raises(ValueError, match="dimension of time"):
        read(CrossEntropy(shift=True), preds[0, 0, 0], target[0, 0, 0])
    classes_first = read(CrossEntropy(shift=True, class_dim=0), preds[0, 0].t(), target[0, 0])
    assert classes_first == pytest.approx(expected[0, 0].mean().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shift_of_a_causal_language_model(dtype: torch.dtype) -> None:
    """Logits and labels as Hugging Face models have them give the loss of such a model."""
    logits, labels = torch.randn(4, 12, 50).to(dtype), torch.randint(0, 50, (4, 12))
    labels[:, :3] = -100
    labels[2, 7:] = -100
    expected = F.cross_entropy(logits[:, :-1].double().reshape(-1, 50), labels[:, 1:].reshape(-1))
    report = read(CrossEntropyReport(shift=True), logits, labels)
    assert report["cross_entropy"] == pytest.approx(expected.item(), **tolerance(dtype))
    assert (report["num_tokens"], report["num_ignored"]) == (31, 13)


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_shift_copies_no_logits(class_dim: int, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """A shifted batch holds a buffer of 2 MiB and a little for each target, never the logits again."""
    preds, target = torch.randn(4, 256, 2000), torch.randint(0, 2000, (4, 256))
    preds = preds if class_dim == -1 else preds.movedim(-1, 1).contiguous()
    metric = CrossEntropyReport(shift=True, class_dim=class_dim)
    peak = peak_bytes(lambda: metric.update(preds, target))
    assert peak < 3 * 2**20 + 64 * target.numel() < preds.numel() * 4


def test_padding_on_the_left() -> None:
    """The first label of a sequence has only padding before it: a step is scored if both of its ends are there."""
    lengths, size = (3, 6, 5), 6
    preds, target = torch.randn(3, size, K), torch.randint(K, (3, size))
    mask = torch.stack([torch.arange(size) >= size - length for length in lengths])
    losses = [losses_of(preds[i, -n:][:-1], target[i, -n:][1:]) for i, n in enumerate(lengths)]
    expected = torch.cat(losses).mean().item()
    shifted, cut, first_too = CrossEntropyReport(shift=True), CrossEntropyReport(), CrossEntropyReport(shift=True)
    for attention in (mask, mask.long()):
        shifted.update(preds, target, weight=attention * attention.roll(1, -1))
        cut.update(preds[:, :-1], target[:, 1:], weight=attention[:, 1:] * attention[:, :-1])
        first_too.update(preds, target, weight=attention)
    assert shifted.compute()["cross_entropy"].item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(shifted.tally.state, cut.tally.state)
    assert shifted.compute()["num_tokens"] == 2 * (2 + 5 + 4) == first_too.compute()["num_tokens"] - 2 * 2
