"""Pictures and a page of text in loggers that take such: a class for each kind of logger.

A logger is known by the arguments of its methods and not by its class: Lightning's two packages have a class each, and
a logger of somebody's own may work like one of them.
"""

from __future__ import annotations

from inspect import signature
from io import BytesIO
from typing import Any, Protocol


class Media(Protocol):
    """Takes pictures and pages of a run, as a `Dashboard` of TensorBoard does."""

    def add_picture(self, tag: str, png: bytes, step: int) -> None:
        """Write a picture, a PNG file."""

    def add_text(self, tag: str, html: str, step: int) -> None:
        """Write a short page of text."""

    def add_page(self, tag: str, html: str, step: int) -> None:
        """Write a page of HTML that stands alone."""


def find_media(logger: Any) -> Media | None:
    """Return what writes to a logger; None if it is TensorBoard, or takes no pictures."""
    experiment = getattr(logger, "experiment", None)
    if _takes(logger, "log_image", "key", "images", "step") and _takes(logger, "log_text", "key", "columns"):
        return WandbMedia(logger)
    if hasattr(logger, "run_id") and _takes(experiment, "log_image", "run_id", "key", "step"):
        return MlflowMedia(logger)
    if _takes(experiment, "log_image", "image_data", "name", "step") and _takes(experiment, "log_html", "html"):
        return CometMedia(logger)
    return None


def prefix_of_logger(logger: Any) -> str:
    """Return what a logger puts before each tag."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{getattr(logger, 'LOGGER_JOIN_CHAR', '_')}" if prefix else ""  # Comet joins with this.


class WandbMedia:
    """Weights & Biases: a panel for each picture, and one with the page. The logger adds its prefix itself."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def add_picture(self, tag: str, png: bytes, step: int) -> None:
        """Log an image."""
        self._logger.log_image(key=tag, images=[_opened(png)], step=step)

    def add_text(self, tag: str, html: str, step: int) -> None:
        """Log a page; `log_text` would show its source, as one cell of a table."""
        from wandb import Html  # noqa: PLC0415  # The user has chosen the logger.

        # What is injected is a style sheet on another host.
        self._logger.log_metrics({tag: Html(html, inject=False, data_is_not_path=True)}, step)

    add_page = add_text


class MlflowMedia:
    """MLflow: pictures by step, as it charts them, and a file that it shows as a page; both are artifacts."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._prefix = prefix_of_logger(logger)

    def add_picture(self, tag: str, png: bytes, step: int) -> None:
        """Log an image."""
        self._logger.experiment.log_image(self._logger.run_id, _opened(png), key=self._prefix + tag, step=step)

    def add_text(self, tag: str, html: str, step: int) -> None:
        """Log a file."""
        self._logger.experiment.log_text(self._logger.run_id, html, f"{self._prefix}{tag}.html")

    add_page = add_text


class CometMedia:
    """Comet: pictures by step, and a page in its HTML tab."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._prefix = prefix_of_logger(logger)

    def add_picture(self, tag: str, png: bytes, step: int) -> None:
        """Log an image."""
        self._logger.experiment.log_image(_opened(png), name=self._prefix + tag, step=step)

    def add_text(self, tag: str, html: str, step: int) -> None:
        """Log a page."""
        self._logger.experiment.log_html(html)

    add_page = add_text


def _takes(owner: Any, name: str, *arguments: str) -> bool:
    """Return whether something has a method with these arguments; one that takes whatever comes is none."""
    try:
        return set(arguments) <= signature(getattr(owner, name)).parameters.keys()
    except (AttributeError, TypeError, ValueError):  # No such method, or one that does not say.
        return False


def _opened(png: bytes) -> Any:
    from PIL import Image  # noqa: PLC0415  # Installed with matplotlib, which has drawn the picture.

    return Image.open(BytesIO(png)).convert("RGB")
