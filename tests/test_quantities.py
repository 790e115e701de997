"""Binary, decomposed, per byte, grouped, normalized, paired and shifted readings, judged by code that shares nothing.

The judges are `tests/reference.py`, PyTorch's functionals in float64 on all the data at once, rationals, and torcheval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torcheval.metrics import BinaryNormalizedEntropy

from tests import reference
from tests.conftest import Operators
from tests.reference import Target
from tests.strategies import partitions, relaxed
from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    NormalizedCrossEntropy,
    Perplexity,
    functional,
)

K, T, ROWS, GROUPS = 6, 5, 9, 4
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
TABLE = torch.tensor([0, 1, 3, 2, 1, 7])
LAST = slice(None, -1), slice(1, None)  # What a shift leaves of the predictions, and of the labels.


def bits(value: Any) -> Any:
    """Every bit of a value, of a vector, or of a dict of values."""
    if isinstance(value, dict):
        return {name: bits(x) for name, x in value.items()}
    return [float(x).hex() for x in value.flatten().tolist()]


def filled(metric: Any, batches: Any) -> Any:
    """Update a metric with batches."""
    for batch in batches:
        metric.update(*batch)
    return metric


def read(metric: Any, *batch: Any) -> Any:
    """Update a metric with one batch and read it, as Python numbers."""
    value = filled(metric, [batch]).compute()
    return {name: x.item() for name, x in value.items()} if isinstance(value, dict) else value.tolist()


def ragged(*tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Cut tensors alike into batches of unequal size, one of them empty."""
    cuts = [0, 1, 1, 4, *([len(tensors[0])] if tensors[0] is not None else [])]
    return [tuple(None if x is None else x[i:j] for x in tensors) for i, j in itertools.pairwise(cuts)]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Some roundings of the type in which losses are computed."""
    return {"rel": 1e-13, "abs": 1e-13} if dtype == torch.float64 else {"rel": 1e-6, "abs": 1e-6}


def distributions(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Soft targets, some of which give some classes nothing."""
    probs = torch.rand(shape, dtype=torch.float64) * (torch.rand(shape) < 0.7)
    probs[..., 0] += 0.1
    return (probs / probs.sum(-1, keepdim=True)).to(dtype)


def sequences_of(losses: Tensor, weight: Tensor | None = None, norm: Tensor | None = None) -> list[list[Target]]:
    """Losses of shape (sequences, targets) as the reference wants them."""
    weight = torch.ones_like(losses) if weight is None else weight
    norm = torch.ones_like(losses) if norm is None else norm
    rows = zip(losses.tolist(), norm.tolist(), weight.tolist(), strict=True)
    return [[Target(*t) for t in zip(*row, strict=True)] for row in rows]


