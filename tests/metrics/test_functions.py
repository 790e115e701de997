"""The functions: values, counts, bad values that raise at once or are counted, and work that no device waits for."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import FORMS, Form
from tests.instruments import Operators
from xent_metrics import CrossEntropy, CrossEntropyReport, Tally, functional

K = 5
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
ALL = [functional.cross_entropy, functional.bits_per_token, functional.perplexity]


def values(preds: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> list[float]:
    """Cross-entropy, bits per token and perplexity."""
    return [function(preds, target, weight=weight, **options).item() for function in ALL]


def test_readings_agree() -> None:
    """Bits are nats over ln 2, and perplexity is the exponential of nats and 2 to the power of bits."""
    preds, target = torch.randn(6, K), torch.randint(0, K, (6,))
    nats, bits, perplexity = values(preds, target)
    assert nats == pytest.approx(F.cross_entropy(preds.double(), target).item(), rel=1e-6)
    assert bits == pytest.approx(nats / math.log(2), rel=1e-15)
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-15)
    assert perplexity == pytest.approx(2**bits, rel=1e-15)
    assert functional.cross_entropy(preds, target, unit="bits").item() == bits


@pytest.mark.parametrize("num_classes", [1, 2, 8, 1000])
def test_uniform(num_classes: int) -> None:
    """A uniform model has as perplexity its number of classes, whatever the targets."""
    result = values(torch.zeros(10, num_classes), torch.randint(0, num_classes, (10,)))
    assert result == pytest.approx([math.log(num_classes), math.log2(num_classes), num_classes], rel=1e-6, abs=1e-12)


def test_deterministic() -> None:
    """A model that is certain costs nothing where it is right and everything where it is wrong."""
    probs = torch.eye(K)
    target = torch.arange(K)
    assert values(probs, target, input="probs") == [0.0, 0.0, 1.0]
    assert values(probs, target.roll(1), input="probs") == [math.inf] * 3
    assert values((100 * probs).log_softmax(-1), target, input="log_probs") == [0.0, 0.0, 1.0]


def test_worked_values() -> None:
    """The figures that any reader can check by hand."""
    value = functional.cross_entropy(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    assert value.item() == pytest.approx(0.4170, abs=5e-5)
    for bits, perplexity in ((1, 2), (math.log2(10), 10), (math.log2(100), 100)):
        losses, target = torch.full((3,), bits * math.log(2), dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
        result = values(losses, target, input="losses")
        assert result[1:] == pytest.approx([bits, perplexity], rel=1e-14)


@pytest.mark.slow
def test_markov_source() -> None:
    """A Markov source judged by its own transition matrix costs the entropy of its steps, near its entropy rate."""
    stay = torch.tensor([0.9, 0.6], dtype=torch.float64)
    transition = torch.stack([stay, 1 - stay], 1)
    transition[1] = transition[1].flip(0)
    steps = 200_000
    uniforms, symbols, state = torch.rand(steps).tolist(), [], 0
    for u in uniforms:
        state = state if u < stay[state] else 1 - state
        symbols.append(state)
    sequence = torch.tensor(symbols)
    preds, target = transition[sequence[:-1]], sequence[1:]
    value = functional.cross_entropy(preds, target, input="probs").item()
    pairs = torch.stack([((sequence[:-1] == a) & (target == b)).sum() for a in (0, 1) for b in (0, 1)]).double()
    assert value == pytest.approx((-(pairs * transition.flatten().log()).sum() / pairs.sum()).item(), rel=1e-13)
    stationary = (1 - stay).flip(0) / (1 - stay).sum()
    rate = -(stationary[:, None] * transition * transition.log()).sum().item()
    losses = functional.per_target_losses(preds, target, input="probs")
    blocks = losses[: steps // 400 * 400 - 400].view(-1, 400).mean(1)  # Long enough to be all but independent.
    assert abs(value - rate) < 4 * (blocks.std() / len(blocks) ** 0.5).item()


@pytest.mark.parametrize("weight", [None, torch.tensor([True, True, False, True]), torch.tensor([2.0, 0.5, 0.0, 3.0])])
def test_counts(weight: Tensor | None) -> None:
    """Targets are scored or ignored (by `ignore_index`, weight 0 or mask False), and each counts once."""
    target = torch.tensor([[1, -100, 2, 3], [0, 1, -100, 4]])
    totals = functional.tally(torch.zeros(2, 4, K), target, weight=weight).totals()
    ignored = 2 if weight is None else 3
    assert (totals.scored, totals.ignored) == (8 - ignored, ignored)
    assert totals.sequences == 2


def test_tallies_add_up_to_one_pass() -> None:
    """The tally of all the data is the sum of the tallies of its parts, bit for bit and in any order."""
    preds, target, weight = torch.randn(9, 4, K), torch.randint(0, K, (9, 4)), torch.rand(9, 4)
    whole = functional.tally(preds, target, weight=weight)
    parts = Tally.zero()
    for rows in torch.randperm(9).split(2):
        parts = functional.tally(preds[rows], target[rows], weight=weight[rows]) + parts
    assert torch.equal(whole.state, parts.state)


@pytest.mark.parametrize("scale", ["row", "column", "scalar", "full"])
def test_weight_broadcasts(scale: str) -> None:
    """A weight may have any shape that broadcasts to target's."""
    preds, target = torch.randn(3, 4, K), torch.randint(0, K, (3, 4))
    weight = torch.rand({"row": (4,), "column": (3, 1), "scalar": (), "full": (3, 4)}[scale])
    losses = F.cross_entropy(preds.double().movedim(-1, 1), target, reduction="none")
    expected = (losses * weight).sum() / weight.expand(3, 4).double().sum()
    assert functional.cross_entropy(preds, target, weight=weight).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("bad", [K, -1, 2**40, -2, -(2**63), 2**63 - 1, -100])
