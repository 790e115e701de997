"""What an error about a target advises is what helps."""

from __future__ import annotations

import math
from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from tests.metrics.bad_input import raised
from xent_metrics import BinaryCrossEntropy, CrossEntropy, LinearLogits, functional

K = 5
ADVICE: list[tuple[Any, Any, dict[str, Any], str]] = [
    (CrossEntropy, [0, -100], {"ignore_index": 0}, "pass weight=target != -100 as well if it marks"),
    (CrossEntropy, [1, -1], {}, "pass ignore_index=-1 if it marks"),
    (CrossEntropy, [1, -100], {"ignore_index": None}, "pass ignore_index=-100 if it marks"),
    (
        CrossEntropy,
        [1, 255],
        {},
        "pass ignore_index=255 if it marks targets to leave out, or check the vocabulary size",
    ),
    (CrossEntropy, [1, 255], {"ignore_index": 0}, "pass weight=target != 255 as well if it marks"),
    (CrossEntropy, [1, 250], {}, "pass ignore_index=250 if it marks"),
    (CrossEntropy, [1, 7], {}, "check the vocabulary size"),
    (BinaryCrossEntropy, [1, 255], {}, "pass ignore_index=255 if it marks"),
    (BinaryCrossEntropy, [1.0, math.nan], {}, "mask them with weight=~target.isnan()"),
    (BinaryCrossEntropy, [1, 2], {}, "more than two classes go to CrossEntropy"),
]


@pytest.mark.parametrize(("metric", "target", "options", "advice"), ADVICE)
def test_advice(metric: Any, target: list[float], options: dict[str, Any], advice: str) -> None:
    """Marks of what is left out are known, and a mark that was chosen is not replaced by another one."""
    preds = torch.zeros(2, K) if metric is CrossEntropy else torch.zeros(2)
    message = raised(ValueError, lambda: metric(**options).update(preds, torch.tensor(target)))
    assert advice in message


def zeros(*shape: int) -> Tensor:
    """Make class indices."""
    return torch.zeros(shape, dtype=torch.int64)


TO_BINARY = "; one column of scores with yes-or-no targets goes to BinaryCrossEntropy."
OF_ONE_COLUMN = [
    torch.tensor([0, 1]),
    torch.tensor([[0], [1]]),
    torch.tensor([False, True]),
    torch.tensor([0.0, 1.0]),
    torch.tensor([[0.0], [1.0]]),
]


@pytest.mark.parametrize("target", OF_ONE_COLUMN, ids=lambda x: f"{x.dtype} {tuple(x.shape)}")
def test_one_column_of_scores_is_binary(target: Tensor) -> None:
    """Whatever the type and the shape of yes and no: they are no classes or distributions of a vocabulary of 1."""
    for preds, options in ((torch.zeros(2, 1), {}), (torch.zeros(1, 2), {"class_dim": 0})):
        labels = target.T if target.dim() == 2 and options else target
        message = raised((TypeError, ValueError), lambda p=preds, y=labels, o=options: CrossEntropy(**o).update(p, y))
        assert message.endswith(TO_BINARY)
    assert functional.binary_cross_entropy(torch.zeros(2), target.view(-1)).item() == pytest.approx(math.log(2))


A_DIMENSION_OF_ONE: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = [
    ((3, K), (3, 1), {}, "target.squeeze(-1)"),
    ((2, 4, 3, K), (2, 4, 3, 1), {}, "target.squeeze(-1)"),
    ((2, K, 4, 3), (2, 1, 4, 3), {"class_dim": 1}, "target.squeeze(1)"),
    ((2, K, 4, 3), (2, 1, 4, 3), {}, "target.squeeze(1), and class_dim=1"),
    ((3, 1, K), (3,), {}, "target.unsqueeze(-1)"),
    ((3,), (3, 1), {"input": "losses"}, "target.squeeze(-1)"),
]


@pytest.mark.parametrize(("preds", "target", "options", "advice"), A_DIMENSION_OF_ONE)
def test_a_dimension_of_one(preds: Any, target: Any, options: dict[str, Any], advice: str) -> None:
    """The error says how to take it away, or to put it there; what it says is then accepted."""
    scores, labels = torch.rand(preds), zeros(*target)
    message = raised(ValueError, lambda: CrossEntropy(**options).update(scores, labels))
    assert message.endswith(f"; pass {advice}.")
    change, _, class_dim = advice.removeprefix("target").partition(", and class_dim=")
    options = {**options, "class_dim": int(class_dim)} if class_dim else options
    name, _, dim = change.strip(".)").partition("(")
    CrossEntropy(**options).update(scores, getattr(labels, name)(int(dim)))


