"""On a CUDA device: the losses and counts of the CPU, a buffer's memory, and a host that never waits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import CASES, FORMS, Case, Form, filled, named, numbers
from tests.instruments import copy_constants
from tests.losses.test_ignored_rows import LAYOUTS, MASKS
from xent_metrics import BinaryCrossEntropy, CrossEntropy, CrossEntropyReport, LinearLogits, Tally, functional
from xent_metrics.functional import binary_cross_entropy, per_target_losses
from xent_metrics.tally.tally import COUNTS

DEVICE = "cuda"
V = 1000

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # That it does not detect every wait.
]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True, scope="module")
def _constants_are_on_the_device() -> None:
    """Copy them there: the first update of a process waits for that, and no other."""
    copy_constants(DEVICE)


@contextmanager
def never_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def moved(batch: dict[str, Any], device: str = DEVICE) -> dict[str, Any]:
    """Copy the tensors of a batch, or of options, to a device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def make_logits(layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """Make the same logits on any device, in the same layout."""
    torch.manual_seed(3)
    return LAYOUTS[layout][0](lambda *shape: torch.randn(shape).to(dtype).to(device), 20, V)


def make_target(preds: Tensor, class_dim: int) -> Tensor:
    """Make targets of the shape that goes with logits, some of them ignored."""
    shape = preds.movedim(class_dim, -1).shape[:-1]
    return torch.randint(0, V, shape).masked_fill(MASKS["30.0%"](shape), -100)


def make_head(dtype: torch.dtype) -> tuple[LinearLogits, Tensor]:
    """Make factors whose products are exact in any dtype and in any order, and targets."""
    hidden, weight = torch.randint(-2, 3, (3, 700, 16)), torch.randint(-2, 3, (V, 16))
    preds = LinearLogits(hidden.to(dtype), weight.to(dtype) / 16, torch.randint(-2, 3, (V,)).to(dtype))
    return preds, make_target(torch.empty(3, 700, V, device="meta"), -1)


def assert_same_losses(found: Tensor, expected: Tensor) -> None:
    """Compare losses that were made on the device with those of the CPU."""
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


def assert_same_tally(found: Tally, expected: Tally) -> None:
    """Compare counts exactly and sums as losses are compared."""
    assert found.state.device.type == DEVICE
    here, there = (tally.totals()._asdict() for tally in (found, expected))
    assert {name: here.pop(name) for name in COUNTS} == {name: there.pop(name) for name in COUNTS}
    assert here == pytest.approx(there, rel=2e-6)  # Of squares.


# Values.


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weight": torch.rand(V)}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_class_indices(layout: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """They are those of the CPU, whatever the layout; bfloat16 is widened before anything is computed."""
    class_dim = LAYOUTS[layout][1]
    preds, there = make_logits(layout, dtype, "cpu"), make_logits(layout, dtype, DEVICE)
    assert there.stride() == preds.stride()
    target = make_target(preds, class_dim)
    expected = per_target_losses(preds, target, class_dim=class_dim, **options)
    found = per_target_losses(there, target.to(DEVICE), class_dim=class_dim, **moved(options))
    assert_same_losses(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_soft_targets(layout: str, dtype: torch.dtype) -> None:
    """Of distributions too, smoothed ones."""
    class_dim = LAYOUTS[layout][1]
    preds, there = make_logits(layout, dtype, "cpu"), make_logits(layout, dtype, DEVICE)
    target = torch.rand(preds.shape).softmax(class_dim)
    options = {"class_dim": class_dim, "label_smoothing": 0.1}
    assert_same_losses(
        per_target_losses(there, target.to(DEVICE), **options), per_target_losses(preds, target, **options)
    )


@pytest.mark.parametrize("input", ["log_probs", "probs"])
def test_losses_of_probabilities(input: str) -> None:
    """Also those that are clipped."""
    preds = torch.randn(4, 30, V).softmax(-1)
    preds, target = preds.log() if input == "log_probs" else preds, torch.randint(0, V, (4, 30))
    options = {"input": input, "eps": 1e-3 if input == "probs" else None}
    assert_same_losses(
        per_target_losses(preds.to(DEVICE), target.to(DEVICE), **options), per_target_losses(preds, target, **options)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_losses_of_a_head(dtype: torch.dtype) -> None:
    """Logits that are made where they are scored."""
    preds, target = make_head(dtype)
    expected = per_target_losses(preds, target)
    found = per_target_losses(preds.to(DEVICE), target.to(DEVICE))
    assert_same_losses(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_binary(dtype: torch.dtype) -> None:
    """Yes-or-no targets, with weights of the positive ones and some that are ignored."""
    preds, target = (3 * torch.randn(50, 7)).to(dtype), torch.randint(0, 2, (50, 7))
    target[::3] = -1
    options = {"ignore_index": -1, "pos_weight": torch.rand(7), "label_smoothing": 0.1}
    expected = binary_cross_entropy(preds, target, **options).item()
    found = binary_cross_entropy(preds.to(DEVICE), target.to(DEVICE), **moved(options))
    assert found.device.type == DEVICE
    assert found.item() == pytest.approx(expected, rel=1e-6)
    metric, other = BinaryCrossEntropy(**options), BinaryCrossEntropy(**options).to(DEVICE)
    metric.update(preds, target)
    other.update(preds.to(DEVICE), target.to(DEVICE))
    assert_same_tally(other.tally, metric.tally)


@pytest.mark.parametrize("weighing", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_counts(shift: bool, weighing: torch.dtype | None) -> None:
    """Of what is scored, ignored, infinite or NaN there are as many as on the CPU, and they add the same weight."""
    preds, target = torch.randn(6, 20, V), make_target(torch.empty(6, 20, V, device="meta"), -1)
    preds[1], preds[2, 3:5], preds[3, 4, 5:] = -torch.inf, torch.nan, -torch.inf
    target[3, 4:6] = 7
    weight = None if weighing is None else (2 * torch.rand(6, 20) - 0.5).clamp(min=0).to(weighing)
    metric, other = CrossEntropyReport(shift=shift), CrossEntropyReport(shift=shift).to(DEVICE)
    metric.update(preds, target, weight=weight)
    other.update(**moved({"preds": preds, "target": target, "weight": weight}))
    assert_same_tally(other.tally, metric.tally)
    assert other.tally.totals().weight == metric.tally.totals().weight


@each_case
def test_every_metric(case: Case) -> None:
    """Every metric reads what it reads on the CPU."""
    batches = case.batches(weighed=True)
    metric = filled(case.metric().to(DEVICE), *map(moved, batches))
    expected = numbers(case.filled(*batches).compute())
    assert numbers(metric.compute()) == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


@each_form
def test_every_function(form: Form) -> None:
    """Every function returns on the device what it returns on the CPU."""
    for batch in form.batches():
        found = form.function(**moved(batch), **moved(form.options))
        expected = form.function(**batch, **form.options)
        if isinstance(expected, Tally):
            assert_same_tally(found, expected)
            continue
        if isinstance(expected, Tensor):
            found, expected = found.flatten(), expected.flatten()
        assert numbers(found) == pytest.approx(numbers(expected), rel=1e-6, abs=1e-6, nan_ok=True)


# Waiting.


@each_case
def test_update_and_forward_never_wait(case: Case) -> None:
    """Not for targets that are ignored, nor for weights; reading the value of the batch is what waits."""
    batches = [moved(batch) for batch in case.batches(weighed=True)]
    metric = case.metric().to(DEVICE)
    with never_waiting():
        for batch in batches:
            metric.update(**batch)
            metric(**batch)
    assert metric.update_count == 2 * len(batches)


@each_form
def test_functions_never_wait(form: Form) -> None:
    """Nor do functions, of any of their options."""
    batch, options = moved(form.batches()[0]), moved(form.options)
    with never_waiting():
        form.function(**batch, **options)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("layout", ["rows", "classes second", "batch last"])
def test_many_rows_never_wait(layout: str, soft: bool) -> None:
    """Where there are enough to leave out those that are ignored, that is not asked for."""
    class_dim = LAYOUTS[layout][1]
    preds = LAYOUTS[layout][0](lambda *shape: torch.randn(shape, device=DEVICE), 500, V)
    target = preds.softmax(class_dim) if soft else make_target(preds, class_dim).to(DEVICE)
    metric = CrossEntropy(class_dim=class_dim).to(DEVICE)
    with never_waiting():
        metric.update(preds, target)
        metric(preds, target)
        functional.cross_entropy(preds, target, class_dim=class_dim)


def test_a_head_never_waits() -> None:
    """All of its rows are multiplied."""
    preds, target = make_head(torch.float32)
    there, target = preds.to(DEVICE), target.to(DEVICE)
    metric = CrossEntropy().to(DEVICE)
    with never_waiting():
        metric.update(there, target)
        metric(there, target)
        functional.cross_entropy(there, target)


def test_what_is_wrong_raises_when_it_is_read() -> None:
    """A target out of range, an improper probability and a negative weight are counted and raise from `compute`."""
    preds, target = torch.rand(4, 5, device=DEVICE), torch.tensor([0, 1, 5, -100], device=DEVICE)
    improper = torch.full((4, 5), 1.5, device=DEVICE)
    for batch, options, text in (
        ((preds, target), {}, "`target` must hold .* but 1 targets were outside"),
        ((improper, target.clamp(max=4)), {"input": "probs"}, "`preds` must hold .* but those of 3 targets did not"),
        ((preds, target.clamp(max=4), -torch.ones_like(preds[:, 0])), {}, "`weight` must hold .* but 3 were not"),
    ):
        metric = CrossEntropy(**options).to(DEVICE)
        with never_waiting():
            metric.update(**named(metric.update, *batch))
            assert functional.cross_entropy(**named(metric.update, *batch), **options).device.type == DEVICE
        assert functional.cross_entropy(**named(metric.update, *batch), **options).isnan()
        with pytest.raises(ValueError, match=text):
            metric.compute()


# Memory, moves and compiled losses.


def extra_memory(call: Callable[[], object]) -> int:
    """Return the most memory of the device that a call takes beyond what was taken."""
    call()  # The first call may make workspaces.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_memory_is_a_fixed_buffer(class_dim: int, dtype: torch.dtype) -> None:
    """An update of 1 GiB of logits takes 64 MiB and 64 bytes a row."""
    preds = torch.randn(8, 32000, 1024, dtype=dtype, device=DEVICE)
    preds = preds if class_dim == 1 else preds.view(8, 1024, 32000)
    target = torch.randint(0, 32000, (8, 1024), device=DEVICE)
    target[:, ::3] = -100
    metric = CrossEntropy(class_dim=class_dim).to(DEVICE)
    assert extra_memory(lambda: metric.update(preds, target)) <= 64 * 2**20 + 64 * target.numel()


@each_case
def test_moving_there_and_back(case: Case) -> None:
    """The state is the same wherever it is, and goes on growing."""
    first, second, third = case.batches(weighed=True)
    metric, stays = case.filled(first), case.filled(first)
    state = metric.tally.state.clone()
    metric.to(DEVICE)
    assert metric.tally.state.device.type == DEVICE
    assert torch.equal(metric.tally.state.cpu(), state)
    metric.update(**moved(second))
    state = metric.tally.state.cpu()
    metric.to("cpu")
    assert torch.equal(metric.tally.state, state)
    for batch in (second, third):
        stays.update(**batch)
    metric.update(**third)
    expected = pytest.approx(numbers(stays.compute()), rel=1e-9, abs=1e-9, nan_ok=True)
    assert numbers(metric.compute()) == expected


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="compiling for CUDA needs Triton")
@pytest.mark.filterwarnings(  # Of the compiler, about itself and about what it could do faster.
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "classes second"])
def test_compiled_losses(layout: str, dtype: torch.dtype, soft: bool) -> None:
    """What a compiler makes of the kernels agrees with the CPU."""
    class_dim = LAYOUTS[layout][1]
    preds, there = make_logits(layout, dtype, "cpu"), make_logits(layout, dtype, DEVICE)
    target = torch.rand(preds.shape).softmax(class_dim) if soft else make_target(preds, class_dim)
    expected = per_target_losses(preds, target, class_dim=class_dim)
    found = per_target_losses(there, target.to(DEVICE), class_dim=class_dim, backend="compile")
    assert_same_losses(found, expected)