@pytest.mark.parametrize("function", [*ALL, functional.per_target_losses, functional.tally])
def test_target_out_of_range_raises(bad: int, function: Callable[..., object]) -> None:
    """A target that is no class never wraps, is clamped or vanishes: the CPU says how many, which, and the fix."""
    target = torch.tensor([0, bad, 1, bad])
    fix = f"pass ignore_index={bad} if it marks" if bad < 0 else "check the vocabulary size"
    text = f"[0, {K}) or ignore_index=None, got 2 that are neither, such as {bad}; {fix}"
    with pytest.raises(ValueError, match=re.escape(text)):
        function(torch.zeros(4, K), target, ignore_index=None)


@pytest.mark.parametrize("num_classes", [K, 300])
@pytest.mark.parametrize("ignore_index", [-100, None, 300])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_target_out_of_range_of_any_dtype(dtype: torch.dtype, ignore_index: int | None, num_classes: int) -> None:
    """The error is the same for integer types that cannot hold `ignore_index` or the number of classes."""
    bad = {torch.uint8: 156, torch.int8: -1}.get(dtype, 301)  # 156 is -100 modulo 256.
    target = torch.tensor([4, bad]).to(dtype)
    if bad == 156 and num_classes == 300:
        assert math.isfinite(functional.cross_entropy(torch.zeros(2, 300), target, ignore_index=ignore_index).item())
        return
    with pytest.raises(ValueError, match=f"got 1 that are neither, such as {bad};"):
        functional.cross_entropy(torch.zeros(2, num_classes), target, ignore_index=ignore_index)


def test_example_is_one_of_those_counted() -> None:
    """The example in an error is a value that was counted, not one that is masked."""
    target = torch.tensor([-7, 9, 1])
    with pytest.raises(ValueError, match="got 1 that are neither, such as 9;"):
        functional.cross_entropy(torch.zeros(3, K), target, weight=torch.tensor([False, True, True]))
    with pytest.raises(ValueError, match=r"got 1 that are not, such as -3\.0;"):
        functional.cross_entropy(torch.zeros(2, K), torch.tensor([-100, 1]), weight=torch.tensor([math.nan, -3.0]))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf, 2.0**47])
@pytest.mark.parametrize("function", [*ALL, functional.tally])
def test_bad_weight_raises(bad: float, function: Callable[..., object]) -> None:
    """A weight that is negative, NaN or infinite raises on the CPU with the count and an example."""
    text = f"must hold finite numbers that are not negative (and below 2**47), got 2 that are not, such as {bad}; use 0"
    with pytest.raises(ValueError, match=re.escape(text)):
        function(torch.zeros(3, K), torch.tensor([0, 1, 2]), weight=torch.tensor([bad, 1.0, bad]))


