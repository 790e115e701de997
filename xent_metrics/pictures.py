"""What the pictures of a validation need, and the pictures: PNG files as bytes, drawn without pyplot.

A `Gallery` gathers a validation: a `Profile`, which is added over batches, loaders and ranks like a tally; the first
tokens that this rank saw; and how frequent classes are. Pictures show what an average hides: how unequal the losses
are, whether the model uses its context, and which tokens are hard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from xent_metrics.checks import any_of
from xent_metrics.losses import TargetLosses

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Decode = Callable[[list[int]], str]
"""Turns a list of one token into text."""

BINS_PER_BIT = 4
MAX_BITS = 24
"""Losses are counted in bins of a quarter of a bit up to this many; one more bin has what is beyond."""

_NUM_BINS = BINS_PER_BIT * MAX_BITS + 1
_EXACT = 16  # Positions below this have a bucket each; above, each doubling has half as many.
_NUM_BUCKETS = _EXACT * 9  # Up to 2**20 positions; the last one has what is beyond.
_UNIT = 2**-20  # Of the bits that are summed by position: finer than a pixel, and 2**43 bits fit.


@dataclass(frozen=True, eq=False)
class Profile:
    """How many targets had which loss, and the mean loss by position in the sequence.

    Attributes:
        state: One int64 tensor; its size is the same whatever was seen, so that ranks can add it up.
    """

    state: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> Profile:
        """Return the profile of no targets."""
        return cls(torch.zeros(_NUM_BINS + 2 * _NUM_BUCKETS + 1, dtype=torch.int64, device=device))

    @classmethod
    def of(cls, losses: TargetLosses) -> Profile:
        """Return the profile of a batch; targets of infinite or NaN loss count in the last bin only."""
        with torch.no_grad():
            scored = _scored(losses)
            bits = losses.loss / math.log(2)
            bits = torch.where(bits.isfinite(), bits, 2.0 * MAX_BITS).clamp(max=2.0 * MAX_BITS)
            bins = (bits * BINS_PER_BIT).long().clamp(0, _NUM_BINS - 1)
            histogram = torch.zeros(_NUM_BINS, dtype=torch.int64, device=bits.device)
            histogram.scatter_add_(0, bins.flatten(), scored.long().flatten())
            shown = scored & losses.loss.isfinite()
            sums = (bits.masked_fill(~shown, 0) / _UNIT).round().long().sum(0)
            by_position = torch.zeros(2, _NUM_BUCKETS, dtype=torch.int64, device=bits.device)
            bucket = _bucket(torch.arange(bits.shape[1], device=bits.device))
            by_position.index_add_(1, bucket, torch.stack([sums, shown.sum(0)]))
            return cls(torch.cat([histogram, by_position.flatten(), histogram.new_zeros(1)]))

    def __add__(self, other: Profile) -> Profile:
        """Return the profile of both sets of targets."""
        return Profile(self.state + other.state)

    @property
    def num_repeated(self) -> int:
        """Number of samples that were left out, since another rank has them too."""
        return int(self.state[-1])

    @property
    def mean(self) -> float:
        """Mean bits of targets of finite loss, as far as a picture needs them; NaN without targets."""
        sums, counts = self.state[_NUM_BINS:-1].view(2, _NUM_BUCKETS).sum(1).tolist()
        return sums * _UNIT / counts if counts else math.nan

    def shares(self) -> list[float]:
        """Return the share of targets in each bin of losses; all 0 without targets."""
        counts = self.state[:_NUM_BINS].tolist()
        return [count / max(1, sum(counts)) for count in counts]

    def by_position(self) -> tuple[list[float], list[float]]:
        """Return positions (from 0; the middle of a bucket) that have targets, and the mean bits of each."""
        sums, counts = self.state[_NUM_BINS:-1].view(2, _NUM_BUCKETS).tolist()
        seen = [i for i in range(_NUM_BUCKETS) if counts[i]]
        middles = [(_first(i) + _first(i + 1) - 1) / 2 for i in seen]
        return middles, [sums[i] * _UNIT / counts[i] for i in seen]


def _scored(losses: TargetLosses) -> Tensor:
    """Say which targets are scored."""
    skipped = any_of(losses.ignored, losses.out_of_range)
    return torch.ones_like(losses.loss, dtype=torch.bool) if skipped is None else ~skipped


def _bucket(position: Tensor) -> Tensor:
    """Return the bucket of a position: fine where a sequence begins, coarse far out."""
    half = _EXACT // 2
    octave = ((position + 0.5) / half).log2().floor().long().clamp(min=0)
    bucket = octave * half + (position >> octave)
    return bucket.clamp(max=_NUM_BUCKETS - 1)


def _first(bucket: int) -> int:
    """Return the first position of a bucket."""
    half = _EXACT // 2
    octave = max(0, bucket // half - 1)
    return (bucket - octave * half) << octave


@dataclass(frozen=True)
class Page:
    """A piece of text and what each part of it cost.

    Attributes:
        texts: The tokens of each sequence, as text.
        bits: The loss of each of them in bits.
    """

    texts: list[list[str]]
    bits: list[list[float]]


class Reached(NamedTuple):
    """What a validation has reached: bits a target, and the ends of the interval; NaN if there is none."""

    step: int
    bits: float
    lower: float
    upper: float


class Gallery:
    """What the pictures and the reference lines of one validation need.

    Args:
        device: Where losses are.
        counts_classes: Whether to count how frequent each class is.

    Attributes:
        profile: The losses.
        class_counts: How often each class was scored; empty if not counted.
        num_beyond: How often none of them.
    """

    def __init__(self, device: torch.device, counts_classes: bool) -> None:
        self.profile = Profile.zero(device)
        self.class_counts = torch.zeros(0, dtype=torch.int64, device=device)
        self.num_beyond = torch.zeros((), dtype=torch.int64, device=device)
        self._counts_classes = counts_classes
        # Where prompts are masked, most of what is kept is not shown.
        self._room = 8 * _COLUMNS * _ROWS
        self._first: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, losses: TargetLosses, ids: Tensor | None, num_classes: int | None) -> None:
        """Gather a batch, without waiting for the device.

        Args:
            losses: The loss of each target.
            ids: The class of each; None if targets are distributions.
            num_classes: How many classes there are, if that is known.
        """
        self.profile = self.profile + Profile.of(losses)
        if ids is None:
            return
        ids = ids.reshape(losses.loss.shape)
        scored = _scored(losses)
        if num_classes is not None and self._counts_classes:
            self._count(ids, scored, num_classes)
        if self._room > 0 and ids.numel():
            columns = min(ids.shape[1], self._room)
            part = (slice(-(-self._room // columns)), slice(columns))
            self._first.append((ids[part].clone(), losses.loss[part].clone(), scored[part].clone()))
            self._room -= ids[part].numel()

    def leave_out(self, num_samples: int) -> None:
        """Count samples that were not scored, since another rank has them too."""
        self.profile.state[-1] += num_samples

    def _count(self, ids: Tensor, scored: Tensor, num_classes: int) -> None:
        missing = num_classes - len(self.class_counts)  # Loaders may have other numbers of classes.
        self.class_counts = torch.nn.functional.pad(self.class_counts, (0, max(0, missing)))
        known = (ids >= 0) & (ids < num_classes)
        self.num_beyond = self.num_beyond + (scored & ~known).sum()
        index = ids.masked_fill(~known, 0).flatten()
        self.class_counts.scatter_add_(0, index, (scored & known).long().flatten())

    def page(self, decode: Decode | None) -> Page:
        """Return the first text of this rank."""
        page = Page([], [])
        for part in self._first:
            ids, losses, scored = (x.tolist() for x in part)
            rows = write_page(ids, losses, scored, decode)
            page.texts.extend(rows.texts)
            page.bits.extend(rows.bits)
        return page


def draw_distribution(profile: Profile, title: str, references: Mapping[str, float]) -> bytes:
    """Draw how many targets had which loss, beside lines to compare with (names and bits)."""
    figure, axes = _figure(title)
    shares = profile.shares()
    shown = max(8 * BINS_PER_BIT, 1 + max((i for i, share in enumerate(shares) if share > 0), default=0))
    edges = [i / BINS_PER_BIT for i in range(shown)]
    axes.bar(edges, shares[:shown], width=1 / BINS_PER_BIT, align="edge", color="#4c78a8")
    axes.axvline(profile.mean, color="#333333", linestyle=":", label=f"mean, {profile.mean:.2f} bits")
    for (name, bits), style in zip(references.items(), _REFERENCE_STYLES, strict=False):
        axes.axvline(bits, label=f"{name}, {bits:.2f} bits", **style)
    beyond = f"; {MAX_BITS} or more in the last bar" if shares[-1] else ""
    axes.set_xlabel(f"loss of a target in bits (0: it was certain and right{beyond})")
    axes.set_ylabel("share of the targets")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.legend(frameon=False)
    return _png(figure)


def draw_positions(profile: Profile, title: str, references: Mapping[str, float]) -> bytes:
    """Draw the mean loss by position in the sequence, beside lines to compare with."""
    figure, axes = _figure(title)
    positions, bits = profile.by_position()
    axes.plot([position + 1 for position in positions], bits, color="#4c78a8", marker="o", markersize=3)
    for (name, level), style in zip(references.items(), _REFERENCE_STYLES, strict=False):
        axes.axhline(level, label=f"{name}, {level:.2f} bits", **style)
    if references:
        axes.legend(frameon=False)
    if positions and positions[-1] > 128:
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the sequence (it falls where the model uses its context)")
    axes.set_ylabel("mean loss in bits")
    return _png(figure)


_REFERENCE_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#e45756", "linestyle": "--"},
    {"color": "#f0a030", "linestyle": "-."},
)


def draw_interval(history: Sequence[Reached], title: str) -> bytes:
    """Draw what every validation has reached, with its interval, so close that the last ones can be told apart."""
    figure, axes = _figure(title)
    steps = [reached.step for reached in history]
    bits, lower, upper = ([getattr(reached, name) for reached in history] for name in ("bits", "lower", "upper"))
    axes.fill_between(steps, lower, upper, color="#4c78a8", alpha=0.25, label="interval")
    axes.plot(steps, bits, color="#4c78a8", marker="o", markersize=3, label="validation")
    # A model that knows nothing is far above; what was reached since is what is asked about.
    late = history[len(history) // 3 :]
    low, high = min(reached.lower for reached in late), max(reached.upper for reached in late)
    axes.set_ylim(low - 0.1 * (high - low) - 1e-6, high + 0.1 * (high - low) + 1e-6)
    axes.set_xlabel("step (the first ones may lie above the picture)")
    axes.set_ylabel("mean loss in bits")
    axes.legend(frameon=False)
    return _png(figure)


def _figure(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # noqa: PLC0415  # Only who draws needs it.

    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# The surprisal page.

_COLUMNS, _ROWS = 88, 26
_CELL = (9, 19)  # Pixels of a character.
_MARGIN = 14
_HEAD = 74  # Pixels above the text, for the title and the scale.
_FONT_SIZE = 15


def draw_page(page: Page, title: str, most: float) -> bytes:
    """Draw text with every token on a colour that says how many bits it cost; dark is hard.

    Args:
        page: The text. A grey line stands where a sequence begins.
        title: What stands above it.
        most: The bits from which on a token has the darkest colour.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415  # What matplotlib itself reads and writes pictures with.

    lines = _lines(page)
    width, height = _COLUMNS * _CELL[0] + 2 * _MARGIN, _HEAD + len(lines) * _CELL[1] + _MARGIN
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font, small = _font(_FONT_SIZE), _font(_FONT_SIZE - 3)
    draw.text((_MARGIN, 8), title, font=small, fill="black")
    _draw_scale(draw, small, most)
    for row, line in enumerate(lines):
        for column, cell in enumerate(line):
            _draw_cell(draw, font, _MARGIN + column * _CELL[0], _HEAD + row * _CELL[1], cell, most)
    buffer = BytesIO()
    # A palette makes the file a third as large, and no colour is seen to change.
    image.quantize(96).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


