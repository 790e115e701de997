"""What TensorBoard shows of a run, asked over its HTTP API and read from the event files."""

import json
import math
import pickle
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)
from torch.utils.data import DataLoader

from tests.blank_pictures import leave_blank
from tests.browser import fetch, serve
from tests.tensorboard.texts import TEXTS, UNPRINTABLE
from xent_metrics.lightning import CrossEntropyMonitor
from xent_metrics.lightning.dashboards import Dashboards
from xent_metrics.pictures import validation
from xent_metrics.pictures.figures import draw_interval
from xent_metrics.summary import summarise
from xent_metrics.tags import Tag
from xent_metrics.tensorboard import (
    add_layout,
    build_layout,
    describe_tag,
    merge_layouts,
    read_layout,
)
from xent_metrics.validation_stats import ValidationPoint, ValidationStats

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
]

blank_pictures = pytest.mark.usefixtures("_blank_pictures")

K = 20
PICTURES = ("distribution", "by_position", "surprisal")
READINGS = ("cross_entropy", "bits_per_token", "perplexity")


@pytest.fixture(name="_blank_pictures")
def _leave_pictures_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, where something else is looked at."""
    leave_blank(monkeypatch)


class Table(LightningModule):
    """A table of logits whose batches say which group they are of."""

    def __init__(self, lr: float = 0.5, extra: str = "as it is") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(K, K)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> dict[str, Any]:
        x, y, group = batch
        logits = self.table(x)
        loss = torch.nn.functional.cross_entropy(logits.mT, y)
        self.log("train/cross_entropy_smoothed", loss)  # What a regular expression without an end would catch.
        return {"loss": loss, "logits": logits, "target": y, "group": group}

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        x, y, group = batch
        return {"logits": self.table(x), "target": y, "group": group}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def samples(num: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Sequences of 6 targets, some of which are padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(num):
        x, y = torch.randint(0, K // 2, (2, 6), generator=generator)
        y[6 - i % 3 :] = -100
        rows.append((x, y, i % 2))
    return rows


def fit(
    logger: Any,
    *callbacks: Any,
    loaders: int = 1,
    module: LightningModule | None = None,
    ckpt_path: Any = None,
    **kwargs: Any,
) -> Trainer:
    """Fit a table, with as many validation loaders."""
    settings = {"max_epochs": 3, "log_every_n_steps": 2, "num_sanity_val_steps": 1} | kwargs
    trainer = Trainer(
        accelerator="cpu", logger=logger, callbacks=list(callbacks), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    validation = [DataLoader(samples(7, 10 + i), 3) for i in range(loaders)]
    trainer.fit(module or Table(), DataLoader(samples(20), 4), validation, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A fit with everything: groups, two loaders, overlays, a layout of the user's own, and a test."""
    folder = tmp_path_factory.mktemp("dashboards")
    logger = TensorBoardLogger(folder, name="", version="run")
    logger.experiment.add_custom_scalars({"Mine": {"rates": ["Multiline", ["^lr$"]]}, "Likelihood": {}})
    parts = ("layout", "descriptions", "references", "hparams", "pictures", "summary", "overlay")
    monitor = CrossEntropyMonitor(
        groups=["web", "code"], dashboards=parts, decode=lambda ids: bytes(ids).decode("latin")
    )
    trainer = fit(logger, monitor, loaders=2, max_epochs=5)
    trainer.test(trainer.lightning_module, DataLoader(samples(5), 3), verbose=False)
    return folder, trainer


