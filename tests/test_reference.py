"""The judge is judged: closed forms, and errors planted in it, each of which must be found out."""

import ast
import math
import types
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from operator import add, mul
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import reference
from tests.reference import Target
from xent_metrics import CrossEntropyReport

RAGGED = [[Target(1.0), Target(2.0), Target(6.0)], [Target(4.0)], [Target(0.5), Target(0.5)]]


def check(judge: Any) -> None:
    """Closed forms that a right judge meets."""
    assert judge.target_loss(judge.log_softmax([2.0, 1.0, 0.1]), 0) == pytest.approx(0.41703, abs=1e-5)
    uniform = judge.target_loss(judge.log_softmax([0.0] * 8), 3)
    assert uniform == pytest.approx(3 * math.log(2))
    assert judge.bits(uniform) == pytest.approx(3)
    assert judge.perplexity(uniform) == pytest.approx(8)
    assert judge.perplexity(1e4) == math.inf
    assert judge.target_loss([0.0, -math.inf], [1.0, 0.0]) == 0
    assert judge.target_loss(judge.log_probabilities([0.0, 1.0], "probs"), 0) == math.inf
    assert judge.target_loss(judge.log_probabilities([0.0, 1.0], "probs", eps=0.25), 0) == pytest.approx(math.log(4))
    smoothed = judge.target_loss([math.log(0.5), math.log(0.25), math.log(0.25)], 0, label_smoothing=0.3)
    assert smoothed == pytest.approx((0.8 + 0.1 * 2 + 0.1 * 2) * math.log(2))
    weighted = judge.target_loss([math.log(0.5), math.log(0.5)], [0.25, 0.75], class_weight=[4.0, 0.0])
    assert weighted == pytest.approx(math.log(2))
    assert judge.cross_entropy(RAGGED) == pytest.approx(14 / 6)
    assert judge.cross_entropy([[Target(1.0, weight=3.0), Target(5.0, weight=1.0)]]) == 2
    assert judge.cross_entropy([[Target(2.0, norm=2.0), Target(9.0, norm=3.0)]]) == pytest.approx(11 / 5)
    assert judge.cross_entropy([[Target(1.0), Target(math.nan, weight=0.0)]]) == 1
    assert judge.cross_entropy([[Target(1.0), Target(math.inf)]], "omit") == 1
    assert judge.cross_entropy([[Target(1.0), Target(math.inf)]]) == math.inf
    assert math.isnan(judge.cross_entropy([[Target(-math.inf), Target(math.inf)]]))
    assert math.isnan(judge.cross_entropy([]))
    check_coefficients(judge)
    check_edges(judge)
    # S = (9, 4, 1), W = (3, 1, 2), m = 7/3: residuals 2, 5/3, -11/3.
    expected = math.sqrt(3 / 2 * (4 + 25 / 9 + 121 / 9)) / 6
    assert judge.stderr(RAGGED) == pytest.approx(expected)
    # Two sequences that weigh the same: 1 degree of freedom, whose quantile is the tangent of 0.475 pi.
    even = [[Target(1.0, weight=2.0)], [Target(3.0), Target(3.0)]]
    assert judge.interval(even) == pytest.approx((2 - 12.706205, 2 + 12.706205))
    # W = (1, 1, 2): 16 / 6 - 1 = 5 / 3 of them. W = (3, 1, 2): 36 / 14 - 1 = 11 / 7.
    assert judge.interval(RAGGED)[1] - judge.cross_entropy(RAGGED) == pytest.approx(5.648190765 * expected)
    assert math.isnan(judge.stderr(RAGGED[:1]))
    assert judge.entropy([0.5, 0.25, 0.25, 0.0]) == pytest.approx(1.5 * math.log(2))
    assert judge.total_in_units([1.0, -(2.0**-65), 3 * 2.0**-65]) == 2**64 + 2
    assert judge.total_in_units([2.0**-65]) == 0
    # Weighted, S = (3, 4), W = (1, 2), m = 7/3: residuals 2/3, -2/3; a sequence without weight is none.
    weighted = [[Target(3.0)], [Target(4.0, norm=4.0, weight=0.5), Target(2.0, norm=0.0)], [Target(math.nan, weight=0)]]
    assert judge.stderr(weighted) == pytest.approx(math.sqrt(2 * 8 / 9) / 3)
    check_other_quantities(judge)


