"""Losses that are infinite or NaN, what is not scored, and batches of any size."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import SCORES
from tests.metrics.bad_input import (
    FUNCTIONS,
    KINDS,
    OF_CLASSES,
    SOFT,
    SPOT,
    Batch,
    bits,
    each_kind,
    main,
    make_batch,
    numbers,
    ones,
    raised,
    with_preds,
)
from xent_metrics import CrossEntropy, CrossEntropyDifference, NormalizedCrossEntropy, functional

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


@pytest.mark.parametrize("num_targets", [3, 300])
def test_products_beyond_all_floats(num_targets: int) -> None:
    """A finite loss times a weight may be more than a float64 holds: that is infinite, without a warning of anybody."""
    losses, target = torch.full((num_targets,), 1e300, dtype=torch.float64), torch.zeros(num_targets, dtype=torch.int64)
    metric = CrossEntropy(input="losses")
    value = metric(losses, target, weight=torch.full_like(losses, 1e10))
    assert value.item() == metric.compute().item() == math.inf
    assert metric.tally.totals().positive_infinite == num_targets


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


BOTH_CALLS = [  # Each loss for each kind by one of the two; by the other one where time does not matter.
    pytest.param(*param.values, call, id=f"{param.id}-{call}", marks=() if (i + j) % 2 else pytest.mark.slow)
    for i, param in enumerate(LOSSES)
    for j, call in enumerate(("update", "forward"))
]


@pytest.mark.parametrize(("name", "form", "bad", "spot", "loss", "call"), BOTH_CALLS)
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


@pytest.mark.parametrize(
    ("name", "form", "bad", "spot", "loss"), [param for param in LOSSES if param.values[0] in FUNCTIONS]
)
def test_losses_that_are_not_finite_in_functions(
    name: str, form: str, bad: float, spot: int | None, loss: float, hide_values: Callable[[], None]
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
    hide_values()
    assert all(map(math.isnan, numbers(call(batch, "raise"))))


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


def test_the_difference_of_two_masks() -> None:
    """Two losses that count as infinite have no difference."""
    preds = torch.tensor([[torch.finfo(torch.float32).min, 0.0], [0.0, 0.0]])
    metric = CrossEntropyDifference()
    metric.update(preds, preds, torch.tensor([0, 1]))
    assert metric.compute()["difference"].isnan()
    assert metric.tally.totals().nonfinite == 1


UNSEEN = "NaN logits where the target is ignored or has weight 0"


def unseen() -> Iterator[Any]:
    """Yield every kind and input, for each way not to score a target, with one of the bad numbers in turn."""
    forms = [(name, form) for name, kind in KINDS.items() for form in kind.inputs]
    for (i, form), (j, how) in itertools.product(enumerate(forms), enumerate(("ignore_index", "weight", "mask"))):
        bad = (math.nan, math.inf, -math.inf)[(i + j) % 3]
        yield pytest.param(*form, bad, how, id=f"{'-'.join(form)}-{bad}-{how}")


@pytest.mark.parametrize(("name", "form", "bad", "how"), [*unseen()])
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


@pytest.mark.parametrize("name", [OF_CLASSES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in OF_CLASSES[1:])])
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