@pytest.fixture(scope="module", name="ask")
def _ask(run: tuple[Path, Trainer]) -> Any:
    """Serve the run, and return what asks for an address of TensorBoard's."""
    with serve(run[0]) as url:

        def ask(path: str, body: dict[str, Any] | None = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            with urlopen(Request(url + path, data, {"Content-Type": "application/json"})) as answer:
                return json.load(answer)

        yield ask


Ask = Callable[..., Any]


def charts(layout: dict[str, Any], title: str) -> dict[str, dict[str, Any]]:
    """Return the charts of a category by their titles."""
    [category] = [category for category in layout["category"] if category["title"] == title]
    return {chart["title"]: chart for chart in category["chart"]}


def test_the_runs_are_the_fit_and_its_overlays(run, ask: Ask) -> None:
    """Overlaid readings have tags of their own in runs of their own, hence a colour of their own."""
    tags = ask("data/plugin/scalars/tags")
    assert set(tags) == {"run", "run/train", "run/val", "run/test"}
    assert set(tags["run/train"]) == set(tags["run/val"]) == set(READINGS)
    assert len(list((run[0] / "run" / "train").iterdir())) == 1
    for stage in ("train", "val"):
        for name in READINGS:
            assert tags[f"run/{stage}"][name]["description"] == tags["run"][f"{stage}/{name}"]["description"] != ""
            overlaid = ask(f"data/plugin/scalars/scalars?run=run/{stage}&tag={name}")
            original = ask(f"data/plugin/scalars/scalars?run=run&tag={stage}/{name}")
            assert [point[1:] for point in overlaid] == [point[1:] for point in original]


def test_every_chart_of_ours_has_a_description_and_no_point_of_it(ask: Ask) -> None:
    """A tooltip says what is pooled and left out; it adds nothing at step 0."""
    tags = ask("data/plugin/scalars/tags")["run"]
    ours = {tag for tag in tags if re.match(r"(train|val|test)\w*/(?!cross_entropy_smoothed)", tag)}
    assert {f"val_by_group/{name}/code" for name in READINGS} <= ours
    for tag in tags:
        assert bool(tags[tag]["description"]) == (tag in ours), tag
    for tag in ours - {"val/uniform_bits_per_token", "val/unigram_bits_per_token", "val/best_bits_per_token"}:
        assert "Pooled" in tags[tag]["description"], tag
        assert "Left out" in tags[tag]["description"], tag
    assert "group <code>web</code>" in tags["train_by_group/perplexity/web"]["description"]
    assert "loader `books`" in describe_tag("val_by_loader/perplexity/books")
    assert "loader 1" in tags["val_by_loader/perplexity/dataloader_idx_1"]["description"]
    steps = [step for _, step, _ in ask("data/plugin/scalars/scalars?run=run&tag=train/cross_entropy")]
    assert steps == list(range(1, 25, 2))
    steps = [step for _, step, _ in ask("data/plugin/scalars/scalars?run=run&tag=val/cross_entropy")]
    assert steps == [4, 9, 14, 19, 24]


def test_the_layout_stands_beside_the_users_own(ask: Ask) -> None:
    """A category that somebody else laid out is there, and one of our title is ours."""
    layout = ask("data/plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == ["Mine", "Likelihood"]
    assert charts(layout, "Mine")["rates"]["multiline"]["tag"] == ["^lr$"]
    titles = list(charts(layout, "Likelihood"))
    assert titles[:2] == ["cross_entropy: training, validation", "cross_entropy: validation with its interval"]
    assert "perplexity: groups in validation" in titles
    assert "bits_per_token: validation loaders" in titles


def test_each_chart_of_lines_gets_the_tags_that_it_is_meant_for_and_no_other(ask: Ask) -> None:
    """The sibling that the module logs, bounds, groups and loaders are not among the lines of the whole."""
    received: dict[str, set[str]] = {}
    for title, chart in charts(ask("data/plugin/custom_scalars/layout"), "Likelihood").items():
        if "multiline" in chart:
            expressions = "|".join(f"({tag})" for tag in chart["multiline"]["tag"])
            for run in ("run", "run/train", "run/val"):
                answer = ask(f"data/plugin/custom_scalars/scalars?run={run}&tag={quote(expressions)}")
                assert answer["regex_valid"]
                tags = {run.removeprefix("run") + "/" + tag for tag in answer["tag_to_events"]}
                received[title] = received.get(title, set()) | tags
    expected = {}
    for name in READINGS:
        both = {f"/train/{name}", f"/val/{name}"}
        lines = {"/val/uniform_bits_per_token", "/val/unigram_bits_per_token"} if name == "bits_per_token" else set()
        expected[f"{name}: training, validation"] = both | lines
        expected[f"{name}: validation loaders"] = {f"/val_by_loader/{name}/dataloader_idx_{i}" for i in range(2)}
        expected[f"{name}: groups in validation"] = {f"/val_by_group/{name}/{group}" for group in ("web", "code")}
        expected[f"{name}: groups in training"] = {f"/train_by_group/{name}/{group}" for group in ("web", "code")}
    assert received == expected


def test_bounds_have_points_where_their_value_has_one(ask: Ask) -> None:
    """A chart with a band shows an error unless its three tags have the same steps."""
    for chart in charts(ask("data/plugin/custom_scalars/layout"), "Likelihood").values():
        for series in chart.get("margin", {}).get("series", []):
            points = {}
            for part in ("lower", "value", "upper"):
                answer = ask(f"data/plugin/custom_scalars/scalars?run=run&tag={re.escape(series[part])}%24")
                points[part] = answer["tag_to_events"][series[part]]
            steps = [[step for _, step, _ in each] for each in points.values()]
            assert steps == [[4, 9, 14, 19, 24]] * 3
            assert all(a[2] < b[2] < c[2] for a, b, c in zip(*points.values(), strict=True))


def test_the_table_of_hyperparameters_has_the_runs_own_values(ask: Ask) -> None:
    """The columns are those of the module and of the validation; there is no `hp_metric`."""
    experiment = ask("data/plugin/hparams/experiment", {})
    assert {info["name"] for info in experiment["hparamInfos"]} == {"lr", "extra"}
    tags = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert tags == ["val/best_bits_per_token", *(f"val/{name}" for name in READINGS)]
    query = {"startIndex": 0, "sliceSize": 10, "colParams": [{"metric": {"tag": tag}} for tag in tags],
             "allowedStatuses": ["STATUS_SUCCESS", "STATUS_RUNNING", "STATUS_UNKNOWN"]}  # fmt: skip
    [group] = ask("data/plugin/hparams/session_groups", query)["sessionGroups"]
    assert group["hparams"] == {"lr": 0.5, "extra": "as it is"}
    shown = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    points = {tag: ask(f"data/plugin/scalars/scalars?run=run&tag={tag}") for tag in tags}
    assert shown == {tag: points[tag][-1][2] for tag in tags}
    assert shown["val/best_bits_per_token"] == min(value for _, _, value in points["val/bits_per_token"])
    assert "hp_metric" not in ask("data/plugin/scalars/tags")["run"]


def test_pictures_are_few_and_say_what_they_are_of(run, ask: Ask) -> None:
    """The first, second and fourth validation, and the last one."""
    for name in (*PICTURES, "interval"):
        pictures = ask(f"data/plugin/images/images?run=run&tag=val/{name}&sample=0")
        first = [] if name == "interval" else [4]  # One validation is no curve.
        assert [picture["step"] for picture in pictures] == [*first, 9, 19, 24]
    events = EventAccumulator(str(run[0] / "run"), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"val/{name}" for name in (*PICTURES, "interval")}
    assert all(len(image.encoded_image_string) < 60_000 for image in events.Images("val/surprisal"))


@pytest.mark.usefixtures("_blank_pictures")
def test_a_run_that_is_resumed_in_its_folder_keeps_its_points(tmp_path) -> None:
    """TensorBoard's own data server drops what comes before a step that is earlier: that of a description is not."""
    for epochs, path in ((2, None), (3, tmp_path / "last.ckpt")):
        if path:
            time.sleep(1)  # Files of one second are read in the order of their numbers as text, where 10 is before 9.
        logger = TensorBoardLogger(tmp_path / "logs", name="", version="run")
        monitor = CrossEntropyMonitor(dashboards=("descriptions", "references", "overlay"))
        trainer = fit(logger, monitor, max_epochs=epochs, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        logger.finalize("success")
    with serve(tmp_path / "logs", load_fast=True) as url:
        for run, tag in (
            ("run", "val/cross_entropy"),
            ("run/val", "cross_entropy"),
            ("run", "val/uniform_bits_per_token"),
        ):
            points = fetch(f"{url}data/plugin/scalars/scalars?run={run}&tag={tag}")
            assert [step for _, step, _ in points] == [4, 9, 14], (run, tag)
        described = fetch(f"{url}data/plugin/scalars/tags")["run"]
        assert "nats" in described["val/cross_entropy"]["description"]


def test_the_page_of_the_last_validation_is_beside_the_event_files(run) -> None:
    """One file, with the losses and the ranks of its tokens."""
    [page] = run[0].rglob("*.html")
    assert page == run[0] / "run" / "val_surprisal_page.html"
    html = page.read_text()
    assert "step 24" in html.partition("</title>")[0]
    assert len(re.findall(r'data-about="token \d+: [^"]*&#10;[\d.]+ bits&#10;rank \d+"', html)) > 10


def test_the_page_at_the_end_says_what_was_reached(run, ask: Ask) -> None:
    """Readings with intervals, how much they are read of, and how the run was set up."""
    [page] = ask("data/plugin/text/text?run=run&tag=summary/text_summary")
    last = ask("data/plugin/scalars/scalars?run=run&tag=val/cross_entropy")[-1][2]
    assert f"<td>{last:.6g}</td>" in page["text"]
    scored = 5 * sum(int((y != -100).sum()) for _, y, _ in samples(20))
    ignored = 5 * sum(int((y == -100).sum()) for _, y, _ in samples(20))
    assert re.search(rf"<td>training</td>\s*<td>{scored}</td>\s*<td>{ignored}</td>\s*<td>0</td>", page["text"])
    for configured in ("lr", "CrossEntropyMonitor.groups", "precision"):
        assert f"<code>{configured}</code>" in page["text"]


def test_reference_lines_are_a_model_that_knows_nothing_and_one_that_knows_frequencies(ask: Ask) -> None:
    """`log2 K`, and the entropy of the targets that the validation scores."""
    targets = [int(y) for seed in (10, 11) for _, row, _ in samples(7, seed) for y in row if y != -100]
    shares = [targets.count(k) / len(targets) for k in set(targets)]
    expected = {"uniform": math.log2(K), "unigram": -math.fsum(share * math.log2(share) for share in shares)}
    for name, bits in expected.items():
        points = ask(f"data/plugin/scalars/scalars?run=run&tag=val/{name}_bits_per_token")
        # Every validation, and every eighth point of training: a chart leaves out what few of its points reach.
        assert [step for _, step, _ in points] == [4, 9, 14, 15, 19, 24]
        assert [value for _, _, value in points] == pytest.approx([bits] * 6, rel=1e-6)


# What is switched off, and what is not there.


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the points of a run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def kinds(folder: Path) -> dict[str, set[str]]:
    """Return what there is in a run: images, texts, a layout, descriptions, reference lines, a table."""
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    about = {tag: about.summary_description for tag, about in events.summary_metadata.items()}
    return {
        "pictures": set(tags["images"]),
        "summary": {tag for tag in tags["tensors"] if tag.endswith("text_summary")},
        "layout": {tag for tag in tags["tensors"] if tag.startswith("custom_scalars")},
        "descriptions": {tag for tag, description in about.items() if description},
        "references": {tag for tag in tags["scalars"] if "uni" in tag},
        "hparams": {tag for tag in events.summary_metadata if tag.startswith("_hparams_")},
        "overlay": {path.name for path in folder.iterdir() if path.is_dir()},
    }


def columns_of_hparams(folder: Path) -> list[str]:
    """Return the tags whose values are shown in a run's row of the table of hyperparameters."""
    about = EventAccumulator(str(folder)).Reload().summary_metadata["_hparams_/experiment"]
    return [info.name.tag for info in parse_experiment_plugin_data(about.plugin_data.content).metric_infos]


@pytest.mark.parametrize("part", [None, "layout", "descriptions", "references", "hparams", "pictures", "summary",
                                  "overlay"])  # fmt: skip
def test_each_part_can_be_had_by_itself(tmp_path, part) -> None:
    """And nothing with `dashboards=()`, but the values, which are the same."""
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    fit(logger, CrossEntropyMonitor(dashboards=() if part is None else (part,)), module=Plain(), max_epochs=1)
    found = kinds(tmp_path / "run")
    assert {name for name, tags in found.items() if tags} == ({part} if part else set())
    assert {f"train/{name}" for name in READINGS} <= set(scalars(tmp_path / "run"))


class Plain(Table):
    """Saves no hyperparameters and has no groups."""

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@blank_pictures
def test_by_default_there_is_everything_but_the_overlay(tmp_path) -> None:
    """One line in a Trainer is enough; Lightning's own `hp_metric` gives way, also if it was not switched off."""
    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), max_epochs=1)
    found = kinds(tmp_path / "run")
    assert {name for name, tags in found.items() if tags} == set(found) - {"overlay"}
    assert "hp_metric" not in scalars(tmp_path / "run")


@pytest.mark.parametrize("logger", [False, CSVLogger])
def test_other_loggers_are_left_alone(tmp_path, logger) -> None:
    """Nothing is drawn where nobody would see it."""
    monitor = CrossEntropyMonitor()
    fit(logger and logger(tmp_path), monitor, max_epochs=1)
    assert monitor._evaluation.stats is None
    assert not list(tmp_path.rglob("events*"))


@blank_pictures
@pytest.mark.slow
def test_two_tensorboard_loggers_get_the_same(tmp_path) -> None:
    """Each has all of it."""
    loggers = [TensorBoardLogger(tmp_path, name="", version=name) for name in ("one", "other")]
    fit([*loggers, CSVLogger(tmp_path)], CrossEntropyMonitor(), max_epochs=1)
    assert kinds(tmp_path / "one") == kinds(tmp_path / "other")


@blank_pictures
def test_a_prefix_of_the_logger_is_in_every_tag_and_in_the_layout(tmp_path) -> None:
    """Lightning joins it with a hyphen, and charts without it would be empty."""
    fit(TensorBoardLogger(tmp_path, name="", version="run", prefix="a"), CrossEntropyMonitor(), max_epochs=1)
    layout = read_layout(tmp_path / "run")
    expressions = [tag for chart in layout.category[0].chart for tag in chart.multiline.tag]
    points = scalars(tmp_path / "run")
    for expression in expressions:
        assert sum(bool(re.match(expression, tag)) for tag in points) == 1, expression
    margins = [series.value for chart in layout.category[0].chart for series in chart.margin.series]
    assert set(margins) <= set(points)
    assert "a-val/cross_entropy" in kinds(tmp_path / "run")["descriptions"]
    assert kinds(tmp_path / "run")["pictures"] == {f"a-val/{name}" for name in PICTURES}
    columns = columns_of_hparams(tmp_path / "run")
    assert columns == [f"a-val/{name}" for name in ("best_bits_per_token", *READINGS)]
    assert set(columns) <= set(points)


@blank_pictures
def test_two_monitors_have_a_category_each(tmp_path) -> None:
    """The second layout does not replace the first."""
    monitors = CrossEntropyMonitor(), CrossEntropyMonitor(prefix="other/", shift=True)
    fit(TensorBoardLogger(tmp_path, name="", version="run"), *monitors, max_epochs=1)
    layout = read_layout(tmp_path / "run")
    assert [category.title for category in layout.category] == ["Likelihood", "Likelihood other/"]
    assert "other/val/surprisal" in kinds(tmp_path / "run")["pictures"]
    assert "other/val/cross_entropy" in kinds(tmp_path / "run")["descriptions"]


@blank_pictures
def test_a_mean_alone_has_no_interval_and_no_chart_of_one(tmp_path) -> None:
    """A chart of tags that are never written would show an error."""
    monitor = CrossEntropyMonitor(extract=lambda outputs, batch: {"loss": torch.tensor(2.0), "num_tokens": 3})
    fit(TensorBoardLogger(tmp_path, name="", version="run"), monitor, max_epochs=1)
    layout = read_layout(tmp_path / "run")
    assert not any(chart.HasField("margin") for chart in layout.category[0].chart)
    assert not kinds(tmp_path / "run")["references"]
    assert not kinds(tmp_path / "run")["pictures"]  # Nothing is known of single targets.


def test_an_infinite_validation_keeps_value_and_bounds_at_the_same_steps(tmp_path) -> None:
    """The band is NaN there, and its chart shows no error."""

    class Diverging(Table):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> dict[str, Any]:
            outputs = super().validation_step(batch, batch_idx)
            if self.current_epoch == 1:
                outputs["logits"] = torch.full_like(outputs["logits"], -torch.inf)
            return outputs

    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), module=Diverging())
    points = scalars(tmp_path / "run")
    for name in ("cross_entropy", "perplexity"):
        steps = [[step for step, _ in points[f"val/{name}{end}"]] for end in ("_lower", "", "_upper")]
        assert steps == [[4, 9, 14]] * 3
    assert math.isnan(points["val/cross_entropy"][1][1])
    assert points["val/best_bits_per_token"][1] == (9, points["val/best_bits_per_token"][0][1])


