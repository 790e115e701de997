"""What happens to bad input: every row of the README's table, for every class and function, and nothing remembered.

Tests that claim a row of the table say so with `row`; a row that nothing claims fails, and so does a claim to no row.
"""

from __future__ import annotations

import inspect
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.cpu_vec_isa import pick_vec_isa

import xent_metrics
from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    LinearLogits,
    NormalizedCrossEntropy,
    Perplexity,
    functional,
)

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.split("## What happens to bad input")[1].split("\n## ")[0]
ROWS = [line.removeprefix("| ").split(" | ")[0] for line in SECTION.splitlines() if line.startswith("| ")][1:]

K = 4
SPOT = (0, 1)  # Of the six targets, the one that is made bad; its class is 1.
Batch = dict[str, Any]


class Kind(NamedTuple):
    """A metric class, its function, the options that both need, and what is special about its batches."""

    metric: Any
    function: Callable[..., Any] | None
    options: Mapping[str, Any] = MappingProxyType({})
    arguments: tuple[str, ...] = ("preds", "target", "weight")
    binary: bool = False
    soft: bool = True
    inputs: tuple[str, ...] = ("logits", "log_probs", "probs", "losses")

    def make(self, **options: Any) -> Any:
        """Make a metric."""
        return self.metric(**{**self.options, **options})

    def call(self, batch: Batch, **options: Any) -> Any:
        """Call the function."""
        assert self.function is not None
        return self.function(**self.chosen(batch), **{**self.options, **options})

    def chosen(self, batch: Batch) -> Batch:
        """Choose the arguments of an update."""
        return {name: batch[name] for name in self.arguments}


TABLE = torch.tensor([2, 1, 3, 1])
PAIR = ("preds_a", "preds_b", "target", "weight")
SCORES = ("logits", "log_probs", "probs")
KINDS = {
    "CrossEntropy": Kind(CrossEntropy, functional.cross_entropy),
    "BitsPerToken": Kind(BitsPerToken, functional.bits_per_token),
    "Perplexity": Kind(Perplexity, functional.perplexity),
    "CrossEntropyReport": Kind(CrossEntropyReport, None),
    "CrossEntropyReport(token_bytes)": Kind(CrossEntropyReport, None, {"token_bytes": TABLE}, soft=False),
    "BitsPerByte": Kind(BitsPerByte, functional.bits_per_byte, {}, ("preds", "target", "num_bytes", "weight")),
    "BitsPerByte(token_bytes)": Kind(BitsPerByte, functional.bits_per_byte, {"token_bytes": TABLE}, soft=False),
    "BinaryCrossEntropy": Kind(
        BinaryCrossEntropy, functional.binary_cross_entropy, binary=True, soft=False, inputs=("logits", "probs")
    ),
    "CrossEntropyDecomposition": Kind(CrossEntropyDecomposition, functional.cross_entropy_decomposition, inputs=SCORES),
    "GroupedCrossEntropy": Kind(
        GroupedCrossEntropy,
        functional.grouped_cross_entropy,
        {"num_groups": 3},
        ("preds", "target", "group", "weight"),
    ),
    "NormalizedCrossEntropy": Kind(
        NormalizedCrossEntropy, functional.normalized_cross_entropy, {"num_classes": K}, soft=False
    ),
    "CrossEntropyDifference(a)": Kind(CrossEntropyDifference, functional.cross_entropy_difference, {}, PAIR),
    "CrossEntropyDifference(b)": Kind(CrossEntropyDifference, functional.cross_entropy_difference, {}, PAIR),
}
OF_CLASSES = [name for name, kind in KINDS.items() if not kind.binary]
SOFT = [name for name, kind in KINDS.items() if kind.soft]
FUNCTIONS = [name for name, kind in KINDS.items() if kind.function is not None]

CLAIMED: dict[str, list[str]] = {}
each_kind = pytest.mark.parametrize("name", KINDS)
each_call = pytest.mark.parametrize("call", ["update", "forward"])


def row(*cells: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Claim rows of the README's table, by their first cell."""

    def claim(test: Callable[..., None]) -> Callable[..., None]:
        for cell in cells:
            CLAIMED.setdefault(cell, []).append(test.__name__)
        return test

    return claim


@pytest.fixture(name="deferred")
def _deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bad values on the CPU be counted, as they are on an accelerator."""
    for module in ("checks",):
        monkeypatch.setattr(f"xent_metrics.{module}.free_to_look", lambda _: False)


def make_batch(name: str, form: str = "logits", soft: bool = False) -> Batch:
    """Make a good batch of 2 by 3 targets, with everything that any metric takes."""
    shape = (2, 3) if KINDS[name].binary or form == "losses" else (2, 3, K)
    fill = {"probs": 1 / K, "log_probs": -math.log(K)}
    generator = torch.Generator().manual_seed(7)
    preds = torch.full(shape, fill[form]) if form in fill else 4 * torch.rand(shape, generator=generator)
    target = torch.tensor([[0, 1, 0], [1, 0, 1]])
    target = F.one_hot(target, K).float() if soft else target
    group = torch.tensor([[0, 1, 2], [0, 1, 1]])
    return with_preds(name, preds, {"target": target, "group": group, "num_bytes": 9, "weight": None})


def with_preds(name: str, preds: Any, batch: Batch) -> Batch:
    """Give a batch predictions; of two models, the other one's are the same, as a tensor of their own."""
    other = preds.clone() if isinstance(preds, Tensor) else preds
    bad, good = ("preds_a", "preds_b") if name.endswith("(a)") else ("preds_b", "preds_a")
    return {**batch, "preds": preds, bad: preds, good: other}


def ones() -> Tensor:
    """Weights that change nothing."""
    return torch.ones(2, 3)


def numbers(value: Any) -> list[float]:
    """List every floating-point number of a value."""
    values = value.values() if isinstance(value, dict) else [value]
    return [x for tensor in values if tensor.is_floating_point() for x in tensor.reshape(-1).tolist()]


def main(value: Any) -> list[float]:
    """List the first number of a dict, or every number of a tensor."""
    return numbers(value)[:1] if isinstance(value, dict) else numbers(value)


def bits(value: Any) -> list[str]:
    """List every bit of every floating-point number of a value."""
    return [x.hex() for x in numbers(value)]


def raised(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any]) -> str:
    """Return the message of an error, which must be one sentence about an argument, raised by the library itself."""
    with pytest.raises(error) as caught:
        call()
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert Path(last.filename).parent == Path(xent_metrics.__file__).parent
    assert (last.line or "").startswith("raise")
    message = str(caught.value)
    assert re.match(r"`\w+(='\w+')?`", message), message
    assert re.search(r"\b(must|allows|goes with|clips|over the other classes)\b", message), message
    assert re.search(r"\b(got|but|not)\b|with `input='losses'`", message), message
    assert re.fullmatch(r"(?:[^.]|\.(?!\s)|\.(?=\.\.))*\.", message, re.DOTALL), f"not one sentence: {message}"
    return message


def assert_no_trace(name: str, call: str, batch: Batch, options: Mapping[str, Any], good: Batch, error: Any) -> str:
    """Refuse a batch before and after a good one: state, count and value stay, and so does whatever comes later."""
    message = ""
    for fresh in (True, False):
        metric, expected = KINDS[name].make(**options), KINDS[name].make(**options)
        for each in (metric, expected):
            if not fresh:
                each.update(**KINDS[name].chosen(good))
        before = None if fresh else bits(metric.compute())
        state, count = metric.tally.state.clone(), metric.update_count
        message = raised(error, lambda metric=metric: getattr(metric, call)(**KINDS[name].chosen(batch)))
        assert torch.equal(metric.tally.state, state)
        assert metric.update_count == count
        assert fresh or bits(metric.compute()) == before
        assert bits(metric(**KINDS[name].chosen(good))) == bits(expected(**KINDS[name].chosen(good)))
        assert torch.equal(metric.tally.state, expected.tally.state)
        assert metric.update_count == expected.update_count == count + 1
        assert bits(metric.compute()) == bits(expected.compute())
    return message


# Values: at once on the CPU, counted elsewhere.

A_TARGET = "a target that is neither a class nor `ignore_index` (K, -1, 2**40; -100 with `ignore_index=None`)"
A_WEIGHT = "a negative, infinite or NaN weight"
A_PROBABILITY = 'a probability outside [0, 1] with `input="probs"`'
A_SOFT_TARGET = "soft targets that are negative or do not sum to 1 (to 1e-3; in half precision to 1e-2)"
A_BINARY_TARGET = "binary targets outside [0, 1]"
A_GROUP = "a group outside `[0, num_groups)` for a target that is scored"


