"""What a monitor writes to loggers beside its values, when, and on which rank.

TensorBoard gets all of it, by `xent_metrics.tensorboard`; others get pictures and the page of text, if they take such.

Only the first rank has files to write to. The others take part in gathering what is drawn, so whatever decides whether
ranks meet in a collective is the same on all of them.
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
from xent_metrics.lightning.media import Media, find_media, prefix_of_logger
from xent_metrics.lightning.trainer import flatten
from xent_metrics.page import Decode
from xent_metrics.pictures import draw_validation
from xent_metrics.summary import summarise
from xent_metrics.tags import UNIFORM, UNIGRAM, as_choices
from xent_metrics.validation_stats import ValidationPoint, ValidationStats, unigram_bits

if TYPE_CHECKING:
    from xent_metrics.lightning.trainer import Ranks
    from xent_metrics.tensorboard import Dashboard

Part = Literal["layout", "descriptions", "references", "hparams", "pictures", "summary", "overlay"]
"""A part of what is written beside the values."""

DEFAULT_PARTS: tuple[Part, ...] = ("layout", "descriptions", "references", "hparams", "pictures", "summary")

_MAX_HISTORY = 512  # Validations in the picture of all of them; beyond that every other one is dropped.
_WINDOWS_PER_REFERENCE = 8  # A chart leaves out lines with fewer than a twentieth of its points.


class Dashboards:
    """A `Dashboard` or another `Media` for each logger of a Trainer on the first rank; none on the other ranks.

    Args:
        parts: The parts to write.
        readings: The readings of each stage.
        groups: Names of groups.
        prefix: The text before all tags.
    """

    def __init__(self, parts: Iterable[Part], readings: Sequence[str], groups: Sequence[str], prefix: str) -> None:
        self.parts = frozenset(as_choices("dashboards", parts, get_args(Part)))
        self._dashboard_args = (readings, groups, prefix)
        self._prefix = prefix
        self._loggers: list[Any] = []
        self._dashboards: list[Dashboard] = []
        self._media: list[Media] = []  # The same, and those of other loggers; without those that failed.
        self._draws = False
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self._references: dict[str, float] | None = None
        self._num_validations = 0
        self._num_windows = 0
        self._last_reference_step = -1
        self._undrawn: ValidationStats | None = None
        self._history: list[ValidationPoint] = []
        self._last_logged: dict[str, dict[str, float]] = {}
        self._hparams_due = False

    def attach(self, loggers: Sequence[Any], writes: bool, has_hparams: bool) -> None:
        """Find the loggers that more than values are written to among all loggers of the Trainer.

        Args:
            loggers: All loggers.
            writes: Whether this rank writes.
            has_hparams: Whether this run will have a row in the table of hyperparameters.
        """
        self._loggers = _tensorboard_loggers(loggers) if self.parts else []
        self._hparams_due = bool(self._loggers) and has_hparams and "hparams" in self.parts
        if self._hparams_due:
            _give_way(self._loggers)
        self._dashboards = self._find_dashboards() if writes and self._loggers else []
        has_media = writes and not self.parts.isdisjoint({"pictures", "summary"})
        others = map(find_media, loggers if has_media else ())
        self._media = [*self._dashboards, *(media for media in others if media is not None)]
        self._draws = bool(self._media) and "pictures" in self.parts
        if self._draws and find_spec("matplotlib") is None:
            self._draws = False
            rank_zero_warn(
                "`dashboards` has 'pictures', which need matplotlib: install it, or leave them out.", UserWarning
            )

    def _find_dashboards(self) -> list[Dashboard]:
        """Return a dashboard for each writer; one that is attached again knows the tags that it has described."""
        from xent_metrics.tensorboard import Dashboard  # noqa: PLC0415  # It needs TensorBoard.

        known = {id(dashboard.writer): dashboard for dashboard in self._dashboards}
        for logger in self._loggers:
            prefix = prefix_of_logger(logger)
            dashboard = Dashboard(logger.experiment, self.parts, *self._dashboard_args, logger_prefix=prefix)
            known.setdefault(id(dashboard.writer), dashboard)
        return [known[writer] for writer in dict.fromkeys(id(logger.experiment) for logger in self._loggers)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what writes files, which another process cannot have."""
        return self.__dict__ | {"_loggers": [], "_dashboards": [], "_media": []}

    def close(self) -> None:
        """Close the files that no logger closes."""
        for dashboard in self._dashboards:
            dashboard.close()

    def write_hparams(self, tags: Sequence[str], logged: Iterable[str]) -> None:
        """Write the row of this run in the table of hyperparameters, once.

        Args:
            tags: Those of ours that are its columns.
            logged: All tags that have been logged. `hp_metric`, which Lightning reserves for one of the module's own,
                is a column if it is there.
        """
        if not self._hparams_due:
            return
        self._hparams_due = False
        columns = [*tags, *(tag for tag in ("hp_metric",) if tag in logged)]
        for dashboard in self._dashboards:
            # What the user gave to the logger, and what the module has saved, which Lightning gives to it.
            logger = next(logger for logger in self._loggers if logger.experiment is dashboard.writer)
            dashboard.log_hparams(flatten(getattr(logger, "hparams", {})), columns)

    def on_window_logged(self, values: Mapping[str, float], step: int) -> None:
        """Describe and overlay the values of a training window, before they are logged."""
        self._describe_new_tags(values, step)
        self._overlay(values, "train", step)
        self._num_windows += 1
        if self._num_windows % _WINDOWS_PER_REFERENCE == 0:
            self._write_references(step)

    def on_epoch_logged(self, values: Mapping[str, float], stage: str, step: int) -> None:
        """Describe and overlay the values of an epoch, before they are logged, and keep them for the summary."""
        self._describe_new_tags(values, step)
        if stage != "train" or not self._num_windows:  # Windows have the line of training, if there are such.
            self._overlay(values, stage, step)
        self._last_logged[stage] = dict(values)

    def _describe_new_tags(self, tags: Iterable[str], step: int) -> None:
        for dashboard in self._dashboards:
            dashboard.describe_new_tags(tags, step)

    def _overlay(self, values: Mapping[str, float], stage: str, step: int) -> None:
        for dashboard in self._dashboards:
            dashboard.overlay(stage, values, step)

    def _write_references(self, step: int) -> None:
        """Write a point of each reference line that is known."""
        if step > self._last_reference_step:  # A validation may come at the step of a window.
            self._last_reference_step = step
            for name, value in (self._references or {}).items():
                for dashboard in self._dashboards:
                    dashboard.add_reference(f"{self._prefix}val/{name}", value, step)

    def new_stats(self, device: torch.device, ranks: Ranks) -> ValidationStats | None:
        """Return statistics that a validation is to collect; None if nobody will look at them."""
        # Only some ranks may have a logger, so among several ranks the arguments alone decide.
        nobody = not self._media and not is_distributed()
        if nobody or self.parts.isdisjoint({"references", "pictures", "summary"}):
            return None
        counts_classes = "references" in self.parts and self._references is None
        return ValidationStats(device, counts_classes, ranks.of_sequences is None, has_text=self._draws)

    def add_validation(
        self,
        stats: ValidationStats,
        point: ValidationPoint,
        ranks: Ranks,
        decode: Decode | None,
        draw_now: bool,
    ) -> None:
        """Draw a validation and its reference lines; all ranks take part.

        Pictures are large, so only the first, second, fourth, eighth, ... validation and the last are drawn.

        Args:
            stats: What was collected; the histogram is of all ranks together.
            point: The result of the validation.
            ranks: The ranks that hold different data.
            decode: See `CrossEntropyMonitor`.
            draw_now: Draw whichever validation it is.
        """
        if self._references is None and "references" in self.parts:
            self._references = _compute_references(stats, ranks)
        self._write_references(point.step)
        self._num_validations += 1
        self._undrawn = stats
        if len(self._history) == _MAX_HISTORY:
            del self._history[1::2]
        self._history.append(point)
        if draw_now or self._num_validations & (self._num_validations - 1) == 0:
            self._draw_last(decode)

    def finish(
        self, step: int, decode: Decode | None, facts: Callable[[], tuple[dict[str, Any], dict[str, Any], int]]
    ) -> None:
        """Draw the last validation, and write the summary of the run.

        Args:
            step: The last step.
            decode: See `CrossEntropyMonitor`.
            facts: Returns the first, third and fourth argument of `summarise`; called only where it is written.
        """
        self._draw_last(decode)
        if self._media and "summary" in self.parts:
            configuration, counts, num_repeated = facts()
            values = {tag: value for stage in self._last_logged.values() for tag, value in stage.items()}
            page = summarise(configuration, values, counts, num_repeated, self._prefix)
            self._give("summary", lambda media: media.add_text(f"{self._prefix}summary", page, step))
        for dashboard in self._dashboards:
            dashboard.flush()

    def _draw_last(self, decode: Decode | None) -> None:
        stats, self._undrawn = self._undrawn, None
        if stats is None or not self._draws:
            return
        try:
            pictures, page = draw_validation(stats, self._history, self._references or {}, decode)
        except Exception as error:  # Such as one of `decode`.
            self._draws = False
            _warn_of("pictures", "drawing one", error, "there are no more pictures of this run")
            return

        def write(media: Media) -> None:
            step = self._history[-1].step
            for name, png in pictures.items():
                media.add_picture(f"{self._prefix}val/{name}", png, step)
            if page is not None:
                media.add_page(f"{self._prefix}val/surprisal_page", page, step)

        self._give("pictures", write)

    def _give(self, part: Part, write: Callable[[Media], None]) -> None:
        """Write something to each logger; one that fails gets nothing more."""
        for media in [*self._media]:
            try:
                write(media)
            except Exception as error:  # Such as one of the network.
                self._media.remove(media)
                doing, consequence = f"writing by {type(media).__name__}", "its logger gets no more of this run"
                _warn_of(part, doing, error, consequence)