def test_a_validation_alone_is_drawn_and_lays_out_its_charts(tmp_path) -> None:
    """`trainer.validate` is looked at too, every time."""
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[CrossEntropyMonitor()], enable_progress_bar=False)
    trainer.validate(Table(), DataLoader(samples(7), 3), verbose=False)
    found = kinds(tmp_path / "run")
    assert found["pictures"] == {f"val/{name}" for name in PICTURES}
    assert found["layout"]
    assert found["references"]


@blank_pictures
def test_a_validation_after_a_fit_has_lines_of_its_own_data(tmp_path) -> None:
    """It may be of another model, with other classes."""

    class Wider(Table):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> dict[str, Any]:
            outputs = super().validation_step(batch, batch_idx)
            return outputs | {"logits": torch.nn.functional.pad(outputs["logits"], (0, 12))}

    monitor = CrossEntropyMonitor()
    fit(TensorBoardLogger(tmp_path, name="", version="fit"), monitor, max_epochs=1)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[monitor], enable_progress_bar=False)
    trainer.validate(Wider(), DataLoader(samples(7), 3), verbose=False)
    assert scalars(tmp_path / "run")["val/uniform_bits_per_token"] == [(0, 5.0)]


@blank_pictures
def test_a_test_alone_lays_out_no_empty_charts(tmp_path) -> None:
    """There are no charts of tests, but descriptions."""
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[CrossEntropyMonitor()], enable_progress_bar=False)
    trainer.test(Table(), DataLoader(samples(7), 3), verbose=False)
    found = kinds(tmp_path / "run")
    assert not found["layout"]
    assert "test/cross_entropy" in found["descriptions"]


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Given again by `pytest.warns`.
def test_a_picture_that_cannot_be_drawn_does_not_stop_the_run(tmp_path) -> None:
    """It says why, once, and everything else is written."""

    def decode(ids: list[int]) -> str:
        raise KeyError(ids[0])

    with pytest.warns(
        UserWarning, match=r"drawing one failed with .* `decode` .* for \[\d+\] it raised KeyError"
    ) as said:
        fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(decode=decode))
    assert sum("drawing one failed" in str(warning.message) for warning in said) == 1
    found = kinds(tmp_path / "run")
    assert found["summary"]
    assert len(scalars(tmp_path / "run")["val/cross_entropy"]) == 3
    with pytest.raises(ValueError, match=r"`decode` must turn a list of tokens .* import path 'tok.decode', where"):
        CrossEntropyMonitor(decode="tok.decode")
    with pytest.raises(TypeError, match=r"`decode` must turn a list of tokens into text, .* got 3; pass a function"):
        CrossEntropyMonitor(decode=3)


