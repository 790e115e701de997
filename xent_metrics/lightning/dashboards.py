"""When a monitor writes to TensorBoard beside its values, and on which rank; `xent_metrics.tensorboard` writes.

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
from xent_metrics.lightning.trainer import flatten
from xent_metrics.tags import UNIFORM, UNIGRAM, as_choices
from xent_metrics.validation_stats import Decode, ValidationPoint, ValidationStats, unigram_bits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from xent_metrics.tensorboard import Dashboard

Part = Literal["layout", "descriptions", "references", "hparams", "pictures", "summary", "overlay"]
"""A part of what is written to TensorBoard beside the values."""

DEFAULT_PARTS: tuple[Part, ...] = ("layout", "descriptions", "references", "hparams", "pictures", "summary")

_MAX_HISTORY = 512  # Validations in the picture of all of them; beyond that every other one is dropped.
_WINDOWS_PER_REFERENCE = 8  # A chart leaves out lines with fewer than a twentieth of its points.


class Dashboards:
    """A `Dashboard` for each TensorBoard logger of a Trainer on the first rank; none on the other ranks.

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
        """Find the TensorBoard loggers among all loggers of the Trainer.

        Args:
            loggers: All loggers.
            writes: Whether this rank writes.
            has_hparams: Whether this run will have a row in the table of hyperparameters.
        """
        # By name, since Lightning's two packages have a class each.
        self._loggers = [x for x in loggers if any(kind.__name__ == "TensorBoardLogger" for kind in type(x).__mro__)]
        if not self._loggers or not self.parts or find_spec("tensorboard") is None:
            self._loggers, self._dashboards = [], []
            return
        from xent_metrics.tensorboard import Dashboard  # noqa: PLC0415  # It needs TensorBoard.

        parts = self.parts
        if "pictures" in parts and find_spec("matplotlib") is None:
            rank_zero_warn(
                "`dashboards` has 'pictures', which need matplotlib: install it, or leave them out.", UserWarning
            )
            parts -= {"pictures"}
        self._hparams_due = has_hparams and "hparams" in parts
        if self._hparams_due:
            _give_way(self._loggers)
        # A logger that is attached again goes on with its dashboard, which knows the tags that it has described.
        known = {id(dashboard.writer): dashboard for dashboard in self._dashboards}
        for logger in self._loggers if writes else ():
            dashboard = Dashboard(
                logger.experiment, parts, *self._dashboard_args, logger_prefix=_prefix_of_logger(logger)
            )
            known.setdefault(id(dashboard.writer), dashboard)
        writers = {id(logger.experiment) for logger in self._loggers} if writes else set()
        self._dashboards = [dashboard for writer, dashboard in known.items() if writer in writers]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what writes files, which another process cannot have."""
        return self.__dict__ | {"_loggers": [], "_dashboards": []}

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
        self._describe_new_tags(values)
        self._overlay(values, "train", step)
        self._num_windows += 1
        if self._num_windows % _WINDOWS_PER_REFERENCE == 0:
            self._write_references(step)

    def on_epoch_logged(self, values: Mapping[str, float], stage: str, step: int) -> None:
        """Describe and overlay the values of an epoch, before they are logged, and keep them for the summary."""
        self._describe_new_tags(values)
        if stage != "train" or not self._num_windows:  # Windows have the line of training, if there are such.
            self._overlay(values, stage, step)
        self._last_logged[stage] = dict(values)

    def _describe_new_tags(self, tags: Iterable[str]) -> None:
        for dashboard in self._dashboards:
            dashboard.describe_new_tags(tags)

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

    def new_stats(self, device: torch.device) -> ValidationStats | None:
        """Return statistics that a validation is to collect; None if nobody will look at them."""
        # Only some ranks may have a logger, so among several ranks the arguments alone decide.
        nobody = not self._loggers and not is_distributed()
        if nobody or self.parts.isdisjoint({"references", "pictures", "summary"}):
            return None
        return ValidationStats(device, counts_classes="references" in self.parts and self._references is None)

    def add_validation(
        self,
        stats: ValidationStats,
        point: ValidationPoint,
        group: ProcessGroup | None,
        decode: Decode | None,
        draw_now: bool,
    ) -> None:
        """Draw a validation and its reference lines; all ranks take part.

        Pictures are large, so only the first, second, fourth, eighth, ... validation and the last are drawn.

        Args:
            stats: What was collected; the histogram is of all ranks together.
            point: The result of the validation.
            group: The ranks that hold different data.
            decode: See `CrossEntropyMonitor`.
            draw_now: Draw whichever validation it is.
        """
        if self._references is None and "references" in self.parts:
            self._references = _compute_references(stats, group)
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
        if self._dashboards and "summary" in self.parts:
            from xent_metrics.tensorboard import summarise  # noqa: PLC0415  # It needs TensorBoard.

            configuration, counts, num_repeated = facts()
            values = {tag: value for stage in self._last_logged.values() for tag, value in stage.items()}
            text = summarise(configuration, values, counts, num_repeated, self._prefix)
            for dashboard in self._dashboards:
                dashboard.add_text("summary", text, step)
        for dashboard in self._dashboards:
            dashboard.flush()

    def _draw_last(self, decode: Decode | None) -> None:
        stats, self._undrawn = self._undrawn, None
        if stats is None:
            return
        try:
            for dashboard in self._dashboards:
                dashboard.draw(stats, self._history, self._references or {}, decode)
        except Exception as error:  # Such as one of `decode`: other ranks would wait for one that stops.
            warnings.warn(
                f"`dashboards` has 'pictures', but drawing one failed with {type(error).__name__}: {error}; there "
                "are no more pictures of this run; leave them out if you can do without.",
                UserWarning,
                stacklevel=2,
            )
            for dashboard in self._dashboards:
                dashboard.parts -= {"pictures"}


def _compute_references(stats: ValidationStats, group: ProcessGroup | None) -> dict[str, float]:
    """Return the reference lines, the same on all ranks: two small collectives, once a run."""
    counts = torch.cat([stats.class_counts, stats.num_beyond.view(1)])
    if is_distributed():
        # A rank without data does not know how many classes there are.
        size = int(max_over_ranks(torch.tensor([len(counts)], device=counts.device), group))
        padded = torch.nn.functional.pad(stats.class_counts, (0, size - len(counts)))
        counts = sum_over_ranks(torch.cat([padded, counts[-1:]]), group) if size > 1 else counts
    *class_counts, num_beyond = counts.tolist()
    if num_beyond:
        num_targets = sum(class_counts) + num_beyond
        rank_zero_warn(
            f"`num_classes` must be larger than every target, but of {num_targets} targets {num_beyond} are not below "
            f"{len(class_counts)}: TensorBoard gets no lines to compare with; pass the size of the vocabulary.",
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


def _prefix_of_logger(logger: Any) -> str:
    """Return what a logger puts before each tag."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""
