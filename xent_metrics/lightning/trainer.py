"""What the monitor asks of a Trainer and its module. No other module knows attributes that Lightning keeps private."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from xent_metrics.distributed import check_group_of_ranks, holds_ranks, is_distributed

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


def show_in_progress_bar(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Let progress bars show values that are on the host; Lightning would copy logged ones there at every batch."""
    connector: Any = trainer._logger_connector
    connector._progress_bar_metrics.update(values)  # The public property would first reduce what is pending.


def current_hook(pl_module: LightningModule) -> str:
    """Return the name of the hook that Lightning is calling."""
    return str(pl_module._current_fx_name)


def tags_of_other_hooks(trainer: Trainer, hook: str) -> set[str]:
    """Return the tags under which `self.log` was called in other hooks than one."""
    results = trainer._results
    tags: set[str] = set()
    for item in results.values() if results is not None else ():
        if item.meta.fx != hook:
            tags.update((item.meta.name, item.meta.forked_name(True), item.meta.forked_name(False)))
    return tags


def values_of_loader(trainer: Trainer, index: int) -> dict[str, Any]:
    """Return the values of a loader that Lightning is about to log, and to print as a column."""
    # One dict for each loader that had batches.
    outputs: list[dict[str, Any]] = trainer._evaluation_loop._logged_outputs
    return outputs[index if index < len(outputs) else -1]


class Ranks(NamedTuple):
    """Which ranks hold which targets.

    Attributes:
        added: Groups of ranks that are added up, one after the other; None is all ranks.
        of_sequences: The ranks that hold other targets of the same sequences; None if none do.
    """

    added: tuple[ProcessGroup | None, ...] = (None,)
    of_sequences: ProcessGroup | None = None


def find_ranks(trainer: Trainer, process_group: Any, sequence_group: Any) -> Ranks:
    """Return the ranks that arguments of `CrossEntropyMonitor` name.

    Raises:
        TypeError: If an argument is neither a process group nor a name.
        ValueError: If the strategy's mesh has no dimension of that name, or if targets of some ranks would be left out.
    """
    if not is_distributed():
        return Ranks()
    mesh: Any = getattr(trainer.strategy, "device_mesh", None)
    dimensions = () if mesh is None else mesh.mesh_dim_names or ()

    def find(argument: str, given: Any) -> Any:
        if not isinstance(given, str):
            check_group_of_ranks(argument, given)
            return given
        if given not in dimensions:
            raise ValueError(
                f"`{argument}` must name a dimension of the mesh of the strategy, which has {list(dimensions)}, got "
                f"{given!r}; name one of these, or pass a process group."
            )
        return mesh[given].get_group()

    of_sequences = find("sequence_group", sequence_group)
    if process_group is None and "data_parallel" in dimensions:
        others = () if of_sequences is None else (of_sequences,)
        return Ranks((mesh["data_parallel"].get_group(), *others), of_sequences)
    several = isinstance(process_group, Sequence) and not isinstance(process_group, str) and len(process_group) > 0
    named = process_group if several else [process_group]
    added = tuple(find("process_group", each) for each in named)
    if of_sequences is not None and not any(holds_ranks(group, of_sequences) for group in added):
        raise ValueError(
            "`process_group` must hold the ranks of `sequence_group`, which have other targets, got "
            f"{process_group!r} and {sequence_group!r}; name the dimensions of both, or pass a group of all of them."
        )
    return Ranks(added, of_sequences)


def describe_trainer(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
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
    return flatten(saved)


def flatten(nested: Mapping[Any, Any]) -> dict[str, Any]:
    """Return hyperparameters in mappings within mappings, under their names joined by slashes."""
    # Names with an underscore are notes of Lightning's to itself.
    return _flatten({name: value for name, value in nested.items() if not str(name).startswith("_")})


def _flatten(nested: Mapping[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        within = _flatten(value) if isinstance(value, Mapping) else None
        flat |= {str(name): value} if within is None else {f"{name}/{inner}": x for inner, x in within.items()}
    return flat
