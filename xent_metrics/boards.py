"""When a monitor writes to TensorBoard beside its values, and on which rank; what it writes is `tensorboard.py`'s.

Ranks other than the first have no file to write to, but they take part in gathering what is drawn, so everything that
decides whether they meet is the same on all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torchmetrics.utilities.prints import rank_zero_warn

from xent_metrics.distributed import is_distributed, max_over_ranks, sum_over_ranks
from xent_metrics.pictures import Decode, Gallery, Reached

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from xent_metrics.tensorboard import Dashboard

Part = Literal["layout", "descriptions", "references", "hparams", "pictures", "summary", "overlay"]
"""A part of what is written to TensorBoard beside the values."""

PARTS: tuple[Part, ...] = ("layout", "descriptions", "references", "hparams", "pictures", "summary")
"""What is written unless somebody asks for less, or for more."""

_MOST_VALIDATIONS = 512
"""So many are remembered for a picture of all of them; beyond that every other one is forgotten."""


class Boards:
    """The dashboards of all TensorBoard loggers of a trainer: one for each on the first rank, none on the others.

    Args:
        parts: What to write.
        readings: What there is of each stage.
        groups: Names of groups.
        prefix: What stands before all tags.
    """

    def __init__(self, parts: Iterable[Part], readings: Sequence[str], groups: Sequence[str], prefix: str) -> None:
        known = get_args(Part)
        wrong = (
            [parts]
            if isinstance(parts, str) or not isinstance(parts, Iterable)
            else [x for x in parts if x not in known]
        )
        if wrong:
            raise ValueError(
                f"`dashboards` must be a list of some of {list(known)}, got {wrong[0]!r}; () switches all of them off."
            )
        self.parts = frozenset(parts)
        self._board_args = (readings, groups, prefix)
        self._prefix = prefix
        self._loggers: list[Any] = []
        self._boards: list[Dashboard] = []
        self.forget()

    def forget(self) -> None:
        """Begin another run."""
        self._references: dict[str, float] | None = None
        self._num_validations = 0
        self._num_windows = 0
        self._referred_at = -1
        self._last: Gallery | None = None  # Of the last validation, if it was not drawn.
        self._history: list[Reached] = []

    def attach(self, loggers: Sequence[Any], writes: bool) -> None:
        """Look for loggers to write beside.

        Args:
            loggers: All loggers; those that write for TensorBoard are taken.
            writes: Whether this rank writes.
        """
        # By name, since Lightning's two packages have a class each.
        self._loggers = [x for x in loggers if any(kind.__name__ == "TensorBoardLogger" for kind in type(x).__mro__)]
        if not self._loggers or not self.parts or find_spec("tensorboard") is None:
            self._loggers, self._boards = [], []
            return
        from xent_metrics.tensorboard import Dashboard  # noqa: PLC0415  # Nobody without a logger needs it.

        parts = self.parts
        if "pictures" in parts and find_spec("matplotlib") is None:
            rank_zero_warn(
                "`dashboards` has 'pictures', which need matplotlib: install it, or leave them out.", UserWarning
            )
            parts -= {"pictures"}
        known = {id(board.writer): board for board in self._boards}
        for logger in self._loggers if writes else ():
            board = Dashboard(logger.experiment, parts, *self._board_args, logger_prefix=_joined(logger))
            known.setdefault(id(board.writer), board)
        writers = {id(logger.experiment) for logger in self._loggers} if writes else set()
        self._boards = [board for writer, board in known.items() if writer in writers]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what writes files, which another process cannot have."""
        return self.__dict__ | {"_loggers": [], "_boards": []}

    def close(self) -> None:
        """Close the files that no logger closes."""
        for board in self._boards:
            board.close()

    def log_hparams(self, hparams: Mapping[str, Any], tags: Sequence[str]) -> None:
        """Write the row of this run in the table of hyperparameters, before Lightning writes its own."""
        if "hparams" in self.parts:
            for logger in self._loggers:
                logger._default_hp_metric = False  # A curve of -1, which would be the only column.
        for board in self._boards:
            board.log_hparams(hparams, tags)

    def announce(self, values: Mapping[str, float]) -> None:
        """Describe and lay out what is about to be written."""
        for board in self._boards:
            board.announce(values)

    def accompany(self, values: Mapping[str, float], stage: str, step: int) -> None:
        """Overlay what is written at a step, and go on with the lines to compare it with."""
        for board in self._boards:
            board.overlay(stage, values, step)
        if stage == "train":
            # A chart leaves out what fewer than a twentieth of its points reach, and validations are few.
            self._num_windows += 1
            if self._num_windows % 8 == 0:
                self._write_references(step)

    def _write_references(self, step: int) -> None:
        """Write a point of each line to compare with, as far as they are known."""
        if step > self._referred_at:  # A validation may come at the step of a window.
            self._referred_at = step
            for name, value in (self._references or {}).items():
                for board in self._boards:
                    board.add_reference(f"{self._prefix}val/{name}", value, step)

    def gallery(self, device: torch.device) -> Gallery | None:
        """Return what is to gather a validation; None if nobody will look at it.

        Among several ranks it is the arguments alone that decide, as only some ranks may have a logger.
        """
        nobody = not self._loggers and not is_distributed()
        if nobody or self.parts.isdisjoint({"references", "pictures", "summary"}):
            return None
        return Gallery(device, counts_classes="references" in self.parts and self._references is None)

    def show(
        self, gallery: Gallery, reached: Reached, group: ProcessGroup | None, decode: Decode | None, now: bool
    ) -> None:
        """Draw a validation, and the lines to compare it with; all ranks take part.

        Pictures are large, so they are drawn of the first, second, fourth, eighth, ... validation, and of the last.

        Args:
            gallery: What was gathered, its profile over all ranks.
            reached: What the validation has reached.
            group: The ranks that hold different data.
            decode: See `CrossEntropyMonitor`.
            now: Draw in any case.
        """
        if self._references is None and "references" in self.parts:
            self._references = _references(gallery, group)
        self._write_references(reached.step)
        self._num_validations += 1
        self._last = gallery
        if len(self._history) == _MOST_VALIDATIONS:
            del self._history[1::2]
        self._history.append(reached)
        if now or self._num_validations & (self._num_validations - 1) == 0:
            self._draw_last(decode)

    def finish(self, text: Callable[[], str], step: int, decode: Decode | None) -> None:
        """Draw the last validation, and write a text on what the run has reached."""
        self._draw_last(decode)
        for board in self._boards:
            if "summary" in self.parts:
                board.add_text("summary", text(), step)
            board.flush()

    def _draw_last(self, decode: Decode | None) -> None:
        if self._last is not None:
            try:
                for board in self._boards:
                    board.draw(self._last, self._history, self._references or {}, decode)
            except Exception as error:  # Such as one of `decode`: no picture is worth a run, nor ranks that wait.
                warnings.warn(
                    f"`dashboards` has 'pictures', but drawing one failed with {type(error).__name__}: {error}; mend "
                    "`decode` if it is its error, or leave them out; there are no more pictures of this run.",
                    UserWarning,
                    stacklevel=2,
                )
                for board in self._boards:
                    board.parts -= {"pictures"}
        self._last = None


