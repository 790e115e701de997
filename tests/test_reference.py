"""The judge is judged: closed forms, and errors planted in it, each of which must be found out."""

import ast
import math
import types
from collections.abc import Callable
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
    # S = (9, 4, 1), W = (3, 1, 2), m = 7/3: residuals 2, 5/3, -11/3.
    expected = math.sqrt(3 / 2 * (4 + 25 / 9 + 121 / 9)) / 6
    assert judge.stderr(RAGGED) == pytest.approx(expected)
    assert judge.interval(RAGGED)[1] - judge.cross_entropy(RAGGED) == pytest.approx(1.959964 * expected)
    assert math.isnan(judge.stderr(RAGGED[:1]))
    assert judge.entropy([0.5, 0.25, 0.25, 0.0]) == pytest.approx(1.5 * math.log(2))
    assert judge.total_in_units([1.0, -(2.0**-65), 3 * 2.0**-65]) == 2**64 + 2


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
    body = source[start : source.find("\n\n\n", start)]
    assert old in body
    namespace = dict(vars(reference))
    exec(body.replace(old, new, 1), namespace)
    return namespace[name]


PLANTED = {
    "mean of means": ("cross_entropy", lambda: mean_of_means),
    "mask dropped": ("cross_entropy", lambda: rewrite("cross_entropy", " if t.weight > 0", "")),
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
        lambda: lambda sequences: reference.stderr([[t] for sequence in sequences for t in sequence]),
    ),
    "C for C - 1": ("stderr", lambda: rewrite("stderr", "(len(sums) - 1)", "len(sums)")),
    "deviations of means": (
        "stderr",
        lambda: rewrite("stderr", "(s - total / weight * w)", "(s / w - total / weight)"),
    ),
    "one-sided quantile": ("interval", lambda: rewrite("interval", "0.5 + confidence / 2", "confidence")),
    "rounded down": ("total_in_units", lambda: rewrite("total_in_units", "round(", "math.floor(")),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found_out(error) -> None:
    """A judge with one of the usual errors does not meet the closed forms."""
    name, plant = PLANTED[error]
    judge = types.SimpleNamespace(**{**vars(reference), name: plant()})
    with pytest.raises((AssertionError, OverflowError, ZeroDivisionError)):
        check(judge)


def test_the_judge_imports_nothing_that_it_judges() -> None:
    """Shared code would share its errors."""
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"math", "collections.abc", "fractions", "statistics", "typing"}


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
        report.update(logits[rows : rows + 1], target[rows : rows + 1], weight[rows : rows + 1])
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
    assert actual == pytest.approx(expected, rel=1e-8, nan_ok=True)
