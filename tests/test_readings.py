"""Readings of a tally, judged by rationals and by 60 decimal digits."""

from __future__ import annotations

import math
import sys
from decimal import Context, Decimal
from fractions import Fraction
from typing import get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import UNIT, Batch, batches, ordinary_losses, ordinary_weights, relaxed, tally_of
from xent_metrics import Tally, _runtime, functional
from xent_metrics.losses import TargetLosses
from xent_metrics.losses.target_losses import LIMIT, TARGET_OUT_OF_RANGE
from xent_metrics.readings import DeviceReading, ExactReading, NanPolicy, check_reading, check_valid
from xent_metrics.tally import tally_losses

DECIMAL = Context(prec=60)
PROPERTIES = (
    "cross_entropy",
    "bits_per_token",
    "perplexity",
    "cross_entropy_stderr",
    "cross_entropy_lower",
    "cross_entropy_upper",
    "perplexity_lower",
    "perplexity_upper",
)


def read(losses: torch.Tensor, weight: torch.Tensor | None = None, **options: object) -> ExactReading:
    """Read losses on the host."""
    return ExactReading(tally_of(losses, weight).totals(), **options)


def doubles(*values: float) -> torch.Tensor:
    """Return losses that are sequences of one target each."""
    return torch.tensor(values, dtype=torch.float64)


def same(x: float, y: float, rel: float = 0.0, tol: float = 0.0) -> bool:
    """Say whether two numbers agree, NaN with NaN and infinity with infinity."""
    return math.isclose(x, y, rel_tol=rel, abs_tol=tol) or (math.isnan(x) and math.isnan(y))


def weighted(batch: Batch) -> list[list[tuple[float, float]]]:
    """List, for each sequence, the float64 product of weight and loss, and the weight, of what is scored."""
    weight = torch.ones_like(batch.losses) if batch.weight is None else batch.weight
    rows = zip(batch.losses.tolist(), weight.tolist(), strict=True)
    return [[(loss * w, w) for loss, w in zip(*row, strict=True) if w] for row in rows]


def ratio_stderr(batch: Batch) -> tuple[float, float]:
    """Work out the ratio estimator, and how far the library may be from it.

    Loss and weight of a sequence are each cut by less than `2**-36`, so that its residual is off by less than
    `(1 + |mean|) * 2**-36`, and the root of the sum of C squares by less than `sqrt(C)` times that. What is less than
    that is read as 0, which may double the error.
    """
    rows = [row for row in weighted(batch) if row]
    sums = [(sum(Fraction(product) for product, _ in row), sum(Fraction(w) for _, w in row)) for row in rows]
    count, norm = len(sums), sum(w for _, w in sums)
    if count < 2:
        return math.nan, 0.0
    mean = sum(s for s, _ in sums) / norm
    squares = sum((s - mean * w) ** 2 for s, w in sums)
    stderr = math.sqrt(Fraction(count, count - 1) * squares / norm**2)
    cut = count / math.sqrt(count - 1) * (1 + abs(mean)) / norm * 2.0**-36
    return stderr, 2 * float(cut)


@relaxed
@given(batches())
def test_cross_entropy_is_correctly_rounded(batch: Batch) -> None:
    """The mean is the rational mean rounded once; what no limb holds is left out or makes what IEEE addition makes."""
    terms = [term for row in weighted(batch) for term in row]
    finite = [term for term in terms if abs(term[0]) < LIMIT]
    unsummed = [product * math.inf for product, _ in terms if not abs(product) < LIMIT]
    loss, weight = (sum(round(Fraction(x) * UNIT) for x in column) for column in zip(*finite, (0, 0), strict=True))
    mean = float(Fraction(loss, weight)) if weight else math.nan
    totals = batch.tally().totals()

    assert same(ExactReading(totals, "omit").cross_entropy, mean)
    assert same(ExactReading(totals).cross_entropy, sum(unsummed) if unsummed else mean)
    assert ExactReading(totals).num_nonfinite == len(unsummed)
    assert ExactReading(totals).num_tokens == len(terms)
    assert ExactReading(totals).num_ignored == batch.losses.numel() - len(terms)


