"""The functional forms in compiled and in exported code: the values of eager code, and NaN where that would raise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.cases import FORMS, GROUPS, Batch, Form, K, numbers
from tests.losses.compiling import needs_compiler, nothing_kept
from xent_metrics import CrossEntropy, Tally, functional
from xent_metrics.tally.tally import SUMS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of the compiler.


# A number, and a dict of two models. The others are slow.
QUICK = ("cross_entropy-soft",)
QUICK_EXPORTED = ("cross_entropy-shift", "tally")


def each_of(names: Iterable[str], quick: tuple[str, ...]) -> pytest.MarkDecorator:
    """Take these forms, of which only the quick ones are not slow."""
    forms = [pytest.param(FORMS[x], id=x, marks=() if x in quick else pytest.mark.slow) for x in names]
    return pytest.mark.parametrize("form", forms)


# Exporting traces as compiling does: one form of each function, and of each kind of input.
EXPORTED = (
    "cross_entropy-soft",
    "cross_entropy-shift",
    "bits_per_token-probs",
    "perplexity-shift",
    "bits_per_byte-table",
    "bits_per_byte-number",
    "binary_cross_entropy",
    "cross_entropy_decomposition",
    "grouped_cross_entropy",
    "normalized_cross_entropy",
    "cross_entropy_difference",
    "per_target_losses",
    "tally",
)
EXPORTED += tuple(
    {
        form.function: name
        for name, form in FORMS.items()
        if form.function not in {FORMS[x].function for x in EXPORTED}
    }.values()
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Forget what was compiled before, and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(value: Any, expected: Any) -> None:
    """Compare values to 1e-12, and counts exactly."""
    if isinstance(expected, Tally):
        found, totals = value.totals(), expected.totals()
        assert found[len(SUMS) :] == totals[len(SUMS) :]
        assert found[: len(SUMS)] == pytest.approx(totals[: len(SUMS)], rel=1e-12)
        return
    assert isinstance(value, dict) == isinstance(expected, dict)
    if isinstance(expected, Tensor):
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        value, expected = value.flatten().double(), expected.flatten().double()
    value, expected = numbers(value), numbers(expected)
    assert list(value) == list(expected)
    for name, number in value.items():
        tolerance = 1e-6 if name.endswith(("stderr", "lower", "upper")) else 1e-12
        assert number == pytest.approx(expected[name], rel=tolerance, abs=tolerance, nan_ok=True), name


def bad_batches(form: Form, batch: Batch) -> Iterator[Batch]:
    """Make batches of the same shapes that eager code refuses, each for one value of its last target."""
    batch = {name: changed(x, 1.0) if name in ("weight", "target") else x for name, x in batch.items()}
    soft = batch["target"].is_floating_point()
    if soft:
        batch["target"] = form.batches()[0]["target"]
    bad: dict[str, tuple[float, ...]] = {"weight": (-1.0, math.nan, math.inf), "group": (-1, GROUPS)}
    if form.options.get("input") != "losses":
        bad["target"] = (1.5, -0.5) if soft else (K, -7)
    if form.options.get("input") == "probs":
        bad["preds"] = (1.5, -0.5)
    if isinstance(batch.get("num_bytes"), Tensor):
        bad["num_bytes"] = (-1,)
    for name, values in bad.items():
        for value in values if name in batch else ():
            yield {**batch, name: changed(batch[name], value)}


def changed(x: Tensor, value: float) -> Tensor:
    """Change the last number of a tensor."""
    copy = x.clone()
    copy[(-1,) * x.dim()] = value
    return copy


def assert_bad(value: Any) -> None:
    """Fail unless everything that depends on a bad value is NaN, or it was counted."""
    if isinstance(value, Tally):
        totals = value.totals()
        assert totals.out_of_range + totals.improper + totals.invalid_weight == 1
    elif isinstance(value, Tensor) and value.dim() == 2:  # One loss for each target.
        assert value.flatten()[-1].isnan()
        assert value.isnan().sum() == 1
    else:
        values = value if isinstance(value, dict) else {"": value}
        # The entropy is that of the targets, whatever the model.
        assert all(x.isnan().all() for x in values.values()), value


def test_every_function_has_a_form() -> None:
    """No function of the module is missing from the table."""
    names = {*functional.__all__} - {"convert_label_smoothing"}
    assert {form.function.__name__ for form in FORMS.values()} == names
    assert {FORMS[name].function.__name__ for name in EXPORTED} == names


@each_of(FORMS, QUICK)
def test_compiled(form: Form) -> None:
    """In one graph the values are those of eager code, compiled once for one shape; bad values read NaN."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(form.function, backend=counter, fullgraph=True)
    batches = form.batches()
    for batch in batches:
        batch.update({name: x for name, x in batches[0].items() if isinstance(x, int)})
        assert_same(compiled(**batch, **form.options), form.function(**batch, **form.options))
    assert counter.frame_count == 1
    for batch in bad_batches(form, batches[0]):
        with pytest.raises(ValueError, match=r"^`(target|weight|group|preds|num_bytes)`"):
            form.function(**batch, **form.options)
        assert_bad(compiled(**batch, **form.options))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_with_any_number_of_bytes() -> None:
    """A number of bytes that changes from batch to batch is no reason to compile again and again."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functional.bits_per_byte, backend=counter, fullgraph=True)
    preds, target = torch.randn(4, K), torch.randint(0, K, (4,))
    for num_bytes in (20, 21, 23):
        assert_same(
            compiled(preds, target, num_bytes=num_bytes), functional.bits_per_byte(preds, target, num_bytes=num_bytes)
        )
    assert counter.frame_count <= 2


class Calling(nn.Module):
    """Calls a form; a tally is not something to return from a graph, its state is."""

    def __init__(self, form: Form) -> None:
        """Keep tensors as buffers, as models do."""
        super().__init__()
        self.form = form
        for name, value in form.options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)

    def forward(self, **batch: Any) -> Any:
        """Call it."""
        options = {name: getattr(self, name) if isinstance(x, Tensor) else x for name, x in self.form.options.items()}
        value = self.form.function(**batch, **options)
        return value.state if isinstance(value, Tally) else value


@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")  # PyTorch 2.6, of the graph that it makes
@each_of(EXPORTED, QUICK_EXPORTED)
def test_exported(form: Form) -> None:
    """An exported module gives the values of eager code, and NaN for bad values."""
    batches = form.batches()
    exported = torch.export.export(Calling(form), (), batches[0]).module()

    def call(batch: Batch) -> Any:
        value = exported(**batch)
        return Tally(value) if form.function is functional.tally else value

    for batch in batches:
        batch.update({name: x for name, x in batches[0].items() if isinstance(x, int)})  # Constants of a graph.
        assert_same(call(batch), form.function(**batch, **form.options))
    for batch in bad_batches(form, batches[0]):
        assert_bad(call(batch))


@pytest.mark.slow
def test_compiled_for_any_size() -> None:
    """With dynamic shapes what was compiled for the first batch serves batches of all sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functional.cross_entropy, backend=counter, fullgraph=True, dynamic=True)
    first = 0
    for size in (2, 3, 5, 8):
        preds, target = torch.randn(size, 7, K), torch.randint(0, K, (size, 7))
        assert_same(compiled(preds, target), functional.cross_entropy(preds, target))
        first = counter.frame_count if size == 2 else first
    assert counter.frame_count == first


