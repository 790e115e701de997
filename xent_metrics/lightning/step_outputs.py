"""From what a step of a training loop returned to losses and tallies; knows nothing of Lightning.

A step returns one of three forms, which are read here and nowhere else. The losses of a batch are computed once, and
tallied by token, and if wanted by byte and by group.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from xent_metrics import _runtime
from xent_metrics._validate import (
    InWordsOf,
    as_num_bytes,
    as_num_classes,
    as_plain,
    as_tensor_hint,
    as_token_table,
    describe,
    is_integer,
    is_integral,
)
from xent_metrics.distributed import is_distributed
from xent_metrics.lightning.import_path import as_function
from xent_metrics.losses.input_hint import input_mismatch_hint
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import Backend, LossOptions
from xent_metrics.losses.score import ScoredBatch, score_batch, target_shape
from xent_metrics.metrics.batch_tallies import tally_scored, tally_scored_by_group
from xent_metrics.metrics.bits_per_byte import total_bytes
from xent_metrics.metrics.saved_state import changed_settings, in_words
from xent_metrics.tags import BITS_PER_BYTE, is_part, is_reserved
from xent_metrics.tally.accumulate import tally_losses, tally_mean
from xent_metrics.tally.tally import GroupTally, Tally

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Tallies = tuple[Tally | GroupTally, ...]
"""All targets, in `OutputReader.units` side by side; then, with groups, a tally of the groups for each such unit."""

NO_EXTRA: Mapping[str, Tensor] = MappingProxyType({})

# A step has no `input`.
_WORDS = {" with `input='losses'`": "", "pass `input='logits'`": 'return it as "logits"'}

_FORMS = (
    '{"losses": per-target losses in nats, "target": ...}, {"logits": ..., "target": ...} '
    '(with "labels" for "target" if you like), or {"loss": mean over targets, "num_tokens": how many}'
)


class StepOutputs(NamedTuple):
    """Losses or logits that a step returned, with their targets.

    Attributes:
        preds: Losses or logits.
        target: Their targets.
        group: The group of each target, broadcastable to the targets; None without groups.
        options: How `preds` is read.
        source: The step, in words.
        extra: Means that the step returned for the log, by name.
        num_bytes: The bytes of the text, in all or of each sequence; None where they are not asked for.
    """

    preds: Tensor | LinearLogits
    target: Tensor
    group: Tensor | None
    options: LossOptions
    source: str
    extra: Mapping[str, Tensor] = NO_EXTRA
    num_bytes: Tensor | int | None = None

    def first(self, num_samples: int) -> StepOutputs:
        """Return the outputs of the first samples."""
        group = self.group if self.group is None or self.group.dim() == 0 else self.group[:num_samples]
        preds, target = self.preds.narrow(0, 0, num_samples), self.target[:num_samples]
        return self._replace(preds=preds, target=target, group=group, num_bytes=self._bytes_of_first(num_samples))

    def _bytes_of_first(self, num_samples: int) -> Tensor | int | None:
        if self.num_bytes is None or num_samples == len(self.target):
            return self.num_bytes
        if isinstance(self.num_bytes, Tensor) and self.num_bytes.shape == self.target.shape[:1]:
            return self.num_bytes[:num_samples]
        raise ValueError(
            f'{self.source} must return "num_bytes" of each sequence where ranks draw some samples twice, got '
            f"{describe(self.num_bytes)} for {len(self.target)} sequences; return a tensor with one number for each."
        )


class MeanOutput(NamedTuple):
    """A mean loss that a step returned, the number of targets that it is the mean of, and other means for the log."""

    loss: Tensor
    num_tokens: Tensor | int
    extra: Mapping[str, Tensor] = NO_EXTRA


class OutputReader:
    """Reads what steps return; its arguments are those of `CrossEntropyMonitor`.

    Attributes:
        configuration: The arguments that decide what a tally means.
        units: What is tallied of every target, side by side: `cross_entropy`, and if wanted `bits_per_byte`,
            `accuracy`, `entropy`, and then the names of `extras`.
        sequence_group: The ranks that hold other targets of the same sequences.
    """

    def __init__(
        self,
        extract: Callable[[Any, Any], Mapping[str, Any]] | None,
        class_dim: int,
        ignore_index: int | None,
        shift: bool,
        groups: Iterable[str] | None,
        token_bytes: Sequence[int] | Tensor | str | None,
        num_classes: int | None,
        backend: Backend,
        of_scores: Sequence[str] = (),
        extras: Iterable[str] = (),
        num_bytes: bool = False,
    ) -> None:
        self.extract = as_function("extract", extract, "be a function of (outputs, batch)")
        self.groups = _as_names(groups)
        self.token_bytes = None if token_bytes is None else _as_table(token_bytes)
        if num_classes is not None:
            num_classes = as_num_classes("num_classes", num_classes)
        self.num_classes = num_classes
        self._options = {
            "losses": LossOptions("losses", class_dim, ignore_index=ignore_index),
            "logits": LossOptions(
                "logits",
                class_dim,
                ignore_index=ignore_index,
                shift=shift,
                backend=backend,
                accuracy="accuracy" in of_scores,
                entropy="entropy" in of_scores,
            ),
        }
        self.extras = as_extras(extras)
        if num_bytes and (self.groups or token_bytes is not None):
            raise ValueError(
                "`num_bytes` must be False with `groups` or `token_bytes`, got True; a table has bytes of its own, and "
                "those of a batch are not those of a group."
            )
        self._takes_bytes = num_bytes
        in_bytes = () if token_bytes is None else (BITS_PER_BYTE,)
        # Those of a batch come after what its losses are tallied with.
        given = (BITS_PER_BYTE,) if num_bytes else ()
        self._of_scores = list(of_scores)
        self.units = ("cross_entropy", *in_bytes, *of_scores, *given, *self.extras)
        self.device = torch.device("cpu")
        self.sequence_group: ProcessGroup | None = None
        self.reads_means = False
        decides = {"options": self._options["logits"], "token_bytes": self.token_bytes}
        counted = {"groups": list(self.groups), "extras": list(self.extras)}
        self.about = in_words("CrossEntropyMonitor", {**changed_settings(decides), **counted})
        # What tells states of several monitors apart. Options that change no tally are left out.
        self.configuration = {
            "class_dim": class_dim,
            "ignore_index": ignore_index,
            "shift": shift,
            "groups": self.groups,
            "token_bytes": self.token_bytes is not None,
        }
        if of_scores or self.extras or num_bytes:
            self.configuration["units"] = self.units
        self._looked_at: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run."""
        return self.__dict__ | {"sequence_group": None}

    def to(self, device: torch.device) -> None:
        """Move to another device."""
        self.device = torch.empty(0, device=device).device  # With its index.
        self.token_bytes = None if self.token_bytes is None else self.token_bytes.to(device)

    def zero(self) -> Tallies:
        """Return the tallies of no targets at all."""
        num_units = len(self.units)
        whole = Tally.zero(self.device, None if num_units == 1 else num_units)
        # An extra is a mean over a batch, of which no part is known.
        num_by_group = num_units - len(self.extras) if self.groups else 0
        by_group = (GroupTally.zero(len(self.groups), self.device) for _ in range(num_by_group))
        return (whole, *by_group)

    def read(self, step: str, outputs: Any, batch: Any) -> StepOutputs | MeanOutput | None:
        """Return what a step returned in one of the three forms; None if it, or `extract`, returned None.

        Raises:
            TypeError: If a part of it is no tensor, or a count no number.
            ValueError: If it is in none of them, or on another device.
        """
        source = step if self.extract is None else f"`extract`, called after {step},"
        form = outputs if self.extract is None or outputs is None else self.extract(outputs, batch)
        if form is None:
            return None
        if isinstance(form, Mapping):
            extra = self._read_extra(source, form)
            target = form.get("labels") if form.get("target") is None else form["target"]
            group = form.get("group")
            complete = (group is not None or not self.groups) and (not self._takes_bytes or "num_bytes" in form)
            for kind, options in self._options.items():
                if kind in form and target is not None and complete:
                    self._check_tensor(source, kind, form[kind])
                    self._check_tensor(source, "target", target)
                    group = self._as_group(group, target, options) if self.groups else None
                    num_bytes = self._read_bytes(form["num_bytes"], target) if self._takes_bytes else None
                    return StepOutputs(form[kind], target, group, options, source, extra, num_bytes)
            is_mean = "loss" in form and "num_tokens" in form
            if is_mean and not self.groups and self.token_bytes is None and not self._takes_bytes:
                mean = _as_mean(source, form["loss"], form["num_tokens"])
                self._check_tensor(source, "loss", mean.loss)
                self.reads_means = True  # There will be no intervals.
                return mean._replace(extra=extra)
        seen = sorted(map(str, form)) if isinstance(form, Mapping) else type(form).__name__
        raise ValueError(f"{source} must return {self._forms()}, got {seen}; add what is missing, or pass `extract`.")

    def score(self, outputs: StepOutputs) -> ScoredBatch:
        """Return the losses of all targets; warn if the first logits of a step look like none."""
        with InWordsOf({**_WORDS, "`preds`": f'"{outputs.options.input}"'}, f"{outputs.source} returned: "):
            scored = score_batch(outputs.preds, outputs.target, None, outputs.options, token_bytes=self.token_bytes)
        self._look_at(outputs)
        return scored

    def _look_at(self, outputs: StepOutputs) -> None:
        """Warn once of logits that look like none, and of what is read from logits where a validation has none."""
        preds, options, source = outputs.preds, outputs.options, outputs.source
        is_short = options.input == "losses" and self._of_scores and "training_step" not in source
        is_new = options.input == "logits" and isinstance(preds, Tensor) and preds.numel()
        if source in self._looked_at or not (is_short or is_new):
            return
        self._looked_at.add(source)
        found: str | None = f"losses, from which {self._of_scores} cannot be read; return logits, or mend `readings`"
        if isinstance(preds, Tensor) and is_new:
            hint = input_mismatch_hint(preds, options.input, options.class_dim, "return their logarithms, or logits")
            found = hint and f'"logits" that {hint}'
        if found:
            rank_zero_warn(f"{source} returned {found}", UserWarning)

    def _check_tensor(self, source: str, name: str, values: Any) -> None:
        """Raise unless a value is a tensor, or `LinearLogits`, where the tallies are."""
        if not isinstance(values, Tensor | LinearLogits):
            raise TypeError(
                f'{source} must return a tensor as "{name}", got {type(values).__name__}; {as_tensor_hint(values)}.'
            )
        if values.device != self.device:
            raise ValueError(
                f'{source} must return "{name}" on the device of the Trainer, {self.device}, got {values.device}; '
                "return what the model made, where it is."
            )

    def classes(self, outputs: StepOutputs) -> tuple[Tensor | None, int | None]:
        """Return the class of every target, and how many classes there are; None for what the outputs do not tell."""
        preds, target, options = outputs.preds, outputs.target, outputs.options
        if target.is_floating_point():
            return None, None
        return options.aligned(target).long(), (
            preds.shape[options.class_dim] if options.input == "logits" else self.num_classes
        )

    @staticmethod
    def scores(outputs: StepOutputs) -> Tensor | None:
        """Return the logits of every target, classes last; None where they are not there, or spread over ranks."""
        options = outputs.options
        if options.input != "logits" or type(outputs.preds) is not Tensor:
            return None
        preds, _ = options.shifted(outputs.preds, outputs.target)
        scores: Tensor = preds.detach().movedim(options.class_dim, -1)
        return scores.unsqueeze(1) if scores.dim() == 2 else scores  # Each is a sequence of one.

    def tally(self, outputs: StepOutputs, scored: ScoredBatch) -> Tallies:
        """Tally outputs of which the losses are known; ranks that share sequences meet in one collective."""
        target, group, options = outputs.target, outputs.group, outputs.options
        whole = tally_scored(scored, self.sequence_group)
        if group is None:
            return (whole,)
        fix = f"`groups` has {len(self.groups)} names: add to them, or ignore the targets"
        by_group = tally_scored_by_group(scored, group, target, options, len(self.groups), fix)
        return (whole, *by_group)

    @staticmethod
    def tally_joined(batches: Sequence[ScoredBatch]) -> Tallies:
        """Tally batches of one row type, without groups, all at once."""
        return (tally_scored(ScoredBatch.cat(batches)),)

    @staticmethod
    def tally_mean(mean: MeanOutput) -> Tallies:
        """Tally a mean."""
        with torch.no_grad():
            num_tokens = _moved(mean.num_tokens, mean.loss.device).to(torch.int64)
            return (tally_mean(mean.loss.view(()), num_tokens.view(())),)

    def tally_extra(self, extra: Mapping[str, Tensor], num_tokens: Tensor | int) -> Tallies:
        """Tally means over so many targets."""
        with torch.no_grad():
            count = _moved(num_tokens, self.device).to(torch.int64).view(())
            zero = Tally.zero(self.device)
            of_extra = [tally_mean(extra[x].view(()), count) if x in extra else zero for x in self.extras]
            return (Tally.stack(*[zero] * (len(self.units) - len(of_extra)), *of_extra),)

    def tally_bytes(self, batch: ScoredBatch, num_bytes: Tensor | int) -> Tallies:
        """Tally a batch per byte of its text."""
        with torch.no_grad():
            per_byte = tally_losses(batch.per_token).with_weight(total_bytes(num_bytes, self.device))
            zeros = [Tally.zero(self.device)] * self.units.index(BITS_PER_BYTE)
            return (Tally.stack(*zeros, per_byte),)

    def _read_bytes(self, num_bytes: Any, target: Tensor) -> Tensor | int:
        """Return the bytes of a batch; raise TypeError or ValueError if they are none, where that is free."""
        return as_num_bytes(num_bytes, target, _runtime.raises_eagerly(target))

    def _read_extra(self, source: str, form: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the means for the log that a form has."""
        if not self.extras or form.get("extra") is None:
            return NO_EXTRA
        extra = form["extra"]
        names = sorted(map(str, extra)) if isinstance(extra, Mapping) else [type(extra).__name__]
        if not set(names) <= set(self.extras):
            raise ValueError(
                f'{source} must return a dict with names of `extras`, {list(self.extras)}, as "extra", got {names}; '
                "add to `extras`."
            )
        for name, value in extra.items():
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
                raise TypeError(
                    f'{source} must return a mean over its targets, a tensor of one float, as "extra" {name!r}, got '
                    f"{describe(value)}; take its mean."
                )
        return {name: value.detach() for name, value in extra.items()}

    def _forms(self) -> str:
        """Return the forms that a step may return, in words."""
        if self.groups:
            return f'one of the first two of {_FORMS}, and for `groups` also "group": a name or an index'
        if self._takes_bytes:
            return f'one of the first two of {_FORMS}, and for `num_bytes` also "num_bytes": the bytes of its text'
        return _FORMS if self.token_bytes is None else f"for `token_bytes` one of the first two of {_FORMS}"

    def _as_group(self, group: Any, target: Tensor, options: LossOptions) -> Tensor:
        """Return the index of every target's group, broadcastable to the targets, from names or indices."""
        index, shape = _moved(self._indices(group), target.device), target_shape(target, options)
        if index.shape != shape[: index.dim()]:
            raise ValueError(
                f"`group` must be one for the batch, one for each sequence, or one for each target, got shape "
                f"{tuple(index.shape)} for targets of shape {tuple(shape)}."
            )
        return index.view(*index.shape, *(1 for _ in shape[index.dim() :]))

    def _indices(self, group: Any) -> Any:
        """Return the indices of names of groups, in lists nested like the names."""
        if isinstance(group, list | tuple):
            return [self._indices(one) for one in group]
        return self._index_of(group) if group is None or isinstance(group, str) else group

    def _index_of(self, name: str | None) -> int:
        """Return the index of a group; if there is none, raise, or among several ranks return what is no index."""
        if name in self.groups:
            return self.groups.index(name)
        message = (
            f"`group` must hold names of `groups`, which are {list(self.groups)}, got {name!r}; add it to `groups`."
        )
        if not is_distributed():
            raise ValueError(message)
        # Other ranks would wait for one that raises here. It is counted, and all raise when it is read, without names.
        warnings.warn(message, UserWarning, stacklevel=2)
        return -1


def _moved(numbers: Any, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device, without waiting for the copy."""
    numbers = numbers if isinstance(numbers, Tensor) else torch.as_tensor(numbers, device="cpu")
    moved: Tensor = numbers.to(device, non_blocking=True)
    return moved


def _as_mean(source: str, loss: Any, num_tokens: Any) -> MeanOutput:
    """Return a mean and its count; raise TypeError if they are something else."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise TypeError(
            f'{source} must return the mean over `num_tokens` targets as "loss", a tensor of one float, got '
            f'{describe(loss)}; return "losses" and their "target" for losses of single targets.'
        )
    num_tokens = num_tokens if isinstance(num_tokens, Tensor) else as_plain(num_tokens)
    counts = isinstance(num_tokens, Tensor) and num_tokens.numel() == 1 and is_integral(num_tokens)
    if not (counts or is_integer(num_tokens)):
        raise TypeError(
            f'{source} must return the number of targets that "loss" is the mean of as "num_tokens", one integer, got '
            f"{describe(num_tokens)}; count them with (target != ignore_index).sum()."
        )
    return MeanOutput(loss, num_tokens)


def _as_names(groups: Iterable[str] | None) -> tuple[str, ...]:
    if groups is None:
        return ()
    names = tuple(groups) if isinstance(groups, Iterable) else ()
    for name in names:
        if not is_part(name):
            raise ValueError(
                "`groups` must be names of letters, digits, '_', '.' and '-', which become parts of paths, got "
                f"{name!r}; rename it."
            )
    if isinstance(groups, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"`groups` must be a list of different names, got {groups!r}; pass None for no groups.")
    return names


def as_extras(extras: Iterable[str]) -> tuple[str, ...]:
    """Return names of means for the log; raise ValueError if they cannot be parts of tags, or are tags of ours."""
    names = tuple(extras) if isinstance(extras, Iterable) and not isinstance(extras, str) else (extras,)
    for name in names:
        if not is_part(name) or name.endswith("_epoch") or is_reserved(name):
            raise ValueError(
                "`extras` must be a list of names of letters, digits, '_', '.' and '-', none of the readings and "
                f"without '_epoch' at the end, got {name!r}; rename it."
            )
    return tuple(dict.fromkeys(names))


def _as_table(token_bytes: Sequence[int] | Tensor | str) -> Tensor:
    if isinstance(token_bytes, str):
        if not os.path.isfile(token_bytes):
            raise FileNotFoundError(
                f"`token_bytes` must name a file that `torch.save(token_byte_lengths(tokenizer), file)` wrote, got "
                f"{token_bytes!r}."
            )
        token_bytes = torch.load(token_bytes, map_location="cpu", weights_only=True)
    # Any sequence: a list of a configuration need not be one of Python's.
    listed = isinstance(token_bytes, Sequence) and not isinstance(token_bytes, bytes)
    if listed and all(is_integer(as_plain(x)) for x in token_bytes):
        token_bytes = torch.tensor([as_plain(x) for x in token_bytes], dtype=torch.int64, device="cpu")
    return as_token_table(token_bytes)  # type: ignore[arg-type]  # It raises on anything else.
