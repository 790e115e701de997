"""Binary cross-entropy is PyTorch's on all the data, at any extreme."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import reference
from tests.metrics.quantities import FLOATS, INTEGERS, bits, filled, ragged, read, tolerance
from xent_metrics import BinaryCrossEntropy, functional

# Binary cross-entropy.

BINARY_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "positive weight": {"pos_weight": torch.tensor(3.0)},
    "positive weight of each label": {"pos_weight": torch.tensor([0.0, 0.5, 1.0, 4.0])},
    "smoothed": {"label_smoothing": 0.25},
    "all": {"pos_weight": torch.tensor([2.0], dtype=torch.float64), "label_smoothing": 0.1, "ignore_index": -1},
}


def binary_targets(shape: tuple[int, ...], ignore_index: int | None) -> list[Tensor]:
    """Make hard and soft targets of several types, some of them ignored."""
    hard, soft = torch.randint(0, 2, shape), torch.rand(shape)
    targets = [hard.to(x) for x in (torch.int64, torch.int8, torch.float32, torch.bfloat16)]
    targets += [soft.to(x) for x in FLOATS]
    if ignore_index is None:
        return [*targets, hard.bool(), hard.to(torch.uint8)]
    return [x.masked_fill(torch.rand(shape) < 0.3, ignore_index) for x in targets]


def judge_binary(preds: Tensor, target: Tensor, weight: Tensor | None, form: str, options: dict[str, Any]) -> float:
    """Judge all the data at once in float64, by PyTorch where PyTorch has it."""
    x, y, smoothing = preds.double(), target.double(), options.get("label_smoothing", 0.0)
    scored = y != options.get("ignore_index", math.inf)
    y = y.clamp(min=0) * (1 - smoothing) + smoothing / 2
    positive = options.get("pos_weight", torch.tensor(1.0)).double()
    if form == "logits":
        losses = F.binary_cross_entropy_with_logits(x, y, pos_weight=positive, reduction="none")
    elif "pos_weight" in options:
        losses = -(positive * y * x.log() + (1 - y) * (1 - x).log())
    else:
        losses = F.binary_cross_entropy(x, y, reduction="none")
    weights = scored * (1.0 if weight is None else weight.double())
    return ((losses * weights).sum() / weights.expand(y.shape).sum()).item()


@pytest.mark.parametrize("option", BINARY_OPTIONS)
@pytest.mark.parametrize("shape", [(11,), (11, 4)], ids=str)
@pytest.mark.parametrize("form", ["logits", "probs"])
@pytest.mark.parametrize(
    "dtype", [FLOATS[0], FLOATS[3], *(pytest.param(x, marks=pytest.mark.slow) for x in FLOATS[1:3])], ids=str
)
def test_binary_is_pytorchs_on_all_the_data(dtype: torch.dtype, form: str, shape: tuple[int, ...], option: str) -> None:
    """One label or many, hard, soft or Boolean, weighted and masked: the value is PyTorch's on all batches at once."""
    options = BINARY_OPTIONS[option]
    if len(shape) == 1 and option == "positive weight of each label":
        options = {"pos_weight": torch.tensor([4.0])}
    preds = 3 * torch.randn(shape) if form == "logits" else 0.05 + 0.9 * torch.rand(shape)
    preds = preds.to(dtype)
    weights = [
        None,
        torch.rand(shape),
        torch.rand(shape) < 0.6,
        torch.randint(0, 3, (shape[0],) + (1,) * (len(shape) - 1)),
    ]
    targets = binary_targets(shape, options.get("ignore_index"))
    for weight, target in zip(itertools.cycle(weights), [*targets, targets[0]], strict=False):
        expected = judge_binary(preds, target, weight, form, options)
        metric = filled(BinaryCrossEntropy(input=form, **options), ragged(preds, target, weight))
        assert metric.compute().item() == pytest.approx(expected, **tolerance(dtype)), (target.dtype, weight)
        value = functional.binary_cross_entropy(preds, target, weight=weight, input=form, **options)
        assert value.item() == pytest.approx(expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_binary_targets_of_every_integer(dtype: torch.dtype) -> None:
    """Targets may be integers of any type."""
    preds, target = torch.randn(8), torch.randint(0, 2, (8,))
    expected = F.binary_cross_entropy_with_logits(preds.double(), target.double()).item()
    assert read(BinaryCrossEntropy(), preds, target.to(dtype)) == pytest.approx(expected, rel=1e-6)
    target[3] = 7
    value = read(BinaryCrossEntropy(ignore_index=7), preds, target.to(dtype))
    kept = torch.arange(8) != 3
    expected = F.binary_cross_entropy_with_logits(preds[kept].double(), target[kept].double()).item()
    assert value == pytest.approx(expected, rel=1e-6)


def test_binary_textbook_values() -> None:
    """The worked values of the textbooks, from probabilities and from their logits, in nats and in bits."""
    for probs, expected in (([0.99, 0.01, 0.99], 0.01005), ([0.1, 0.9, 0.2], 2.0715)):
        p, y = torch.tensor(probs, dtype=torch.float64), torch.tensor([1, 0, 1])
        value = read(BinaryCrossEntropy(input="probs"), p, y)
        assert value == pytest.approx(expected, abs=5e-6 if expected < 1 else 5e-5)
        assert read(BinaryCrossEntropy(), p.logit(), y) == pytest.approx(value, rel=1e-13)
        assert read(BinaryCrossEntropy(input="probs", unit="bits"), p, y) == pytest.approx(
            reference.bits(value), rel=1e-14
        )
        in_bits = functional.binary_cross_entropy(p, y, input="probs", unit="bits").item()
        assert in_bits == pytest.approx(reference.bits(value), rel=1e-14)


@pytest.mark.parametrize("eps", [1e-12, 1e-7, 1e-3, 0.25])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_binary_eps(dtype: torch.dtype, eps: float) -> None:
    """Clipping is exact even where the type has no number as close to 1, and leaves what is inside as it is."""
    p = torch.tensor([0.0, 1.0], dtype=dtype)
    metric = BinaryCrossEntropy(input="probs", eps=eps)
    assert functional.binary_cross_entropy(p, 1 - p, input="probs", eps=eps).item() == pytest.approx(-math.log(eps))
    for i, j in itertools.product((0, 1), (0, 1)):
        metric.reset()
        expected = -math.log1p(-eps) if i == j else -math.log(eps)
        assert read(metric, p[i : i + 1], torch.tensor([j])) == pytest.approx(expected, rel=1e-6)
    metric.reset()
    inside = torch.tensor([0.25, 0.375, 0.75], dtype=dtype)
    expected = F.binary_cross_entropy(inside.double(), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)).item()
    assert read(metric, inside, torch.tensor([1, 0, 1])) == pytest.approx(expected, rel=1e-6)
    outside = torch.tensor([eps / 2, 1 - eps / 2], dtype=torch.float64)
    assert read(BinaryCrossEntropy(input="probs", eps=eps), outside, torch.tensor([1, 0])) == pytest.approx(
        -math.log(eps), rel=1e-9
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("form", "yes", "no"), [("logits", math.inf, -math.inf), ("probs", 1.0, 0.0)])
def test_binary_certainty(form: str, yes: float, no: float, dtype: torch.dtype) -> None:
    """Certain and right costs exactly 0, certain and wrong is infinite, also for a soft or a smoothed target."""
    preds = torch.tensor([yes, no], dtype=dtype)
    for target in (torch.tensor([1, 0]), torch.tensor([True, False]), torch.tensor([1.0, 0.0])):
        assert read(BinaryCrossEntropy(input=form), preds, target) == 0.0
    for i, y in itertools.product((0, 1), (0.5, 0.25)):
        assert read(BinaryCrossEntropy(input=form), preds[i : i + 1], torch.tensor([y])) == math.inf
    for i in (0, 1):
        assert read(BinaryCrossEntropy(input=form), preds[i : i + 1], torch.tensor([i])) == math.inf
        smoothed = BinaryCrossEntropy(input=form, label_smoothing=0.1)
        assert read(smoothed, preds[i : i + 1], torch.tensor([1 - i])) == math.inf
    # The second of three is wrong.
    batch = (torch.tensor([yes, no, 0.5], dtype=dtype), torch.tensor([1, 1, 1]), torch.tensor([1.0, 5.0, 3.0]))
    rest = reference.binary_cross_entropy(0.5, 1.0, form)
    assert read(BinaryCrossEntropy(input=form), *batch) == math.inf
    omitted = read(BinaryCrossEntropy(input=form, nan_policy="omit"), *batch)
    assert omitted == pytest.approx(3 * rest / 4, rel=1e-6)
    with pytest.raises(ValueError, match="nan_policy='raise'"):
        read(BinaryCrossEntropy(input=form, nan_policy="raise"), *batch)
    free = BinaryCrossEntropy(input=form, pos_weight=torch.tensor(0.0))
    assert read(free, torch.tensor([no], dtype=dtype), torch.tensor([1])) == 0.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("logit", [0.0, 5.0, 30.0, 100.0, 1e4])