def losses_of(logits: Tensor, target: Tensor) -> Tensor:
    """Losses of `F.cross_entropy` in float64, of target's shape; 0 where it is ignored."""
    return F.cross_entropy(logits.double().flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


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
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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
        value = functional.binary_cross_entropy(preds, target, weight, input=form, **options)
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


# Decomposition.


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_decomposition_of_soft_targets(dtype: torch.dtype, class_dim: int, weighed: bool) -> None:
    """Cross-entropy, entropy and divergence are those of `F.cross_entropy`, of the reference and of `KLDivLoss`."""
    preds, target = torch.randn(ROWS, T, K, dtype=torch.float64).to(dtype), distributions(ROWS, T, K, dtype=dtype)
    weight = torch.rand(ROWS, T, dtype=torch.float64) * (torch.rand(ROWS, T) < 0.7) if weighed else None
    metric = CrossEntropyDecomposition(class_dim=class_dim)
    filled(metric, ragged(preds.movedim(-1, class_dim), target.movedim(-1, class_dim), weight))
    value = {name: x.item() for name, x in metric.compute().items()}

    flat, probs = preds.double().flatten(0, 1), target.double().flatten(0, 1)
    weights = torch.ones(ROWS * T, dtype=torch.float64) if weight is None else weight.flatten()
    entropies = torch.tensor([reference.entropy(row) for row in probs.tolist()], dtype=torch.float64)
    divergences = torch.nn.KLDivLoss(reduction="none")(flat.log_softmax(-1), probs).sum(-1)
    losses = F.cross_entropy(flat, probs, reduction="none")
    parts = {"cross_entropy": losses, "entropy": entropies, "kl_divergence": divergences}
    expected = {name: ((x * weights).sum() / weights.sum()).item() for name, x in parts.items()}
    assert value == pytest.approx(expected, **tolerance(dtype))
    assert value["cross_entropy"] == pytest.approx(value["entropy"] + value["kl_divergence"], rel=0, abs=1e-12)
    if weight is None:
        batchmean = torch.nn.KLDivLoss(reduction="batchmean")(flat.log_softmax(-1), probs).item()
        assert value["kl_divergence"] == pytest.approx(batchmean, **tolerance(dtype))
        one_pass = functional.cross_entropy_decomposition(
            preds.movedim(-1, class_dim), target.movedim(-1, class_dim), class_dim=class_dim
        )
        assert {name: x.item() for name, x in one_pass.items()} == pytest.approx(value, rel=1e-13)
    rows = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    assert all(x["cross_entropy"].item() == pytest.approx((x["entropy"] + x["kl_divergence"]).item()) for x in rows)


def smoothed_row(true: int, share: float, num_classes: int, over: str) -> list[float]:
    """Write a smoothed target out as a distribution, as its convention has it."""
    if over == "all":
        return [(1 - share) * (k == true) + share / num_classes for k in range(num_classes)]
    return [1 - share if k == true else share / (num_classes - 1) for k in range(num_classes)]


@pytest.mark.parametrize("over", ["all", "others"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("form", ["logits", "log_probs", "probs"])
def test_decomposition_of_smoothed_classes(form: str, share: float, over: str) -> None:
    """A smoothed class has the entropy of its distribution, a class as it is has none."""
    logits, target = torch.randn(ROWS, K, dtype=torch.float64), torch.randint(0, K, (ROWS,))
    target[2] = -100
    preds = {"logits": logits, "log_probs": logits.log_softmax(-1), "probs": logits.softmax(-1)}[form]
    metric = CrossEntropyDecomposition(input=form, label_smoothing=share, label_smoothing_over=over)
    value = read(metric, preds, target)
    kept = [(reference.log_softmax(q), y) for q, y in zip(logits.tolist(), target.tolist(), strict=True) if y >= 0]
    spread = [(smoothed_row(y, share, K, over), q) for q, y in kept]
    expected = {
        "cross_entropy": sum(reference.target_loss(q, p) for p, q in spread) / len(kept),
        "entropy": sum(reference.entropy(p) for p, _ in spread) / len(kept),
        "kl_divergence": sum(reference.kl_divergence(p, q) for p, q in spread) / len(kept),
    }
    assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert value["cross_entropy"] == pytest.approx(value["entropy"] + value["kl_divergence"], rel=0, abs=1e-12)
    if not share:
        assert value["entropy"] == 0.0


@pytest.mark.parametrize("over", ["all", "others"])
def test_decomposition_of_smoothed_soft_targets(over: str) -> None:
    """A soft target is mixed with the uniform distribution before its entropy is taken."""
    preds, target = torch.randn(ROWS, K, dtype=torch.float64), distributions(ROWS, K)
    share = 0.3 if over == "all" else 0.3 * K / (K - 1)
    mixed = (1 - share) * target + share / K
    value = read(CrossEntropyDecomposition(label_smoothing=0.3, label_smoothing_over=over), preds, target)
    expected = sum(reference.entropy(row) for row in mixed.tolist()) / ROWS
    assert value["entropy"] == pytest.approx(expected, rel=1e-13)
    divergence = torch.nn.KLDivLoss(reduction="batchmean")(preds.log_softmax(-1), mixed).item()
    assert value["kl_divergence"] == pytest.approx(divergence, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decomposition_of_a_perfect_model(dtype: torch.dtype) -> None:
    """A model that is the targets' own distribution has no divergence."""
    target = distributions(ROWS, T, K)
    value = read(CrossEntropyDecomposition(input="probs"), target.to(dtype), target.to(dtype))
    assert value["kl_divergence"] == pytest.approx(0.0, abs=1e-6 if dtype == torch.float32 else 1e-14)
    assert value["entropy"] > 0.1


def test_decomposition_with_an_infinite_loss() -> None:
    """An infinite loss is infinite divergence and finite entropy, or leaves its target out of all three."""
    preds, target = torch.randn(4, K, dtype=torch.float64), distributions(4, K)
    preds[1, 0] = -math.inf
    weight = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
    entropies = [reference.entropy(row) for row in target.tolist()]
    value = read(CrossEntropyDecomposition(), preds, target, weight)
    mean = sum(w * x for w, x in zip(weight.tolist(), entropies, strict=True)) / 7.5
    assert value == pytest.approx({"cross_entropy": math.inf, "entropy": mean, "kl_divergence": math.inf}, rel=1e-13)
    rest = torch.tensor([0, 2, 3])
    expected = read(CrossEntropyDecomposition(), preds[rest], target[rest], weight[rest])
    assert read(CrossEntropyDecomposition(nan_policy="omit"), preds, target, weight) == expected
    forward = CrossEntropyDecomposition(nan_policy="omit")(preds, target, weight)
    assert {name: x.item() for name, x in forward.items()} == pytest.approx(expected, rel=1e-13)
    assert expected["entropy"] == pytest.approx(
        sum(w * entropies[i] for i, w in zip(rest.tolist(), weight[rest].tolist(), strict=True)) / 5.5, rel=1e-13
    )
    with pytest.raises(ValueError, match="nan_policy='raise'"):
        read(CrossEntropyDecomposition(nan_policy="raise"), preds, target, weight)


def test_decomposition_with_a_weighted_loss_that_is_too_large() -> None:
    """A loss that only its weight makes too large to sum is left out of the entropy too."""
    preds, target = torch.tensor([[0.0, -1e20], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    value = read(CrossEntropyDecomposition(nan_policy="omit"), preds, target, torch.tensor([1e10, 1.0]))
    assert value["cross_entropy"] == pytest.approx(math.log(1 + math.e) - 0.1, rel=1e-6)
    assert value["entropy"] == pytest.approx(reference.entropy([0.9, 0.1]), rel=1e-6)


# Label smoothing.


def test_label_smoothing_over_others() -> None:
    """Smoothing by 0.1 over three classes is `[0.9, 0.05, 0.05]`, which is PyTorch's 0.15."""
    preds, target = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    soft = torch.full((7, 3), 0.05, dtype=torch.float64)
    soft[torch.arange(7), target] = 0.9
    expected = F.cross_entropy(preds, soft).item()
    options: dict[str, Any] = {"label_smoothing": 0.1, "label_smoothing_over": "others"}
    assert read(CrossEntropy(**options), preds, target) == pytest.approx(expected, rel=1e-14)
    assert functional.cross_entropy(preds, target, **options).item() == pytest.approx(expected, rel=1e-14)
    assert F.cross_entropy(preds, target, label_smoothing=0.15).item() == pytest.approx(expected, rel=1e-14)
    losses = functional.per_target_losses(preds, target, **options)
    torch.testing.assert_close(losses, F.cross_entropy(preds, soft, reduction="none"))
    assert bits(functional.tally(preds, target, **options).state) == bits(
        filled(CrossEntropy(**options), [(preds, target)]).tally.state
    )


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("over", ["all", "others"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.75])
def test_both_conventions_are_their_soft_targets(share: float, over: str, weighed: bool) -> None:
    """A smoothed class costs what its distribution costs, written out, with class weights too."""
    preds, target = torch.randn(ROWS, K, dtype=torch.float64), torch.randint(0, K, (ROWS,))
    class_weight = torch.rand(K, dtype=torch.float64) if weighed else None
    options: dict[str, Any] = {"label_smoothing": share, "label_smoothing_over": over}
    losses = functional.per_target_losses(preds, target, class_weight=class_weight, **options)
    rows = [smoothed_row(y, share, K, over) for y in target.tolist()]
    judged = [
        reference.target_loss(reference.log_softmax(q), p, class_weight=class_weight.tolist() if weighed else None)
        for q, p in zip(preds.tolist(), rows, strict=True)
    ]
    assert losses.tolist() == pytest.approx(judged, rel=1e-13)
    value = read(CrossEntropy(class_weight=class_weight, **options), preds, target)
    all_classes = share if over == "all" else functional.convert_label_smoothing(share, K)
    expected = F.cross_entropy(preds, target, class_weight, label_smoothing=all_classes).item()
    assert value == pytest.approx(expected, rel=1e-13)
    one_hot = F.one_hot(target, K).double()
    assert read(CrossEntropy(**options), preds, one_hot) == pytest.approx(
        F.cross_entropy(preds, torch.tensor(rows, dtype=torch.float64)).item(), rel=1e-13
    )


@pytest.mark.parametrize("num_classes", [2, 3, 7, 10, 49, 1000, 128256])
def test_convert_label_smoothing(num_classes: int) -> None:
    """The converted share is the rational `b K / (K - 1)` to the last bits, up to 1, and not beyond."""
    bound = (num_classes - 1) / num_classes
    for share in (0.0, 1e-300, 0.1, 0.25, 1 / 3, 0.5, bound):
        if share <= bound:
            value = functional.convert_label_smoothing(share, num_classes)
            exact = Fraction(share) * num_classes / (num_classes - 1)
            assert abs(Fraction(value) - exact) <= exact * Fraction(1, 2**52)
            assert value <= 1.0
    for share in (math.nextafter(bound, 2), 1.0):
        with pytest.raises(ValueError, match="at most"):
            functional.convert_label_smoothing(share, num_classes)


def test_convert_label_smoothing_at_the_edges() -> None:
    """With one class there is nothing to spread over; what is no share is refused."""
    assert functional.convert_label_smoothing(0, 1) == 0.0
    for share in (0.1, 1.0, 1e-300):
        with pytest.raises(ValueError, match="at most"):
            functional.convert_label_smoothing(share, 1)
    for bad in (-0.1, 1.1, math.nan, True, "0.1"):
        with pytest.raises(ValueError, match="`label_smoothing` must be a number"):
            functional.convert_label_smoothing(bad, 3)
    options: dict[str, Any] = {"label_smoothing": 2 / 3, "label_smoothing_over": "others"}
    losses = functional.per_target_losses(torch.tensor([[1.0, 2.0, 4.0]]).expand(3, 3), torch.arange(3), **options)
    assert losses.tolist() == pytest.approx([losses[0].item()] * 3)  # The target is uniform.
    with pytest.raises(ValueError, match="at most"):
        functional.per_target_losses(torch.zeros(1, 2), torch.tensor([0]), **options)
    with pytest.raises(ValueError, match="`label_smoothing_over` must be one of"):
        CrossEntropy(label_smoothing_over="other")


# Bits per byte.


def judge_bits_per_byte(preds: Tensor, target: Tensor, weight: Tensor | None, table: Tensor) -> float:
    """Judge total bits over total bytes with plain floats; a token without bytes is in neither."""
    weight = torch.ones(target.shape) if weight is None else weight
    nats, num_bytes = [], []
    for q, y, w in zip(preds.flatten(0, 1).tolist(), target.flatten().tolist(), weight.flatten().tolist(), strict=True):
        if y >= 0 and w > 0 and table[y] > 0:
            nats.append(w * reference.target_loss(reference.log_softmax(q), y))
            num_bytes.append(w * table[y].item())
    return reference.bits_per_byte(math.fsum(nats), math.fsum(num_bytes))


@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("weighing", [None, torch.float64, torch.bool])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_bits_per_byte_of_a_table(dtype: torch.dtype, weighing: torch.dtype | None, class_dim: int) -> None:
    """With a table the value is total bits over total bytes, tokens without bytes left out even if impossible."""
    preds, target = torch.randn(ROWS, T, K, dtype=torch.float64), torch.randint(0, K, (ROWS, T))
    target[3:, 1] = -100
    weight = None if weighing is None else (2 * torch.rand(ROWS, T, dtype=torch.float64)).to(weighing)
    if weight is not None:
        weight[2] = 0
    expected = judge_bits_per_byte(preds, target, weight, TABLE)
    preds[..., 0] = torch.where(target == 0, -math.inf, preds[..., 0])  # Token 0 has no bytes.
    assert (target == 0).any()
    table = TABLE.to(dtype)
    batches = ragged(preds.movedim(-1, class_dim), target, None, weight)
    value = filled(BitsPerByte(token_bytes=table, class_dim=class_dim), batches).compute().item()
    assert value == pytest.approx(expected, rel=1e-13)
    one_pass = functional.bits_per_byte(
        preds.movedim(-1, class_dim), target, weight=weight, token_bytes=table, class_dim=class_dim
    )
    assert one_pass.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("form", ["integer", "scalar", "per sequence", "column"])
@pytest.mark.parametrize("weighed", [False, True])
def test_bits_per_byte_of_given_bytes(form: str, weighed: bool) -> None:
    """Given bytes are summed over batches, are not weighted, and do not depend on how they are given."""
    preds, target = torch.randn(ROWS, T, K, dtype=torch.float64), torch.randint(0, K, (ROWS, T))
    target[:, -1] = -100
    weight = torch.rand(ROWS, T, dtype=torch.float64) if weighed else None
    each = torch.randint(1, 50, (ROWS,))
    metric = BitsPerByte()
    for some, labels, weights, num_bytes in ragged(preds, target, weight, each):
        given = {
            "integer": int(num_bytes.sum()),
            "scalar": num_bytes.sum().to(torch.int32),
            "per sequence": num_bytes.to(torch.uint8),
            "column": num_bytes[:, None],
        }[form]
        metric.update(some, labels, given, weights)
    weights = torch.ones(ROWS, T, dtype=torch.float64) if weight is None else weight
    total = math.fsum((losses_of(preds, target) * weights).flatten().tolist())
    expected = reference.bits_per_byte(total, int(each.sum()))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-13)
    assert functional.bits_per_byte(preds, target, each, weight).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_bytes_of_every_integer(dtype: torch.dtype) -> None:
    """Bytes and tables of bytes may be integers of any type, and a sum of bytes does not wrap."""
    preds, target = torch.zeros(4, 8), torch.tensor([0, 1, 2, 3])
    each = torch.full((4,), 100).to(dtype)
    assert functional.bits_per_byte(preds, target, each).item() == pytest.approx(12 / 400, rel=1e-6)
    table = torch.full((8,), 3).to(dtype)
    assert functional.bits_per_byte(preds, target, token_bytes=table).item() == pytest.approx(1.0, rel=1e-6)


def test_a_table_need_not_be_as_long_as_the_logits() -> None:
    """Padded logits may have more classes than the table, and a table more tokens; an id has to be in both."""
    preds, target = torch.zeros(3, 8), torch.tensor([1, 3, 5])
    for table in (TABLE, torch.cat([TABLE, TABLE])):
        assert read(BitsPerByte(token_bytes=table), preds, target) == pytest.approx(9 / (1 + 2 + 7), rel=1e-6)
    for table, bad in ((TABLE, 6), (torch.cat([TABLE, TABLE]), 8)):
        for metric in (BitsPerByte(token_bytes=table), CrossEntropyReport(token_bytes=table)):
            with pytest.raises(ValueError, match=rf"\[0, {bad}\) .*such as {bad};"):
                metric.update(preds, torch.tensor([1, bad, 5]))
            assert metric.tally.state.count_nonzero() == 0


def test_bits_per_byte_without_bytes() -> None:
    """Without a scored target, or without a byte, the value is NaN; bytes that were given count whatever was scored."""
    preds, ignored = torch.randn(2, 3, K), torch.full((2, 3), -100)
    by_table, by_number = BitsPerByte(token_bytes=TABLE), BitsPerByte()
    for target in (ignored, torch.zeros_like(ignored)):
        assert math.isnan(read(by_table, preds, target))
    assert math.isnan(read(by_number, preds, ignored, 1000))
    assert math.isnan(read(by_number, preds, torch.ones_like(ignored), 1000, torch.zeros(2, 3)))
    assert math.isnan(read(BitsPerByte(), preds, torch.ones_like(ignored), 0))
    target = torch.randint(1, K, (2, 3))
    total = losses_of(preds, target).sum().item()
    assert read(by_number, preds, target, 7) == pytest.approx(reference.bits_per_byte(total, 2007), rel=1e-6)
    assert read(by_table, preds, target) == pytest.approx(
        reference.bits_per_byte(total, int(TABLE[target].sum())), rel=1e-6
    )


@pytest.mark.parametrize("nan_policy", ["propagate", "omit"])
@pytest.mark.parametrize("infinite", [False, True])
def test_report_with_bytes(infinite: bool, nan_policy: str) -> None:
    """A report with a table adds `bits_per_byte`, that of `BitsPerByte`, and changes no bit of what else it reads."""
    preds, target = torch.randn(ROWS, T, K), torch.randint(0, K, (ROWS, T)).masked_fill(torch.rand(ROWS, T) < 0.2, -100)
    weight = torch.rand(ROWS, T)
    if infinite:
        target[4, 2] = target[5, 2] = 0
        preds[4, 2, 0] = -math.inf
        target[0, 0], preds[0, 0, 3] = 3, -math.inf
    batches = ragged(preds, target, weight)
    report = filled(CrossEntropyReport(token_bytes=TABLE, nan_policy=nan_policy), batches)
    plain = filled(CrossEntropyReport(nan_policy=nan_policy), batches).compute()
    single = filled(BitsPerByte(token_bytes=TABLE, nan_policy=nan_policy), [(*b[:2], None, b[2]) for b in batches])
    value = report.compute()
    assert bits(value) == {**bits(plain), "bits_per_byte": bits(single.compute())}
    assert list(value) == [*plain, "bits_per_byte"]
    forward = CrossEntropyReport(token_bytes=TABLE, nan_policy=nan_policy)(preds, target, weight)
    assert forward["bits_per_byte"].item() == pytest.approx(value["bits_per_byte"].item(), rel=1e-13)
    assert forward["num_tokens"] == value["num_tokens"]


# Groups.


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "bits"},
        {"class_weight": torch.linspace(0, 2, K)},
        {"class_weight": torch.rand(K), "label_smoothing": 0.1, "label_smoothing_over": "others"},
        {"class_dim": 1},
    ],
)
@pytest.mark.parametrize("weighed", ["", "full", "column", "row", "mask"])
def test_a_group_is_its_subset(weighed: str, options: dict[str, Any], soft: bool) -> None:
    """The value of each group is that of `CrossEntropy` on its targets, bit for bit."""
    preds, target, group = torch.randn(ROWS, T, K), torch.randint(0, K, (ROWS, T)), torch.randint(0, GROUPS, (ROWS, T))
    if not soft:
        target = target.masked_fill(torch.rand(ROWS, T) < 0.2, -100)
    else:
        target = distributions(ROWS, T, K, dtype=torch.float32)
    weight = {
        "": None,
        "full": torch.rand(ROWS, T, dtype=torch.float64),
        "column": torch.rand(ROWS, 1),
        "row": torch.rand(T),
        "mask": torch.rand(ROWS, T) < 0.7,
    }[weighed]
    class_dim = options.get("class_dim", -1)
    move = (lambda x: x.movedim(-1, class_dim)) if class_dim == 1 else (lambda x: x)
    metric = GroupedCrossEntropy(GROUPS + 2, **options)
    some = weight if weight is None or len(weight) == ROWS else weight.expand(ROWS, T)
    if weighed == "row":
        metric.update(move(preds), move(target) if soft else target, group, weight)
    else:
        filled(metric, ragged(move(preds), move(target) if soft else target, group, some))
    value = metric.compute()
    flat_options = {**options, "class_dim": -1}
    weights = None if weight is None else weight.expand(ROWS, T)
    expected = []
    for g in range(GROUPS):
        mask = group == g
        subset = CrossEntropy(**flat_options)
        subset.update(preds[mask], target[mask], None if weights is None else weights[mask])
        expected += bits(subset.compute())
    assert bits(value) == [*expected, *bits(torch.full((2,), math.nan))]
    assert value.dtype == torch.float64
    one_pass = functional.grouped_cross_entropy(
        move(preds), move(target) if soft else target, group, weight, num_groups=GROUPS + 2, **options
    )
    torch.testing.assert_close(one_pass, value, rtol=1e-13, atol=0, equal_nan=True)


def test_grouped_by_the_recipes() -> None:
    """The recipes for data sets, classes and positions give the mean loss of each."""
    preds, target = torch.randn(ROWS, T, K, dtype=torch.float64), torch.randint(0, K, (ROWS, T))
    target[:, 3] = target[:, 3].masked_fill(target[:, 3] < 3, -100)
    losses, scored = losses_of(preds, target), target >= 0
    dataset = torch.tensor([0, 2, 2, 0, 2, 0, 0, 2, 2])
    recipes = {
        "dataset": (3, dataset[:, None], dataset[:, None].expand(ROWS, T)),
        "class": (K, target, target),
        "position": (T, torch.arange(T), torch.arange(T).expand(ROWS, T)),
    }
    for num_groups, group, where in recipes.values():
        value = read(GroupedCrossEntropy(num_groups), preds, target, group)
        expected = [losses[(where == g) & scored].mean().item() for g in range(num_groups)]
        assert value == pytest.approx(expected, rel=1e-13, nan_ok=True)
        assert value == pytest.approx(
            read(GroupedCrossEntropy(num_groups), preds, target, group.to(torch.int16)), nan_ok=True
        )
    assert math.isnan(read(GroupedCrossEntropy(3), preds, target, dataset[:, None])[1])


def test_groups_of_what_is_not_scored_may_be_anything() -> None:
    """An ignored or masked target may have any group, a scored one may not."""
    preds, target, group = torch.randn(3, K), torch.tensor([1, -100, 2]), torch.tensor([1, -7, 2**40])
    value = read(GroupedCrossEntropy(2), preds, target, group, torch.tensor([1.0, 1.0, 0.0]))
    assert value == pytest.approx([math.nan, losses_of(preds, target)[0].item()], rel=1e-6, nan_ok=True)
    with pytest.raises(ValueError, match=rf"`group` must hold integers in \[0, 2\), got 1 .* {2**40};"):
        read(GroupedCrossEntropy(2), preds, target, group)


def test_each_group_has_its_own_infinities() -> None:
    """An infinite or NaN loss propagates into its own group, or is left out of it."""
    losses = torch.tensor([1.0, math.inf, 3.0, math.nan, 5.0, -math.inf, 7.0, math.inf, -math.inf, 2.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 4, 5])
    batch = (losses, torch.zeros(10, dtype=torch.int64), group)
    propagated = [math.inf, math.nan, -math.inf, 7.0, math.nan, 2.0, math.nan]
    for policy, expected in (("propagate", propagated), ("omit", [1.0, 3.0, 5.0, 7.0, math.nan, 2.0, math.nan])):
        metric = GroupedCrossEntropy(7, input="losses", nan_policy=policy)
        assert metric(*batch).tolist() == pytest.approx(expected, nan_ok=True)
        assert metric.compute().tolist() == pytest.approx(expected, nan_ok=True)
    with pytest.raises(ValueError, match="nan_policy='raise'"):
        read(GroupedCrossEntropy(7, input="losses", nan_policy="raise"), *batch)


def test_a_hundred_thousand_groups(operators: Operators) -> None:
    """Many groups are as exact as few, and take no operator more."""
    size, num_groups = 150_000, 100_000
    preds, target, group = torch.randn(size, 3), torch.randint(0, 3, (size,)), torch.randint(0, num_groups, (size,))
    metric = filled(GroupedCrossEntropy(num_groups), ragged(preds, target, group))
    value = metric.compute()
    assert value.isnan().equal(torch.bincount(group, minlength=num_groups) == 0)
    for g in [*range(0, num_groups, 1999), num_groups - 1]:
        mask = group == g
        if mask.any():
            subset = filled(CrossEntropy(), [(preds[mask], target[mask])])
            assert bits(value[g]) == bits(subset.compute())
    counts = []
    for number in (2, num_groups):
        operators.counts.clear()
        few = GroupedCrossEntropy(number)
        with operators:
            few.update(preds, target, group % number)
            few(preds[:9], target[:9], group[:9] % number)
        counts.append(operators.counts.copy())
    assert counts[0] == counts[1]
    assert counts[0].total() < 1000


# Normalized cross-entropy.


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("rate", [0.5, 0.1, 0.002])
def test_normalized_is_torchevals(rate: float, weighed: bool) -> None:
    """With two columns `[0, x]` the value is torcheval's normalized entropy."""
    x, y = torch.randn(3000, dtype=torch.float64) - 2, torch.rand(3000) < rate
    weight = torch.rand(3000, dtype=torch.float64) if weighed else None
    columns = torch.stack([torch.zeros_like(x), x], -1)
    metric, judge = NormalizedCrossEntropy(2), BinaryNormalizedEntropy(from_logits=True)
    for some, columns_of, labels, weights in ragged(x, columns, y, weight):
        metric.update(columns_of, labels.long(), weights)
        if len(some):
            judge.update(some, labels.double(), weight=weights)
    assert metric.compute().item() == pytest.approx(judge.compute().item(), rel=1e-10)
    one_pass = functional.normalized_cross_entropy(columns, y.long(), weight, num_classes=2)
    assert one_pass.item() == pytest.approx(judge.compute().item(), rel=1e-10)


@pytest.mark.parametrize("weighed", ["", "full", "column", "mask"])
@pytest.mark.parametrize("num_classes", [2, 5, 300])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_normalized_of_many_classes(class_dim: int, num_classes: int, weighed: str) -> None:
    """The value is cross-entropy over the entropy of the classes seen, by weight, those not seen adding nothing."""
    preds = torch.randn(ROWS, T, num_classes, dtype=torch.float64)
    target = torch.randint(0, num_classes, (ROWS, T)).masked_fill(torch.rand(ROWS, T) < 0.2, -100)
    weight = {
        "": None,
        "full": torch.rand(ROWS, T, dtype=torch.float64),
        "column": torch.rand(ROWS, 1, dtype=torch.float64),
        "mask": torch.rand(ROWS, T) < 0.7,
    }[weighed]
    weights = (target >= 0) * (1.0 if weight is None else weight.expand(ROWS, T).double())
    nats = (losses_of(preds, target) * weights).sum() / weights.sum()
    frequencies = [weights[target == k].sum().item() for k in range(num_classes)]
    expected = reference.normalized_cross_entropy(nats.item(), frequencies)
    metric = NormalizedCrossEntropy(num_classes, class_dim=class_dim)
    filled(metric, ragged(preds.movedim(-1, class_dim), target, weight))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)
    one_pass = NormalizedCrossEntropy(num_classes, class_dim=class_dim)(preds.movedim(-1, class_dim), target, weight)
    assert one_pass.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [[1, 1], [3, 1], [999_999, 1], [5, 0, 2, 13]])
