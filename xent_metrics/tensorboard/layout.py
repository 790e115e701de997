"""The charts of TensorBoard's Custom Scalars tab.

TensorBoard shows only the last layout of a run. So a layout is written together with those that the run has already,
which are read from its event files: the user's own, and those of other monitors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch.utils.tensorboard import SummaryWriter

from xent_metrics.tags import BOUNDED_READINGS, LOGGED_READINGS, UNIFORM, UNIGRAM, Tag


def build_layout(
    readings: Sequence[str] = LOGGED_READINGS,
    *,
    groups: Sequence[str] = (),
    loaders: bool = False,
    intervals: bool = True,
    overlay: bool = False,
    windows: bool = True,
    prefix: str = "",
) -> layout_pb2.Layout:
    """Return the charts of the Custom Scalars tab, the same for the same arguments.

    Args:
        readings: The readings of each stage; see `CrossEntropyMonitor`.
        groups: Names of groups, for a chart of all of them.
        loaders: Whether there are several validation loaders, for a chart of all of them.
        intervals: Whether a validation has an interval. Without one, its chart would show an error.
        overlay: Whether training and validation are also runs of their own, which gives their lines two colours: all
            lines of one run have one colour, and differ by the marks of their points.
        windows: Whether training has points within its epochs. Without them, those of its epochs are drawn.
        prefix: The text before all tags.

    Returns:
        A layout of TensorBoard's; `merge_layouts` adds it to one of your own, and `add_layout` writes it.
    """
    category = layout_pb2.Category(title=f"Likelihood {prefix}".strip())
    for name in readings:
        train = name if windows else f"{name}_epoch"
        lines = [name] if overlay else [f"train/{train}", f"val/{name}"]
        if name == "bits_per_token":
            lines += [f"val/{UNIFORM}", f"val/{UNIGRAM}"]
        if name == "entropy" and not overlay:
            lines += ["val/cross_entropy"]  # The distance is how much the model is too sure.
        _add_lines(category, f"{name}: training, validation", (re.escape(prefix + line) for line in lines))
        if intervals and name in BOUNDED_READINGS:
            tag = f"{prefix}val/{name}"
            series = layout_pb2.MarginChartContent.Series(value=tag, lower=f"{tag}_lower", upper=f"{tag}_upper")
            margin = layout_pb2.MarginChartContent(series=[series])
            category.chart.append(layout_pb2.Chart(title=f"{name}: validation with its interval", margin=margin))
        if loaders:
            any_loader = Tag("val", name, "loader", "[^/]+").text(re.escape(prefix))
            _add_lines(category, f"{name}: validation loaders", [any_loader])
        if groups:
            names = "|".join(map(re.escape, groups))
            # Groups have no points of epochs.
            for stage, words in (("val", "validation"), *((("train", "training"),) if windows else ())):
                any_group = Tag(stage, name, "group", f"({names})").text(re.escape(prefix))
                _add_lines(category, f"{name}: groups in {words}", [any_group])
    return layout_pb2.Layout(category=[category])


def _add_lines(category: layout_pb2.Category, title: str, tags: Iterable[str]) -> None:
    # Anchored, since TensorBoard matches only the beginning of a tag.
    multiline = layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags])
    category.chart.append(layout_pb2.Chart(title=title, multiline=multiline))


def merge_layouts(*layouts: layout_pb2.Layout) -> layout_pb2.Layout:
    """Return the categories and charts of all layouts; of two charts with one title in a category, the later one."""
    categories: dict[str, layout_pb2.Category] = {}
    for category in (category for layout in layouts for category in layout.category):
        before = categories.get(category.title, layout_pb2.Category())
        old, new = ({chart.title: chart for chart in each.chart} for each in (before, category))
        charts = (
            {**old, **new}
            if new.keys() <= old.keys()
            else {**new, **{title: old[title] for title in old if title not in new}}
        )
        merged = layout_pb2.Category(title=category.title, closed=category.closed, chart=list(charts.values()))
        categories[category.title] = merged
    return layout_pb2.Layout(category=list(categories.values()))


def add_layout(writer: SummaryWriter, layout: layout_pb2.Layout) -> None:
    """Write a layout, together with the categories that were laid out in this run before.

    `SummaryWriter.add_custom_scalars` would hide those, since TensorBoard shows only the last layout of a run.
    """
    writer.flush()  # What is not in the file yet cannot be read back.
    before = read_layout(writer.log_dir)
    merged = layout if before is None else merge_layouts(before, layout)
    tensor = TensorProto(dtype=DT_STRING, string_val=[merged.SerializeToString()])
    value = Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata.create_summary_metadata())
    writer._get_file_writer().add_summary(Summary(value=[value]))


def read_layout(log_dir: str | Path) -> layout_pb2.Layout | None:
    """Return the last layout that was written to a run in a local folder; None if there is none."""
    last = None
    for path in sorted(Path(log_dir).glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(path)).Load() if path.is_file() else ():
            if metadata.CONFIG_SUMMARY_TAG.encode() in record:  # Parsing all records of a long run would take seconds.
                for value in Event.FromString(record).summary.value:
                    if value.tag == metadata.CONFIG_SUMMARY_TAG:
                        last = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    return last
