"""Runs that end early, fail or are resumed."""

from __future__ import annotations

import copy
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from tests.lightning.fits import (
    NUM_TRAIN,
    Expected,
    K,
    Model,
    assert_points,
    make_trainer,
    ragged_loader,
    readings,
    with_all,
)
from tests.lightning.monitored import expected_best, logged, monitored
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]


class Fails(Callback):
    """Raises in the second epoch, as long as it is told to."""

    failing = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.failing and (trainer.current_epoch, batch_idx) == (1, 4):
            raise RuntimeError("on purpose")


def test_after_an_exception_the_windows_are_there_and_the_same_objects_fit_again(tmp_path) -> None:
    """The event file has the windows until then; the epoch is begun again, and knows nothing of the first try."""
    module, fails = Model(), Fails()
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    first = list(module.train_batches)
    assert len(first) == 11
    expected = Expected().windows(first, *((end, end - 1) for end in range(2, 11, 2))).epochs(first, (7, 6))
    assert_points(logged(trainer), expected.validations(module.evaluations, 6).points)

    fails.failing = False
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    second = module.train_batches[11:]
    assert len(second) == 7
    # The 12th step was begun and not done: it is the first of the second fit.
    expected.windows(second, (1, 11), (3, 13), (5, 15), (7, 17)).epochs(second, (7, 17))
    expected.evaluation("val", 17, module.evaluations[1])
    expected.add("val", 17, {"best_bits_per_token": readings(module.evaluations[1][0])["bits_per_token"]})
    assert_points(logged(trainer), expected.points)


def test_a_resumed_run_logs_the_same_bits_and_remembers_the_best(tmp_path) -> None:
    """Its second epoch is that of one that was never stopped, though a window began in the first."""

    def fit(name: str, max_epochs: int, ckpt_path: Path | None = None) -> Trainer:
        torch.manual_seed(0)
        # The second validation is worse, so that the best is the first one's.
        module = Model(adapt=lambda stage, outputs, batch, batch_idx: worse(module, stage, outputs))
        trainer = make_trainer(tmp_path / name, CrossEntropyMonitor(), max_epochs=max_epochs)
        trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2), ckpt_path=ckpt_path)
        return trainer

    def worse(module: Model, stage: str, outputs: dict[str, Any]) -> dict[str, Any]:
        if stage == "val" and module.trainer.current_epoch > 0:
            outputs["losses"] = 2 * outputs["losses"]
        return outputs

    whole = logged(fit("whole", 2))
    fit("first", 1).save_checkpoint(tmp_path / "first.ckpt")
    second = logged(fit("second", 2, tmp_path / "first.ckpt"))
    assert set(second) == set(whole)
    for tag, points in second.items():
        assert points == [(step, value) for step, value in whole[tag] if step >= 7], tag
    (_, early), (_, late) = whole["val/bits_per_token"]
    assert early < late
    assert second["val/best_bits_per_token"] == [(13, early)]


def test_another_fit_begins_with_no_best(tmp_path) -> None:
    """The best of the run so far is not that of another run."""
    monitor = CrossEntropyMonitor()
    make_trainer(tmp_path / "good", monitor, max_epochs=1).fit(
        Model(adapt=lambda stage, outputs, batch, batch_idx: outputs | {"losses": 0 * outputs["losses"]}),
        ragged_loader(2),
        ragged_loader(2),
    )
    assert monitor.state_dict()["best_bits_per_token"] == 0
    module, trainer = Model(), make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    assert monitored(trainer)["val/best_bits_per_token"] == expected_best(module, 0)


def state_of_a_fit(tmp_path: Path, **options: Any) -> dict[str, Any]:
    """Return the state of a monitor in the middle of a window and an epoch."""
    monitor = CrossEntropyMonitor(**options)
    make_trainer(tmp_path, monitor, max_epochs=1, log_every_n_steps=4).fit(
        Model(adapt=with_all), ragged_loader(NUM_TRAIN), ragged_loader(3)
    )
    return monitor.state_dict()