def test_compiled_with_a_gradient() -> None:
    """A training step compiles in one graph with a metric in it, and its gradient is that of the loss alone."""

    def step(weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = nn.functional.cross_entropy(weight, target)
        return loss, functional.perplexity(weight, target)

    weight, target = torch.randn(4, K, requires_grad=True), torch.randint(0, K, (4,))
    loss, value = torch.compile(step, backend="aot_eager", fullgraph=True)(weight, target)
    loss.backward()
    expected = (weight.detach().softmax(-1) - nn.functional.one_hot(target, K)) / 4
    assert torch.allclose(weight.grad, expected, atol=1e-6)
    assert not value.requires_grad
    assert value.item() == pytest.approx(math.exp(loss.item()), rel=1e-5)


@pytest.mark.parametrize("call", ["update", pytest.param("forward", marks=pytest.mark.slow)])
def test_compiled_metric(call: str) -> None:
    """A call of a metric is a part of the graph of a compiled step, though it takes a lock elsewhere."""
    metric, eager = CrossEntropy(), CrossEntropy()
    batch = torch.randn(4, K), torch.randint(0, K, (4,))
    compiled = torch.compile(getattr(metric, call), backend="eager", fullgraph=True)
    for _ in range(1 if call == "update" else 3):
        value, expected = compiled(*batch), getattr(eager, call)(*batch)
        assert value is expected is None or numbers(value) == pytest.approx(numbers(expected), rel=1e-12)
    assert torch.equal(metric.tally.state, eager.tally.state)
    assert metric.update_count == eager.update_count


@needs_compiler
@pytest.mark.slow
def test_compiled_to_machine_code() -> None:
    """The default backend, which fuses and reorders, gives the value of eager code to 1e-12, and NaN."""
    form = FORMS["cross_entropy-losses"]
    compiled = torch.compile(form.function, fullgraph=True)
    batches = form.batches()
    with nothing_kept():
        for batch in batches:
            assert_same(compiled(**batch, **form.options), form.function(**batch, **form.options))
        for batch in bad_batches(form, batches[0]):
            assert_bad(compiled(**batch, **form.options))
