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
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler, IterableDataset

from xent_metrics.boards import PARTS, Boards, Part
from xent_metrics.distributed import is_distributed, unrepeated
from xent_metrics.kernels import Backend
from xent_metrics.outputs import Mean, OutputReader, Pool, Tallies, add_tallies
from xent_metrics.pictures import Decode, Gallery, Reached
from xent_metrics.readings import ExactReading, GroupReading, NanPolicy, check_reading, check_valid
from xent_metrics.tally import GroupTally, sum_tallies_over_ranks

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
_BEST = "best_bits_per_token"


class CrossEntropyMonitor(Callback):
    """Log cross-entropy, bits per token and perplexity of all targets, from what the steps return.

    `training_step`, `validation_step` and `test_step` return one of

    - `{"loss": ..., "losses": per-target losses in nats, "target": ...}`: recommended for training, since it computes
      nothing a second time: `losses = F.cross_entropy(..., reduction="none")` and `loss = losses.mean()`;
    - `{"logits": ..., "target": ...}`: the losses are computed here, without regularisers or smoothing;
    - `{"loss": mean over targets, "num_tokens": how many}`: whatever the loss holds is what is read, and as nothing is
      known of single targets there is no interval, and there are neither groups nor bytes.

    `labels` is accepted for `target`. Either is aligned with `logits` (position t is scored by `logits[:, t]`), unless
    `shift` says otherwise.

    Logged metrics:
        `{stage}` is `train`, `val` or `test`, `{reading}` is `cross_entropy` (nats), `bits_per_token` or `perplexity`,
        and with `token_bytes` also `bits_per_byte`; `prefix` stands before all of them.

        - `train/{reading}`: over all targets since the last log point (not the last batch only), at the steps where
          Lightning logs;
        - `train/{reading}_epoch`: over the epoch;
        - `val/{reading}`, `test/{reading}`: over the whole epoch and all loaders, each target counting once;
        - `{val,test}/cross_entropy_lower`, `_upper`, `{val,test}/perplexity_lower`, `_upper`: an interval of
          `confidence`, clustered by sequence; not logged where there are no two sequences;
        - `val/best_bits_per_token`: the lowest `val/bits_per_token` of the run so far;
        - `{val,test}/{reading}/dataloader_idx_{i}`: each loader by itself, if several have targets;
        - `{stage}/{reading}/{group}`: each of `groups` by itself, wherever it has targets;
        - for TensorBoard alone, `val/uniform_bits_per_token` and `val/unigram_bits_per_token`, the images
          `val/distribution`, `val/by_position`, `val/interval` and `val/surprisal`, and the text `summary`; see
          `dashboards`.

        NaN is logged where there are no targets at all.

    Every rank logs the value of all ranks together, at one collective a log point and one at the end of each epoch.
    Samples that `DistributedSampler` draws twice, so that ranks have equally many, are scored once in validation and
    test; where that cannot be known a warning says so. With tensor parallelism the data-parallel ranks are added up.

    A run that is resumed in the middle of an epoch goes on with the tallies of its checkpoint, also on another number
    of ranks, and logs the same bits at the end of the epoch as one that was never stopped, if the loader saves its
    position (`state_dict` and `load_state_dict`): Lightning starts a plain `DataLoader` from its beginning again. A
    checkpoint that was written because of an exception on several ranks lacks what was tallied since the last log
    point, as the rank that failed cannot ask the others.

    All loggers get the values, and `ModelCheckpoint` and `EarlyStopping` can monitor them. Monitor
    `val/cross_entropy`: a perplexity may overflow to `inf` early on, which stops `EarlyStopping`.

    Args:
        extract: Called as `extract(outputs, batch)`, returns one of the forms above, for steps that return something
            else. `outputs["loss"]` is then the loss as the step returned it. An import path in YAML.
        class_dim: The dimension of `logits` that counts classes.
        ignore_index: The target that is not scored; None for none.
        shift: Let `logits[:, t]` score target t + 1, for logits and labels of one length as Hugging Face models have
            them; `losses` are aligned with their targets already.
        groups: Names of data sets, domains, ... that are also read by themselves. The form then has `"group"` beside
            its target: a name or an index into the names, for the batch, for each of its sequences, or for each target.
        token_bytes: Bytes of text behind each token id, as `xent_metrics.token_byte_lengths(tokenizer).tolist()`
            gives them, or a file to which `torch.save` wrote them; adds `bits_per_byte`.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them out,
            `"raise"` stops the run.
        confidence: Probability that the intervals cover the mean over all sequences that might have been drawn.
        prefix: What stands before all tags, such as `"ema/"`; each of several monitors needs its own.
        dashboards: What to write beside the values where there is a TensorBoard logger; `()` for nothing, and
            `"overlay"` is not there unless you name it:

            - `"layout"`: charts in the Custom Scalars tab, beside those that are there already;
            - `"descriptions"`: definition, unit, and what is pooled and left out, behind the "i" of every chart;
            - `"references"`: `val/uniform_bits_per_token` and `val/unigram_bits_per_token`, lines to compare with;
            - `"hparams"`: a row in the HParams tab with the values of this run's tags, in place of Lightning's own;
            - `"pictures"`: the distribution of losses, loss by position, all validations with their intervals, and a
              text coloured by what each token cost: at the first, second, fourth, ... validation and the last;
            - `"summary"`: a page in the Text tab when the fit is over;
            - `"overlay"`: the same readings again under `train` and `val`, as runs of their own, hence two colours.
        decode: Turns a list of one token into text, for the coloured one: `tokenizer.decode`. May be set later, as
            `monitor.decode = ...`, before the fit. Without it, numbers are shown.
        num_classes: How many classes there are, for the lines to compare with where no step returns logits.
        backend: How losses are made of logits: as they are (`"auto"`, `"eager"`), or by a compiler (`"compile"`); see
            `CrossEntropy`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is not as described; in a step's hook, if the step returned none of the forms; at a
            log point, if targets were out of range.

    Example::

        Trainer(callbacks=[CrossEntropyMonitor(), EarlyStopping("val/cross_entropy")])
    """

    _window: Pool
    _validated: Tallies

    def __init__(
        self,
        extract: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        class_dim: int = -1,
        ignore_index: int | None = -100,
        shift: bool = False,
        groups: Sequence[str] | None = None,
        token_bytes: Sequence[int] | Tensor | str | None = None,
        nan_policy: NanPolicy = "propagate",
        confidence: float = 0.95,
        prefix: str = "",
        dashboards: Sequence[Part] = PARTS,
        decode: Decode | None = None,
        num_classes: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        check_reading(nan_policy, confidence)
        if not isinstance(prefix, str) or not re.fullmatch(r"[\w./-]*", prefix, re.ASCII):
            raise ValueError(
                "`prefix` must be text of letters, digits, '_', '.', '-' and '/', which all loggers accept, got "
                f"{prefix!r}."
            )
        if decode is not None and not callable(decode):
            raise TypeError(f"`decode` must turn a list of one token into text, got {decode!r}; pass tokenizer.decode.")
        self._outputs = OutputReader(extract, class_dim, ignore_index, shift, groups, token_bytes, num_classes, backend)
        self._configuration = {
            "class_dim": class_dim,
            "ignore_index": ignore_index,
            "shift": shift,
            "groups": self._outputs.groups,
            "token_bytes": self._outputs.token_bytes is not None,
            "prefix": prefix,
        }
        self.nan_policy: NanPolicy = nan_policy
        self.confidence = confidence
        self.prefix = prefix
        self.decode = decode
        self._readings = (*_READINGS, *(["bits_per_byte"] if self._outputs.token_bytes is not None else []))
        self._boards = Boards(dashboards, self._readings, self._outputs.groups, prefix)
        self._gallery: Gallery | None = None
        self._group: ProcessGroup | None = None
        self._evaluation: list[Pool] = []
        self._forget()

    @property
    def state_key(self) -> str:
        """Tell instances apart that are set up differently, so that each gets its own state back."""
        return self._generate_state_key(**self._configuration)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move to the device of the run; one that fits forgets the last one."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(other, CrossEntropyMonitor) and other.prefix == self.prefix for other in callbacks) > 1:
            raise ValueError(
                f"`prefix` must be another for each CrossEntropyMonitor of a Trainer, got {self.prefix!r} twice; their "
                "values would be averaged under one tag."
            )
        self._outputs.to(trainer.strategy.root_device)
        self._group = _data_parallel_group(trainer)
        self._boards.attach(trainer.loggers, trainer.is_global_zero)
        if stage == "fit":
            self._forget()
        elif stage == "validate":
            self._boards.forget()  # It may be of other data, or of another trainer.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Lightning recommends `sync_dist=True` for what is logged here, which would reduce it a second time.
            tag = rf"{re.escape(self.prefix)}(train|val|test)/({_BEST}|{'|'.join(_READINGS)}|bits_per_byte)"
            warnings.filterwarnings("ignore", rf".*self\.log\('{tag}", UserWarning)

    def state_dict(self) -> dict[str, Any]:
        """Return the tallies of the training epoch, of all ranks together; the ranks meet in one collective.

        After an exception only the rank that failed may be here: among several ranks, what was tallied since the last
        log point is then left out.
        """
        alone = self._failed and is_distributed()
        [window] = [self._outputs.zero()] if alone else self._over_ranks([self._window.tallies()])
        earlier, epoch = add_tallies(self._earlier, window), add_tallies(self._epoch, window)
        seen = add_tallies(self._seen, window[:1])
        return {
            "earlier": [tally.state for tally in earlier],
            "epoch": [tally.state for tally in epoch],
            "seen": [tally.state for tally in seen],
            "best": self._best,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the middle of an epoch, on any number of ranks, all of which hold what all of them had tallied."""
        zero = self._outputs.zero()
        self._earlier, self._epoch, self._seen = (
            tuple(type(each)(state.to(each.state.device)) for each, state in zip(zero, state_dict[name], strict=False))
            for name in ("earlier", "epoch", "seen")
        )
        self._best = state_dict["best"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row of the run in TensorBoard's table of hyperparameters, before Lightning writes its own."""
        self._boards.log_hparams(
            _hparams(trainer, pl_module), [f"{self.prefix}val/{name}" for name in (_BEST, *self._readings)]
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close what was opened, also after an error."""
        self._boards.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait for no other rank from now on."""
        self._failed = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an epoch."""
        self._epoch = self._outputs.zero()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tally the batch, and log the window if Lightning is about to write."""
        if trainer.fit_loop.batch_idx == 0:
            # Lightning does not announce an epoch that starts where a run is resumed.
            self._epoch = self._outputs.zero()
        if outputs and pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            outputs = {**outputs, "loss": outputs["loss"] * trainer.accumulate_grad_batches}
        if outputs or not pl_module.automatic_optimization:  # Lightning skips a batch whose step returned None.
            self._tally(self._window, "training_step", outputs, batch)
        if _is_log_point(trainer, pl_module):
            window = self._close_window()
            self._write_step(trainer, self._read("train", add_tallies(window, self._earlier)))
            self._earlier = self._outputs.zero()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._earlier = add_tallies(self._earlier, self._close_window())
        self._log_epoch(trainer, pl_module, self._read("train", self._epoch[:1], suffix="_epoch"), "train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a validation; the sanity check before it leaves no trace."""
        self._evaluation = [Pool(self._outputs.zero()) for _ in trainer.num_val_batches]
        self._gallery = None if trainer.sanity_checking else self._boards.gallery(self._outputs.device)

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
        self._evaluate("validation_step", outputs, batch, drawn, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation, and in a fit the best one so far."""
        values, whole = self._read_evaluation("val")
        if not trainer.sanity_checking:
            self._validated = whole
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            known = (self._best, values[f"{self.prefix}val/bits_per_token"])
            self._best = min((bits for bits in known if not math.isnan(bits)), default=math.nan)
            values[f"{self.prefix}val/{_BEST}"] = self._best
        self._log_epoch(trainer, pl_module, values, "val")
        if self._gallery is not None:
            tag = f"{self.prefix}val/cross_entropy"
            bits = (values.get(f"{tag}{end}", math.nan) / math.log(2) for end in ("", "_lower", "_upper"))
            reached, alone = Reached(_step(trainer), *bits), trainer.state.fn == "validate"
            self._boards.show(self._gallery, reached, self._group, self.decode, now=alone)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last validation, and write what the run has reached."""
        last = max(0, _step(trainer) - 1)  # Of the last batch; Lightning has counted on.
        self._boards.finish(lambda: self._summary(trainer, pl_module), last, self.decode)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a test."""
        self._evaluation = [Pool(self._outputs.zero()) for _ in trainer.num_test_batches]
        self._gallery = None

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
        self._evaluate("test_step", outputs, batch, drawn, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test."""
        self._log_epoch(trainer, pl_module, self._read_evaluation("test")[0], "test")

    def _evaluate(
        self, step: str, outputs: Any, batch: Any, drawn: tuple[int, int] | None, dataloader_idx: int
    ) -> None:
        """Add a batch to the tallies of its loader."""
        self._tally(self._evaluation[dataloader_idx], step, outputs, batch, drawn, self._gallery)

    def _forget(self) -> None:
        # The window is of this rank and not yet part of the rest, which is of all ranks together. `_earlier` is what
        # was reduced before it was logged: at the end of an epoch, or by a checkpoint.
        zero = self._outputs.zero()
        self._window, self._earlier, self._epoch, self._seen = Pool(zero), zero, zero, zero[:1]
        self._best = math.nan
        self._reached: dict[str, float] = {}
        self._validated = zero[:1]
        self._failed = False
        self._boards.forget()
        self._warned: set[str] = set()

    def _over_ranks(self, several: list[Any]) -> list[Any]:
        """Add up over the ranks that hold different data: one collective."""
        total = iter(sum_tallies_over_ranks([tally for tallies in several for tally in tallies], self._group))
        return [tuple(next(total) for _ in tallies) for tallies in several]

    def _close_window(self) -> Tallies:
        """Reduce the window, give it to the epoch, and start another."""
        window: Tallies
        [window] = self._over_ranks([self._window.tallies()])
        self._epoch = add_tallies(self._epoch, window)
        self._seen = add_tallies(self._seen, window[:1])
        self._window = Pool(self._outputs.zero())
        return window

    def _read(self, stage: str, tallies: Tallies, suffix: str = "", bounds: bool = False) -> dict[str, float]:
        """Read tallies of all ranks, under the tags that they are logged with."""
        whole, by_group = self._exactly(tallies[:1]), self._exactly(tallies[1:])
        values = {name: value for name, [value] in _values(whole).items()}
        # Two sequences have an interval. Where all losses are infinite or NaN, so is the interval, and its curves still
        # have points where their value has one.
        totals = whole[0].totals
        if bounds and (totals.sequences > 1 or (totals.nonfinite and not self._outputs.reads_means)):
            values |= {name: getattr(whole[0], name) for name in _BOUNDS}
        tagged = {f"{self.prefix}{stage}/{name}{suffix}": value for name, value in values.items()}
        for name, each in _values(by_group).items():
            for group, value, num_tokens in zip(self._outputs.groups, each, by_group[0].num_tokens, strict=True):
                if num_tokens:
                    tagged[f"{self.prefix}{stage}/{name}{suffix}/{group}"] = value
        return tagged

    def _read_evaluation(self, stage: str) -> tuple[dict[str, float], Tallies]:
        """Read all loaders together, and each by itself, and return the tally of all too; ranks meet once."""
        gallery = self._gallery
        tallies = [pool.tallies() for pool in self._evaluation]
        loaders = self._over_ranks([*tallies, *([(gallery.profile,)] if gallery else [])])
        if gallery:
            [gallery.profile] = loaders.pop()
        total = loaders[0]
        for tallies in loaders[1:]:
            total = add_tallies(total, tallies)
        values = self._read(stage, total, bounds=True)
        # Loaders that are read side by side have their targets in the first, and one that has all says nothing new.
        each = {i: whole for i, (whole, *_) in enumerate(loaders) if whole.unbind()[0].totals().scored}
        if len(each) > 1:
            for i, whole in each.items():
                values |= self._read(stage, (whole,), suffix=f"/dataloader_idx_{i}")
        return values, total[:1]

    def _exactly(self, tallies: Tallies) -> list[Any]:
        """Copy tallies to the host and read them; raise if they counted what no reading can be trusted with."""
        readings: list[Any] = []
        for part in (part for tally in tallies for part in tally.cpu().unbind()):
            if isinstance(part, GroupTally):
                groups = part.totals()
                check_valid(groups.everything, groups.groupless, kept=False)
                readings.append(GroupReading(groups, self.nan_policy))
            else:
                totals = part.totals()
                check_valid(totals, kept=False)
                readings.append(ExactReading(totals, self.nan_policy, self.confidence))
        return readings

    def _write_step(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Hand step values to the loggers as Lightning's own monitors do, at the step that it writes at.

        `self.log` would copy every value to the device and back, and write a window again if it decides to write
        after a batch that was no log point here.
        """
        self._boards.announce(values)
        self._boards.accompany(values, "train", _step(trainer))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=_step(trainer))
        trainer.callback_metrics.update(_as_tensors(values))

    def _log_epoch(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float], stage: str) -> None:
        """Log values of an epoch, which Lightning returns and monitors too."""
        if not trainer.sanity_checking:
            self._boards.announce(values)
            if stage != "train":  # Whose epochs have no line of their own.
                self._boards.accompany(values, stage, _step(trainer))
            others = {
                tag: value for tag, value in self._reached.items() if not tag.startswith(f"{self.prefix}{stage}/")
            }
            self._reached = others | values
        if not trainer.barebones:  # It would warn about every name.
            pl_module.log_dict(_as_tensors(values), batch_size=1, add_dataloader_idx=False)

    def _summary(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return a page on what the run has reached; only called where TensorBoard is."""
        from xent_metrics.tensorboard import summarise  # noqa: PLC0415

        configuration = {
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "ranks": trainer.world_size,
            "precision": trainer.precision,
            **_hparams(trainer, pl_module),
            **{f"CrossEntropyMonitor.{name}": value for name, value in self._configuration.items()},
            "CrossEntropyMonitor.nan_policy": self.nan_policy,
            "CrossEntropyMonitor.confidence": self.confidence,
        }
        counts = {"training": self._exactly(self._seen)[0], "the last validation": self._exactly(self._validated)[0]}
        repeated = self._gallery.profile.num_repeated if self._gallery else 0
        return summarise(configuration, self._reached, counts, repeated, self.prefix)

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

    def _tally(
        self,
        pool: Pool,
        step: str,
        outputs: Any,
        batch: Any,
        drawn: tuple[int, int] | None = None,
        gallery: Gallery | None = None,
    ) -> None:
        """Add what a step returned to a pool: of all samples that were drawn, or of the first ones of them only."""
        form = self._outputs.read(step, outputs, batch)
        if isinstance(form, Mean):
            if drawn is not None:
                self._warn_repeated(f"{step} returns means")
            pool.add(self._outputs.tally_mean(form))
            return
        if drawn is not None:
            num_samples, kept = drawn
            if form.target.shape[:1] == form.preds.shape[:1] == (num_samples,):
                form = form.first(kept)  # Repeated samples come last.
            else:
                self._warn_repeated("targets do not have a row for each sample")
                kept = num_samples
            if gallery:
                gallery.leave_out(num_samples - kept)
        losses = self._outputs.score(form)
        if gallery:
            gallery.add(losses[0], *self._outputs.classes(form))
        if form.group is None:
            pool.keep(losses)
        else:
            pool.add(self._outputs.tally(form, losses))


def _step(trainer: Trainer) -> int:
    """Return the step that Lightning writes at, which is not `global_step`."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def _hparams(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return what data module and module saved, as Lightning logs it."""
    sources: list[Any] = [getattr(trainer, "datamodule", None), pl_module]
    logged = [source.hparams_initial for source in sources if getattr(source, "_log_hyperparams", False)]
    saved = {str(name): value for hparams in logged for name, value in hparams.items()}
    return _flat({name: value for name, value in saved.items() if not name.startswith("_")})  # Lightning's own notes.


def _flat(nested: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what is in mappings within mappings, under names with a slash between theirs."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        within = _flat(value) if isinstance(value, Mapping) else None
        flat |= {str(name): value} if within is None else {f"{name}/{inner}": x for inner, x in within.items()}
    return flat


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


def _values(readings: Sequence[Any]) -> dict[str, list[float]]:
    """Read everything that is logged of tokens, and of bytes: one number, or one for each group."""
    if not readings:
        return {}
    values = {name: getattr(readings[0], name) for name in _READINGS}
    if len(readings) > 1:
        values["bits_per_byte"] = readings[1].bits_per_token
    return {name: value if isinstance(value, list) else [value] for name, value in values.items()}


def _as_tensors(values: dict[str, float]) -> dict[str, Tensor]:
    """Lightning would round floats to float32, and copy them to the device."""
    return {tag: torch.tensor(value, dtype=torch.float64) for tag, value in values.items()}