@relaxed
@given(st.floats(-800.0, 800.0) | st.floats(-1.0, 1.0), st.integers(1, 7))
@example(1e-300, 1)
@example(-0.0, 3)
def test_units_are_correctly_rounded(loss: float, count: int) -> None:
    """Bits and perplexity are those of the rational mean, with no rounding but the last."""
    mean = Fraction(round(Fraction(loss) * UNIT), count * UNIT)
    nats = DECIMAL.divide(Decimal(mean.numerator), Decimal(mean.denominator))
    reading = read(doubles(loss, *[0.0] * (count - 1)))

    assert reading.bits_per_token == float(DECIMAL.divide(nats, DECIMAL.ln(Decimal(2))))
    assert reading.perplexity == float(DECIMAL.exp(nats))


def test_perplexity_overflows_only_where_it_must() -> None:
    """Perplexity is infinite beyond the largest float64 alone, and 0 only where it underflows."""
    last = math.log(sys.float_info.max)

    assert sys.float_info.max * (1 - 1e-12) < read(doubles(last)).perplexity < math.inf
    assert read(doubles(math.nextafter(last, math.inf))).perplexity == math.inf
    for loss in (1000.0, 1001.0, 2.0**93, math.inf):
        assert (read(doubles(loss)).perplexity, read(doubles(-loss)).perplexity) == (math.inf, 0.0)
    assert read(doubles(-745.0)).perplexity == 5e-324


@pytest.mark.parametrize(
    ("logits", "target", "nats", "perplexity"),
    [([2.0, 1.0, 0.1], 0, 0.41703, 1.51745), ([0.0] * 8, 3, math.log(8), 8), ([0.0] * 100, 7, math.log(100), 100)],
)
def test_worked_values(logits: list[float], target: int, nats: float, perplexity: float) -> None:
    """Values that any reader can check: uniform over 8 classes is 3 bits and perplexity 8."""
    reading = ExactReading(functional.tally(torch.tensor([logits]), torch.tensor([target])).totals())

    assert reading.cross_entropy == pytest.approx(nats, rel=1e-5)
    assert reading.bits_per_token == pytest.approx(math.log2(perplexity), rel=1e-5)
    assert reading.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert reading.perplexity == pytest.approx(2**reading.bits_per_token)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("losses", "propagated", "omitted"),
    [
        ([1.0, INF], INF, 1.0),
        ([1.0, -INF], -INF, 1.0),
        ([1.0, NAN], NAN, 1.0),
        ([INF, -INF, 2.0], NAN, 2.0),
        ([INF, NAN, 2.0, 3.0], NAN, 2.5),
        ([LIMIT, 1.0], INF, 1.0),
        ([-INF], -INF, NAN),
        ([NAN], NAN, NAN),
    ],
)
def test_nan_policy(losses: list[float], propagated: float, omitted: float) -> None:
    """Non-finite losses propagate as in IEEE addition, are left out, or raise (on the device: read as NaN)."""
    tally = tally_of(doubles(*losses))
    bad = len(losses) - sum(abs(x) < LIMIT for x in losses)
    for policy, expected in (("propagate", propagated), ("omit", omitted), ("raise", NAN)):
        device = DeviceReading(tally, policy)
        exact = ExactReading(tally.totals(), policy)

        assert same(device.cross_entropy.item(), expected)
        assert device.num_nonfinite == exact.num_nonfinite == bad
        if policy == "raise":
            with pytest.raises(ValueError, match=rf"nan_policy='raise'.* of {len(losses)} losses"):
                _ = exact.cross_entropy
        else:
            assert same(exact.cross_entropy, expected)
            assert same(exact.bits_per_token, expected / math.log(2), rel=1e-15)
            assert same(exact.perplexity, math.exp(expected), rel=1e-15)


