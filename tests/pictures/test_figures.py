"""What a validation's pictures are drawn from, against plain Python, and the files that are drawn."""

import math
from io import BytesIO

import pytest
import torch
from PIL import Image
from torch import Tensor

from xent_metrics.page import Piece
from xent_metrics.pictures.figures import draw_distribution, draw_interval, draw_positions
from xent_metrics.pictures.surprisal import draw_page
from xent_metrics.validation_stats import (
    BINS_PER_BIT,
    MAX_BITS,
    LossHistogram,
    ValidationPoint,
    ValidationStats,
)

LN_2 = math.log(2)


def losses_of(bits: list[list[float]], ignored: list[list[bool]] | None = None) -> tuple[Tensor, Tensor]:
    """Losses of so many bits, and which of them are scored."""
    loss = torch.tensor(bits, dtype=torch.float64) * LN_2
    return loss, torch.ones(loss.shape, dtype=torch.bool) if ignored is None else ~torch.tensor(ignored)


def random_losses(sequences: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Losses of which a fifth is ignored."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.empty(sequences, length).exponential_(0.4, generator=generator)
    return loss, torch.rand(sequences, length, generator=generator) >= 0.2


def test_shares_are_those_of_the_scored_losses() -> None:
    """Every bin of a quarter of a bit has as many targets as plain Python counts."""
    loss, scored = random_losses(30, 17)
    kept = [x / LN_2 for row, uses in zip(loss.tolist(), scored.tolist(), strict=True)
            for x, use in zip(row, uses, strict=True) if use]  # fmt: skip
    expected = [0] * (BINS_PER_BIT * MAX_BITS + 1)
    for bits in kept:
        expected[min(int(bits * BINS_PER_BIT), BINS_PER_BIT * MAX_BITS)] += 1
    shares = LossHistogram.of(loss, scored).shares()
    assert shares == [count / len(kept) for count in expected]
    assert sum(shares) == pytest.approx(1)


def test_infinite_and_nan_losses_are_in_the_last_bin_and_in_no_mean() -> None:
    """One target that cannot be drawn does not spoil the picture of the others."""
    histogram = LossHistogram.of(*losses_of([[1.0, math.inf], [3.0, math.nan], [2.0, 1000.0], [2.0, -math.inf]]))
    assert histogram.shares()[-1] == 4 / 8
    assert histogram.mean == pytest.approx((1 + 3 + 2 + 2 + 2 * MAX_BITS) / 5)
    positions, means = histogram.by_position()
    assert positions == [0, 1]
    assert means == pytest.approx([2.0, 2 * MAX_BITS])  # What is off the scale counts as twice the scale.


def test_means_by_position_are_those_of_plain_python() -> None:
    """Early positions have a bucket each, later ones share one; the mean is over all targets in it."""
    loss, scored = random_losses(7, 70)
    positions, means = LossHistogram.of(loss, scored).by_position()
    assert positions[:16] == list(range(16))
    assert positions[16:20] == [16.5, 18.5, 20.5, 22.5]
    assert positions[-1] == 67.5  # 64 to 71, of which six are there.
    for first, last, mean in ((3, 3, means[3]), (16, 17, means[16]), (32, 35, means[24]), (64, 69, means[-1])):
        columns = slice(first, last + 1)
        kept = loss[:, columns][scored[:, columns]].double() / LN_2
        assert mean == pytest.approx(kept.mean().item(), abs=2e-6)


def test_far_positions_have_a_bucket() -> None:
    """A sequence of any length fits; what is beyond the last bucket is in it."""
    long = [x.expand(1, 2**20 + 100) for x in losses_of([[1.0]])]
    positions, means = LossHistogram.of(*long).by_position()
    assert positions == sorted(positions)
    assert len(positions) == 144
    assert means == pytest.approx([1.0] * 144, abs=2e-6)


def test_profiles_add_up_exactly_in_any_order() -> None:
    """Batches, loaders and ranks are a sum of integers."""
    parts = [LossHistogram.of(*random_losses(4, 9, seed)) for seed in range(3)]
    zero = LossHistogram.zero(torch.device("cpu"))
    one, other = zero + parts[0] + parts[1] + parts[2], parts[2] + (parts[1] + parts[0])
    assert torch.equal(one.state, other.state)
    assert one.shares() == other.shares()
    assert zero.by_position() == ([], [])
    assert set(zero.shares()) == {0.0}


def test_gathering_waits_for_no_device() -> None:
    """On the meta device whatever depends on data raises."""
    losses = [x.to("meta") for x in random_losses(3, 5)]
    stats = ValidationStats(torch.device("meta"), counts_classes=True)
    stats.add(*losses, torch.zeros(3, 5, dtype=torch.int64, device="meta"), 11)
    stats.leave_out(2)
    assert stats.class_counts.shape == (11,)


def test_classes_are_counted_where_they_are_scored() -> None:
    """Padding is no class, whatever its index, and what is beyond the classes is counted apart."""
    losses = losses_of([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [[False, False, True], [False, True, True]])
    ids = torch.tensor([[0, 2, -100], [2, -100, 4]])
    stats = ValidationStats(torch.device("cpu"), counts_classes=True)
    stats.add(*losses, ids, 5)
    assert (stats.class_counts.tolist(), int(stats.num_beyond)) == ([1, 0, 2, 0, 0], 0)
    stats.add(*losses, ids, 2)  # Another loader has fewer classes, or more.
    assert (stats.class_counts.tolist(), int(stats.num_beyond)) == ([2, 0, 2, 0, 0], 2)
    stats.add(*losses, ids, 6)
    assert (stats.class_counts.tolist(), int(stats.num_beyond)) == ([3, 0, 4, 0, 0, 0], 2)


def opened(png: bytes) -> Image.Image:
    """Read a picture back."""
    image = Image.open(BytesIO(png))
    image.load()
    return image


@pytest.mark.parametrize("references", [{}, {"uniform": 6.69, "unigram": 4.6}])
@pytest.mark.parametrize("draw", [draw_distribution, draw_positions])
@pytest.mark.parametrize(
    "histogram", [LossHistogram.zero(torch.device("cpu")), LossHistogram.of(*random_losses(30, 200))]
)
def test_drawings_are_small_files(draw, histogram, references) -> None:
    """Also of nothing, and without a line to compare with."""
    png = draw(histogram, "A title", references)
    assert opened(png).size == (700, 360)
    assert len(png) < 60_000


def test_the_intervals_of_the_last_validations_fill_their_picture() -> None:
    """A first validation of a model that knows nothing does not press the others flat."""
    late = [ValidationPoint(step, 2.0, 1.96, 2.04) for step in range(100, 700, 100)]
    pictures = [
        opened(draw_interval([ValidationPoint(0, first, first, first), *late], "A title")) for first in (2.01, 6.69)
    ]
    heights = []
    for picture in pictures:
        column = [picture.convert("RGB").getpixel((500, y)) for y in range(picture.height)]
        heights.append(sum(blue > red + 20 for red, _, blue in column))
    assert heights[0] == pytest.approx(heights[1], abs=10)
    assert min(heights) > 150


def test_drawing_does_not_touch_pyplot(monkeypatch) -> None:
    """Its global state belongs to the user."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)  # An import of it then fails.
    draw_distribution(LossHistogram.of(*random_losses(3, 3)), "A title", {})
    draw_positions(LossHistogram.of(*random_losses(3, 3)), "A title", {})
    draw_interval([ValidationPoint(0, 2.0, 1.0, 3.0)] * 2, "A title")
    draw_page([[Piece("a", 1.0, (0,))]], "A title", 8.0)
