"""How values reach loggers and callbacks: what `self.log` in a module would do for them, and no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torchmetrics.utilities.prints import rank_zero_warn

from xent_metrics.distributed import is_distributed
from xent_metrics.lightning.trainer import (
    current_hook,
    current_step,
    show_in_progress_bar,
    tags_of_other_hooks,
    values_of_loader,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def reduce_what_is_pending(trainer: Trainer) -> None:
    """Let this rank reduce whatever was logged for an epoch and has not been reduced; all ranks call this.

    Lightning reduces such values when somebody first reads them. A progress bar does so on the first rank only, which
    then waits there for the others: they have to read too before they meet in any other collective.
    """
    if is_distributed():
        _ = trainer.callback_metrics


class ValueLog:
    """Logs values that are the same on all ranks, and warns once of each tag that somebody else logs too.

    Args:
        shown: The tags that progress bars show.
    """

    def __init__(self, shown: Collection[str]) -> None:
        self._shown = shown
        self._warned: set[str] = set()

    def log_step(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Give step values to loggers and callbacks, at the step that Lightning writes at.

        `self.log` would copy every value to the device and back, and write a window again if it decides to write after
        a batch that was no log point here.
        """
        self._warn_of_others(trainer, values, hook="")
        row = {**values, "epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=current_step(trainer))
            logger.save()
        tensors = _as_tensors(values)
        trainer.callback_metrics.update(tensors)
        trainer.logged_metrics.update(tensors)
        self._show(trainer, values)

    def log_epoch(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        values: Mapping[str, float],
        by_loader: Mapping[int, Mapping[str, float]],
    ) -> None:
        """Log values of an epoch; Lightning monitors them, and returns those of a loader with that loader's."""
        if trainer.barebones:  # Lightning would warn about every name.
            return
        self._warn_of_others(trainer, values, hook=current_hook(pl_module))
        if not trainer.sanity_checking:
            self._show(trainer, values)
        # The last two arguments together reduce nothing, and draw no advice to reduce the values once more.
        pl_module.log_dict(
            _as_tensors(values), batch_size=1, add_dataloader_idx=False, sync_dist=True, rank_zero_only=True
        )
        if by_loader and not trainer.sanity_checking:
            for i, of_loader in by_loader.items():
                tensors = _as_tensors(of_loader)
                values_of_loader(trainer, i).update(tensors)
                trainer.callback_metrics.update(tensors)

    def _show(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        show_in_progress_bar(trainer, {tag: values[tag] for tag in self._shown if tag in values})

    def _warn_of_others(self, trainer: Trainer, values: Mapping[str, float], hook: str) -> None:
        """Warn of tags that were also logged with `self.log`, in other hooks than this one."""
        if clashes := sorted(tags_of_other_hooks(trainer, hook) & values.keys() - self._warned):
            self._warned.update(clashes)
            rank_zero_warn(
                f"`CrossEntropyMonitor` logs {clashes}, which the module or another callback logs too: both are mixed "
                "under one tag; pass `prefix=`, such as prefix='pooled/', or log yours under another name.",
                UserWarning,
            )


def _as_tensors(values: Mapping[str, float]) -> dict[str, torch.Tensor]:
    # Lightning would round floats to float32, and copy them to the device.
    return {tag: torch.tensor(value, dtype=torch.float64, device="cpu") for tag, value in values.items()}