def _warn_of(part: Part, doing: str, error: Exception, consequence: str) -> None:
    """Warn where something goes wrong: other ranks would wait for one that stops."""
    warnings.warn(
        f"`dashboards` has {part!r}, but {doing} failed with {type(error).__name__}: {error}; {consequence}; leave "
        f"out {part!r} if you can do without.",
        UserWarning,
        stacklevel=3,
    )


def _tensorboard_loggers(loggers: Sequence[Any]) -> list[Any]:
    """Return those of TensorBoard, if it is installed; by name, since Lightning's two packages have a class each."""
    if find_spec("tensorboard") is None:
        return []
    return [x for x in loggers if any(kind.__name__ == "TensorBoardLogger" for kind in type(x).__mro__)]


def _compute_references(stats: ValidationStats, ranks: Ranks) -> dict[str, float]:
    """Return the reference lines, the same on all ranks: two small collectives, once a run."""
    counts = torch.cat([stats.class_counts, stats.num_beyond.view(1)])
    if is_distributed():
        # A rank without data does not know how many classes there are.
        size = torch.tensor([len(counts)], device=counts.device)
        for group in ranks.added:
            size = max_over_ranks(size, group)
        padded = torch.nn.functional.pad(stats.class_counts, (0, int(size) - len(counts)))
        counts = torch.cat([padded, counts[-1:]])
        for group in ranks.added if len(counts) > 1 else ():
            counts = sum_over_ranks(counts, group)
    *class_counts, num_beyond = counts.tolist()
    if num_beyond:
        num_targets = sum(class_counts) + num_beyond
        rank_zero_warn(
            f"`num_classes` must be larger than every target, but of {num_targets} targets {num_beyond} are not below "
            f"{len(class_counts)}: there are no lines to compare with; pass the size of the vocabulary.",
            UserWarning,
        )
    if num_beyond or not any(class_counts):
        return {}
    return {UNIFORM: math.log2(len(class_counts)), UNIGRAM: unigram_bits(class_counts)}


def _give_way(loggers: Sequence[Any]) -> None:
    """Let no logger write a row of Lightning's own, whose only column is a curve of -1."""
    for logger in loggers:
        if logger._default_hp_metric and getattr(logger, "hparams", None):
            rank_zero_warn(
                "`dashboards` has 'hparams', but `log_hyperparams` was called before the run, and TensorBoard shows "
                "what came first: `hp_metric`, which is -1, and no values of the run; pass `default_hp_metric=False` "
                "to the TensorBoardLogger to see them beside your hyperparameters, or leave out 'hparams'.",
                UserWarning,
            )
        logger._default_hp_metric = False