def test_raise_policy_lets_finite_losses_pass() -> None:
    """`nan_policy="raise"` reads finite losses like the other two."""
    tally = tally_of(doubles(1.0, 2.0))

    assert ExactReading(tally.totals(), "raise").cross_entropy == 1.5
    assert DeviceReading(tally, "raise").cross_entropy.item() == 1.5


@pytest.mark.parametrize("policy", get_args(NanPolicy))
def test_no_targets_read_as_nan(policy: NanPolicy) -> None:
    """Without a scored target every reading is NaN, on the host and on the device, and nothing raises."""
    ignored = tally_of(doubles(math.nan, 1.0), torch.tensor([False, False]))
    for tally in (Tally.zero(), ignored, tally_of(torch.zeros(0, 5))):
        for name in PROPERTIES:
            assert math.isnan(getattr(ExactReading(tally.totals(), policy), name))
            assert getattr(DeviceReading(tally, policy), name).isnan()
        assert ExactReading(tally.totals()).num_tokens == DeviceReading(tally).num_tokens == 0
    assert ExactReading(ignored.totals()).num_ignored == DeviceReading(ignored).num_ignored == 2


def test_device_reads_nan_for_what_the_host_refuses() -> None:
    """A target out of range or an invalid weight raises on the host and reads as NaN on the device."""
    loss, weight = torch.ones(1, 2), torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    outside = tally_losses(TargetLosses(loss).marked(TARGET_OUT_OF_RANGE, weight < 0))
    invalid = tally_losses(TargetLosses(loss).weighted(weight))
    for tally, message in ((outside, "`target` .*1 targets were outside"), (invalid, "`weight` .* 1 were not")):
        with pytest.raises(ValueError, match=message):
            check_valid(tally.totals())
        for name in PROPERTIES:
            assert getattr(DeviceReading(tally), name).isnan()
    check_valid(tally_of(loss).totals())


@relaxed
@given(batches(ordinary_losses(), ordinary_weights(), min_rows=1))
def test_stderr_is_the_ratio_estimator(batch: Batch) -> None:
    """The standard error is that of Fractions, up to what cutting sequences to units of `2**-36` can do."""
    expected, tolerance = ratio_stderr(batch)

    stderr = read(*batch).cross_entropy_stderr
    if math.isnan(stderr):  # What was cut may be a thousandth of it.
        assert math.isnan(expected) or expected <= 1001 * tolerance
    else:
        assert same(stderr, expected, rel=1e-14, tol=tolerance)


@pytest.mark.parametrize("shape", [(300,), (60, 25), (40, 5, 3)])
@pytest.mark.parametrize("kind", ["plain", "ragged", "weighted"])
def test_stderr_of_ordinary_losses(shape: tuple[int, ...], kind: str) -> None:
    """The standard error is right to 1e-9 relative on the host and 1e-6 on the device, for sequences of any lengths."""
    generator = torch.Generator().manual_seed(4)
    losses = torch.randn(shape, generator=generator).exp()
    weight = torch.rand(shape, generator=generator, dtype=torch.float64)
    weight = {"plain": None, "ragged": (weight < 0.7).double(), "weighted": weight}[kind]
    rows = Batch(*(None if x is None else x.reshape(shape[0], -1) for x in (losses, weight)))
    tally = tally_of(losses, weight)
    expected, _ = ratio_stderr(rows)

    assert ExactReading(tally.totals()).cross_entropy_stderr == pytest.approx(expected, rel=1e-9)
    assert DeviceReading(tally).cross_entropy_stderr.item() == pytest.approx(expected, rel=1e-6)


def test_stderr_does_not_depend_on_batches() -> None:
    """The standard error has the same bits for any batches of whole sequences."""
    losses = torch.randn(30, 4, generator=torch.Generator().manual_seed(5)).exp()
    for size in (1, 7, 30):
        total = sum((tally_of(part) for part in losses.flip(0).split(size)), Tally.zero())

        assert ExactReading(total.totals()) == read(losses)
        assert ExactReading(total.totals()).cross_entropy_stderr == read(losses).cross_entropy_stderr


