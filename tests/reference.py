"""The independent judge: every quantity from plain Python floats, with `math.fsum` and rationals.

It imports neither torch nor the package that it judges. A batch is a list of sequences, a sequence a list of `Target`s.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

LN_2 = math.log(2)


class Target(NamedTuple):
    """A scored target: its loss in nats, what it adds to the denominator, and its weight."""

    loss: float
    norm: float = 1.0
    weight: float = 1.0


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Log-probabilities of one row of logits."""
    top = max(logits)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - log_sum for x in logits]


def log_probabilities(row: Sequence[float], form: str = "logits", eps: float | None = None) -> list[float]:
    """Log-probabilities of a row of logits, log-probabilities, or probabilities (clipped if there is an `eps`)."""
    if form == "logits":
        return log_softmax(row)
    if form == "log_probs":
        return list(row)
    clipped = row if eps is None else [min(max(p, eps), 1 - eps) for p in row]
    return [math.log(p) if p > 0 else -math.inf for p in clipped]


def target_loss(
    log_probs: Sequence[float],
    target: int | Sequence[float],
    label_smoothing: float = 0.0,
    class_weight: Sequence[float] | None = None,
) -> float:
    """Loss of one target, a class or a distribution; a class of coefficient 0 adds nothing."""
    num_classes = len(log_probs)
    weights = class_weight or [1.0] * num_classes
    smooth = label_smoothing / num_classes
    if isinstance(target, int):
        spread = [smooth * w for w in weights]
        spread[target] += (1 - label_smoothing) * weights[target]
    else:
        spread = [w * ((1 - label_smoothing) * p + smooth) for w, p in zip(weights, target, strict=True)]
    return math.fsum(-c * q for c, q in zip(spread, log_probs, strict=True) if c != 0)


def finite(sequences: Sequence[Sequence[Target]]) -> list[list[Target]]:
    """Leave out targets with an infinite or NaN loss."""
    return [[t for t in sequence if math.isfinite(t.loss)] for sequence in sequences]


def cross_entropy(sequences: Sequence[Sequence[Target]], nan_policy: str = "propagate") -> float:
    """All weighted nats over all weight; NaN without targets."""
    kept = finite(sequences) if nan_policy == "omit" else sequences
    targets = [t for sequence in kept for t in sequence if t.weight > 0]
    losses = [t.weight * t.loss for t in targets]
    if any(math.isnan(x) for x in losses) or {math.inf, -math.inf} <= set(losses):
        return math.nan
    weight = math.fsum(t.weight * t.norm for t in targets)
    return math.fsum(losses) / weight if weight else math.nan


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / LN_2


def perplexity(nats: float) -> float:
    """Number of equally likely outcomes of this cross-entropy."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def stderr(sequences: Sequence[Sequence[Target]]) -> float:
    """Standard error of the cross-entropy by the ratio estimator, clustered by sequence; NaN below two of them."""
    sums = [
        (math.fsum(t.weight * t.loss for t in sequence), math.fsum(t.weight * t.norm for t in sequence))
        for sequence in sequences
    ]
    sums = [(loss, weight) for loss, weight in sums if weight > 0]
    if len(sums) < 2:
        return math.nan
    total, weight = math.fsum(s for s, _ in sums), math.fsum(w for _, w in sums)
    residuals = math.fsum((s - total / weight * w) ** 2 for s, w in sums)
    return math.sqrt(len(sums) / (len(sums) - 1) * residuals) / weight


def interval(sequences: Sequence[Sequence[Target]], confidence: float = 0.95) -> tuple[float, float]:
    """Normal interval around the cross-entropy."""
    mean = cross_entropy(sequences)
    margin = NormalDist().inv_cdf(0.5 + confidence / 2) * stderr(sequences)
    return mean - margin, mean + margin


def entropy(probs: Sequence[float]) -> float:
    """Entropy of a distribution in nats."""
    return math.fsum(-p * math.log(p) for p in probs if p > 0)


def total_in_units(values: Sequence[float]) -> int:
    """Sum of values in units of 2**-64, each rounded half to even: the law of the tally."""
    return sum(round(Fraction(x) * 2**64) for x in values)
