"""The tallies of one rank until they are reduced, and those of a fit over all ranks: window, epoch, whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from xent_metrics.distributed import is_distributed
from xent_metrics.lightning.step_outputs import MeanOutput, OutputReader, StepOutputs, Tallies
from xent_metrics.losses.score import ScoredBatch
from xent_metrics.tally.tally import Tally, sum_tallies_over_ranks

if TYPE_CHECKING:
    from xent_metrics.lightning.trainer import Ranks

_MAX_LOSSES = 2**16  # At 4 bytes each,
_MAX_BATCHES = 64  # from so many batches, at 2 KB each.

STATE_VERSION = 1
"""Changes whenever a saved state gets another meaning."""

# What is saved, and what versions before 0.1.0 called it, whose states have no version.
_NAMES = {"reduced_not_logged": "earlier", "epoch": "epoch", "run_total": "seen"}


def add_tallies(*several: Tallies) -> Tallies:
    """Add up tuples of tallies, entry by entry."""
    return reduce(lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), several)  # type: ignore[operator]


def sum_over_ranks(several: Sequence[tuple[Any, ...]], about: str, ranks: Ranks) -> list[Any]:
    """Sum tuples of tallies over the ranks that hold different data, all of which must say the same about them."""
    summed = [tally for tallies in several for tally in tallies]
    mistake = None
    for group in ranks.added:
        try:
            summed = sum_tallies_over_ranks(summed, about, group)
        except ValueError as error:  # The ranks of the next group wait for this one, and have to know.
            mistake, about = error, f"{about}, and ranks that differ"
    if mistake is not None:
        raise mistake
    total = iter(summed)
    return [tuple(next(total) for _ in tallies) for tallies in several]


class Pool:
    """The tallies of what steps returned on one rank.

    Losses are kept until the tallies are asked for, or there are many of them: tallying ten batches together costs
    little more than tallying one, and a tally is a hundred kernels that an accelerator has to be told to run.
    """

    def __init__(self, zero: Tallies) -> None:
        self._zero = self._total = zero
        self._kept: list[ScoredBatch] = []
        self._num_losses = 0

    def add(self, tallies: Tallies) -> None:
        """Add tallies; those of the last units may be missing, where a step did not return what they are read of."""
        self._total = add_tallies(self._total, _completed(tallies, self._zero))

    def keep(self, batch: ScoredBatch) -> None:
        """Add the losses of a batch, to be tallied later."""
        if self._kept and self._kept[0].row_type != batch.row_type:
            self._tally_kept()
        self._kept.append(batch.copy())
        self._num_losses += batch.loss.numel()
        if self._num_losses >= _MAX_LOSSES or len(self._kept) >= _MAX_BATCHES:
            self._tally_kept()

    def add_outputs(self, reader: OutputReader, outputs: StepOutputs | MeanOutput | None) -> ScoredBatch | None:
        """Add what a step returned, and return its losses; None for a mean or nothing: no losses of single targets."""
        if outputs is None:
            return None
        if isinstance(outputs, MeanOutput):
            self.add(reader.tally_mean(outputs))
            if outputs.extra:
                self.add(reader.tally_extra(outputs.extra, outputs.num_tokens))
            return None
        batch = reader.score(outputs)
        if outputs.extra:
            self.add(reader.tally_extra(outputs.extra, batch.is_scored.sum()))
        if outputs.num_bytes is not None:
            self.add(reader.tally_bytes(batch, outputs.num_bytes))
        if outputs.group is None and reader.sequence_group is None:
            self.keep(batch)
        else:  # Ranks that share sequences meet at each batch: of losses that are kept they may have unequally many.
            self.add(reader.tally(outputs, batch))
        return batch

    def tallies(self) -> Tallies:
        """Return the tallies of everything that was added."""
        self._tally_kept()
        return self._total

    def _tally_kept(self) -> None:
        if self._kept:
            # Emptied first: losses that cannot be tallied raise once, not whenever somebody asks for the rest.
            kept, self._kept, self._num_losses = self._kept, [], 0
            self.add(OutputReader.tally_joined(kept))


def _completed(tallies: Tallies, zero: Tallies) -> Tallies:
    """Return tallies with those of no targets for whatever units they lack at their end."""
    whole, *by_group = tallies
    expected: Any = zero[0]
    if isinstance(whole, Tally) and whole.state.shape != expected.state.shape:
        whole = Tally.stack(*(known := whole.unbind()), *expected.unbind()[len(known) :])
    return (whole, *by_group, *zero[1 + len(by_group) :])


class RunTallies:
    """The tallies of a fit. The window is of this rank alone; everything else is of all ranks together.

    Args:
        zero: The tallies of no targets.
        about: What decides them, in words.
        groups: The names of the groups, in the order of their tallies.

    Attributes:
        window: What this rank has tallied since the last reduction.
        epoch: The training epoch, without the window.
        failed: Whether there was an exception, after which other ranks may not answer.
        validated: The last validation, without groups.
        best: The lowest bits per token of a validation so far; NaN before the first.
        num_logged: The number of targets scored in training, until the last log point.
    """

    def __init__(self, zero: Tallies, about: str, groups: Sequence[str] = ()) -> None:
        self._zero = zero
        self._about = f"the training window of {about}"
        self._groups = list(groups)
        self.window = Pool(zero)
        self.epoch = self._reduced_not_logged = zero
        self.run_total = self.validated = zero[:1]
        self.best = math.nan
        self.num_logged = 0
        self.failed = False

    def start_epoch(self) -> None:
        """Forget the targets of the epoch before."""
        self.epoch = self._zero

    def close_window(self, ranks: Ranks) -> Tallies:
        """Reduce the window and start another; return all that has been reduced since the last log point."""
        [window] = sum_over_ranks([self.window.tallies()], self._about, ranks)
        self._add(window)
        self.window = Pool(self._zero)
        # What an epoch or a checkpoint has reduced before it was logged belongs to the window that is logged next.
        return self._reduced_not_logged

    def mark_logged(self, num_tokens: int) -> None:
        """Note that everything that was reduced has been logged, and how many targets those are since the beginning."""
        self._reduced_not_logged = self._zero
        self.num_logged = num_tokens

    def update_best(self, bits: float) -> float:
        """Return the lowest bits per token of a validation, now that there is another."""
        self.best = min((each for each in (self.best, bits) if not math.isnan(each)), default=math.nan)
        return self.best

    def _add(self, window: Tallies) -> None:
        self._reduced_not_logged = add_tallies(self._reduced_not_logged, window)
        self.epoch = add_tallies(self.epoch, window)
        self.run_total = add_tallies(self.run_total, window[:1])

    def state_dict(self) -> dict[str, Any]:
        """Return the tallies of all ranks; among several ones, without the window."""
        return self._state_dict(self._zero if is_distributed() else self.window.tallies())

    def state_dict_of_all_ranks(self, ranks: Ranks) -> dict[str, Any]:
        """Return the tallies of all ranks, the window included; the ranks meet in one collective."""
        [window] = sum_over_ranks([self.window.tallies()], self._about, ranks)
        return self._state_dict(window)

    def _state_dict(self, window: Tallies) -> dict[str, Any]:
        tallies = {
            "reduced_not_logged": add_tallies(self._reduced_not_logged, window),
            "epoch": add_tallies(self.epoch, window),
            "run_total": add_tallies(self.run_total, window[:1]),
        }
        states = {name: [tally.state for tally in each] for name, each in tallies.items()}
        about = {"version": STATE_VERSION, "groups": self._groups}
        return about | {"tallies": states, "best_bits_per_token": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a saved state, on any number of ranks; all of them hold the tallies of all ranks.

        Raises:
            ValueError: If the state is of another version, is incomplete, or has tallies of another shape.
        """
        state_dict = _converted(state_dict, self._groups)
        if state_dict["groups"] != self._groups:
            raise ValueError(
                f"`state_dict` must be of the groups {self._groups}, in this order, got {state_dict['groups']}; load "
                "it into a CrossEntropyMonitor with the `groups` that it was saved with."
            )
        tallies = {name: self._loaded(name, state_dict["tallies"][name]) for name in _NAMES}
        self._reduced_not_logged, self.epoch, self.run_total = (tallies[name] for name in _NAMES)
        self.best = state_dict["best_bits_per_token"]
        self.num_logged = _num_scored(self.run_total) - _num_scored(self._reduced_not_logged)

    def _loaded(self, name: str, states: Sequence[Any]) -> Tallies:
        zero = self._zero[:1] if name == "run_total" else self._zero
        expected, found = ([_described(state) for state in each] for each in ([x.state for x in zero], states))
        if found != expected:
            raise ValueError(
                f"`state_dict` must hold tallies of shapes {expected} as {name!r}, got {found}; load it into a "
                "CrossEntropyMonitor with the `groups`, `token_bytes`, `readings` and `extras` that it was saved with."
            )
        return tuple(type(x)(state.to(x.state.device)) for x, state in zip(zero, states, strict=True))


