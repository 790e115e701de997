"""Scores that look like something else warn once."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.metrics.bad_input import FUNCTIONS, KINDS, Batch, K, each_call, each_kind, raised, with_preds
from xent_metrics import BinaryCrossEntropy, CrossEntropy

# Scores that look like something else.

WARNED = "probabilities as logits, or scores as (log-)probabilities"


def scored(name: str, preds: Tensor) -> Batch:
    """Make a batch of given predictions, each row (or number) of them with a target."""
    shape = preds.shape if KINDS[name].binary else preds.shape[:-1]
    batch = with_preds(name, preds, {"target": torch.zeros(shape, dtype=torch.int64), "num_bytes": 9, "weight": None})
    if not KINDS[name].binary and preds.shape[-1] == K:
        good = "preds_b" if name.endswith("(a)") else "preds_a"
        batch[good] = torch.zeros_like(preds)
    return {**batch, "group": torch.zeros(shape, dtype=torch.int64)}


def looks(form: str, name: str, rows: int = 100) -> Tensor:
    """Make predictions of a form."""
    shape = (rows,) if KINDS[name].binary else (rows, K)
    logits = 3 * torch.randn(shape)
    if form == "probs":
        return logits.sigmoid() if KINDS[name].binary else logits.softmax(-1)
    return {"logits": logits, "shifted": 3 * torch.randn(shape).abs() - 9, "scores": torch.rand(shape)}[form]


def warned(call: Callable[[], Any]) -> list[str]:
    """Return the messages of the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.category is UserWarning for w in caught)
    return [str(w.message) for w in caught]


LOOKS = [
    pytest.param(name, form, given, text, id=f"{name}-{given} as {form}")
    for name, kind in KINDS.items()
    for form, given, text in (
        ("logits", "probs", "look like probabilities .* pass input='probs'"),
        ("probs", "scores", "do not sum to 1, .* pass input='logits'"),
        ("log_probs", "shifted", "exponentials do not sum to 1; pass input='logits'"),
    )
    if form == "logits" or not kind.binary
]


