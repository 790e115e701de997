"""No rank waits for another for ever, and dashboards are of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.lightning.worlds import (
    K,
    Table,
    both,
    loader,
    logged,
    make_trainer,
    messages,
    own,
    pooled,
    rows,
    run_ranks,
)
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = pytest.mark.distributed


class Reader(Callback):
    """Reads `callback_metrics` on the first rank only, where others read them too."""

    def __init__(self) -> None:
        self.read: list[dict[str, str]] = []

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.read.append(own(trainer.callback_metrics))

    on_train_batch_end = on_validation_batch_end = on_validation_epoch_end = lambda self, trainer, module, *args: (
        self.on_train_epoch_end(trainer, module)
    )


class Selfish(Callback):
    """Logs under names that other ranks do not have."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        module.log(f"train/of_rank_{trainer.global_rank}", 1.0, on_step=True, on_epoch=True)

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        module.log(f"val/of_rank_{trainer.global_rank}", 1.0)


class Uneven:
    """A loader without a length: three batches for the first rank, as many as you like for the others."""

    def __init__(self, for_others: int) -> None:
        self.rank = torch.distributed.get_rank()
        self.num = for_others if self.rank else 3

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for i in range(self.num):
            yield torch.utils.data.default_collate(rows(2, first=100 * self.rank + 2 * i))


def fit_with_company(folder: Path) -> dict[str, Any]:
    """Fit beside callbacks that do different things on different ranks."""
    module, readers = Table(), (Reader(), Reader())
    trainer = make_trainer(readers[0], CrossEntropyMonitor(), readers[1], Selfish(), folder=folder)
    trainer.fit(module, loader(16), loader(5))
    return {"metrics": own(trainer.callback_metrics), "read": [reader.read for reader in readers]}


def fit_with_uneven_validation(for_others: int) -> dict[str, Any]:
    """Fit with a validation of which ranks have unequal shares."""
    module, trainer = Table(), make_trainer(CrossEntropyMonitor(), num_sanity_val_steps=0)
    trainer.fit(module, loader(16), Uneven(for_others))
    return {"metrics": own(trainer.callback_metrics), "seen": module.seen}


def test_what_others_do_on_one_rank_does_not_hang(tmp_path) -> None:
    """Reading our values communicates nothing, and their names are the same on all ranks."""
    ranks = run_ranks(2, fit_with_company, tmp_path / "log", tmp_path=tmp_path, timeout=60)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert "val/cross_entropy" in ranks[0]["read"][1][-1]
    assert ranks[1]["read"] == [[], []]


@pytest.mark.parametrize("for_others", [0, 1])
def test_a_rank_with_fewer_batches_is_waited_for_once(tmp_path, for_others) -> None:
    """A validation of which one rank has less, or nothing, is that of all batches."""
    ranks = run_ranks(2, fit_with_uneven_validation, for_others, tmp_path=tmp_path, timeout=60)
    assert [len(rank["seen"]["val"]) for rank in ranks] == [3, for_others]
    for rank in ranks:
        assert rank["metrics"] == ranks[0]["metrics"]
        value = float.fromhex(rank["metrics"]["val/cross_entropy"])
        assert value == pytest.approx(pooled(both(ranks, "val", 0, 3)), rel=2e-6)


class Mistaken(Table):
    """Returns a target that is no class, in one stage, on the second rank, in one batch."""

    def __init__(self, stage: str) -> None:
        super().__init__("logits")
        self.stage = stage

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        form = super().step(stage, batch)
        if stage == self.stage and torch.distributed.get_rank() == 1 and len(self.seen[stage]) == 1:
            form["target"] = form["target"].clone().fill_(K + 3)
        return form


def fit_mistakes() -> list[tuple[str, int]]:
    """Fit with bad targets in training, and then in validation."""
    errors = []
    for stage in ("train", "val"):
        module = Mistaken(stage)
        with pytest.raises(ValueError, match="`target`") as caught:
            make_trainer(CrossEntropyMonitor(), log_every_n_steps=3).fit(module, loader(16), loader(8))
        errors.append((str(caught.value), len(module.seen[stage])))
    return errors


def test_every_rank_raises_what_one_rank_did_wrong(tmp_path) -> None:
    """A bad target on one rank raises on all of them, at the next reading, and nobody waits."""
    first, second = run_ranks(2, fit_mistakes, tmp_path=tmp_path, timeout=60)
    assert first == second
    (in_training, after_batches), (in_validation, all_batches) = first
    assert (after_batches, all_batches) == (3, 2)
    assert "8 " in in_training
    assert "8 " in in_validation


class Misgrouped(Table):
    """Returns a group that there is not, or a bad count, in training, on the second rank, in its first batch."""

    def __init__(self, name: str) -> None:
        super().__init__("mean" if name == "count" else "losses")
        self.name = name

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, Any]:
        form = super().step(stage, batch) | {"group": ["web", "code"]}
        if torch.distributed.get_rank() == 1 and len(self.seen["train"]) == 1:
            bad = {"name": ["web", "zip"], "missing": ["web", None], "index": [0, 2], "names": "zip"}
            form |= {"num_tokens": -8} if self.name == "count" else {"group": bad[self.name]}
        return form


BAD_GROUP = "ValueError: `group` must hold names of `groups`, which are ['web', 'code'], or their indices, but "
SAID = {
    "name": f"{BAD_GROUP}4 scored targets",  # Rank 1 has the samples 1 and 3, of 3 and 4 targets that are scored.
    "missing": f"{BAD_GROUP}4 scored targets",
    "index": f"{BAD_GROUP}4 scored targets",
    "names": f"{BAD_GROUP}7 scored targets",
    "count": "ValueError: `weight` must hold finite numbers that are not negative",
}


