"""CrossEntropyMonitor where a Trainer is not run from its first to its last epoch: numbers, not only survival."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import math
import re
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from tests.conftest import Operators
from tests.fits import (
    IGNORED,
    NUM_TRAIN,
    Data,
    Expected,
    K,
    Model,
    Scored,
    Steps,
    assert_points,
    bounds,
    make_trainer,
    points_of_csv,
    points_of_events,
    ragged_batches,
    ragged_loader,
    readings,
    readings_of,
    second_head,
    with_all,
)
from xent_metrics.callback import CrossEntropyMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]

NAMES = ("cross_entropy", "bits_per_token", "perplexity")


def logged(trainer: Trainer) -> dict[str, list[tuple[int, float]]]:
    """Read the event files of a trainer back."""
    return points_of_events(trainer.logger.log_dir)


def monitored(trainer: Trainer, part: str = "") -> dict[str, float]:
    """Return what callbacks can monitor whose tag begins so."""
    return {tag: value.item() for tag, value in trainer.callback_metrics.items() if tag.startswith(part)}


def tagged(stage: str, values: dict[str, float], suffix: str = "") -> dict[str, float]:
    """Return values under their tags."""
    return {f"{stage}/{name}{suffix}": value for name, value in values.items()}


# Settings of the Trainer.


@pytest.mark.parametrize("form", ["losses", "mean"])
def test_manual_optimisation_reads_the_loss_as_it_is(tmp_path, form) -> None:
    """Without automatic optimisation Lightning divides nothing, and every batch is a step."""
    module, trainer = Model(form, automatic=False), make_trainer(tmp_path, CrossEntropyMonitor())
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    ends = [(batch, batch - 1) for batch in range(2, 15, 2)]
    expected = Expected().windows(module.train_batches, *ends).epochs(module.train_batches, (7, 6), (14, 13))
    assert_points(logged(trainer), expected.points)


def test_manual_optimisation_need_not_return_a_loss(tmp_path) -> None:
    """Nobody minimises it, so the losses of the targets are enough."""

    class OfItsOwn(Model):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {"losses": outputs["losses"].detach(), "target": outputs["target"]}

    module, trainer = OfItsOwn(automatic=False), make_trainer(tmp_path, CrossEntropyMonitor(), max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    expected = Expected().windows(module.train_batches, (2, 1), (4, 3), (6, 5)).epochs(module.train_batches, (7, 6))
    assert_points(logged(trainer), expected.points)


def test_several_optimizer_steps_a_batch_are_one_step_of_the_axis(tmp_path) -> None:
    """Manual optimisation may count two global steps a batch; Lightning writes at the number of batches."""

    class Twice(Model):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            self.optimizers().step()
            return outputs

    module, trainer = Twice(automatic=False), make_trainer(tmp_path, CrossEntropyMonitor(), max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    assert trainer.global_step == 2 * NUM_TRAIN
    assert [step for step, _ in logged(trainer)["train/cross_entropy"]] == [1, 3, 5]


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5)])
@pytest.mark.parametrize("first", [True, False])
def test_validation_is_of_the_averaged_weights(tmp_path, averaging, first) -> None:
    """What the steps return comes from the average, in whatever order the callbacks are listed."""
    averager = averaging()
    weights = []

    class Watch(Callback):
        def on_validation_start(self, trainer, pl_module):
            weights.append({name: value.double().clone() for name, value in pl_module.state_dict().items()})

        def on_train_end(self, trainer, pl_module):
            weights.append(
                {name: value.double().clone() for name, value in averager._average_model.module.state_dict().items()}
            )

    callbacks = [CrossEntropyMonitor(), averager] if first else [averager, CrossEntropyMonitor()]
    module = Model("logits")
    trainer = make_trainer(tmp_path, *callbacks, Watch(), num_sanity_val_steps=0, max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))

    def by_hand(state: dict[str, torch.Tensor]) -> float:
        scored = []
        for x, y in ragged_batches(3, seed=2):
            logits = state["table.weight"][x] @ state["head.weight"].T + state["head.bias"]
            scored.append((F.cross_entropy(logits.mT, y, reduction="none"), y))
        return readings(scored)["cross_entropy"]

    trained, averaged = (by_hand(state) for state in weights)
    assert monitored(trainer)["val/cross_entropy"] == pytest.approx(averaged, rel=1e-6)
    assert abs(trained - averaged) > 1e-3


@pytest.mark.parametrize("num", [True, 2])
def test_a_fast_dev_run_reads_its_few_batches(tmp_path, num) -> None:
    """Every step is a log point, though there is no logger, and the rest is as ever."""
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor(), fast_dev_run=num)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    assert len(module.train_batches) == num
    expected = Expected().validations(module.evaluations, 0).epochs(module.train_batches, (num, 0))
    values = {tag: value for tag, [(_, value)] in expected.points.items()}
    assert monitored(trainer) == pytest.approx(values | tagged("train", readings(module.train_batches[-1:])), rel=1e-6)
    trainer.test(module, ragged_loader(3, seed=4), verbose=False)
    tested = readings(module.evaluations[-1][0])
    assert monitored(trainer)["test/perplexity"] == pytest.approx(tested["perplexity"], rel=1e-6)
    assert not (tmp_path / "lightning_logs").exists()


def test_a_barebones_trainer_logs_nothing_and_hears_nothing(tmp_path) -> None:
    """Lightning would warn about every name that is logged there."""
    trainer = Trainer(barebones=True, max_epochs=1, callbacks=[CrossEntropyMonitor()], accelerator="cpu")
    module = Model()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
        trainer.validate(module, ragged_loader(3))
        trainer.test(module, ragged_loader(3))
    assert not [
        warning for warning in heard if issubclass(warning.category, UserWarning) and "log" in str(warning.message)
    ]
    assert len(module.train_batches) == NUM_TRAIN
    assert monitored(trainer) == {}


@pytest.mark.parametrize(("limit", "num"), [(3, 3), (0.5, 3), (1.0, 7), (1, 1)])
def test_limited_loaders_are_read_as_far_as_they_go(tmp_path, limit, num) -> None:
    """An epoch is what Lightning makes one: so many batches, or such a part of them."""
    limits = {f"limit_{stage}_batches": limit for stage in ("train", "val", "test")}
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor(), log_every_n_steps=0, **limits)
    trainer.fit(module, ragged_loader(7), ragged_loader(7, seed=2))
    trainer.test(module, ragged_loader(7, seed=4), verbose=False)
    assert len(module.train_batches) == 2 * num
    assert {len(by_loader[0]) for by_loader in module.evaluations} == {num}
    expected = Expected().epochs(module.train_batches, (num, num - 1), (2 * num, 2 * num - 1))
    expected.validations(module.evaluations[:2], num - 1, 2 * num - 1)
    assert_points(logged(trainer), expected.evaluation("test", 2 * num, module.evaluations[2]).points)


def test_what_is_limited_to_nothing_is_not_logged(tmp_path) -> None:
    """No validation and no test: no tags; no training: nothing at all."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), limit_val_batches=0, limit_test_batches=0)
    trainer.fit(Model(), ragged_loader(NUM_TRAIN), ragged_loader(3))
    assert trainer.test(Model(), ragged_loader(3), verbose=False) == []
    assert {tag.split("/")[0] for tag in logged(trainer)} == {"train", "epoch"}
    trainer = make_trainer(tmp_path / "nothing", CrossEntropyMonitor(), limit_train_batches=0)
    trainer.fit(Model(), ragged_loader(NUM_TRAIN), ragged_loader(3))
    assert monitored(trainer) == {}


