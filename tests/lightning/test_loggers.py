"""What other loggers keep of a run: each value at its step, whatever the logger makes of a tag."""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.lightning.fits import (
    NUM_TRAIN,
    Model,
    Points,
    make_trainer,
    points_of_csv,
    points_of_events,
    pool,
    ragged_loader,
    second_head,
    with_all,
)
from tests.lightning.monitored import NAMES as READINGS
from tests.lightning.monitored import NUM_BYTES
from xent_metrics.lightning import CrossEntropyMonitor, dashboards
from xent_metrics.pictures import draw_validation
from xent_metrics.tags import parse_tag

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _blank_pictures() -> None:
    """Draw, unlike other tests of fits: what was drawn is looked at."""


class Kept(NamedTuple):
    """What a logger keeps by tag: values, pictures and pages, with their steps; MLflow's pages have none."""

    points: Points
    pictures: dict[str, list[tuple[int, bytes]]]
    pages: dict[str, list[tuple[int | None, str]]]


Reader = Callable[[], Kept]


def mlflow_at(uri: str, folder: Path, patch: pytest.MonkeyPatch) -> tuple[MLFlowLogger, Reader]:
    """Return a logger that keeps runs at an address and files in a folder, and what reads them back."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # It would rather have a database.
    logger = MLFlowLogger("tests", tracking_uri=uri, artifact_location=folder.as_uri())

    def read() -> Kept:
        client = mlflow.MlflowClient(uri)
        run = client.get_run(logger.run_id)
        points = {
            tag: [(x.step, x.value) for x in client.get_metric_history(logger.run_id, tag)] for tag in run.data.metrics
        }
        files = Path(unquote(urlparse(run.info.artifact_uri).path))
        pictures: dict[str, list[tuple[int, bytes]]] = {}
        for path in files.glob("images/*.png"):
            tag, step = re.fullmatch(r"(.+?)[+%]step[+%](\d+)[+%].*", path.name).groups()
            pictures.setdefault(re.sub("[~#]", "/", tag), []).append((int(step), path.read_bytes()))
        pages = {str(path.relative_to(files)): [(None, path.read_text())] for path in files.rglob("*.html")}
        return Kept(points, pictures, {name.removesuffix(".html"): page for name, page in pages.items()})

    return logger, read


def mlflow_files(folder: Path, patch: pytest.MonkeyPatch) -> tuple[MLFlowLogger, Reader]:
    """MLflow keeps a file for each tag."""
    return mlflow_at((folder / "mlruns").as_uri(), folder / "artifacts", patch)


def mlflow_database(folder: Path, patch: pytest.MonkeyPatch) -> tuple[MLFlowLogger, Reader]:
    """MLflow keeps a row for each value."""
    for package in ("sqlalchemy", "alembic"):
        pytest.importorskip(package, reason="MLflow's database needs SQLAlchemy and Alembic")
    return mlflow_at(f"sqlite:///{folder}/runs.db", folder / "artifacts", patch)


def wandb_offline(folder: Path, patch: pytest.MonkeyPatch) -> tuple[WandbLogger, Reader]:
    """Weights & Biases keeps a file of records until somebody uploads it, and others that it names."""
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415

    logger = WandbLogger(save_dir=folder, offline=True)

    def read() -> Kept:
        wandb.teardown()  # Then the file is complete.
        [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
        kept = Kept({}, {}, {})
        for record in map(Record.FromString, records_of_wandb(path.read_bytes())):
            row: dict[str, Any] = {}
            for item in record.history.item:
                tag, *inner = item.nested_key or [item.key]
                (row.setdefault(tag, {}) if inner else row)["/".join(inner) or tag] = json.loads(item.value_json)
            step = row.pop("trainer/global_step", None)
            for tag, value in row.items():
                if isinstance(value, dict) and value["_type"] == "html-file":
                    page = (path.parent / "files" / value["path"]).read_text()
                    kept.pages.setdefault(tag, []).append((step, page))
                elif isinstance(value, dict):
                    [name] = value["filenames"]
                    kept.pictures.setdefault(tag, []).append((step, (path.parent / "files" / name).read_bytes()))
                elif not tag.startswith("_"):
                    kept.points.setdefault(tag, []).append((step, float(value)))
        return kept

    return logger, read


def records_of_wandb(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file: a head of 7 bytes, and blocks of 32 KiB in which parts of records have heads."""
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # The whole of a record, or its last part.
            yield record
            record = b""


def csv(folder: Path, patch: pytest.MonkeyPatch) -> tuple[CSVLogger, Reader]:
    """Lightning keeps a table."""
    logger = CSVLogger(folder)
    return logger, lambda: Kept(points_of_csv(logger.log_dir), {}, {})


