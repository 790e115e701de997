"""Lightning: a callback that logs pooled likelihoods from what the steps already return.

The usual `self.log("val_loss", loss)` averages batch means, weighted by a batch size that Lightning guesses from the
first tensor it finds: sequences, not tokens. Here every batch becomes a tally, and only tallies are averaged.

The callback holds its tallies itself. Attached to the module they would be cast by `precision="bf16-true"`, copied by
weight averaging and listed in the model summary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xent_metrics import functional
from xent_metrics.losses import Input
from xent_metrics.metrics import CrossEntropyReport
from xent_metrics.tally import Tally, tally_mean

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # `lightning.pytorch` and `pytorch_lightning` are the same code twice, with unrelated classes. A subclass of both
    # `Callback`s is accepted by both `Trainer`s, and by the command line of either.
    _bases = []
    for _package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            _bases.append(__import__(_package, fromlist=["Callback"]).Callback)
        except ModuleNotFoundError as error:
            if not _package.startswith(str(error.name)):
                raise
    if not _bases:
        raise ModuleNotFoundError(
            "`xent_metrics.callback` needs Lightning; install it with `pip install xent-metrics[lightning]`."
        )
    Callback = type("Callback", tuple(_bases), {})

_READINGS = ("cross_entropy", "bits_per_token", "perplexity")
_BOUNDS = ("cross_entropy_lower", "cross_entropy_upper", "perplexity_lower", "perplexity_upper")
_FORMS = (
    '{"losses": per-target losses in nats, "target": ...}, {"logits": ..., "target": ...} '
    '(with "labels" for "target" if you like), or {"loss": mean over targets, "num_tokens": how many}'
)


class CrossEntropyMonitor(Callback):
    """Log cross-entropy, bits per token and perplexity of all targets, from what the steps return.

    `training_step`, `validation_step` and `test_step` return one of

    - `{"loss": ..., "losses": per-target losses in nats, "target": ...}`: recommended for training, since it computes
      nothing a second time: `losses = F.cross_entropy(..., reduction="none")` and `loss = losses.mean()`;
    - `{"logits": ..., "target": ...}`: the losses are computed here, without regularisers or smoothing;
    - `{"loss": mean over targets, "num_tokens": how many}`: whatever the loss holds is what is read, and as nothing is
      known of sequences there is no interval.

    `labels` is accepted for `target`. It is aligned with `logits` (position t is scored by `logits[:, t]`).

    Logged metrics:
        - `train/cross_entropy`, `train/bits_per_token`, `train/perplexity`: over all targets since the last log
          point (not the last batch only), at the steps where Lightning logs;
        - `train/cross_entropy_epoch`, `train/bits_per_token_epoch`, `train/perplexity_epoch`: over the epoch;
        - `val/cross_entropy`, `val/bits_per_token`, `val/perplexity`, and the same with `test/`: over the whole
          epoch and all loaders; with `_lower` and `_upper` of cross-entropy and perplexity, a 95 % interval
          clustered by sequence.

    They go through `self.log`, so every logger gets them, and `ModelCheckpoint` and `EarlyStopping` can monitor them.
    Monitor `val/cross_entropy`: a perplexity may overflow to `inf` early on, which stops `EarlyStopping`.

    Args:
        extract: Called as `extract(outputs, batch)`, returns one of the forms above, for steps that return something
            else. `outputs["loss"]` is then the loss as the step returned it.
        class_dim: The dimension of `logits` that counts classes.
        ignore_index: The target that is not scored; None for none.

    Raises:
        ValueError: In a step's hook, if the step returned none of the forms.

    Example::

        Trainer(callbacks=[CrossEntropyMonitor(), EarlyStopping("val/cross_entropy")])
    """

    def __init__(
        self,
        extract: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        class_dim: int = -1,
        ignore_index: int | None = -100,
    ) -> None:
        self.extract = extract
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        # One tally each. The window is split at the end of an epoch, which gets only its own part of it.
        self._window = CrossEntropyReport(class_dim=class_dim, ignore_index=ignore_index)
        self._earlier_window, self._epoch, self._evaluation = (
            CrossEntropyReport(class_dim=class_dim, ignore_index=ignore_index) for _ in range(3)
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move to the device of the run and forget the last one."""
        for report in (self._window, self._earlier_window, self._epoch, self._evaluation):
            report.to(trainer.strategy.root_device)
            report.reset()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an epoch."""
        self._epoch.reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tally the batch, and log the window if Lightning is about to write."""
        if pl_module.automatic_optimization:
            if not outputs:
                return  # The step returned None: Lightning skips such a batch.
            outputs = {**outputs, "loss": outputs["loss"] * trainer.accumulate_grad_batches}
        self._window.add(self._tally("training_step", outputs, batch))
        if _is_log_point(trainer, pl_module):
            self._epoch.add(self._window.tally)
            self._window.add(self._earlier_window.tally)
            pl_module.log_dict(_tagged("train", self._window), on_step=True, on_epoch=False)
            self._window.reset()
            self._earlier_window.reset()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._epoch.add(self._window.tally)
        self._earlier_window.add(self._window.tally)
        self._window.reset()
        pl_module.log_dict(_tagged("train", self._epoch, suffix="_epoch"), batch_size=1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a validation; the sanity check before it leaves no trace."""
        self._evaluation.reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tally the batch."""
        self._evaluation.add(self._tally("validation_step", outputs, batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation."""
        pl_module.log_dict(_tagged("val", self._evaluation, bounds=True), batch_size=1)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a test."""
        self._evaluation.reset()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tally the batch."""
        self._evaluation.add(self._tally("test_step", outputs, batch))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test."""
        pl_module.log_dict(_tagged("test", self._evaluation, bounds=True), batch_size=1)

    def _tally(self, step: str, outputs: Any, batch: Any) -> Tally:
        """Tally what a step returned."""
        form = outputs if self.extract is None else self.extract(outputs, batch)
        seen = sorted(map(str, form)) if isinstance(form, Mapping) else type(form).__name__
        if isinstance(form, Mapping):
            target = form.get("target", form.get("labels"))
            kinds: tuple[Input, ...] = ("losses", "logits")
            for kind in kinds:
                if kind in form and target is not None:
                    return functional.tally(
                        form[kind], target, input=kind, class_dim=self.class_dim, ignore_index=self.ignore_index
                    )
            if "loss" in form and "num_tokens" in form:
                return _tally_mean(form["loss"], form["num_tokens"])
        raise ValueError(
            f"{step if self.extract is None else '`extract`'} must return {_FORMS}, got {seen}; add what "
            "is missing, or pass `extract`."
        )


def _tally_mean(loss: Tensor, num_tokens: Tensor | int) -> Tally:
    with torch.no_grad():
        return tally_mean(loss, torch.as_tensor(num_tokens, dtype=torch.int64, device=loss.device))


def _is_log_point(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Say whether Lightning writes step values after this batch: the rule of its own loop, which it keeps private."""
    loop: Any = trainer.fit_loop
    if loop._should_accumulate() and pl_module.automatic_optimization:
        return False
    settings: Any = trainer  # Set by Lightning's connectors, where type checkers do not see them.
    if settings.fast_dev_run or trainer.should_stop:
        return True
    every: int = settings.log_every_n_steps
    return bool(every > 0 and (loop.epoch_loop._batches_that_stepped + 1) % every == 0)


def _tagged(stage: str, report: CrossEntropyReport, suffix: str = "", bounds: bool = False) -> dict[str, Tensor]:
    """Read a report, on all ranks at once, under the tags that it is logged with."""
    values = report.compute()
    known = [name for name in _BOUNDS if not math.isnan(values[name])] if bounds else []
    return {f"{stage}/{name}{suffix}": values[name] for name in (*_READINGS, *known)}