class Case(NamedTuple):
    """One bad value: the kinds that take it, the options and form of the batch, where it goes, and what is said."""

    names: list[str]
    argument: str
    value: Any
    text: str
    options: Mapping[str, Any] = MappingProxyType({})
    soft: bool = False

    def good(self, name: str) -> Batch:
        """Make the batch before the value is put into it."""
        batch = make_batch(name, self.options.get("input", "logits"), self.soft)
        if self.argument == "target" and KINDS[name].binary:
            batch["target"] = batch["target"].to(torch.float64 if isinstance(self.value, float) else torch.int64)
        return batch

    def bad(self, name: str) -> Batch:
        """Make the batch with the value in it."""
        batch = self.good(name)
        if self.argument == "weight":
            batch["weight"] = ones()
        key = self.argument
        if key == "preds" and "preds_a" in KINDS[name].arguments:
            key = "preds_a" if name.endswith("(a)") else "preds_b"
        spot = (*SPOT, 2) if self.argument == "preds" and not KINDS[name].binary else SPOT
        batch[key][spot] = self.value
        return batch


CASES = [
    *(
        Case(OF_CLASSES, "target", bad, rf"\[0, {K}\) or ignore_index={index}, got 1 .* such as {bad}; {fix}", options)
        for bad, index, fix, options in (
            (K, -100, "check the vocabulary size", {}),
            (2**40, -100, "check the vocabulary size", {}),
            (-1, -100, "pass ignore_index=-1 if it marks", {}),
            (-100, None, "pass ignore_index=-100 if it marks", {"ignore_index": None}),
        )
    ),
    *(
        Case(list(KINDS), "weight", bad, f"got 1 that are not, such as {bad}; use 0 or False")
        for bad in (-1.0, -math.inf, math.inf, math.nan, 2.0**47)
    ),
    *(
        Case(list(KINDS), "preds", bad, "got 1 targets for which they are not; pass input='logits'", {"input": "probs"})
        for bad in (1.5, -0.25, math.inf, -math.inf)
    ),
    *(
        Case(SOFT, "target", torch.tensor(bad), "with a sum of 1, got 1 that do not, .*; divide them", soft=True)
        for bad in ([0.5, 0.4, 0.0, 0.0], [-0.5, 1.5, 0.0, 0.0], [math.nan, 1.0, 0.0, 0.0], [0.0] * 4, [1.0] * 4)
    ),
    *(
        Case(["BinaryCrossEntropy"], "target", bad, f"got 1 that are neither, such as {bad}; {fix}")
        for bad, fix in (
            (-1, "pass ignore_index=-1 if it marks"),
            (-1.0, "pass ignore_index=-1 if it marks"),
            *((bad, "more than two classes") for bad in (2, 2**40, 1.5, -0.5, math.nan, math.inf, -math.inf)),
        )
    ),
    *(
        Case(["GroupedCrossEntropy"], "group", bad, rf"\[0, 3\), got 1 .* such as {bad}; raise `num_groups`, or mask")
        for bad in (3, -1, 2**40)
    ),
]
VALUES = [pytest.param(case, name, id=f"{name}-{case.argument}={case.value}") for case in CASES for name in case.names]
ALL_VALUES = (A_TARGET, A_WEIGHT, A_PROBABILITY, A_SOFT_TARGET, A_BINARY_TARGET, A_GROUP)


@row(*ALL_VALUES)
@each_call
@pytest.mark.parametrize(("case", "name"), VALUES)
def test_a_bad_value_raises_at_once(case: Case, name: str, call: str) -> None:
    """On the CPU one bad value is refused with the count, an example and the fix, and leaves no trace."""
    message = assert_no_trace(name, call, case.bad(name), case.options, case.good(name), ValueError)
    assert re.search(rf"^`{case.argument}(_[ab])?` must hold\b.*{case.text}", message), message


@row(*ALL_VALUES)
@pytest.mark.parametrize(("case", "name"), [param for param in VALUES if param.values[1] in FUNCTIONS])
def test_a_bad_value_raises_in_functions(case: Case, name: str) -> None:
    """The functions say the same."""
    message = raised(ValueError, lambda: KINDS[name].call(case.bad(name), **case.options))
    assert re.search(rf"^`{case.argument}(_[ab])?` must hold\b.*{case.text}", message), message


@row(*ALL_VALUES)
@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize(("case", "name"), VALUES)
def test_a_bad_value_is_counted_elsewhere(case: Case, name: str) -> None:
    """On an accelerator the batch reads NaN, and `compute` raises with the count, again and again until a reset."""
    bad, good = (KINDS[name].chosen(batch) for batch in (case.bad(name), case.good(name)))
    metric, expected = KINDS[name].make(**case.options), KINDS[name].make(**case.options)
    for call in (metric, metric, lambda **batch: KINDS[name].call(batch, **case.options)):
        if call is metric or name in FUNCTIONS:
            assert all(map(math.isnan, numbers(call(**bad))))
    assert not any(map(math.isnan, main(metric(**good))))
    for _ in range(2):
        assert re.search(rf"^`{case.argument}`.* must hold .*\b2\b.*reset\(\)", raised(ValueError, metric.compute))
    metric.update(**good)
    raised(ValueError, metric.compute)
    metric.reset()
    for each in (metric, expected):
        each.update(**good)
    assert bits(metric.compute()) == bits(expected.compute())


