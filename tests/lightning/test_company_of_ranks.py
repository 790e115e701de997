"""Values that others log and reduce over ranks, and read on one rank only, make no rank wait for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from torchmetrics import MeanMetric

from tests.lightning.worlds import Table, both, loader, make_trainer, own, pooled, run_ranks
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = pytest.mark.distributed

EPOCH_ENDS = ("on_train_epoch_end", "on_validation_epoch_end", "on_test_epoch_end")


class Logging(Table):
    """Logs in every step what is reduced over ranks when it is read: a number, and a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.ModuleDict({stage: MeanMetric() for stage in ("of_train", "of_val", "of_test")})

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        form = super().step(stage, batch)
        self.log(f"{stage}_x", form["loss"], on_step=True, on_epoch=True, sync_dist=True)
        self.log(f"{stage}_y", form["loss"], on_epoch=True, on_step=False, sync_dist=True)
        self.mean[f"of_{stage}"].update(form["loss"])
        self.log(f"{stage}_z", self.mean[f"of_{stage}"], on_epoch=True, on_step=False)
        return form


class WithMonitor(Logging):
    """Brings the monitor along, which Lightning puts behind the Trainer's own callbacks."""

    def configure_callbacks(self) -> list[Callback]:
        return [CrossEntropyMonitor()]


class InHooks(Callback):
    """Does something wherever ranks may meet."""

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        raise NotImplementedError

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.act(trainer, module)

    on_validation_epoch_end = on_test_epoch_end = on_train_epoch_end

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.act(trainer, module)


class Logs(InHooks):
    """Logs what is reduced over ranks."""

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        module.log(f"{module._current_fx_name}_h", float(trainer.global_rank), sync_dist=True)


class Reads(InHooks):
    """Reads on the first rank only, as a progress bar does."""

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            assert trainer.callback_metrics.keys() | trainer.logged_metrics.keys()


class Saves(InHooks):
    """Saves on all ranks, with which the monitor's state meets the other ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def act(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "any.ckpt")


class Stops(Callback):
    """Stops the run on one rank, where the other learns it a moment later."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if (trainer.global_rank, trainer.fit_loop.batch_idx) == (self.rank, 2):
            trainer.should_stop = True


def keep_company(folder: Path) -> list[dict[str, Any]]:
    """Fit, validate and test in every order of the callbacks."""
    orders: list[tuple[type[Logging], list[Callback]]] = [
        (Logging, [TQDMProgressBar(), CrossEntropyMonitor()]),
        (Logging, [CrossEntropyMonitor(), TQDMProgressBar()]),
        (WithMonitor, [TQDMProgressBar()]),
        (Logging, [Reads(), Saves(folder), CrossEntropyMonitor(), Reads()]),
        (Logging, [Logs(), Reads(), CrossEntropyMonitor(), Saves(folder), ModelCheckpoint(folder / "own")]),
        (Logging, [Stops(0), CrossEntropyMonitor(), Stops(1)]),
    ]
    results = []
    for module_class, callbacks in orders:
        module, trainer = module_class(), make_trainer(*callbacks, log_every_n_steps=2, max_epochs=1)
        trainer.fit(module, loader(16), loader(5))
        metrics = own({tag: x for tag, x in trainer.callback_metrics.items() if "/" in tag})
        for run in (trainer.validate, trainer.test):
            run(module, loader(5), verbose=False)
            metrics |= own({tag: x for tag, x in trainer.callback_metrics.items() if "/" in tag})
        results.append({"metrics": metrics, "seen": module.seen})
    return results


def test_no_order_of_callbacks_makes_ranks_wait_for_ever(tmp_path) -> None:
    """A bar that reads on the first rank what all have to reduce, checkpoints, and a stop that ranks hear in turn."""
    for first, second in zip(*run_ranks(2, keep_company, tmp_path, tmp_path=tmp_path, timeout=40), strict=True):
        assert first["metrics"] == second["metrics"]
        ranks = [first, second]
        for stage, tag in (("train", "train/cross_entropy_epoch"), ("test", "test/cross_entropy")):
            value = float.fromhex(first["metrics"][tag])
            expected = {index: each for batch in both(ranks, stage, 0, 99) for index, each in batch.items()}
            assert value == pytest.approx(pooled([expected]), rel=2e-6)