def test_masked_targets_may_be_anything() -> None:
    """What is not scored is not looked at: weight 0 and mask False allow any target."""
    target = torch.tensor([1, 2**40, -3])
    expected = functional.cross_entropy(torch.ones(1, K), target[:1]).item()
    for weight in (torch.tensor([True, False, False]), torch.tensor([2.0, 0.0, 0.0]), torch.tensor([1, 0, 0])):
        assert functional.cross_entropy(torch.ones(3, K), target, weight=weight).item() == expected


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize(
    ("target", "weight"), [([0, K], None), ([0, -1], None), ([0, 1], [1.0, -1.0]), ([0, 1], [1.0, math.nan])]
)
def test_bad_values_read_nan_where_they_cannot_raise(target: list[int], weight: list[float] | None) -> None:
    """Where looking is not free, a bad target or weight turns the result into NaN, and is counted in the tally."""
    args, weights = (torch.zeros(2, K), torch.tensor(target)), None if weight is None else torch.tensor(weight)
    assert all(math.isnan(value) for value in values(*args, weights))
    totals = functional.tally(*args, weight=weights).totals()
    assert (totals.out_of_range, totals.invalid_weight) == ((1, 0) if weight is None else (0, 1))
    assert totals.scored == 1
    if weight is None:
        assert functional.per_target_losses(*args).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("losses", "propagated"),
    [
        ([1.0, math.nan, 3.0], math.nan),
        ([1.0, math.inf, 3.0], math.inf),
        ([1.0, -math.inf, 3.0], -math.inf),
        ([1.0, 3.0, math.inf, -math.inf], math.nan),
        ([1.0, 3.0, math.inf, math.nan], math.nan),
        ([1.0, 3.0, 2.0**94], math.inf),
    ],
)
def test_nan_policy(losses: list[float], propagated: float, hide_values: Callable[[], None]) -> None:
    """Non-finite losses propagate as in IEEE addition, are left out, or raise, and are counted under every policy."""
    args = torch.tensor(losses), torch.zeros(len(losses), dtype=torch.int64)
    nonfinite = len(losses) - 2
    for policy, expected in (("propagate", propagated), ("omit", 2.0)):
        value = functional.cross_entropy(*args, input="losses", nan_policy=policy).item()
        assert value == pytest.approx(expected, nan_ok=True)
        metric = CrossEntropyReport(input="losses", nan_policy=policy)
        assert metric(*args)["cross_entropy"].item() == pytest.approx(expected, nan_ok=True)
        report = {name: value.item() for name, value in metric.compute().items()}
        assert report["cross_entropy"] == pytest.approx(expected, nan_ok=True)
        assert (report["num_tokens"], report["num_nonfinite"]) == (len(losses), nonfinite)
    text = f"of {len(losses)} losses .*(NaN|infinite).*nan_policy='omit'"
    metric = CrossEntropy(input="losses", nan_policy="raise")
    assert metric(*args).isnan()
    with pytest.raises(ValueError, match=text):
        metric.compute()
    with pytest.raises(ValueError, match=text):
        functional.cross_entropy(*args, input="losses", nan_policy="raise")
    hide_values()
    assert functional.cross_entropy(*args, input="losses", nan_policy="raise").isnan()


CASES = {
    "hard": ({}, None, False),
    "smoothed": ({"label_smoothing": 0.1}, torch.float32, False),
    "masked": ({"ignore_index": None}, torch.bool, False),
    "classes second": ({"class_dim": 1}, None, False),
    "soft": ({}, torch.int32, True),
    "soft smoothed": ({"label_smoothing": 0.1, "class_dim": 1}, None, True),
    "probs": ({"input": "probs", "eps": 0.1}, None, False),
    "losses": ({"input": "losses"}, torch.float16, False),
    "raise": ({"nan_policy": "raise", "unit": "bits"}, None, False),
}


