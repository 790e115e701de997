"""Readings that are chosen: accuracy and entropy where there are logits, and means that a step returns for the log."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.lightning.fits import (
    IGNORED,
    NUM_TRAIN,
    Expected,
    Model,
    assert_points,
    make_trainer,
    pool,
    ragged_loader,
)
from tests.lightning.monitored import NUM_BYTES, logged, monitored
from xent_metrics import LinearLogits
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]
ALL = ("cross_entropy", "accuracy", "entropy")


class Keeping(Model):
    """Returns losses in training and logits in validation, and keeps what is to be read of the logits.

    Args:
        linear: Return the logits as what they are made of.
    """

    def __init__(self, linear: bool = False) -> None:
        super().__init__("logits", adapt=self.change)
        self.linear = linear
        self.kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def change(self, stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        logits, target = outputs["logits"], outputs["target"]
        if stage == "train":
            losses = F.cross_entropy(logits.mT, target, reduction="none")
            return {"loss": outputs["loss"], "losses": losses, "target": target, "group": "a"}
        if not self.trainer.sanity_checking:
            probs = logits.detach().double().softmax(-1)
            entropy = -(probs * probs.log()).sum(-1)
            self.kept.append(((logits.argmax(-1) == target).double(), entropy, target))
        if self.linear:
            outputs["logits"] = LinearLogits(self.table(batch[0]), self.head.weight, self.head.bias)
        return outputs | {"group": "ab"[batch_idx % 2]}


def mean(values: list[torch.Tensor], targets: list[torch.Tensor]) -> float:
    """Return the mean over all targets that are not ignored."""
    return torch.cat([x[y != IGNORED] for x, y in zip(values, targets, strict=True)]).mean().item()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("more", [{}, {"groups": ["a", "b"], "token_bytes": NUM_BYTES}])
def test_accuracy_and_entropy_are_read_where_there_are_logits(tmp_path, linear, more) -> None:
    """Of validation, also by group and by loader, and not of training, which returns losses."""
    module = Keeping(linear)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(readings=ALL, **more), max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, ragged_loader(NUM_TRAIN), [ragged_loader(3), ragged_loader(2, seed=2)])
    right, entropy, targets = map(list, zip(*module.kept, strict=True))
    seen = monitored(trainer)
    parts = {"val/{}": range(5), "val_by_loader/{}/dataloader_idx_0": range(3)}
    parts |= {"val_by_group/{}/b": (1, 4)} if more else {}
    for tag, part in parts.items():
        for name, values in (("accuracy", right), ("entropy", entropy)):
            expected = mean([values[i] for i in part], [targets[i] for i in part])
            assert seen[tag.format(name)] == pytest.approx(expected, rel=1e-5), tag
    in_bytes = {"bits_per_byte"} if more else set()
    of_training = {tag.split("/")[1].removesuffix("_epoch") for tag in seen if tag.startswith("train")}
    assert of_training == {"cross_entropy"} | in_bytes
    names = {tag.split("/")[1] for tag in seen if tag.startswith("val")}
    in_bytes |= {f"macro_{name}" for name in in_bytes}
    assert names == {*ALL, "cross_entropy_lower", "cross_entropy_upper", "macro_cross_entropy"} | in_bytes


def test_only_what_is_chosen_is_logged(tmp_path) -> None:
    """The rest, such as the interval and the best, goes with the reading that it is of."""
    monitor = CrossEntropyMonitor(readings=["perplexity"])
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(Model(), ragged_loader(NUM_TRAIN), ragged_loader(3))
    ends = {f"val/perplexity_{end}" for end in ("lower", "upper")}
    assert set(logged(trainer)) - {"epoch"} == {"train/perplexity", "train/perplexity_epoch", "val/perplexity"} | ends


def test_a_reading_that_there_is_not_is_refused() -> None:
    """The error lists all of them."""
    with pytest.raises(ValueError, match=r"`readings` must be a list of some of \['cross_.*got 'accurracy'"):
        CrossEntropyMonitor(readings=["accurracy"])


@pytest.mark.parametrize("form", ["losses", "logits", "mean"])
def test_extra_means_are_weighted_by_their_targets(tmp_path, form) -> None:
    """Windows, epochs and validations; a batch that has none counts for nothing."""
    given: dict[str, list[float | None]] = {"train": [], "val": []}

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        value = None if batch_idx == 2 else 0.3 + batch_idx
        if not module.trainer.sanity_checking:
            given[stage].append(value)
        return outputs if value is None else outputs | {"extra": {"z_loss": torch.tensor(value)}}

    def weighted(values: list[float | None], batches: list[Any]) -> dict[str, float]:
        pairs = [(value, pool([batch])[1]) for value, batch in zip(values, batches, strict=True) if value is not None]
        return {"z_loss": math.fsum(value * n for value, n in pairs) / sum(n for _, n in pairs)}

    module = Model(form, adapt=adapt)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(extras=["z_loss"]), max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    batches, [[validation]] = module.train_batches, [list(x.values()) for x in module.evaluations]
    expected = Expected().windows(batches, (2, 1), (4, 3), (6, 5)).epochs(batches, (7, 6))
    expected.validations(module.evaluations, 6, interval=form != "mean")
    for end in (2, 4, 6):
        expected.add("train", end - 1, weighted(given["train"][end - 2 : end], batches[end - 2 : end]))
    expected.add("train", 6, weighted(given["train"], batches), "_epoch")
    expected.add("val", 6, weighted(given["val"], validation))
    assert_points(logged(trainer), expected.points)


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"aux": torch.ones(())}, ValueError, r"names of `extras`, \['z_loss'\], as \"extra\", got \['aux'\]; add"),
        (torch.ones(()), ValueError, r"names of `extras`, .* got \['Tensor'\]"),
        ({"z_loss": 0.5}, TypeError, "a tensor of one float, as \"extra\" 'z_loss', got .*0.5"),
        ({"z_loss": torch.ones(3)}, TypeError, "a tensor of one float, .* got a tensor .*take its mean"),
    ],
)
def test_an_extra_that_is_no_mean_is_told(tmp_path, extra, error, message) -> None:
    """Nothing is guessed."""
    module = Model(adapt=lambda stage, outputs, batch, i: outputs | {"extra": extra})
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(extras=["z_loss"]))
    with pytest.raises(error, match=f"validation_step must return .*{message}"):
        trainer.validate(module, ragged_loader(1), verbose=False)


@pytest.mark.parametrize("extras", [["perplexity"], ["val/aux"], ["macro_cross_entropy"], "z_loss/", [1], ["z_epoch"]])
def test_names_of_extras_are_parts_of_tags_of_their_own(extras) -> None:
    """They are looked at when the monitor is made."""
    with pytest.raises(ValueError, match=r"`extras` must be a list of names .* none of the readings and without"):
        CrossEntropyMonitor(extras=extras)
