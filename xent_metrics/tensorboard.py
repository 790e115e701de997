"""TensorBoard: what makes a run's curves legible to somebody who does not know how they were made.

A `Dashboard` writes beside the values that a logger writes: a layout of charts, a description of each, reference lines,
a table of hyperparameters, pictures and a page of text. It knows nothing of Lightning, and works on any
`SummaryWriter`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xent_metrics.pictures import (
    Decode,
    Gallery,
    Reached,
    draw_distribution,
    draw_interval,
    draw_page,
    draw_positions,
)
from xent_metrics.readings import ExactReading

try:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams as hparams_summaries
except ModuleNotFoundError as error:  # pragma: no cover
    raise ModuleNotFoundError(
        "`xent_metrics.tensorboard` needs TensorBoard; install it with `pip install xent-metrics[lightning]`."
    ) from error

UNIFORM, UNIGRAM = "uniform_bits_per_token", "unigram_bits_per_token"

_DEFINITIONS = {
    "cross_entropy": "Cross-entropy in **nats** a target: the mean of `-ln` of the probability that the model gave to "
    "what came. Lower is better; 0 is certain and right.",
    "bits_per_token": "Cross-entropy in **bits** a target: nats over `ln 2`, what a code built on the model spends on "
    "each. Lower is better.",
    "bits_per_byte": "Total bits over the **UTF-8 bytes** that the tokens stand for: comparable between tokenizers. "
    "Lower is better.",
    "perplexity": "`exp` of the cross-entropy in nats: the **number** of equally likely choices that would be as "
    "surprising. Lower is better; 1 is certain and right.",
    "best_bits_per_token": "The lowest `bits_per_token` of all validations of this run so far, in **bits**.",
    UNIFORM: "A line to compare with: `log2` of the number of classes, in **bits**. A model that knows nothing is "
    "here.",
    UNIGRAM: "A line to compare with: the entropy in **bits** of how frequent each class is among the targets of the "
    "validation. A model that knows these frequencies, and uses no context, is here; as an estimate it is too low "
    "where there are few targets for each class.",
}


def build_layout(
    readings: Sequence[str] = ("cross_entropy", "bits_per_token", "perplexity"),
    *,
    groups: Sequence[str] = (),
    loaders: bool = False,
    intervals: bool = True,
    overlay: bool = False,
    prefix: str = "",
) -> layout_pb2.Layout:
    """Return the charts of the Custom Scalars tab, the same for the same arguments.

    Args:
        readings: What there is of each stage; see `CrossEntropyMonitor`.
        groups: Names of groups, for a chart of all of them.
        loaders: Whether there are several validation loaders, for a chart of all of them.
        intervals: Whether a validation has an interval. Without one, its chart would show an error.
        overlay: Whether training and validation are also runs of their own, which gives their lines two colours: all
            lines of one run have one colour, and differ by the marks of their points.
        prefix: What stands before all tags.

    Returns:
        A layout of TensorBoard's; `merge_layouts` adds it to one of your own, and `add_layout` writes it.
    """
    title = f"Likelihood {prefix}".strip()
    category = layout_pb2.Category(title=title)
    for name in readings:
        lines = [name] if overlay else [f"train/{name}", f"val/{name}"]
        if name == "bits_per_token":
            lines += [f"val/{UNIFORM}", f"val/{UNIGRAM}"]
        _add_lines(category, f"{name}: training, validation", (re.escape(prefix + line) for line in lines))
        if intervals and name in ("cross_entropy", "perplexity"):
            tag = f"{prefix}val/{name}"
            series = layout_pb2.MarginChartContent.Series(value=tag, lower=f"{tag}_lower", upper=f"{tag}_upper")
            margin = layout_pb2.MarginChartContent(series=[series])
            category.chart.append(layout_pb2.Chart(title=f"{name}: validation with its interval", margin=margin))
        if loaders:
            tags = rf"{re.escape(f'{prefix}val/{name}/')}dataloader_idx_\d+"
            _add_lines(category, f"{name}: validation loaders", [tags])
        if groups:
            each = "|".join(map(re.escape, groups))
            for stage, words in (("val", "validation"), ("train", "training")):
                tags = f"{re.escape(f'{prefix}{stage}/{name}/')}({each})"
                _add_lines(category, f"{name}: groups in {words}", [tags])
    return layout_pb2.Layout(category=[category])


def _add_lines(category: layout_pb2.Category, title: str, tags: Iterable[str]) -> None:
    """Add a chart of all tags that match; anchored, since TensorBoard matches the beginning of a tag only."""
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

    TensorBoard shows the last layout of a run only, and `SummaryWriter.add_custom_scalars` writes what it is given.
    """
    writer.flush()
    _write_layout(writer, layout, read_layout(writer.log_dir))


