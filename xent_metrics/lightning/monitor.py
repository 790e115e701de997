"""The callback: its arguments, and what it does in each hook of the Trainer.

The usual `self.log("val_loss", loss)` averages batch means, weighted by a batch size that Lightning guesses from the
first tensor it finds: sequences, not tokens. Here every batch becomes a tally, and only tallies are averaged.

The callback holds its tallies itself. Attached to the module they would be cast by `precision="bf16-true"`, copied by
weight averaging and listed in the model summary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from xent_metrics._validate import as_plain, check_omitted_bytes
from xent_metrics.distributed import is_distributed
from xent_metrics.lightning.callback_base import Callback, serve_what_is_loaded
from xent_metrics.lightning.dashboards import DEFAULT_PARTS, Dashboards, Part
from xent_metrics.lightning.evaluation import Evaluation
from xent_metrics.lightning.flattened_targets import FlattenedTargets
from xent_metrics.lightning.import_path import as_function
from xent_metrics.lightning.log_values import ValueLog, reduce_what_is_pending
from xent_metrics.lightning.repeated_samples import RepeatedSamples
from xent_metrics.lightning.run_summary import describe_run
from xent_metrics.lightning.step_outputs import OutputReader
from xent_metrics.lightning.tagged_readings import TaggedReadings
from xent_metrics.lightning.trainer import Ranks, current_step, find_ranks, is_log_point
from xent_metrics.lightning.windows import RunTallies
from xent_metrics.losses.options import Backend
from xent_metrics.page import Decode
from xent_metrics.readings import NanPolicy, check_reading
from xent_metrics.tags import (
    BEST,
    DEFAULT_READINGS,
    OF_SCORES,
    STAGES,
    LoggedReading,
    Stage,
    Tag,
    as_choices,
    check_own,
    check_prefix,
)  # fmt: skip
from xent_metrics.validation_stats import ValidationStats

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.distributed import ProcessGroup


class CrossEntropyMonitor(Callback):
    """Log cross-entropy, bits per token and perplexity of all targets, from what the steps return.

    `training_step`, `validation_step` and `test_step` return one of

    - `{"loss": ..., "losses": per-target losses in nats, "target": ...}`: recommended for training, since it computes
      nothing a second time: `losses = F.cross_entropy(..., reduction="none")` and `loss = losses.mean()`;
    - `{"logits": ..., "target": ...}`: the losses are computed here, without regularisers or smoothing;
    - `{"loss": mean over targets, "num_tokens": how many}`: whatever the loss holds is what is read, and as nothing is
      known of single targets there is no interval, and there are neither groups nor bytes.

    None, from a step or from `extract`, says that there is nothing to score.

    `labels` is accepted for `target`. Either is aligned with `logits` (position t is scored by `logits[:, t]`), unless
    `shift` says otherwise.

    Logged metrics:
        `{stage}` is `train`, `val` or `test`, `{reading}` is `cross_entropy` (nats), `bits_per_token` or `perplexity`,
        with `token_bytes` or `num_bytes` also `bits_per_byte`, and what `readings` and `extras` name; `prefix` stands
        before all.

        - `train/{reading}`: over all targets since the last log point (not the last batch only), at the steps where
          Lightning logs;
        - `train/{reading}_epoch`: over the epoch;
        - `val/{reading}`, `test/{reading}`: over the whole epoch and all loaders, each target counting once;
        - `{val,test}/cross_entropy_lower`, `_upper`, `{val,test}/perplexity_lower`, `_upper`: an interval of
          `confidence`, clustered by sequence; not logged where there are no two sequences;
        - `train/num_tokens`, `train/num_tokens_epoch`: how many targets training has scored so far, also before the run
          was resumed: an axis for scaling plots;
        - `val/num_tokens`, `test/num_tokens`: how many targets were scored;
        - `val/best_bits_per_token`: the lowest `val/bits_per_token` of the run so far;
        - `{val,test}/macro_cross_entropy`, and with `token_bytes` `macro_bits_per_byte`: the unweighted mean over the
          groups that have targets; without `groups`, over the loaders, if several have;
        - `{val,test}_by_loader/{reading}/dataloader_idx_{i}`, or `/{name}` of loaders given as a dict: each loader by
          itself, if several have targets;
        - `{stage}_by_group/{reading}/{group}`: each of `groups` by itself, wherever it has targets;
        - only to TensorBoard, `val/uniform_bits_per_token` and `val/unigram_bits_per_token`; to it, Weights & Biases,
          MLflow and Comet the images `val/distribution`, `val/by_position`, `val/interval` and `val/surprisal`, and the
          pages `summary` and `val/surprisal_page` (for TensorBoard a file); see `dashboards`.

        NaN is logged where there are no targets.

    Every rank logs the value of all ranks together, at one collective a log point and one at the end of each epoch.
    Samples that `DistributedSampler` draws twice, so that ranks have equally many, are scored once in validation and
    test; where that cannot be known a warning says so. With tensor parallelism the data-parallel ranks are added up;
    see `process_group` and `sequence_group`.

    A run that is resumed in the middle of an epoch goes on with the tallies of its checkpoint, also on another number
    of ranks, and logs the same bits at the end of the epoch as one that was never stopped, if the loader saves its
    position (`state_dict` and `load_state_dict`): Lightning starts a plain `DataLoader` from its beginning again. A
    checkpoint that was written because of an exception on several ranks lacks what was tallied since the last log
    point, as the rank that failed cannot ask the others.

    All loggers get the values, and `ModelCheckpoint` and `EarlyStopping` can monitor them. Monitor
    `val/cross_entropy`: a perplexity may overflow to `inf` early on, which stops `EarlyStopping`.

    Args:
        extract: Called as `extract(outputs, batch)`, returns one of the forms above, for steps that return something
            else. `outputs["loss"]` is then the loss as the step returned it. It may also be an import path.
        class_dim: The dimension of `logits` that counts classes.
        ignore_index: The target that is not scored; None for none.
        shift: Let `logits[:, t]` score target t + 1, for logits and labels of one length as Hugging Face models have
            them; `losses` are aligned with their targets already.
        groups: Names of data sets, domains, ... that are also read by themselves. The form then has `"group"` beside
            its target: a name or an index into the names, for the batch, for each of its sequences, or for each target.
        token_bytes: Bytes of text behind each token id, as `xent_metrics.token_byte_lengths(tokenizer).tolist()`
            gives them, or a file to which `torch.save` wrote them; adds `bits_per_byte`.
        num_bytes: Whether the form also has `"num_bytes"`, the bytes of the text that its targets stand for: an integer
            for the batch, or a tensor with one for each sequence. For tokenizers that no table of tokens fits; adds
            `bits_per_byte`.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them out,
            `"raise"` stops the run.
        confidence: Probability that the intervals cover the mean over all sequences that might have been drawn.
        prefix: The text before all tags, such as `"ema/"`; each of several monitors needs its own.
        dashboards: What to write beside the values where there is a TensorBoard logger, and of it pictures and summary
            where another logger takes them; `()` for nothing, and `"overlay"` only if you name it:

            - `"layout"`: charts in the Custom Scalars tab, beside those that are there already;
            - `"descriptions"`: definition, unit, and what is pooled and left out, behind the "i" of every chart;
            - `"references"`: `val/uniform_bits_per_token` and `val/unigram_bits_per_token`, lines to compare with;
            - `"hparams"`: a row in the HParams tab with the values of this run's tags, in place of Lightning's own;
            - `"pictures"`: the distribution of losses, loss by position, all validations with their intervals, and a
              text coloured by what each token cost: at the first, second, fourth, ... validation and the last;
            - `"summary"`: a page of text when the fit is over;
            - `"overlay"`: the same readings again under `train` and `val`, as runs of their own, hence two colours.
        decode: Turns a list of tokens into text, for the coloured one: `tokenizer.decode`, or the import path of a
            function. May be set later, as `monitor.decode = ...`, before the fit. Without it, numbers are shown.
        num_classes: How many classes there are, for the lines to compare with where no step returns logits.
        backend: How losses are made of logits: as they are (`"auto"`, `"eager"`), or by a compiler (`"compile"`); see
            `CrossEntropy`.
        prog_bar: The readings that progress bars show: of the last window, the last validation and the test.
        stages: The stages to read; in the others steps may return anything.
        readings: What to log of every stage; besides the default there are `accuracy` and `entropy`, the mean entropy
            of the model's own distribution in nats: where steps return logits, in the same pass over them.
        extras: Names of means that steps return in their form as `"extra": {name: mean over its targets}`, such as a
            z-loss; they are logged as `{stage}/{name}`, weighted by their targets.
        process_group: The ranks that are added up, those that hold different targets, or none at all: a process group,
            or the names of dimensions of the strategy's mesh. By default those of `data_parallel` and of
            `sequence_group`; all ranks where the mesh has no such dimension. As `decode` it may be set later.
        sequence_group: The ranks that hold other targets of the same sequences, as with context parallelism: a process
            group, or the name of a dimension of the mesh. They return the same sequences in each batch, or None, and
            meet in one small collective. Without it the part of a sequence that is on one rank counts as a sequence,
            and the interval is too narrow. As `decode` it may be set later.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is not as described; in a step's hook, if the step returned none of the forms; at a
            log point, if targets were out of range.

    Example::

        Trainer(callbacks=[CrossEntropyMonitor(), EarlyStopping("val/cross_entropy")])
    """

    _run: RunTallies
    _evaluation: Evaluation | None

    def __init__(
        self,
        extract: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        class_dim: int = -1,
        ignore_index: int | None = -100,
        shift: bool = False,
        groups: Sequence[str] | None = None,
        token_bytes: Sequence[int] | Tensor | str | None = None,
        num_bytes: bool = False,
        nan_policy: NanPolicy = "propagate",
        confidence: float = 0.95,
        prefix: str = "",
        dashboards: Sequence[Part] = DEFAULT_PARTS,
        decode: Decode | None = None,
        num_classes: int | None = None,
        backend: Backend = "auto",
        prog_bar: Sequence[str] = ("bits_per_token",),
        stages: Sequence[Stage] = STAGES,
        readings: Sequence[LoggedReading] = DEFAULT_READINGS,
        extras: Sequence[str] = (),
        process_group: ProcessGroup | str | Sequence[str] | None = None,
        sequence_group: ProcessGroup | str | None = None,
    ) -> None:
        serve_what_is_loaded()  # Another package may have been imported after this module.
        class_dim, ignore_index, confidence = map(as_plain, (class_dim, ignore_index, confidence))
        check_reading(nan_policy, confidence)
        check_omitted_bytes(nan_policy, 0 if num_bytes else None)
        names = as_choices("readings", readings, get_args(LoggedReading))
        of_scores = [name for name in OF_SCORES if name in names]
        self._outputs = OutputReader(
            extract,
            class_dim,
            ignore_index,
            shift,
            groups,
            token_bytes,
            num_classes,
            backend,
            of_scores,
            extras,
            num_bytes,
        )
        self._configuration = {**self._outputs.configuration, "prefix": prefix}
        self.nan_policy: NanPolicy = nan_policy
        self.confidence = confidence
        self.prefix = check_prefix(prefix)
        self.decode = as_function("decode", decode, "turn a list of tokens into text, as tokenizer.decode does")
        self._readings = TaggedReadings(names, self._outputs, nan_policy, confidence, prefix)
        self._stages = as_choices("stages", stages, STAGES)
        self._dashboards = Dashboards(dashboards, self._readings.names, self._outputs.groups, prefix)
        in_bar = as_choices("prog_bar", prog_bar, (*get_args(LoggedReading), *self._readings.names))
        self._value_log = ValueLog([Tag(stage, name).text(prefix) for stage in STAGES for name in in_bar])
        self.process_group = process_group
        self.sequence_group = sequence_group
        self._ranks = Ranks()
        self._reset()

    def _reset(self) -> None:
        self._run = RunTallies(self._outputs.zero(), self._outputs.about, self._outputs.groups)
        self._evaluation = None
        self._repeated = RepeatedSamples()
        self._flattened = FlattenedTargets()
        self._dashboards.reset()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: groups of ranks, and the module's methods that Lightning puts here."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        given = {name: kept[name] for name in ("process_group", "sequence_group")}
        kept |= {name: value if isinstance(value, Sequence) else None for name, value in given.items()}
        return kept | {"_ranks": Ranks()}

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint, which differs for monitors that are configured differently."""
        return self._generate_state_key(**self._configuration)

    def state_dict(self) -> dict[str, Any]:
        """Return the tallies of the training epoch as far as this rank knows them, without asking another.

        Among several ranks, what was tallied since the last log point is left out; `on_save_checkpoint` adds it.
        """
        return self._run.state_dict()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the state in a checkpoint be that of all ranks, which meet in one collective.

        After an exception only the rank that failed may be here, so nobody is asked.
        """
        if is_distributed() and not self._run.failed:
            reduce_what_is_pending(trainer)
            checkpoint["callbacks"][self.state_key] = self._run.state_dict_of_all_ranks(self._ranks)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the middle of an epoch, on any number of ranks, all of which hold what all of them had tallied.

        Raises:
            ValueError: If the state is of an unknown version, is incomplete, or is of other groups or bytes.
        """
        self._run.load_state_dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move to the device of the run; a fit starts without the tallies of the last one."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        check_own(self.prefix, [other.prefix for other in callbacks if isinstance(other, CrossEntropyMonitor)])
        self._outputs.to(trainer.strategy.root_device)
        if stage == "fit":  # Lightning loads the state of a checkpoint after this.
            self._reset()
        elif stage == "validate":
            self._dashboards.reset()  # It may be of other data, or of another trainer.
        self._dashboards.attach(trainer.loggers, trainer.is_global_zero, has_hparams=stage in ("fit", "validate"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close what was opened."""
        self._dashboards.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait for no other rank from now on, and close what was opened: Lightning calls no `teardown`."""
        self._run.failed = True
        self._write_hparams(())  # Reading what was logged may wait for other ranks.
        self._dashboards.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the other ranks."""
        self._find_ranks(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an epoch."""
        self._run.start_epoch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tally the batch, and log the window if Lightning is about to write."""
        if "train" not in self._stages:
            return
        if trainer.fit_loop.batch_idx == 0:
            # Lightning does not call `on_train_epoch_start` where a resumed run starts with a new epoch.
            self._run.start_epoch()
        if outputs and pl_module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            # Lightning has divided the loss.
            outputs = {**outputs, "loss": outputs["loss"] * trainer.accumulate_grad_batches}
        # Lightning makes an empty dict of None.
        self._run.window.add_outputs(self._outputs, self._outputs.read("training_step", outputs or None, batch))
        if is_log_point(trainer, pl_module):
            self._log_window(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        if "train" not in self._stages:
            return
        reduce_what_is_pending(trainer)
        self._run.close_window(self._ranks)
        values, _ = self._readings.read("train", self._run.epoch[:1], suffix="_epoch")
        total = self._readings.read_exactly(self._run.run_total)[0].num_tokens
        values |= self._readings.count("train", total, suffix="_epoch")
        self._log_epoch(trainer, pl_module, "train", values, {})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last validation, and write the summary of the run."""
        self._write_hparams(trainer.callback_metrics)
        last_step = max(0, current_step(trainer) - 1)  # Lightning has counted on.
        own = {**self._configuration, "nan_policy": self.nan_policy, "confidence": self.confidence}
        stats = self._evaluation.stats if self._evaluation else None
        facts = partial(describe_run, trainer, pl_module, own, self._run, self._readings, stats)
        self._dashboards.finish(last_step, self.decode, facts)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a validation; the sanity check before it leaves no trace."""
        self._find_ranks(trainer)
        device, ranks = self._outputs.device, self._ranks
        stats = None if trainer.sanity_checking else self._dashboards.new_stats(device, ranks)
        self._start_evaluation("val", len(trainer.num_val_batches), stats)

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
        if self._evaluation is not None:
            self._evaluation.add(outputs, batch, trainer.val_dataloaders, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation, and in a fit the best one so far."""
        if self._evaluation is None:
            return
        reduce_what_is_pending(trainer)
        read = self._readings.read_loaders("val", self._evaluation.reduce(self._ranks), trainer.val_dataloaders)
        if not trainer.sanity_checking:
            self._run.validated = read.total
            if trainer.state.fn == "fit":
                best = self._run.update_best(read.reading.bits_per_token)
                if "bits_per_token" in self._readings.names:
                    read.whole[Tag("val", BEST).text(self.prefix)] = best
        self._log_epoch(trainer, pl_module, "val", read.whole, read.by_loader)
        if self._evaluation.stats is not None:
            point, alone = read.point(current_step(trainer)), trainer.state.fn == "validate"
            self._dashboards.add_validation(self._evaluation.stats, point, self._ranks, self.decode, draw_now=alone)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row of the run in TensorBoard's table of hyperparameters, when all has been logged once."""
        if not trainer.sanity_checking:
            self._write_hparams(trainer.callback_metrics)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a test."""
        self._find_ranks(trainer)
        self._start_evaluation("test", len(trainer.num_test_batches))

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
        if self._evaluation is not None:
            self._evaluation.add(outputs, batch, trainer.test_dataloaders, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test."""
        if self._evaluation is None:
            return
        reduce_what_is_pending(trainer)
        read = self._readings.read_loaders("test", self._evaluation.reduce(self._ranks), trainer.test_dataloaders)
        self._log_epoch(trainer, pl_module, "test", read.whole, read.by_loader)

    def _write_hparams(self, logged: Iterable[str]) -> None:
        names = self._readings.names if "val" in self._stages else ()
        best = (BEST,) if "bits_per_token" in names else ()
        self._dashboards.write_hparams([Tag("val", name).text(self.prefix) for name in (*best, *names)], logged)

    def _find_ranks(self, trainer: Trainer) -> None:
        self._ranks = find_ranks(trainer, self.process_group, self.sequence_group)
        self._outputs.sequence_group = self._ranks.of_sequences

    def _start_evaluation(self, stage: Stage, num_loaders: int, stats: ValidationStats | None = None) -> None:
        parts = (self._outputs, self._repeated, self._flattened, stats)
        self._evaluation = Evaluation(stage, num_loaders, *parts) if stage in self._stages else None

    def _log_window(self, trainer: Trainer) -> None:
        """Log what was tallied since the last log point."""
        values, window = self._readings.read("train", self._run.close_window(self._ranks))
        num_tokens = self._run.num_logged + window.num_tokens
        values |= self._readings.count("train", num_tokens)
        self._dashboards.on_window_logged(values, current_step(trainer))
        self._value_log.log_step(trainer, values)
        self._run.mark_logged(num_tokens)

    def _log_epoch(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
        values: dict[str, float],
        by_loader: dict[int, dict[str, float]],
    ) -> None:
        if not trainer.sanity_checking:
            everything = {tag: value for each in (values, *by_loader.values()) for tag, value in each.items()}
            # Lightning logs an epoch of training at its last batch, which it has counted already.
            step = current_step(trainer) - (stage == "train")
            self._dashboards.on_epoch_logged(everything, stage, step)
        self._value_log.log_epoch(trainer, pl_module, values, by_loader)