@row(*(cell for cell in ALL_VALUES if cell != A_WEIGHT))
@pytest.mark.parametrize("weight", [torch.bool, torch.float32])
@pytest.mark.parametrize(("case", "name"), [param for param in VALUES if param.values[0].argument != "weight"])
def test_a_bad_value_that_is_masked_is_not_looked_at(
    case: Case, name: str, weight: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Where a target is not scored, neither it nor its predictions nor its group matter, on any device."""
    mask = ones().to(weight)
    mask[SPOT] = 0
    for deferred in (False, True):
        if deferred:
            request.getfixturevalue("deferred")
        metric, expected = KINDS[name].make(**case.options), KINDS[name].make(**case.options)
        value = metric(**KINDS[name].chosen({**case.bad(name), "weight": mask}))
        assert bits(value) == bits(expected(**KINDS[name].chosen({**case.good(name), "weight": mask})))
        assert bits(metric.compute()) == bits(expected.compute())
        assert not any(map(math.isnan, main(value)))


@row(A_WEIGHT)
@each_kind
def test_a_bad_weight_of_an_ignored_target_is_not_looked_at(name: str) -> None:
    """`ignore_index` decides before the weight does."""
    batch = make_batch(name)
    batch["target"][SPOT] = -100
    clean = KINDS[name].make(ignore_index=-100)(**KINDS[name].chosen({**batch, "weight": ones()}))
    for bad in (-1.0, math.nan, math.inf):
        weight = ones()
        weight[SPOT] = bad
        metric = KINDS[name].make(ignore_index=-100)
        assert bits(metric(**KINDS[name].chosen({**batch, "weight": weight}))) == bits(clean)


@row(A_WEIGHT)
@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_a_bad_weight_of_a_class_without_weight_is_counted(smoothing: float) -> None:
    """A negative weight is one even where the class weight is 0, so that their product is no negative number."""
    metric = CrossEntropy(class_weight=torch.tensor([1.0, 0.0, 1.0, 1.0]), label_smoothing=smoothing)
    batch = make_batch("CrossEntropy")
    weight = ones()
    weight[SPOT] = -1.0
    assert metric(batch["preds"], batch["target"], weight).isnan()
    assert "`weight`" in raised(ValueError, metric.compute)


@row(A_PROBABILITY)
@pytest.mark.parametrize("bad", [2.0, -1.0])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_nan_beside_it_does_not_hide_a_bad_probability(name: str, bad: float) -> None:
    """Each probability is looked at for itself."""
    batch = make_batch(name, "probs")
    key = "preds" if "preds" in KINDS[name].arguments else f"preds_{name[-2]}"
    batch[key][SPOT] = torch.tensor([math.nan, bad, 0.5, 0.5])
    metric = KINDS[name].make(input="probs")
    message = raised(ValueError, lambda: metric.update(**KINDS[name].chosen(batch)))
    assert message.startswith(f"`{key}` must hold probabilities")


@row(A_SOFT_TARGET)
@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [
        (torch.float64, 9e-4, 1.2e-3),
        (torch.float32, 9e-4, 1.2e-3),
        (torch.float16, 7e-3, 1.3e-2),
        (torch.bfloat16, 7e-3, 2e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("preds_dtype", [torch.float16, torch.float64], ids=str)
def test_how_far_from_1_a_soft_target_may_sum(
    preds_dtype: torch.dtype, sign: int, dtype: torch.dtype, within: float, beyond: float
) -> None:
    """The dtype of the targets decides, not that of the predictions."""
    preds = torch.zeros(1, 2, dtype=preds_dtype)
    value = functional.cross_entropy(preds, torch.tensor([[0.5, 0.5 + sign * within]], dtype=dtype))
    assert value.item() == pytest.approx(math.log(2), rel=1e-2)
    with pytest.raises(ValueError, match="`target` must hold, as soft targets, probabilities"):
        functional.cross_entropy(preds, torch.tensor([[0.5, 0.5 + sign * beyond]], dtype=dtype))


@row(A_BINARY_TARGET)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_binary_targets_of_any_integer_type(dtype: torch.dtype) -> None:
    """0 and 1 are 0 and 1 in every dtype, 2 is out of range, and no `ignore_index` wraps to one of them."""
    preds, target = torch.tensor([1.0, -1.0]), torch.tensor([1, 0])
    expected = functional.binary_cross_entropy(preds, target).item()
    for ignore_index in (None, -100, 257, 2**32 + 1, 300):
        assert functional.binary_cross_entropy(preds, target.to(dtype), ignore_index=ignore_index).item() == expected
    with pytest.raises(ValueError, match="got 1 that are neither, such as 2;"):
        functional.binary_cross_entropy(preds, torch.tensor([1, 2]).to(dtype))


@row(A_BINARY_TARGET)
@pytest.mark.parametrize(
    ("target", "dtype", "ignore_index"),
    [(156, torch.uint8, -100), (1, torch.uint8, 257), (-100, torch.int8, 156), (2048.0, torch.float16, 2049)],
)
def test_a_binary_target_is_not_ignored_for_what_it_would_wrap_to(
    target: float, dtype: torch.dtype, ignore_index: int
) -> None:
    """A target that is not `ignore_index` as a number is scored, or refused."""
    args = torch.zeros(1), torch.tensor([target], dtype=dtype)
    if 0 <= target <= 1:
        assert functional.binary_cross_entropy(*args, ignore_index=ignore_index).item() == pytest.approx(math.log(2))
    else:
        with pytest.raises(ValueError, match="got 1 that are neither"):
            functional.binary_cross_entropy(*args, ignore_index=ignore_index)


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


@row(WARNED)
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


@row(WARNED)
@each_kind
def test_only_the_first_64_rows_of_the_first_batch_are_looked_at(name: str) -> None:
    """What comes after 64 rows, or in a later batch, does not warn, and is not needed to."""
    wrong, right = looks("probs", name), looks("logits", name)
    for first, expected in ((torch.cat([wrong[:64], right]), 1), (torch.cat([right[:64], wrong, wrong]), 0)):
        metric = KINDS[name].make()
        assert len(warned(lambda m=metric, b=first: m.update(**KINDS[name].chosen(scored(name, b))))) == expected
        assert warned(lambda m=metric: m.update(**KINDS[name].chosen(scored(name, wrong)))) == []


@row(WARNED)
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


@row(WARNED)
@pytest.mark.parametrize("class_dim", [0, 1, 2, 3])
def test_rows_are_found_on_any_dimension(class_dim: int) -> None:
    """The first 64 rows are those of the first targets, wherever the classes are."""
    target = torch.zeros(3, 7, 5, dtype=torch.int64)
    for order, expected in (("probs", "logits"), 1), (("logits", "probs"), 0):
        rows = torch.cat([looks(order[0], "CrossEntropy", 64), looks(order[1], "CrossEntropy", 41)])
        preds = rows.view(3, 7, 5, K).movedim(-1, class_dim)
        assert len(warned(lambda p=preds: CrossEntropy(class_dim=class_dim).update(p, target))) == expected


@row(WARNED)
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


@row(WARNED)
@pytest.mark.parametrize("preds", [torch.randn(100), torch.zeros(100), torch.full((100,), 0.3), torch.rand(10)])
@pytest.mark.parametrize("form", ["logits", "probs"])
def test_no_warning_of_binary_scores_without_cause(form: str, preds: Tensor) -> None:
    """Logits around 0, and too few of them to tell, warn of nothing; probabilities given as such neither."""
    preds = preds.sigmoid() if form == "probs" else preds
    metric = BinaryCrossEntropy(input=form)
    assert warned(lambda: metric.update(preds, torch.zeros(len(preds)))) == []


@row(WARNED)
@pytest.mark.usefixtures("deferred")
@each_kind
def test_no_warning_where_a_look_is_not_free(name: str) -> None:
    """On an accelerator nothing is looked at."""
    assert warned(lambda: KINDS[name].make().update(**KINDS[name].chosen(scored(name, looks("probs", name))))) == []


@row(WARNED)
@each_kind
def test_a_refused_batch_is_not_the_first(name: str) -> None:
    """A batch that raised was not looked at, so that the first good one still warns; functions never warn."""
    metric = KINDS[name].make()
    batch = KINDS[name].chosen(scored(name, looks("probs", name)))
    assert warned(lambda: raised(TypeError, lambda: metric.update(**{**batch, "target": [0]}))) == []
    assert len(warned(lambda: metric.update(**batch))) == 1
    if name in FUNCTIONS:
        assert warned(lambda: KINDS[name].call(scored(name, looks("probs", name)))) == []


# Shapes.

A_SHAPE = "a target one longer than `preds` in time, classes on another dimension, one-hot integers, ..."
SHAPES = [
    ((2, 7, K), (2, 8), "one apart in time: to score each position's next target pass target[:, 1:], or"),
    ((2, 7, K), (2, 6), "one apart in time: to score each position's next target pass preds[:, :-1], or"),
    ((2, K, 3), (2, 3), "class_dim=1"),
    ((K, 2, 3), (2, 3), "class_dim=0"),
    ((2, 3, K), (2, 3, K), "one-hot targets: pass their argmax"),
    ((2, 3, K), (6,), "give every row of classes"),
    ((2, 3, K), (), "give every row of classes"),
    ((6, K), (2, 3), "give every row of classes"),
]


@row(A_SHAPE)
@each_call
@pytest.mark.parametrize(("preds", "target", "fix"), SHAPES)
@pytest.mark.parametrize("name", OF_CLASSES)
def test_shapes_that_do_not_fit(
    name: str, preds: tuple[int, ...], target: tuple[int, ...], fix: str, call: str
) -> None:
    """Both shapes, and what would fit."""
    if name.startswith("Normalized") and preds[-1] != K:
        pytest.skip("The number of classes is wrong too.")
    good = make_batch(name)
    batch = with_preds(name, torch.zeros(preds), {**good, "target": torch.zeros(target, dtype=torch.int64)})
    message = assert_no_trace(name, call, batch, {}, good, ValueError)
    assert message.startswith("`target` must have")
    assert f"{preds}" in message
    assert f"got {target}" in message
    assert fix in message


@row(A_SHAPE)
@each_call
@each_kind
def test_other_shapes_that_do_not_fit(name: str, call: str) -> None:
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
        message = assert_no_trace(name, call, batch, options, fine, ValueError)
        assert re.match(rf"{argument} (must|.* and must)", message), message
        assert all(re.search(part, message) for part in parts), message


@row(
    "unshifted logits and labels without `shift=True`, aligned ones with it, weights or groups of shape (N,) with N = T"
)
def test_what_no_shape_can_tell() -> None:
    """Labels are scored where `shift` says, and a vector is one of positions, as broadcasting has it."""
    preds, target, weight = 3 * torch.randn(4, 4, K), torch.randint(K, (4, 4)), torch.rand(4)
    aligned, shifted = (functional.cross_entropy(preds, target, shift=shift).item() for shift in (False, True))
    assert aligned != shifted == functional.cross_entropy(preds[:, :-1], target[:, 1:]).item()
    by_position, by_sequence = (functional.cross_entropy(preds, target, w).item() for w in (weight, weight[:, None]))
    assert by_position != by_sequence
    assert by_position == functional.cross_entropy(preds, target, weight.expand(4, 4)).item()


@row("classes on another dimension that has as many entries (T = V)")
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


# Types, layouts and devices.


@row("float targets of class indices' shape, boolean targets")
@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", OF_CLASSES)
def test_targets_of_a_wrong_type(name: str, dtype: torch.dtype, call: str) -> None:
    """Class indices are integers, and the error says how to get there."""
    good = make_batch(name)
    message = assert_no_trace(name, call, {**good, "target": good["target"].to(dtype)}, {}, good, TypeError)
    assert re.match(rf"`target` must hold integer.*, got {dtype}; convert it with \.long\(\)\.", message)


@row("float targets of class indices' shape, boolean targets")
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
    message = assert_no_trace("BinaryCrossEntropy", call, bad, {}, batch, TypeError)
    assert re.match("`target` must hold 0, 1 .* got torch.complex64", message)


@row("complex, integer or boolean `preds`, sparse tensors")
@each_call
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool], ids=str)
@each_kind
def test_predictions_of_a_wrong_type(name: str, dtype: torch.dtype, call: str) -> None:
    """Scores are floats."""
    good = make_batch(name)
    wrong = "preds" if "preds" in KINDS[name].arguments else f"preds_{name[-2]}"
    bad = {**good, wrong: good["preds"].to(dtype)}
    message = assert_no_trace(name, call, bad, {}, good, TypeError)
    assert re.match(rf"`preds\w*` must be float16, .* got {dtype}; convert it with \.float\(\)\.", message)


@row("complex, integer or boolean `preds`, sparse tensors")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@each_call
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@each_kind
def test_sparse_tensors(name: str, layout: torch.layout, call: str) -> None:
    """Every tensor of an update has to be dense."""
    good = {**make_batch(name), "weight": ones(), "num_bytes": torch.tensor([[4, 5], [0, 2]])}
    tensors = [key for key in KINDS[name].arguments if not (layout == torch.sparse_csr and good[key].dim() == 1)]
    for key in tensors:
        sparse = good[key].reshape(2, -1).to_sparse(layout=layout) if good[key].dim() > 2 else None
        bad = {**good, key: good[key].to_sparse(layout=layout) if sparse is None else sparse}
        message = assert_no_trace(name, call, bad, {}, good, TypeError)
        assert re.match(rf"`({key}|preds)` must", message)
        assert re.search("dense|sparse", message)


@row("complex, integer or boolean `preds`, sparse tensors")
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


@row("complex, integer or boolean `preds`, sparse tensors")
@each_call
@each_kind
def test_anything_but_a_tensor(name: str, call: str) -> None:
    """Lists, arrays and numbers are refused for what they are, for every argument of an update."""
    good = make_batch(name)
    for key in KINDS[name].arguments:
        for value in ([[1.0]], np.ones((2, 3)), 1.0, None):
            if value is None and key == "weight":
                continue
            error = (TypeError, ValueError) if value is None and key == "num_bytes" else TypeError
            message = assert_no_trace(name, call, {**good, key: value}, {}, good, error)
            assert re.match(rf"`({key}|preds)` must", message)


@row("complex, integer or boolean `preds`, sparse tensors")
@each_call
@pytest.mark.parametrize("key", ["preds_a", "preds_b"])
def test_errors_name_the_predictions_that_are_wrong(key: str, call: str) -> None:
    """With two models, the sentence says which."""
    name = "CrossEntropyDifference(a)"
    good = make_batch(name)
    for value in (good[key].long(), [1.0], good[key][:, :2]):
        error = (TypeError, ValueError)
        message = assert_no_trace(name, call, {**good, key: value}, {}, good, error)
        assert f"`{key}`" in message


@row("tensors on different devices")
@each_call
@each_kind
def test_tensors_on_different_devices(name: str, call: str) -> None:
    """Each tensor of an update alone on another device is refused, with the names of both devices."""
    good = {**make_batch(name), "weight": ones(), "num_bytes": torch.tensor([4, 5])}
    for key in KINDS[name].arguments:
        message = assert_no_trace(name, call, {**good, key: good[key].to("meta")}, {}, good, ValueError)
        assert "cpu" in message
        assert "meta" in message
        assert f"`{key}`" in message or key.startswith("preds")


@row("tensors on different devices")
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


@row("tensors on different devices")
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


# Weights of classes, smoothing, bytes.


HIDDEN, HEAD = torch.ones(2, 3, 5), torch.ones(K, 5)
BAD_FACTORS: list[tuple[Any, Any, Any, type[Exception], str]] = [
    ([[1.0]], HEAD, None, TypeError, "`hidden` of `{}` must be a tensor, got list; convert it"),
    (HIDDEN, np.ones((K, 5)), None, TypeError, "`weight` of `{}` must be a tensor, got ndarray; convert it"),
    (HIDDEN, HEAD, 1.0, TypeError, "`bias` of `{}` must be a tensor, got float; convert it"),
    (HIDDEN.long(), HEAD, None, TypeError, r"`hidden` of `{}` must be float16, .* got torch.int64; .*\.float\(\)"),
    (HIDDEN, HEAD.cfloat(), None, TypeError, "`weight` of `{}` must be float16, .* got torch.complex64"),
    (HIDDEN, HEAD, HEAD[:, 0].bool(), TypeError, "`bias` of `{}` must be float16, .* got torch.bool"),
    (HIDDEN, HEAD.to_sparse(), None, TypeError, "`weight` of `{}` must be a dense tensor, .*to_dense"),
    (HIDDEN.bfloat16(), HEAD, None, TypeError, "`hidden` of `{}` must have the dtype of `weight`, .*autocast"),
    (HIDDEN, HEAD, HEAD[:, 0].double(), TypeError, "dtype of `weight`, `bias`, got .*32, .*32, .*64; convert"),
    (HIDDEN[0, 0, 0], HEAD, None, ValueError, r"`weight` of `{}` must have the shape .* got \(4, 5\) and \(\)"),
    (HIDDEN[..., :3], HEAD, None, ValueError, r"\(4, 5\) and \(2, 3, 3\); pass what the head is given"),
    (HIDDEN, HEAD.t(), None, ValueError, r"got \(5, 4\) and \(2, 3, 5\); pass weight.t\(\)"),
    (HIDDEN, HEAD[0], None, ValueError, r"`weight` of `{}` must have the shape \(classes, D\) .* got \(5,\)"),
    (HIDDEN, HEAD[:, :4], None, ValueError, r"got \(4, 4\) and \(2, 3, 5\); pass what the head is given"),
    (HIDDEN, HEAD, HEAD[0], ValueError, r"`bias` of `{}` must have the shape \(4,\), .* got \(5,\); leave it out"),
    (HIDDEN, HEAD, HEAD, ValueError, r"`bias` of `{}` must have the shape \(4,\), .* got \(4, 5\)"),
    (HIDDEN, HEAD.to("meta"), None, ValueError, "`hidden` of `{}` must be on the device of `weight`, got cpu, meta"),
    (HIDDEN, HEAD, HEAD[:, 0].to("meta"), ValueError, "device of `weight`, `bias`, got cpu, cpu, meta; move one"),
    (HIDDEN, HEAD[:0], None, ValueError, r"`{}` must have at least one class, got shape \(2, 3, 0\)"),
    (HIDDEN[:1], HEAD, None, ValueError, r"`target` must have the shape \(1, 3\) for `{}` of shape \(1, 3, 4\)"),
]
A_FACTOR = (
    "`LinearLogits` whose parts do not fit, read as anything but logits with classes last, or for yes-or-no targets"
)


@row(A_FACTOR)
@each_call
@pytest.mark.parametrize(("hidden", "weight", "bias", "error", "text"), BAD_FACTORS)
@pytest.mark.parametrize("name", ["CrossEntropy", "CrossEntropyDifference(a)", "CrossEntropyDifference(b)"])
def test_factors_that_do_not_fit(
    name: str, hidden: Any, weight: Any, bias: Any, error: type[Exception], text: str, call: str
) -> None:
    """The sentence says which part of whose predictions."""
    key = f"preds_{name[-2]}" if "preds_a" in KINDS[name].arguments else "preds"
    good = make_batch(name)
    bad = {**good, key: LinearLogits(hidden, weight, bias)}
    message = assert_no_trace(name, call, bad, {}, good, error)
    assert re.search(text.replace("{}", key), message), message


@row(A_FACTOR)
@each_call
@pytest.mark.parametrize("name", OF_CLASSES)
def test_factors_are_logits_with_classes_last(name: str, call: str) -> None:
    """No other input, and no other dimension, is what a matmul makes."""
    forms = [form for form in KINDS[name].inputs if form != "logits"]
    wrong: list[tuple[dict[str, Any], str]] = [
        *(({"input": form}, f"`input` must be 'logits' .* got '{form}'; leave it out") for form in forms),
        *(
            ({"class_dim": dim}, f"`class_dim` must be the last .* got {dim} .* shape .2, 3, 4.")
            for dim in (0, 1, -2, 3)
        ),
    ]
    batch = KINDS[name].chosen(with_preds(name, LinearLogits(HIDDEN, HEAD), make_batch(name)))
    for options, text in wrong:
        metric = KINDS[name].make(**options)
        assert re.search(text, raised(ValueError, lambda m=metric: getattr(m, call)(**batch)))
        assert not metric.tally.state.any()
    for class_dim in (-1, 2):
        assert KINDS[name].make(class_dim=class_dim)(**batch) is not None


@row(A_FACTOR)
@each_call
def test_no_factors_for_yes_or_no_targets(call: str) -> None:
    """Targets of the size of the logits are there anyway, so that nothing would be saved."""
    good = make_batch("BinaryCrossEntropy")
    bad = {**good, "preds": LinearLogits(HIDDEN, HEAD)}
    message = assert_no_trace("BinaryCrossEntropy", call, bad, {}, good, TypeError)
    assert re.match(r"`preds` must be a tensor .* got LinearLogits; pass F.linear\(hidden, weight, bias\)", message)


@row(A_FACTOR)
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_factors_that_are_spread_over_ranks(name: str) -> None:
    """A part that is a DTensor is refused, with what to pass instead."""

    class Spread(torch.Tensor):
        placements = device_mesh = None  # By which the library knows a DTensor.

    parts = {"hidden": HIDDEN, "weight": HEAD, "bias": HEAD[:, 0].clone()}
    parts[name] = parts[name].as_subclass(Spread)
    preds = LinearLogits(**parts)
    message = raised(TypeError, lambda: functional.cross_entropy(preds, torch.zeros(2, 3, dtype=torch.int64)))
    assert re.match(rf"`{name}` of `preds` must be a plain tensor, got a DTensor; pass its full_tensor\(\)", message)


@row("class weights of the wrong length")
@each_call
@pytest.mark.parametrize("length", [0, 1, K - 1, K + 1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["CrossEntropy", "GroupedCrossEntropy"])
def test_class_weights_of_the_wrong_length(name: str, soft: bool, length: int, call: str) -> None:
    """There is one for each class; nothing is broadcast."""
    metric = KINDS[name].make(class_weight=torch.ones(length))
    batch = KINDS[name].chosen(make_batch(name, soft=soft))
    text = f"`class_weight` must have one weight for each of the {K} classes, got {length}"
    assert text in raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert metric.update_count == metric.tally.state.abs().sum() == 0


WEIGHTS_OF_CLASSES = "class weights or `pos_weight` that are negative, infinite or NaN"


@row(WEIGHTS_OF_CLASSES)
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf, 2.0**47])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "option"),
    [("CrossEntropy", "class_weight"), ("GroupedCrossEntropy", "class_weight"), ("BinaryCrossEntropy", "pos_weight")],
)
def test_class_weights_are_checked_when_a_metric_is_made(
    name: str, option: str, dtype: torch.dtype, bad: float
) -> None:
    """A metric that could only be wrong is not made, and functions say the same."""
    values = torch.tensor([1.0, bad, 0.0, 2.0], dtype=dtype)
    text = f"`{option}` must hold finite numbers that are not negative (and below 2**47), got {float(bad)}"
    assert text in raised(ValueError, lambda: KINDS[name].make(**{option: values}))
    assert text in raised(ValueError, lambda: KINDS[name].call(make_batch(name), **{option: values}))


@row(WEIGHTS_OF_CLASSES)
@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "soft"),
    [("CrossEntropy", False), ("CrossEntropy", True), ("GroupedCrossEntropy", True), ("BinaryCrossEntropy", False)],
)
def test_class_weights_are_checked_on_any_device(name: str, soft: bool, bad: float) -> None:
    """Bad ones never read as a number: the metric is not made, or they are counted."""
    values = torch.tensor([1.0, bad, 0.0] if KINDS[name].binary else [1.0, bad, 0.0, 2.0])
    option = "pos_weight" if KINDS[name].binary else "class_weight"

    def read() -> None:
        metric = KINDS[name].make(**{option: values})
        metric.update(**KINDS[name].chosen(make_batch(name, soft=soft)))
        metric.compute()

    raised(ValueError, read)


@row("smoothing over the other classes above `(K - 1) / K`")
@each_call
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["CrossEntropy", "GroupedCrossEntropy", "CrossEntropyDecomposition"])
def test_too_much_smoothing_over_the_others(name: str, soft: bool, call: str) -> None:
    """The most is what makes the target uniform; more is refused with the limit, and alone over all classes allowed."""
    batch = KINDS[name].chosen(make_batch(name, soft=soft))
    options = {"label_smoothing_over": "others"}
    uniform = KINDS[name].make(label_smoothing=0.75, **options)(**batch)
    assert numbers(uniform) == pytest.approx(numbers(KINDS[name].make(label_smoothing=1.0)(**batch)), nan_ok=True)
    metric = KINDS[name].make(label_smoothing=0.76, **options)
    message = raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert re.match(r"`label_smoothing` .* at most \(K - 1\) / K = 3/4, got 0\.76: .*; lower it\.", message)
    assert metric.update_count == metric.tally.state.abs().sum() == 0
    raised(ValueError, lambda: KINDS[name].call(make_batch(name), label_smoothing=0.76, **options))


@row('`backend="compile"` where there is no compiler')
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of the compiler.
@each_call
@pytest.mark.parametrize("name", ["CrossEntropy", "CrossEntropyReport", "BinaryCrossEntropy"])
def test_no_compiler(name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch says what was looked for, and what to do instead; an empty one needs no compiler."""
    pick_vec_isa()  # What the processor can do is found out by compiling, and remembered.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    batch = KINDS[name].chosen(make_batch(name))
    metric = KINDS[name].make(backend="compile")
    metric.update(**{key: None if x is None else x[:0] for key, x in batch.items()})
    state, count = metric.tally.state.clone(), metric.update_count
    torch._dynamo.reset()  # What was compiled for another test would do.
    with torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler"), "fx_graph_cache": False}):
        message = raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert re.match("`backend` must be 'auto' or 'eager' where the losses cannot be compiled, got 'compile'", message)
    assert "/no/such/compiler" in message
    assert "; install the compiler if it is missing (C++, on CUDA Triton)" in message
    assert torch.equal(metric.tally.state, state)
    assert metric.update_count == count


@row('both `token_bytes` and `num_bytes`, or neither; `num_bytes` with `nan_policy="omit"`')
@each_call
def test_two_sources_of_bytes_or_none(call: str) -> None:
    """The bytes come from exactly one place."""
    name, good = "BitsPerByte", make_batch("BitsPerByte")
    message = assert_no_trace(name, call, {**good, "num_bytes": None}, {}, good, ValueError)
    assert re.match("`num_bytes` must be given exactly if there is no `token_bytes` table, got neither; pass", message)
    metric = BitsPerByte(token_bytes=TABLE)
    args = good["preds"], good["target"]
    for num_bytes in (9, 0, torch.tensor(9)):
        message = raised(ValueError, lambda n=num_bytes: getattr(metric, call)(*args, n))
        assert "got both; pass the table once" in message
        assert metric.update_count == metric.tally.state.abs().sum() == 0
        raised(ValueError, lambda n=num_bytes: functional.bits_per_byte(*args, n, token_bytes=TABLE))
    raised(ValueError, lambda: functional.bits_per_byte(*args))


BAD_BYTES = [
    (-1, ValueError),
    (9.0, TypeError),
    (True, TypeError),
    ("9", TypeError),
    (2**63, ValueError),
    (2**70, ValueError),
    (torch.tensor(9.0), TypeError),
    (torch.tensor([True]), TypeError),
    (torch.tensor([9, -1]), ValueError),
    (torch.tensor([2**62] * 4), ValueError),
    (torch.tensor([2**64 - 1], dtype=torch.uint64), ValueError),
    (torch.tensor(9j), TypeError),
]


@row('both `token_bytes` and `num_bytes`, or neither; `num_bytes` with `nan_policy="omit"`')
@each_call
@pytest.mark.parametrize(("num_bytes", "error"), BAD_BYTES)
def test_bad_numbers_of_bytes(num_bytes: Any, error: type[Exception], call: str) -> None:
    """Bytes are integers that are not negative and can be summed."""
    good = make_batch("BitsPerByte")
    bad = {**good, "num_bytes": num_bytes}
    assert "`num_bytes`" in assert_no_trace("BitsPerByte", call, bad, {}, good, error)
    raised(error, lambda: KINDS["BitsPerByte"].call(bad))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint32, torch.uint64])