def _write_layout(writer: SummaryWriter, layout: layout_pb2.Layout, others: layout_pb2.Layout | None) -> None:
    merged = layout if others is None else merge_layouts(others, layout)
    tensor = TensorProto(dtype=DT_STRING, string_val=[merged.SerializeToString()])
    value = Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata.create_summary_metadata())
    writer._get_file_writer().add_summary(Summary(value=[value]))


def describe_tag(tag: str, prefix: str = "") -> str | None:
    """Return what a chart shows, in Markdown: definition, unit, what is pooled, what is left out; None for others."""
    found = re.fullmatch(r"(train|val|test)/([a-z_]+?)(_epoch|_lower|_upper)?(?:/(.+))?", tag.removeprefix(prefix))
    if not found or not tag.startswith(prefix) or found[2] not in _DEFINITIONS:
        return None
    stage, name, suffix, part = found.groups()
    if name in (UNIFORM, UNIGRAM, "best_bits_per_token"):
        return _DEFINITIONS[name]
    pooled = {
        "train": "all targets since the last point of this curve, of all ranks",
        "val": "all targets of the validation, of all loaders and ranks",
        "test": "all targets of the test, of all loaders and ranks",
    }[stage]
    if suffix == "_epoch":
        pooled = "all targets of the training epoch, of all ranks, while the model changed"
    if part:
        of = f"loader {part.rpartition('_')[2]}" if part.startswith("dataloader_idx") else f"the group `{part}`"
        pooled += f", but only those of {of}"
    bound = {"_lower": "Lower end of the interval. ", "_upper": "Upper end of the interval. "}.get(suffix or "", "")
    if bound:
        pooled += "; the interval is that of a sample of sequences, not of tokens"
    return (
        f"{bound}{_DEFINITIONS[name]}\n\n**Pooled:** {pooled}; each target counts once, whatever its batch.\n\n"
        "**Left out:** targets that are ignored (padding), and samples that ranks repeat to be equally many."
    )