def _num_scored(tallies: Tallies) -> int:
    """Return how many targets of all were scored."""
    totals: Any = tallies[0].cpu().unbind()[0].totals()
    return int(totals.scored)


def _described(state: Any) -> Any:
    """Return the shape of a tally's state, and what it is if it is none."""
    if not isinstance(state, torch.Tensor):
        return type(state).__name__
    return tuple(state.shape) if state.dtype == torch.int64 else (tuple(state.shape), state.dtype)


def _converted(state_dict: Mapping[str, Any], groups: list[str]) -> Mapping[str, Any]:
    """Return a state as this version saves it; raise ValueError if its version is unknown or if parts are missing."""
    version = state_dict.get("version")
    if version is None and {*_NAMES.values(), "best"} <= state_dict.keys():
        tallies = {name: state_dict[old] for name, old in _NAMES.items()}
        return {"tallies": tallies, "best_bits_per_token": state_dict["best"], "groups": groups}  # It named none.
    if version != STATE_VERSION:
        raise ValueError(
            f"`state_dict` must be of version {STATE_VERSION}, which this release of xent_metrics saves, or of one "
            f"before 0.1.0, got version {version!r}; load it with the release that saved it, or start the run anew."
        )
    missing = [name for name in ("groups", "tallies", "best_bits_per_token") if name not in state_dict]
    missing = missing or [f"tallies.{name}" for name in _NAMES if name not in state_dict["tallies"]]
    if missing:
        raise ValueError(
            f"`state_dict` must hold everything that CrossEntropyMonitor.state_dict() returns, got none of {missing}; "
            "load it from a checkpoint that was not changed."
        )
    return state_dict
