"""Compiled losses are those of eager code, with the same bits in any batch."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor.config
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

import xent_metrics
from tests import reference
from tests.cases import CASES, CLASS_WEIGHT, Batch, Case, K, bits, metric_classes
from tests.lightning.fits import Model, ragged_loader
from tests.losses.compiling import assert_near, bits_of, compilations, forget, needs_compiler, nothing_kept
from xent_metrics import CrossEntropy, CrossEntropyReport, LinearLogits, Perplexity, functional
from xent_metrics.lightning import CrossEntropyMonitor
from xent_metrics.losses import BinaryOptions, LossOptions, binary_losses, compiled, target_entropies

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of the compiler.
BACKENDS = ("auto", "eager", "compile")
CLASSES = sorted(metric_classes(xent_metrics), key=lambda x: x.__name__)
FUNCTIONS = [getattr(functional, name) for name in functional.__all__ if name != "convert_label_smoothing"]
REQUIRED = {"num_groups": 3, "num_classes": K}


def single(batch: Batch) -> Batch:
    """Make floats float32."""
    floats = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {**batch, **{name: x.float() for name, x in floats.items()}}


def function_of(metric_class: type[Metric]) -> Callable[..., Any] | None:
    """Return the function that reads what a class does; None for the report, which has none."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", metric_class.__name__).lower()
    return getattr(functional, name, None)


def required_by(what: Callable[..., Any]) -> dict[str, Any]:
    """Return the options that there are no defaults for."""
    return {name: value for name, value in REQUIRED.items() if name in inspect.signature(what).parameters}


@pytest.mark.parametrize("made", [*CLASSES, CrossEntropyMonitor], ids=lambda x: x.__name__)
def test_every_class_takes_the_three(made: Any) -> None:
    """The three values are taken, `"auto"` is what there is without, and others are refused by name."""
    assert inspect.signature(made).parameters["backend"].default == "auto"
    for backend in BACKENDS:
        made(**required_by(made), backend=backend)
    for bad in ("inductor", "Compile", "", None, True):
        with pytest.raises(ValueError, match=r"^`backend` must be one of \['auto', 'eager', 'compile'\], got "):
            made(**required_by(made), backend=bad)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)
def test_every_function_takes_the_three(function: Callable[..., Any]) -> None:
    """So do functions; an empty batch is enough to see it, and is nothing to compile."""
    assert inspect.signature(function).parameters["backend"].default == "auto"
    binary = function is functional.binary_cross_entropy
    preds, target = torch.empty(0, 3) if binary else torch.empty(0, 3, K), torch.empty(0, 3, dtype=torch.int64)
    more = {"num_bytes": 0, "group": target, "preds": preds, "preds_a": preds, "preds_b": preds, "target": target}
    batch = {name: x for name, x in more.items() if name in inspect.signature(function).parameters}
    before = compilations()
    for backend in BACKENDS:
        function(**batch, **required_by(function), backend=backend)
    assert compilations() == before
    for bad in ("inductor", None):
        with pytest.raises(ValueError, match=r"^`backend` must be one of"):
            function(**batch, **required_by(function), backend=bad)


FIRST = {case.metric_class: name for name, case in reversed(CASES.items())}  # Of each class; the others are slow.


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in FIRST.values() else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_every_class_and_function(case: Case) -> None:
    """Compiled in float32, every class and function reads what plain floats do, and what eager code does."""
    batches = [single(batch) for batch in case.batches(weighed=True)]
    kept = deepcopy(batches)
    metric, eager = case.metric(backend="compile"), case.metric(backend="eager")
    function = function_of(case.metric_class)
    for batch in batches:
        value, of_eager = metric(**batch), eager(**batch)
        assert_near(value, case.expected(batch))
        assert_near(value, of_eager)
        if function is not None:
            assert_near(function(**batch, **case.options, backend="compile"), value)
    assert_near(metric.compute(), case.expected(*batches))
    assert_near(metric.compute(), eager.compute())
    for batch, before in zip(batches, kept, strict=True):
        for name, x in batch.items():
            assert not isinstance(x, Tensor) or torch.equal(x, before[name]), f"{name} was written to"


