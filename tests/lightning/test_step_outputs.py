"""Losses that are kept for a while before they are tallied: nothing of them may get lost, and few may be kept."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.instruments import Operators
from xent_metrics import LinearLogits, Tally, functional
from xent_metrics.lightning.step_outputs import OutputReader, StepOutputs
from xent_metrics.lightning.windows import Pool
from xent_metrics.losses.score import ScoredBatch
from xent_metrics.losses.target_losses import TargetLosses

K, BYTES = 7, [1, 2, 0, 3, 1, 1, 4]


def make_reader(**options: object) -> OutputReader:
    """Make a reader with the defaults of the callback."""
    defaults = {
        "extract": None,
        "class_dim": -1,
        "ignore_index": -100,
        "shift": False,
        "groups": None,
        "token_bytes": None,
        "num_classes": None,
        "backend": "auto",
    }
    return OutputReader(**{**defaults, **options})  # type: ignore[arg-type]


def keep(reader: OutputReader, pool: Pool, batch: dict[str, Tensor | LinearLogits]) -> None:
    """Do what the callback does with what a step returned."""
    form = reader.read("training_step", batch, None)
    assert isinstance(form, StepOutputs)
    pool.keep(reader.score(form))


def make_batches() -> list[dict[str, Tensor | LinearLogits]]:
    """Make batches of several lengths, dtypes and forms, of which some have ignored targets and some bad losses."""
    batches = []
    for i, (sequences, length) in enumerate([(2, 3), (4, 3), (1, 3), (3, 5), (2, 5), (2, 3), (5, 1), (2, 3)]):
        target = torch.randint(0, K, (sequences, length))
        if i % 2:
            target[0, 0] = -100
        losses = torch.rand(sequences, length) * 5
        if i == 4:
            losses[-1, -1] = torch.inf
        batches.append({"losses": losses.double() if i == 5 else losses, "target": target})
        batches.append({"logits": torch.randn(sequences, length, K), "target": target})
    hidden = torch.randn(2, 3, 4)
    return [*batches, {"logits": LinearLogits(hidden, torch.randn(K, 4)), "target": torch.randint(0, K, (2, 3))}]


def test_a_pool_holds_what_each_batch_has() -> None:
    """The tally of what was kept is the sum of the tallies of the batches, bit for bit."""
    reader = make_reader()
    pool, expected = Pool(reader.zero()), Tally.zero()
    for batch in make_batches():
        keep(reader, pool, batch)
        kind = "losses" if "losses" in batch else "logits"
        expected = expected + functional.tally(batch[kind], batch["target"], input=kind)  # type: ignore[arg-type]
        if len(batch["target"]) == 3:
            pool.tallies()  # To ask for them in between changes nothing.
    [total] = pool.tallies()
    assert torch.equal(total.state, expected.state)
    assert torch.equal(pool.tallies()[0].state, expected.state)


def test_a_pool_with_bytes() -> None:
    """Both units are pooled; a token without bytes is in neither."""
    reader = make_reader(token_bytes=BYTES)
    pool, one_by_one = Pool(reader.zero()), reader.zero()[0]
    batches = [batch for batch in make_batches() if "losses" in batch]
    for batch in batches:
        keep(reader, pool, batch)
        alone = Pool(reader.zero())
        keep(reader, alone, batch)
        one_by_one = one_by_one + alone.tallies()[0]  # type: ignore[operator]
    per_token, per_byte = pool.tallies()[0].unbind()
    assert torch.equal(torch.stack([per_token.state, per_byte.state]), one_by_one.state)
    targets = torch.cat([batch["target"].flatten() for batch in batches])  # type: ignore[union-attr]
    finite = torch.cat([batch["losses"].flatten().isfinite() for batch in batches])  # type: ignore[union-attr]
    num_bytes = torch.tensor(BYTES)[targets.clamp(min=0)].where((targets >= 0) & finite, 0).sum()
    assert per_byte.totals().weight == int(num_bytes) * 2**64


def test_memory_of_a_step_may_be_used_again() -> None:
    """A compiled or graphed step may write the losses of every batch to the same memory."""
    reader, losses, target = make_reader(), torch.empty(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    pool = Pool(reader.zero())
    for value in (1.0, 2.0, 4.0):
        losses.fill_(value)
        keep(reader, pool, {"losses": losses, "target": target})
        target.fill_(0)
    losses.fill_(torch.nan)
    assert pool.tallies()[0].unbind()[0].totals().loss == 6 * 7 * 2**64


def test_many_batches_are_tallied_together(operators: Operators) -> None:
    """To add a batch is a few operators, on an accelerator too, and a tally of ten is one tally."""
    reader, batch = make_reader(), {"losses": torch.rand(4, 8), "target": torch.zeros(4, 8, dtype=torch.int64)}
    meta = {name: x.to("meta") for name, x in batch.items()}
    reader.to(torch.device("meta"))

    def count(num_batches: int) -> tuple[int, int]:
        pool = Pool(reader.zero())
        operators.counts.clear()
        with operators:
            for _ in range(num_batches):
                keep(reader, pool, meta)
            added = operators.counts.total()
            pool.tallies()
        return added, operators.counts.total() - added

    (one, tally_of_one), (ten, tally_of_ten) = count(1), count(10)
    assert ten == 10 * one <= 10 * 12
    assert tally_of_ten == tally_of_one


@pytest.mark.parametrize(("num_batches", "size"), [(3000, 64), (5, 2**15), (1000, 1), (1000, 0)])
def test_few_losses_are_kept(num_batches: int, size: int) -> None:
    """However long it takes until the tallies are asked for, some hundred KiB are kept, in not too many pieces."""
    reader = make_reader()
    pool, batch = (
        Pool(reader.zero()),
        {"losses": torch.rand(1, size), "target": torch.zeros(1, size, dtype=torch.int64)},
    )
    for _ in range(num_batches):
        keep(reader, pool, batch)
        assert sum(losses[0].loss.numel() for losses in pool._kept) < 2**16
        assert len(pool._kept) < 64
    assert pool.tallies()[0].unbind()[0].totals().scored == num_batches * size


def test_what_cannot_be_tallied_is_not_tried_again() -> None:
    """An error is told once, and does not meet whoever asks for what there is besides."""
    reader = make_reader()
    pool = Pool(reader.zero())
    batch = {"losses": torch.rand(1, 4), "target": torch.zeros(1, 4, dtype=torch.int64)}
    keep(reader, pool, batch)
    pool.tallies()
    pool.keep(ScoredBatch(TargetLosses(batch["losses"].to("meta"))))
    with pytest.raises(ValueError, match="must add tallies on one device"):
        pool.tallies()
    assert pool.tallies()[0].unbind()[0].totals().scored == 4


ON_A_DEVICE: dict[str, Any] = {
    "losses": lambda: {"losses": torch.rand(2, 3), "target": torch.zeros(2, 3, dtype=torch.int64)},
    "logits": lambda: {"logits": torch.randn(2, 3, K), "labels": torch.zeros(2, 3, dtype=torch.int64)},
    "loss": lambda: {"loss": torch.rand(()), "num_tokens": 3},
}


@pytest.mark.parametrize(("own", "other"), [("cpu", "meta"), ("meta", "cpu")])
@pytest.mark.parametrize("kind", ON_A_DEVICE)
def test_outputs_on_another_device_are_refused(kind: str, own: str, other: str) -> None:
    """The error names the step, what it returned, and both devices; what is where the Trainer is, is taken."""

    def outputs_on(device: str) -> dict[str, Any]:
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in ON_A_DEVICE[kind]().items()}

    for extract, source in ((None, "test_step"), (lambda outputs, _: outputs, "`extract`, called after test_step,")):
        reader = make_reader(extract=extract)
        reader.to(torch.device(own))
        reader.read("test_step", outputs_on(own), None)
        message = f'{source} must return "{kind}" on the device of the Trainer, {own}, got {other}; return what'
        with pytest.raises(ValueError, match=message):
            reader.read("test_step", outputs_on(other), None)


@pytest.mark.parametrize("kind", ["losses", "logits"])
@pytest.mark.parametrize("groups", [None, ["a"]])
def test_what_is_no_tensor_is_refused(kind: str, groups: Any) -> None:
    """The error names the step and the part, whatever else the form has."""
    for name, value, fix in (
        (kind, None, "convert it with torch.as_tensor"),
        (kind, (torch.rand(2, 3),), "pass one of its tensors, or torch.cat of them"),
        ("target", [[0, 0, 0]] * 2, "convert it with torch.as_tensor"),
    ):
        form = ON_A_DEVICE[kind]()
        form = {kind: form[kind], "target": form.get("target", form.get("labels")), "group": "a", name: value}
        message = f'val_step must return a tensor as "{name}", got {type(value).__name__}; {fix}.'
        with pytest.raises(TypeError, match=message):
            make_reader(groups=groups).read("val_step", form, None)


def test_targets_and_bytes_on_another_device_are_refused() -> None:
    """Targets are too; a table, groups and numbers of targets are moved."""
    batch = {name: x.to("meta") if name != "logits" else x for name, x in ON_A_DEVICE["logits"]().items()}
    with pytest.raises(ValueError, match='test_step must return "target" on the device of the Trainer, cpu, got meta'):
        make_reader().read("test_step", batch, None)
    reader = make_reader(token_bytes=BYTES, groups=["a", "b"])
    reader.to(torch.device("meta"))
    outputs = {name: x.to("meta") for name, x in ON_A_DEVICE["logits"]().items()}
    form = reader.read("test_step", {**outputs, "group": torch.tensor([0, 1])}, None)
    assert isinstance(form, StepOutputs)
    assert all(tally.state.is_meta for tally in reader.tally(form, reader.score(form)))


@pytest.mark.parametrize(("shape", "class_dim"), [((3,), -1), ((3,), 1), ((3, 4), -1), ((3, 4), 1)])
def test_scores_lie_as_the_losses_do(shape: tuple[int, ...], class_dim: int) -> None:
    """Those of a classifier too: ranks are looked for in them."""
    reader = make_reader(class_dim=class_dim)
    logits, target = torch.randn(*shape, 7), torch.randint(7, shape)
    form = reader.read("val_step", {"logits": logits.movedim(-1, class_dim), "target": target}, None)
    scored, scores = reader.score(form), reader.scores(form)
    expected = -scores.log_softmax(-1).gather(-1, target.view(scored.loss.shape).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scored.loss.float(), expected)


def warned(reader: OutputReader, step: str, logits: Any, **others: Any) -> list[str]:
    """Return the warnings of a batch."""
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        form = reader.read(step, {"logits": logits, "target": target, **others}, None)
        assert isinstance(form, StepOutputs)
        reader.score(form)
    assert all(w.category is UserWarning for w in caught)
    return [str(w.message) for w in caught]


LOOK = 'returned "logits" that look like probabilities (in [0, 1], with sums of 1) but are read as logits; return their'


def test_logits_that_look_like_probabilities_warn_once_for_each_step() -> None:
    """The first batch of each step is looked at, as a metric looks at its first one, and no later one."""
    scores = torch.randn(4, 5, K)
    probs, reader = scores.softmax(-1), make_reader()
    assert warned(reader, "validation_step", probs[:0]) == []
    [message] = warned(reader, "validation_step", probs)
    assert message == f"validation_step {LOOK} logarithms, or logits."
    assert warned(reader, "validation_step", probs) == warned(reader, "training_step", scores) == []
    assert warned(reader, "training_step", probs) == warned(reader, "test_step", probs.log()) == []
    assert len(warned(make_reader(extract=lambda outputs, _: outputs), "test_step", probs)) == 1
    assert len(warned(make_reader(shift=True), "test_step", probs)) == 1
    assert warned(make_reader(), "test_step", LinearLogits(torch.eye(K), torch.eye(K))) == []


def test_a_refused_batch_is_not_the_first_of_a_step() -> None:
    """What raised was not looked at, and losses neither."""
    reader, probs = make_reader(), torch.randn(4, 5, K).softmax(-1)
    with pytest.raises(ValueError, match="`target` must"):
        warned(reader, "test_step", probs, target=torch.full((4, 5), K))
    keep(reader, Pool(reader.zero()), {"losses": torch.rand(1, 4), "target": torch.zeros(1, 4, dtype=torch.int64)})
    assert len(warned(reader, "test_step", probs)) == len(warned(reader, "training_step", probs)) == 1


def test_the_look_asks_no_accelerator(operators: Operators, hidden_values: None) -> None:
    """There nothing is looked at, and a first batch is as many operators as a later one."""
    reader, probs, counts = make_reader(), torch.randn(4, 5, K).softmax(-1), []
    warned(make_reader(), "test_step", probs)  # Constants are copied once.
    for _ in range(3):
        operators.counts.clear()
        with operators:
            assert warned(reader, "test_step", probs) == []
        counts.append(operators.counts.total())
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            {"losses": torch.tensor(1.0)},
            (
                '"losses" must have target\'s shape, got () and (2, 3); compute them with '
                "reduction='none', or return it as \"logits\"."
            ),
        ),
        (
            {"logits": torch.zeros(2, 9, 3)},
            (
                '`target` must have the shape (2, 9) for "logits" of shape (2, 9, 3) with classes on dimension -1, '
                "got (2, 3); it would fit with class_dim=1."
            ),
        ),
    ],
)
def test_errors_are_in_the_words_of_a_step(outputs: dict[str, Any], message: str) -> None:
    """A step has no `preds` and no `input`."""
    reader = make_reader()
    form = reader.read("validation_step", {**outputs, "target": torch.zeros(2, 3, dtype=torch.int64)}, None)
    with pytest.raises(ValueError, match=f"^validation_step returned: {re.escape(message)}$"):
        reader.score(form)


def test_readings_of_logits_without_logits_are_missed_once() -> None:
    """In validation, where they would be monitored; training may return losses."""
    reader = make_reader(of_scores=["accuracy"])
    outputs = {"losses": torch.rand(2, 3), "target": torch.zeros(2, 3, dtype=torch.int64)}
    reader.score(reader.read("training_step", outputs, None))
    with pytest.warns(UserWarning, match=r"validation_step returned losses, from which \['accuracy'\] cannot be read"):
        reader.score(reader.read("validation_step", outputs, None))
    reader.score(reader.read("validation_step", outputs, None))