def tensorboard(folder: Path, patch: pytest.MonkeyPatch) -> tuple[TensorBoardLogger, Reader]:
    """TensorBoard keeps events."""
    logger = TensorBoardLogger(folder)

    def read() -> Kept:
        events = EventAccumulator(logger.log_dir).Reload()
        images = {
            tag: [(x.step, x.encoded_image_string) for x in events.Images(tag)] for tag in events.Tags()["images"]
        }
        texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.endswith("/text_summary")}
        pages = {
            tag.removesuffix("/text_summary"): [(x.step, x.tensor_proto.string_val[0].decode()) for x in text]
            for tag, text in texts.items()
        }
        [page] = Path(logger.log_dir).glob("val_surprisal_page.html")
        pages["val/surprisal_page"] = [(None, page.read_text())]
        return Kept(points_of_events(logger.log_dir), images, pages)

    return logger, read


class Seen(Callback):
    """Copies what callbacks can monitor, at the end of each validation and epoch."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            for tag, value in trainer.callback_metrics.items():
                if tag.removeprefix("b/").startswith("val"):
                    self.values.setdefault(tag, []).append(value.item())


def pixels(png: bytes) -> Any:
    """Return a picture without how it was compressed."""
    image = Image.open(BytesIO(png)).convert("RGB")
    return image.size, image.tobytes()


@pytest.mark.parametrize(
    "make",
    [csv, tensorboard, mlflow_files, pytest.param(mlflow_database, marks=pytest.mark.slow), wandb_offline],
)
def test_every_logger_keeps_everything_that_it_can(tmp_path, monkeypatch, make) -> None:
    """Every value of groups, loaders, bytes, a second monitor, as callbacks see it; the pictures and the pages of text.

    No tag is a folder of another.
    """
    drawn: list[tuple[dict[str, bytes], str]] = []
    monkeypatch.setattr(dashboards, "draw_validation", lambda *args: drawn.append(draw_validation(*args)) or drawn[-1])
    logger, read = make(tmp_path, monkeypatch)
    options = {"groups": ["even", "odd"], "token_bytes": NUM_BYTES}
    second = CrossEntropyMonitor(second_head_with_group, prefix="b/", dashboards=["summary"], **options)
    monitors, seen = (CrossEntropyMonitor(dashboards=["pictures", "summary"], **options), second), Seen()
    trainer = make_trainer(tmp_path, *monitors, seen, logger=logger)
    trainer.fit(Model(adapt=with_all), ragged_loader(NUM_TRAIN), [ragged_loader(3), ragged_loader(2, seed=2)])
    points, pictures, pages = read()
    ours = {tag for tag in points if parse_tag(tag.removeprefix("b/"))}
    assert set(points) - ours == {"epoch"}
    assert not [tag for tag in ours for other in ours if other.startswith(f"{tag}/")]
    assert {parse_tag(tag, "b/").section for tag in ours if tag.startswith("b/")} == {
        "train", "train_by_group", "val", "val_by_group", "val_by_loader",
    }  # fmt: skip
    for tag, values in seen.values.items():
        assert [step for step, _ in points[tag]] == [6, 13], tag
        shown = [value if abs(value) < 3e38 or make is not tensorboard else math.inf for value in values]
        assert [value for _, value in points[tag]] == pytest.approx(shown, rel=1e-6, nan_ok=True), tag
    for tag in ("train/cross_entropy", "b/train_by_group/bits_per_byte/even"):
        assert [step for step, _ in points[tag]] == list(range(1, 14, 2))

    if make is csv:
        assert drawn == []
        return
    assert [len(each) for each, _ in drawn] == [3, 4]  # One validation is no curve.
    expected = {f"val/{name}": [] for name in drawn[1][0]}
    for step, (each, _) in zip((6, 13), drawn, strict=True):
        for name, png in each.items():
            expected[f"val/{name}"].append((step, pixels(png)))
    assert {tag: [(step, pixels(png)) for step, png in sorted(each)] for tag, each in pictures.items()} == expected
    coloured = [page for _, page in pages.pop("val/surprisal_page")]  # Of MLflow the last one: it keeps a file.
    assert coloured == [page for _, page in drawn][-len(coloured) :]
    assert set(pages) == {"summary", "b/summary"}
    for tag, [(step, page)] in pages.items():
        assert step == (None if make in (mlflow_files, mlflow_database) else 13)
        assert f"<td><code>{tag.removesuffix('summary')}val/cross_entropy</code></td>" in page


def second_head_with_group(outputs: dict[str, Any], batch: Any) -> dict[str, Any]:
    """Find the second head, and the group."""
    return second_head(outputs, batch) | {"group": outputs["group"]}


class InTheMiddle(Callback):
    """Looks at the table of a run in the middle of its first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.seen = self.path.read_text().splitlines()