def test_the_base_rate_is_one(counts: list[int]) -> None:
    """A model that knows the base rate and nothing else reads 1, however rare a class is."""
    frequencies = torch.tensor(counts, dtype=torch.float64)
    target = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    preds = (frequencies / frequencies.sum()).expand(len(target), -1)
    assert read(NormalizedCrossEntropy(len(counts), input="probs"), preds, target) == pytest.approx(1.0, rel=1e-11)


def test_normalized_without_a_choice() -> None:
    """One class seen has no entropy, and no target has no value; a second class heals both."""
    preds = torch.randn(4, 3, dtype=torch.float64)
    metric = NormalizedCrossEntropy(3)
    for target in ([-100] * 4, [1, 1, 1, -100], [1, 1, 1, 1]):
        assert metric(preds, torch.tensor(target)).isnan()
        assert metric.compute().isnan()
    assert metric(preds, torch.tensor([1, 1, 1, 2]), torch.tensor([1.0, 1.0, 1.0, 0.0])).isnan()
    value = read(metric, preds, torch.tensor([2, 1, 0, 0]))
    assert math.isfinite(value)
    frequencies = [2, 3 + 4 + 3 + 1, 1]
    losses = [losses_of(preds, torch.tensor(x)) for x in ([1] * 3 + [-100], [1] * 4, [1] * 3 + [-100], [2, 1, 0, 0])]
    nats = torch.cat(losses).sum().item() / sum(frequencies)
    assert value == pytest.approx(reference.normalized_cross_entropy(nats, frequencies), rel=1e-13)


