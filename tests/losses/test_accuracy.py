"""Losses are true: their errors are small, do not grow with the number of classes, and average out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses.compiling import needs_compiler
from tests.score_rows import BIAS, KINDS, SIZES, make_rows, true_losses, worst
from xent_metrics import LinearLogits
from xent_metrics.functional import per_target_losses
from xent_metrics.losses.binary import binary_losses
from xent_metrics.losses.options import BinaryOptions

HALVES = [torch.float16, torch.bfloat16]
SLOW = [pytest.param(num_classes, marks=pytest.mark.slow) for num_classes in (50, 32000, 50257)]
SCORES, ROWS = 2**24, 2000  # Of a test, at most: of 2,000 rows the mean has less noise than is promised of it.


def errors(logits: Tensor, target: Tensor, true: Tensor, **options: Any) -> tuple[float, float]:
    """Return the mean error, and the worst one as a share of what is promised."""
    error = per_target_losses(logits, target, **options) - true
    return error.mean().item(), worst(error, true)


def allowed_bias(num_rows: int) -> float:
    """Return what is promised of a mean error, and the noise of few rows, which is 2e-7 each at most."""
    return max(BIAS, 4 * 2e-7 / num_rows**0.5)


def kinds_and_sizes() -> Iterator[Any]:
    """Yield every kind of rows with every number of classes; of large ones most are slow."""
    for i, kind in enumerate(KINDS):
        for num_classes in SIZES:
            slow = num_classes > 1000 and (i, num_classes) not in {(1, 50257), (5, 128256)}
            yield pytest.param(kind, num_classes, marks=[pytest.mark.slow] if slow else [], id=f"{kind}-{num_classes}")


@pytest.mark.parametrize(("kind", "num_classes"), [*kinds_and_sizes()])
def test_errors_are_small_and_have_no_side(kind: str, num_classes: int) -> None:
    """Of float32 logits and of the same ones in half precision, whose losses are no less true."""
    num_rows = min(ROWS, SCORES // num_classes)
    logits, target = make_rows(kind, num_rows, num_classes)
    for dtype in (torch.float32, *HALVES):
        given = logits.to(dtype)
        bias, share = errors(given, target, true_losses(given, target))
        assert abs(bias) <= allowed_bias(num_rows), dtype
        assert share <= 1, dtype


def test_the_usual_sum_has_a_side() -> None:
    """The rows show the fault: PyTorch's losses of them are off by a hundred times what is promised here."""
    logits, target = make_rows("flat tail, 10 to 14 below", 256, 128256)
    true = true_losses(logits, target)
    assert worst(F.cross_entropy(logits, target, reduction="none") - true, true) > 100
    logits, target = make_rows("normal", 256, 128256)
    error = F.cross_entropy(logits, target, reduction="none") - true_losses(logits, target)
    assert error.mean() < -1e-6
    assert (error < 0).double().mean() > 0.95