class _Cell(NamedTuple):
    """A character of a token that cost so many bits; whether a sequence begins with it."""

    character: str
    bits: float
    begins: bool


def _lines(page: Page) -> list[list[_Cell]]:
    """Break the tokens of all sequences into lines of single characters, each with its token's bits."""
    known = _characters()
    lines: list[list[_Cell]] = [[]]
    for texts, costs in zip(page.texts, page.bits, strict=True):
        begins = True
        for character, bits in ((c, bits) for text, bits in zip(texts, costs, strict=True) for c in text):
            if len(lines[-1]) == _COLUMNS:
                lines.append([])
            shown = {"\n": "⏎", "\t": "→"}.get(character, character)
            lines[-1].append(_Cell(shown if ord(shown) in known else "□", bits, begins))
            begins = False
            if character == "\n":
                lines.append([])
        if len(lines) > _ROWS:
            break
    return [line for line in lines if line][:_ROWS]


def _draw_cell(draw: Any, font: Any, x: int, y: int, cell: _Cell, most: float) -> None:
    bottom, background = y + _CELL[1] - 1, _colour(cell.bits / most)
    draw.rectangle((x, y, x + _CELL[0] - 1, bottom), fill=background)
    draw.text((x, y), cell.character, font=font, fill="white" if sum(background) < 380 else "black")
    if cell.begins:
        draw.line((x, y, x, bottom), fill="#7f7f7f")


