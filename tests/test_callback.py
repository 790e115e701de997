"""CrossEntropyMonitor in a real Trainer, against float64 sums that the module under test keeps by itself."""

import math

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from xent_metrics.callback import CrossEntropyMonitor
from xent_metrics.tally import Tally

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but `Trainer.barebones=True.`:UserWarning"),
]

K = 20
NUM_TRAIN, NUM_VAL = 10, 4
READINGS = ("cross_entropy", "bits_per_token", "perplexity")


def ragged_batches(num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of unequal length with padding, so that a mean of batch means is another number."""
    generator = torch.Generator().manual_seed(num)
    batches = []
    for i in range(num):
        x, y = torch.randint(0, K, (2, 3, 4 + 5 * (i % 3)), generator=generator)
        y[0, 1 + i % 3 :] = -100
        batches.append((x, y))
    return batches


class Bigram(LightningModule):
    """A table of logits that returns one of the accepted forms and remembers its own sums."""

    def __init__(self, form: str = "losses", automatic: bool = True) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(K, K)
        self.form = form
        self.automatic_optimization = automatic
        self.seen: dict[str, list[tuple[float, int]]] = {"train": [], "val": [], "test": []}

    def step(self, stage: str, batch: tuple[torch.Tensor, torch.Tensor]) -> object:
        x, y = batch
        logits = self.table(x)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        num_tokens = (y != -100).sum()
        loss = losses.sum() / num_tokens
        wide = F.cross_entropy(logits.detach().double().flatten(0, 1), y.flatten(), reduction="sum")
        self.seen[stage].append((wide.item(), int(num_tokens)))
        return {
            "losses": {"loss": loss, "losses": losses, "target": y},
            "logits": {"loss": loss, "logits": logits, "target": y},
            "labels": {"loss": loss, "logits": logits, "labels": y},
            "mean": {"loss": loss, "num_tokens": num_tokens},
            "loss only": {"loss": loss, "extra": 1},
            "tensor": loss,
            "nothing": None,
        }[self.form]

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> object:
        outputs = self.step("train", batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(outputs["loss"])
            optimizer.step()
        return outputs

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> object:
        if self.trainer.sanity_checking:
            # Must leave no trace.
            return {"losses": torch.full(batch[1].shape, 1e6), "target": batch[1], "loss": torch.tensor(1e6)}
        return self.step("val", batch)

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> object:
        return self.step("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def loader(num: int) -> DataLoader:
    """Serve batches as they are."""
    return DataLoader(ragged_batches(num), batch_size=None)


def make_trainer(tmp_path, *callbacks, logger=True, **kwargs) -> Trainer:
    """Return a small silent Trainer."""
    kwargs = {"max_epochs": 2, "log_every_n_steps": 3} | kwargs
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=TensorBoardLogger(tmp_path, version=0) if logger is True else logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=tmp_path,
        **kwargs,
    )


def logged(trainer: Trainer) -> dict[str, list[tuple[int, float]]]:
    """Read the event files back: tag to (step, value)."""
    events = EventAccumulator(trainer.logger.log_dir, size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def pooled(seen: list[tuple[float, int]]) -> float:
    """Cross-entropy of some batches: all nats over all tokens."""
    return math.fsum(nats for nats, _ in seen) / sum(tokens for _, tokens in seen)


def assert_logged(
    points: dict[str, list[tuple[int, float]]], tag: str, expected: list[tuple[int, float]], suffix=""
) -> None:
    """Compare all three readings with pooled cross-entropies at their steps."""
    readings = {"cross_entropy": lambda h: h, "bits_per_token": lambda h: h / math.log(2), "perplexity": math.exp}
    for name, read in readings.items():
        actual = points[f"{tag}/{name}{suffix}"]
        assert [step for step, _ in actual] == [step for step, _ in expected]
        assert [value for _, value in actual] == pytest.approx([read(h) for _, h in expected], rel=1e-5)


def test_labels_of_hugging_face_models_are_shifted_on_demand(tmp_path) -> None:
    """Logits and labels of one length: position t scores label t + 1; losses have been aligned and are not shifted."""
    x, y = ragged_batches(1)[0]
    logits = torch.randn(*x.shape, K, generator=torch.Generator().manual_seed(0))
    losses = F.cross_entropy(logits.mT, y, reduction="none")
    monitor = CrossEntropyMonitor(shift=True)
    assert monitor.state_key != CrossEntropyMonitor().state_key
    for outputs, expected in (
        ({"logits": logits, "labels": y}, F.cross_entropy(logits[:, :-1].double().flatten(0, 1), y[:, 1:].flatten())),
        ({"losses": losses, "target": y}, losses.double().sum() / (y != -100).sum()),
    ):
        totals = monitor._tally("validation_step", outputs, None)[0].totals()
        assert totals.loss / totals.weight == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("form", ["losses", "mean"])
def test_manual_optimisation_reads_the_loss_as_it_is(tmp_path, form) -> None:
    """Without automatic optimisation Lightning divides nothing."""
    module = Bigram(form, automatic=False)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), max_epochs=1, log_every_n_steps=5)
    trainer.fit(module, loader(NUM_TRAIN))
    seen = module.seen["train"]
    assert_logged(logged(trainer), "train", [(4, pooled(seen[:5])), (9, pooled(seen[5:]))])


def test_a_window_goes_on_over_the_end_of_an_epoch(tmp_path) -> None:
    """The targets since the last log point are read, also when an epoch ended in between."""
    module, trainer = Bigram(), make_trainer(tmp_path, CrossEntropyMonitor(), log_every_n_steps=7)
    trainer.fit(module, loader(NUM_TRAIN))
    seen = module.seen["train"]
    assert_logged(logged(trainer), "train", [(6, pooled(seen[:7])), (13, pooled(seen[7:14]))])
    assert_logged(logged(trainer), "train", [(9, pooled(seen[:10])), (19, pooled(seen[10:]))], suffix="_epoch")


def test_extract_adapts_any_step(tmp_path) -> None:
    """`extract` gets what the step returned, the loss undivided, and the batch."""
    module = Bigram("loss only")
    monitor = CrossEntropyMonitor(
        extract=lambda outputs, batch: {"loss": outputs["loss"], "num_tokens": (batch[1] != -100).sum()}
    )
    trainer = make_trainer(tmp_path, monitor, max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(module, loader(NUM_TRAIN), loader(NUM_VAL))
    assert_logged(logged(trainer), "train", [(4, pooled(module.seen["train"]))], suffix="_epoch")
    assert_logged(logged(trainer), "val", [(4, pooled(module.seen["val"]))])


@pytest.mark.parametrize(
    ("form", "seen"),
    [("loss only", r"training_step must return .*num_tokens.* got \['extra', 'loss'\]"), ("tensor", r"got \['loss'\]")],
)
def test_a_step_that_returns_something_else_is_told_what_is_missing(tmp_path, form, seen) -> None:
    """The error names the step, the three forms and the keys that were seen."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor())
    with pytest.raises(ValueError, match=seen):
        trainer.fit(Bigram(form), loader(NUM_TRAIN))


@pytest.mark.parametrize(("form", "seen"), [("tensor", "got Tensor"), ("nothing", "got NoneType")])
def test_a_validation_step_that_returns_nothing_usable_is_named(tmp_path, form, seen) -> None:
    """Validation outputs arrive as they were returned, and the error names what arrived."""
    with pytest.raises(ValueError, match=f"validation_step must return .* {seen}"):
        make_trainer(tmp_path, CrossEntropyMonitor()).validate(Bigram(form), loader(2), verbose=False)


def test_checkpoints_and_early_stopping_can_monitor_the_readings(tmp_path) -> None:
    """What is logged reaches `callback_metrics` before those callbacks look."""
    checkpoint = ModelCheckpoint(
        tmp_path / "checkpoints",
        monitor="val/cross_entropy",
        filename="{val/cross_entropy:.3f}",
        auto_insert_metric_name=False,
    )
    stopping = EarlyStopping("train/cross_entropy_epoch", patience=1, min_delta=1e9)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), checkpoint, stopping, max_epochs=9)
    trainer.fit(Bigram(), loader(NUM_TRAIN), loader(NUM_VAL))
    assert trainer.current_epoch == 2
    best = min(value for _, value in logged(trainer)["val/cross_entropy"])
    assert checkpoint.best_model_score.item() == pytest.approx(best)