def check_coefficients(judge: Any) -> None:
    """Class weights and smoothing, worked out as PyTorch defines them: nats (1, 2) x ln 2, weights (3, 5), a = 0.5."""
    nats = [-math.log(2), -2 * math.log(2)]
    hard = judge.target_loss(nats, 1, label_smoothing=0.5, class_weight=[3.0, 5.0])
    assert hard == pytest.approx((0.5 * 5 * 2 + 0.25 * (3 * 1 + 5 * 2)) * math.log(2))
    soft = judge.target_loss(nats, [0.2, 0.8], label_smoothing=0.5, class_weight=[3.0, 5.0])
    assert soft == pytest.approx((3 * 0.35 * 1 + 5 * 0.65 * 2) * math.log(2))
    assert [judge.target_norm(y, [3.0, 5.0]) for y in (1, [0.2, 0.8])] == [5, 1]
    assert judge.target_norm(1) == 1
    for outside in (-1, 2):
        with pytest.raises(IndexError):
            judge.target_loss(nats, outside)


def check_edges(judge: Any) -> None:
    """Clipping at the upper end, and losses and weights that no sum can hold."""
    assert judge.log_probabilities([0.0, 1.0], "probs", eps=0.25) == pytest.approx([math.log(0.25), math.log(0.75)])
    assert judge.Target(5.0) == (5.0, 1.0, 1.0)
    assert judge.log_probabilities([-1.0, -2.0], "log_probs") == [-1.0, -2.0]
    assert judge.log_softmax([1e4, 0.0]) == [0.0, -1e4]
    assert math.isnan(judge.cross_entropy([[Target(math.nan), Target(1.0)]]))
    lost = [[Target(math.inf), Target(1.0)], [Target(math.nan, weight=0.0), Target(-math.inf)], [Target(3.0)]]
    assert judge.num_nonfinite(lost) == 2
    assert math.isnan(judge.stderr(lost))
    assert judge.stderr(lost, "omit") == pytest.approx(1.0)
    assert sum(judge.interval(lost, nan_policy="omit")) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="negative"):
        judge.cross_entropy([[Target(1.0, weight=-1.0), Target(1.0)]])


def check_other_quantities(judge: Any) -> None:
    """Worked values of what is no average of cross-entropies."""
    for preds, expected in (([0.99, 0.01, 0.99], 0.01005), ([0.1, 0.9, 0.2], 2.0715)):
        pairs = list(zip(preds, [1.0, 0.0, 1.0], strict=True))
        assert sum(judge.binary_cross_entropy(p, y, "probs") for p, y in pairs) / 3 == pytest.approx(expected, abs=5e-5)
        logits = [(math.log(p / (1 - p)), y) for p, y in pairs]
        assert sum(judge.binary_cross_entropy(z, y) for z, y in logits) / 3 == pytest.approx(expected, abs=5e-5)
    assert [judge.binary_cross_entropy(z, 1.0) for z in (-1e4, 1e4)] == [1e4, 0.0]
    assert judge.binary_cross_entropy(0.0, 1.0, "probs") == math.inf
    assert judge.binary_cross_entropy(0.0, 1.0, "probs", eps=0.25) == pytest.approx(math.log(4))
    p, q = [0.5, 0.5, 0.0], [math.log(0.25), math.log(0.75), -math.inf]
    assert judge.kl_divergence(p, q) == pytest.approx(0.5 * math.log(4 / 3))
    assert judge.entropy(p) + judge.kl_divergence(p, q) == pytest.approx(judge.target_loss(q, p))
    assert judge.normalized_cross_entropy(math.log(2), [3, 3]) == pytest.approx(1)
    assert all(math.isnan(judge.normalized_cross_entropy(1.0, seen)) for seen in ([4, 0], [0, 0]))
    assert judge.bits_per_byte(6 * math.log(2), 3) == pytest.approx(2)
    assert math.isnan(judge.bits_per_byte(0.0, 0))
    # The chain is in its first state 2/3 of the time, and only there is there a choice, of 1 bit.
    assert judge.entropy_rate([[0.5, 0.5], [1.0, 0.0]]) == pytest.approx(2 / 3 * math.log(2))
    assert judge.correctly_rounded_mean([1e16, 1.0, -1e16], [1.0, 1.0, 1.0]) == 1 / 3
    assert judge.correctly_rounded_mean([1.0, 5.0], [3.0, 1.0]) == 2