class Scored(NamedTuple):
    """How losses of a number of rows are made."""

    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    soft: bool = False
    num_classes: int = K

    @property
    def form(self) -> str:
        """What the scores are."""
        return str(self.options.get("input", "logits"))

    def make(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Make scores and targets."""
        scores = 3 * torch.randn(num_rows, self.num_classes)
        if self.form != "logits":
            scores = scores.softmax(1) if self.form == "probs" else scores.log_softmax(1)
        hard = torch.randint(0, self.num_classes, (num_rows,))
        return scores.to(self.dtype), torch.rand(num_rows, self.num_classes).softmax(1) if self.soft else hard

    def judge(self, scores: Tensor, target: Tensor) -> Tensor:
        """Score in float64."""
        options = dict(self.options)
        smoothing, class_weight = options.get("label_smoothing", 0.0), options.get("class_weight", torch.ones(()))
        if self.form == "logits" and not self.soft:
            names = {"weight": options.get("class_weight"), "label_smoothing": smoothing}
            names["weight"] = None if names["weight"] is None else names["weight"].double()
            return F.cross_entropy(scores.double(), target, reduction="none", **names)
        wide = scores.double()
        if options.get("eps"):
            wide = wide.clamp(options["eps"], 1 - options["eps"])
        log_q = {"logits": wide.log_softmax(1), "probs": wide.log(), "log_probs": wide}[self.form]
        one = target.double() if self.soft else F.one_hot(target, self.num_classes).double()
        return -(((1 - smoothing) * one + smoothing / self.num_classes) * class_weight * log_q).sum(1)


SCORED = {
    "weights, smoothed away": Scored({"class_weight": CLASS_WEIGHT, "label_smoothing": 1.0}),
    "bfloat16": Scored({}, torch.bfloat16),
    "float16, smoothed": Scored({"label_smoothing": 0.1}, torch.float16),
    "float64": Scored({}, torch.float64),
    "log_probs, bfloat16": Scored({"input": "log_probs"}, torch.bfloat16),
    "probs, clipped and smoothed": Scored({"input": "probs", "eps": 0.01, "label_smoothing": 0.1}),
    "probs, bfloat16": Scored({"input": "probs"}, torch.bfloat16),
    "soft, smoothed, bfloat16": Scored(
        {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.3}, torch.bfloat16, soft=True
    ),
    "soft, probs": Scored({"input": "probs", "eps": 0.01}, soft=True),
}


@needs_compiler
@pytest.mark.parametrize("scored", SCORED.values(), ids=SCORED)
def test_losses(scored: Scored) -> None:
    """In every dtype and for every input the loss of each target is that of float64, and scores stay what they are."""
    scores, target = scored.make(200)
    kept = scores.clone(), target.clone()
    losses = functional.per_target_losses(scores, target, **scored.options, backend="compile")
    eager = functional.per_target_losses(scores, target, **scored.options, backend="eager")
    assert (losses.dtype, losses.shape) == (eager.dtype, eager.shape)
    torch.testing.assert_close(losses.double(), scored.judge(scores, target), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses, eager, rtol=1e-6, atol=1e-6)
    assert torch.equal(scores, kept[0])
    assert torch.equal(target, kept[1])


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.1}], ids=["", "weights"])
def test_layouts(options: dict[str, Any]) -> None:
    """Strides, a shift, classes elsewhere and ignored targets give the losses of the rows that are scored."""
    scores, target = 3 * torch.randn(5, 7, K), torch.randint(0, K, (5, 7))
    target[1, 2:4] = -100

    def compiled(preds: Tensor, labels: Tensor, **more: Any) -> Tensor:
        return functional.per_target_losses(preds, labels, **options, **more, backend="compile")

    judge = Scored(options).judge
    expected = judge(scores.reshape(-1, K), target.reshape(-1)).view(5, 7)
    for layout in (
        compiled(scores, target),
        compiled(scores.movedim(-1, 1), target, class_dim=1),
        compiled(scores.movedim(-1, 1).contiguous(), target, class_dim=1),
        compiled(torch.stack([scores, -scores], -1)[..., 0], target),
        compiled(scores.transpose(0, 1).contiguous().transpose(0, 1), target.t().contiguous().t()),
    ):
        torch.testing.assert_close(layout.double().nan_to_num(), expected, rtol=1e-6, atol=1e-6)
    value = functional.cross_entropy(scores, target, **options, shift=True, backend="compile")
    following = judge(scores[:, :-1].reshape(-1, K), target[:, 1:].reshape(-1)).sum()
    norm = options.get("class_weight", torch.ones(K))[target[:, 1:][target[:, 1:] >= 0]].sum()
    assert value.item() == pytest.approx((following / norm).item(), rel=1e-6)


def strided() -> Iterator[Tensor]:
    """Make logits of 4 sequences whose rows are not one after the other, as models with time first have them."""
    yield torch.randn(5500, 4, K).transpose(0, 1)
    yield torch.randn(1, K).expand(4, 5500, K)
    yield torch.randn(4, 5501, K)[:, 1:]
    yield torch.randn(4, 5500, K + 1)[..., 1:]


@needs_compiler
@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_rows_that_are_left_out_of_any_layout(backend: Any) -> None:
    """Where most targets are ignored, each of the others is scored by its own row."""
    few = torch.full((4, 5500), -100)
    few[0, 0], few[0, 5], few[3, 0], few[3, 1] = 1, 2, 3, 4
    padded = torch.randint(0, K, (4, 5500)).where(torch.arange(5500) < torch.tensor([[5500], [4000], [90], [2]]), -100)
    for scores in strided():
        for target in (few, padded):
            losses = functional.per_target_losses(scores, target, backend=backend).double().nan_to_num()
            expected = F.cross_entropy(scores.double().reshape(-1, K), target.reshape(-1), reduction="none")
            torch.testing.assert_close(losses.flatten(), expected, rtol=1e-6, atol=1e-6)


@needs_compiler
def test_linear_logits() -> None:
    """Logits that are made where they are scored are scored by what is compiled, ignored ones left out."""
    hidden, weight, bias = torch.randn(40, 9), torch.randn(K, 9), torch.randn(K)
    target = torch.randint(0, K, (40,)).masked_fill(torch.arange(40) % 3 == 1, -100)
    expected = F.cross_entropy(F.linear(hidden.double(), weight.double(), bias.double()), target)
    for layout in (hidden, hidden.t().contiguous().t()):
        metric = CrossEntropyReport(backend="compile")
        metric.update(LinearLogits(layout, weight, bias), target)
        value = metric.compute()
        assert value["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-6)
        assert (value["num_tokens"], value["num_ignored"]) == (27, 13)


@needs_compiler
@pytest.mark.parametrize(
    ("options", "infinite"),
    [({}, [1]), ({"label_smoothing": 0.1}, [1, 2]), ({"class_weight": CLASS_WEIGHT, "label_smoothing": 0.1}, [1])],
    ids=["", "smoothed", "weights"],
)
def test_extreme_logits(options: dict[str, Any], infinite: list[int]) -> None:
    """Infinite and NaN logits give the infinite and NaN losses that they should; a class of weight 0 adds nothing."""
    scores, target = torch.randn(7, K), torch.tensor([1, 1, 1, 1, 1, 1, 1])
    scores[1, 1] = -torch.inf
    scores[2, 0] = -torch.inf  # A class of weight 0.
    scores[3, 3] = torch.nan
    scores[4] = -torch.inf
    scores[5, 2] = torch.inf
    for backend in ("eager", "compile"):
        loss = functional.per_target_losses(scores, target, **options, backend=backend)
        assert loss.isnan().nonzero().flatten().tolist() == [3, 4, 5]
        assert (loss == torch.inf).nonzero().flatten().tolist() == infinite
        report = CrossEntropyReport(nan_policy="omit", backend=backend)
        report.update(scores, target)
        assert report.compute()["num_nonfinite"] == 4


@needs_compiler
def test_probabilities_of_zero() -> None:
    """A target of probability 0 is an infinite loss, others are not."""
    scores = torch.eye(K).roll(1, 0)
    loss = functional.per_target_losses(scores, torch.arange(K).roll(1).roll(-1), input="probs", backend="compile")
    assert loss.tolist() == [torch.inf] * K
    loss = functional.per_target_losses(scores, torch.arange(K).roll(1), input="probs", backend="compile")
    assert loss.tolist() == [0.0] * K


@needs_compiler
def test_extreme_binary_logits() -> None:
    """A confident and right logit costs nothing, a wrong one what it should, and a small loss keeps its digits."""
    logits = [torch.inf, -torch.inf, torch.inf, -torch.inf, 200.0, -200.0, 30.0, -30.0, 12.0, -0.1, torch.nan]
    target = [1, 0, 0, 1, 1, 1, 1, 0, 1, 0, 1]
    loss = binary_losses(torch.tensor(logits), torch.tensor(target), BinaryOptions(backend="compile")).loss.flatten()
    expected = [reference.binary_cross_entropy(x, y) for x, y in zip(logits[4:-1], target[4:-1], strict=True)]
    assert loss.tolist() == pytest.approx([0, 0, torch.inf, torch.inf, *expected, torch.nan], rel=1e-6, nan_ok=True)


BAD = {
    "a class": ({}, None, K),
    "a negative class": ({"label_smoothing": 0.1}, None, -1),
    "a probability": ({"input": "probs"}, 1.5, None),
    "no distribution": ({}, None, 0.7),
}


@needs_compiler
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_values_raise_as_they_do(bad: tuple[dict[str, Any], float | None, float | None]) -> None:
    """What eager code refuses is refused with the same words, and the state is what it was."""
    options, score, label = bad
    scored = Scored(options, soft=isinstance(label, float))
    scores, target = scored.make(9)
    metric, messages = CrossEntropy(**options, backend="compile"), []
    metric.update(scores, target)
    state = metric.tally.state.clone()
    if score is not None:
        scores[4, 2] = score
    if label is not None:
        target[(4, 2) if scored.soft else 4] = label
    for refusing in (metric, CrossEntropy(**options, backend="eager")):
        with pytest.raises(ValueError, match=r"^`(preds|target)` must") as caught:
            refusing.update(scores, target)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert torch.equal(metric.tally.state, state)
    assert metric.update_count == 1


class Bits(NamedTuple):
    """Losses whose bits must not depend on the batch."""

    scored: Scored
    what: str = "losses"
    num_rows: int = 2003  # With a remainder for every width of a vector.

    def losses(self, scores: Tensor, target: Tensor) -> Tensor:
        """Compute, compiled."""
        options = {**self.scored.options, "backend": "compile"}
        if self.what == "binary":
            return binary_losses(scores[:, 0].contiguous(), target, BinaryOptions(**options)).loss.flatten()
        if self.what == "entropies":
            return target_entropies(scores, target, LossOptions(**options))
        return functional.per_target_losses(scores, target, **options)

    def make(self) -> tuple[Tensor, Tensor]:
        """Make scores and targets; of yes and no the first class is the only one, of all probabilities."""
        if self.what == "binary":
            scores = 3 * torch.randn(self.num_rows, 1)
            return scores.sigmoid() if self.scored.form == "probs" else scores, torch.randint(0, 2, (self.num_rows,))
        return self.scored.make(self.num_rows)


def weights(num_classes: int) -> Tensor:
    """Make class weights, some of them 0."""
    return torch.arange(num_classes) % 3 / 2


SMOOTHED = {"label_smoothing": 0.1}

BITS = {
    "5 logits": Bits(Scored({}, num_classes=5)),
    "3 logits, weights": Bits(Scored({**SMOOTHED, "class_weight": weights(3)}, num_classes=3)),
    "50 logits, smoothed, bfloat16": Bits(Scored(SMOOTHED, torch.bfloat16, num_classes=50)),
    "257 probs, clipped and smoothed": Bits(
        Scored({**SMOOTHED, "input": "probs", "eps": 0.001, "class_weight": weights(257)}, num_classes=257)
    ),
    "5000 logits": Bits(Scored({}, num_classes=5000)),
    "5 soft": Bits(Scored({"class_weight": weights(5), **SMOOTHED}, soft=True, num_classes=5)),
    "257 soft": Bits(Scored({}, soft=True, num_classes=257)),
    "2 entropies": Bits(Scored(SMOOTHED, soft=True, num_classes=2), "entropies", 20_003),
    "binary logits": Bits(Scored(SMOOTHED), "binary", 20_003),
    "binary probs": Bits(Scored({"input": "probs"}), "binary", 20_003),
}

QUICK = ("3 logits, weights",)  # The others are slow.


@pytest.fixture(name="_nothing_kept")
def _caches_off() -> Iterator[None]:
    """Compile in full."""
    with nothing_kept():
        yield


@needs_compiler
@pytest.mark.usefixtures("_nothing_kept")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in BITS.items()],
)
def test_same_bits_for_any_batching(case: Bits) -> None:
    """A loss has the same bits in any batch, whatever batch came first, and on one and two threads."""
    scores, target = case.make()
    found = {}
    for threads, first in ((1, case.num_rows), (2, 2)):
        torch.set_num_threads(threads)
        forget()
        case.losses(scores[:first], target[:first])
        for size in (case.num_rows, 1, 2, 3, 7, 16, 17):
            few = slice(0, None if size > 3 else 300)  # Those of a larger size have the same remainders.
            parts = zip(scores[few].split(size), target[few].split(size), strict=True)
            found[threads, size] = torch.cat([case.losses(*part) for part in parts])
    expected = found[1, case.num_rows]
    mismatches = {key: int((x != expected[: len(x)]).sum()) for key, x in found.items()}
    assert not any(mismatches.values()), mismatches
    assert all(bits_of(x) == bits_of(expected[: len(x)]) for x in found.values())


@needs_compiler
def test_a_collection_does_not_merge_backends() -> None:
    """Compiled metrics share no state with others, whose losses differ in the last bits; those with equal bits do."""
    metrics = {
        f"{backend} {name}": made(backend=backend)
        for backend in BACKENDS
        for name, made in (("nats", CrossEntropy), ("perplexity", Perplexity))
    }
    collection = MetricCollection(metrics)
    for _ in range(2):
        collection.update(1000 * torch.eye(K), torch.arange(K))  # Losses of 0, which both make alike.
    groups = {frozenset(group) for group in collection.compute_groups.values()}
    alike = ("auto", "eager"), ("compile",)
    assert groups == {frozenset(f"{x} {name}" for x in each for name in ("nats", "perplexity")) for each in alike}


def test_states_of_two_backends_are_not_merged() -> None:
    """A merge between backends is refused and changes nothing."""
    for backend, other in (("eager", "compile"), ("compile", "eager"), ("auto", "compile")):
        metric = CrossEntropy(backend=backend)
        with pytest.raises(ValueError, match="backend"):
            metric.merge_state(CrossEntropy(backend=other))
        assert metric.update_count == metric.tally.state.abs().sum() == 0


@needs_compiler
def test_copies() -> None:
    """A copy of a metric that has compiled goes on by itself, to the same bits."""
    batches = [(torch.randn(n, K), torch.randint(0, K, (n,))) for n in (4, 1)]
    metric = CrossEntropyReport(backend="compile")
    metric.update(*batches[0])
    before = bits(metric.compute())
    copies = [deepcopy(metric), metric.clone(), pickle.loads(pickle.dumps(metric))]
    for copy in copies:
        assert bits(copy.compute()) == before
        copy.update(*batches[1])
    assert bits(metric.compute()) == before
    metric.update(*batches[1])
    assert [bits(copy.compute()) for copy in copies] == [bits(metric.compute())] * 3


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@needs_compiler
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    """In every mode, of scores that want a gradient or not, the value is the same, and no graph is kept."""
    scores, target = torch.randn(9, K), torch.randint(0, K, (9,))
    expected = functional.per_target_losses(scores, target, backend="compile")
    for wanted in (False, True):
        leaf = scores.clone().requires_grad_(wanted)
        with mode():
            metric = CrossEntropy(backend="compile")
            metric.update(1 * leaf, target)
            loss = functional.per_target_losses(1 * leaf, target, backend="compile")
        assert torch.equal(loss, expected)
        assert not loss.requires_grad
        assert not metric.tally.state.requires_grad
        assert leaf.grad is None
        assert metric.compute().item() == pytest.approx(F.cross_entropy(scores.double(), target).item(), rel=1e-6)


@needs_compiler
def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be compiled functions say so too, and what was compiled before goes on."""
    before = torch.randn(4, K), torch.randint(0, K, (4,))
    expected = functional.perplexity(*before, backend="compile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        with pytest.raises(ValueError, match=r"^`backend` must be 'auto' or 'eager' .*/no/such/compiler.*; install"):
            functional.perplexity(torch.randn(4, 15), torch.randint(0, 15, (4,)), backend="compile")
        assert torch.equal(functional.perplexity(*before, backend="compile"), expected)


@pytest.mark.parametrize("message", ["NoCompiler: none\n\nHint", "backend='inductor' raised:\nNoCompiler: none\nHint"])
def test_the_cause_is_named(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the second line of errors of PyTorch 2.8 and older."""

    def fail(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException(message)

    monkeypatch.setattr(compiled, "_compiled", lambda *_, **__: fail)
    with pytest.raises(ValueError, match="got 'compile' and 'NoCompiler: none'; install"):
        functional.perplexity(torch.randn(4, K), torch.randint(0, K, (4,)), backend="compile")


@needs_compiler
def test_callback() -> None:
    """The callback scores by what is compiled, once for all its batches."""
    model, loader = Model("logits"), ragged_loader(3)
    before, used, seen = compilations(), compiled._compiled.cache_info(), {}
    for backend in ("eager", "compile"):
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[CrossEntropyMonitor(backend=backend)],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        [seen[backend]] = trainer.validate(model, loader, verbose=False)
        assert (compiled._compiled.cache_info() != used) == (backend == "compile")
    assert compilations() - before <= 2
    assert seen["compile"] == pytest.approx(seen["eager"], rel=1e-5)