def test_a_window_is_on_disk_when_it_is_logged(tmp_path) -> None:
    """A killed run keeps what it had, though nothing but the monitor logs; a row has its epoch."""
    logger = CSVLogger(tmp_path)
    look = InTheMiddle(Path(logger.log_dir) / "metrics.csv")
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), look, logger=logger, max_epochs=1)
    module = Model()
    trainer.fit(module, ragged_loader(NUM_TRAIN))
    header, *rows = look.seen
    assert len(rows) == 2
    first = dict(zip(header.split(","), rows[0].split(","), strict=True))
    assert (first["step"], first["epoch"]) == ("1", "0")
    assert float(first["train/cross_entropy"]) > 0
    assert first["train/num_tokens"] == str(pool(module.train_batches[:2])[1])  # An integer.


@pytest.mark.parametrize("logger", [True, False])
def test_a_window_is_seen_wherever_a_logged_value_is(tmp_path, logger) -> None:
    """`logged_metrics` has what `self.log` would put there, also where there is no logger."""

    class Logs(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            self.log("mine", outputs["loss"])
            return outputs

    seen: list[set[str]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append({*trainer.logged_metrics} & {*trainer.callback_metrics})

    loggers = {"logger": CSVLogger(tmp_path)} if logger else {"logger": False}
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), Watch(), max_epochs=1, **loggers)
    trainer.fit(Logs(), ragged_loader(NUM_TRAIN))
    names = {f"train/{name}" for name in (*READINGS, "num_tokens")}
    assert seen == [{"mine"}] + [{"mine"} | names] * (NUM_TRAIN - 1)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Given again by `pytest.warns`.
def test_a_tag_that_a_module_logs_too_is_named_once(tmp_path) -> None:
    """Two series under one tag are told, with the way out; other tags of the module are its own affair."""

    class Logs(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            self.log("train/cross_entropy", outputs["loss"])
            self.log("train/perplexity", outputs["loss"].exp(), on_step=False, on_epoch=True)
            self.log("train/bits_per_token", outputs["loss"], on_step=True, on_epoch=True)
            self.log("train/accuracy", outputs["loss"])
            return outputs

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().validation_step(batch, batch_idx)
            self.log("val/cross_entropy", outputs["loss"])
            return outputs

    def told(monitor: CrossEntropyMonitor) -> list[str]:
        trainer = make_trainer(tmp_path, monitor, logger=CSVLogger(tmp_path))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(Logs(), ragged_loader(NUM_TRAIN), ragged_loader(3))
        return [str(warning.message) for warning in caught if "CrossEntropyMonitor" in str(warning.message)]

    of_validation, of_windows, of_epochs = told(CrossEntropyMonitor())
    assert re.search(r"logs \['val/cross_entropy'\], which the module .* pass `prefix=`", of_validation)
    for tag in ("train/cross_entropy", "train/perplexity", "train/bits_per_token"):
        assert f"'{tag}'" in of_windows
    assert "['train/bits_per_token_epoch']" in of_epochs
    assert told(CrossEntropyMonitor(prefix="pooled/")) == []


def test_the_table_that_lightning_prints_has_each_loaders_own_values(tmp_path, capsys, monkeypatch) -> None:
    """And `trainer.validate` returns them with that loader: Lightning takes the rest of a tag for one name."""
    monkeypatch.setattr("lightning.pytorch.loops.evaluation_loop._RICH_AVAILABLE", False)  # It cuts what is long.
    monkeypatch.setenv("COLUMNS", "200")  # A narrow terminal has a table for each loader.
    module, trainer = Model(), make_trainer(tmp_path, CrossEntropyMonitor(), logger=False)
    loaders = [ragged_loader(3), ragged_loader(2, seed=2), ragged_loader(4, seed=3)]
    returned = trainer.validate(module, loaders)
    printed = capsys.readouterr().out
    alone = [trainer.validate(module, loader, verbose=False)[0]["val/cross_entropy"] for loader in loaders]
    for i, values in enumerate(returned):
        own = {tag: value for tag, value in values.items() if "by_loader" in tag}
        assert set(own) == {f"val_by_loader/{name}/dataloader_idx_{i}" for name in READINGS}
        assert own[f"val_by_loader/cross_entropy/dataloader_idx_{i}"] == alone[i]
    rows = {cells[0]: cells[1:] for cells in map(str.split, printed.replace("│", " ").splitlines()) if cells}
    assert [float(value) for value in rows["val_by_loader/cross_entropy"]] == pytest.approx(alone)
    assert [float(value) for value in rows["val/cross_entropy"]] == [returned[0]["val/cross_entropy"]] * 3
