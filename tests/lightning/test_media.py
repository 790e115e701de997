"""Loggers that take pictures, those that do not, and those that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from tests.lightning.fits import NUM_TRAIN, Model, make_trainer, ragged_loader
from xent_metrics.lightning import CrossEntropyMonitor
from xent_metrics.lightning.dashboards import Dashboards
from xent_metrics.lightning.media import find_media
from xent_metrics.lightning.trainer import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
PICTURES = ["distribution", "by_position", "surprisal"]


@pytest.fixture(autouse=True, scope="module")
def _blank_pictures() -> None:
    """Draw, unlike other tests of fits: what was drawn is looked at."""


class Experiment:
    """What of Comet's is called, with the same arguments; it may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.kept: list[tuple[str | None, int | None]] = []
        self.error = error

    def log_image(self, image_data: Any, name: str | None = None, overwrite: bool = False, step: int | None = None):
        if self.error:
            raise self.error
        assert image_data.size[0] > 300
        self.kept.append((name, step))

    def log_html(self, html: str, clear: bool = False) -> None:
        self.kept.append((html.partition(">")[0], None))


class Like(CSVLogger):
    """A logger of somebody's own, which has an experiment of Comet's kind."""

    def __init__(self, folder: Any, error: Exception | None = None, **kwargs: Any) -> None:
        super().__init__(folder, **kwargs)
        self.like = Experiment(error)

    @property
    def experiment(self) -> Any:
        return self.like

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    save = finalize = log_hyperparams = log_metrics


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Given again by `pytest.warns`.
def test_a_logger_that_fails_is_told_once_and_others_go_on(tmp_path) -> None:
    """The run is not stopped, and whoever has no like methods gets nothing."""
    well, ill = Like(tmp_path / "a", prefix="p"), Like(tmp_path / "b", OSError("no network"))
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), logger=[ill, well, CSVLogger(tmp_path)])
    with pytest.warns(UserWarning, match="CometMedia") as said:
        trainer.fit(Model(), ragged_loader(NUM_TRAIN), ragged_loader(3))
    [message] = [str(x.message) for x in said if "`dashboards`" in str(x.message)]
    assert message == (
        "`dashboards` has 'pictures', but writing by CometMedia failed with OSError: no network; its logger gets no "
        "more of this run; leave out 'pictures' if you can do without."
    )
    of_first, of_last = PICTURES, [*PICTURES[:2], "interval", PICTURES[2]]
    page = ("<!DOCTYPE html", None)
    kept = [(f"p-val/{name}", 6) for name in of_first], [(f"p-val/{name}", 13) for name in of_last]
    assert well.like.kept == [*kept[0], page, *kept[1], page, ("<h2", None)]
    assert ill.like.kept == []


@pytest.mark.parametrize("parts", [(), ("layout", "descriptions", "hparams")])
def test_nothing_is_drawn_or_written_that_was_not_asked_for(tmp_path, parts) -> None:
    """The same option decides for all loggers; what only TensorBoard has goes nowhere else."""
    logger = Like(tmp_path)
    make_trainer(tmp_path, CrossEntropyMonitor(dashboards=parts), logger=logger, max_epochs=1).fit(
        Model(), ragged_loader(NUM_TRAIN), ragged_loader(3)
    )
    assert logger.like.kept == []


@pytest.mark.parametrize(("parts", "collects"), [(("references",), False), (("summary",), True), (("pictures",), True)])
def test_nothing_is_collected_for_a_logger_that_gets_none_of_it(tmp_path, parts, collects) -> None:
    """Reference lines are TensorBoard's alone."""
    dashboards = Dashboards(parts, ("cross_entropy",), (), "")
    dashboards.attach([Like(tmp_path)], writes=True, has_hparams=False)
    assert (dashboards.new_stats(torch.device("cpu"), Ranks()) is not None) == collects


class Unlike(Experiment):
    """Has methods of these names with other arguments."""

    def log_image(self, path: str) -> None:  # type: ignore[override]
        raise AssertionError

    log_text = log_image


def test_methods_with_other_arguments_are_not_called(tmp_path) -> None:
    """Nor those of a logger that has methods of all names, as Lightning's own for `fast_dev_run`."""
    unlike = Like(tmp_path)
    unlike.like = Unlike()
    assert [find_media(logger) for logger in (unlike, unlike.like, DummyLogger(), CSVLogger(tmp_path))] == [None] * 4
