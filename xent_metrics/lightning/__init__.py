"""Lightning: a callback that logs pooled likelihoods from what the steps already return."""

from typing import TYPE_CHECKING, Any

from xent_metrics.lightning import callback_base, monitor

if TYPE_CHECKING:
    from xent_metrics.lightning.monitor import CrossEntropyMonitor

__all__ = ["CrossEntropyMonitor"]


def __getattr__(name: str) -> Any:
    """Return the callback, as a subclass of `Callback` of whichever package has been loaded until now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    callback_base.serve_what_is_loaded()
    return getattr(monitor, name)
