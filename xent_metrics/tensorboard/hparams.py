"""The row of a run in TensorBoard's table of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries


def log_hparams(writer: SummaryWriter, hparams: Mapping[str, Any], tags: Sequence[str]) -> None:
    """Write the row of a run; its values are the last ones under some tags.

    `SummaryWriter.add_hparams` would write to a run of its own, with a point of each tag.
    """
    plain = {
        _encodable(name): value if isinstance(value, bool | int | float) else _encodable(str(value))
        for name, value in hparams.items()
    }
    for summary in hparams_summaries(plain, dict.fromkeys(tags, 0.0)):
        writer._get_file_writer().add_summary(summary, None)


def _encodable(text: str) -> str:
    """Return text that a file can hold: the name of a file may have bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