class Dashboard:
    """Everything that is written to one run of TensorBoard beside its values.

    Args:
        writer: Where the values go too.
        parts: What to write; see `CrossEntropyMonitor`.
        readings: What there is of each stage.
        groups: Names of groups.
        prefix: What stands before all tags.
        logger_prefix: What the logger puts before that.
    """

    def __init__(
        self,
        writer: SummaryWriter,
        parts: Iterable[str],
        readings: Sequence[str],
        groups: Sequence[str] = (),
        prefix: str = "",
        logger_prefix: str = "",
    ) -> None:
        self.writer = writer
        self.parts = frozenset(parts)
        self._readings = readings
        self._groups = groups
        self._prefix = prefix
        self._logger_prefix = logger_prefix
        self._stages = (f"{prefix}train/", f"{prefix}val/")  # Those that have charts.
        self._announced: set[str] = set()
        self._layout: layout_pb2.Layout | None = None
        self._layouts = _LayoutReader(writer.log_dir)
        self._overlaid: dict[str, SummaryWriter] = {}

    def announce(self, tags: Iterable[str]) -> None:
        """Describe the charts of tags that are about to get their first point, and lay them out.

        A description that comes after the first point is not shown, and a chart of tags that are never written would
        show an error.
        """
        new = [tag for tag in tags if tag not in self._announced]
        if not new:
            return
        self._announced.update(new)
        if "descriptions" in self.parts:
            for tag in new:
                _describe(self.writer, self._logger_prefix + tag, describe_tag(tag, self._prefix))
        if "layout" in self.parts and any(tag.startswith(self._stages) for tag in new):
            self._lay_out()

    def _lay_out(self) -> None:
        """Write the layout if it has changed, with what somebody else laid out in this run."""
        layout = build_layout(
            self._readings,
            groups=self._groups,
            loaders=any("/dataloader_idx_" in tag for tag in self._announced),
            intervals=f"{self._prefix}val/cross_entropy_lower" in self._announced,
            overlay="overlay" in self.parts,
            prefix=self._logger_prefix + self._prefix,
        )
        if layout != self._layout:
            self._layout = layout
            self.writer.flush()
            _write_layout(self.writer, layout, self._layouts.read())

    def log_hparams(self, hparams: Mapping[str, Any], tags: Sequence[str]) -> None:
        """Write the row of this run in the table of hyperparameters, whose values are those of its tags."""
        if "hparams" not in self.parts:
            return
        plain = {name: _plain(value) for name, value in hparams.items()}
        for summary in hparams_summaries(plain, {self._logger_prefix + tag: 0.0 for tag in tags}):
            self._add(summary, None)

    def add_reference(self, tag: str, value: float, step: int) -> None:
        """Write a point of a line to compare with."""
        if "references" in self.parts:
            self.announce([tag])
            self.writer.add_scalar(self._logger_prefix + tag, value, step)

    def draw(
        self, gallery: Gallery, history: Sequence[Reached], references: Mapping[str, float], decode: Decode | None
    ) -> None:
        """Draw the pictures of a validation.

        Args:
            gallery: What was gathered of it; the profile of all ranks together.
            history: What it has reached, and those before it.
            references: The lines to compare with, under their names.
            decode: See `CrossEntropyMonitor`.
        """
        if "pictures" not in self.parts:
            return
        reached = history[-1]
        caption = _caption(reached)
        lines = {name.partition("_")[0]: bits for name, bits in references.items()}
        pictures = {}
        if any(gallery.profile.shares()):  # Nothing is known of single targets where steps return means.
            pictures["distribution"] = draw_distribution(gallery.profile, f"Losses: {caption}", lines)
        if len(gallery.profile.by_position()[0]) > 1:
            pictures["by_position"] = draw_positions(gallery.profile, f"By position: {caption}", lines)
        known = [one for one in history if math.isfinite(one.lower) and math.isfinite(one.upper)]
        if len(known) > 1:
            pictures["interval"] = draw_interval(known, f"Validation: {caption}")
        page = gallery.page(decode)
        if any(page.texts):
            pictures["surprisal"] = draw_page(
                page, f"What each cost: {caption}", min(references.get(UNIFORM, 8.0), 10.0)
            )
        for name, png in pictures.items():
            self._add_picture(f"{self._prefix}val/{name}", png, reached.step)

    def _add_picture(self, tag: str, png: bytes, step: int) -> None:
        width, height = struct.unpack(">II", png[16:24])  # Where every PNG file has them.
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(Summary(value=[Summary.Value(tag=self._logger_prefix + tag, image=image)]), step)

    def add_text(self, tag: str, markdown: str, step: int) -> None:
        """Write a page of text."""
        self.writer.add_text(self._logger_prefix + self._prefix + tag, markdown, step)

    def overlay(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Write the readings of a stage once more, in a run of its own under the same tags, hence in its own colour."""
        if "overlay" not in self.parts:
            return
        tags = {f"{self._prefix}{stage}/{name}": self._logger_prefix + self._prefix + name for name in self._readings}
        if stage not in self._overlaid:
            self._overlaid[stage] = SummaryWriter(f"{self.writer.log_dir}/{stage}")
            for tag, overlaid in tags.items() if "descriptions" in self.parts else ():
                _describe(self._overlaid[stage], overlaid, describe_tag(tag, self._prefix))
        for tag in tags.keys() & values.keys():
            self._overlaid[stage].add_scalar(tags[tag], values[tag], step)

    def flush(self) -> None:
        """Let TensorBoard see what was written."""
        for writer in (self.writer, *self._overlaid.values()):
            writer.flush()

    def close(self) -> None:
        """Close the overlaid runs; the run itself is its logger's."""
        for writer in self._overlaid.values():
            writer.close()
        self._overlaid.clear()

    def _add(self, summary: Any, step: int | None) -> None:
        self.writer._get_file_writer().add_summary(summary, step)


def _describe(writer: SummaryWriter, tag: str, description: str | None) -> None:
    """Write the description of a scalar, and no point."""
    if description is not None:
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        about = SummaryMetadata(summary_description=description, plugin_data=plugin)
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, metadata=about)]), 0)


