"""Lightning: a callback that logs pooled likelihoods from what the steps already return.

The usual `self.log("val_loss", loss)` averages batch means, weighted by a batch size that Lightning guesses from the
first tensor it finds: sequences, not tokens. Here every batch becomes a tally, and only tallies are averaged.

The callback holds its tallies itself. Attached to the module they would be cast by `precision="bf16-true"`, copied by
weight averaging and listed in the model summary.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler, IterableDataset

from xent_metrics.batch import tally_batch
from xent_metrics.distributed import is_distributed, unrepeated
from xent_metrics.losses import Input, LossOptions
from xent_metrics.metrics import CrossEntropyReport
from xent_metrics.tally import Tally, sum_tallies_over_ranks, tally_mean

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.distributed import ProcessGroup
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

    `labels` is accepted for `target`. Either is aligned with `logits` (position t is scored by `logits[:, t]`), unless
    `shift` says otherwise.

    Logged metrics:
        - `train/cross_entropy`, `train/bits_per_token`, `train/perplexity`: over all targets since the last log
          point (not the last batch only), at the steps where Lightning logs;
        - `train/cross_entropy_epoch`, `train/bits_per_token_epoch`, `train/perplexity_epoch`: over the epoch;
        - `val/cross_entropy`, `val/bits_per_token`, `val/perplexity`, and the same with `test/`: over the whole
          epoch and all loaders; with `_lower` and `_upper` of cross-entropy and perplexity, a 95 % interval
          clustered by sequence.

    Every rank logs the value of all ranks together, at one collective a log point and one at the end of each epoch.
    Samples that `DistributedSampler` draws twice, so that ranks have equally many, are scored once in validation and
    test; where that cannot be known a warning says so. With tensor parallelism the data-parallel ranks are added up.

    A run that is resumed in the middle of an epoch goes on with the tallies of its checkpoint, also on another number
    of ranks, and logs the same bits at the end of the epoch as one that was never stopped, if the loader saves its
    position (`state_dict` and `load_state_dict`): Lightning starts a plain `DataLoader` from its beginning again. A
    checkpoint that was written because of an exception on several ranks lacks what was tallied since the last log
    point, as the rank that failed cannot ask the others.

    All values go through `self.log`, so every logger gets them, and `ModelCheckpoint` and `EarlyStopping` can monitor
    them. Monitor `val/cross_entropy`: a perplexity may overflow to `inf` early on, which stops `EarlyStopping`.

    Args:
        extract: Called as `extract(outputs, batch)`, returns one of the forms above, for steps that return something
            else. `outputs["loss"]` is then the loss as the step returned it.
        class_dim: The dimension of `logits` that counts classes.
        ignore_index: The target that is not scored; None for none.
        shift: Let `logits[:, t]` score target t + 1, for logits and labels of one length as Hugging Face models have
            them; `losses` are aligned with their targets already.

    Raises:
        ValueError: In a step's hook, if the step returned none of the forms.

    Example::

        Trainer(callbacks=[CrossEntropyMonitor(), EarlyStopping("val/cross_entropy")])
    """

    _window: Tally

    def __init__(
        self,
        extract: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        class_dim: int = -1,
        ignore_index: int | None = -100,
        shift: bool = False,
    ) -> None:
        self.extract = extract
        self.class_dim = class_dim
        self.ignore_index = ignore_index
        self.shift = shift
        self._report = CrossEntropyReport(class_dim=class_dim, ignore_index=ignore_index)
        self._group: ProcessGroup | None = None
        self._forget()

    @property
    def state_key(self) -> str:
        """Tell instances apart that are set up differently, so that each gets its own state back."""
        return self._generate_state_key(class_dim=self.class_dim, ignore_index=self.ignore_index, shift=self.shift)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move to the device of the run and forget the last one."""
        self._report.to(trainer.strategy.root_device)
        self._group = _data_parallel_group(trainer)
        self._forget()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for name in self._epoch_tags():
                # Lightning recommends `sync_dist=True` for what is logged here, which would reduce it a second time.
                warnings.filterwarnings("ignore", f".*{re.escape(f'self.log({name!r}')}", UserWarning)

    def state_dict(self) -> dict[str, Any]:
        """Return the tallies of the training epoch, of all ranks together; the ranks meet in one collective.

        After an exception only the rank that failed may be here: among several ranks, what was tallied since the last
        log point is then left out.
        """
        window = self._zero() if self._failed and is_distributed() else self._over_ranks(self._window)
        return {"earlier": (self._earlier + window).state, "epoch": (self._epoch + window).state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the middle of an epoch, on any number of ranks, all of which hold what all of them had tallied."""
        self._earlier, self._epoch = (Tally(state_dict[name].to(self._report.device)) for name in ("earlier", "epoch"))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait for no other rank from now on."""
        self._failed = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an epoch."""
        self._epoch = self._zero()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tally the batch, and log the window if Lightning is about to write."""
        if trainer.fit_loop.batch_idx == 0:
            self._epoch = self._zero()  # Lightning does not announce an epoch that starts where a run is resumed.
        if outputs and pl_module.automatic_optimization:
            outputs = {**outputs, "loss": outputs["loss"] * trainer.accumulate_grad_batches}
        if outputs or not pl_module.automatic_optimization:  # Lightning skips a batch whose step returned None.
            self._window = self._window + self._tally("training_step", outputs, batch)
        if _is_log_point(trainer, pl_module):
            window = self._close_window()
            pl_module.log_dict(self._tagged("train", window + self._earlier), on_step=True, on_epoch=False)
            self._earlier = self._zero()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._earlier = self._earlier + self._close_window()
        pl_module.log_dict(self._tagged("train", self._epoch, suffix="_epoch"), batch_size=1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a validation; the sanity check before it leaves no trace."""
        self._evaluation = self._zero()

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
        drawn = self._unrepeated(trainer.val_dataloaders, "val", batch_idx, dataloader_idx)
        self._evaluation = self._evaluation + self._tally("validation_step", outputs, batch, drawn)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation."""
        pl_module.log_dict(self._tagged("val", self._over_ranks(self._evaluation), bounds=True), batch_size=1)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a test."""
        self._evaluation = self._zero()

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
        drawn = self._unrepeated(trainer.test_dataloaders, "test", batch_idx, dataloader_idx)
        self._evaluation = self._evaluation + self._tally("test_step", outputs, batch, drawn)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test."""
        pl_module.log_dict(self._tagged("test", self._over_ranks(self._evaluation), bounds=True), batch_size=1)

    def _zero(self) -> Tally:
        return Tally.zero(self._report.device)

    def _forget(self) -> None:
        # The window is of this rank and not yet part of the rest, which is of all ranks together. `_earlier` is what
        # was reduced before it was logged: at the end of an epoch, or by a checkpoint.
        self._window, self._earlier, self._epoch = self._zero(), self._zero(), self._zero()
        self._evaluation = self._zero()
        self._failed = False
        self._warned: set[str] = set()

    def _over_ranks(self, tally: Tally) -> Tally:
        """Add up over the ranks that hold different data: one collective."""
        (total,) = sum_tallies_over_ranks([tally], self._group)
        return total

    def _close_window(self) -> Tally:
        """Reduce the window, give it to the epoch, and start another."""
        window = self._over_ranks(self._window)
        self._epoch = self._epoch + window
        self._window = self._zero()
        return window

    def _tagged(self, stage: str, tally: Tally, suffix: str = "", bounds: bool = False) -> dict[str, Tensor]:
        """Read a tally of all ranks, under the tags that it is logged with."""
        values = self._report.read(tally)
        # All bounds are NaN or none is: there is no interval below two sequences.
        known = _BOUNDS if bounds and not math.isnan(values[_BOUNDS[0]]) else ()
        return {f"{stage}/{name}{suffix}": values[name] for name in (*_READINGS, *known)}

    @staticmethod
    def _epoch_tags() -> list[str]:
        tags = [f"{stage}/{name}" for stage in ("val", "test") for name in (*_READINGS, *_BOUNDS)]
        return [*tags, *(f"train/{name}_epoch" for name in _READINGS)]

    def _unrepeated(self, loaders: Any, stage: str, batch_idx: int, dataloader_idx: int) -> tuple[int, int] | None:
        """Return how many samples this rank drew for a batch, and how many of them are no repetition.

        None where the sampler that deals samples to ranks need not repeat any.
        """
        loader = tree_leaves(loaders)[dataloader_idx]
        sampler, batch_size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
        if not is_distributed() or sampler is None or isinstance(getattr(loader, "dataset", None), IterableDataset):
            return None
        if not isinstance(sampler, DistributedSampler) or batch_size is None:
            own = "batches of its own" if batch_size is None else f"a {type(sampler).__name__}"
            self._warn_repeated(f"the {stage} loader has {own}")
            return None
        if sampler.total_size <= len(sampler.dataset):  # type: ignore[arg-type]
            return None
        start = batch_idx * batch_size
        num_samples = min(batch_size, len(sampler) - start)
        return num_samples, unrepeated(sampler, start, num_samples)

    def _warn_repeated(self, reason: str) -> None:
        """Say once that samples may be counted twice."""
        if reason not in self._warned:
            self._warned.add(reason)
            if torch.distributed.get_rank() != 0:
                return
            warnings.warn(
                f"`CrossEntropyMonitor` cannot tell which samples ranks draw twice to be equally many, since {reason}: "
                "all of them are counted; use `torch.utils.data.DistributedSampler` and return targets with a row for "
                "each sample, or make the number of samples a multiple of the number of ranks.",
                UserWarning,
                stacklevel=2,
            )

    def _tally(self, step: str, outputs: Any, batch: Any, drawn: tuple[int, int] | None = None) -> Tally:
        """Tally what a step returned: of all samples that were drawn, or of the first ones of them only."""
        form = outputs if self.extract is None else self.extract(outputs, batch)
        seen = sorted(map(str, form)) if isinstance(form, Mapping) else type(form).__name__
        if isinstance(form, Mapping):
            target = form.get("target", form.get("labels"))
            kinds: tuple[Input, ...] = ("losses", "logits")
            for kind in kinds:
                if kind in form and target is not None:
                    shift = self.shift and kind == "logits"
                    options = LossOptions(kind, self.class_dim, ignore_index=self.ignore_index, shift=shift)
                    return tally_batch(*self._first(drawn, form[kind], target), None, options)
            if "loss" in form and "num_tokens" in form:
                if drawn is not None:
                    self._warn_repeated(f"{step} returns means")
                return _tally_mean(form["loss"], form["num_tokens"])
        raise ValueError(
            f"{step if self.extract is None else '`extract`'} must return {_FORMS}, got {seen}; add what "
            "is missing, or pass `extract`."
        )

    def _first(self, drawn: tuple[int, int] | None, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Drop the rows of repeated samples, which come last."""
        if drawn is None:
            return preds, target
        num_samples, kept = drawn
        if target.shape[:1] != (num_samples,) or preds.shape[:1] != (num_samples,):
            self._warn_repeated("targets do not have a row for each sample")
            return preds, target
        return preds[:kept], target[:kept]


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


def _data_parallel_group(trainer: Trainer) -> ProcessGroup | None:
    """Return the ranks that hold different data; None for all of them."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if mesh is None or "data_parallel" not in (mesh.mesh_dim_names or ()):
        return None
    group: ProcessGroup = mesh["data_parallel"].get_group()
    return group