def batch_on(device: str, case: str, num_rows: int = 2, num_classes: int = K) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a batch of one of the cases on a device, and the options that go with it."""
    options, weighing, soft = CASES[case]
    second = "class_dim" in options
    shape = (num_rows, 3) if case == "losses" else (num_rows, num_classes, 3) if second else (num_rows, 3, num_classes)
    preds = torch.rand(shape, device=device)
    target = torch.rand(shape, device=device) if soft else torch.ones(num_rows, 3, dtype=torch.int64, device=device)
    weight = None if weighing is None else torch.ones(num_rows, 3, device=device).to(weighing)
    return {"preds": preds, "target": target, "weight": weight}, options


def assert_stays(operators: Operators, device: str) -> None:
    """Fail if the device was waited for, or anything was moved to it from Python or from another device."""
    assert operators.devices == {device}
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal.default", "item")
    assert [name for name in operators.counts if any(part in name for part in waiting)] == []


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_functions_never_wait(case: str, weighed: bool, operators: Operators) -> None:
    """On a device without data, where looking at a value is impossible, every function runs."""
    batch, options = batch_on("meta", case)
    class_weight = torch.ones(K, device="meta") if weighed and case != "losses" else None
    losses_options = {k: v for k, v in options.items() if k not in ("nan_policy", "unit")}
    with operators:
        value = functional.cross_entropy(**batch, class_weight=class_weight, **options)
        functional.per_target_losses(batch["preds"], batch["target"], class_weight=class_weight, **losses_options)
        functional.tally(**batch, class_weight=class_weight, **losses_options)
    assert (value.device.type, value.shape) == ("meta", ())
    assert_stays(operators, "meta")


@pytest.mark.parametrize("metric_class", [CrossEntropy, CrossEntropyReport])
@pytest.mark.parametrize("case", CASES)
def test_update_and_forward_never_wait(case: str, metric_class: Any, operators: Operators) -> None:
    """Neither `update` nor `forward` looks at a value, builds a tensor from Python data, or moves between devices."""
    batch, options = batch_on("meta", case)
    options = dict(options)
    if metric_class is CrossEntropyReport:
        for name in ("label_smoothing", "unit"):
            options.pop(name, None)
    elif case != "losses":
        options["class_weight"] = torch.ones(K)
    metric = metric_class(**options).to("meta")
    with operators:
        metric.update(**batch)
    assert_stays(operators, "meta")
    with operators:
        metric(**batch)
    assert_stays(operators, "meta")
    assert metric.tally.state.device.type == "meta"


@pytest.mark.parametrize("case", CASES)
def test_many_rows_never_wait(case: str, operators: Operators) -> None:
    """Nor is anything looked at of so many logits that ignored rows would be left out on the CPU."""
    batch, options = batch_on("meta", case, num_rows=1000, num_classes=8000)
    metric = CrossEntropy(class_weight=None if case == "losses" else torch.ones(8000), **options).to("meta")
    with operators:
        metric.update(**batch)
        metric(**batch)
        functional.cross_entropy(**batch, class_weight=metric.class_weight, **options)
    assert_stays(operators, "meta")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_function_never_waits(form: Form, operators: Operators) -> None:
    """All functions run on a device without data."""
    batch, options = (
        {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in values.items()}
        for values in (form.batches()[0], form.options)
    )
    with operators:
        form.function(**batch, **options)
    assert_stays(operators, "meta")


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("case", CASES)
def test_only_the_checks_of_the_cpu_look_at_values(case: str, operators: Operators) -> None:
    """Without the checks that are free on the CPU, not one value is read back there either."""
    batch, options = batch_on("cpu", case)
    metric = CrossEntropy(**options)
    with operators:
        metric.update(**batch)
        metric(**batch)
        functional.cross_entropy(**batch, **options)
    assert_stays(operators, "cpu")


def test_checks_of_the_cpu_are_few(operators: Operators) -> None:
    """An update without bad values reads the extremes of its targets and weights, and whether some are ignored."""
    with operators:
        CrossEntropy().update(torch.zeros(4, K), torch.zeros(4, dtype=torch.int64), weight=torch.ones(4))
    assert operators.count("_local_scalar_dense") <= 5


def test_result_is_a_float64_scalar() -> None:
    """Whatever goes in, out comes a float64 scalar without a graph."""
    for dtype, soft in itertools.product((torch.float16, torch.float64), (False, True)):
        preds = torch.randn(3, K, dtype=dtype, requires_grad=True)
        target = torch.rand(3, K).softmax(-1) if soft else torch.zeros(3, dtype=torch.uint8)
        for function in ALL:
            value = function(preds, target)
            assert (value.dtype, value.shape, value.requires_grad) == (torch.float64, (), False)


@pytest.mark.parametrize("function", [functional.tally, functional.per_target_losses, functional.perplexity])
def test_anything_but_a_tensor_is_refused(function) -> None:
    """A list is told how to become a tensor, by every function."""
    with pytest.raises(TypeError, match="`preds` must be a tensor, got list"):
        function([[0.5, 0.5]], torch.tensor([0]))