@pytest.mark.parametrize(("interval", "every"), [(0.25, 2), (0.5, 4), (4, 4), (2, 2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_validations_in_the_middle_of_an_epoch_leave_the_windows_alone(tmp_path, interval, every, accumulate) -> None:
    """Each is a point at the step before it, and the best is that of all of them."""
    module = Model()
    trainer = make_trainer(
        tmp_path, CrossEntropyMonitor(), val_check_interval=interval, accumulate_grad_batches=accumulate, max_epochs=2
    )
    trainer.fit(module, ragged_loader(8), ragged_loader(3, seed=2))
    batches = module.train_batches
    assert len(batches) == 16
    windows = [(end, end // accumulate - 1) for end in range(2 * accumulate, 17, 2 * accumulate)]
    expected = Expected().windows(batches, *windows).epochs(batches, *((end, end // accumulate - 1) for end in (8, 16)))
    expected.validations(module.evaluations, *(end // accumulate - 1 for end in range(every, 17, every)))
    assert_points(logged(trainer), expected.points)


def test_a_validation_between_optimizer_steps_changes_no_window(tmp_path) -> None:
    """With an interval that accumulation does not divide, the step is that of the batch after the last step."""
    module = Model()
    trainer = make_trainer(
        tmp_path, CrossEntropyMonitor(), val_check_interval=3, accumulate_grad_batches=2, max_epochs=1
    )
    trainer.fit(module, ragged_loader(8), ragged_loader(3, seed=2))
    expected = Expected().windows(module.train_batches, (4, 1), (8, 3)).epochs(module.train_batches, (8, 3))
    assert_points(logged(trainer), expected.validations(module.evaluations, 1, 2).points)


def test_validations_are_counted_over_epochs_on_demand(tmp_path) -> None:
    """Every fifth batch of all epochs together, as for data sets without a length."""
    module = Model()
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), val_check_interval=5, check_val_every_n_epoch=None)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    batches = module.train_batches
    expected = Expected().windows(batches, *((end, end - 1) for end in range(2, 15, 2)))
    expected.epochs(batches, (7, 6), (14, 13)).validations(module.evaluations, 4, 9)
    assert_points(logged(trainer), expected.points)


def test_accumulation_may_change_between_epochs(tmp_path) -> None:
    """The loss is multiplied by what Lightning divided it by then."""
    module = Model("mean")
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), GradientAccumulationScheduler({1: 3}), log_every_n_steps=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    batches = module.train_batches
    ends = [*((end, end - 1) for end in range(1, 8)), (10, 7), (13, 8), (14, 9)]
    assert_points(logged(trainer), Expected().windows(batches, *ends).epochs(batches, (7, 6), (14, 9)).points)


def test_overfitting_batches_reads_those_only(tmp_path) -> None:
    """The same few batches in every epoch, in training and in validation."""
    module = Model()
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), overfit_batches=2)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    batches = module.train_batches
    expected = Expected().windows(batches, (2, 1), (4, 3)).epochs(batches, (2, 1), (4, 3))
    assert_points(logged(trainer), expected.validations(module.evaluations, 1, 3).points)
    assert [len(by_loader[0]) for by_loader in module.evaluations] == [2, 2]


def test_a_sanity_check_leaves_no_trace(tmp_path) -> None:
    """Where nothing else validates there is no point, nothing to monitor and no best."""
    monitor = CrossEntropyMonitor()
    trainer = make_trainer(tmp_path, monitor, max_epochs=1, check_val_every_n_epoch=2, num_sanity_val_steps=-1)
    trainer.fit(Model(), ragged_loader(NUM_TRAIN), ragged_loader(3))
    assert monitored(trainer, "val/") == {}
    assert not [tag for tag in logged(trainer) if tag.startswith("val/")]
    assert math.isnan(monitor.state_dict()["best"])


def test_validation_and_test_by_themselves_are_no_part_of_a_fit(tmp_path) -> None:
    """They log at their step, change nothing that a checkpoint has, and know no best."""
    module, monitor = Model(), CrossEntropyMonitor()
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    expected, val, test = Expected(), ragged_loader(4, seed=2), ragged_loader(4, seed=4)

    def evaluate(step: int) -> None:
        [validated] = trainer.validate(module, val, verbose=False)
        expected.evaluation("val", step, module.evaluations[-1])
        assert validated == pytest.approx(
            {tag: points[-1][1] for tag, points in expected.points.items() if "val/" in tag and "best" not in tag},
            rel=1e-6,
        )
        trainer.test(module, test, verbose=False)
        expected.evaluation("test", step, module.evaluations[-1])

    evaluate(0)
    trainer.fit(module, ragged_loader(NUM_TRAIN), val)
    state = monitor.state_dict()
    expected.windows(module.train_batches, (2, 1), (4, 3), (6, 5)).epochs(module.train_batches, (7, 6))
    expected.validations(module.evaluations[2:3], 6)
    evaluate(7)
    assert_points(logged(trainer), expected.points)
    after = monitor.state_dict()
    assert state["best"] == after["best"] == expected_best(module, 2)
    for name in ("earlier", "epoch"):
        assert all(map(torch.equal, state[name], after[name]))


def expected_best(module: Model, *which: int) -> Any:
    """Return the lowest bits per token of some evaluations."""
    return pytest.approx(min(readings(module.evaluations[i][0])["bits_per_token"] for i in which), rel=1e-6)


@pytest.mark.parametrize("every", [1, 2, 100])
def test_a_fit_that_stops_in_the_middle_of_an_epoch_reads_what_there_was(tmp_path, every) -> None:
    """`max_steps` ends the epoch after its fifth batch; windows that were not full stay unlogged."""
    module = Model()
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), max_steps=5, max_epochs=-1, log_every_n_steps=every)
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    ends = [(end, end - 1) for end in range(every, 6, every)]
    expected = Expected().windows(module.train_batches, *ends).epochs(module.train_batches, (5, 4))
    assert_points(logged(trainer), expected.points)


@pytest.mark.parametrize("every", [0, 1, 3, 7, 100])
def test_windows_are_as_long_as_lightning_logs(tmp_path, every) -> None:
    """They go on over the end of an epoch; at 0, or beyond the end, there are epochs only."""
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor(), log_every_n_steps=every)
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    ends = [(end, end - 1) for end in range(every, 15, every)] if every else []
    expected = Expected().windows(module.train_batches, *ends)
    assert_points(logged(trainer), expected.epochs(module.train_batches, (7, 6), (14, 13)).points)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_batches_without_a_loss_are_in_no_window(tmp_path) -> None:
    """A step that returns None is skipped; where all of a window are, it has no targets and reads NaN."""
    skipped = (1, 2, 3, 5)
    module = Model(adapt=lambda stage, outputs, batch, batch_idx: None if batch_idx in skipped else outputs)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    batches = module.train_batches
    expected = Expected().add("train", 1, readings(batches[:1])).add("train", 3, dict.fromkeys(NAMES, math.nan))
    expected.add("train", 5, readings(batches[4:5]))
    expected.add("train", 6, readings([batches[i] for i in (0, 4, 6)]), "_epoch")
    assert_points(logged(trainer), expected.points)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_callback_that_stops_the_run_leaves_every_window_once(tmp_path, ours_first) -> None:
    """Lightning writes what is left if it knows before the batch's end that it stops, and nothing twice."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.should_stop or batch_idx == 4

    callbacks = [CrossEntropyMonitor(), Stop()] if ours_first else [Stop(), CrossEntropyMonitor()]
    module, trainer = Model(), make_trainer(tmp_path, *callbacks)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    ends = [(2, 1), (4, 3)] if ours_first else [(2, 1), (4, 3), (5, 4)]
    expected = Expected().windows(module.train_batches, *ends).epochs(module.train_batches, (5, 4))
    assert_points(logged(trainer), expected.validations(module.evaluations, 4).points)


def test_a_search_for_a_learning_rate_leaves_no_trace(tmp_path) -> None:
    """Lightning trains some steps, and puts everything back."""

    class Searched(Model):
        lr = 0.1

    module = Searched()
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), LearningRateFinder(num_training_steps=5), max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    batches = module.train_batches[-NUM_TRAIN:]
    assert_points(logged(trainer), Expected().windows(batches, (2, 1), (4, 3), (6, 5)).epochs(batches, (7, 6)).points)


# Ends, and new beginnings.


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
    assert monitor.state_dict()["best"] == 0
    module, trainer = Model(), make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    assert monitored(trainer)["val/best_bits_per_token"] == expected_best(module, 0)


# Other callbacks, and other instances.


def scaled(batches: list[Scored], factor: float) -> list[Scored]:
    """Return what reads so many times as much."""
    return [(factor * wide, y) for wide, y in batches]


def test_two_monitors_read_two_heads(tmp_path) -> None:
    """Each has its prefix, its `extract` and its own state."""
    module, monitors = Model(adapt=with_all), [CrossEntropyMonitor(), CrossEntropyMonitor(second_head, prefix="b/")]
    trainer = make_trainer(tmp_path, *monitors, max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    expected = Expected()
    for prefix, factor in (("", 1), ("b/", 3)):
        part = Expected().windows(scaled(module.train_batches, factor), (2, 1), (4, 3), (6, 5))
        part.epochs(scaled(module.train_batches, factor), (7, 6))
        part.validations([{0: scaled(module.evaluations[0][0], factor)}], 6)
        expected.points |= {f"{prefix}{tag}": points for tag, points in part.points.items()}
    assert_points(logged(trainer), expected.points)

    trainer.save_checkpoint(tmp_path / "both.ckpt")
    again = [CrossEntropyMonitor(second_head, prefix="b/"), CrossEntropyMonitor()]
    trainer = make_trainer(tmp_path / "again", *again, max_epochs=1)
    trainer.fit(Model(adapt=with_all), ragged_loader(NUM_TRAIN), ragged_loader(3), ckpt_path=tmp_path / "both.ckpt")
    assert again[0].state_dict()["best"] == pytest.approx(3 * again[1].state_dict()["best"])


def test_two_monitors_of_one_prefix_are_refused(tmp_path) -> None:
    """Their values would be averaged under one tag; the error says what each needs."""
    trainer = make_trainer(
        tmp_path, CrossEntropyMonitor(prefix="a/"), CrossEntropyMonitor(second_head, shift=True, prefix="a/")
    )
    with pytest.raises(ValueError, match=r"`prefix` must be another for each CrossEntropyMonitor.* 'a/' twice"):
        trainer.fit(Model(), ragged_loader(NUM_TRAIN))
    # Lightning is faster where all that tells their states apart is the same.
    with pytest.raises(RuntimeError, match=r"`callback\.state_key` must be unique"):
        make_trainer(tmp_path, CrossEntropyMonitor(), CrossEntropyMonitor(second_head))


def apart(gap: float) -> Any:
    """Return a function that makes a validation's cross-entropy so many nats: the target's logit is lower by it."""

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        if stage != "val":
            return outputs
        target = batch[1].clamp(min=0)
        return {"logits": gap * F.one_hot((target + 1) % K, K).float(), "target": batch[1]}

    return adapt


def test_an_infinite_perplexity_does_not_stop_early_stopping(tmp_path) -> None:
    """1000 nats are a finite cross-entropy; whoever monitors the perplexity is stopped at once."""
    stopping = EarlyStopping("val/cross_entropy", patience=9)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), stopping, max_epochs=3)
    trainer.fit(Model(adapt=apart(1000.0)), ragged_loader(2), ragged_loader(3))
    assert trainer.current_epoch == 3
    seen = monitored(trainer, "val/")
    assert {name: seen[f"val/{name}"] for name in NAMES} == pytest.approx(readings_of(1000.0))
    assert seen["val/perplexity"] == seen["val/perplexity_upper"] == math.inf
    points = logged(trainer)
    assert [value for _, value in points["val/cross_entropy"]] == [1000.0] * 3
    assert [value for _, value in points["val/perplexity"]] == [math.inf] * 3
    trainer = make_trainer(
        tmp_path / "perplexity", CrossEntropyMonitor(), EarlyStopping("val/perplexity"), max_epochs=3
    )
    trainer.fit(Model(adapt=apart(1000.0)), ragged_loader(2), ragged_loader(3))
    assert trainer.current_epoch == 1


def test_a_large_perplexity_is_a_float64_to_those_who_monitor_it(tmp_path) -> None:
    """100 nats are 2.7e43, more than float32 holds: event files say inf, callbacks and tables do not."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), logger=CSVLogger(tmp_path, version=0), max_epochs=1)
    trainer.fit(Model(adapt=apart(100.0)), ragged_loader(2), ragged_loader(3))
    assert monitored(trainer)["val/perplexity"] == pytest.approx(math.exp(100.0), rel=1e-6)
    assert points_of_csv(trainer.logger.log_dir)["val/perplexity"] == [(1, pytest.approx(math.exp(100.0), rel=1e-6))]


def test_early_stopping_can_monitor_an_epoch_of_training(tmp_path) -> None:
    """It looks after the epoch has been logged."""
    stopping = EarlyStopping("train/cross_entropy_epoch", patience=1, min_delta=1e9)
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor(), stopping, max_epochs=9)
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    assert trainer.current_epoch == 2
    first = readings(module.train_batches[:NUM_TRAIN])["cross_entropy"]
    assert stopping.best_score.item() == pytest.approx(first, rel=1e-6)


def test_checkpoints_are_named_by_what_they_monitor(tmp_path) -> None:
    """A window at a training step and the best validation reach `ModelCheckpoint` before it looks."""
    of_steps = ModelCheckpoint(
        tmp_path / "steps",
        monitor="train/cross_entropy",
        every_n_train_steps=2,
        save_top_k=-1,
        filename="{step}-{train/cross_entropy:.5f}",
        auto_insert_metric_name=False,
    )
    of_epochs = ModelCheckpoint(
        tmp_path / "epochs",
        monitor="val/best_bits_per_token",
        save_top_k=-1,
        filename="e{epoch}-{val/best_bits_per_token:.5f}",
        auto_insert_metric_name=False,
    )
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor(), of_steps, of_epochs)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    windows = [readings(module.train_batches[start : start + 2])["cross_entropy"] for start in range(0, 14, 2)]
    names = {f"{2 * i}-{value:.5f}.ckpt" for i, value in enumerate(windows, 1)}
    assert {path.name for path in (tmp_path / "steps").iterdir()} == names
    assert of_steps.best_model_score.item() == pytest.approx(min(windows), rel=1e-6)
    bits = [readings(by_loader[0])["bits_per_token"] for by_loader in module.evaluations]
    names = {f"e{epoch}-{min(bits[: epoch + 1]):.5f}.ckpt" for epoch in range(2)}
    assert {path.name for path in (tmp_path / "epochs").iterdir()} == names