def test_numbers_of_bytes_of_any_integer_type(dtype: torch.dtype) -> None:
    """9 bytes are 9 bytes, in the table and beside the batch."""
    batch = make_batch("BitsPerByte")
    expected = KINDS["BitsPerByte"].call(batch).item()
    assert KINDS["BitsPerByte"].call({**batch, "num_bytes": torch.tensor([4, 5]).to(dtype)}).item() == expected
    table = KINDS["BitsPerByte(token_bytes)"]
    assert table.call(batch, token_bytes=TABLE.to(dtype)).item() == table.call(batch).item()


def test_many_bytes_do_not_overflow() -> None:
    """No number of bytes that is accepted, however often, makes a sum negative."""
    batch = make_batch("BitsPerByte")
    metric = BitsPerByte()
    try:
        for _ in range(4):
            assert metric(batch["preds"], batch["target"], 2**63 - 1).item() >= 0
    except ValueError:
        return
    assert metric.compute().item() > 0


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ([1, 2], TypeError),
        (torch.ones(K), TypeError),
        (torch.ones(K, dtype=torch.bool), TypeError),
        (torch.ones(1, K, dtype=torch.int64), TypeError),
        (torch.tensor(1), TypeError),
        (torch.tensor([1, -1, 1, 1]), ValueError),
        (torch.tensor([1, 2**24, 1, 1]), ValueError),
        (torch.tensor([1, 2**64 - 1, 1, 1], dtype=torch.uint64), ValueError),
    ],
)
@pytest.mark.parametrize("metric_class", [BitsPerByte, CrossEntropyReport])
def test_bad_tables_of_bytes(metric_class: Any, table: Any, error: type[Exception]) -> None:
    """A table is checked when the metric is made."""
    assert raised(error, lambda: metric_class(token_bytes=table)).startswith("`token_bytes` must")
    batch = make_batch("BitsPerByte")
    raised(error, lambda: functional.bits_per_byte(batch["preds"], batch["target"], token_bytes=table))