@pytest.mark.parametrize("losses", [[1.0, 2.0, math.inf, 3.0], [1.0, 2.0, 3.0, math.inf]])
def test_normalized_with_an_infinite_loss(losses: list[float]) -> None:
    """An infinite loss is an infinite ratio; left out, its target is in no frequency either."""
    preds, target = torch.tensor(losses), torch.tensor([0, 1, 0, 2])
    metric = NormalizedCrossEntropy(3, input="losses")
    assert read(metric, preds, target) == metric(preds, target).item() == math.inf
    kept = preds.isfinite()
    seen = torch.bincount(target[kept], minlength=3).tolist()
    expected = reference.normalized_cross_entropy(2.0, seen)
    omitting = NormalizedCrossEntropy(3, input="losses", nan_policy="omit")
    assert read(omitting, preds, target) == pytest.approx(expected, rel=1e-13)
    with pytest.raises(ValueError, match="nan_policy='raise'"):
        read(NormalizedCrossEntropy(3, input="losses", nan_policy="raise"), preds, target)


def test_normalized_with_a_class_of_infinite_losses() -> None:
    """A class of which every loss is infinite was seen all the same: the ratio is infinite."""
    metric = NormalizedCrossEntropy(2, input="losses")
    batch = (torch.tensor([1.0, 2.0, math.inf]), torch.tensor([0, 0, 1]))
    assert [metric(*batch).item(), metric.compute().item()] == [math.inf, math.inf]


