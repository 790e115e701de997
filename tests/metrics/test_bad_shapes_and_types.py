"""Shapes, types, layouts and devices that do not fit are refused in words that name the argument."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metrics.bad_input import (
    KINDS,
    OF_CLASSES,
    Batch,
    K,
    assert_no_trace,
    bits,
    each_call,
    each_kind,
    make_batch,
    ones,
    raised,
    with_preds,
)
from xent_metrics import BinaryCrossEntropy, functional

# Shapes.

A_SHAPE = (
    "a target one longer than `preds` in time, classes on another dimension, a dimension of 1, one-hot integers, ..."
)

SHAPES = [
    ((2, 7, K), (2, 8), "one apart in time: to score each position's next target pass target[:, 1:], or"),
    ((2, 7, K), (2, 6), "one apart in time: to score each position's next target pass preds[:, :-1], or"),
    ((2, K, 3), (2, 3), "class_dim=1"),
    ((K, 2, 3), (2, 3), "class_dim=0"),
    ((2, 3, K), (2, 3, K), "one-hot targets: pass their argmax"),
    ((2, 3, K), (2, 3, 1), "pass target.squeeze(-1)"),
    ((2, 3, K), (6,), "give every row of classes"),
    ((2, 3, K), (), "give every row of classes"),
    ((6, K), (2, 3), "give every row of classes"),
]


@pytest.mark.parametrize(("preds", "target", "fix"), SHAPES)
@pytest.mark.parametrize("name", OF_CLASSES)
def test_shapes_that_do_not_fit(name: str, preds: tuple[int, ...], target: tuple[int, ...], fix: str) -> None:
    """Both shapes, and what would fit."""
    if name.startswith("Normalized") and preds[-1] != K:
        pytest.skip("The number of classes is wrong too.")
    good = make_batch(name)
    batch = with_preds(name, torch.zeros(preds), {**good, "target": torch.zeros(target, dtype=torch.int64)})
    message = assert_no_trace(name, batch, {}, good, ValueError)
    assert message.startswith("`target` must have")
    assert f"{preds}" in message
    assert f"got {target}" in message
    assert fix in message


@each_kind
def test_other_shapes_that_do_not_fit(name: str) -> None:
    """Soft targets, losses, binary targets, weights, groups and scalars: each with both shapes."""
    kind, good = KINDS[name], make_batch(name)
    shapes: list[tuple[Batch, dict[str, Any], str, str, str]] = [
        ({**good, "weight": torch.ones(2)}, {}, r"`weight`", r"\(2, 3\)", r"\(2,\)"),
        ({**good, "weight": torch.ones(1, 2, 3)}, {}, r"`weight`", r"\(2, 3\)", r"\(1, 2, 3\)"),
    ]
    if "group" in kind.arguments:
        shapes.append(({**good, "group": good["group"].T}, {}, "`group`", r"\(2, 3\)", r"\(3, 2\)"))
    if kind.binary:
        shapes.append(({**good, "target": good["target"][:1]}, {}, "`preds` and `target`", r"\(2, 3\)", r"\(1, 3\)"))
    else:
        soft = {**good, "target": torch.ones(2, 1, K)}
        scalar = with_preds(name, torch.tensor(1.0), good)
        shapes += [(soft, {}, "`target`", r"\(2, 3, 4\)", r"\(2, 1, 4\)"), (scalar, {}, "`class_dim`", r"\(\)", "-1")]
    if "losses" in kind.inputs:
        shapes.append((make_batch(name), {"input": "losses"}, r"`preds\w*`", r"\(2, 3, 4\)", r"\(2, 3\)"))
    for batch, options, argument, *parts in shapes:
        fine = make_batch(name, options.get("input", "logits"))
        message = assert_no_trace(name, batch, options, fine, ValueError)
        assert re.match(rf"{argument} (must|.* and must)", message), message
        assert all(re.search(part, message) for part in parts), message


def test_what_no_shape_can_tell() -> None:
    """Labels are scored where `shift` says, and a vector is one of positions, as broadcasting has it."""
    preds, target, weight = 3 * torch.randn(4, 4, K), torch.randint(K, (4, 4)), torch.rand(4)
    aligned, shifted = (functional.cross_entropy(preds, target, shift=shift).item() for shift in (False, True))
    assert aligned != shifted == functional.cross_entropy(preds[:, :-1], target[:, 1:]).item()
    by_position, by_sequence = (
        functional.cross_entropy(preds, target, weight=w).item() for w in (weight, weight[:, None])
    )
    assert by_position != by_sequence
    assert by_position == functional.cross_entropy(preds, target, weight=weight.expand(4, 4)).item()


@pytest.mark.parametrize("name", OF_CLASSES)
def test_as_many_positions_as_classes_are_scored_as_they_are_said_to_be(name: str) -> None:
    """No shape can tell; `class_dim` decides, and the default is the last dimension."""
    preds, target = 3 * torch.randn(2, K, K), torch.randint(K, (2, K))
    target[:, 0], target[:, 1] = 0, 1
    batch = with_preds(name, preds, {"target": target, "group": target % 2, "num_bytes": 9, "weight": None})
    batch[f"preds_{'b' if name.endswith('(a)') else 'a'}"] = preds.roll(1)
    moved = {key: x.mT if key.startswith("preds") else x for key, x in batch.items()}
    values = [KINDS[name].make(class_dim=dim)(**KINDS[name].chosen(batch)) for dim in (-1, 2, 1)]
    assert bits(values[0]) == bits(values[1]) != bits(values[2])
    assert bits(KINDS[name].make(class_dim=1)(**KINDS[name].chosen(moved))) == bits(values[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", OF_CLASSES)
def test_targets_of_a_wrong_type(name: str, dtype: torch.dtype) -> None:
    """Class indices are integers, and the error says how to get there."""
    good = make_batch(name)
    message = assert_no_trace(name, {**good, "target": good["target"].to(dtype)}, {}, good, TypeError)
    assert re.match(rf"`target` must hold integer.*, got {dtype}; convert it with \.long\(\)\.", message)


@each_call
def test_binary_targets_may_be_booleans(call: str) -> None:
    """Yes and no are what they are, and complex numbers are neither."""
    batch = make_batch("BinaryCrossEntropy")
    preds, target = batch["preds"], batch["target"]
    expected = functional.binary_cross_entropy(preds, target).item()
    metric = BinaryCrossEntropy()
    getattr(metric, call)(preds, target.bool())
    assert metric.compute().item() == pytest.approx(expected, rel=1e-15)
    bad = {**batch, "target": target.to(torch.complex64)}
    message = assert_no_trace("BinaryCrossEntropy", bad, {}, batch, TypeError)
    assert re.match("`target` must hold 0, 1 .* got torch.complex64", message)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool], ids=str)
@each_kind
def test_predictions_of_a_wrong_type(name: str, dtype: torch.dtype) -> None:
    """Scores are floats."""
    good = make_batch(name)
    wrong = "preds" if "preds" in KINDS[name].arguments else f"preds_{name[-2]}"
    bad = {**good, wrong: good["preds"].to(dtype)}
    message = assert_no_trace(name, bad, {}, good, TypeError)
    assert re.match(rf"`preds\w*` must be float16, .* got {dtype}; convert it with \.float\(\)\.", message)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@each_kind
def test_sparse_tensors(name: str, layout: torch.layout) -> None:
    """Every tensor of an update has to be dense."""
    good = {**make_batch(name), "weight": ones(), "num_bytes": torch.tensor([[4, 5], [0, 2]])}
    tensors = [key for key in KINDS[name].arguments if not (layout == torch.sparse_csr and good[key].dim() == 1)]
    for key in tensors:
        sparse = good[key].reshape(2, -1).to_sparse(layout=layout) if good[key].dim() > 2 else None
        bad = {**good, key: good[key].to_sparse(layout=layout) if sparse is None else sparse}
        message = assert_no_trace(name, bad, {}, good, TypeError)
        assert re.match(rf"`({key}|preds)` must", message)
        assert re.search("dense|sparse", message)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("CrossEntropy", "class_weight", torch.ones(K)),
        ("GroupedCrossEntropy", "class_weight", torch.ones(K)),
        ("BinaryCrossEntropy", "pos_weight", torch.ones(3)),
        ("BitsPerByte", "token_bytes", torch.ones(K, dtype=torch.int64)),
        ("CrossEntropyReport", "token_bytes", torch.ones(K, dtype=torch.int64)),
    ],
)
def test_sparse_options(name: str, option: str, value: Tensor) -> None:
    """And so has every tensor that a metric is made with."""
    assert f"`{option}`" in raised(TypeError, lambda: KINDS[name].make(**{option: value.to_sparse()}))


@each_kind
def test_anything_but_a_tensor(name: str) -> None:
    """Lists, arrays and numbers are refused for what they are, for every argument of an update."""
    good = make_batch(name)
    for key in KINDS[name].arguments:
        for value in ([[1.0]], np.ones((2, 3)), 1.0, None):
            if value is None and key == "weight":
                continue
            error = (TypeError, ValueError) if value is None and key == "num_bytes" else TypeError
            message = assert_no_trace(name, {**good, key: value}, {}, good, error)
            assert re.match(rf"`({key}|preds)` must", message)


@pytest.mark.parametrize("key", ["preds_a", "preds_b"])
def test_errors_name_the_predictions_that_are_wrong(key: str) -> None:
    """With two models, the sentence says which."""
    name = "CrossEntropyDifference(a)"
    good = make_batch(name)
    for value in (good[key].long(), [1.0], good[key][:, :2]):
        error = (TypeError, ValueError)
        message = assert_no_trace(name, {**good, key: value}, {}, good, error)
        assert f"`{key}`" in message


@each_kind
def test_tensors_on_different_devices(name: str) -> None:
    """Each tensor of an update alone on another device is refused, with the names of both devices."""
    good = {**make_batch(name), "weight": ones(), "num_bytes": torch.tensor([4, 5])}
    for key in KINDS[name].arguments:
        message = assert_no_trace(name, {**good, key: good[key].to("meta")}, {}, good, ValueError)
        assert "cpu" in message
        assert "meta" in message
        assert f"`{key}`" in message or key.startswith("preds")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("CrossEntropy", "class_weight", torch.ones(K)),
        ("GroupedCrossEntropy", "class_weight", torch.ones(K)),
        ("BinaryCrossEntropy", "pos_weight", torch.ones(3)),
        ("BitsPerByte(token_bytes)", "token_bytes", torch.ones(K, dtype=torch.int64)),
    ],
)
def test_options_on_another_device(name: str, option: str, value: Tensor) -> None:
    """A function with class weights, positive weights or a table on another device says so."""
    batch = make_batch(name)
    message = raised(ValueError, lambda: KINDS[name].call(batch, **{option: value.to("meta")}))
    assert re.match(f"`{option}` must be on the device of `preds`, cpu, got meta; move it", message)


@each_call
@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu")], ids=str)
@each_kind
def test_a_metric_on_another_device_than_its_batch(name: str, devices: tuple[str, str], call: str) -> None:
    """A metric that was not moved to the device of the batches says so, and counts nothing."""
    metric = KINDS[name].make().to(devices[0])
    batch = {
        key: x.to(devices[1]) if isinstance(x, Tensor) else x for key, x in KINDS[name].chosen(make_batch(name)).items()
    }
    message = raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert all(device in message for device in devices)
    assert metric.update_count == 0
    assert metric.tally.state.device.type == devices[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@each_kind
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(name: str, layout: torch.layout) -> None:
    """What is refused is said to be nested, with what makes one dense tensor of it."""
    good = {**make_batch(name), "weight": ones()}
    for key in KINDS[name].arguments:
        if key == "num_bytes":
            continue
        bad = {**good, key: torch.nested.nested_tensor([*good[key]], layout=layout)}
        message = assert_no_trace(name, bad, KINDS[name].options, good, TypeError)
        assert "must be a dense tensor, got a nested one" in message
        assert "unbind()" in message