def test_binary_large_logits(logit: float, target: float, dtype: torch.dtype) -> None:
    """Logits far beyond where a sigmoid saturates cost what they should; below `2**-64` nats a loss is 0."""
    for sign in (-1, 1):
        preds = torch.tensor([sign * logit], dtype=dtype)
        expected = reference.binary_cross_entropy(preds.item(), target)
        value = read(BinaryCrossEntropy(), preds, torch.tensor([target]))
        assert value == pytest.approx(expected, rel=1e-6, abs=2.0**-64)


@pytest.mark.parametrize("form", [pytest.param("logits", marks=pytest.mark.slow), "probs"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_binary_losses_do_not_know_their_neighbours(dtype: torch.dtype, form: str) -> None:
    """A binary loss has the same bits in batches of 1 to 40, of any stride, and on any number of threads."""
    size = 120_007
    preds = (6 * torch.randn(size)).to(dtype)
    preds = preds if form == "logits" else preds.sigmoid()
    target = torch.where(torch.rand(size) < 0.5, torch.rand(size), torch.randint(0, 2, (size,)))
    cuts = [0, *itertools.accumulate(range(1, 41)), 100_003, size]
    whole, strided = [(preds, target)], [tuple(torch.stack([x, x], 1)[:, 1] for x in (preds, target))]
    states = []
    for threads, batches in (
        (1, whole),
        (1, strided),
        (1, [(preds[i:j], target[i:j]) for i, j in itertools.pairwise(cuts)]),
        (2, whole),
        (2, strided),
        (5, [(preds[:100_003], target[:100_003]), (preds[100_003:], target[100_003:])]),
    ):
        torch.set_num_threads(threads)
        metric = filled(BinaryCrossEntropy(input=form, label_smoothing=0.1, nan_policy="omit"), batches)
        states.append(metric.tally.state.tolist())
    assert all(state == states[0] for state in states)
    rows = [BinaryCrossEntropy(input=form) for _ in range(2)]
    filled(rows[0], [(preds[:40], target[:40])])
    filled(rows[1], [(preds[i : i + 1], target[i : i + 1]) for i in range(40)])
    assert bits(rows[0].compute()) == bits(rows[1].compute())


@pytest.mark.parametrize("weighed", [False, True])
def test_binary_holds_little(weighed: bool, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """An update with a million binary targets holds at most 64 bytes for each, and 8 MiB."""
    size = 2**20
    preds, target = torch.randn(size // 8, 8), torch.randint(0, 2, (size // 8, 8))
    weight = torch.rand(size // 8, 8) if weighed else None
    metric = BinaryCrossEntropy(pos_weight=torch.rand(8), label_smoothing=0.1, ignore_index=-1)
    assert peak_bytes(lambda: metric.update(preds, target, weight=weight)) < 64 * size + 8 * 2**20