def test_the_judge_meets_the_closed_forms() -> None:
    """Every quantity has a value that can be worked out by hand."""
    check(reference)


def mean_of_means(sequences: Any, nan_policy: str = "propagate") -> float:
    """The error that everybody makes."""
    return sum(sum(t.loss for t in s) / len(s) for s in sequences) / len(sequences) if sequences else math.nan


def rewrite(name: str, old: str, new: str) -> Callable[..., Any]:
    """Return a function of the judge with one piece of its source replaced."""
    source = Path(reference.__file__).read_text()
    start = source.index(f"def {name}(")
    end = source.find("\n\n\n", start)
    body = source[start:] if end < 0 else source[start:end]
    assert body.count(old) >= 1
    namespace = dict(vars(reference))
    exec(body.replace(old, new, 1), namespace)
    return namespace[name]


def judge_with(name: str, function: Callable[..., Any]) -> types.ModuleType:
    """Return a second judge whose own functions, too, call the replacement."""
    judge = types.ModuleType("judge")
    exec(Path(reference.__file__).read_text(), vars(judge))
    setattr(judge, name, function)
    return judge


PLANTED = {
    "mean of means": ("cross_entropy", lambda: mean_of_means),
    "mask dropped": ("scored", lambda: rewrite("scored", " if t.weight > 0", "")),
    "denominator without weights": ("cross_entropy", lambda: rewrite("cross_entropy", "t.weight * t.norm", "1.0")),
    "denominator without class weights": ("cross_entropy", lambda: rewrite("cross_entropy", "* t.norm", "")),
    "non-finite losses kept": ("cross_entropy", lambda: rewrite("cross_entropy", 'nan_policy == "omit"', "False")),
    "bits for nats": ("perplexity", lambda: lambda nats: 2.0**nats if nats < 1e3 else math.inf),
    "nats for bits": ("bits", lambda: lambda nats: nats),
    "no overflow": ("perplexity", lambda: lambda nats: math.exp(min(nats, 20))),
    "0 log 0": ("target_loss", lambda: rewrite("target_loss", " if c != 0", "")),
    "smoothing over the others": (
        "target_loss",
        lambda: rewrite("target_loss", "/ num_classes", "/ (num_classes - 1)"),
    ),
    "unclipped": ("log_probabilities", lambda: rewrite("log_probabilities", "row if eps is None else", "row or")),
    "tokens for sequences": (
        "stderr",
        lambda: lambda sequences, *args: reference.stderr([[t] for sequence in sequences for t in sequence], *args),
    ),
    "C for C - 1": ("stderr", lambda: rewrite("stderr", "(len(sums) - 1)", "len(sums)")),
    "deviations of means": (
        "stderr",
        lambda: rewrite("stderr", "(s - total / weight * w)", "(s / w - total / weight)"),
    ),
    "sequences that weigh the same": (
        "interval",
        lambda: rewrite("interval", "math.fsum(weights) ** 2 / squares", "len(weights)"),
    ),
    "tokens as degrees of freedom": ("interval", lambda: rewrite("interval", "/ squares - 1", "- 1")),
    "one-sided quantile": ("interval", lambda: rewrite("interval", "0.5 + confidence / 2", "confidence")),
    "rounded half up": (
        "total_in_units",
        lambda: lambda values: sum(math.floor(Fraction(x) * 2**64 + Fraction(1, 2)) for x in values),
    ),
    "wrapped": ("target_loss", lambda: rewrite("target_loss", "not 0 <= target", "not -num_classes <= target")),
    "soft targets unsmoothed": (
        "target_loss",
        lambda: rewrite("target_loss", "((1 - label_smoothing) * p + smooth)", "p"),
    ),
    "smoothing without class weights": ("target_loss", lambda: rewrite("target_loss", "smooth * w for", "smooth for")),
    "class without its weight": ("target_loss", lambda: rewrite("target_loss", " * weights[target]", "")),
    "distribution without class weights": ("target_loss", lambda: rewrite("target_loss", "w * ((1", "((1")),
    "distribution normalized by class weights": (
        "target_norm",
        lambda: rewrite("target_norm", "else 1.0", "else sum(class_weight or [1.0])"),
    ),
    "clipped below only": ("log_probabilities", lambda: rewrite("log_probabilities", "1 - eps", "1.0")),
    "negative weights": ("scored", lambda: rewrite("scored", "t.weight >= 0", "True")),
    "unweighted residuals": ("stderr", lambda: rewrite("stderr", "t.weight * t.loss", "t.loss")),
    "residuals without class weights": ("stderr", lambda: rewrite("stderr", " * t.norm", "")),
    "empty sequences counted": ("stderr", lambda: rewrite("stderr", " if weight > 0", "")),
    "weight-0 losses counted": ("num_nonfinite", lambda: rewrite("num_nonfinite", "scored(sequences)", "sequences")),
    "unstable logits": ("log_softmax", lambda: rewrite("log_softmax", "top = max(logits)", "top = 0.0")),
    "unstable binary logits": (
        "binary_cross_entropy",
        lambda: rewrite("binary_cross_entropy", "-abs(score)", "-score"),
    ),
    "binary target flipped": (
        "binary_cross_entropy",
        lambda: rewrite("binary_cross_entropy", "[1 - target, target]", "[target, 1 - target]"),
    ),
    "divergence reversed": ("kl_divergence", lambda: rewrite("kl_divergence", "math.log(p) - q", "q - math.log(p)")),
    "nats per byte": ("bits_per_byte", lambda: rewrite("bits_per_byte", " / LN_2", "")),
    "counts for frequencies": (
        "normalized_cross_entropy",
        lambda: rewrite("normalized_cross_entropy", "x / total", "x"),
    ),
    "states equally likely": ("entropy_rate", lambda: rewrite("entropy_rate", "range(steps)", "range(0)")),
    "sum rounded as it goes": (
        "correctly_rounded_mean",
        # Not `sum`, which from Python 3.12 on makes up for what it rounds.
        lambda: lambda losses, weights: reduce(add, map(mul, losses, weights)) / reduce(add, weights),
    ),
    "rounded down": ("total_in_units", lambda: rewrite("total_in_units", "round(", "math.floor(")),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found_out(error) -> None:
    """A judge with one of the usual errors does not meet the closed forms."""
    name, plant = PLANTED[error]
    with pytest.raises((AssertionError, OverflowError, ZeroDivisionError, pytest.fail.Exception)):
        check(judge_with(name, plant()))


def test_the_judge_imports_nothing_that_it_judges() -> None:
    """Shared code would share its errors."""
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"math", "collections.abc", "fractions", "typing", "scipy.special"}


