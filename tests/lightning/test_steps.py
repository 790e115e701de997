"""Bad values, and steps that return something else."""

from __future__ import annotations

import math
import re
import warnings
from collections import UserDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.lightning.fits import (
    IGNORED,
    NUM_TRAIN,
    Expected,
    K,
    Model,
    assert_points,
    counted,
    make_trainer,
    ragged_batches,
    ragged_loader,
    readings,
    with_all,
)
from tests.lightning.monitored import NAMES, NUM_BYTES, logged, monitored, tagged
from xent_metrics.lightning import CrossEntropyMonitor
from xent_metrics.lightning.flattened_targets import FlattenedTargets
from xent_metrics.lightning.step_outputs import OutputReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_a_target_out_of_range_stops_the_run(tmp_path, stage) -> None:
    """It is never wrapped or dropped: the error says how many there are, an example and where to look."""

    def adapt(of: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        return outputs | {"target": torch.where(batch[1] == 1, K + 5, batch[1])} if of == stage else outputs

    module, trainer = Model("logits", adapt=adapt), make_trainer(tmp_path, CrossEntropyMonitor())
    run = {"train": trainer.fit, "val": trainer.validate, "test": trainer.test}[stage]
    with pytest.raises(ValueError, match=rf"`target` must hold class indices in \[0, {K}\).* such as {K + 5}; check"):
        run(module, ragged_loader(3))


@pytest.mark.usefixtures("hidden_values")
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


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_probabilities_as_logits_are_told(tmp_path, stage) -> None:
    """From the first batch, once, and the run goes on."""

    def adapt(of: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        return outputs | {"logits": outputs["logits"].softmax(-1)} if of == stage else outputs

    module, trainer = Model("logits", adapt=adapt), make_trainer(tmp_path, CrossEntropyMonitor())
    run = {"train": trainer.fit, "val": trainer.validate, "test": trainer.test}[stage]
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=".*look like")
        run(module, ragged_loader(3))
    assert len([w for w in caught if '_step returned "logits" that look like probabilities' in str(w.message)]) == 1
    assert monitored(trainer, stage)


def test_what_has_no_target_reads_nan(tmp_path) -> None:
    """An epoch of padding only has no cross-entropy, no interval and no best; the next one has them."""

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        padding = module.trainer.current_epoch == 0 and stage != "test"
        return outputs | {"target": torch.full_like(batch[1], IGNORED)} if padding else outputs

    module = Model(adapt=adapt)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), log_every_n_steps=NUM_TRAIN)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    nothing = dict.fromkeys(NAMES, math.nan) | {"num_tokens": 0}
    expected = Expected().add("train", 6, nothing).add("train", 6, nothing, "_epoch").add("val", 6, nothing)
    expected.add("val", 6, {"best_bits_per_token": math.nan})
    second = module.train_batches[NUM_TRAIN:]
    expected.add("train", 13, counted(second)).add("train", 13, counted(second), "_epoch")
    expected.validations(module.evaluations[1:], 13)
    assert_points(logged(trainer), expected.points)


def test_a_mean_of_no_targets_counts_for_nothing(tmp_path) -> None:
    """It is 0 / 0, and so NaN, of 0 tokens."""

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": torch.tensor(math.nan), "num_tokens": 0} if (stage, batch_idx) == ("val", 1) else outputs

    module, trainer = Model("mean", adapt=adapt), make_trainer(tmp_path, CrossEntropyMonitor())
    trainer.validate(module, ragged_loader(3), verbose=False)
    [first, _, third] = module.evaluations[0][0]
    assert monitored(trainer) == pytest.approx(tagged("val", counted([first, third])), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero:UserWarning")
def test_an_empty_loader_of_several_is_not_logged(tmp_path) -> None:
    """The other one is the whole, and its tags would say so twice."""
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor())
    trainer.validate(module, [ragged_loader(2), DataLoader([], batch_size=None)], verbose=False)
    [by_loader] = module.evaluations
    assert_points(logged(trainer), Expected().evaluation("val", 0, by_loader).points)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_loaders_keep_their_numbers_where_one_of_them_has_no_targets(tmp_path, empty) -> None:
    """A value stands under the number that Lightning gave its loader, wherever the one of padding only is."""
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor())
    padding = DataLoader([(x, torch.full_like(y, IGNORED)) for x, y in ragged_batches(2, seed=3)], batch_size=None)
    loaders = [ragged_loader(2, seed=1), ragged_loader(3, seed=2)]
    trainer.validate(module, [*loaders[:empty], padding, *loaders[empty:]], verbose=False)
    [by_loader] = module.evaluations
    del by_loader[empty]
    assert sorted(by_loader) == [i for i in range(3) if i != empty]
    assert_points(logged(trainer), Expected().evaluation("val", 0, by_loader).points)