def test_a_vocabulary_of_one_is_drawn(tmp_path) -> None:
    """It costs nothing, and is no reason to draw nothing."""

    class One(Plain):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> dict[str, Any]:
            return {"logits": torch.zeros(*batch[1].shape, 1), "target": batch[1].clamp(max=0)}

    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), module=One(), max_epochs=1)
    assert kinds(tmp_path / "run")["pictures"] == {f"val/{name}" for name in PICTURES}
    assert scalars(tmp_path / "run")["val/uniform_bits_per_token"] == [(4, 0.0)]


@blank_pictures
@pytest.mark.parametrize("overlay", [False, True])
def test_training_that_has_no_windows_is_drawn_by_its_epochs(tmp_path, overlay) -> None:
    """`log_every_n_steps` is longer than an epoch, at first or for ever."""
    parts = ["layout", "descriptions", *(["overlay"] if overlay else [])]

    def lines(every: int, epochs: int) -> tuple[list[str], set[str]]:
        folder = tmp_path / f"{every}-{epochs}"
        logger = TensorBoardLogger(tmp_path, name="", version=folder.name)
        fit(logger, CrossEntropyMonitor(dashboards=parts), log_every_n_steps=every, max_epochs=epochs)
        chart = read_layout(folder).category[0].chart[0]
        return list(chart.multiline.tag), {tag for tag in scalars(folder) if re.match(chart.multiline.tag[0], tag)}

    for every, epochs, line in ((50, 2, "train/cross_entropy_epoch"), (8, 2, "train/cross_entropy")):
        expressions, drawn = lines(every, epochs)
        assert drawn == (set() if overlay else {line})
        assert expressions[0] == ("^cross_entropy$" if overlay else f"^{line}$")
        if overlay:
            overlaid = scalars(tmp_path / f"{every}-{epochs}" / "train")["cross_entropy"]
            points = scalars(tmp_path / f"{every}-{epochs}")
            first, *others = points["train/cross_entropy_epoch"]
            assert overlaid == [first, *(others if every == 50 else points["train/cross_entropy"])]