def test_a_dimension_of_one_of_other_tensors() -> None:
    """Binary targets, weights and groups are told the same."""
    preds, labels = torch.zeros(3), torch.zeros(3, 1)
    message = raised(ValueError, lambda: BinaryCrossEntropy().update(preds, labels))
    assert message.endswith("; pass target.squeeze(-1).")
    message = raised(ValueError, lambda: BinaryCrossEntropy().update(labels, preds))
    assert message.endswith("; pass target.unsqueeze(-1).")
    message = raised(ValueError, lambda: BinaryCrossEntropy().update(torch.zeros(3, 2), preds))
    assert message.endswith("two columns of scores go to CrossEntropy.")
    message = raised(ValueError, lambda: CrossEntropy().update(torch.zeros(3, K), zeros(3), weight=labels))
    assert message.endswith("; pass weight.squeeze(-1).")
    grouped = functional.grouped_cross_entropy
    message = raised(ValueError, lambda: grouped(torch.zeros(3, K), zeros(3), group=zeros(3, 1), num_groups=2))
    assert message.endswith("; pass group.squeeze(-1).")


class ModelOutput(OrderedDict[str, Any]):
    """What models of transformers return: a dict whose values are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """Return a value."""
        if name in self:
            return self[name]
        raise AttributeError(name)


class LossAndLogits(NamedTuple):
    """What some models return."""

    loss: Tensor
    logits: Tensor


SCORES = torch.zeros(3, K)
NO_TENSORS: list[tuple[Any, str]] = [
    (ModelOutput(loss=SCORES.sum(), logits=SCORES), "pass its .logits"),
    (LossAndLogits(SCORES.sum(), SCORES), "pass its .logits"),
    ({"loss": SCORES.sum(), "scores": SCORES}, "pass one of its values, which are ['loss', 'scores']"),
    (UserDict(input_ids=SCORES), "pass one of its values, which are ['input_ids']"),
    ((SCORES.sum(), SCORES), "pass one of its tensors, or torch.cat of them"),
    ([SCORES], "pass one of its tensors, or torch.cat of them"),
    (pack_sequence([SCORES]), "pass its .data"),
    (SCORES.tolist(), "convert it with torch.as_tensor"),
    (np.zeros((3, K)), "convert it with torch.as_tensor"),
    (None, "convert it with torch.as_tensor"),
]


@pytest.mark.parametrize(("value", "advice"), NO_TENSORS, ids=lambda x: type(x).__name__)
def test_what_holds_a_tensor(value: Any, advice: str) -> None:
    """The error names the part to pass, of predictions as of targets."""
    for preds, target in ((value, zeros(3)), (SCORES, value)):
        message = raised(TypeError, lambda p=preds, y=target: CrossEntropy().update(p, y))
        assert message.endswith(f"got {type(value).__name__}; {advice}.")


def test_what_holds_a_part_of_a_head() -> None:
    """A model without its head returns `last_hidden_state`, and a head is a module with a weight."""
    head, hidden = torch.nn.Linear(3, K), torch.zeros(3, 3)
    for parts, advice in (
        ((ModelOutput(last_hidden_state=hidden), head.weight), "pass its .last_hidden_state."),
        ((hidden, head), "pass its .weight."),
        ((hidden, head.weight, head), "pass its .bias."),
        ((hidden, [head.weight]), "pass one of its tensors, or torch.cat of them."),
        ((hidden, None), "convert it with torch.as_tensor."),
    ):
        message = raised(TypeError, lambda p=parts: CrossEntropy().update(LinearLogits(*p), zeros(3)))
        assert message.endswith(advice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_soft_targets_that_are_no_probabilities(dtype: torch.dtype) -> None:
    """Their logarithms and scores are told apart; only what has no negative entries can be divided by its sum."""
    scores = 2 * torch.randn(3, 40).double()
    probs = scores.softmax(-1)
    for target, advice in (
        (probs.log(), "pass their exp(), as these are log-probabilities."),
        (torch.cat([-torch.ones(3, 39), torch.zeros(3, 1)], -1).log_softmax(-1), "pass their exp(), as these are"),
        (scores, "pass their softmax if they are scores."),
        (scores - 20, "pass their softmax if they are scores."),
        (2 * probs, "divide them by their sum, or mask them with `weight`."),
        (0 * probs, "divide them by their sum, or mask them with `weight`."),
        (probs * math.nan, "divide them by their sum, or mask them with `weight`."),
    ):
        message = raised(ValueError, lambda y=target: CrossEntropy().update(torch.zeros(3, 40), y.to(dtype)))
        assert advice in message