def fit_misgrouped() -> dict[str, tuple[str, int, list[str]]]:
    """Fit with one mistake after the other; return what is raised, after how many batches, and the warnings."""
    seen = {}
    for name in SAID:
        module, monitor = Misgrouped(name), CrossEntropyMonitor(groups=None if name == "count" else ["web", "code"])
        with messages() as said, pytest.raises(ValueError, match="must hold") as caught:
            make_trainer(monitor, log_every_n_steps=3).fit(module, loader(16))
        warned = [text for text in said if text.startswith("`group` must hold names")]
        seen[name] = (f"{caught.typename}: {caught.value}", len(module.seen["train"]), warned)
    return seen


def test_every_rank_raises_what_one_rank_returned(tmp_path) -> None:
    """A group or a count that one rank cannot know raises on all at the next reading; that rank warns of a name."""
    first, second = run_ranks(2, fit_misgrouped, tmp_path=tmp_path, timeout=60)
    for name, start in SAID.items():
        assert first[name][0] == second[name][0], name
        assert first[name][0].startswith(start), name
        assert [rank[name][1] for rank in (first, second)] == [3, 3], name
        assert first[name][2] == [], name
        warned = {"name": "got 'zip'; add it", "missing": "got None; add it", "names": "got 'zip'; add it"}.get(name)
        assert len(second[name][2]) == bool(warned), name
        assert not warned or warned in second[name][2][0], name


class Lopsided(Table):
    """Groups its targets."""

    def step(self, stage: str, batch: list[torch.Tensor]) -> dict[str, Any]:
        return super().step(stage, batch) | {"group": 0}


def fit_lopsided() -> list[str]:
    """Fit with groups in another order on the second rank, and with another number of them."""
    is_second, said = torch.distributed.get_rank() == 1, []
    for names in (["code", "web"], ["web", "code", "news"]):
        monitor = CrossEntropyMonitor(groups=names if is_second else ["web", "code"])
        with pytest.raises(ValueError, match="on every rank") as caught:
            make_trainer(monitor).fit(Lopsided(), loader(16))
        said.append(str(caught.value))
    return said


def test_ranks_that_tally_different_things_do_not_add_them_up(tmp_path) -> None:
    """Groups are added up by their order, so ranks must have the same; all raise, with their own."""
    first, second = run_ranks(2, fit_lopsided, tmp_path=tmp_path, timeout=60)
    assert ["groups=['web', 'code']" in text for text in first] == [True, True]
    assert ["groups=['code', 'web']" in second[0], "groups=['web', 'code', 'news']" in second[1]] == [True, True]


def fit_with_dashboards(folder: Path, idle: bool) -> dict[str, Any]:
    """Fit with a TensorBoard logger; ranks repeat a sample, or one of them has no validation at all."""
    monitor = CrossEntropyMonitor(decode=lambda ids: "".join(f"{i} " for i in ids))
    trainer = make_trainer(monitor, folder=folder)
    trainer.fit(Table("logits"), loader(16), Uneven(0) if idle else loader(5))
    return {
        "references": monitor._dashboards._references,
        "profile": monitor._evaluation.stats.histogram.state.tolist(),
    }


@pytest.mark.parametrize("idle", [False, True], ids=["a repeated sample", "an idle rank"])
def test_dashboards_are_of_all_ranks_and_written_once(tmp_path, idle) -> None:
    """Reference lines and pictures have the samples of all ranks, each once; the first rank writes them."""
    ranks = run_ranks(2, fit_with_dashboards, tmp_path / "log", idle, tmp_path=tmp_path, timeout=60)
    assert ranks[0] == ranks[1]
    seen = rows(6) if idle else rows(5)
    targets = [int(target) for _, _, y in seen for target in y if target != -100]
    shares = [targets.count(k) / len(targets) for k in set(targets)]
    entropy = -math.fsum(share * math.log2(share) for share in shares)
    expected = {"uniform_bits_per_token": math.log2(K), "unigram_bits_per_token": entropy}
    assert ranks[0]["references"] == pytest.approx(expected, rel=1e-12)
    assert ranks[0]["profile"][-1] == (0 if idle else 1)
    points = logged(tmp_path / "log")
    assert float.fromhex(points["val/unigram_bits_per_token"][0][1]) == pytest.approx(entropy, rel=1e-6)
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert {"val/distribution", "val/by_position", "val/surprisal"} <= set(events.Tags()["images"])
    page = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"left out of the last validation: {0 if idle else 1}." in page
    assert f"<td>the last validation</td><td>{len(targets)}</td>" in page


def fit_with_a_logger_on_one_rank(folder: Path) -> dict[str, str]:
    """Give a logger to the first rank only, as some do."""
    trainer = make_trainer(CrossEntropyMonitor(), folder=folder if torch.distributed.get_rank() == 0 else None)
    trainer.fit(Table("logits"), loader(16), loader(5))
    return own(trainer.callback_metrics)


def test_a_logger_on_one_rank_does_not_hang(tmp_path) -> None:
    """What is gathered for TensorBoard must not depend on who writes it."""
    first, second = run_ranks(2, fit_with_a_logger_on_one_rank, tmp_path / "log", tmp_path=tmp_path, timeout=60)
    assert first == second
    assert "val/unigram_bits_per_token" in logged(tmp_path / "log")