@row(A_TARGET)
@each_call
@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", ["BitsPerByte(token_bytes)", "CrossEntropyReport(token_bytes)"])
def test_token_ids_beyond_the_table(name: str, length: int, call: str, request: pytest.FixtureRequest) -> None:
    """An id that the table does not reach is out of range, also for a table without entries."""
    metric = KINDS[name].make(token_bytes=TABLE[:length])
    batch = KINDS[name].chosen(make_batch(name))
    message = raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert re.match(rf"`target` must hold class indices in \[0, {length}\) .* got {6 - 3 * length} that", message)
    assert metric.update_count == metric.tally.state.abs().sum() == 0
    request.getfixturevalue("deferred")
    assert all(map(math.isnan, numbers(metric(**batch))))
    assert f"{6 - 3 * length} targets were outside" in raised(ValueError, metric.compute)


@row(A_GROUP)
@each_call
def test_bad_groups(call: str) -> None:
    """Groups are integers."""
    name, good = "GroupedCrossEntropy", make_batch("GroupedCrossEntropy")
    for group in (good["group"].float(), good["group"].bool(), None, [0]):
        message = assert_no_trace(name, call, {**good, "group": group}, {}, good, TypeError)
        assert re.match(r"`group` must be a dense tensor of integers, got .*; convert it with \.long\(\)", message)