def test_a_scheduler_can_wait_for_a_plateau_of_the_validation(tmp_path) -> None:
    """`ReduceLROnPlateau` gets the value, and lowers the rate when it no longer falls."""

    class Scheduled(Model):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
            scheduler = {"scheduler": self.scheduler, "monitor": "val/cross_entropy", "interval": "epoch"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    module, trainer = Scheduled(adapt=apart(5.0)), make_trainer(tmp_path, CrossEntropyMonitor(), max_epochs=3)
    trainer.fit(module, ragged_loader(2), ragged_loader(3))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    assert float(module.scheduler.best) == monitored(trainer)["val/cross_entropy"]


def test_bounds_are_as_wide_as_the_confidence_says(tmp_path) -> None:
    """Half of all intervals of 50 % miss: 0.674 standard errors to either side, in validation and test."""
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor(confidence=0.5))
    trainer.validate(module, ragged_loader(3), verbose=False)
    [batches] = module.evaluations[0].values()
    expected = readings(batches) | bounds(batches, quantile=0.6744897501960817)
    assert monitored(trainer) == pytest.approx(tagged("val", expected), rel=1e-6)
    trainer.test(module, ragged_loader(3), verbose=False)
    assert monitored(trainer) == pytest.approx(tagged("test", expected), rel=1e-6)