# Two models.


def judge_difference(difference: Tensor, weight: Tensor | None, confidence: float) -> dict[str, float]:
    """Judge paired differences, clustered by sequence."""
    sequences = sequences_of(difference, weight)
    mean, (lower, upper) = reference.cross_entropy(sequences), reference.interval(sequences, confidence)
    return {
        "difference": mean,
        "difference_stderr": reference.stderr(sequences),
        "difference_lower": lower,
        "difference_upper": upper,
        "perplexity_ratio": reference.perplexity(mean),
        "perplexity_ratio_lower": reference.perplexity(lower),
        "perplexity_ratio_upper": reference.perplexity(upper),
    }


@pytest.mark.parametrize("confidence", [0.95, 0.5])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_difference(class_dim: int, weighed: bool, soft: bool, confidence: float) -> None:
    """Difference, standard error, interval and ratio are those of the paired differences."""
    models = [torch.randn(ROWS, T, K, dtype=torch.float64) for _ in range(2)]
    target = torch.randint(0, K, (ROWS, T)).masked_fill(torch.rand(ROWS, T) < 0.2, -100)
    scored = (target >= 0).double()
    losses = [losses_of(x, target) for x in models]
    if soft:
        target, scored = distributions(ROWS, T, K), torch.ones_like(scored)
        losses = [F.cross_entropy(x.movedim(-1, 1), target.movedim(-1, 1), reduction="none") for x in models]
    weight = torch.rand(ROWS, T, dtype=torch.float64) if weighed else None
    weights = scored if weight is None else scored * weight
    expected = judge_difference(losses[1] - losses[0], weights, confidence)
    a, b, labels = (x.movedim(-1, class_dim) if x.dim() == 3 else x for x in (*models, target))
    metric = CrossEntropyDifference(class_dim=class_dim, confidence=confidence)
    value = filled(metric, ragged(a, b, labels, weight)).compute()
    assert {name: x.item() for name, x in value.items()} == pytest.approx(expected, rel=1e-8)
    assert list(value) == list(expected)
    one_pass = functional.cross_entropy_difference(a, b, labels, weight, class_dim=class_dim, confidence=confidence)
    assert {name: x.item() for name, x in one_pass.items()} == pytest.approx(expected, rel=1e-6)
    two = [read(CrossEntropy(class_dim=class_dim), x, labels, weight) for x in (a, b)]
    assert value["difference"].item() == pytest.approx(two[1] - two[0], rel=1e-12)