@pytest.mark.parametrize("names", [("a/b", "c"), (1, 2), ("dataloader_idx_1", "x")])
def test_loaders_whose_names_are_no_parts_of_tags_have_numbers(tmp_path, names) -> None:
    """A slash would make a folder, and a number of another loader be mistaken for it."""
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor())
    trainer.validate(module, dict(zip(names, (ragged_loader(2), ragged_loader(3)), strict=True)), verbose=False)
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
        ("test", "loss and more", "['extra', 'loss']"),
        ("test", "tensor", "Tensor"),
    ],
)
def test_a_step_that_returns_no_form_is_told_the_three(tmp_path, stage, returned, seen) -> None:
    """The error names the step, the forms, what arrived, and the way out."""

    def adapt(of: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> Any:
        loss = outputs["loss"]
        return {"loss and more": {"loss": loss, "extra": 1}, "tensor": loss}[returned]

    module, trainer = Model(adapt=adapt), make_trainer(tmp_path, CrossEntropyMonitor())
    run = {"training": trainer.fit, "validation": trainer.validate, "test": trainer.test}[stage]
    forms = r'\{"losses": .*\{"logits": .*"labels".*\{"loss": .*"num_tokens": '
    with pytest.raises(ValueError, match=rf"^{stage}_step must return {forms}.*, got {re.escape(seen)}; .*`extract`"):
        run(module, ragged_loader(3))


@pytest.mark.parametrize("by", ["step", "extract"])
@pytest.mark.parametrize("skipped", [(1,), (0, 1, 2)])
def test_none_says_that_there_is_nothing_to_score(tmp_path, by, skipped) -> None:
    """The other batches of an evaluation are read; where there are none, what is read is NaN of 0 targets."""

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> Any:
        return None if stage == "val" and batch_idx in skipped else outputs

    module = Model(adapt=adapt if by == "step" else lambda stage, outputs, batch, i: outputs | {"i": i, "stage": stage})

    def extract(outputs: dict[str, Any], batch: Any) -> Any:
        return adapt(outputs.pop("stage"), outputs, batch, outputs["i"])

    trainer = make_trainer(tmp_path, CrossEntropyMonitor(None if by == "step" else extract), num_sanity_val_steps=0)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    batches = [batch for i, batch in enumerate(module.evaluations[-1][0]) if i not in skipped]
    expected = counted(batches) if batches else dict.fromkeys(NAMES, math.nan) | {"num_tokens": 0}
    seen = monitored(trainer, "val/")
    assert {name: seen[f"val/{name}"] for name in expected} == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_manual_optimisation_may_have_nothing_to_score(tmp_path) -> None:
    """Lightning hands an empty dict on for None."""

    class OfItsOwn(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else outputs

    module = OfItsOwn(automatic=False)
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), max_epochs=1, log_every_n_steps=3)
    trainer.fit(module, ragged_loader(3))
    [first, _, third] = module.train_batches
    assert_points(logged(trainer), Expected().windows([first, third], (2, 2)).epochs([first, third], (2, 2)).points)


STAGES = ("train", "val", "test")


@pytest.mark.parametrize("read", STAGES)
def test_other_stages_may_return_anything(tmp_path, read) -> None:
    """Such as a validation that generates text; nothing is logged of them, and nothing of a stage before is read."""
    module = Model(adapt=lambda stage, outputs, batch, i: outputs if stage == read else {"loss": outputs["loss"]})
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(stages=[read]), max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3))
    trainer.test(module, ragged_loader(2), verbose=False)
    expected = {
        "train": lambda: (
            Expected().windows(module.train_batches, (2, 1), (4, 3), (6, 5)).epochs(module.train_batches, (7, 6))
        ),
        "val": lambda: Expected().validations(module.evaluations[:1], 6),
        "test": lambda: Expected().evaluation("test", 7, module.evaluations[1]),
    }[read]()
    assert_points(logged(trainer), expected.points)


def test_a_stage_that_there_is_not_is_refused() -> None:
    """The error lists the three."""
    with pytest.raises(ValueError, match=r"`stages` must be a list of some of \['train', 'val', 'test'\], got 'valid'"):
        CrossEntropyMonitor(stages=["train", "valid"])


def test_an_extract_that_returns_no_form_is_told_the_three(tmp_path) -> None:
    """The error names the function, and the step whose outputs it got."""
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(lambda outputs, batch: {"nll": outputs["losses"]}))
    message = r"`extract`, called after test_step, must return .*\{\"loss\": .*, got \['nll'\]"
    with pytest.raises(ValueError, match=message):
        trainer.test(Model(), ragged_loader(3), verbose=False)


