"""Every reading that there is, with its name, unit and definition: for whoever logs, plots or explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReadingInfo:
    """What a reading is, for whoever logs, plots or explains it.

    Attributes:
        name: What it is called, everywhere.
        unit: `"nats"`, `"bits"`, `"targets"`, or `"1"` for a pure number.
        definition: What it is, in Markdown, for a reader in a hurry.
        lower: The lower bound of a plot's axis; None where there is none.
    """

    name: str
    unit: Literal["nats", "bits", "1", "targets"]
    definition: str
    lower: float | None = 0.0

    @property
    def is_count(self) -> bool:
        """Whether it is a number of targets, an integer."""
        return self.unit == "targets"


_READINGS = (
    ReadingInfo(
        "cross_entropy",
        "nats",
        "Cross-entropy in **nats** a target: the mean of `-ln` of the probability that the model gave to what came. "
        "Lower is better; 0 is certain and right.",
    ),
    ReadingInfo(
        "bits_per_token",
        "bits",
        "Cross-entropy in **bits** a target: nats over `ln 2`, what a code built on the model spends on each. Lower is "
        "better.",
    ),
    ReadingInfo(
        "perplexity",
        "1",
        "`exp` of the cross-entropy in nats: the **number** of equally likely choices that would be as surprising. "
        "Lower is better; 1 is certain and right.",
        1.0,
    ),
    ReadingInfo("cross_entropy_stderr", "nats", "Standard error of the cross-entropy, in **nats**."),
    ReadingInfo("cross_entropy_lower", "nats", "Lower end of the interval of the cross-entropy, in **nats**.", None),
    ReadingInfo("cross_entropy_upper", "nats", "Upper end of the interval of the cross-entropy, in **nats**."),
    ReadingInfo("perplexity_lower", "1", "Lower end of the interval of the perplexity."),
    ReadingInfo("perplexity_upper", "1", "Upper end of the interval of the perplexity.", 1.0),
    ReadingInfo("num_tokens", "targets", "Targets scored, those of non-finite loss included."),
    ReadingInfo("num_ignored", "targets", "Targets not scored: `ignore_index`, weight 0, or masked."),
    ReadingInfo("num_nonfinite", "targets", "Scored targets whose loss is infinite or NaN."),
    ReadingInfo(
        "bits_per_byte",
        "bits",
        "Total bits over the **UTF-8 bytes** that the tokens stand for: comparable between tokenizers. Lower is "
        "better.",
    ),
    ReadingInfo(
        "accuracy",
        "1",
        "**Share** of targets that are the most likely class, the lowest one of several. Higher is better; 1 is all.",
    ),
    ReadingInfo(
        "entropy",
        "nats",
        "Mean entropy of the model's own distribution, in **nats**: the cross-entropy that it expects of itself. Below "
        "the cross-entropy it is too sure, above it not sure enough.",
    ),
)
READINGS = {info.name: info for info in _READINGS}
"""Every reading, in the order in which they are shown."""

OF_OTHER_TALLIES = {"bits_per_byte": "bits_per_token", "accuracy": "cross_entropy", "entropy": "cross_entropy"}
"""Which reading of a tally of its own each of these is."""