def assert_equal_states(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare every tally, bit for bit."""
    assert actual["version"] == expected["version"] == 1
    assert actual["best_bits_per_token"] == expected["best_bits_per_token"]
    assert actual["tallies"].keys() == expected["tallies"].keys() == {"reduced_not_logged", "epoch", "run_total"}
    for name, states in expected["tallies"].items():
        assert len(actual["tallies"][name]) == len(states)
        assert all(map(torch.equal, actual["tallies"][name], states)), name


@pytest.mark.parametrize("options", [{}, {"groups": ["even", "odd"], "token_bytes": [1] * K}], ids=["", "everything"])
def test_a_state_of_this_version_and_one_of_before_0_1_0_load_as_the_same(tmp_path, options) -> None:
    """Versions before 0.1.0 saved none, and other names."""
    state = state_of_a_fit(tmp_path, **options)
    tallies = state["tallies"]
    assert tallies["reduced_not_logged"][0].any()
    old = {"earlier": tallies["reduced_not_logged"], "epoch": tallies["epoch"], "seen": tallies["run_total"]}
    for saved in (state, old | {"best": state["best_bits_per_token"]}):
        monitor = CrossEntropyMonitor(**options)
        monitor.load_state_dict(saved)
        assert_equal_states(monitor.state_dict(), state)


def test_a_state_that_cannot_be_loaded_says_why_and_changes_nothing(tmp_path) -> None:
    """Of another version, incomplete, or of other groups or bytes."""
    state, plain = state_of_a_fit(tmp_path / "one"), CrossEntropyMonitor()
    floats, numbers = ({**state["tallies"], "epoch": [x]} for x in (state["tallies"]["epoch"][0].float(), [1]))
    without_epoch = {name: each for name, each in state["tallies"].items() if name != "epoch"}
    for message, wrong in {
        r"of version 1.* got version 2; load it with the release": state | {"version": 2},
        r"of version 1.* got version None": {},
        r"got version None; ": {"earlier": [], "epoch": [], "best": 0.0},
        r"got none of \['best_bits_per_token'\]": {"version": 1, "groups": [], "tallies": state["tallies"]},
        r"got none of \['tallies'\]": {"version": 1, "groups": [], "best_bits_per_token": 0.0},
        r"got none of \['groups'\]": {name: value for name, value in state.items() if name != "groups"},
        r"got none of \['tallies.epoch'\]": state | {"tallies": without_epoch},
        r"tallies of shapes .* got \['list'\]": state | {"tallies": numbers},
        r"tallies of shapes .* got \[\(\(\d+,\), torch.float32\)\]": state | {"tallies": floats},
    }.items():
        with pytest.raises(ValueError, match=f"`state_dict` must .*{message}"):
            plain.load_state_dict(wrong)
    other = state_of_a_fit(tmp_path / "other", groups=["even", "odd"])
    for groups in ([], ["even", "odd", "more"], ["odd", "even"]):  # In another order, tallies have the same shapes.
        with pytest.raises(ValueError, match=r"must be of the groups .* in this order, got \['even', 'odd'\]"):
            CrossEntropyMonitor(groups=groups or None).load_state_dict(other)
    for saved, groups in ((state, None), (other, ["even", "odd"])):
        with pytest.raises(ValueError, match=r"tallies of shapes \[.*\] as 'reduced_not_logged', got \["):
            CrossEntropyMonitor(groups=groups, token_bytes=[1] * K).load_state_dict(saved)
    assert not any(tally.any() for tallies in plain.state_dict()["tallies"].values() for tally in tallies)


class Copies(Callback):
    """Copies the monitor in the middle of a window."""

    def __init__(self, monitor: CrossEntropyMonitor) -> None:
        self.monitor = monitor
        self.states: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        copied = copy.deepcopy(self.monitor)
        assert not hasattr(copied, "log")  # The module's own, which would be copied along.
        self.states.append((copied.state_dict(), self.monitor.state_dict()))


def test_a_monitor_can_be_copied_in_the_middle_of_a_window(tmp_path) -> None:
    """Also where steps return losses with their graph, of which nothing is kept."""
    graphs = []

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        outputs["losses"] = outputs["losses"].double()  # The widest type there is, which needs no conversion.
        assert outputs["losses"].requires_grad
        assert not [number for number, graph in enumerate(graphs) if graph() is not None]
        node = outputs["losses"].grad_fn
        node.metadata["alive"] = Model()  # Lives as long as the graph; anything that can be referred to weakly.
        graphs.append(weakref.ref(node.metadata["alive"]))
        return outputs

    monitor = CrossEntropyMonitor()
    copies = Copies(monitor)
    trainer = make_trainer(tmp_path, monitor, copies, max_epochs=1, log_every_n_steps=4)
    trainer.fit(Model(adapt=adapt), ragged_loader(NUM_TRAIN))
    assert len(copies.states) == NUM_TRAIN
    for copied, own in copies.states:
        for name, tallies in own["tallies"].items():
            assert all(map(torch.equal, copied["tallies"][name], tallies)), name
    assert any(tally.any() for tally in copies.states[2][0]["tallies"]["reduced_not_logged"])


def test_fits_that_fail_leave_no_threads(tmp_path) -> None:
    """Lightning does not call `teardown` after an exception, and each overlaid run has a thread that writes."""
    before = threading.active_count()
    for i in range(3):
        monitor, logger = CrossEntropyMonitor(dashboards=["overlay"]), TensorBoardLogger(tmp_path, version=i)
        with pytest.raises(RuntimeError, match="on purpose"):
            make_trainer(tmp_path, monitor, Fails(), logger=logger).fit(
                Model(), ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2)
            )
        assert sorted(path.name for path in Path(logger.log_dir).iterdir() if path.is_dir()) == ["train", "val"]
    assert threading.active_count() == before