def test_pictures_show_the_bits_that_are_logged(tmp_path, monkeypatch) -> None:
    """Title and band of the picture of all validations are in bits, as its axis says."""
    drawn: list[tuple[Any, str]] = []
    picture = draw_interval
    monkeypatch.setattr(
        validation, "draw_interval", lambda *args: drawn.append((args[0].copy(), args[1])) or picture(*args)
    )
    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), max_epochs=2)
    [(history, title)] = drawn
    points = scalars(tmp_path / "run")
    ends = ([value / math.log(2) for _, value in points[f"val/cross_entropy_{end}"]] for end in ("lower", "upper"))
    steps, bits = zip(*points["val/bits_per_token"], strict=True)
    for shown, expected in zip(zip(*history, strict=True), (steps, bits, *ends), strict=True):
        assert shown == pytest.approx(expected, rel=1e-6)
    assert f"{bits[-1]:.3f} bits a target" in title


def test_the_picture_of_all_validations_thins_them_out(tmp_path, monkeypatch) -> None:
    """Of a thousand and more it shows some hundred, from the first to the last."""
    histories = []

    def draw(stats: Any, history: list[ValidationPoint], *_: Any) -> tuple[dict[str, bytes], None]:
        histories.append([point.step for point in history])
        return {}, None

    monkeypatch.setattr("xent_metrics.lightning.dashboards.draw_validation", draw)
    dashboards = Dashboards(("pictures",), READINGS, (), "")
    dashboards.attach([TensorBoardLogger(tmp_path)], writes=True, has_hparams=False)
    stats = ValidationStats(torch.device("cpu"), counts_classes=False)
    for step in range(1500):
        dashboards.add_validation(stats, ValidationPoint(step, 1.0, 0.5, 1.5), None, None, draw_now=step == 1499)
    assert max(map(len, histories)) <= 512
    assert len(histories[-1]) > 256
    for steps in histories:
        assert steps[0] == 0
        assert steps == sorted(set(steps))
    assert histories[-1][-1] == 1499


