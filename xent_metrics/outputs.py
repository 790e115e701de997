"""From what a step of a training loop returned to tallies; knows nothing of Lightning.

A step returns one of three forms, and a form is read here and nowhere else. Its losses are computed once, whatever is
tallied of them: all targets, and if wanted their bytes and their groups.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xent_metrics.checks import as_token_table, check_num_classes, describe, is_integer, is_integral
from xent_metrics.kernels import Backend
from xent_metrics.losses import LinearLogits, LossOptions, TargetLosses
from xent_metrics.metrics.score import (
    ScoredBatch,
    as_groups,
    score_batch,
    tally_scored,
    tally_scored_by_group,
    target_shape,
)
from xent_metrics.tally import GroupTally, Tally, tally_mean

Tallies = tuple[Tally | GroupTally, ...]
"""What is tallied side by side: everything (per token, and per byte); then the groups, if any, in the same units."""

_MOST_LOSSES = 2**16  # That are kept, at 4 bytes each,
_MOST_BATCHES = 64  # from so many batches, at 2 KB each.
_FORMS = (
    '{"losses": per-target losses in nats, "target": ...}, {"logits": ..., "target": ...} '
    '(with "labels" for "target" if you like), or {"loss": mean over targets, "num_tokens": how many}'
)


class Form(NamedTuple):
    """What a step returned of single targets.

    Attributes:
        preds: Losses or logits.
        target: Their targets.
        group: The group of each target, broadcastable to the targets; None without groups.
        options: How `preds` is to be read.
    """

    preds: Tensor | LinearLogits
    target: Tensor
    group: Tensor | None
    options: LossOptions

    def first(self, num_samples: int) -> Form:
        """Return the form of the first samples."""
        group = self.group if self.group is None or self.group.dim() == 0 else self.group[:num_samples]
        return Form(self.preds.narrow(0, 0, num_samples), self.target[:num_samples], group, self.options)


class Mean(NamedTuple):
    """What a step returned that knows nothing of single targets: their mean loss, and how many they are."""

    loss: Tensor
    num_tokens: Tensor | int


class OutputReader:
    """Reads what steps return; its arguments are those of `CrossEntropyMonitor`."""

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
    ) -> None:
        if extract is not None and not callable(extract):
            raise TypeError(
                f"`extract` must be a function of (outputs, batch), got {extract!r}; in YAML, its import path."
            )
        self.extract = extract
        self.groups = _as_names(groups)
        self.token_bytes = None if token_bytes is None else _as_table(token_bytes)
        if num_classes is not None:
            check_num_classes("num_classes", num_classes)
        self.num_classes = num_classes
        self._options = {
            "losses": LossOptions("losses", class_dim, ignore_index=ignore_index),
            "logits": LossOptions("logits", class_dim, ignore_index=ignore_index, shift=shift, backend=backend),
        }
        self.device = torch.device("cpu")
        self.reads_means = False

    def to(self, device: torch.device) -> None:
        """Move to another device."""
        self.device = device
        self.token_bytes = None if self.token_bytes is None else self.token_bytes.to(device)

    def zero(self) -> Tallies:
        """Return the tallies of no targets at all."""
        num_units = 1 if self.token_bytes is None else 2
        whole = Tally.zero(self.device, None if num_units == 1 else num_units)
        by_group = (GroupTally.zero(len(self.groups), self.device) for _ in range(num_units if self.groups else 0))
        return (whole, *by_group)

    def read(self, step: str, outputs: Any, batch: Any) -> Form | Mean:
        """Find the form in what a step returned.

        Raises:
            ValueError: If there is none; it names the step, what the step returned, and the forms.
        """
        form = outputs if self.extract is None else self.extract(outputs, batch)
        if isinstance(form, Mapping):
            target = form.get("labels") if form.get("target") is None else form["target"]
            group = form.get("group")
            for kind, options in self._options.items():
                if kind in form and target is not None and (group is not None or not self.groups):
                    group = self._as_group(group, target, options) if self.groups else None
                    return Form(form[kind], target, group, options)
            if "loss" in form and "num_tokens" in form and not self.groups and self.token_bytes is None:
                self.reads_means = True
                return _as_mean(step, form["loss"], form["num_tokens"])
        seen = sorted(map(str, form)) if isinstance(form, Mapping) else type(form).__name__
        raise ValueError(
            f"{step if self.extract is None else f'`extract`, called after {step},'} must return {self._forms()}, got "
            f"{seen}; add what is missing, or pass `extract`."
        )

    def score(self, form: Form) -> list[TargetLosses]:
        """Return the losses of all targets: per token, and with `token_bytes` also per byte."""
        scored = score_batch(form.preds, form.target, None, form.options, token_bytes=self.token_bytes)
        return [part for part in scored[:2] if part is not None]

    def classes(self, form: Form) -> tuple[Tensor | None, int | None]:
        """Return the class of every target, and how many classes there are, as far as the form knows them."""
        if form.target.is_floating_point():
            return None, None
        ids = form.options.aligned(form.target).long()
        return ids, form.preds.shape[form.options.class_dim] if form.options.input == "logits" else self.num_classes

    def tally(self, form: Form, losses: list[TargetLosses]) -> Tallies:
        """Tally a form with groups of which the losses are known."""
        assert form.group is not None
        fix = f"`groups` has {len(self.groups)} names: add to them, or ignore the targets"
        scored = ScoredBatch(*losses)  # type: ignore[arg-type]
        groups = as_groups(form.group, form.target, form.options, losses[0])
        by_group = tally_scored_by_group(scored, groups, len(self.groups), fix)
        return (tally_scored(scored), *by_group)

    @staticmethod
    def tally_mean(mean: Mean) -> Tallies:
        """Tally a mean."""
        with torch.no_grad():
            num_tokens = _moved(mean.num_tokens, mean.loss.device).to(torch.int64)
            return (tally_mean(mean.loss.view(()), num_tokens.view(())),)

    def _forms(self) -> str:
        """Say what a step may return."""
        if self.groups:
            return f'one of the first two of {_FORMS}, and for `groups` also "group": a name or an index'
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
        """Replace names by indices, in lists as deep as they are."""
        if isinstance(group, list | tuple):
            return [self._indices(one) for one in group]
        if isinstance(group, str):
            if group not in self.groups:
                raise ValueError(
                    f"`group` must hold names of `groups`, which are {list(self.groups)}, got {group!r}; add it to "
                    "`groups`."
                )
            return self.groups.index(group)
        return group


def _moved(numbers: Any, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device, without waiting for it."""
    return torch.as_tensor(numbers).to(device, non_blocking=True)


