"""Everything that is written to one run of TensorBoard beside its values."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorboard.compat import tf
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from xent_metrics.tags import BOUNDS, ENDS, Tag, parse_tag
from xent_metrics.tensorboard.descriptions import describe_tag
from xent_metrics.tensorboard.hparams import log_hparams
from xent_metrics.tensorboard.layout import add_layout, build_layout


class Dashboard:
    """Writes what makes the values of one run readable; a part that is switched off is not written.

    Args:
        writer: The writer that writes the values too.
        parts: The parts to write; see `CrossEntropyMonitor`.
        readings: The readings of each stage.
        groups: Names of groups.
        prefix: The text before all tags.
        logger_prefix: The text that the logger puts before that.
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
        self._described: set[str] = set()
        self._layout: layout_pb2.Layout | None = None
        self._overlaid: dict[str, SummaryWriter] = {}

    def describe_new_tags(self, tags: Iterable[str], step: int) -> None:
        """Describe and lay out the charts of tags that are about to get their first point, at a step.

        TensorBoard does not show a description that comes after the first point, and a chart of tags that are never
        written shows an error. One at an earlier step would hide what the run had written before it was resumed.
        """
        new = [tag for tag in tags if tag not in self._described]
        self._described.update(new)
        if "descriptions" in self.parts:
            for tag in new:
                _describe(self.writer, self._logger_prefix + tag, describe_tag(tag, self._prefix), step)
        parsed = (parse_tag(tag, self._prefix) for tag in new)
        if "layout" in self.parts and any(tag is not None and tag.stage != "test" for tag in parsed):
            self._lay_out()

    def _lay_out(self) -> None:
        """Write the layout if it has changed."""
        shown = [tag for tag in (parse_tag(text, self._prefix) for text in self._described) if tag is not None]
        window, epoch = (any(Tag("train", name + end) in shown for name in self._readings) for end in ENDS)
        names = {tag.name.removesuffix("_epoch") for tag in shown if tag.stage != "test"}
        layout = build_layout(
            [name for name in self._readings if name in names],
            groups=self._groups,
            loaders=any(tag.startswith(f"{self._prefix}val_by_loader/") for tag in self._described),
            intervals=any(Tag("val", name) in shown for name in BOUNDS),
            overlay="overlay" in self.parts,
            windows=window or not epoch,
            prefix=self._logger_prefix + self._prefix,
        )
        if layout != self._layout:
            self._layout = layout
            add_layout(self.writer, layout)

    def log_hparams(self, hparams: Mapping[str, Any], tags: Sequence[str]) -> None:
        """Write the row of this run in the table of hyperparameters; its values are those of its tags."""
        if "hparams" in self.parts:
            log_hparams(self.writer, hparams, [self._logger_prefix + tag for tag in tags])

    def add_reference(self, tag: str, value: float, step: int) -> None:
        """Write a point of a reference line."""
        if "references" in self.parts:
            self.describe_new_tags([tag], step)
            self.writer.add_scalar(self._logger_prefix + tag, value, step)

    def add_picture(self, tag: str, png: bytes, step: int) -> None:
        """Write a picture, a PNG file."""
        # `SummaryWriter.add_image` would decode the picture and encode it again.
        width, height = struct.unpack(">II", png[16:24])  # The header of every PNG file.
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag=self._logger_prefix + tag, image=image)])
        self.writer._get_file_writer().add_summary(summary, step)

    def add_text(self, tag: str, html: str, step: int) -> None:
        """Write a page of text."""
        self.writer.add_text(self._logger_prefix + tag, html, step)

    def add_page(self, tag: str, html: str, step: int) -> None:
        """Write a file beside those of the writer, in place of an older one: TensorBoard shows no pages."""
        with tf.io.gfile.GFile(
            f"{self.writer.log_dir}/{(self._logger_prefix + tag).replace('/', '_')}.html", "w"
        ) as file:
            file.write(html)

    def overlay(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Write the readings of a stage once more, in a run of its own under the same tags, hence in its own colour."""
        if "overlay" not in self.parts:
            return
        # Training that has no windows is drawn by its epochs.
        tags = {Tag(stage, name + end).text(self._prefix): name for end in ENDS for name in self._readings}
        overlaid = {tag: self._logger_prefix + self._prefix + name for tag, name in tags.items() if tag in values}
        if stage not in self._overlaid:
            self._overlaid[stage] = SummaryWriter(f"{self.writer.log_dir}/{stage}")
            for tag, shown_as in overlaid.items() if "descriptions" in self.parts else ():
                _describe(self._overlaid[stage], shown_as, describe_tag(tag, self._prefix), step)
        for tag, shown_as in overlaid.items():
            self._overlaid[stage].add_scalar(shown_as, values[tag], step)

    def flush(self) -> None:
        """Write everything to the files, where TensorBoard sees it."""
        for writer in (self.writer, *self._overlaid.values()):
            writer.flush()

    def close(self) -> None:
        """Close the overlaid runs; the logger closes the run itself."""
        for writer in self._overlaid.values():
            writer.close()
        self._overlaid.clear()


def _describe(writer: SummaryWriter, tag: str, description: str | None, step: int) -> None:
    """Write the description of a scalar, without a point."""
    if description is not None:
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        about = SummaryMetadata(summary_description=description, plugin_data=plugin)
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, metadata=about)]), step)
