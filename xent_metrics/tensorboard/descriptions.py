"""The description of each chart, which TensorBoard shows behind its "i"."""

from __future__ import annotations

import re

from xent_metrics.tags import BEST, BITS_PER_BYTE, UNIFORM, UNIGRAM

_DEFINITIONS = {
    "cross_entropy": "Cross-entropy in **nats** a target: the mean of `-ln` of the probability that the model gave to "
    "what came. Lower is better; 0 is certain and right.",
    "bits_per_token": "Cross-entropy in **bits** a target: nats over `ln 2`, what a code built on the model spends on "
    "each. Lower is better.",
    BITS_PER_BYTE: "Total bits over the **UTF-8 bytes** that the tokens stand for: comparable between tokenizers. "
    "Lower is better.",
    "perplexity": "`exp` of the cross-entropy in nats: the **number** of equally likely choices that would be as "
    "surprising. Lower is better; 1 is certain and right.",
}
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
_POOLED_OF_EPOCH = "all targets of the training epoch, of all ranks, while the model changed"
_ENDS = {"_lower": "Lower end of the interval. ", "_upper": "Upper end of the interval. "}


def describe_tag(tag: str, prefix: str = "") -> str | None:
    """Return what a chart shows, in Markdown: definition, unit, what is pooled and left out; None for other tags.

    >>> describe_tag("val/best_bits_per_token")
    'The lowest `bits_per_token` of all validations of this run so far, in **bits**.'
    """
    # A reading is matched lazily, so that `_epoch` and the ends of an interval are no part of its name.
    found = re.fullmatch(r"(train|val|test)/([a-z_]+?)(_epoch|_lower|_upper)?(?:/(.+))?", tag.removeprefix(prefix))
    if not found or not tag.startswith(prefix):
        return None
    stage, name, suffix, part = found.groups()
    if name not in _DEFINITIONS:
        return _OF_VALIDATIONS.get(name)
    pooled = _POOLED_OF_EPOCH if suffix == "_epoch" else _POOLED[stage]
    if part:
        of = f"loader {part.rpartition('_')[2]}" if part.startswith("dataloader_idx") else f"the group `{part}`"
        pooled += f", but only those of {of}"
    end = _ENDS.get(suffix or "", "")
    if end:
        pooled += "; the interval is that of a sample of sequences, not of tokens"
    return (
        f"{end}{_DEFINITIONS[name]}\n\n**Pooled:** {pooled}; each target counts once, whatever its batch.\n\n"
        "**Left out:** targets that are ignored (padding), and samples that ranks repeat to be equally many."
    )