def _references(gallery: Gallery, group: ProcessGroup | None) -> dict[str, float]:
    """Return the lines to compare with, the same on all ranks: two small collectives, once a run."""
    from xent_metrics.tensorboard import UNIFORM, UNIGRAM, unigram_bits  # noqa: PLC0415

    counts = torch.cat([gallery.class_counts, gallery.num_beyond.view(1)])
    if is_distributed():
        # A rank without data does not know how many classes there are.
        size = int(max_over_ranks(torch.tensor([len(counts)], device=counts.device), group))
        padded = torch.nn.functional.pad(gallery.class_counts, (0, size - len(counts)))
        counts = sum_over_ranks(torch.cat([padded, counts[-1:]]), group) if size > 1 else counts
    *of_classes, num_beyond = counts.tolist()
    if num_beyond:
        num_targets = sum(of_classes) + num_beyond
        rank_zero_warn(
            f"`num_classes` must be larger than every target, but of {num_targets} targets {num_beyond} are not below "
            f"{len(of_classes)}: TensorBoard gets no lines to compare with; pass the size of the vocabulary.",
            UserWarning,
        )
    if num_beyond or not any(of_classes):
        return {}
    return {UNIFORM: math.log2(len(of_classes)), UNIGRAM: unigram_bits(of_classes)}


def _joined(logger: Any) -> str:
    """Return what a logger puts before each tag."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""