def test_pairing_cancels_what_is_hard_for_both() -> None:
    """Where both models find the same sequences hard, the paired standard error is far below the unpaired one."""
    hard = 4 * torch.rand(50, 1, dtype=torch.float64)
    first, second = (hard + mean + 0.05 * torch.randn(50, 20, dtype=torch.float64) for mean in (2.0, 1.97))
    target = torch.zeros(50, 20, dtype=torch.int64)
    value = read(CrossEntropyDifference(input="losses"), first, second, target)
    assert value == pytest.approx(judge_difference(second - first, None, 0.95), rel=1e-8)
    unpaired = math.hypot(*(reference.stderr(sequences_of(x)) for x in (first, second)))
    assert 30 * value["difference_stderr"] < unpaired
    assert value["difference_upper"] < 0 < value["difference"] + 2 * unpaired
    swapped = read(CrossEntropyDifference(input="losses"), second, first, target)
    assert swapped["difference"] == -value["difference"]
    assert swapped["difference_lower"] == -value["difference_upper"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_identical_models_do_not_differ(dtype: torch.dtype) -> None:
    """A model against itself differs by exactly 0, with no error, and has the ratio 1."""
    preds, target = torch.randn(ROWS, T, K).to(dtype), torch.randint(0, K, (ROWS, T))
    metric = CrossEntropyDifference()
    value = {name: x.item() for name, x in metric(preds, preds.clone(), target, torch.rand(ROWS, T)).items()}
    expected = {name: float("ratio" in name) for name in value}
    assert value == expected
    assert {name: x.item() for name, x in metric.compute().items()} == expected


def test_differences_of_float32_losses_are_exact() -> None:
    """Losses in float32 are subtracted without rounding."""
    first, second = torch.rand(1000), 100 * torch.rand(1000)
    value = read(CrossEntropyDifference(input="losses"), first, second, torch.zeros(1000, dtype=torch.int64))
    exact = sum(Fraction(b) - Fraction(a) for a, b in zip(first.tolist(), second.tolist(), strict=True)) / 1000
    assert value["difference"] == float(exact)


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        (1.0, math.inf, math.inf),
        (math.inf, 1.0, -math.inf),
        (math.inf, math.inf, math.nan),
        (math.nan, 1.0, math.nan),
        (1.0, math.nan, math.nan),
    ],
)
def test_difference_of_infinite_losses(first: float, second: float, difference: float) -> None:
    """One infinite loss is an infinite difference, two are none; `omit` leaves their target out."""
    a, b = torch.tensor([1.0, first, 2.0]), torch.tensor([1.5, second, 4.0])
    batch = (a, b, torch.zeros(3, dtype=torch.int64))
    metric = CrossEntropyDifference(input="losses")
    ratio = {math.inf: math.inf, -math.inf: 0.0}.get(difference, math.nan)
    for value in (metric(*batch), metric.compute()):
        assert value["difference"].item() == pytest.approx(difference, nan_ok=True)
        assert value["perplexity_ratio"].item() == pytest.approx(ratio, nan_ok=True)
        assert value["difference_stderr"].isnan()
    omitted = read(CrossEntropyDifference(input="losses", nan_policy="omit"), *batch)
    assert omitted == pytest.approx(judge_difference((b - a)[::2, None].double(), None, 0.95), rel=1e-8)
    with pytest.raises(ValueError, match="nan_policy='raise'"):
        read(CrossEntropyDifference(input="losses", nan_policy="raise"), *batch)


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