def test_extract_gets_the_loss_that_the_step_returned(tmp_path) -> None:
    """Lightning divides it by the number of batches that are accumulated; a function never sees that."""
    module = Model("extract")
    monitor = CrossEntropyMonitor(
        lambda outputs, batch: {"loss": outputs["loss"], "num_tokens": (batch[1] != IGNORED).sum()}
    )
    trainer = make_trainer(tmp_path, monitor, max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    batches = module.train_batches
    expected = Expected().windows(batches, (2, 0), (4, 1), (6, 2), (7, 3)).epochs(batches, (7, 3))
    assert_points(logged(trainer), expected.validations(module.evaluations, 3, interval=False).points)


def test_shifting_is_for_logits_only(tmp_path) -> None:
    """Losses are aligned with their targets already, whatever `shift` says."""
    module, trainer = Model("losses"), make_trainer(tmp_path, CrossEntropyMonitor(shift=True))
    trainer.validate(module, ragged_loader(3), verbose=False)
    assert_points(logged(trainer), Expected().evaluation("val", 0, module.evaluations[0]).points)


# Bad values.


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_a_target_out_of_range_stops_the_run(tmp_path, stage) -> None:
    """It is never wrapped or dropped: the error says how many there are, an example and where to look."""

    def adapt(of: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        return outputs | {"target": torch.where(batch[1] == 1, K + 5, batch[1])} if of == stage else outputs

    module, trainer = Model("logits", adapt=adapt), make_trainer(tmp_path, CrossEntropyMonitor())
    run = {"train": trainer.fit, "val": trainer.validate, "test": trainer.test}[stage]
    with pytest.raises(ValueError, match=rf"`target` must hold class indices in \[0, {K}\).* such as {K + 5}; check"):
        run(module, ragged_loader(3))


@pytest.fixture(name="deferred")
def _deferred(monkeypatch) -> None:
    """Let bad values on the CPU be counted, as they are on an accelerator."""
    for module in ("checks", "losses"):
        monkeypatch.setattr(f"xent_metrics.{module}.free_to_look", lambda _: False)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize(("stage", "seen"), [("train", 4), ("val", 3), ("test", 3)])
def test_an_accelerator_is_not_asked_until_a_log_point(tmp_path, stage, seen) -> None:
    """There a target out of range raises where it would be logged: at the log point, or at the end of the epoch."""

    def adapt(of: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        spoil = of == stage and batch_idx == 2
        return outputs | {"target": torch.full_like(batch[1], K)} if spoil else outputs

    module, trainer = Model("logits", adapt=adapt), make_trainer(tmp_path, CrossEntropyMonitor())
    run = {"train": trainer.fit, "val": trainer.validate, "test": trainer.test}[stage]
    with pytest.raises(ValueError, match=r"`target` must hold class indices.* but 16 targets were outside; map them"):
        run(module, ragged_loader(3 if stage != "train" else NUM_TRAIN))
    assert len(module.train_batches if stage == "train" else module.evaluations[0][0]) == seen


def test_what_has_no_target_reads_nan(tmp_path) -> None:
    """An epoch of padding only has no cross-entropy, no interval and no best; the next one has them."""

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        padding = module.trainer.current_epoch == 0 and stage != "test"
        return outputs | {"target": torch.full_like(batch[1], IGNORED)} if padding else outputs

    module = Model(adapt=adapt)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), log_every_n_steps=NUM_TRAIN)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    nothing = dict.fromkeys(NAMES, math.nan)
    expected = Expected().add("train", 6, nothing).add("train", 6, nothing, "_epoch").add("val", 6, nothing)
    expected.add("val", 6, {"best_bits_per_token": math.nan})
    second = module.train_batches[NUM_TRAIN:]
    expected.add("train", 13, readings(second)).add("train", 13, readings(second), "_epoch")
    expected.validations(module.evaluations[1:], 13)
    assert_points(logged(trainer), expected.points)


def test_a_mean_of_no_targets_counts_for_nothing(tmp_path) -> None:
    """It is 0 / 0, and so NaN, of 0 tokens."""

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": torch.tensor(math.nan), "num_tokens": 0} if (stage, batch_idx) == ("val", 1) else outputs

    module, trainer = Model("mean", adapt=adapt), make_trainer(tmp_path, CrossEntropyMonitor())
    trainer.validate(module, ragged_loader(3), verbose=False)
    [first, _, third] = module.evaluations[0][0]
    assert monitored(trainer) == pytest.approx(tagged("val", readings([first, third])), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero:UserWarning")
def test_an_empty_loader_of_several_is_not_logged(tmp_path) -> None:
    """The other one is the whole, and its tags would say so twice."""
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor())
    trainer.validate(module, [ragged_loader(2), DataLoader([], batch_size=None)], verbose=False)
    [by_loader] = module.evaluations
    assert_points(logged(trainer), Expected().evaluation("val", 0, by_loader).points)


def one_infinite(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
    """Make the first loss of the second batch infinite."""
    if batch_idx != 1 or stage == "train":
        return outputs
    losses = outputs["losses"].clone()
    losses[0, 0] = math.inf
    return outputs | {"losses": losses}


def test_infinite_losses_do_what_the_policy_says(tmp_path) -> None:
    """They make everything infinite, are left out, or stop the run."""
    module = Model(adapt=one_infinite)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor())
    [seen] = trainer.validate(module, ragged_loader(3), verbose=False)
    assert {name: seen[f"val/{name}"] for name in NAMES} == dict.fromkeys(NAMES, math.inf)
    assert all(
        math.isnan(seen[f"val/{name}_{end}"]) for name in ("cross_entropy", "perplexity") for end in ("lower", "upper")
    )
    [first, (wide, y), third] = module.evaluations[0][0]
    y, wide = y.clone(), wide.clone()
    wide[0, 0], y[0, 0] = 0, IGNORED
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(nan_policy="omit"))
    [seen] = trainer.validate(module, ragged_loader(3), verbose=False)
    assert {name: seen[f"val/{name}"] for name in NAMES} == pytest.approx(readings([first, (wide, y), third]), rel=1e-6)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(nan_policy="raise"))
    with pytest.raises(
        ValueError, match=r"`nan_policy='raise'` allows finite losses only.* 1 infinite.*nan_policy='omit'"
    ):
        trainer.validate(module, ragged_loader(3), verbose=False)