class OwnColumn(Table):
    """Has a column of its own, as Lightning's documentation shows."""

    def on_validation_epoch_end(self) -> None:
        self.log("hp_metric", 7.0)


@blank_pictures
def test_a_column_of_the_module_stays_beside_ours(tmp_path) -> None:
    """`hp_metric` is there where a module logs it, and nowhere else."""
    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), module=OwnColumn(), max_epochs=1)
    ours = ["val/best_bits_per_token", *(f"val/{name}" for name in READINGS)]
    assert columns_of_hparams(tmp_path / "run") == [*ours, "hp_metric"]
    assert scalars(tmp_path / "run")["hp_metric"] == [(4, 7.0)]
    fit(TensorBoardLogger(tmp_path, name="", version="other"), CrossEntropyMonitor(), max_epochs=1)
    assert columns_of_hparams(tmp_path / "other") == ours


@blank_pictures
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Given again by `pytest.warns`.
def test_hyperparameters_that_a_project_logs_before_the_fit_have_our_columns(tmp_path, monkeypatch) -> None:
    """Unless TensorBoard has been given Lightning's own table first, which a warning says, with the switch."""
    # Lightning's file of them cannot hold such a name where OmegaConf is installed.
    monkeypatch.setattr("lightning.pytorch.loggers.tensorboard.save_hparams_to_yaml", lambda *_: None)
    given = {"seed": 3, "optimizer": {"name": "adam"}, "file": "caf\udce9"}  # As the name of a file may be.
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    logger.log_hyperparams({**given, "file": "cafe"})
    logger.hparams["file"] = given["file"]
    fit(logger, CrossEntropyMonitor(), max_epochs=1)
    assert columns_of_hparams(tmp_path / "run")[0] == "val/best_bits_per_token"
    about = EventAccumulator(str(tmp_path / "run")).Reload().summary_metadata["_hparams_/session_start_info"]
    shown = parse_session_start_info_plugin_data(about.plugin_data.content).hparams
    assert {*shown} == {"seed", "optimizer/name", "file", "lr", "extra"}
    assert shown["file"].string_value == "caf\\udce9"
    logger = TensorBoardLogger(tmp_path, name="", version="late")
    logger.log_hyperparams({"seed": 3})
    with pytest.warns(UserWarning, match="`log_hyperparams` was called before .* pass `default_hp_metric=False`"):
        fit(logger, CrossEntropyMonitor(), max_epochs=1)
    assert columns_of_hparams(tmp_path / "late") == ["hp_metric"]


@blank_pictures
def test_a_validation_before_the_fit_does_not_cost_the_columns(tmp_path) -> None:
    """Lightning writes its table before that too; a run without a validation, or that fails, has a row all the same."""
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[CrossEntropyMonitor()], enable_progress_bar=False)
    trainer.validate(Table(), DataLoader(samples(7), 3), verbose=False)
    fit(logger, CrossEntropyMonitor(), max_epochs=1)
    assert columns_of_hparams(tmp_path / "run")[0] == "val/best_bits_per_token"

    class Failing(Table):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(TensorBoardLogger(tmp_path, name="", version="failed"), CrossEntropyMonitor(), module=Failing())
    fit(TensorBoardLogger(tmp_path, name="", version="train"), CrossEntropyMonitor(), max_epochs=1, limit_val_batches=0)
    for name in ("failed", "train"):
        assert columns_of_hparams(tmp_path / name)[0] == "val/best_bits_per_token"


@blank_pictures
@pytest.mark.slow
def test_hyperparameters_that_are_not_to_be_logged_are_not(tmp_path) -> None:
    """`save_hyperparameters(logger=False)` is for secrets; nested ones are flattened, and names may be numbers."""

    class Secret(Table):
        def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
            super().save_hyperparameters({"lr": 0.1, "key": "hush"}, logger=False)

    class Nested(Table):
        def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
            super().save_hyperparameters({"lr": 0.1, "a": {"b": {"c": 3}}, 1: "one"})

    fit(TensorBoardLogger(tmp_path, name="", version="secret"), CrossEntropyMonitor(), module=Secret(), max_epochs=1)
    written = b"".join(path.read_bytes() for path in (tmp_path / "secret").glob("events*"))
    assert b"hush" not in written
    fit(TensorBoardLogger(tmp_path, name="", version="nested"), CrossEntropyMonitor(), module=Nested(), max_epochs=1)
    written = b"".join(path.read_bytes() for path in (tmp_path / "nested").glob("events*"))
    assert b"a/b/c" in written


@blank_pictures
@pytest.mark.slow
def test_a_later_test_in_the_same_folder_keeps_the_charts(tmp_path) -> None:
    """The layout of the fit is still there, with its intervals and loaders."""
    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), loaders=2, max_epochs=1)
    before = read_layout(tmp_path / "run")
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[CrossEntropyMonitor()], enable_progress_bar=False)
    trainer.test(Table(), DataLoader(samples(7), 3), verbose=False)
    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), max_epochs=1)
    assert read_layout(tmp_path / "run") == before


@blank_pictures
def test_the_page_pairs_a_value_with_its_own_interval(tmp_path) -> None:
    """One sequence has no interval, whatever the validation before it had."""

    class Shrinking(Table):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> dict[str, Any]:
            outputs = super().validation_step(batch, batch_idx)
            if self.current_epoch:
                outputs["target"] = outputs["target"].masked_fill(
                    torch.arange(len(batch[0]))[:, None] + batch_idx > 0, -100
                )
            return outputs

    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), module=Shrinking(), max_epochs=2)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    page = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    [row] = [line for line in page.splitlines() if "<code>val/cross_entropy</code>" in line]
    assert row.endswith("<td></td></tr>")


