"""What an interval promises: it covers, and a standard error is right or NaN; judged by rationals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from tests import coverage
from tests.strategies import relaxed, tally_of
from xent_metrics import _runtime, functional
from xent_metrics.losses import TargetLosses
from xent_metrics.readings import DeviceReading, ExactReading
from xent_metrics.tally import tally_losses

RIGHT = 1.001e-3
NEGLIGIBLE = 2.0**-22  # Of the losses: what is less may read as 0. A standard error is the norm over the weight.


def doubles(rows: list[list[float]]) -> torch.Tensor:
    """Return losses, or weights, of sequences."""
    return torch.tensor(rows, dtype=torch.float64)


def exact_stderr(losses: torch.Tensor, weight: torch.Tensor) -> tuple[float, float]:
    """Work out the ratio estimator over what was given, and what it would be if losses themselves were residuals."""
    pairs = [
        (sum(Fraction(x * w) for x, w in zip(*row, strict=True)), sum(map(Fraction, row[1])))
        for row in zip(losses.tolist(), weight.tolist(), strict=True)
    ]
    count, total = len(pairs), sum(w for _, w in pairs)
    mean = sum(s for s, _ in pairs) / total
    norms = sum((s - mean * w) ** 2 for s, w in pairs), sum(s * s for s, _ in pairs)
    # A rational may be less than the least float before its root is taken.
    first, second = (math.sqrt(Fraction(count, count - 1) * x * 2**400 / total**2) * 2.0**-200 for x in norms)
    return first, second


def check_right_or_nan(losses: torch.Tensor, weight: torch.Tensor) -> tuple[float, float]:
    """Compare both readings with the rational; return them."""
    tally = tally_of(losses, weight)
    read = ExactReading(tally.totals()).cross_entropy_stderr, DeviceReading(tally).cross_entropy_stderr.item()
    expected, size = exact_stderr(losses, weight)
    for stderr in read:
        right = math.isnan(stderr) or math.isclose(stderr, expected, rel_tol=RIGHT)
        assert right or (stderr == 0.0 and expected <= NEGLIGIBLE * size), (stderr, expected, size)
    return read


@st.composite
def magnitudes(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses around one number, of any magnitude and spread, and weights that may dwarf one another."""
    rows, length = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    center = draw(st.sampled_from([0.0, 1.0, -1.0])) * 10 ** draw(st.floats(-15.0, 9.0))
    spread = 10 ** draw(st.floats(-15.0, 9.0))
    unit = st.floats(-1.0, 1.0)
    weights = st.just(1.0) | st.floats(-12.0, 7.0).map(lambda x: 10**x)
    one = draw(weights)
    losses = [[center + spread * draw(unit) for _ in range(length)] for _ in range(rows)]
    weight = [[draw(st.just(one) | weights) for _ in range(length)] for _ in range(rows)]
    return doubles(losses), doubles(weight)