def _caption(reached: Reached) -> str:
    """Say what a validation has reached, and how sure that is."""
    interval = "" if math.isnan(reached.lower) else f" (interval {reached.lower:.3f} to {reached.upper:.3f})"
    return f"{reached.bits:.3f} bits a target{interval}, step {reached.step}"


def read_layout(log_dir: str | Path) -> layout_pb2.Layout | None:
    """Return the last layout that was written to a run in a local folder, if any."""
    return _LayoutReader(log_dir).read()


class _LayoutReader:
    """Reads event files for their last layout, and what has been read only once: a run that goes on may be large."""

    def __init__(self, log_dir: str | Path) -> None:
        self._log_dir = Path(log_dir)
        self._loaders: dict[Path, RawEventFileLoader] = {}
        self._last: layout_pb2.Layout | None = None

    def read(self) -> layout_pb2.Layout | None:
        for path in sorted(self._log_dir.glob("events.out.tfevents.*")):
            if path.is_file():
                loader = self._loaders.setdefault(path, RawEventFileLoader(str(path)))
                for record in loader.Load():
                    if metadata.CONFIG_SUMMARY_TAG.encode() in record:  # Most records need not be understood.
                        self._understand(record)
        return self._last

    def _understand(self, record: bytes) -> None:
        for value in Event.FromString(record).summary.value:
            if value.tag == metadata.CONFIG_SUMMARY_TAG:
                self._last = layout_pb2.Layout.FromString(value.tensor.string_val[0])


def unigram_bits(counts: Sequence[int]) -> float:
    """Return the entropy in bits of how frequent classes are; NaN if there are none."""
    total = sum(counts)
    return -math.fsum(n / total * math.log2(n / total) for n in counts if n) if total else math.nan


def summarise(
    configuration: Mapping[str, Any],
    values: Mapping[str, float],
    counts: Mapping[str, ExactReading],
    num_repeated: int = 0,
    prefix: str = "",
) -> str:
    """Return a page of Markdown: how a run was set up, what it reached, and what that was read of.

    Args:
        configuration: Names and values.
        values: The last values, by tag.
        counts: For each stage, a reading of all its targets.
        num_repeated: Samples of the last validation that were left out, as another rank had them too.
        prefix: What stands before all tags.
    """
    rows = []
    for tag, value in values.items():
        stage, _, name = tag.removeprefix(prefix).partition("/")
        if re.fullmatch("(cross_entropy|perplexity)_(lower|upper)", name):
            continue
        base, unit = ("cross_entropy", math.log(2)) if name == "bits_per_token" else (name, 1.0)
        bounds = [values.get(f"{prefix}{stage}/{base}_{end}") for end in ("lower", "upper")]
        interval = " to ".join(f"{bound / unit:.6g}" for bound in bounds if bound is not None)
        rows.append((f"`{tag}`", f"{value:.6g}", interval))
    seen = [
        (stage, f"{reading.num_tokens:,}", f"{reading.num_ignored:,}", f"{reading.num_nonfinite:,}")
        for stage, reading in counts.items()
    ]
    return "\n".join(
        (
            _table("What was reached, at the end", ("tag", "value", "interval"), rows),
            _table("What that is read of", ("targets of", "scored", "ignored", "of infinite or NaN loss"), seen),
            f"Samples that ranks drew twice, left out of the last validation: {num_repeated:,}.\n",
            _table("Configuration", ("name", "value"), [(f"`{name}`", f"`{v}`") for name, v in configuration.items()]),
        )
    )


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table under a heading."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = (" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines)
    return f"## {title}\n\n" + "\n".join(f"| {line} |" for line in escaped) + "\n"


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
