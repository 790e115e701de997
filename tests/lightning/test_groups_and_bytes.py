"""Readings of groups, and bits per byte."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from tests.lightning.fits import (
    IGNORED,
    NUM_TRAIN,
    Expected,
    K,
    Model,
    Scored,
    assert_points,
    make_trainer,
    ragged_loader,
    readings,
)
from tests.lightning.monitored import NUM_BYTES, logged, monitored
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]
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


@pytest.mark.parametrize("form", ["losses", pytest.param("logits", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "grouping", [pytest.param(x, marks=pytest.mark.slow if i % 2 else ()) for i, x in enumerate(GROUPINGS)]
)
def test_every_group_reads_its_own_targets(tmp_path, form, grouping) -> None:
    """Names or indices, of batches, sequences or targets: in windows, validation and test; the empty one nowhere."""
    module = Model(form, adapt=with_group(GROUPINGS[grouping]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS), max_epochs=1, log_every_n_steps=NUM_TRAIN)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    trainer.test(module, ragged_loader(4, seed=4), verbose=False)
    val, test = (by_loader[0] for by_loader in module.evaluations)
    expected = Expected().windows(module.train_batches, (7, 6)).epochs(module.train_batches, (7, 6))
    expected.validations(module.evaluations[:1], 6).macro("val", 6, grouped_reference(val, grouping))
    expected.evaluation("test", 7, {0: test}, groups=grouped_reference(test, grouping))
    for stage, step, batches in (("train", 6, module.train_batches), ("val", 6, val), ("test", 7, test)):
        for name, group in zip(GROUPS, grouped_reference(batches, grouping), strict=False):
            expected.add(f"{stage}_by_group", step, readings(group), f"/{name}")
    assert_points(logged(trainer), expected.points)


def test_groups_of_several_loaders_are_read_together(tmp_path) -> None:
    """A group is of all loaders, and a loader of all groups."""
    module = Model(adapt=with_group(GROUPINGS["names of sequences"]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS))
    trainer.validate(module, [ragged_loader(3), ragged_loader(2, seed=2)], verbose=False)
    [by_loader] = module.evaluations
    groups = grouped_reference(by_loader[0] + by_loader[1], "sequences")
    expected = Expected().evaluation("val", 0, by_loader, groups=groups)
    for name, group in zip(GROUPS, groups, strict=False):
        expected.add("val_by_group", 0, readings(group), f"/{name}")
    assert_points(logged(trainer), expected.points)


def test_a_vector_of_groups_of_square_targets_is_one_for_each_sequence(tmp_path) -> None:
    """As many sequences as targets in each are not ambiguous: a vector is never one for each position."""
    loader = DataLoader([tuple(torch.randint(0, K, (2, 4, 4)))], batch_size=None)
    module = Model(adapt=with_group(GROUPINGS["tensor of sequences"]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS))
    trainer.validate(module, loader, verbose=False)
    for name, group in zip(GROUPS, grouped_reference(module.evaluations[0][0], "sequences"), strict=False):
        assert monitored(trainer)[f"val_by_group/cross_entropy/{name}"] == pytest.approx(
            readings(group)["cross_entropy"], rel=1e-6
        )


def test_groups_of_shifted_labels_are_shifted_with_them(tmp_path) -> None:
    """A group for each label, also for the first one, which is not scored."""
    module = Model("shifted labels", adapt=with_group(GROUPINGS["tensor of targets"]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS, shift=True))
    trainer.validate(module, ragged_loader(3), verbose=False)
    for name, group in zip(GROUPS, grouped_reference(module.evaluations[0][0], "targets"), strict=False):
        assert monitored(trainer)[f"val_by_group/cross_entropy/{name}"] == pytest.approx(
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
        assert monitored(trainer)[f"val_by_group/cross_entropy/{name}"] == pytest.approx(
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
        ([".."], "got '..'; rename it"),
        (["dataloader_idx_0"], "got 'dataloader_idx_0'; rename it"),
        ([0, 1], "got 0; rename it"),
    ],
)
def test_names_of_groups_are_parts_of_tags(groups, message) -> None:
    """They are looked at when the monitor is made."""
    with pytest.raises(ValueError, match=f"`groups` {message}|{message}"):
        CrossEntropyMonitor(groups=groups)


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


def forms_and_tables() -> Iterator[Any]:
    """Yield forms and ways to give a table: each form once, and each way once; the others are slow."""
    for (i, form), (j, given) in itertools.product(
        enumerate(("losses", "logits", "shifted labels")), enumerate(("list", "tensor", "file"))
    ):
        yield pytest.param(form, given, marks=() if i == j else pytest.mark.slow)


@pytest.mark.parametrize(("form", "given"), [*forms_and_tables()])
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
        values = {"bits_per_byte": bits_per_byte(by_loader[i])}
        expected.add("val_by_loader", 6, values, f"/dataloader_idx_{i}")
    expected.add("val", 6, {"macro_bits_per_byte": sum(bits_per_byte(by_loader[i]) for i in range(2)) / 2})
    assert_points(logged(trainer), expected.points)


def bytes_of_text(target: Tensor) -> Tensor:
    """Return how many bytes each sequence has: some that no table of tokens would give."""
    return 3 * (target != IGNORED).sum(1) + 2


@pytest.mark.parametrize("form", ["losses", "logits"])
@pytest.mark.parametrize("by_sequence", [True, False])
@pytest.mark.filterwarnings("ignore:.* returned losses, from which:UserWarning")
def test_the_bytes_of_a_batch_may_come_with_it(tmp_path, form, by_sequence) -> None:
    """All bits over all bytes that steps returned, in windows, epochs and validations, beside an accuracy too."""

    def adapt(stage: str, outputs: Any, batch: Any, batch_idx: int) -> Any:
        num_bytes = bytes_of_text(batch[1])
        return outputs | {"num_bytes": num_bytes if by_sequence else int(num_bytes.sum())}

    module = Model(form, adapt=adapt)
    monitor = CrossEntropyMonitor(num_bytes=True, readings=("cross_entropy", "accuracy"))
    trainer = make_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(module, ragged_loader(NUM_TRAIN), ragged_loader(3, seed=2))
    points, batches = logged(trainer), module.train_batches

    def expected(scored: Any) -> float:
        nats = sum(losses.masked_fill(target == IGNORED, 0.0).sum() for losses, target in scored)
        return (nats / math.log(2) / sum(bytes_of_text(target).sum() for _, target in scored)).item()

    windows = [expected(batches[start : start + 2]) for start in (0, 2, 4)]
    assert [value for _, value in points["train/bits_per_byte"]] == pytest.approx(windows, rel=1e-6)
    assert points["train/bits_per_byte_epoch"][0][1] == pytest.approx(expected(batches), rel=1e-6)
    [by_loader] = module.evaluations
    assert points["val/bits_per_byte"][0][1] == pytest.approx(expected(by_loader[0]), rel=1e-6)
    assert ("val/accuracy" in points) == (form == "logits")


@pytest.mark.parametrize(
    ("num_bytes", "error", "message"),
    [
        (None, ValueError, 'for `num_bytes` also "num_bytes": the bytes of its text, got'),
        (-1, ValueError, "`num_bytes` must not be negative"),
        (1.5, TypeError, "`num_bytes` must be an integer"),
    ],
)
def test_bytes_that_are_none_are_refused(tmp_path, num_bytes, error, message) -> None:
    """Before anything is tallied; and they do not go with groups, a table, or losses that are left out."""
    more = {} if num_bytes is None else {"num_bytes": num_bytes}
    module = Model(adapt=lambda stage, outputs, *_: outputs | more)
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, CrossEntropyMonitor(num_bytes=True)).validate(module, ragged_loader(1), verbose=False)
    for options in ({"groups": GROUPS}, {"token_bytes": NUM_BYTES}, {"nan_policy": "omit"}):
        with pytest.raises(ValueError, match="must"):
            CrossEntropyMonitor(num_bytes=True, **options)


def test_groups_have_their_own_bits_per_byte(tmp_path) -> None:
    """Per token and per byte, each of its own targets."""
    module = Model(adapt=with_group(GROUPINGS["tensor of targets"]))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(groups=GROUPS, token_bytes=NUM_BYTES))
    trainer.validate(module, ragged_loader(3), verbose=False)
    [batches] = module.evaluations[0].values()
    groups = grouped_reference(batches, "targets")
    expected = Expected().evaluation("val", 0, {0: batches}, groups=groups)
    expected.add("val", 0, {"bits_per_byte": bits_per_byte(batches)})
    expected.add("val", 0, {"macro_bits_per_byte": sum(map(bits_per_byte, groups)) / len(groups)})
    for name, group in zip(GROUPS, groups, strict=False):
        values = readings(group) | {"bits_per_byte": bits_per_byte(group)}
        expected.add("val_by_group", 0, values, f"/{name}")
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