def test_stderr_of_equal_losses_is_zero() -> None:
    """Sequences of the same loss per weight have a standard error of exactly 0, ragged or weighted or not."""
    generator = torch.Generator().manual_seed(6)
    for trial in range(200):
        rows, length = torch.randint(2, 30, (2,), generator=generator).tolist()
        losses = (torch.rand((), generator=generator) * 20 - 5).expand(rows, length)
        weight = torch.rand(rows, length, generator=generator, dtype=torch.float64)
        weight = (None, (weight < 0.6).double(), weight + 0.5)[trial % 3]
        if weight is not None:
            weight[:, 0] = 1
        if trial % 5 == 0:  # The same sequence again and again.
            losses, weight = torch.randn(length, generator=generator).expand(rows, length), None
        tally = tally_of(losses, weight)
        device = DeviceReading(tally).cross_entropy_stderr.item()

        assert ExactReading(tally.totals()).cross_entropy_stderr == 0.0
        assert 0.0 <= device < 1e-6


@relaxed
@given(batches())
def test_stderr_is_never_negative(batch: Batch) -> None:
    """Whatever the losses and weights, a standard error is NaN or at least 0, and the mean is between its limits."""
    for reading in (read(*batch), DeviceReading(batch.tally())):
        stderr, lower, upper = (
            float(getattr(reading, f"cross_entropy_{name}")) for name in ("stderr", "lower", "upper")
        )

        assert math.isnan(stderr) or (stderr >= 0.0 and lower <= float(reading.cross_entropy) <= upper)
        assert math.isnan(stderr) == math.isnan(lower) == math.isnan(upper)


@pytest.mark.parametrize(
    ("losses", "weight", "mean"),
    [
        ([[1.0, 2.0]], [[1.0, 1.0]], 1.5),  # One sequence.
        ([[1.0], [5.0]], [[1.0], [0.0]], 1.0),  # One that counts.
        ([[1.0], [3.0]], [[1e-12], [1e-12]], 2.0),  # Weights of a few units, which are mostly rounding.
        ([[2.0**26], [0.0]], [[1.0], [1.0]], 2.0**25),  # Too large to be squared.
        ([[-(2.0**80)], [0.0]], [[1.0], [1.0]], -(2.0**79)),
        ([[1.0], [3.0]], [[2.0**26], [2.0**26]], 2.0),
        ([[math.inf], [1.0], [2.0]], [[1.0], [1.0], [1.0]], math.inf),
        ([[math.nan], [1.0], [2.0]], [[1.0], [1.0], [1.0]], math.nan),
    ],
)
def test_interval_alone_becomes_nan(losses: list[list[float]], weight: list[list[float]], mean: float) -> None:
    """Where there is no trustworthy interval it reads as NaN, and the mean is read as ever."""
    tally = tally_of(torch.tensor(losses, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64))
    for reading in (ExactReading(tally.totals()), DeviceReading(tally)):
        assert same(float(reading.cross_entropy), mean, rel=1e-7)  # 1e-12 is so many units, rounded.
        for name in PROPERTIES[3:]:
            assert math.isnan(getattr(reading, name))


def test_interval_just_below_the_bound() -> None:
    """The interval is there up to sequences of `2**26` nats."""
    edge = 2.0**26 - 2.0**-26
    expected, tolerance = ratio_stderr(Batch(doubles(edge, -edge, 0.0).view(3, 1), None))

    assert same(read(doubles(edge, -edge, 0.0)).cross_entropy_stderr, expected, rel=1e-14, tol=tolerance)


def test_interval_without_the_non_finite() -> None:
    """With `nan_policy="omit"` the interval is that of the losses that are left."""
    assert read(doubles(1.0, math.inf, 2.0), nan_policy="omit").cross_entropy_stderr == pytest.approx(0.5)


