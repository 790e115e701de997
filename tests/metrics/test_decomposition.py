"""Cross-entropy is entropy plus divergence, of soft targets and of smoothed classes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests import reference
from tests.metrics.quantities import FLOATS, ROWS, K, T, distributions, filled, ragged, read, smoothed_row, tolerance
from xent_metrics import CrossEntropyDecomposition, functional


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
    forward = CrossEntropyDecomposition(nan_policy="omit")(preds, target, weight=weight)
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