# Steps that return something else.


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"loss": 2.0, "num_tokens": 8}, '"loss", a tensor of one float, got .*2.0'),
        ({"loss": torch.ones(2), "num_tokens": 8}, '"loss", a tensor of one float, got a tensor .*return "losses"'),
        ({"loss": torch.ones(()), "num_tokens": 2.7}, '"num_tokens", one integer, got .*2.7; count them'),
        ({"loss": torch.ones(()), "num_tokens": None}, '"num_tokens", one integer, got .*None'),
        ({"loss": torch.ones(()), "num_tokens": torch.tensor(3.0)}, '"num_tokens", one integer, got a tensor'),
    ],
)
def test_a_mean_that_is_none_is_told_what_it_lacks(tmp_path, form, message) -> None:
    """Nothing is rounded or guessed."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor())
    with pytest.raises(TypeError, match=f"validation_step must return .*{message}"):
        trainer.validate(Model(adapt=lambda *_: form), ragged_loader(1), verbose=False)


def test_labels_count_where_the_target_is_none(tmp_path) -> None:
    """Hugging Face outputs have keys whose value is None."""
    module = Model(adapt=lambda stage, outputs, batch, i: outputs | {"target": None, "labels": outputs["target"]})
    trainer = make_trainer(tmp_path, CrossEntropyMonitor())
    trainer.validate(module, ragged_loader(3), verbose=False)
    assert monitored(trainer)["val/cross_entropy"] == pytest.approx(
        readings(module.evaluations[0][0])["cross_entropy"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("stage", "returned", "seen"),
    [
        ("training", "loss and more", "['extra', 'loss']"),
        ("training", "tensor", "['loss']"),  # As Lightning hands it on; a step that returns None it skips.
        ("validation", "loss and more", "['extra', 'loss']"),
        ("validation", "tensor", "Tensor"),
        ("validation", "nothing", "NoneType"),
        ("test", "loss and more", "['extra', 'loss']"),
        ("test", "tensor", "Tensor"),
        ("test", "nothing", "NoneType"),
    ],
)
def test_a_step_that_returns_no_form_is_told_the_three(tmp_path, stage, returned, seen) -> None:
    """The error names the step, the forms, what arrived, and the way out."""

    def adapt(of: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> Any:
        loss = outputs["loss"]
        return {"loss and more": {"loss": loss, "extra": 1}, "tensor": loss, "nothing": None}[returned]

    module, trainer = Model(adapt=adapt), make_trainer(tmp_path, CrossEntropyMonitor())
    run = {"training": trainer.fit, "validation": trainer.validate, "test": trainer.test}[stage]
    forms = r'\{"losses": .*\{"logits": .*"labels".*\{"loss": .*"num_tokens": '
    with pytest.raises(ValueError, match=rf"^{stage}_step must return {forms}.*, got {re.escape(seen)}; .*`extract`"):
        run(module, ragged_loader(3))


def test_an_extract_that_returns_no_form_is_told_the_three(tmp_path) -> None:
    """The error names the function, and the step whose outputs it got."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(lambda outputs, batch: {"nll": outputs["losses"]}))
    message = r"`extract`, called after test_step, must return .*\{\"loss\": .*, got \['nll'\]"
    with pytest.raises(ValueError, match=message):
        trainer.test(Model(), ragged_loader(3), verbose=False)


# Groups, and bytes.

GROUPS = ("even", "odd", "nowhere")


def index_of(batch: Any) -> torch.Tensor:
    """Return a group for each target, which is even or odd like the target; padding belongs to the first."""
    return batch[1].clamp(min=0) % 2


def row_of(batch: Any) -> torch.Tensor:
    """Return a group for each sequence, alternately."""
    return torch.arange(len(batch[1])) % 2


GROUPINGS = {
    "name of the batch": lambda batch, i: GROUPS[i % 2],
    "index of the batch": lambda batch, i: i % 2,
    "tensor of the batch": lambda batch, i: torch.tensor(i % 2),
    "names of sequences": lambda batch, i: [GROUPS[j] for j in row_of(batch)],
    "tuple of names": lambda batch, i: tuple(GROUPS[j] for j in row_of(batch)),
    "indices of sequences": lambda batch, i: row_of(batch).tolist(),
    "tensor of sequences": lambda batch, i: row_of(batch),
    "int32 of sequences": lambda batch, i: row_of(batch).int(),
    "tensor of targets": lambda batch, i: index_of(batch),
    "indices of targets": lambda batch, i: index_of(batch).tolist(),
}


def grouped_reference(batches: list[Scored], grouping: str) -> list[list[Scored]]:
    """Return what each group scored."""
    groups: list[list[Scored]] = [[], []]
    for i, (wide, y) in enumerate(batches):
        if "batch" in grouping:
            index = torch.full_like(y, i % 2)
        elif "targets" in grouping:
            index = index_of((None, y))
        else:
            index = row_of((None, y))[:, None].expand_as(y)
        for group in range(2):
            groups[group].append((wide * (index == group), torch.where(index == group, y, IGNORED)))
    return groups


def with_group(grouping: Any) -> Any:
    """Return a function that adds a group to what a step returned."""
    return lambda stage, outputs, batch, batch_idx: outputs | {"group": grouping(batch, batch_idx)}


