"""The description of each chart, which TensorBoard shows behind its "i"."""

from __future__ import annotations

from xent_metrics.reading_info import READINGS
from xent_metrics.tags import (
    BEST,
    BITS_PER_BYTE,
    BOUNDS,
    LOGGED_READINGS,
    MACRO,
    NUM_TOKENS,
    OF_SCORES,
    UNIFORM,
    UNIGRAM,
    parse_tag,
)

_DESCRIBED = (*LOGGED_READINGS, BITS_PER_BYTE, *OF_SCORES, *BOUNDS)
# These are read of several validations or of their targets, so nothing is said of what is pooled.
_OF_VALIDATIONS = {
    BEST: "The lowest `bits_per_token` of all validations of this run so far, in **bits**.",
    UNIFORM: "A line to compare with: `log2` of the number of classes, in **bits**. A model that knows nothing is "
    "here.",
    UNIGRAM: "A line to compare with: the entropy in **bits** of how frequent each class is among the targets of the "
    "validation. A model that knows these frequencies, and uses no context, is here; as an estimate it is too low "
    "where there are few targets for each class.",
}
_POOLED = {
    "train": "all targets since the last point of this curve, of all ranks",
    "val": "all targets of the validation, of all loaders and ranks",
    "test": "all targets of the test, of all loaders and ranks",
}
_COUNTED = {
    "train": "all targets since the run began, also before it was resumed",
    "val": "those of one validation",
    "test": "those of the test",
}
_LEFT_OUT = "\n\n**Left out:** targets that are ignored (padding), and samples that ranks repeat to be equally many."
_POOLED_OF_EPOCH = "all targets of the training epoch, of all ranks, while the model changed"


def describe_tag(tag: str, prefix: str = "") -> str | None:
    """Return what a chart shows, in Markdown: definition, unit, what is pooled and left out; None for other tags.

    >>> describe_tag("val/best_bits_per_token")
    'The lowest `bits_per_token` of all validations of this run so far, in **bits**.'
    """
    ours = parse_tag(tag, prefix)
    if ours is None:
        return None
    name = ours.name.removesuffix("_epoch")
    if name == NUM_TOKENS:
        return f"{READINGS[name].definition}\n\n**Pooled:** {_COUNTED[ours.stage]}, of all ranks, each once.{_LEFT_OUT}"
    if name in MACRO:
        return (
            f"{READINGS[MACRO[name]].definition}\n\n**Pooled:** this is the unweighted mean over the groups that have "
            f"targets; without groups, over the loaders: a small one counts as much as a large one.{_LEFT_OUT}"
        )
    if name not in _DESCRIBED:
        return _OF_VALIDATIONS.get(name)
    pooled = _POOLED[ours.stage] if name == ours.name else _POOLED_OF_EPOCH
    if ours.by:
        number = ours.part.removeprefix("dataloader_idx_")
        of = f"loader {number}" if number != ours.part else f"the {ours.by} `{ours.part}`"
        pooled += f", but only those of {of}"
    if name in BOUNDS:
        pooled += "; the interval is that of a sample of sequences, not of tokens"
    return (
        f"{READINGS[name].definition}\n\n**Pooled:** {pooled}; each target counts once, whatever its batch.{_LEFT_OUT}"
    )
