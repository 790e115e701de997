"""The base class of the monitor, which serves both packages that Lightning is published as."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    # `lightning.pytorch` and `pytorch_lightning` are the same code twice, with unrelated classes. A subclass of both
    # `Callback`s is accepted by both `Trainer`s, and by the command line of either.
    _bases = []
    for _package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            _bases.append(__import__(_package, fromlist=["Callback"]).Callback)
        except ModuleNotFoundError as error:
            if not _package.startswith(str(error.name)):
                raise
    if not _bases:
        raise ModuleNotFoundError(
            "`xent_metrics.lightning` needs Lightning; install it with `pip install xent-metrics[lightning]`."
        )
    Callback = type("Callback", tuple(_bases), {})

__all__ = ["Callback"]
