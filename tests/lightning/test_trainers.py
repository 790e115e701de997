"""CrossEntropyMonitor under every setting of a Trainer: numbers, not only survival."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch.callbacks
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
)

from tests.lightning.fits import (
    NUM_TRAIN,
    Expected,
    Model,
    assert_points,
    counted,
    make_trainer,
    pool,
    ragged_batches,
    ragged_loader,
    readings,
)
from tests.lightning.monitored import NAMES, expected_best, logged, monitored, tagged
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]


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


@pytest.mark.skipif(not hasattr(lightning.pytorch.callbacks, "WeightAveraging"), reason="needs Lightning 2.6")
@pytest.mark.parametrize(("averaging", "options"), [("WeightAveraging", {}), ("EMAWeightAveraging", {"decay": 0.5})])
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_validation_is_of_the_averaged_weights(tmp_path, averaging, options, first) -> None:
    """What the steps return comes from the average, in whatever order the callbacks are listed."""
    averager = getattr(lightning.pytorch.callbacks, averaging)(**options)
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
    # The ends of an interval of few sequences are many standard errors away, and are exponentiated.
    last = readings(module.train_batches[-1:]) | {"num_tokens": pool(module.train_batches)[1]}
    assert monitored(trainer) == pytest.approx(values | tagged("train", last), rel=1e-5)
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


@pytest.mark.parametrize(
    ("limit", "num"), [(3, 3), (0.5, 3), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1.0, 7), (1, 1)))]
)
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


@pytest.mark.parametrize(
    ("interval", "every", "accumulate"),
    [
        (0.5, 4, 1),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((2, 2, 2), (0.25, 2, 1), (4, 4, 1), (2, 2, 1))),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0.25, 2, 2), (0.5, 4, 2), (4, 4, 2))),
    ],
)
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
    assert math.isnan(monitor.state_dict()["best_bits_per_token"])


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
    assert state["best_bits_per_token"] == after["best_bits_per_token"] == expected_best(module, 2)
    for name in ("reduced_not_logged", "epoch"):
        assert all(map(torch.equal, state["tallies"][name], after["tallies"][name]))


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
    nothing = dict.fromkeys(NAMES, math.nan) | {"num_tokens": pool(batches[:1])[1]}
    expected = Expected().add("train", 1, counted(batches[:1])).add("train", 3, nothing)
    expected.add("train", 5, readings(batches[4:5]) | {"num_tokens": pool([batches[0], batches[4]])[1]})
    expected.add("train", 6, counted([batches[i] for i in (0, 4, 6)]), "_epoch")
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
