"""The independent judge: every quantity from plain Python floats, with `math.fsum`, rationals and SciPy's quantiles.

It imports neither torch nor the package that it judges. A batch is a list of sequences, a sequence a list of `Target`s.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from scipy.special import stdtrit

LN_2 = math.log(2)


class Target(NamedTuple):
    """A scored target: its loss in nats, what it adds to the denominator, and its weight."""

    loss: float
    norm: float = 1.0
    weight: float = 1.0


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Log-probabilities of one row of logits."""
    top = max(logits)
    log_sum = math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - top - log_sum for x in logits]


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
    if isinstance(target, int) and not 0 <= target < num_classes:
        raise IndexError(f"target {target} is not in [0, {num_classes})")
    weights = class_weight or [1.0] * num_classes
    smooth = label_smoothing / num_classes
    if isinstance(target, int):
        spread = [smooth * w for w in weights]
        spread[target] += (1 - label_smoothing) * weights[target]
    else:
        spread = [w * ((1 - label_smoothing) * p + smooth) for w, p in zip(weights, target, strict=True)]
    return math.fsum(-c * q for c, q in zip(spread, log_probs, strict=True) if c != 0)


def target_norm(target: int | Sequence[float], class_weight: Sequence[float] | None = None) -> float:
    """What a target adds to the denominator: its class weight if it is a class, 1 if it is a distribution."""
    return class_weight[target] if class_weight and isinstance(target, int) else 1.0


def scored(sequences: Sequence[Sequence[Target]]) -> list[list[Target]]:
    """Leave out targets of weight 0, whatever their loss; a weight that is negative or NaN is a mistake."""
    if not all(t.weight >= 0 for sequence in sequences for t in sequence):
        raise ValueError("a weight is negative or NaN")
    return [[t for t in sequence if t.weight > 0] for sequence in sequences]


def num_nonfinite(sequences: Sequence[Sequence[Target]]) -> int:
    """Count scored targets with an infinite or NaN loss."""
    return sum(not math.isfinite(t.loss) for sequence in scored(sequences) for t in sequence)


def finite(sequences: Sequence[Sequence[Target]]) -> list[list[Target]]:
    """Leave out targets with an infinite or NaN loss."""
    return [[t for t in sequence if math.isfinite(t.loss)] for sequence in sequences]


def cross_entropy(sequences: Sequence[Sequence[Target]], nan_policy: str = "propagate") -> float:
    """All weighted nats over all weight; NaN without targets."""
    kept = finite(scored(sequences)) if nan_policy == "omit" else scored(sequences)
    targets = [t for sequence in kept for t in sequence]
    losses = [t.weight * t.loss for t in targets]
    if any(math.isnan(x) for x in losses) or {math.inf, -math.inf} <= set(losses):
        return math.nan
    weight = math.fsum(t.weight * t.norm for t in targets)
    return math.fsum(losses) / weight if weight else math.nan


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / LN_2


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits that all the tokens cost over the bytes that they stand for; NaN without bytes."""
    return total_nats / LN_2 / num_bytes if num_bytes else math.nan


def perplexity(nats: float) -> float:
    """Number of equally likely outcomes of this cross-entropy."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def stderr(sequences: Sequence[Sequence[Target]], nan_policy: str = "propagate") -> float:
    """Standard error of the cross-entropy by the ratio estimator, clustered by sequence; NaN below two of them."""
    kept = finite(scored(sequences)) if nan_policy == "omit" else scored(sequences)
    if any(not math.isfinite(t.loss) for sequence in kept for t in sequence):
        return math.nan
    sums = [
        (math.fsum(t.weight * t.loss for t in sequence), math.fsum(t.weight * t.norm for t in sequence))
        for sequence in kept
    ]
    sums = [(loss, weight) for loss, weight in sums if weight > 0]
    if len(sums) < 2:
        return math.nan
    total, weight = math.fsum(s for s, _ in sums), math.fsum(w for _, w in sums)
    residuals = math.fsum((s - total / weight * w) ** 2 for s, w in sums)
    return math.sqrt(len(sums) / (len(sums) - 1) * residuals) / weight


def interval(
    sequences: Sequence[Sequence[Target]], confidence: float = 0.95, nan_policy: str = "propagate"
) -> tuple[float, float]:
    """Student's interval around the cross-entropy, of the effective number of sequences less 1."""
    mean = cross_entropy(sequences, nan_policy)
    weights = [math.fsum(t.weight * t.norm for t in sequence) for sequence in finite(scored(sequences))]
    squares = math.fsum(w * w for w in weights)
    freedom = max(math.fsum(weights) ** 2 / squares - 1, 0.25) if squares else 1.0
    margin = float(stdtrit(freedom, 0.5 + confidence / 2)) * stderr(sequences, nan_policy)
    return mean - margin, mean + margin


def entropy(probs: Sequence[float]) -> float:
    """Entropy of a distribution in nats."""
    return math.fsum(-p * math.log(p) for p in probs if p > 0)


def kl_divergence(probs: Sequence[float], log_probs: Sequence[float]) -> float:
    """Nats that a code made for `log_probs` wastes on `probs`."""
    return math.fsum(p * (math.log(p) - q) for p, q in zip(probs, log_probs, strict=True) if p > 0)


def binary_cross_entropy(score: float, target: float, form: str = "logits", eps: float | None = None) -> float:
    """Loss of one target in [0, 1] against a logit or the probability of 1 (clipped if there is an `eps`)."""
    if form == "logits":
        return max(score, 0.0) - score * target + math.log1p(math.exp(-abs(score)))
    return target_loss(log_probabilities([1 - score, score], "probs", eps), [1 - target, target])


def normalized_cross_entropy(nats: float, frequencies: Sequence[float]) -> float:
    """Cross-entropy over the entropy of the classes seen; NaN where only one was seen."""
    total = math.fsum(frequencies)
    base = entropy([x / total for x in frequencies]) if total else 0.0
    return nats / base if base else math.nan


def entropy_rate(transitions: Sequence[Sequence[float]], steps: int = 10_000) -> float:
    """Nats per symbol of an aperiodic Markov chain, from the distribution that its transitions settle in."""
    states = range(len(transitions))
    stationary = [1 / len(transitions)] * len(transitions)
    for _ in range(steps):
        stationary = [math.fsum(stationary[i] * transitions[i][j] for i in states) for j in states]
    return math.fsum(p * entropy(row) for p, row in zip(stationary, transitions, strict=True))


def correctly_rounded_mean(losses: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean as a rational, rounded once."""
    total = sum(Fraction(x) * Fraction(w) for x, w in zip(losses, weights, strict=True))
    weight = sum(map(Fraction, weights))
    return float(total / weight) if weight else math.nan


def total_in_units(values: Sequence[float]) -> int:
    """Sum of values in units of 2**-64, each rounded half to even: the law of the tally."""
    return sum(round(Fraction(x) * 2**64) for x in values)