@pytest.mark.parametrize("form", ["losses", "logits"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_every_group_reads_its_own_targets(tmp_path, form, grouping) -> None:
    """Names or indices, of batches, sequences or targets: in windows, validation and test; the empty one nowhere."""
    module = Model(form, adapt=with_group(GROUPINGS[grouping]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS), max_epochs=1, log_every_n_steps=NUM_TRAIN)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    trainer.test(module, ragged_loader(4, seed=4), verbose=False)
    val, test = (by_loader[0] for by_loader in module.evaluations)
    expected = Expected().windows(module.train_batches, (7, 6)).epochs(module.train_batches, (7, 6))
    expected.validations(module.evaluations[:1], 6).evaluation("test", 7, {0: test})
    for stage, step, batches in (("train", 6, module.train_batches), ("val", 6, val), ("test", 7, test)):
        for name, group in zip(GROUPS, grouped_reference(batches, grouping), strict=False):
            expected.add(stage, step, readings(group), f"/{name}")
    assert_points(logged(trainer), expected.points)


def test_groups_of_several_loaders_are_read_together(tmp_path) -> None:
    """A group is of all loaders, and a loader of all groups."""
    module = Model(adapt=with_group(GROUPINGS["names of sequences"]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS))
    trainer.validate(module, [ragged_loader(3), ragged_loader(2, seed=2)], verbose=False)
    [by_loader] = module.evaluations
    expected = Expected().evaluation("val", 0, by_loader)
    for name, group in zip(GROUPS, grouped_reference(by_loader[0] + by_loader[1], "sequences"), strict=False):
        expected.add("val", 0, readings(group), f"/{name}")
    assert_points(logged(trainer), expected.points)


def test_a_vector_of_groups_of_square_targets_is_one_for_each_sequence(tmp_path) -> None:
    """As many sequences as targets in each are not ambiguous: a vector is never one for each position."""
    loader = DataLoader([tuple(torch.randint(0, K, (2, 4, 4)))], batch_size=None)
    module = Model(adapt=with_group(GROUPINGS["tensor of sequences"]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS))
    trainer.validate(module, loader, verbose=False)
    for name, group in zip(GROUPS, grouped_reference(module.evaluations[0][0], "sequences"), strict=False):
        assert monitored(trainer)[f"val/cross_entropy/{name}"] == pytest.approx(
            readings(group)["cross_entropy"], rel=1e-6
        )


def test_groups_of_shifted_labels_are_shifted_with_them(tmp_path) -> None:
    """A group for each label, also for the first one, which is not scored."""
    module = Model("shifted labels", adapt=with_group(GROUPINGS["tensor of targets"]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS, shift=True))
    trainer.validate(module, ragged_loader(3), verbose=False)
    for name, group in zip(GROUPS, grouped_reference(module.evaluations[0][0], "targets"), strict=False):
        assert monitored(trainer)[f"val/cross_entropy/{name}"] == pytest.approx(
            readings(group)["cross_entropy"], rel=1e-6
        )


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("other", r"names of `groups`, which are \['even', 'odd', 'nowhere'\], got 'other'; add it to `groups`"),
        (["even", "other"], "got 'other'; add it to `groups`"),
        (3, r"`group` must hold integers in \[0, 3\), got \d+ that are not, such as 3"),
        (torch.tensor([-1, 0]), r"`group` must hold integers in \[0, 3\), got \d+ that are not, such as -1"),
        (torch.zeros(3, dtype=torch.int64), r"one for each sequence.* got shape \(3,\) for targets of shape \(2, 4\)"),
        (torch.zeros(4, dtype=torch.int64), r"one for each target, got shape \(4,\) for targets of shape \(2, 4\)"),
        (["even"] * 3, r"one for each sequence.* got shape \(3,\) for targets of shape \(2, 4\)"),
        (torch.zeros(2, 4), r"`group` must be a dense tensor of integers.* convert it with .long\(\)"),
    ],
)
def test_a_bad_group_says_what_it_must_be(tmp_path, group, message) -> None:
    """An unknown name, an index that is none, one too few or too many."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS))
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.validate(Model(adapt=with_group(lambda batch, i: group)), ragged_loader(1), verbose=False)


def test_an_index_beyond_the_groups_says_what_to_change(tmp_path) -> None:
    """The monitor has `groups`; `num_groups` and `weight` are arguments of the metrics."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS))
    with pytest.raises(ValueError, match="`groups`") as raised:
        trainer.validate(Model(adapt=with_group(lambda batch, i: 3)), ragged_loader(1), verbose=False)
    assert "num_groups" not in str(raised.value)
    assert "weight" not in str(raised.value)


def test_every_target_may_have_a_name(tmp_path) -> None:
    """A name or an index, for each target: as a list of a list for each sequence."""
    names = with_group(lambda batch, i: [[GROUPS[j] for j in row] for row in index_of(batch)])
    module, trainer = Model(adapt=names), make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS))
    trainer.validate(module, ragged_loader(3), verbose=False)
    for name, group in zip(GROUPS, grouped_reference(module.evaluations[0][0], "targets"), strict=False):
        assert monitored(trainer)[f"val/cross_entropy/{name}"] == pytest.approx(
            readings(group)["cross_entropy"], rel=1e-6
        )


@pytest.mark.parametrize("form", ["losses", "mean"])
def test_a_form_without_its_group_is_told_so(tmp_path, form) -> None:
    """Nothing is known of the targets of a mean, and a group is not guessed."""
    adapt = with_group(lambda batch, i: 0) if form == "mean" else None
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS))
    message = (
        'validation_step must return one of the first two of .* for `groups` also "group": .* got .*add what is missing'
    )
    with pytest.raises(ValueError, match=message):
        trainer.validate(Model(form, adapt=adapt), ragged_loader(1), verbose=False)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("even", "must be a list of different names, got 'even'; pass None for no groups"),
        ([], r"must be a list of different names, got \[\]; pass None"),
        (["even", "even"], "must be a list of different names"),
        (["an even one"], "names of letters, digits.* got 'an even one'; rename it"),
        (["a/b"], "got 'a/b'; rename it"),
        (["dataloader_idx_0"], "got 'dataloader_idx_0'; rename it"),
        ([0, 1], "got 0; rename it"),
    ],
)
def test_names_of_groups_are_parts_of_tags(groups, message) -> None:
    """They are looked at when the monitor is made."""
    with pytest.raises(ValueError, match=f"`groups` {message}|{message}"):
        CrossEntropyMonitor(groups=groups)


NUM_BYTES = [0, *range(1, K)]
"""Bytes of each token; the first stands for no text."""


def bits_per_byte(batches: list[Scored]) -> float:
    """All nats of targets that stand for text, in bits, over all of their bytes."""
    table = torch.tensor(NUM_BYTES)
    nats = num_bytes = 0
    for wide, y in batches:
        of_targets = table[y.clamp(min=0)] * (y != IGNORED)
        nats += wide[of_targets > 0].sum().item()
        num_bytes += int(of_targets.sum())
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("form", ["losses", "logits", "shifted labels"])
@pytest.mark.parametrize("given", ["list", "tensor", "file"])
def test_bits_per_byte_are_all_bits_over_all_bytes(tmp_path, form, given) -> None:
    """The table may be a list, a tensor or a file, and the readings per token are what they were."""
    torch.save(torch.tensor(NUM_BYTES), tmp_path / "bytes.pt")
    table = {"list": NUM_BYTES, "tensor": torch.tensor(NUM_BYTES), "file": str(tmp_path / "bytes.pt")}[given]
    module, monitor = Model(form), CrossEntropyMonitor(token_bytes=table, shift=form == "shifted labels")
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN), [ragged_loader(3, seed=2), ragged_loader(2, seed=3)])
    batches, [by_loader] = module.train_batches, module.evaluations
    expected = Expected().windows(batches, (2, 1), (4, 3), (6, 5)).epochs(batches, (7, 6))
    expected.validations(module.evaluations, 6)
    for start in (0, 2, 4):
        expected.add("train", start + 1, {"bits_per_byte": bits_per_byte(batches[start : start + 2])})
    expected.add("train", 6, {"bits_per_byte": bits_per_byte(batches)}, "_epoch")
    expected.add("val", 6, {"bits_per_byte": bits_per_byte(by_loader[0] + by_loader[1])})
    for i in range(2):
        expected.add("val", 6, {"bits_per_byte": bits_per_byte(by_loader[i])}, f"/dataloader_idx_{i}")
    assert_points(logged(trainer), expected.points)