def make_data(seed: int = 7, rows: int = ROWS, length: int = T) -> dict[str, Tensor]:
    """Make everything that an update may take, a sequence to a row."""
    torch.manual_seed(seed)
    shape = (rows, length)
    return {
        "preds": torch.randn(*shape, K),
        "other": torch.randn(*shape, K),
        "target": torch.randint(0, K, shape).masked_fill(torch.rand(shape) < 0.2, -100),
        "soft": distributions(*shape, K, dtype=torch.float32),
        "weight": 2 * torch.rand(shape),
        "mask": torch.rand(shape) < 0.7,
        "column": torch.rand(rows, 1),
        "group": torch.randint(0, GROUPS, shape),
        "dataset": torch.randint(0, 2, (rows, 1)),
        "num_bytes": torch.randint(1, 9, (rows, 1)),
        "logits": 3 * torch.randn(shape),
        "probs": torch.rand(shape),
        "labels": torch.randint(-1, 2, shape),
        "soft_labels": torch.rand(shape),
    }


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
    forward = make(shift=True, class_dim=class_dim)(*(part(name, False) for name in names))
    expected = make(class_dim=class_dim)(*(part(name, True) for name in names))
    assert bits(forward) == bits(expected)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("case", WITH_SHIFT)
def test_shift_leaves_nothing_of_one_position(case: str, class_dim: int, length: int) -> None:
    """A sequence of one position has no label to score: NaN, and nothing is added."""
    make, names = WITH_SHIFT[case]
    metric = make(shift=True, class_dim=class_dim)
    data = make_data(length=length)
    values = metric(*(data[n].movedim(-1, class_dim) if data[n].dim() == 3 else data[n] for n in names))
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
    """A shifted batch holds a buffer of 4 MiB and a little for each target, never the logits again."""
    preds, target = torch.randn(4, 256, 2000), torch.randint(0, 2000, (4, 256))
    preds = preds if class_dim == -1 else preds.movedim(-1, 1).contiguous()
    metric = CrossEntropyReport(shift=True, class_dim=class_dim)
    peak = peak_bytes(lambda: metric.update(preds, target))
    assert peak < 5 * 2**20 + 64 * target.numel() < preds.numel() * 4


# The laws that hold for every class.


class Case(NamedTuple):
    """A metric, what its updates take, and its function."""

    make: Callable[..., Any]
    names: tuple[str, ...]
    function: Callable[..., Any] | None = None


def make_case(make: Any, names: str, function: Callable[..., Any] | None = None, **options: Any) -> Case:
    """Say what a metric is made of; its function has the same options."""
    return Case(
        lambda **more: make(**options, **more),
        tuple(names.split()),
        None if function is None else lambda *args, **more: function(*args, **options, **more),
    )


POSITIVE = torch.linspace(0, 3, T)
CASES = {
    "binary": make_case(
        BinaryCrossEntropy,
        "logits labels weight",
        functional.binary_cross_entropy,
        ignore_index=-1,
        pos_weight=POSITIVE,
    ),
    "binary smoothed": make_case(
        BinaryCrossEntropy, "logits soft_labels", functional.binary_cross_entropy, label_smoothing=0.1
    ),
    "binary probabilities": make_case(
        BinaryCrossEntropy,
        "probs labels mask",
        functional.binary_cross_entropy,
        input="probs",
        ignore_index=-1,
        eps=0.01,
        unit="bits",
    ),
    "decomposition": make_case(CrossEntropyDecomposition, "preds soft weight", functional.cross_entropy_decomposition),
    "decomposition smoothed": make_case(
        CrossEntropyDecomposition,
        "preds target mask",
        functional.cross_entropy_decomposition,
        label_smoothing=0.1,
        label_smoothing_over="others",
    ),
    "decomposition smoothed soft": make_case(
        CrossEntropyDecomposition, "preds soft", functional.cross_entropy_decomposition, label_smoothing=0.2
    ),
    "smoothed over others": make_case(
        CrossEntropy,
        "preds target weight",
        functional.cross_entropy,
        label_smoothing=0.2,
        label_smoothing_over="others",
    ),
    "shifted": make_case(CrossEntropy, "preds target weight", functional.cross_entropy, shift=True),
    "bytes of a table": make_case(BitsPerByte, "preds target", functional.bits_per_byte, token_bytes=TABLE),
    "bytes given": make_case(BitsPerByte, "preds target num_bytes weight", functional.bits_per_byte),
    "report with bytes": make_case(CrossEntropyReport, "preds target weight", token_bytes=TABLE),
    "grouped": make_case(
        GroupedCrossEntropy, "preds target group", functional.grouped_cross_entropy, num_groups=GROUPS
    ),
    "grouped and weighed": make_case(
        GroupedCrossEntropy,
        "preds soft group weight",
        functional.grouped_cross_entropy,
        num_groups=GROUPS,
        class_weight=torch.linspace(0, 2, K),
    ),
    "normalized": make_case(
        NormalizedCrossEntropy, "preds target weight", functional.normalized_cross_entropy, num_classes=K
    ),
    "difference": make_case(CrossEntropyDifference, "preds other target weight", functional.cross_entropy_difference),
}
each_case = pytest.mark.parametrize("name", CASES)