@each_call
@pytest.mark.parametrize(("name", "form", "given", "text"), LOOKS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_scores_that_look_like_something_else_warn_once(name: str, form: str, given: str, text: str, call: str) -> None:
    """Exactly one warning, with the fix, from the first batch; the batch is added, and a reset does not warn again."""
    metric = KINDS[name].make(input=form)
    batch = KINDS[name].chosen(scored(name, looks(given, name)))
    if "preds_a" in batch:  # The other model's scores are what they should be.
        good = "preds_b" if name.endswith("(a)") else "preds_a"
        batch[good] = {"logits": looks("logits", name), "probs": looks("probs", name)}.get(
            form, looks("logits", name).log_softmax(-1)
        )
    (message,) = warned(lambda: getattr(metric, call)(**batch))
    assert re.fullmatch(rf"`preds\w*` .*{text}.*\.", message)
    assert metric.update_count == 1
    assert warned(lambda: (getattr(metric, call)(**batch), metric.reset(), getattr(metric, call)(**batch))) == []


@each_kind
def test_only_the_first_64_rows_of_the_first_batch_are_looked_at(name: str) -> None:
    """What comes after 64 rows, or in a later batch, does not warn, and is not needed to."""
    wrong, right = looks("probs", name), looks("logits", name)
    for first, expected in ((torch.cat([wrong[:64], right]), 1), (torch.cat([right[:64], wrong, wrong]), 0)):
        metric = KINDS[name].make()
        assert len(warned(lambda m=metric, b=first: m.update(**KINDS[name].chosen(scored(name, b))))) == expected
        assert warned(lambda m=metric: m.update(**KINDS[name].chosen(scored(name, wrong)))) == []


@each_kind
def test_exactly_64_rows_decide(name: str) -> None:
    """One row more or fewer would decide otherwise: of rows the most do, of binary predictions all."""
    wrong, right = looks("probs", name), looks("logits", name)
    right = right + 9.0 if KINDS[name].binary else right
    orders = [([wrong[:64], right], 1), ([wrong[:63], right[:1], wrong], 0)]
    if not KINDS[name].binary:
        orders = [([right[:31], wrong[:33], right], 1), ([right[:32], wrong[:32], wrong], 0)]
    for rows, expected in orders:
        batch = KINDS[name].chosen(scored(name, torch.cat(rows)))
        assert len(warned(lambda b=batch: KINDS[name].make().update(**b))) == expected


@pytest.mark.parametrize("class_dim", [0, 1, 2, 3])
def test_rows_are_found_on_any_dimension(class_dim: int) -> None:
    """The first 64 rows are those of the first targets, wherever the classes are."""
    target = torch.zeros(3, 7, 5, dtype=torch.int64)
    for order, expected in (("probs", "logits"), 1), (("logits", "probs"), 0):
        rows = torch.cat([looks(order[0], "CrossEntropy", 64), looks(order[1], "CrossEntropy", 41)])
        preds = rows.view(3, 7, 5, K).movedim(-1, class_dim)
        assert len(warned(lambda p=preds: CrossEntropy(class_dim=class_dim).update(p, target))) == expected


@pytest.mark.parametrize(
    ("form", "preds"),
    [
        ("logits", torch.zeros(100, K)),
        ("logits", torch.rand(100, 50)),
        ("logits", torch.ones(100, K)),
        ("logits", torch.ones(100, 1)),
        ("logits", torch.full((100, K), 0.5)),
        ("logits", torch.full((100, K), math.nan)),
        ("logits", torch.full((100, K), -math.inf)),
        ("probs", torch.randn(100, 50_000).softmax(-1).half()),
        ("probs", torch.randn(100, 50_000).softmax(-1).bfloat16()),
        ("probs", torch.eye(K)),
        ("probs", torch.cat([torch.zeros(30, K), torch.eye(K).repeat(10, 1)])),
        ("probs", torch.cat([torch.eye(K).repeat(10, 1), torch.zeros(30, K)])),
        ("log_probs", torch.randn(100, 50_000).log_softmax(-1).half()),
        ("log_probs", torch.randn(100, 50_000).log_softmax(-1).bfloat16()),
        ("log_probs", torch.cat([torch.zeros(30, K), torch.randn(40, K).log_softmax(-1)])),
        ("logits", torch.cat([torch.full((30, K), 1 / K), torch.randn(40, K)])),
    ],
)
def test_no_warning_without_cause(form: str, preds: Tensor) -> None:
    """Ordinary, untrained, masked and half-precision scores, and padding rows, warn of nothing."""
    target = torch.zeros(len(preds), dtype=torch.int64)
    assert warned(lambda: CrossEntropy(input=form).update(preds, target)) == []


@pytest.mark.parametrize("preds", [torch.randn(100), torch.zeros(100), torch.full((100,), 0.3), torch.rand(10)])
@pytest.mark.parametrize("form", ["logits", "probs"])
def test_no_warning_of_binary_scores_without_cause(form: str, preds: Tensor) -> None:
    """Logits around 0, and too few of them to tell, warn of nothing; probabilities given as such neither."""
    preds = preds.sigmoid() if form == "probs" else preds
    metric = BinaryCrossEntropy(input=form)
    assert warned(lambda: metric.update(preds, torch.zeros(len(preds)))) == []


@pytest.mark.usefixtures("hidden_values")
@each_kind
def test_no_warning_where_a_look_is_not_free(name: str) -> None:
    """On an accelerator nothing is looked at."""
    assert warned(lambda: KINDS[name].make().update(**KINDS[name].chosen(scored(name, looks("probs", name))))) == []


@each_kind
def test_a_refused_batch_is_not_the_first(name: str) -> None:
    """A batch that raised was not looked at, so that the first good one still warns; functions never warn."""
    metric = KINDS[name].make()
    batch = KINDS[name].chosen(scored(name, looks("probs", name)))
    assert warned(lambda: raised(TypeError, lambda: metric.update(**{**batch, "target": [0]}))) == []
    assert len(warned(lambda: metric.update(**batch))) == 1
    if name in FUNCTIONS:
        assert warned(lambda: KINDS[name].call(scored(name, looks("probs", name)))) == []