def _as_mean(step: str, loss: Any, num_tokens: Any) -> Mean:
    """Return a mean and its count; raise if they are something else."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise TypeError(
            f'{step} must return the mean over `num_tokens` targets as "loss", a tensor of one float, got '
            f'{describe(loss)}; return "losses" and their "target" for losses of single targets.'
        )
    counts = isinstance(num_tokens, Tensor) and num_tokens.numel() == 1 and is_integral(num_tokens)
    if not (counts or is_integer(num_tokens)):
        raise TypeError(
            f'{step} must return the number of targets that "loss" is the mean of as "num_tokens", one integer, got '
            f"{describe(num_tokens)}; count them with (target != ignore_index).sum()."
        )
    return Mean(loss, num_tokens)


class Pool:
    """The tallies of one rank of what steps returned.

    Losses are kept as they are until the tallies are asked for, or there are many of them: to tally ten batches
    together costs little more than one, and a tally is a hundred kernels that an accelerator has to be told to run.
    """

    def __init__(self, zero: Tallies) -> None:
        self._total = zero
        self._kept: list[list[TargetLosses]] = []
        self._num_losses = 0

    def add(self, tallies: Tallies) -> None:
        """Add what is tallied already."""
        self._total = add_tallies(self._total, tallies)

    def keep(self, losses: list[TargetLosses]) -> None:
        """Add what `OutputReader.score` returned."""
        loss = losses[0].loss.clone()  # It may be the step's own memory.
        if self._kept and _row(self._kept[0]) != _row(losses):
            self._tally_kept()
        self._kept.append([kind._replace(loss=loss) for kind in losses])
        self._num_losses += loss.numel()
        if self._num_losses >= _MOST_LOSSES or len(self._kept) >= _MOST_BATCHES:
            self._tally_kept()

    def tallies(self) -> Tallies:
        """Return the tallies of everything."""
        self._tally_kept()
        return self._total

    def _tally_kept(self) -> None:
        if self._kept:
            kept, self._kept, self._num_losses = self._kept, [], 0
            joined = [TargetLosses.join(kinds) for kinds in zip(*kept, strict=True)]
            self.add((tally_scored(ScoredBatch(*joined)),))  # type: ignore[arg-type]


def _row(losses: list[TargetLosses]) -> tuple[Any, ...]:
    """Return what batches must have in common to be tallied together."""
    loss = losses[0].loss
    return loss.shape[1], loss.dtype, loss.device


def add_tallies(tallies: Tallies, others: Tallies) -> Tallies:
    """Add what stands side by side, one by one."""
    return tuple(tally + other for tally, other in zip(tallies, others, strict=True))  # type: ignore[operator]


def _as_names(groups: Iterable[str] | None) -> tuple[str, ...]:
    if groups is None:
        return ()
    names = tuple(groups) if isinstance(groups, Iterable) else ()
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"(?!dataloader_idx)[\w.-]+", name, re.ASCII):
            raise ValueError(
                "`groups` must be names of letters, digits, '_', '.' and '-', which become part of a tag, got "
                f"{name!r}; rename it."
            )
    if isinstance(groups, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"`groups` must be a list of different names, got {groups!r}; pass None for no groups.")
    return names


def _as_table(token_bytes: Sequence[int] | Tensor | str) -> Tensor:
    if isinstance(token_bytes, str):
        if not os.path.isfile(token_bytes):
            raise FileNotFoundError(
                f"`token_bytes` must name a file that `torch.save(token_byte_lengths(tokenizer), file)` wrote, got "
                f"{token_bytes!r}."
            )
        token_bytes = torch.load(token_bytes, map_location="cpu", weights_only=True)
    if isinstance(token_bytes, list | tuple) and all(map(is_integer, token_bytes)):
        token_bytes = torch.tensor(token_bytes, dtype=torch.int64)
    return as_token_table(token_bytes)  # type: ignore[arg-type]  # It raises on anything else.