def test_nothing_is_read_between_log_points(tmp_path, monkeypatch) -> None:
    """A tally is copied to the host once at a log point and once an epoch, whatever the number of batches."""
    reads = []
    totals = Tally.totals
    monkeypatch.setattr(Tally, "totals", lambda tally: (reads.append(1), totals(tally))[1])
    make_trainer(tmp_path, CrossEntropyMonitor(), max_epochs=1, log_every_n_steps=5).fit(Bigram(), loader(20))
    assert len(reads) == 20 // 5 + 1


def test_the_callback_keeps_no_graph(tmp_path) -> None:
    """Outputs of a training step carry the graph; tallies do not."""
    monitor = CrossEntropyMonitor()
    make_trainer(tmp_path, monitor, max_epochs=1).fit(Bigram("logits"), loader(NUM_TRAIN))
    assert not any(tally.state.requires_grad for tally in monitor._epoch)


@pytest.mark.parametrize(
    "kwargs", [{"fast_dev_run": True}, {"logger": False}, {"limit_val_batches": 0}, {"barebones": True}]
)
def test_trainers_without_the_usual_parts_work(tmp_path, kwargs) -> None:
    """A missing logger or validation, a single step and a bare trainer are no reason to fail."""
    if "barebones" in kwargs:
        trainer = Trainer(barebones=True, max_epochs=1, callbacks=[CrossEntropyMonitor()], accelerator="cpu")
    else:
        trainer = make_trainer(tmp_path, CrossEntropyMonitor(), **kwargs)
    trainer.fit(Bigram(), loader(NUM_TRAIN), loader(NUM_VAL))


def test_it_serves_both_packages() -> None:
    """Lightning is published under two names with unrelated classes; the callback is one of either's."""
    assert isinstance(CrossEntropyMonitor(), lightning.pytorch.Callback)
    assert isinstance(CrossEntropyMonitor(), pytorch_lightning.Callback)