def take(data: dict[str, Tensor], names: tuple[str, ...], rows: Any = slice(None)) -> tuple[Tensor, ...]:
    """Take a batch of some rows."""
    return tuple(data[name][rows] for name in names)


@each_case
@settings(relaxed, max_examples=15)
@given(data=st.data())
def test_same_bits_for_any_batching(name: str, data: st.DataObject) -> None:
    """Any batch size and order, through `update`, `forward` or `merge_state`, leave the same state and reading."""
    make, names, _ = CASES[name]
    values = make_data()
    whole = filled(make(), [take(values, names)])
    parts = data.draw(partitions(ROWS))
    updated, called, merged = make(), make(), make()
    for part in parts:
        batch = take(values, names, part)
        updated.update(*batch)
        called(*batch)
        merged.merge_state(filled(make(), [batch]))
    expected = bits(whole.compute())
    for metric in (updated, called, merged):
        assert torch.equal(metric.tally.state, whole.tally.state)
        assert bits(metric.compute()) == expected


@each_case
def test_a_function_is_its_class(name: str) -> None:
    """The function, `forward` and `compute` agree on one batch."""
    make, names, function = CASES[name]
    batch = take(make_data(), names)
    metric = make()
    forward, value = metric(*batch), metric.compute()
    for other in [forward] if function is None else [forward, function(*batch)]:
        if not isinstance(value, dict):
            torch.testing.assert_close(other, value, rtol=1e-13, atol=1e-13, equal_nan=True)
        else:
            assert list(other) == list(value)
            exact = {n: x.item() for n, x in value.items()}
            assert {n: x.item() for n, x in other.items()} == pytest.approx(exact, rel=1e-6, abs=1e-7)


def without_targets(data: dict[str, Tensor], names: tuple[str, ...]) -> list[tuple[Tensor, ...]]:
    """Make batches in which nothing is scored, of scores that are NaN: empty, all ignored, or all of weight 0."""
    scores = dict.fromkeys(("preds", "other", "logits", "probs"), math.nan)
    found = [take(data, names, slice(0, 0))]
    for marks in ({"target": -100, "labels": -1}, {"weight": 0, "mask": False}):
        if set(marks) & set(names):
            fills = {**scores, **marks, "num_bytes": 0}
            found.append(tuple(torch.full_like(data[n], fills[n]) if n in fills else data[n] for n in names))
    return found


@each_case
def test_no_targets_read_nan(name: str) -> None:
    """Without targets every value is NaN and every sum 0, and what comes later is not poisoned."""
    make, names, _ = CASES[name]
    data = make_data()
    metric = make()
    for batch in without_targets(data, names):
        for reading in (metric(*batch), metric.compute()):
            numbers = reading if isinstance(reading, dict) else {"": reading}
            for n, x in numbers.items():
                assert x.isnan().all() if x.is_floating_point() else x == 0 or n == "num_ignored"
    value, expected = (filled(x, [take(data, names)]).compute() for x in (metric, make()))
    if isinstance(value, dict):
        value, expected = ({n: x for n, x in v.items() if n != "num_ignored"} for v in (value, expected))
    assert bits(value) == bits(expected)


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal.default", "item")


@each_case
def test_update_and_forward_never_wait(name: str, operators: Operators) -> None:
    """On a device without data nothing is looked at, moved there or built from Python data."""
    make, names, _ = CASES[name]
    batch: list[Any] = [x.to("meta") for x in take(make_data(), names)]
    metric = make().to("meta")
    with operators:
        metric.update(*batch)
        metric(*batch)
        if "num_bytes" in names:
            batch[names.index("num_bytes")] = 1000
            metric.update(*batch)
            metric(*batch)
    assert metric.tally.state.device.type == "meta"
    assert operators.devices == {"meta"}
    assert [op for op in operators.counts if any(part in op for part in WAITS)] == []


@each_case
def test_only_the_checks_of_the_cpu_look_at_values(
    name: str, operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the checks that are free on the CPU nothing is read back, and no number is copied to the device."""
    for module in ("checks",):
        monkeypatch.setattr(f"xent_metrics.{module}.free_to_look", lambda _: False)
    make, names, _ = CASES[name]
    batch: list[Any] = list(take(make_data(), names))
    metric = make()
    with operators:
        metric.update(*batch)
        metric(*batch)
        if "num_bytes" in names:
            batch[names.index("num_bytes")] = 1000
            metric(*batch)
    assert [op for op in operators.counts if any(part in op for part in WAITS)] == []


@pytest.mark.parametrize("form", ["logits", "probs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
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


def test_entropies_do_not_know_their_neighbours() -> None:
    """Cross-entropy and entropy of long distributions have the same bits alone and together, on several threads."""
    preds, target = torch.randn(3, 70_001), torch.rand(3, 70_001)
    target /= target.sum(-1, keepdim=True)
    states = []
    for threads, size in itertools.product((1, 2, 5), (1, 2, 3)):
        torch.set_num_threads(threads)
        batches = zip(preds.split(size), target.split(size), strict=True)
        states.append(filled(CrossEntropyDecomposition(label_smoothing=0.1), batches).tally.state.tolist())
    assert all(state == states[0] for state in states)


@pytest.mark.parametrize("weighed", [False, True])
def test_binary_holds_little(weighed: bool, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """An update with a million binary targets holds at most 64 bytes for each, and 8 MiB."""
    size = 2**20
    preds, target = torch.randn(size // 8, 8), torch.randint(0, 2, (size // 8, 8))
    weight = torch.rand(size // 8, 8) if weighed else None
    metric = BinaryCrossEntropy(pos_weight=torch.rand(8), label_smoothing=0.1, ignore_index=-1)
    assert peak_bytes(lambda: metric.update(preds, target, weight)) < 64 * size + 8 * 2**20


@pytest.mark.parametrize("weighed", [False, True])
def test_groups_hold_little(weighed: bool, peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """An update with a million grouped targets holds at most 64 bytes for each, and 8 MiB."""
    size = 2**20
    preds, target, group = torch.randn(size, 2), torch.randint(0, 2, (size,)), torch.randint(0, 100, (size,))
    weight = torch.rand(size) if weighed else None
    metric = GroupedCrossEntropy(100)
    assert peak_bytes(lambda: metric.update(preds, target, group, weight)) < 64 * size + 8 * 2**20