@pytest.mark.parametrize("seed", range(20))
def test_the_library_agrees_with_the_judge(seed) -> None:
    """Every reading of ragged, weighted, partly ignored sequences is the judge's."""
    generator = torch.Generator().manual_seed(seed)
    num_sequences, length, num_classes = 2 + seed % 5, 1 + seed % 7, 2 + seed % 9
    logits = 3 * torch.randn(num_sequences, length, num_classes, dtype=torch.float64, generator=generator)
    target = torch.randint(num_classes, (num_sequences, length), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = -100
    weight = torch.rand(target.shape, generator=generator, dtype=torch.float64)
    report = CrossEntropyReport()
    for rows in range(num_sequences):
        report.update(logits[rows : rows + 1], target[rows : rows + 1], weight=weight[rows : rows + 1])
    rows = zip(logits.tolist(), target.tolist(), weight.tolist(), strict=True)
    sequences = [
        [
            Target(reference.target_loss(reference.log_softmax(q), y), weight=w)
            for q, y, w in zip(*row, strict=True)
            if y >= 0
        ]
        for row in rows
    ]
    nats, (lower, upper) = reference.cross_entropy(sequences), reference.interval(sequences)
    expected = {
        "cross_entropy": nats,
        "bits_per_token": reference.bits(nats),
        "perplexity": reference.perplexity(nats),
        "cross_entropy_stderr": reference.stderr(sequences),
        "cross_entropy_lower": lower,
        "cross_entropy_upper": upper,
        "perplexity_lower": reference.perplexity(lower),
        "perplexity_upper": reference.perplexity(upper),
        "num_tokens": sum(map(len, sequences)),
        "num_ignored": target.numel() - sum(map(len, sequences)),
        "num_nonfinite": 0,
    }
    actual = {name: value.item() for name, value in report.compute().items()}
    assert actual == pytest.approx(expected, rel=1e-7, nan_ok=True)  # An interval of 57 nats is exponentiated.