def flattened(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
    """Return what somebody returns who flattens before the loss."""
    return {"loss": outputs["loss"], "losses": outputs["losses"].flatten(), "target": outputs["target"].flatten()}


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Given again by `pytest.warns`.
@pytest.mark.parametrize("run", ["fit", "test"])
def test_targets_that_were_flattened_are_told_once(tmp_path, run) -> None:
    """Each token would be a sequence of its own, and the interval too narrow."""
    module, trainer = Model(adapt=flattened), make_trainer(tmp_path, CrossEntropyMonitor())
    loaders = [ragged_loader(3)] * {"fit": 2, "test": 1}[run]
    with pytest.warns(UserWarning, match=r"must return targets with a row for each sample, got 8 in one row") as told:
        getattr(trainer, run)(module, *loaders)
    assert sum("a row for each sample" in str(warning.message) for warning in told) == 1


@pytest.mark.parametrize("batch", [(torch.zeros(6, 3), torch.arange(6)), {"x": torch.zeros(6, 1), "n": 6}, [], "text"])
def test_a_target_a_sample_is_not_flattened(recwarn, batch) -> None:
    """A classifier draws samples, and where nobody knows how many there are nothing is said."""
    outputs = OutputReader(None, -1, None, False, None, None, None, "auto").read(
        "validation_step", {"logits": torch.zeros(6, 4), "target": torch.zeros(6, dtype=torch.int64)}, batch
    )
    FlattenedTargets().warn_of("validation_step", outputs, batch)
    assert not recwarn.list


def test_a_batch_that_is_a_mapping_of_its_own_has_its_size(recwarn) -> None:
    """As those of tokenizers are."""
    target = torch.zeros(12, dtype=torch.int64)
    outputs = OutputReader(None, -1, None, False, None, None, None, "auto").read(
        "validation_step", {"logits": torch.zeros(12, 4), "target": target}, None
    )
    FlattenedTargets().warn_of("validation_step", outputs, UserDict(ids=target.view(3, 4)))
    assert "got 12 in one row for a batch of 3" in str(recwarn.pop(UserWarning).message)


def test_functions_may_be_import_paths(tmp_path) -> None:
    """Configurations that do not import what they name, as Hydra's, give text."""
    monitor = CrossEntropyMonitor("tests.lightning.fits.second_head", decode="builtins.str")
    assert monitor.decode is str
    module, trainer = Model(adapt=with_all), make_trainer(tmp_path, monitor)
    trainer.validate(module, ragged_loader(3), verbose=False)
    assert monitored(trainer)["val/cross_entropy"] == pytest.approx(
        3 * readings(module.evaluations[0][0])["cross_entropy"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("extract", "error", "message"),
    [
        ("my.fn", ValueError, "got the import path 'my.fn', where there is nothing: No module named 'my'"),
        ("math.no_such_function", ValueError, "got .*, where there is nothing: module 'math' has no attribute"),
        ("not a path", ValueError, "got the import path 'not a path'"),
        ("math.pi", TypeError, r"got 'math.pi'; pass a function or its import path"),
        (3, TypeError, "got 3; pass a function or its import path"),
    ],
)
def test_what_is_no_function_is_told(extract, error, message) -> None:
    """With what was found at the path."""
    with pytest.raises(error, match=f"`extract` must be a function of .outputs, batch., {message}"):
        CrossEntropyMonitor(extract)


def test_lists_of_a_configuration_are_lists(tmp_path) -> None:
    """OmegaConf's, which Hydra hands on, are sequences of another class."""
    omegaconf = pytest.importorskip("omegaconf", reason="OmegaConf is not installed")
    given = {"token_bytes": NUM_BYTES, "groups": ["even", "odd"], "dashboards": ["layout"]}
    options = dict(omegaconf.OmegaConf.create(given))
    assert type(options["token_bytes"]) is omegaconf.ListConfig
    module, trainer = Model(adapt=with_all), make_trainer(tmp_path, CrossEntropyMonitor(**options))
    trainer.validate(module, ragged_loader(3), verbose=False)
    plain = make_trainer(tmp_path / "plain", CrossEntropyMonitor(**given))
    plain.validate(Model(adapt=with_all), ragged_loader(3), verbose=False)
    assert monitored(trainer).keys() == monitored(plain).keys()
    assert "val_by_group/bits_per_byte/odd" in monitored(trainer)


class Numbers(Sequence):
    """Bytes of tokens in a class of somebody's own."""

    def __getitem__(self, i: Any) -> Any:
        return NUM_BYTES[i]

    def __len__(self) -> int:
        return len(NUM_BYTES)


def test_a_table_may_be_any_sequence_of_integers() -> None:
    """But text names a file."""
    assert CrossEntropyMonitor(token_bytes=Numbers())._outputs.token_bytes.tolist() == NUM_BYTES
    for wrong in (b"abc", {1: 2}):
        with pytest.raises((TypeError, ValueError), match="`token_bytes`"):
            CrossEntropyMonitor(token_bytes=wrong)
