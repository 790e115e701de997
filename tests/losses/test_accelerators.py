"""What kernels are given on an accelerator: rows that start where sums need it, and large products of a head.

There a sum is made in an order that depends on where a row starts. The `meta` device has strides and no values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.losses.test_dense import hexadecimal
from tests.losses.test_linear import Matmuls
from xent_metrics import CrossEntropy, CrossEntropyDecomposition, LinearLogits
from xent_metrics.functional import per_target_losses
from xent_metrics.losses import kernels, rows

ODD = (50257, 32001, 151643)  # No multiples of what 16 bytes hold.
FLOATS = (torch.float32, torch.bfloat16, torch.float64)
INPUTS = ("logits", "log_probs", "probs")


def batch_on_meta(num_rows: int, num_classes: int, dtype: torch.dtype, soft: bool) -> tuple[Tensor, Tensor]:
    """Make scores and targets that have no values."""
    preds = torch.empty(num_rows, num_classes, dtype=dtype, device="meta")
    hard = torch.empty(num_rows, dtype=torch.int64, device="meta")
    return preds, torch.empty_like(preds, dtype=torch.float32) if soft else hard


def starts(x: Tensor) -> list[int]:
    """Return how far the first number is from a multiple of 16 bytes, and every row from the one before it."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return [step * x.element_size() % 16 for step in (x.storage_offset(), *steps)]


class FloatSums(TorchDispatchMode):
    """Records what floats are summed, as they are and in the dtype of the sum; sums of integers are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.summed: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = (kwargs or {}).get("dtype")
        if str(func).startswith("aten.sum") and args[0].is_floating_point() and dtype != torch.int64:
            copy = torch.empty(args[0].shape, dtype=dtype or args[0].dtype, device="meta")  # Its rows have no gaps.
            self.summed += [args[0]] if copy.dtype == args[0].dtype else [args[0], copy]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_classes", ODD)
@pytest.mark.parametrize("soft", [False, True])
def test_buffers(soft: bool, num_classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a buffer every row starts at a multiple of 16 bytes, and there are as many as scores."""
    given: list[Tensor] = []
    kernel = kernels.sum_soft if soft else kernels.sum_hard

    def spy(scores: Tensor, *others: Any, **constants: Any) -> kernels.Results:
        buffers = others[1:3] if soft else others[:1]
        assert [x.shape for x in buffers] == [scores.shape] * len(buffers)
        given.extend(buffers)
        return kernel(scores, *others, **constants)

    monkeypatch.setattr(kernels, kernel.__name__, spy)
    per_target_losses(*batch_on_meta(2100, num_classes, dtype, soft))
    assert len(given) > 2
    assert [start for x in given for start in starts(x) if start] == []


@pytest.mark.parametrize(
    ("weighed", "smoothing"),
    [(False, 0.0), (True, 0.1), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((True, 0.0), (False, 0.1)))],
)
@pytest.mark.parametrize("dtype", [*FLOATS[:2], pytest.param(FLOATS[2], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("num_classes", [2, 5, 50, 127, 129, *ODD])
def test_sums(num_classes: int, dtype: torch.dtype, weighed: bool, smoothing: float) -> None:
    """Whatever is summed over classes starts at a multiple of 16 bytes in every row; short rows are padded."""
    weight = torch.ones(num_classes, device="meta") if weighed else None
    options: dict[str, Any] = {"class_weight": weight, "label_smoothing": smoothing}
    for soft in (False, True):
        for form in INPUTS:
            with FloatSums() as sums:
                per_target_losses(*batch_on_meta(12, num_classes, dtype, soft), input=form, **options)
            assert sums.summed or (form != "logits" and not soft and not smoothing)
            assert [(x.shape, x.stride()) for x in sums.summed if x.dim() > 1 and any(starts(x))] == [], (soft, form)


@pytest.mark.parametrize("num_classes", [5, 129, 32001])
def test_sums_of_entropies(num_classes: int) -> None:
    """So do the terms of an entropy."""
    metric = CrossEntropyDecomposition().to("meta")
    with FloatSums() as sums:
        metric.update(*batch_on_meta(12, num_classes, torch.float32, soft=True))
    over_classes = [x for x in sums.summed if x.dim() > 1]
    assert len(over_classes) > 2
    assert [(x.shape, x.stride()) for x in over_classes if any(starts(x))] == []


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_classes", [5, 129, 32001])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_from_such_buffers(
    soft: bool, num_classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses that are made in them on the CPU are those of PyTorch in float64, with the same bits in any batch."""
    make_buffer = rows._make_buffer

    def as_there(num_rows: int, num_classes: int, dtype: torch.dtype, _: torch.device) -> Tensor:
        there = make_buffer(num_rows, num_classes, dtype, torch.device("meta"))
        return torch.empty_strided(there.shape, there.stride(), dtype=dtype)

    monkeypatch.setattr(rows, "_make_buffer", as_there)
    preds, target = (3 * torch.randn(11, num_classes)).to(dtype), torch.randint(0, num_classes, (11,))
    if soft:
        target = torch.randn(11, num_classes).softmax(1)
    options: dict[str, Any] = {"class_weight": torch.rand(num_classes), "label_smoothing": 0.1}
    losses = per_target_losses(preds, target, **options)
    wide = {"weight": options["class_weight"].double(), "label_smoothing": 0.1, "reduction": "none"}
    expected = torch.nn.functional.cross_entropy(preds.double(), target.double() if soft else target, **wide)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for size in (1, 4):
        parts = zip(preds.split(size), target.split(size), strict=True)
        cut = [x for part in parts for x in hexadecimal(per_target_losses(*part, **options))]
        assert cut == hexadecimal(losses), size


@pytest.mark.parametrize(
    ("num_classes", "dtype", "num_rows", "expected"),
    [
        (1000, torch.float32, 1024, [1024]),
        (1000, torch.float32, 2050, [684, 684, 682]),
        (131072, torch.bfloat16, 4096, [1024] * 4),
        (131072, torch.float32, 1024, [512] * 2),
        (256000, torch.float32, 262, [262]),
        (1_000_000, torch.float32, 256, [128] * 2),
    ],
)
def test_products_of_a_head(num_classes: int, dtype: torch.dtype, num_rows: int, expected: list[int]) -> None:
    """As many rows are multiplied at once as 256 MiB hold, from 128 to 1,024."""
    hidden, weight = (torch.empty(size, 8, dtype=dtype, device="meta") for size in (num_rows, num_classes))
    metric = CrossEntropy().to("meta")
    with Matmuls() as matmuls:
        metric.update(LinearLogits(hidden, weight), torch.empty(num_rows, dtype=torch.int64, device="meta"))
    assert matmuls.rows == expected