@relaxed
@given(magnitudes())
@example((doubles([[3e-11], [1e-11]]), doubles([[1.0], [1.0]])))
@example((doubles([[1e-10], [3e-10]]), doubles([[1.0], [1.0]])))
@example((doubles([[1e-12] * 4, [3e-12] * 4]), doubles([[1.0] * 4, [1.0] * 4])))
@example((doubles([[1.0], [1.0 + 1e-9]]), doubles([[1.0], [1.0]])))
@example((doubles([[1.0], [2.0], [3.0]]), doubles([[2.0**25], [1e-9], [1e-9]])))
@example((doubles([[1.0], [1.0], [1.0]]), doubles([[1.0], [1.0 + 2**-37], [2.0**-20]])))
@example((doubles([[2.0**25], [-(2.0**25)], [0.1]]), doubles([[1.0], [1.0], [1.0]])))
def test_a_standard_error_is_right_or_nan(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """It is within 1e-3 of the rational one, whatever the magnitudes; or NaN; or 0 where it is negligible."""
    check_right_or_nan(*batch)


def test_magnitudes_one_by_one() -> None:
    """From 1e-15 to 1e9 nats, spread as they are or far less, on the host and on the device."""
    generator = torch.Generator().manual_seed(9)
    given = dict.fromkeys(range(-15, 10), False)
    for exponent, spread, length in itertools.product(given, (1.0, 1e-3, 1e-6, 1e-9, 1e-12), (1, 3, 100)):
        drawn = torch.randn(4, length, generator=generator, dtype=torch.float64)
        read = check_right_or_nan(10.0**exponent * (1 + spread * drawn), torch.ones(4, length, dtype=torch.float64))
        if spread == 1.0 and length == 1:
            given[exponent] = not any(map(math.isnan, read))

    # In between there is an interval: from a thousand units on, up to sequences that are too wide.
    assert [exponent for exponent, is_there in given.items() if is_there] == list(range(-7, 8))


def test_a_few_units_are_not_a_standard_error() -> None:
    """Losses that are cut to nothing, or to a few units, read as NaN, however many there are."""
    for size in (1e-15, 1e-12, 3e-11, 1e-10, 1e-9):
        losses = size * torch.rand(1000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert all(map(math.isnan, check_right_or_nan(losses, torch.ones_like(losses))))


@pytest.mark.parametrize("rows", [2, 3, 1000])
@pytest.mark.parametrize("loss", [0.0, 2.0**-14, math.log(8), math.log(128_256), -math.log(3), 1e5 / 3])
def test_a_true_zero_stays(rows: int, loss: float) -> None:
    """Where all losses are the same, as those of a uniform model are, there is nothing to be uncertain of."""
    losses = torch.full((rows, 7), loss, dtype=torch.float64)
    weight = torch.ones_like(losses)
    weight[0, 3:] = 0
    exact, device = check_right_or_nan(losses, weight)
    assert exact == 0.0
    assert device == 0.0 or (loss == 2.0**-14 and math.isnan(device))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    "whole", [2**26 - 1, *(pytest.param(x, marks=pytest.mark.slow) for x in (2**26 - 2**20, 2**25)), 2**26]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_sequence_is_as_wide_as_its_sum(
    whole: int, share: float, hidden: bool, hide_values: Callable[[], None]
) -> None:
    """Fractions of many targets may add up to as much as their whole nats do; the products must not wrap."""
    if hidden:
        hide_values()
    length = 2**16
    # Limbs of whole nats and of 2**-32 nats, each as if it were small.
    loss, rest = whole // length + share * (1 - 2.0**-20), whole % length
    row = [loss + rest, *[loss] * (length - 1)]
    totals = tally_losses(TargetLosses(doubles([row, [0.0] * length]))).totals()
    total = Fraction(row[0]) + (length - 1) * Fraction(loss)
    fits = total < 2**26
    assert totals.wide_sequences == (not fits)
    assert totals.loss_loss == (total * 2**36) ** 2 * fits


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("length", [2**25 - 1, 2**26 - 1])
def test_many_targets_of_almost_2_nats(length: int) -> None:
    """A sequence of so many targets has a standard error that is right, or none."""
    loss = torch.tensor(2.0 - 2.0**-23)
    one = torch.stack([loss, loss - 2.0**-22]).view(2, 1).expand(2, length)
    totals = tally_losses(TargetLosses(one)).totals()
    first, second = (Fraction(x.item()) for x in (loss, loss - 2.0**-22))
    expected = float(abs(first - second) / 2)

    stderr = ExactReading(totals).cross_entropy_stderr
    assert math.isclose(stderr, expected, rel_tol=RIGHT) if length < 2**25 else math.isnan(stderr)


def freedom_of(weight: torch.Tensor) -> float:
    """Return the effective number of sequences less 1."""
    return (weight.sum().square() / weight.square().sum()).item() - 1


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.9999])
@pytest.mark.parametrize(
    "weights", [[1.0, 1.0], [1.0, 2.0], [3.0, 1.0, 2.0], [1.0] * 100, [30.0, *[1.0] * 9], [0.1, 7.0]]
)
def test_an_interval_has_the_degrees_of_freedom_of_its_weights(weights: list[float], confidence: float) -> None:
    """The number of standard errors is the quantile of the effective number of sequences, on host and device."""
    weight = doubles([[w] for w in weights])
    losses = torch.rand(len(weights), 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tally = tally_of(losses, weight)
    quantile = stats.t.isf((1 - confidence) / 2, max(freedom_of(weight), 0.25))
    for reading, rel in (
        (ExactReading(tally.totals(), confidence=confidence), 1e-9),
        (DeviceReading(tally, confidence=confidence), 1e-6),
    ):
        nats, stderr = float(reading.cross_entropy), float(reading.cross_entropy_stderr)
        assert float(reading.cross_entropy_upper) == pytest.approx(nats + quantile * stderr, rel=rel)
        assert float(reading.cross_entropy_lower) == pytest.approx(nats - quantile * stderr, rel=rel)


def test_a_device_without_float64_has_the_same_quantile(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the number of standard errors is right to 1e-5."""
    monkeypatch.setattr(_runtime, "widest_float", lambda _: torch.float32)
    for rows in (2, 3, 10, 1000):
        losses = torch.rand(rows, 1, generator=torch.Generator().manual_seed(3))
        reading = DeviceReading(tally_of(losses))
        margin = reading.cross_entropy_upper - reading.cross_entropy
        expected = stats.t.isf(0.025, rows - 1)
        assert (margin / reading.cross_entropy_stderr).item() == pytest.approx(expected, rel=1e-4)


def test_the_difference_of_two_models_has_the_same_interval() -> None:
    """Two sequences have one degree of freedom, whatever is read of them."""
    losses, target = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1, dtype=torch.int64)
    value = functional.cross_entropy_difference(torch.zeros(2, 1), losses, target, input="losses")
    width = (value["difference_upper"] - value["difference"]).item()
    assert width == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)


@pytest.mark.parametrize("sequences", [2, 5])
def test_an_interval_covers_what_it_promises(sequences: int) -> None:
    """With few sequences a normal quantile would cover 70 % or 88 %."""
    before, now = coverage.covered(500, sequences, "equal", "normal")
    assert before < 0.92
    assert 0.92 <= now <= 0.98  # Three standard errors of a share of 0.95.


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sequences", coverage.NUMBERS)
@pytest.mark.parametrize(("lengths", "kind"), [(x, y) for x in coverage.LENGTHS for y in coverage.KINDS])
def test_every_interval_covers(sequences: int, lengths: str, kind: str) -> None:
    """Of 2,000 sets each; the more skewed the losses of sequences, the less."""
    _, now = coverage.covered(2000, sequences, lengths, kind, seed=1)
    least = {"normal": 0.93, "skewed": 0.93 if lengths == "equal" else 0.91, "very skewed": 0.86}[kind]
    assert least <= now <= (0.97 if lengths == "equal" else 0.98)
