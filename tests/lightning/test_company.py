"""CrossEntropyMonitor beside other callbacks, and other instances of itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger

from tests.lightning.fits import (
    IGNORED,
    NUM_TRAIN,
    Expected,
    K,
    Model,
    Scored,
    assert_points,
    bounds,
    counted,
    make_trainer,
    points_of_csv,
    ragged_loader,
    readings,
    readings_of,
    second_head,
    with_all,
)
from tests.lightning.monitored import NAMES, logged, monitored, tagged
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]


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
    assert again[0].state_dict()["best_bits_per_token"] == pytest.approx(
        3 * again[1].state_dict()["best_bits_per_token"]
    )


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


@pytest.mark.parametrize("prefix", ["a b", "a//", "/a", "../", "b/./", 3, None])
def test_a_prefix_that_some_logger_refuses_is_refused_at_once(prefix) -> None:
    """MLflow takes no path that could be written in another way."""
    with pytest.raises(ValueError, match=r"`prefix` must be a path of letters, digits, .* got "):
        CrossEntropyMonitor(prefix=prefix)
    assert CrossEntropyMonitor(prefix="a.b/c/d-").prefix == "a.b/c/d-"


def apart(gap: float) -> Any:
    """Return a function that makes a validation's cross-entropy so many nats: the target's logit is lower by it."""

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        if stage != "val":
            return outputs
        target = batch[1].clamp(min=0)
        return {"logits": gap * F.one_hot((target + 1) % K, K).float(), "target": batch[1]}

    return adapt


@pytest.mark.slow
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


@pytest.mark.slow
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
    """Half of all intervals of 50 % miss: they are narrower than those of 95 %, in validation and test."""
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor(confidence=0.5))
    trainer.validate(module, ragged_loader(3), verbose=False)
    [batches] = module.evaluations[0].values()
    expected = counted(batches) | bounds(batches, confidence=0.5)
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