def test_an_interval_on_the_page_is_in_the_unit_of_its_value() -> None:
    """That of the cross-entropy stands beside it in nats, and beside the bits in bits; others have one of their own."""
    values = {"cross_entropy": 2.0, "bits_per_token": 2.0 / math.log(2), "perplexity": math.exp(2.0)}
    ends = {"cross_entropy_lower": 1.5, "cross_entropy_upper": 2.5, "perplexity_lower": 4.0, "perplexity_upper": 12.0}
    page = summarise({}, {f"x/val/{name}": value for name, value in (values | ends).items()}, {}, prefix="x/")
    rows = [re.findall(r"<td>(?:<code>)?([^<]*)", line) for line in page.splitlines() if "x/val" in line]
    assert rows == [
        ["x/val/cross_entropy", "2", "1.5 to 2.5"],
        ["x/val/bits_per_token", "2.88539", f"{1.5 / math.log(2):.6g} to {2.5 / math.log(2):.6g}"],
        ["x/val/perplexity", "7.38906", "4 to 12"],
    ]


class Cells(HTMLParser):
    """Reads the text of a page's cells, and which elements there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.elements: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.add(tag)
        if tag == "td":
            self.cells.append("")
        if tag == "br":
            self.cells[-1] += "\n"

    def handle_data(self, data: str) -> None:
        if self.cells and data.strip(" \n"):
            self.cells[-1] += data


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")  # By its first import.
def test_hyperparameters_are_text_on_the_page_and_nothing_else() -> None:
    """Whatever Markdown or HTML could take for its own reads as it was, in TensorBoard's own rendering."""
    from tensorboard.plugin_util import markdown_to_safe_html  # noqa: PLC0415

    texts = TEXTS | {name: text for name, (text, _) in UNPRINTABLE.items()}
    html = summarise(texts, {}, {})
    assert html.isascii()  # Where it is a file, nothing says how it is encoded.
    page = Cells(markdown_to_safe_html(html.encode()))
    assert page.elements == {"h2", "table", "thead", "tbody", "tr", "th", "td", "p", "code", "br"}
    cells = [cell.replace("\u00a0", " ") for cell in page.cells[-2 * len(texts) :]]
    expected = {name: "\n".join(text.splitlines()) for name, text in TEXTS.items()}
    expected |= {name: shown for name, (_, shown) in UNPRINTABLE.items()}
    assert dict(zip(cells[::2], cells[1::2], strict=True)) == expected


@pytest.mark.slow
def test_loaders_with_other_numbers_of_classes_are_no_trouble(tmp_path) -> None:
    """The lines to compare with are of the largest."""

    class Wider(Table):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
            outputs = super().validation_step(batch, batch_idx)
            outputs["logits"] = torch.nn.functional.pad(outputs["logits"], (0, 12 * dataloader_idx))
            return outputs

    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), module=Wider(), loaders=2)
    assert scalars(tmp_path / "run")["val/uniform_bits_per_token"][0][1] == pytest.approx(5)


@blank_pictures
def test_a_monitor_can_be_copied_after_a_run(tmp_path) -> None:
    """Its files stay behind."""
    monitor = CrossEntropyMonitor(dashboards=("layout", "overlay"))
    fit(TensorBoardLogger(tmp_path, name="", version="run"), monitor, max_epochs=1)
    copied = pickle.loads(pickle.dumps(monitor))
    assert copied.state_key == monitor.state_key
    assert not copied._dashboards._dashboards


@blank_pictures
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.num_classes. must be larger than every target:UserWarning")
def test_losses_alone_have_reference_lines_if_the_number_of_classes_is_given(tmp_path) -> None:
    """A loss does not say how many classes there are."""

    def losses(outputs: dict[str, torch.Tensor], batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(outputs["logits"].mT, outputs["target"], reduction="none")
        return {"losses": loss, "target": outputs["target"]}

    for name, num_classes in (("unknown", None), ("known", K)):
        monitor = CrossEntropyMonitor(losses, num_classes=num_classes)
        fit(TensorBoardLogger(tmp_path, name="", version=name), monitor, max_epochs=1)
    assert not kinds(tmp_path / "unknown")["references"]
    assert scalars(tmp_path / "known")["val/uniform_bits_per_token"][0][1] == pytest.approx(math.log2(K))
    monitor = CrossEntropyMonitor(losses, num_classes=2)
    fit(TensorBoardLogger(tmp_path, name="", version="wrong"), monitor, max_epochs=1)
    assert not kinds(tmp_path / "wrong")["references"]


@blank_pictures
def test_lines_to_compare_with_have_one_point_a_step(tmp_path) -> None:
    """The eighth window of training ends at the step of the eighth validation."""
    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), max_epochs=8, log_every_n_steps=5)
    steps = [step for step, _ in scalars(tmp_path / "run")["val/uniform_bits_per_token"]]
    assert steps == list(range(4, 40, 5))


@blank_pictures
def test_a_sanity_check_is_no_validation_of_the_page(tmp_path) -> None:
    """Nothing was validated, and nothing is said to have been."""
    kwargs = {"max_epochs": 1, "check_val_every_n_epoch": 9}
    fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), **kwargs)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    page = events.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "<td>the last validation</td><td>0</td><td>0</td><td>0</td>" in page


