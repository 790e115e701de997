"""Bits per byte of a table of bytes, and of bytes that are given."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.metrics.quantities import INTEGERS, ROWS, TABLE, K, T, bits, filled, losses_of, ragged, read
from xent_metrics import BitsPerByte, CrossEntropyReport, functional


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
        metric.update(some, labels, num_bytes=given, weight=weights)
    weights = torch.ones(ROWS, T, dtype=torch.float64) if weight is None else weight
    total = math.fsum((losses_of(preds, target) * weights).flatten().tolist())
    expected = reference.bits_per_byte(total, int(each.sum()))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-13)
    assert functional.bits_per_byte(preds, target, num_bytes=each, weight=weight).item() == pytest.approx(
        expected, rel=1e-13
    )


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_bytes_of_every_integer(dtype: torch.dtype) -> None:
    """Bytes and tables of bytes may be integers of any type, and a sum of bytes does not wrap."""
    preds, target = torch.zeros(4, 8), torch.tensor([0, 1, 2, 3])
    each = torch.full((4,), 100).to(dtype)
    assert functional.bits_per_byte(preds, target, num_bytes=each).item() == pytest.approx(12 / 400, rel=1e-6)
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
    forward = CrossEntropyReport(token_bytes=TABLE, nan_policy=nan_policy)(preds, target, weight=weight)
    assert forward["bits_per_byte"].item() == pytest.approx(value["bits_per_byte"].item(), rel=1e-13)
    assert forward["num_tokens"] == value["num_tokens"]


def test_probabilities_of_tokens_without_bytes_are_not_looked_at() -> None:
    """Such a token is left out as an ignored one is, whatever the model says; one that is no class is still wrong."""
    metric = BitsPerByte(token_bytes=torch.tensor([0, 1, 0]), input="probs")
    metric.update(torch.tensor([[2.0, 0.5], [0.5, 0.5]]), torch.tensor([0, 1]))
    assert metric.compute().item() == pytest.approx(1, rel=1e-7)
    with pytest.raises(ValueError, match="`target` must hold class indices"):
        metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([2]))