# Losses that are not finite.

NONFINITE = "an infinite or NaN loss (target logit `-inf`, all logits `-inf`, probability 0)"
LOSSES = [
    pytest.param(name, form, bad, spot, loss, id=f"{name}-{form}-{bad}-{spot}")
    for name, kind in KINDS.items()
    for form, bad, spot, loss in (
        ("logits", -math.inf, 1, math.inf),
        ("logits", -math.inf, None, math.nan),
        ("logits", math.nan, 0, math.nan),
        ("logits", math.inf, 1, math.nan),
        ("probs", 0.0, 1, math.inf),
        ("probs", math.nan, 1, math.nan),
        ("log_probs", -math.inf, 1, math.inf),
        ("losses", math.inf, None, math.inf),
        ("losses", -math.inf, None, -math.inf),
        ("losses", math.nan, None, math.nan),
    )
    if form in kind.inputs and not (kind.binary and (spot == 0 or (form, bad) == ("logits", math.inf)))
]


def with_loss(name: str, form: str, bad: float, spot: int | None) -> tuple[Batch, Batch]:
    """Make a batch with one loss that is not finite, and the same without that target."""
    batch = make_batch(name, form)
    where = SPOT if spot is None or KINDS[name].binary else (*SPOT, spot)
    key = "preds" if "preds" in KINDS[name].arguments else f"preds_{name[-2]}"
    batch[key][where] = bad
    mask = ones().bool()
    mask[SPOT] = False
    return KINDS[name].chosen(batch), KINDS[name].chosen({**batch, "weight": mask})


def expected_loss(name: str, loss: float, bad: float, spot: int | None) -> float:
    """Say what IEEE addition makes of one loss, in a difference or a binary metric too."""
    if KINDS[name].binary and spot is None and bad == -math.inf:
        return math.inf  # A logit is all there is of a binary prediction.
    return -loss if name.endswith("(a)") else loss


@row(NONFINITE)
@each_call
@pytest.mark.parametrize(("name", "form", "bad", "spot", "loss"), LOSSES)
def test_losses_that_are_not_finite(name: str, form: str, bad: float, spot: int | None, loss: float, call: str) -> None:
    """One of them is propagated as in IEEE addition, omitted as if it were masked, or raised, and always counted."""
    kind = KINDS[name]
    batch, masked = with_loss(name, form, bad, spot)
    loss = expected_loss(name, loss, bad, spot)
    rest = kind.make(input=form)
    rest.update(**masked)
    for policy in ("propagate", "omit", "raise"):
        metric = kind.make(input=form, nan_policy=policy)
        if (name, policy) == ("BitsPerByte", "omit"):
            assert raised(ValueError, lambda metric=metric: metric.update(**batch)).startswith(
                "`nan_policy` must not be"
            )
            continue
        value = getattr(metric, call)(**batch)
        totals = metric.tally.overall().totals() if hasattr(metric.tally, "overall") else None
        totals = metric.tally.unbind()[0].totals() if totals is None else totals
        assert (totals.scored, totals.nonfinite) == (6, 1)
        if policy == "raise":
            assert value is None or all(map(math.isnan, numbers(value)))
            message = raised(ValueError, metric.compute)
            assert re.match(r"`nan_policy='raise'` allows finite losses only, but of 6 .*nan_policy='omit'", message)
            continue
        values = [metric.compute()] if value is None else [metric.compute(), value]
        for read in values:
            found, expected = main(read), main(rest.compute())
            if policy == "propagate":
                loss_read = math.exp(loss) if name == "Perplexity" else loss
                expected[1 if name.startswith("Grouped") else 0] = loss_read  # The group at the spot is 1.
            assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)
        if policy == "omit":
            assert bits(metric.compute()) == bits(rest.compute())


@row(NONFINITE)
@pytest.mark.parametrize(
    ("name", "form", "bad", "spot", "loss"), [param for param in LOSSES if param.values[0] in FUNCTIONS]
)
def test_losses_that_are_not_finite_in_functions(
    name: str, form: str, bad: float, spot: int | None, loss: float, request: pytest.FixtureRequest
) -> None:
    """The functions read the same; `raise` raises at once on the CPU and reads NaN elsewhere."""
    kind = KINDS[name]
    batch, masked = with_loss(name, form, bad, spot)
    call = lambda arguments, policy: kind.function(**arguments, **kind.options, input=form, nan_policy=policy)  # noqa: E731
    if name == "BitsPerByte":
        assert raised(ValueError, lambda: call(batch, "omit")).startswith("`nan_policy` must not be 'omit'")
    else:
        assert numbers(call(batch, "omit")) == pytest.approx(numbers(call(masked, "omit")), rel=1e-14, nan_ok=True)
    assert re.match("`nan_policy='raise'`", raised(ValueError, lambda: call(batch, "raise")))
    loss = expected_loss(name, loss, bad, spot)
    loss = math.exp(loss) if name == "Perplexity" else loss
    assert main(call(batch, "propagate"))[name.startswith("Grouped")] == pytest.approx(loss, nan_ok=True)
    request.getfixturevalue("deferred")
    assert all(map(math.isnan, numbers(call(batch, "raise"))))


@row(NONFINITE)
@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_class_seen_only_with_a_loss_that_is_not_finite(loss: float) -> None:
    """It is a class that was scored: the cross-entropy over the entropy is infinite or NaN, and `raise` raises."""
    args = torch.tensor([1.0, loss]), torch.tensor([0, 1])
    for policy, expected in (("propagate", loss), ("omit", math.nan)):
        metric = NormalizedCrossEntropy(2, input="losses", nan_policy=policy)
        for value in (metric(*args), metric.compute()):
            assert value.item() == pytest.approx(expected, nan_ok=True)
    metric = NormalizedCrossEntropy(2, input="losses", nan_policy="raise")
    assert metric(*args).isnan()
    assert "`nan_policy='raise'`" in raised(ValueError, metric.compute)


MASKS = "a loss of 2**94 nats or more, as from a mask of `finfo.min` on the target"
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