def test_groups_have_their_own_bits_per_byte(tmp_path) -> None:
    """Per token and per byte, each of its own targets."""
    module = Model(adapt=with_group(GROUPINGS["tensor of targets"]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS, token_bytes=NUM_BYTES))
    trainer.validate(module, ragged_loader(3), verbose=False)
    [batches] = module.evaluations[0].values()
    expected = Expected().evaluation("val", 0, {0: batches}).add("val", 0, {"bits_per_byte": bits_per_byte(batches)})
    for name, group in zip(GROUPS, grouped_reference(batches, "targets"), strict=False):
        expected.add("val", 0, readings(group) | {"bits_per_byte": bits_per_byte(group)}, f"/{name}")
    assert_points(logged(trainer), expected.points)


def test_a_mean_has_no_bits_per_byte(tmp_path) -> None:
    """Nothing is known of the bytes of its targets."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(token_bytes=NUM_BYTES))
    message = "validation_step must return for `token_bytes` one of the first two of .* got .'loss', 'num_tokens'."
    with pytest.raises(ValueError, match=message):
        trainer.validate(Model("mean"), ragged_loader(1), verbose=False)


def test_a_table_that_lacks_tokens_is_told_with_an_example(tmp_path) -> None:
    """A token without bytes is not taken for one of none."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(token_bytes=[1, 2]))
    with pytest.raises(ValueError, match=r"class indices in \[0, 2\).* such as \d+; check the vocabulary size"):
        trainer.validate(Model(), ragged_loader(1), verbose=False)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ([1, -1], ValueError, "numbers of bytes, not negative and below .*, got -1; use 0"),
        ([1.5, 2.0], TypeError, r"1-D integer tensor.* got list \[1.5, 2.0\].*token_byte_lengths"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, r"1-D integer tensor.* shape \(2, 2\)"),
        ("nowhere.pt", FileNotFoundError, "nowhere.pt"),
    ],
)
def test_a_wrong_table_is_refused_when_the_monitor_is_made(table, error, message) -> None:
    """Not at the end of the first epoch."""
    with pytest.raises(error, match=message):
        CrossEntropyMonitor(token_bytes=table)