@needs_compiler
@pytest.mark.parametrize(
    "num_classes",
    [
        pytest.param(50, marks=pytest.mark.slow),
        1000,
        *(pytest.param(x, marks=pytest.mark.slow) for x in (32000, 50257)),
    ],
)
def test_compiled_losses_are_as_true(num_classes: int) -> None:
    """A compiler sums in another order, and rounds no worse."""
    for kind in KINDS:
        logits, target = make_rows(kind, min(ROWS, SCORES // 2 // num_classes), num_classes)
        bias, share = errors(logits, target, true_losses(logits, target), backend="compile")
        assert share <= 1, kind
        assert abs(bias) <= allowed_bias(len(logits)), kind


@pytest.mark.parametrize("num_classes", [50, pytest.param(32000, marks=pytest.mark.slow)])
def test_other_ways_to_a_loss(num_classes: int) -> None:
    """Soft targets, smoothing, class weights, other input and the products of a head are held to the same."""
    num_rows = min(2000, 2**22 // num_classes)
    for kind in ("flat tail, 10 to 14 below", "as of a model"):
        logits, target = make_rows(kind, num_rows, num_classes)
        wide, weight = logits.double(), torch.rand(num_classes)
        logs = wide.log_softmax(1)
        one_hot = F.one_hot(target, num_classes)
        soft = (0.7 * one_hot + 0.3 * torch.rand(num_rows, num_classes).softmax(1)).float()
        options = {"label_smoothing": 0.1, "class_weight": weight}
        ways = {
            "soft": (errors(logits, soft, -(soft.double() * logs).sum(1))),
            "smoothed": errors(
                logits,
                target,
                F.cross_entropy(wide, target, reduction="none", label_smoothing=0.1),
                label_smoothing=0.1,
            ),
            "weighed": errors(
                logits, target, F.cross_entropy(wide, target, weight.double(), reduction="none"), class_weight=weight
            ),
            "weighed and smoothed": errors(
                logits,
                target,
                F.cross_entropy(wide, target, weight.double(), reduction="none", label_smoothing=0.1),
                **options,
            ),
        }
        probs = logs.exp().float()
        true = -probs.double().gather(1, target[:, None]).log().squeeze(1)
        ways["probs"] = errors(probs, target, true, input="probs")
        log_probs = logs.float()
        smoothed = -0.9 * log_probs.double().gather(1, target[:, None]).squeeze(1) - 0.1 * log_probs.double().mean(1)
        ways["log_probs"] = errors(log_probs, target, smoothed, input="log_probs", label_smoothing=0.1)
        ways["soft and smoothed"] = errors(
            logits,
            soft,
            F.cross_entropy(wide, soft.double(), weight.double(), reduction="none", label_smoothing=0.1),
            **options,
        )
        for way, (bias, share) in ways.items():
            assert share <= 1, (kind, way)
            assert abs(bias) <= allowed_bias(num_rows), (kind, way)


@pytest.mark.parametrize("num_classes", [50, 1000, pytest.param(50257, marks=pytest.mark.slow)])
def test_on_an_accelerator(num_classes: int, hide_values: Callable[[], None]) -> None:
    """Where values are hidden, exponentials are made in other steps, and are as true."""
    hide_values()
    for kind in KINDS:
        logits, target = make_rows(kind, min(ROWS, SCORES // 4 // num_classes), num_classes)
        for dtype in (torch.float32, torch.bfloat16):
            given = logits.to(dtype)
            bias, share = errors(given, target, true_losses(given, target))
            assert share <= 1, (kind, dtype)
            assert abs(bias) <= allowed_bias(len(logits)), (kind, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_classes", [2, 300])
def test_large_logits_lose_nothing(num_classes: int, dtype: torch.dtype) -> None:
    """A difference of logits is made before anything small is added to them."""
    logits, target = torch.full((3, num_classes), 1e30, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    for options in ({}, {"label_smoothing": 0.1}):
        losses = per_target_losses(logits, target, **options)
        assert losses.tolist() == pytest.approx([math.log(num_classes)] * 3, abs=5e-7)


@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize("num_classes", [2, 10, pytest.param(1000, marks=pytest.mark.slow)])
def test_smoothing_has_no_side(num_classes: int, scale: float) -> None:
    """Of class indices, of the same ones as distributions, and with weights that float32 does not hold."""
    logits = scale * torch.randn(4000, num_classes)
    target, weight = torch.randint(0, num_classes, (4000,)), torch.full((num_classes,), 0.1, dtype=torch.float64)
    for smoothing in (0.001, 0.1, 0.3, 1.0):
        true = F.cross_entropy(logits.double(), target, reduction="none", label_smoothing=smoothing)
        one_hot = F.one_hot(target, num_classes)
        for form in (target, one_hot.float(), one_hot.bfloat16(), one_hot.double()):
            bias, share = errors(logits, form, true, label_smoothing=smoothing)
            assert share <= 1, (smoothing, form.dtype)
            assert abs(bias) <= BIAS, (smoothing, form.dtype)
        rounded = weight.float()[0].item()  # Once, as the logits are.
        bias, share = errors(logits, target, rounded * true, label_smoothing=smoothing, class_weight=weight)
        assert share <= 1, smoothing
        assert abs(bias) <= BIAS, smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.001, 0.05, 0.2])
@pytest.mark.parametrize("label", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("around", [-100.0, -5.0, 0.0, 30.0])
def test_binary_losses(around: float, label: float, smoothing: float) -> None:
    """Labels and smoothing of yes-or-no targets are as exact as their logarithms."""
    logits = around + torch.randn(4000)
    for dtype in (torch.float32, torch.float64):
        target = torch.full((4000,), label, dtype=dtype)
        soft = (1 - smoothing) * target.double() + smoothing / 2
        true = F.binary_cross_entropy_with_logits(logits.double(), soft, reduction="none")
        options = BinaryOptions(label_smoothing=smoothing)
        error = binary_losses(logits, target, options).loss.flatten() - true
        assert worst(error, true) <= 1, dtype
        assert abs(error.mean().item()) <= max(BIAS, 2e-8 * true.mean().item()), dtype


def test_of_a_head() -> None:
    """Losses of a head are those of the logits that it makes, here exactly: hidden states of one number."""
    logits, target = make_rows("flat tail, 10 to 14 below", 40, 32000)
    head = LinearLogits(torch.eye(40), logits.t().contiguous())
    true = true_losses(logits, target)
    assert worst(per_target_losses(head, target) - true, true) <= 1