def _draw_scale(draw: Any, font: Any, most: float) -> None:
    """Draw the colours from nothing to the most, with figures."""
    left, top, length = _MARGIN, 32, 330
    for i in range(length):
        draw.line((left + i, top, left + i, top + 12), fill=_colour(i / length))
    draw.rectangle((left, top, left + length, top + 12), outline="#888888")
    every = max(1, math.ceil(most / 8))
    for bits in range(0, math.floor(most) + 1, every):
        draw.text((left + bits * length / most, top + 15), str(bits), font=font, fill="black", anchor="ma")
    for line, words in enumerate(("bits: light was expected, dark was a surprise", "| a sequence begins")):
        draw.text((left + length + 20, top - 4 + 18 * line), words, font=font, fill="black")


def _colour(share: float) -> tuple[int, int, int]:
    """Return a colour between white, orange and dark red; NaN and what is beyond the scale is the darkest."""
    stops = ((255, 255, 255), (254, 217, 142), (217, 95, 14), (110, 20, 10))
    share = 1.0 if math.isnan(share) else min(1.0, max(0.0, share))
    index = min(int(share * 3), 2)
    rest = share * 3 - index
    low, high = stops[index], stops[index + 1]
    return tuple(round(a + (b - a) * rest) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def _font_path() -> str:
    from matplotlib import get_data_path  # noqa: PLC0415  # It brings a font of fixed width along.

    return f"{get_data_path()}/fonts/ttf/DejaVuSansMono.ttf"


def _font(size: int) -> Any:
    from PIL import ImageFont  # noqa: PLC0415

    return ImageFont.truetype(_font_path(), size)


def _characters() -> set[int]:
    """Return the characters that the font can draw."""
    from matplotlib.ft2font import FT2Font  # noqa: PLC0415

    return set(FT2Font(_font_path()).get_charmap())


def write_page(
    ids: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    scored: Sequence[Sequence[bool]],
    decode: Decode | None,
) -> Page:
    """Return the page of some sequences.

    Args:
        ids: Their tokens.
        losses: The loss of each in nats.
        scored: Whether it counts; what does not is padding, and left out.
        decode: Turns a list of one token into text; None shows its number.
    """
    known: dict[int, str] = {}
    page = Page([], [])
    for row, costs, uses in zip(ids, losses, scored, strict=True):
        kept = [(token, loss) for token, loss, use in zip(row, costs, uses, strict=True) if use]
        for token, _ in kept:
            if token not in known:
                known[token] = f"{token} " if decode is None else str(decode([token]))
        page.texts.append([known[token] for token, _ in kept])
        page.bits.append([loss / math.log(2) for _, loss in kept])
    return page
