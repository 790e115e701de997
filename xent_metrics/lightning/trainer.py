"""What the monitor asks of a Trainer and its module. No other module knows attributes that Lightning keeps private."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from xent_metrics.distributed import is_distributed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.distributed import ProcessGroup


def current_step(trainer: Trainer) -> int:
    """Return the step that Lightning writes at, which is not `global_step`."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def is_log_point(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether Lightning writes step values after this batch, by the rule of its own loop.

    Among several ranks, whether the run is about to stop is not asked: a callback or a signal may have told only some.
    """
    loop: Any = trainer.fit_loop
    if loop._should_accumulate() and pl_module.automatic_optimization:
        return False
    settings: Any = trainer  # Set by Lightning's connectors, where type checkers do not see them.
    if settings.fast_dev_run or (trainer.should_stop and not is_distributed()):
        return True
    every: int = settings.log_every_n_steps
    return bool(every > 0 and (loop.epoch_loop._batches_that_stepped + 1) % every == 0)


def data_parallel_group(trainer: Trainer) -> ProcessGroup | None:
    """Return the ranks that hold different data; None for all of them."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if mesh is None or "data_parallel" not in (mesh.mesh_dim_names or ()):
        return None
    group: ProcessGroup = mesh["data_parallel"].get_group()
    return group


def reduce_what_is_pending(trainer: Trainer) -> None:
    """Let this rank reduce whatever was logged for an epoch and has not been reduced; all ranks call this.

    Lightning reduces such values when somebody first reads them. A progress bar does so on the first rank only, which
    then waits there for the others: they have to read too before they meet in any other collective.
    """
    if is_distributed():
        _ = trainer.callback_metrics


def log_step_values(trainer: Trainer, values: dict[str, float]) -> None:
    """Give step values to the loggers as Lightning's own monitors do, at the step that it writes at.

    `self.log` would copy every value to the device and back, and write a window again if it decides to write after a
    batch that was no log point here.
    """
    for logger in trainer.loggers:
        logger.log_metrics(values, step=current_step(trainer))
    trainer.callback_metrics.update(_as_tensors(values))


def log_epoch_values(trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
    """Log values of an epoch that are the same on all ranks; Lightning monitors them, and returns them."""
    if not trainer.barebones:  # Lightning would warn about every name.
        # The last two arguments together reduce nothing, and draw no advice to reduce the values once more.
        pl_module.log_dict(
            _as_tensors(values), batch_size=1, add_dataloader_idx=False, sync_dist=True, rank_zero_only=True
        )


def _as_tensors(values: Mapping[str, float]) -> dict[str, torch.Tensor]:
    # Lightning would round floats to float32, and copy them to the device.
    return {tag: torch.tensor(value, dtype=torch.float64, device="cpu") for tag, value in values.items()}


def describe_run(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return how long a run was, on what it ran, and its hyperparameters."""
    return {
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "ranks": trainer.world_size,
        "precision": trainer.precision,
        **saved_hparams(trainer, pl_module),
    }


def saved_hparams(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return what data module and module saved as hyperparameters, unless they are not to be logged."""
    sources: list[Any] = [getattr(trainer, "datamodule", None), pl_module]
    logged = [source.hparams_initial for source in sources if getattr(source, "_log_hyperparams", False)]
    saved = {str(name): value for hparams in logged for name, value in hparams.items()}
    # Names with an underscore are notes of Lightning's to itself.
    return _flatten({name: value for name, value in saved.items() if not name.startswith("_")})


def _flatten(nested: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values in mappings within mappings, under their names joined by slashes."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        within = _flatten(value) if isinstance(value, Mapping) else None
        flat |= {str(name): value} if within is None else {f"{name}/{inner}": x for inner, x in within.items()}
    return flat