@row(MASKS)
@dtypes
@each_kind
def test_masks_in_the_logits(name: str, dtype: torch.dtype) -> None:
    """A class masked by -1e9 or `finfo.min` costs nothing unless it is the target; then it costs what it says."""
    kind = KINDS[name]
    key = "preds" if "preds" in kind.arguments else f"preds_{name[-2]}"
    lowest = torch.finfo(dtype).min
    for mask in {max(-1e9, lowest), lowest}:
        batch = {k: x.to(dtype) if k.startswith("preds") else x for k, x in make_batch(name).items()}
        batch[key][SPOT if kind.binary else (*SPOT, 1)] = mask
        metric = kind.make()
        metric.update(**kind.chosen(batch))
        totals = metric.tally.overall() if hasattr(metric.tally, "overall") else metric.tally.unbind()[0]
        assert totals.totals().nonfinite == (mask < -(2.0**94))
        if not kind.binary:
            others = {k: x.clone() if isinstance(x, Tensor) else x for k, x in batch.items()}
            others[key][..., :2], others[key][..., 2:] = batch[key][..., :2].clamp(min=-9), mask
            metric = kind.make(nan_policy="raise")
            metric.update(**kind.chosen(others))
            assert all(map(math.isfinite, main(metric.compute())))


@row(MASKS)
def test_the_loss_of_a_mask() -> None:
    """-1e9 on the target is a loss of 1e9 nats, and the first loss that is infinite is 2**94."""
    assert functional.cross_entropy(torch.tensor([[-1e9, 0.0]]), torch.tensor([0])).item() == pytest.approx(1e9)
    assert functional.binary_cross_entropy(torch.tensor([-1e9]), torch.tensor([1])).item() == pytest.approx(1e9)
    below = math.nextafter(2.0**94, 0.0)
    for loss, expected in ((below, below), (2.0**94, math.inf), (-below, -below), (-(2.0**94), -math.inf)):
        args = torch.tensor([loss], dtype=torch.float64), torch.tensor([0])
        assert functional.cross_entropy(*args, input="losses").item() == expected
        metric = CrossEntropy(input="losses")
        metric.update(*args)
        assert metric.compute().item() == expected


@row(MASKS)
def test_the_difference_of_two_masks() -> None:
    """Two losses that count as infinite have no difference."""
    preds = torch.tensor([[torch.finfo(torch.float32).min, 0.0], [0.0, 0.0]])
    metric = CrossEntropyDifference()
    metric.update(preds, preds, torch.tensor([0, 1]))
    assert metric.compute()["difference"].isnan()
    assert metric.tally.totals().nonfinite == 1


UNSEEN = "NaN logits where the target is ignored or has weight 0"


@row(UNSEEN)
@pytest.mark.parametrize("how", ["ignore_index", "weight", "mask"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, kind in KINDS.items() for form in kind.inputs])
def test_what_is_not_scored_poisons_nothing(name: str, form: str, bad: float, how: str) -> None:
    """Not one bit changes, whatever the predictions are where they are not scored."""
    kind, batch = KINDS[name], make_batch(name, form)
    if how == "ignore_index":
        batch["target"][SPOT] = -100
    else:
        batch["weight"] = ones().bool() if how == "mask" else ones()
        batch["weight"][SPOT] = 0
    metrics = [kind.make(input=form, ignore_index=-100, nan_policy="raise") for _ in range(2)]
    metrics[0].update(**kind.chosen(batch))
    clean = metrics[0](**kind.chosen(batch))
    for key in kind.arguments:
        if key.startswith("preds"):
            batch[key] = batch[key].clone()
            batch[key][SPOT] = bad
    metrics[1].update(**kind.chosen(batch))
    assert bits(metrics[1](**kind.chosen(batch))) == bits(clean)
    assert torch.equal(metrics[0].tally.state, metrics[1].tally.state)
    assert bits(metrics[0].compute()) == bits(metrics[1].compute())


@row(UNSEEN)
@pytest.mark.parametrize("name", SOFT)
def test_a_soft_target_that_is_not_scored_poisons_nothing(name: str) -> None:
    """Padding without a distribution, in targets and predictions, is padding."""
    batch = make_batch(name, soft=True)
    batch["weight"] = ones()
    batch["weight"][SPOT] = 0.0
    clean = KINDS[name].make()(**KINDS[name].chosen(batch))
    for key in ("target", "preds", "preds_a", "preds_b"):
        batch[key][SPOT] = math.nan
    assert bits(KINDS[name].make()(**KINDS[name].chosen(batch))) == bits(clean)


NOTHING = "an empty batch, one with all targets ignored or of weight 0, no batch at all"


@row(NOTHING)
@pytest.mark.parametrize("soft", [False, True])
@each_kind
def test_nothing_to_score_reads_nan(name: str, soft: bool) -> None:
    """Empty, ignored and weightless batches read NaN and change no later number; before any, torchmetrics warns."""
    kind = KINDS[name]
    if soft and not kind.soft:
        pytest.skip("Takes no soft targets.")
    good = make_batch(name, soft=soft)
    if name == "BitsPerByte":
        good = {**good, "num_bytes": 0}  # Bytes that are given count, whatever is scored.
    length = {k: x[:0] if isinstance(x, Tensor) else x for k, x in good.items()}
    time = {k: x[:, :0] if isinstance(x, Tensor) else x for k, x in good.items()}
    ignored = good if soft else {**good, "target": torch.full((2, 3), -100)}
    weight = torch.zeros(2, 3) if soft else None
    batches = [length, time, {**ignored, "weight": weight}, {**good, "weight": torch.zeros(2, 3)}]
    batches.append({**good, "weight": torch.zeros(1, dtype=torch.bool)})
    metric, expected = kind.make(ignore_index=-100), kind.make(ignore_index=-100)
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert all(map(math.isnan, numbers(metric.compute())))
    for batch in batches:
        assert all(map(math.isnan, numbers(metric(**kind.chosen(batch)))))
        metric.update(**kind.chosen(batch))
        assert all(map(math.isnan, numbers(metric.compute())))
        if name in FUNCTIONS:
            assert all(map(math.isnan, numbers(kind.call(batch, ignore_index=-100))))
    for each in (metric, expected):
        each.update(**kind.chosen(good))
    for batch in batches:
        metric.update(**kind.chosen(batch))
    assert bits(metric.compute()) == bits(expected.compute())


@row("weights of 1e-12")
@each_kind
def test_tiny_weights(name: str) -> None:
    """Weights are relative: with 1e-12 for 1 the mean has the same seven digits (beside `num_bytes`, a share of it)."""
    kind, batch = KINDS[name], make_batch(name)
    batch["weight"] = torch.rand(2, 3, dtype=torch.float64) + 0.5
    scaled = {**batch, "weight": batch["weight"] * 1e-12}
    metrics = [kind.make(), kind.make()]
    for metric, each in zip(metrics, (batch, scaled), strict=True):
        metric.update(**kind.chosen(each))
    values, tiny = (main(metric.compute()) for metric in metrics)
    factor = 1e-12 if "num_bytes" in kind.arguments else 1.0
    assert tiny == pytest.approx([factor * x for x in values], rel=1e-6, abs=1e-7 * factor, nan_ok=True)


