"""What a report says of predictions, besides their losses: the share of hits, and the entropy of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.classification import multiclass_accuracy

from tests.losses.compiling import needs_compiler
from xent_metrics import CrossEntropyReport, LinearLogits

SIZES = (2, 63, 128, 1000, 50_257)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def report(preds: Any, target: Tensor, **options: Any) -> CrossEntropyReport:
    """Fill a report with all it can say."""
    metric = CrossEntropyReport(accuracy=True, entropy=True, **options)
    metric.update(preds, target)
    return metric


def batch(num_classes: int, dtype: torch.dtype = torch.float32, num_rows: int = 40) -> tuple[Tensor, Tensor]:
    """Return logits with ties for the first place, and targets, of which every other one is the first of the best."""
    logits = (3 * torch.randn(num_rows, num_classes)).to(dtype)
    tied = torch.randint(0, num_classes, (num_rows,))
    logits[torch.arange(num_rows), tied] = logits.amax(1)
    target = torch.randint(0, num_classes, (num_rows,))
    firsts = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    target[::2] = firsts[::2]
    target[1::4] = tied[1::4]
    return logits, target


def true_entropies(logits: Tensor) -> Tensor:
    """Return the entropies of softmax distributions, in float64."""
    log_probs = logits.double().log_softmax(-1)
    return torch.special.entr(log_probs.exp()).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", SIZES)
def test_accuracy_is_that_of_torchmetrics(num_classes: int, dtype: torch.dtype) -> None:
    """The first of equally likely classes counts, in chunks of a long row too."""
    logits, target = batch(num_classes, dtype)
    expected = multiclass_accuracy(logits, target, num_classes, average="micro")
    assert report(logits, target).compute()["accuracy"].float() == expected


class WidestArgmax(TorchDispatchMode):
    """Records among how many classes at most `argmax` looked for the largest score."""

    num_classes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "argmax" in str(func):
            self.num_classes = max(self.num_classes, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def test_rows_that_are_clear_are_not_read_again() -> None:
    """`argmax` over all classes takes as long as the loss."""
    logits, target = torch.randn(40, 50_257), torch.arange(40)
    logits[target, target + torch.arange(40) % 2] = 20.0
    with WidestArgmax() as widest:
        metric = report(logits, target)
    assert 1 < widest.num_classes < 1000
    assert metric.compute()["accuracy"] == 0.5


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("num_classes", SIZES)
def test_accuracy_elsewhere(num_classes: int) -> None:
    """Where values may not be read the same classes are the first."""
    logits, target = batch(num_classes)
    expected = multiclass_accuracy(logits, target, num_classes, average="micro")
    assert report(logits, target).compute()["accuracy"].float() == expected


@pytest.mark.parametrize("num_classes", [128, 1000])
def test_the_best_class_may_be_anywhere(num_classes: int) -> None:
    """Also at the ends of chunks, and where all others are impossible."""
    logits = torch.full((num_classes, num_classes), -torch.inf)
    logits.fill_diagonal_(1.0)
    values = report(logits, torch.arange(num_classes)).compute()
    assert values["accuracy"] == 1
    assert values["entropy"] == 0
    assert report(logits, torch.arange(num_classes).roll(1)).compute()["accuracy"] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", SIZES)
@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_entropy(num_classes: int, dtype: torch.dtype, scale: float) -> None:
    """It is that of float64, of flat and of sharp distributions, wherever logits lie."""
    logits = (scale * torch.randn(40, num_classes) + 100).to(dtype)
    entropy = report(logits, torch.zeros(40, dtype=torch.int64)).compute()["entropy"]
    torch.testing.assert_close(entropy, true_entropies(logits).mean(), rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("form", ["log_probs", "probs"])
@pytest.mark.parametrize("num_classes", [2, 1000])
def test_other_scores(form: str, num_classes: int) -> None:
    """Of probabilities and their logarithms, some of them 0, they are the same."""
    logits, target = batch(num_classes)
    logits[logits < logits.amax(1, keepdim=True) - 3] = -torch.inf
    scores = logits.log_softmax(1) if form == "log_probs" else logits.softmax(1)
    values, expected = report(scores, target, input=form).compute(), report(logits, target).compute()
    assert values["accuracy"].float() == multiclass_accuracy(scores, target, num_classes, average="micro")
    torch.testing.assert_close(values["entropy"], expected["entropy"], rtol=1e-6, atol=1e-6)


def test_clipped_probabilities() -> None:
    """The entropy is that of what is scored."""
    probs = torch.tensor([[0.0, 1.0], [0.25, 0.75]])
    entropy = report(probs, torch.tensor([0, 0]), input="probs", eps=0.25).compute()["entropy"]
    torch.testing.assert_close(entropy.item(), torch.special.entr(torch.tensor([0.25, 0.75]).double()).sum().item())


def test_soft_targets_have_an_entropy_but_no_hits() -> None:
    """A distribution is not one class."""
    logits, _ = batch(5)
    soft = torch.rand(40, 5).softmax(1)
    metric = CrossEntropyReport(entropy=True)
    metric.update(logits, soft)
    torch.testing.assert_close(metric.compute()["entropy"], true_entropies(logits).mean(), rtol=2e-7, atol=2e-7)
    with pytest.raises(TypeError, match="`target` must hold integer class indices"):
        CrossEntropyReport(accuracy=True).update(logits, soft)


def test_heads() -> None:
    """Logits that are made where they are scored are looked at there."""
    hidden, weight, target = torch.randn(40, 8), torch.randn(300, 8), torch.randint(0, 300, (40,))
    logits = hidden @ weight.T
    target[::2] = logits.argmax(1)[::2]
    values = report(LinearLogits(hidden, weight), target).compute()
    assert values["accuracy"] == (logits.argmax(1) == target).double().mean()
    torch.testing.assert_close(values["entropy"], true_entropies(logits).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_classes", [5, 300])
def test_any_batching_gives_the_same_bits(num_classes: int) -> None:
    """In any parts, with weights and what is ignored; and the losses have the bits of a report of losses alone."""
    logits, target = batch(num_classes, num_rows=60)
    logits, target = logits.view(20, 3, -1), target.view(20, 3).masked_fill(torch.rand(20, 3) < 0.2, -100)
    weight = torch.rand(20, 3)
    whole, parts, alone = (CrossEntropyReport(accuracy=x, entropy=x) for x in (True, True, False))
    whole.update(logits, target, weight=weight)
    for rows in torch.arange(20).split([1, 2, 17]):
        parts.update(logits[rows], target[rows], weight=weight[rows])
    alone.update(logits, target, weight=weight)
    assert parts.tally.state.equal(whole.tally.state)
    assert whole.tally.state[0].equal(alone.tally.state)


def masked(logits: Tensor) -> Tensor:
    """Return logits of which many are impossible."""
    return logits.masked_fill(logits < logits.amax(1, keepdim=True) - 3, -torch.inf)


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("num_classes", [128, 2000])
def test_entropy_elsewhere(num_classes: int) -> None:
    """Where values may not be read, impossible classes add nothing either."""
    logits, target = batch(num_classes)
    logits = masked(logits)
    entropy = report(logits, target).compute()["entropy"]
    torch.testing.assert_close(entropy, true_entropies(logits).mean(), rtol=2e-7, atol=2e-7)


@needs_compiler
@pytest.mark.parametrize("num_classes", [pytest.param(301, marks=pytest.mark.slow), 2000])
def test_compiled_code_says_the_same(num_classes: int) -> None:
    """Hits are the same ones; entropies agree."""
    logits, target = batch(num_classes)
    logits = masked(logits)
    compiled, eager = (report(logits, target, backend=backend).compute() for backend in ("compile", "eager"))
    assert compiled["accuracy"] == eager["accuracy"]
    torch.testing.assert_close(compiled["entropy"], eager["entropy"], rtol=1e-6, atol=1e-6)


def test_losses_alone_say_nothing_of_predictions() -> None:
    """A loss does not say which class was the most likely one."""
    for name in ("accuracy", "entropy"):
        with pytest.raises(ValueError, match=f"`{name}` must be False with `input='losses'`"):
            CrossEntropyReport(input="losses", **{name: True})  # type: ignore[arg-type]