def test_a_file_may_hold_a_list(tmp_path) -> None:
    """What was saved before it became a tensor is a table too."""
    torch.save(NUM_BYTES, tmp_path / "bytes.pt")
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(token_bytes=str(tmp_path / "bytes.pt")))
    module = Model()
    trainer.validate(module, ragged_loader(3), verbose=False)
    expected = bits_per_byte(module.evaluations[0][0])
    assert monitored(trainer)["val/bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_a_file_that_holds_something_else_is_told_so(tmp_path) -> None:
    """Such as the tokenizer's vocabulary."""
    torch.save({"a": 1}, tmp_path / "bytes.pt")
    with pytest.raises(TypeError, match="`token_bytes`"):
        CrossEntropyMonitor(token_bytes=str(tmp_path / "bytes.pt"))


def test_loaders_that_are_read_side_by_side_are_one(tmp_path) -> None:
    """A `CombinedLoader` that is not sequential gives one batch of all its loaders, and there is no index to log."""

    class SideBySide(Model):
        def validation_step(self, batch, batch_idx):
            return super().validation_step(batch["a"], batch_idx)

    module, trainer = SideBySide(), make_trainer(tmp_path, CrossEntropyMonitor())
    loaders = CombinedLoader({"a": ragged_loader(3), "b": ragged_loader(3, seed=2)}, "min_size")
    trainer.validate(module, loaders, verbose=False)
    assert_points(logged(trainer), Expected().evaluation("val", 0, module.evaluations[0]).points)


# What it costs, and what it keeps.


def host_copies(tmp_path: Path, module: Model, *callbacks: Callback) -> list[Counter[str]]:
    """Count, at the start of every batch of an epoch of 102, what has waited for a device."""
    counts: Counter[str] = Counter()
    at_starts = []
    operators = Operators()

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            counts["_local_scalar_dense"] = operators.count("_local_scalar_dense")  # What item, int, bool, ... call.
            at_starts.append(counts.copy())

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "cpu", "numpy"):
            method = getattr(torch.Tensor, name)

            def counted(tensor: torch.Tensor, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
                counts[name] += 1
                return method(tensor, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        trainer = make_trainer(tmp_path, *callbacks, Watch(), max_epochs=1, log_every_n_steps=50)
        with operators:
            trainer.fit(module, ragged_loader(102))
    return at_starts


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("form", ["losses", "logits", "mean"])
def test_windows_cost_no_more_host_copies_than_logging_the_loss(tmp_path, form) -> None:
    """None between log points, and one at each, for all values together: that of a scalar that is logged."""

    class Logs(Model):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            self.log("loss", outputs["loss"])
            return outputs

    logs = host_copies(tmp_path / "logs", Logs(form))
    reads = host_copies(tmp_path / "reads", Model(form), CrossEntropyMonitor())
    assert logs[101] - logs[1] == Counter({"_local_scalar_dense": 2})
    assert reads[101] - reads[1] == Counter({"cpu": 2, "tolist": 2})  # A list of what has been copied.
    steps = {number: after - before for number, (before, after) in enumerate(itertools.pairwise(reads))}
    assert {number for number, counts in steps.items() if counts and number > 0} == {49, 99}


def test_nothing_is_in_the_progress_bar(tmp_path) -> None:
    """Lightning would copy a value to the host at every batch to show it there."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor())
    trainer.fit(Model(), ragged_loader(NUM_TRAIN), ragged_loader(3))
    assert monitored(trainer)
    assert trainer.progress_bar_metrics == {}


def test_outputs_are_not_kept(tmp_path) -> None:
    """Those of a training step carry the graph; a window that never ends must not hold one of any batch."""
    kept = []

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        assert not [number for number, logits in enumerate(kept) if logits() is not None]
        kept.append(weakref.ref(outputs["logits"]))
        return outputs

    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), log_every_n_steps=0)
    trainer.fit(Model("logits", adapt=adapt), ragged_loader(NUM_TRAIN))
    assert len(kept) == 2 * NUM_TRAIN


# Both packages, and their command lines.

PACKAGES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("in_a_list", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning.utilities._pytree")
def test_it_serves_both_packages(tmp_path, package, in_a_list) -> None:
    """Lightning is published under two names with unrelated classes; the callback is one of either's."""
    package = PACKAGES[package]
    monitor = CrossEntropyMonitor()
    assert isinstance(monitor, package.Callback)
    module = type("Own", (Steps, package.LightningModule), {})()
    trainer = package.Trainer(
        accelerator="cpu",
        max_epochs=2,
        log_every_n_steps=2,
        callbacks=[monitor] if in_a_list else monitor,
        logger=package.loggers.TensorBoardLogger(tmp_path, version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, ragged_loader(NUM_TRAIN), [ragged_loader(3), ragged_loader(2)])
    batches = module.train_batches
    expected = Expected().windows(batches, *((end, end - 1) for end in range(2, 15, 2)))
    expected.epochs(batches, (7, 6), (14, 13)).validations(module.evaluations, 6, 13)
    assert_points(logged(trainer), expected.points)


def run_cli(tmp_path: Path, *arguments: str, package: str = "lightning.pytorch", run: bool = True) -> LightningCLI:
    """Run a command line in this process."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 2,
        "default_root_dir": str(tmp_path),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": {
            "class_path": f"{package}.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path), "version": 0},
        },
    }
    module = importlib.import_module(f"{package}.cli")
    model, data = (Model, Data) if package == "lightning.pytorch" else (OfTheOther, DataOfTheOther)
    args = [*(["fit"] if run else []), f"--trainer={json.dumps(settings)}", *arguments]
    return module.LightningCLI(model, data, args=args, run=run)


class OfTheOther(Steps, pytorch_lightning.LightningModule):
    """The steps as a module of `pytorch_lightning`."""


class DataOfTheOther(pytorch_lightning.LightningDataModule):
    """The batches of the other package."""

    train_dataloader = Data.train_dataloader
    val_dataloader = Data.val_dataloader


def write_config(tmp_path: Path, callbacks: list[dict[str, Any]], model: dict[str, Any] | None = None) -> str:
    """Write a configuration (JSON is YAML too), and return the argument that names it."""
    path = tmp_path / "given.yaml"
    path.write_text(json.dumps({"trainer": {"callbacks": callbacks}, "model": model or {}, "seed_everything": 1}))
    return f"--config={path}"


def described(**init_args: Any) -> dict[str, Any]:
    """Return what a configuration says of the monitor."""
    return {"class_path": "xent_metrics.callback.CrossEntropyMonitor", "init_args": init_args}


ARGUMENTS = {
    "none": {},
    "plain": {"nan_policy": "omit", "confidence": 0.9, "prefix": "ema/", "class_dim": -1, "ignore_index": -100},
    "nulls": {"extract": None, "groups": None, "token_bytes": None},
    "groups": {"groups": ["even", "odd"]},
    "list": {"token_bytes": NUM_BYTES},
    "file": {"token_bytes": "bytes.pt", "groups": ["even", "odd"]},
    "extract": {"extract": "tests.fits.second_head"},
    "shift": {"shift": True},
    "backend": {"backend": "eager"},
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning.cli")
@pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning.utilities._pytree")
def test_every_argument_comes_from_yaml_and_goes_back_there(tmp_path, monkeypatch, package, arguments) -> None:
    """A configuration that was saved beside a run repeats the run."""
    monkeypatch.chdir(tmp_path)
    torch.save(torch.tensor(NUM_BYTES), "bytes.pt")
    given = ARGUMENTS[arguments]
    model = {"adapt": "tests.fits.with_all"}
    first = run_cli(tmp_path / "first", write_config(tmp_path, [described(**given)], model), package=package)
    folder = Path(first.trainer.logger.log_dir)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    [of_the_monitor] = [
        callback for callback in saved["trainer"]["callbacks"] if callback["class_path"].startswith("xent_metrics")
    ]
    parameters = inspect.signature(CrossEntropyMonitor).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    defaults["dashboards"] = list(defaults["dashboards"])  # YAML has no tuples.
    assert of_the_monitor == described(**(defaults | given))

    points = points_of_csv(folder)
    assert {f"{given.get('prefix', '')}{tag}" for tag in ("train/cross_entropy", "val/cross_entropy")} <= set(points)
    factor = 3 if arguments == "extract" else 1
    expected = factor * readings(first.model.evaluations[0][0])["cross_entropy"]
    assert points[f"{given.get('prefix', '')}val/cross_entropy"] == [(6, pytest.approx(expected, rel=1e-6))]
    assert ("val/cross_entropy/odd" in points) == bool(given.get("groups"))
    assert ("val/bits_per_byte" in points) == bool(given.get("token_bytes"))

    saved["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "second")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(saved))
    cli = importlib.import_module(f"{package}.cli").LightningCLI
    again = cli(type(first.model), type(first.datamodule), args=["fit", f"--config={tmp_path / 'again.yaml'}"])
    assert points_of_csv(again.trainer.logger.log_dir) == points


def test_no_index_may_be_ignored(tmp_path) -> None:
    """`ignore_index: null` is a setting, and not the default."""
    trainer = run_cli(tmp_path, write_config(tmp_path, [described(ignore_index=None)]), run=False).trainer
    with pytest.raises(ValueError, match=r"got 2 that are neither, such as -100; pass ignore_index=-100 if"):
        trainer.validate(Model("logits"), ragged_loader(3), verbose=False)


def test_the_monitor_is_appended_on_the_command_line(tmp_path) -> None:
    """`callbacks+=` adds to those of a configuration."""
    config = write_config(tmp_path, [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}])
    added = "--trainer.callbacks+=xent_metrics.callback.CrossEntropyMonitor"
    trainer = run_cli(tmp_path, config, added, "--trainer.callbacks.nan_policy=omit").trainer
    [monitor] = [callback for callback in trainer.callbacks if isinstance(callback, CrossEntropyMonitor)]
    assert monitor.nan_policy == "omit"
    points = points_of_csv(trainer.logger.log_dir)
    assert {"lr-SGD", "val/cross_entropy"} <= set(points)


def test_two_monitors_come_from_one_configuration(tmp_path) -> None:
    """`callbacks+` in a second configuration adds one with another prefix."""
    config = write_config(tmp_path, [described()], {"adapt": "tests.fits.with_all"})
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"trainer": {"callbacks+": described(extract="tests.fits.second_head", prefix="b/")}}))
    trainer = run_cli(tmp_path, config, f"--config={more}").trainer
    seen = monitored(trainer)
    assert seen["b/val/cross_entropy"] == pytest.approx(3 * seen["val/cross_entropy"], rel=1e-6)


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"nan_policy": "ommit"}, "(?s)nan_policy.*'propagate'.*'omit'.*'raise'.*ommit"),
        ({"nan_polici": "omit"}, "(?s)nan_polici"),
        ({"backend": "inductor"}, "(?s)backend.*'auto'.*'eager'.*'compile'.*inductor"),
        ({"groups": "even"}, "(?s)groups.*even"),
        ({"extract": "tests.fits.no_such_function"}, "(?s)extract.*no_such_function"),
        ({"confidence": "high"}, "(?s)confidence.*high"),
        ({"token_bytes": [1, "x"]}, "(?s)token_bytes.*x"),
    ],
)
def test_a_typo_in_a_configuration_is_named(tmp_path, capsys, init_args, message) -> None:
    """The command line ends with the argument and its value, before anything runs."""
    with pytest.raises(SystemExit):
        run_cli(tmp_path, write_config(tmp_path, [described(**init_args)]), run=False)
    assert re.search(message, capsys.readouterr().err)