@row("a vocabulary of 1")
@pytest.mark.parametrize("form", SCORES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", [name for name in OF_CLASSES if not name.startswith("Normalized")])
def test_a_vocabulary_of_1(name: str, soft: bool, form: str) -> None:
    """Nothing is left to say, so nothing is paid; a base rate needs two classes."""
    if soft and not KINDS[name].soft:
        pytest.skip("Takes no soft targets.")
    target = torch.ones(2, 3, 1) if soft else torch.zeros(2, 3, dtype=torch.int64)
    preds = torch.ones(2, 3, 1) if form == "probs" else torch.zeros(2, 3, 1) if form == "log_probs" else None
    batch = {**make_batch(name), "target": target}
    batch = with_preds(name, torch.randn(2, 3, 1) if preds is None else preds, batch)
    metric = KINDS[name].make(input=form)
    for value in (metric(**KINDS[name].chosen(batch)), metric.compute()):
        assert main(value) == [1.0 if name == "Perplexity" else 0.0] * len(main(value))
    assert "`num_classes` must be an integer of at least 2" in raised(ValueError, lambda: NormalizedCrossEntropy(1))


# Sizes.


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_vocabulary_of_200_000(name: str) -> None:
    """A large vocabulary is one like any other, up to its last class, which is the only limit."""
    size = 200_000
    options: dict[str, Any] = {"num_classes": size} if name.startswith("Normalized") else {}
    if "token_bytes" in KINDS[name].options:
        options["token_bytes"] = torch.full((size,), 2)
    preds, target = torch.zeros(2, 2, size, dtype=torch.bfloat16), torch.tensor([[0, size - 1], [1, -100]])
    batch = with_preds(name, preds, {"target": target, "num_bytes": 9, "weight": None, "group": target % 3})
    metric = KINDS[name].make(**options)
    metric.update(**KINDS[name].chosen(batch))
    assert all(x == 0 or math.isfinite(x) for x in main(metric.compute()) if not math.isnan(x))
    state = metric.tally.state.clone()
    batch["target"] = target + 1
    assert rf"such as {size}" in raised(ValueError, lambda: metric.update(**KINDS[name].chosen(batch)))
    assert torch.equal(metric.tally.state, state)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_more_logits_than_an_int32_counts(name: str) -> None:
    """2**32 logits are counted without overflow; on a device without data, so that they need no memory."""
    size = 2**16
    options: dict[str, Any] = {"num_classes": size} if name.startswith("Normalized") else {}
    if "token_bytes" in KINDS[name].options:
        options["token_bytes"] = torch.full((size,), 2)
    target = torch.empty(size, dtype=torch.int64, device="meta")
    batch = {"target": target, "group": target, "num_bytes": 9, "weight": None}
    batch = with_preds(name, torch.empty(size, size, device="meta"), batch)
    metric = KINDS[name].make(**options).to("meta")
    metric.update(**KINDS[name].chosen(batch))
    assert metric.tally.state.device.type == "meta"
    assert metric.update_count == 1


# Constructors.

JUNK: dict[str, list[Any]] = {
    "input": ["logit", None, 1, True, [], "LOGITS"],
    "class_dim": ["1", None, 1.0, True, [1], torch.tensor(1)],
    "class_weight": [[1.0], 1.0, "1", torch.ones(2, 2), torch.tensor(1.0), torch.ones(2, dtype=torch.int64), True],
    "label_smoothing": ["0", None, True, -0.1, 1.1, math.nan, math.inf, 1j, torch.tensor(0.1)],
    "label_smoothing_over": ["other", None, True, 1],
    "ignore_index": ["-100", 1.0, True, [1], torch.tensor(1), math.nan],
    "eps": ["0", True, 0.0, -1e-3, 0.5, math.nan, torch.tensor(0.1), 1e-7],
    "shift": [0, 1, None, "yes", torch.tensor(1)],
    "backend": ["inductor", None, True, 1, [], "COMPILE"],
    "unit": ["bit", None, True, 2],
    "nan_policy": ["drop", None, True, 0],
    "sequence_group": ["world", 0],
    "confidence": [0.0, 1.0, 95, True, "0.9", None, math.nan, -0.5],
    "token_bytes": [[1], 1, "1", torch.ones(2), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)],
    "pos_weight": [[1.0], 1.0, "1", torch.ones(2, dtype=torch.int64), True, torch.ones(2, dtype=torch.complex64)],
    "num_groups": [0, -1, 1.0, "2", True, None, [2], torch.tensor(2)],
    "num_classes": [1, 0, -1, 2.0, "2", True, None, [2], torch.tensor(2)],
}
CLASSES = [x for x in map(vars(xent_metrics).get, xent_metrics.__all__) if hasattr(x, "merge_state")]
REQUIRED = {"GroupedCrossEntropy": {"num_groups": 2}, "NormalizedCrossEntropy": {"num_classes": 2}}


def constructor_junk() -> Iterator[Any]:
    """Yield every class with every argument that it has, and everything that the argument must not be."""
    for metric_class in CLASSES:
        for name, parameter in inspect.signature(metric_class).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                for value in JUNK[name]:
                    short = re.sub(r"\s+", " ", repr(value))[:30]
                    yield pytest.param(metric_class, name, value, id=f"{metric_class.__name__}-{name}={short}")


@pytest.mark.parametrize(("metric_class", "name", "value"), list(constructor_junk()))
def test_constructors_refuse_what_they_do_not_understand(metric_class: Any, name: str, value: Any) -> None:
    """Every argument of every class, with values of wrong types and out of range: the sentence names it."""
    options = {**REQUIRED.get(metric_class.__name__, {}), name: value}
    message = raised((TypeError, ValueError), lambda: metric_class(**options))
    assert f"`{name}`" in message.split(" must ")[0] or message.startswith(f"`{name}`")


@pytest.mark.parametrize("metric_class", CLASSES)
def test_constructors_take_keywords_and_know_no_others(metric_class: Any) -> None:
    """A misspelled option is an error, and so is one by position."""
    options = REQUIRED.get(metric_class.__name__, {})
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `lable_smoothing`"):
        metric_class(**options, lable_smoothing=0.1)
    with pytest.raises(TypeError, match="positional"):
        metric_class(*options.values(), "logits")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"label_smoothing": 0.1}, "`label_smoothing` must be 0"),
        ({"class_weight": torch.ones(K)}, "`class_weight` must be None"),
        ({"shift": True}, "`shift` must be False"),
        ({"eps": 0.1}, "`eps` clips probabilities"),
    ],
)
def test_options_that_losses_do_not_go_with(options: dict[str, Any], text: str) -> None:
    """Losses are made: what would change them is refused."""
    assert text in raised(ValueError, lambda: CrossEntropy(input="losses", **options))
    batch = make_batch("CrossEntropy", "losses")
    raised(ValueError, lambda: functional.cross_entropy(batch["preds"], batch["target"], input="losses", **options))


@pytest.mark.parametrize("name", [name for name in OF_CLASSES if "losses" in KINDS[name].inputs])
@pytest.mark.parametrize("class_dim", [1, -2, 7])
def test_losses_have_no_dimension_of_classes(name: str, class_dim: int) -> None:
    """A `class_dim` that losses do not have does not matter to them."""
    batch = {k: x[0] if isinstance(x, Tensor) else x for k, x in make_batch(name, "losses").items()}
    expected = KINDS[name].make(input="losses")(**KINDS[name].chosen(batch))
    metric = KINDS[name].make(input="losses", class_dim=class_dim)
    assert bits(metric(**KINDS[name].chosen(batch))) == bits(expected)


@each_call
@pytest.mark.parametrize("class_dim", [3, -4, 2**40])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_class_dimension_that_is_none(name: str, class_dim: int, call: str) -> None:
    """The sentence names the shape."""
    metric = KINDS[name].make(class_dim=class_dim)
    message = raised(ValueError, lambda: getattr(metric, call)(**KINDS[name].chosen(make_batch(name))))
    assert re.match(rf"`class_dim` must be a dimension of `preds\w*`, got {class_dim} for shape \(2, 3, {K}\)", message)
    assert metric.update_count == 0


@pytest.mark.parametrize("ignore_index", [2**63, -(2**63) - 1, 2**70])
@each_kind
def test_an_ignore_index_that_no_integer_holds(name: str, ignore_index: int) -> None:
    """It ignores nothing, or is refused; it does not overflow."""
    try:
        metric = KINDS[name].make(ignore_index=ignore_index)
    except (TypeError, ValueError):
        return
    expected = KINDS[name].make(ignore_index=None)
    batch = KINDS[name].chosen(make_batch(name))
    assert bits(metric(**batch)) == bits(expected(**batch))


@pytest.mark.parametrize("metric_class", [CrossEntropyReport, CrossEntropyDifference])
def test_every_confidence_that_is_accepted_can_be_read(metric_class: Any) -> None:
    """Also the greatest below 1."""
    try:
        metric = metric_class(confidence=1 - 2**-53)
    except ValueError:
        return
    name = "CrossEntropyReport" if metric_class is CrossEntropyReport else "CrossEntropyDifference(a)"
    metric.update(**KINDS[name].chosen(make_batch(name)))
    metric.compute()


@pytest.mark.parametrize("target", [0, 1])
def test_smoothing_refuses_what_is_no_number_of_classes(target: int) -> None:
    """The conversion checks both of its arguments."""
    for bad in (0, -1, 1.5, True, "2", None):
        assert "`num_classes` must be an integer" in raised(
            ValueError, lambda b=bad: functional.convert_label_smoothing(0.1 * target, b)
        )
    for bad in (-0.1, 1.1, math.nan, "0", None, True):
        assert "`label_smoothing`" in raised(ValueError, lambda b=bad: functional.convert_label_smoothing(b, 3))
    assert "at most (K - 1) / K = 2/3" in raised(ValueError, lambda: functional.convert_label_smoothing(0.67, 3))


# The table itself.


def test_every_row_of_the_table_has_a_test() -> None:
    """A row without a test is a promise without proof, and a test of no row a promise that was not made."""
    assert len(ROWS) == len(set(ROWS)) > 20
    assert sorted(CLAIMED) == sorted(ROWS)
    assert all(callable(globals()[test]) for tests in CLAIMED.values() for test in tests)


def test_every_class_and_function_is_tested() -> None:
    """What is public has a kind here; the three functions without a class of their own have tests elsewhere."""
    assert {kind.metric for kind in KINDS.values()} == set(CLASSES)
    functions = {kind.function.__name__ for kind in KINDS.values() if kind.function is not None}
    assert set(functional.__all__) - functions == {"tally", "per_target_losses", "convert_label_smoothing"}
