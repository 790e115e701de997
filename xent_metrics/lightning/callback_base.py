"""The base class of the monitor, which serves both packages that Lightning is published as.

`lightning.pytorch` and `pytorch_lightning` are the same code twice, with unrelated classes. A subclass of both
`Callback`s is accepted by both `Trainer`s, and by the command line of either. But to import one takes the log messages
of the other away from its logger, so only what is loaded already becomes a base.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Callback", "serve_what_is_loaded"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def loaded_callbacks() -> tuple[type[Any], ...]:
    """Return the `Callback` of each package that is loaded."""
    loaded = (getattr(sys.modules.get(package), "Callback", None) for package in _PACKAGES)
    return tuple(callback for callback in loaded if callback is not None)


def load_one() -> tuple[type[Any], ...]:
    """Load the first package that is installed, and return its `Callback`.

    Raises:
        ModuleNotFoundError: If neither is.
    """
    for package in _PACKAGES:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if not package.startswith(str(error.name)):
                raise
        else:
            return loaded_callbacks()
    raise ModuleNotFoundError(
        "`xent_metrics.lightning` needs Lightning; install it with `pip install xent-metrics[lightning]`."
    )


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = type("Callback", loaded_callbacks() or load_one(), {})


def serve_what_is_loaded() -> None:
    """Let `Callback` be a subclass of what has been loaded since it was made."""
    bases = loaded_callbacks()
    if not set(bases) <= set(Callback.__bases__):
        Callback.__bases__ = bases