@pytest.mark.parametrize(("confidence", "width"), [(0.95, 4.302652729696142), (0.5, 0.816496580927726)])
def test_interval(confidence: float, width: float) -> None:
    """Three sequences have 2 degrees of freedom, and the interval of perplexity is the exponential of theirs."""
    tally = tally_of(doubles(1.0, 2.0, 4.0))
    exact = ExactReading(tally.totals(), confidence=confidence)
    device = DeviceReading(tally, confidence=confidence)

    assert exact.cross_entropy_upper == pytest.approx(exact.cross_entropy + width * exact.cross_entropy_stderr)
    assert exact.cross_entropy_lower == pytest.approx(exact.cross_entropy - width * exact.cross_entropy_stderr)
    for end in ("lower", "upper"):
        nats = getattr(exact, f"cross_entropy_{end}")
        assert getattr(exact, f"perplexity_{end}") == float(DECIMAL.exp(Decimal(nats)))
    for name in PROPERTIES:
        assert getattr(device, name).item() == pytest.approx(getattr(exact, name), rel=1e-12)


def test_interval_covers() -> None:
    """Intervals of 95% cover the true mean in about 95% of 400 draws, though the tokens of a sequence are alike."""
    generator = torch.Generator().manual_seed(7)
    covered = 0
    for _ in range(400):
        losses = 3 + torch.randn(50, 1, generator=generator) + torch.randn(50, 20, generator=generator) / 2
        reading = read(losses)
        covered += reading.cross_entropy_lower <= 3 <= reading.cross_entropy_upper

    assert 0.92 * 400 <= covered <= 0.98 * 400  # Three standard errors of a share of 0.95.


@relaxed
@given(batches())
@example(Batch(doubles(-(2.0**-64)).view(1, 1), None))
@example(Batch(doubles(2.0**93, -(2.0**93), -1e-9).view(1, 3), None))
def test_device_agrees_with_host(batch: Batch) -> None:
    """Means on the device agree with the host to 1e-13, for negative, tiny and non-finite losses too."""
    tally = batch.tally()
    device, exact = DeviceReading(tally), ExactReading(tally.totals())
    relative = 1e-13 * (1 + min(abs(exact.cross_entropy), 1e3))  # An error of the exponent, in perplexity.

    assert device.cross_entropy.dtype == torch.float64
    assert same(device.cross_entropy.item(), exact.cross_entropy, rel=1e-13)
    assert same(device.bits_per_token.item(), exact.bits_per_token, rel=1e-13)
    assert same(device.perplexity.item(), exact.perplexity, rel=relative, tol=1e-300)
    assert same(DeviceReading(tally + Tally.zero()).cross_entropy.item(), exact.cross_entropy, rel=1e-13)


def test_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a device has no float64 (here: is said to have none) its readings are float32, and right to 1e-5."""
    tally = tally_of(torch.randn(20, 8, generator=torch.Generator().manual_seed(8)).exp())
    monkeypatch.setattr(_runtime, "widest_float", lambda _: torch.float32)
    device, exact = DeviceReading(tally), ExactReading(tally.totals())
    for name in PROPERTIES:
        assert getattr(device, name).dtype == torch.float32
        assert getattr(device, name).item() == pytest.approx(getattr(exact, name), rel=1e-5)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, True, math.nan])
def test_bad_confidence(confidence: float) -> None:
    """A confidence that is no probability is refused."""
    with pytest.raises(ValueError, match=r"`confidence` must be a float between 0 and 1, got"):
        check_reading("propagate", confidence)


def test_bad_nan_policy() -> None:
    """A policy that is none of the three is refused, with the three."""
    with pytest.raises(ValueError, match=r"`nan_policy` must be one of \['propagate', 'omit', 'raise'\], got 'warn'"):
        check_reading("warn")
