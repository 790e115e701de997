"""Quantiles of Student's distribution, judged by SciPy, closed forms and 30 decimal digits."""

from __future__ import annotations

import math
from statistics import NormalDist

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from xent_metrics._student import MOST_SHARE, quantile_of_share, student_quantile

CONFIDENCES = (0.5, 0.6827, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.999999)


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_quantiles_are_those_of_scipy(confidence: float) -> None:
    """From 1 to 1e9 degrees of freedom, integers or not; SciPy's own are some 5e-11 off."""
    for i in range(181):
        freedom = 10 ** (i / 20)
        expected = stats.t.isf((1 - confidence) / 2, freedom)

        assert student_quantile(confidence, freedom) == pytest.approx(expected, rel=2e-10)
        assert quantile_of_share(confidence, 1 / (freedom + 1)) == pytest.approx(expected, rel=2e-10)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.5, 0.999999), st.floats(0.0, 5.0).map(lambda x: 10**x) | st.floats(0.25, 4.0))
def test_quantiles_are_right_to_12_digits(confidence: float, freedom: float) -> None:
    """The probability beyond a quantile is what it should be, in 30 digits: an incomplete beta function."""
    with mpmath.workdps(30):
        v = mpmath.mpf(freedom)
        for quantile in (student_quantile(confidence, freedom), quantile_of_share(confidence, 1 / (freedom + 1))):
            t = mpmath.mpf(quantile)
            beyond = mpmath.betainc(v / 2, 0.5, 0, v / (v + t**2), regularized=True)
            density = 2 * (1 + t**2 / v) ** (-(v + 1) / 2) / (mpmath.sqrt(v) * mpmath.beta(v / 2, 0.5))
            assert abs((beyond - (1 - mpmath.mpf(confidence))) / density / t) < 1e-12


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_closed_forms(confidence: float) -> None:
    """One degree of freedom is a tangent, two are a root, and infinitely many are a normal distribution."""
    two = confidence * math.sqrt(2 / ((1 - confidence) * (1 + confidence)))
    for freedom, expected in ((1.0, 1 / math.tan(math.pi * (1 - confidence) / 2)), (2.0, two)):
        assert student_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-12)
        assert quantile_of_share(confidence, 1 / (freedom + 1)) == pytest.approx(expected, rel=1e-12)
    normal = NormalDist().inv_cdf(0.5 + confidence / 2)
    assert student_quantile(confidence, 1e18) == pytest.approx(normal, rel=1e-9)
    assert quantile_of_share(confidence, 0.0) == pytest.approx(normal, rel=1e-9)


@pytest.mark.parametrize("confidence", [5e-324, 1e-17, 0.01, 1 - 2**-40, 1 - 2**-53])
def test_every_confidence_has_a_series(confidence: float) -> None:
    """Confidences that nobody asks for are right to 1e-8, or next to 0."""
    for freedom in (0.25, 0.3, 1.0, 3.3, 50.0, 1e6):
        expected = student_quantile(confidence, freedom)
        assert quantile_of_share(confidence, 1 / (freedom + 1)) == pytest.approx(expected, rel=1e-8, abs=1e-15)


def test_few_degrees_of_freedom_are_a_quarter() -> None:
    """A sequence that outweighs all others has an interval that is wide, and not infinite."""
    assert quantile_of_share(0.95, 1.0) == quantile_of_share(0.95, MOST_SHARE)
    assert quantile_of_share(0.95, 0.9) == pytest.approx(student_quantile(0.95, 0.25), rel=1e-12)
