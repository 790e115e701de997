"""What can be wrong with a batch: one row for each mistake, and the two moments at which it raises.

On the CPU an update raises at once and can show an example. On an accelerator, in traced code and among several ranks
the mistake is a status of its target, which is counted, and raises when it is read.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from xent_metrics import _runtime
from xent_metrics._compat import where_true
from xent_metrics._validate import TO_BINARY, WEIGHT_LIMIT
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import BinaryOptions, LossOptions
from xent_metrics.losses.target_losses import (
    BAD_GROUP,
    BAD_WEIGHT,
    PROBABILITY_OUT_OF_RANGE,
    TARGET_OUT_OF_RANGE,
    TargetLosses,
    count_statuses,
    has_only,
)

CLASS_TARGETS = "class indices in [0, number of classes), or soft targets: probabilities in [0, 1] with a sum of 1"
"""What targets must be, where nothing more is known of them."""


class Mistake(NamedTuple):
    """A mistake, as an update that raises it at once says it, and as a reading says it that counted it.

    Attributes:
        status: The status of a target that has it.
        name: Its name among the counts of a tally.
        rule: The argument, and what it must hold.
        now: What an update found, and the fix.
        later: What a reading found, and the fix.
    """

    status: int
    name: str
    rule: str
    now: str
    later: str


MISTAKES = (
    Mistake(
        TARGET_OUT_OF_RANGE,
        "out_of_range",
        "`target` must hold{kind} {targets}",
        "got {number} that {are_not}, such as {example}; {fix}.",
        "but {number} targets were outside; map them to `ignore_index`, or mask them with `weight`, {again}",
    ),
    Mistake(
        PROBABILITY_OUT_OF_RANGE,
        "improper",
        "`preds` must hold probabilities in [0, 1] with `input='probs'`",
        "got {number} targets for which they are not; pass input='logits' if they are scores.",
        "but those of {number} targets did not; pass input='logits' if they are scores, {again}",
    ),
    Mistake(
        BAD_WEIGHT,
        "invalid_weight",
        "{weights} must hold finite numbers that are not negative",
        "got {number} that are not, such as {example}; use 0 or False for targets that are not to be scored.",
        "but {number} were not; mend them, {again}",
    ),
    Mistake(
        BAD_GROUP,
        "groupless",
        "`group` must hold integers in [0, {num_groups})",
        "got {number} that are not, such as {example}; {fix}.",
        "but {number} scored targets had others; mend them, or mask their targets with `weight`, {again}",
    ),
)
_VOID = (250, 255)  # The labels of segmentation that are no classes.
_NEARLY_LOG_PROBS = 0.05  # How far a log-sum-exp may be from 0, in half precision too.
_MISTAKE_BIT = 4  # Of all statuses above, and of no other.
_BY_STATUS = {mistake.status: mistake for mistake in MISTAKES}


def counted_mistake(mistake: Mistake, number: int, kept: bool, targets: str, weights: str) -> str:
    """Return the sentence about a mistake that was counted.

    Args:
        mistake: Its row of `MISTAKES`.
        number: How often it was counted.
        kept: Whether a metric keeps the count until it is reset.
        targets: What targets must be.
        weights: What the denominator is made of.
    """
    again = "then call reset(): this repeats until then." if kept else "and call again."
    return f"{mistake.rule}, {mistake.later}".format(
        number=number, again=again, kind="", targets=targets, weights=weights, num_groups="num_groups"
    )


def raise_mistakes(
    losses: TargetLosses,
    preds: Tensor | LinearLogits,
    target: Tensor,
    options: LossOptions | BinaryOptions,
    weight: Tensor | None = None,
    num_ids: int | None = None,
    *,
    counted: bool = True,
) -> None:
    """Raise ValueError if a target that would be scored, its probabilities or its weight are wrong, where that is free.

    Args:
        losses: The losses, with their status.
        preds: As the caller passed them.
        target: As the caller passed it.
        options: How the losses were made.
        weight: The weights, one for each loss.
        num_ids: Number of token ids that have an entry in a table of bytes.
        counted: Whether mistakes are counted as well. Among several ranks they then raise on all of them when they are
            read, and therefore not here.
    """
    status = losses.status
    if status is None or not (_runtime.raises_eagerly if counted else _runtime.can_read_values)(losses.loss):
        return
    if has_only(status, ~_MISTAKE_BIT):
        return
    numbers = count_statuses(status)
    for mistake in MISTAKES:
        if mistake.status not in numbers:
            continue
        where = (status == mistake.status).view(-1)
        number = numbers[mistake.status]
        if mistake.status == TARGET_OUT_OF_RANGE:
            raise ValueError(_wrong_target(where, number, preds, target, options, num_ids))
        if mistake.status == BAD_WEIGHT:
            raise_now(mistake.status, number, weights="`weight`", example=_bad_weight(where, weight))
        raise_now(mistake.status, number)


def raise_now(status: int, number: int, **facts: object) -> None:
    """Raise ValueError about a mistake that an update found.

    Args:
        status: That of the mistake.
        number: How many targets have it.
        **facts: What its row of `MISTAKES` asks for.
    """
    mistake = _BY_STATUS[status]
    limit = f" (and below 2**{math.frexp(WEIGHT_LIMIT)[1] - 1})" if status == BAD_WEIGHT else ""
    raise ValueError(f"{mistake.rule}{limit}, {mistake.now}".format(number=number, **facts))


def _bad_weight(where: Tensor, weight: Tensor | None) -> float:
    assert weight is not None
    return weight.reshape(-1)[where][0].item()


def _wrong_target(
    where: Tensor,
    number: int,
    preds: Tensor | LinearLogits,
    target: Tensor,
    options: LossOptions | BinaryOptions,
    num_ids: int | None,
) -> str:
    """Return what targets must be, with one of those that are not."""
    mistake, or_ignored = _BY_STATUS[TARGET_OUT_OF_RANGE], f" or ignore_index={options.ignore_index}"

    def say(targets: str, example: object, fix: str, kind: str = "", are_not: str = "are neither") -> str:
        return f"{mistake.rule}, {mistake.now}".format(
            number=number, kind=kind, targets=targets, example=example, fix=fix, are_not=are_not
        )

    if isinstance(options, BinaryOptions):
        example = where_true(target.reshape(-1), where)[0].item()
        fix = _fix(example, options, _binary_fix(example))
        return say(f"0 and 1, or soft labels between them{or_ignored}", example, fix)
    target = options.shifted(preds, target)[1]
    if target.is_floating_point():
        row = target.movedim(options.class_dim, -1).reshape(len(where), -1)[where][0].double()
        return say(
            "probabilities in [0, 1] with a sum of 1",
            f"one with a sum of {row.sum().item():.6g} and a least entry of {row.min().item():.6g}",
            _soft_fix(row),
            ", as soft targets,",
            "do not",
        )
    example = where_true(target.reshape(-1), where)[0].item()
    limit = preds.shape[options.class_dim] if options.input != "losses" else num_ids
    fix = _fix(example, options, TO_BINARY if limit == 1 else "check the vocabulary size")
    if num_ids is not None and limit is not None and num_ids <= example < limit:
        fix = f"`token_bytes` has {num_ids} entries for {limit} classes: make it of this vocabulary, or pad it with 0"
    limit = limit if num_ids is None or limit is None else min(limit, num_ids)
    return say(f"class indices in [0, {limit}){or_ignored}", example, fix)


def _fix(example: float, options: LossOptions | BinaryOptions, otherwise: str) -> str:
    """Return what to do about a target: negative integers, and void labels, usually mark what is to be left out."""
    marks = math.isfinite(example) and example == int(example) and (example < 0 or example in _VOID)
    if not marks:
        return otherwise
    if options.ignore_index in (None, -100):  # Another one was chosen for something else that is left out.
        fix = f"pass ignore_index={int(example)} if it marks targets to leave out"
        return fix if example < 0 else f"{fix}, or {otherwise}"
    return f"pass weight=target != {int(example)} as well if it marks targets to leave out"


def _soft_fix(row: Tensor) -> str:
    """Return what to do about a target that is no distribution."""
    if len(row) == 1:
        return TO_BINARY
    if abs(row.logsumexp(0).item()) < _NEARLY_LOG_PROBS:
        return "pass their exp(), as these are log-probabilities"
    if row.min() < 0:
        return "pass their softmax if they are scores"
    return "divide them by their sum, or mask them with `weight`"


def _binary_fix(example: float) -> str:
    """Return what to do about a target that is not yes or no."""
    if math.isnan(example):
        return "mask them with weight=~target.isnan() if they are missing"
    return "more than two classes go to CrossEntropy"