@pytest.mark.slow
def test_a_run_of_ten_thousand_log_points_stays_small(tmp_path) -> None:
    """What 400 points more cost, times 10,000, with what is written once, is below 5 MB."""
    sizes = []
    for epochs in (2, 42):  # 5 log points and a validation an epoch; a long run has fewer validations a point.
        logger = TensorBoardLogger(tmp_path, name="", version=f"{epochs}")
        kwargs = {"max_epochs": epochs, "log_every_n_steps": 1, "check_val_every_n_epoch": 2}
        fit(logger, CrossEntropyMonitor(), module=Silent(), **kwargs)
        points = scalars(tmp_path / f"{epochs}")
        assert len(points["train/cross_entropy"]) == 5 * epochs
        pictures = EventAccumulator(str(tmp_path / f"{epochs}"), size_guidance={"images": 0}).Reload()
        drawn = sum(
            len(image.encoded_image_string) for tag in pictures.Tags()["images"] for image in pictures.Images(tag)
        )
        sizes.append((sum(path.stat().st_size for path in (tmp_path / f"{epochs}").glob("events*")) - drawn, drawn))
    (few, _), (many, drawn) = sizes
    # 21 validations were drawn 6 times; 1,000 validations, one every 10 points, would be 11 times.
    assert few + 10_000 * (many - few) / 200 + 2 * drawn < 5e6


class Silent(Table):
    """Logs nothing itself."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


# Layouts by themselves.


def test_the_same_arguments_give_the_same_layout_and_every_tag_is_anchored() -> None:
    """TensorBoard merges the layouts of runs by comparing them, and matches the beginning of a tag only."""
    kwargs = {"groups": ("a.b", "c"), "loaders": True, "prefix": "x/"}
    layout = build_layout(**kwargs)
    assert layout == build_layout(**kwargs)
    for chart in layout.category[0].chart:
        for tag in chart.multiline.tag:
            assert tag.startswith("^")
            assert tag.endswith("$")
    [dots] = {
        tag
        for chart in layout.category[0].chart
        for tag in chart.multiline.tag
        if "perplexity/(" in tag and "val" in tag
    }
    assert re.match(dots, "x/val_by_group/perplexity/a.b")
    assert not re.match(dots, "x/val_by_group/perplexity/a-b")


@pytest.mark.parametrize("overlay", [False, True])
def test_a_prefix_is_text_and_no_pattern(overlay: bool) -> None:
    """A chart of `a.b/` has the tags of `a.b/`, and none of `axb/`."""
    layout = build_layout(groups=["web"], loaders=True, overlay=overlay, prefix="a.b/")
    parts = ((None, ""), ("group", "web"), ("loader", "dataloader_idx_1"))
    stages = ("train", "val")
    ours = [Tag(stage, name, *part).text() for stage in stages for name in READINGS for part in parts]
    tags = [*ours, *READINGS]
    for chart in layout.category[0].chart:
        for expression in chart.multiline.tag:
            assert not any(re.match(expression, f"axb/{tag}") for tag in tags)
            assert "uni" in expression or any(re.match(expression, f"a.b/{tag}") for tag in tags)


def test_layouts_are_merged_by_title_and_the_later_one_wins() -> None:
    """What is not named in both is kept, in the order in which it came: categories, and the charts in them."""
    first = layout_pb2.Layout(category=[layout_pb2.Category(title="A"), layout_pb2.Category(title="B", closed=True)])
    second = layout_pb2.Layout(category=[layout_pb2.Category(title="B"), layout_pb2.Category(title="C")])
    merged = merge_layouts(first, second)
    assert [(category.title, category.closed) for category in merged.category] == [
        ("A", False),
        ("B", False),
        ("C", False),
    ]
    whole, part = build_layout(loaders=True), build_layout(intervals=False, overlay=True)
    [category] = merge_layouts(whole, part).category
    assert [chart.title for chart in category.chart] == [chart.title for chart in whole.category[0].chart]
    assert category.chart[0] == part.category[0].chart[0]


def test_a_layout_is_added_to_what_a_writer_has(tmp_path) -> None:
    """Without Lightning too."""
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        assert read_layout(tmp_path) is None
        writer.add_custom_scalars({"Mine": {"chart": ["Multiline", ["a"]]}})
        add_layout(writer, build_layout())
        add_layout(writer, build_layout(intervals=False))
    layout = read_layout(tmp_path)
    assert [category.title for category in layout.category] == ["Mine", "Likelihood"]
    assert layout.category[1] == build_layout().category[0]


@pytest.mark.parametrize("tag", ["val/other", "train/cross_entropy_smoothed", "epoch", "val/cross_entropyx", "lr"])
def test_tags_of_others_are_not_described(tag) -> None:
    """Nothing is said about what is not ours."""
    assert describe_tag(tag) is None
    assert describe_tag("val/cross_entropy", prefix="x/") is None


def test_a_part_that_does_not_exist_is_named() -> None:
    """The error lists what there is."""
    with pytest.raises(ValueError, match=r"`dashboards` must be a list of some of .*'layout'.* got 'layuot'"):
        CrossEntropyMonitor(dashboards=["layuot"])
    for wrong in ("layout", None, [1], 3):
        with pytest.raises(ValueError, match="`dashboards` must be a list of some of"):
            CrossEntropyMonitor(dashboards=wrong)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # Given again by `pytest.warns`.
def test_without_matplotlib_a_warning_says_what_is_missing(tmp_path, monkeypatch) -> None:
    """Everything else is written."""
    from xent_metrics.lightning import dashboards  # noqa: PLC0415

    find_spec = dashboards.find_spec
    monkeypatch.setattr(dashboards, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.warns(UserWarning, match="`dashboards` has 'pictures', which need matplotlib"):
        fit(TensorBoardLogger(tmp_path, name="", version="run"), CrossEntropyMonitor(), max_epochs=1)
    found = kinds(tmp_path / "run")
    assert not found["pictures"]
    assert found["summary"]
