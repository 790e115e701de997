"""A killed run goes on with the same bits, on any number of ranks; an exception loses nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils._pytree import tree_leaves, tree_map

from tests.lightning.worlds import (
    READINGS,
    Table,
    both,
    collectives,
    loader,
    logged,
    make_trainer,
    pooled,
    rows,
    run_ranks,
)
from xent_metrics import CrossEntropy, CrossEntropyReport
from xent_metrics.lightning import CrossEntropyMonitor
from xent_metrics.tally.tally import Tally

pytestmark = pytest.mark.distributed


def num_targets(batches: list[dict[int, tuple[float, int]]]) -> int:
    """How many targets some batches score."""
    return sum(count for batch in batches for _, count in batch.values())


class Positioned:
    """A loader that deals batches to the ranks and saves how many all of them have had."""

    def __init__(self, num: int) -> None:
        self.batches = [torch.utils.data.default_collate(rows(2, first=2 * i)) for i in range(num)]
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.position, self.start = 0, 0

    def __len__(self) -> int:
        return len(self.batches) // self.world_size

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        start, self.start = self.start, 0
        for i in range(start // self.world_size, len(self)):
            self.position = (i + 1) * self.world_size
            yield self.batches[i * self.world_size + self.rank]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = self.start = state["position"] % len(self.batches)


class Killed(Callback):
    """Ends its process as an operating system does, in the middle of the second epoch."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)


class States(Callback):
    """Keeps what the monitor gave to each checkpoint, and how many targets its epochs had."""

    def __init__(self, monitor: CrossEntropyMonitor) -> None:
        self.monitor = monitor
        self.saved: list[dict[str, Any]] = []
        self.scored: list[int] = []

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved.append(checkpoint["callbacks"][self.monitor.state_key])

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.scored.append(Tally(self.monitor.state_dict()["tallies"]["epoch"][0]).totals().scored)


def train(folder: Path, checkpoint: Path | None = None, killed: bool = False) -> dict[str, Any]:
    """Train three epochs of 14 batches with checkpoints, from the start or from one of them."""
    module, monitor = Table(), CrossEntropyMonitor()
    states = States(monitor)
    keeper = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    callbacks = [monitor, states, keeper, *([Killed()] if killed else [])]
    trainer = make_trainer(*callbacks, folder=folder, max_epochs=3, log_every_n_steps=6)
    trainer.fit(module, Positioned(14), ckpt_path=checkpoint)
    return {"seen": module.seen, "states": states.saved, "scored": states.scored}


def at_step(folder: Path, step: int) -> Path:
    """Return the checkpoint that a run wrote after a step."""
    [path] = (folder / "checkpoints").glob(f"*step={step}.ckpt")
    return path


LAST = {1: 16, 2: 10}  # The step of a killed run's last checkpoint: two or three batches into the second epoch.


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def killed(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, list[dict[str, Any]]]:
    """A run that was never killed, and one that was."""
    world_size, folder = request.param, tmp_path_factory.mktemp("killed")
    ranks = run_ranks(world_size, train, folder / "whole", tmp_path=folder)
    with pytest.raises(AssertionError, match=r"exit codes of the ranks: \[-9"):
        run_ranks(world_size, train, folder / "killed", None, True, tmp_path=folder)
    newest = max((folder / "killed" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest == at_step(folder / "killed", LAST[world_size])
    return world_size, folder, ranks


def assert_goes_on(whole: Path, resumed: Path, step: int) -> None:
    """Everything that a resumed run logs is what the whole run logged from that step on, to the bit."""
    actual, expected = logged(resumed), logged(whole)
    for name in READINGS:
        for tag in (f"train/{name}", f"train/{name}_epoch"):
            assert actual[tag] == [point for point in expected[tag] if point[0] >= step]
            assert actual[tag]


def test_a_killed_run_goes_on_with_the_same_bits(killed) -> None:
    """Windows, also one that began in the epoch before, and epochs are those of a run that was never killed."""
    world_size, folder, _ = killed
    step = LAST[world_size]
    run_ranks(world_size, train, folder / "resumed", at_step(folder / "killed", step), tmp_path=folder)
    assert_goes_on(folder / "whole", folder / "resumed", step)


def test_a_checkpoint_before_the_first_window_of_an_epoch_goes_on_too(killed) -> None:
    """What the epoch before left to the window is in the state."""
    world_size, folder, _ = killed
    step = {1: 16, 2: 8}[world_size]
    path = at_step(folder / "whole", step)
    state = torch.load(path, weights_only=True)["callbacks"][CrossEntropyMonitor().state_key]
    assert Tally(state["tallies"]["reduced_not_logged"][0]).totals().scored > 0
    run_ranks(world_size, train, folder / "early", path, tmp_path=folder)
    assert_goes_on(folder / "whole", folder / "early", step)


def test_a_checkpoint_after_the_last_batch_of_an_epoch_goes_on_too(killed) -> None:
    """The next epoch does not get the targets of the one that is over."""
    world_size, folder, _ = killed
    step = 28 // world_size
    run_ranks(world_size, train, folder / "last", at_step(folder / "whole", step), tmp_path=folder)
    assert_goes_on(folder / "whole", folder / "last", step)


def test_a_resumed_epoch_on_another_number_of_ranks_counts_every_target_once(killed) -> None:
    """The tallies of a checkpoint are not multiplied by the ranks that load them, nor divided."""
    world_size, folder, whole = killed
    step, other = LAST[world_size], 3 - world_size
    ranks = run_ranks(other, train, folder / "other", at_step(folder / "killed", step), tmp_path=folder)
    epoch = 14 // world_size
    before = both(whole, "train", epoch, step)
    after = [batch for rank in ranks for batch in rank["seen"]["train"][: -14 // other]]
    assert len(before) == step * world_size - 14
    assert [rank["scored"][0] for rank in ranks] == [num_targets(before + after)] * other
    assert [rank["scored"][1] for rank in ranks] == [num_targets(both(whole, "train", 0, epoch))] * other
    value = float.fromhex(logged(folder / "other")["train/cross_entropy_epoch"][0][1])
    assert value == pytest.approx(pooled(before + after), rel=2e-6)


def test_the_state_is_plain_and_the_same_on_all_ranks(killed) -> None:
    """Tensors under strings, which PyTorch loads without running anything, and no rank's own."""
    _, folder, ranks = killed
    for states in zip(*(rank["states"] for rank in ranks), strict=True):
        for state in states:
            assert all(type(name) is str for name in state)
            assert {type(leaf) for leaf in tree_leaves(state)} <= {torch.Tensor, float, int}
            assert as_lists(state) == as_lists(states[0])
    loaded = torch.load(at_step(folder / "whole", 2), weights_only=True)["callbacks"][CrossEntropyMonitor().state_key]
    assert as_lists(loaded) == as_lists(ranks[0]["states"][0])


def as_lists(state: dict[str, Any]) -> str:
    """Spell out a state, so that two can be compared."""
    return repr(tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, state))


class Alone(Callback):
    """Keeps Lightning from waiting for the others after an exception, and counts what the monitor reduces then."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.before = calls, 0

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        trainer.strategy.barrier = lambda *args, **kwargs: None
        self.before = self.calls.count("tally")


class Failing(Table):
    """Fails on some ranks at the sixth batch."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__()
        self.ranks = ranks

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> object:
        if batch_idx == 5 and torch.distributed.get_rank() in self.ranks:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def epoch_in(path: Path) -> Tally:
    """Return all targets of the epoch that a monitor goes on with from a checkpoint."""
    monitor = CrossEntropyMonitor()
    monitor.load_state_dict(torch.load(path, weights_only=True)["callbacks"][monitor.state_key])
    state = monitor.state_dict()
    return Tally(state["tallies"]["epoch"][0])


def fail(folder: Path, ranks: list[int]) -> dict[str, Any]:
    """Fit until an exception, with every checkpoint that Lightning can write then."""
    module, error = Failing(ranks), None
    with collectives() as calls:
        alone = Alone(calls)
        checkpoints = ModelCheckpoint(folder / "model", save_on_exception=True), OnExceptionCheckpoint(folder / "any")
        try:
            trainer = make_trainer(CrossEntropyMonitor(), alone, *checkpoints, log_every_n_steps=2)
            trainer.fit(module, loader(40))
        except Exception as caught:
            error = type(caught).__name__
    return {"seen": module.seen, "error": error, "after": calls.count("tally") - alone.before}


@pytest.mark.parametrize("failing", [[0], [1], [0, 1]], ids=str)
def test_an_exception_leaves_a_checkpoint_without_waiting_for_anyone(tmp_path, failing) -> None:
    """It holds the tallies of the last log point, of all ranks, and loads."""
    ranks = run_ranks(2, fail, tmp_path, failing, tmp_path=tmp_path, timeout=60)
    assert [ranks[rank]["error"] for rank in failing] == ["ZeroDivisionError"] * len(failing)
    assert all(rank["error"] for rank in ranks)
    assert [rank["after"] for rank in ranks] == [0, 0]
    expected = both(ranks, "train", 0, 4)
    for path in (*(tmp_path / "model").iterdir(), tmp_path / "any" / "on_exception.ckpt"):
        epoch = epoch_in(path)
        assert epoch.totals().scored == num_targets(expected)
        value = CrossEntropyReport().read(epoch)["cross_entropy"].item()
        assert value == pytest.approx(pooled(expected), rel=2e-6)


def test_an_exception_on_a_single_rank_loses_nothing(tmp_path) -> None:
    """There is nobody to wait for, so the checkpoint has the targets since the last log point too."""
    [rank] = run_ranks(1, fail, tmp_path, [0], tmp_path=tmp_path)
    scored = epoch_in(tmp_path / "any" / "on_exception.ckpt").totals().scored
    assert scored == num_targets(rank["seen"]["train"])


class Measured(Table):
    """Has a metric of its own that is saved; with the hook its state in a checkpoint is that of all ranks."""

    def __init__(self, hook: bool) -> None:
        super().__init__("logits")
        self.metric, self.hook = CrossEntropy(), hook
        self.metric.persistent(True)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> object:
        form = super().training_step(batch, batch_idx)
        self.metric.update(form["logits"].detach(), form["target"])
        return form

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.hook:
            with self.metric.sync_context():
                checkpoint["state_dict"].update(self.metric.state_dict(prefix="metric."))


def save_and_load(folder: Path) -> dict[str, Any]:
    """Train with a metric in the module, and load what was saved on the same ranks."""
    seen: dict[str, Any] = {}
    for name, hook in (("hook", True), ("none", False)):
        module, loaded = Measured(hook), Measured(hook)
        trainer = make_trainer(folder=folder)
        trainer.fit(module, loader(16))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        state = torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]
        try:
            loaded.load_state_dict(state)
            seen[name] = loaded.metric.compute().item() if hook else ""
        except ValueError as error:
            seen[name] = str(error)
        seen["value"] = module.metric.compute().item()
    return seen


def test_a_metric_of_the_module_goes_on_with_the_targets_of_all_ranks(tmp_path) -> None:
    """What the hook saves loads on as many ranks and on one; what rank 0 saves without it, nowhere else."""
    first, second = run_ranks(2, save_and_load, tmp_path, tmp_path=tmp_path)
    alone = Measured(hook=True)
    alone.load_state_dict(torch.load(tmp_path / "hook.ckpt", weights_only=True)["state_dict"])
    assert first["hook"] == second["hook"] == first["value"] == second["value"] == alone.metric.compute().item()
    assert first["none"] == ""
    assert "loads it, 1 of 2, but this one is of rank 0 of 2 alone" in second["none"]
    state = torch.load(tmp_path / "none.ckpt", weights_only=True)["state_dict"]
    with pytest.raises(ValueError, match="loads it, 0 of 1, but this one is of rank 0 of 2 alone"):
        alone.load_state_dict(state)
    del state["metric.tally"]
    Measured(hook=True).load_state_dict(state)
