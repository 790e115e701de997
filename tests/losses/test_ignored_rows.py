"""Rows of logits whose targets are left out: on the CPU they are not looked at, and the others keep every bit.

Which rows are where in memory is found from strides, so that layouts matter. Nothing here is timed.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.instruments import Operators
from tests.losses.test_dense import FLOATS, hexadecimal, judge, tolerance
from xent_metrics import CrossEntropy, CrossEntropyReport
from xent_metrics.functional import cross_entropy, per_target_losses
from xent_metrics.losses import rows
from xent_metrics.tally.tally import COUNTS, NUM_SUM_LIMBS

ENOUGH = 2**17  # Logits from which on rows are left out.

# Logits of so many rows and classes in some memory layout, and the dimension that counts classes.
Layout = Callable[[Callable[..., Tensor], int, int], Tensor]
LAYOUTS: dict[str, tuple[Layout, int]] = {
    "rows": (lambda rand, n, k: rand(6 * n, k), -1),
    "sequences": (lambda rand, n, k: rand(6, n, k), -1),
    "one sequence": (lambda rand, n, k: rand(1, 6 * n, k), -1),
    "sequences of one": (lambda rand, n, k: rand(6 * n, 1, k), -1),
    "four dimensions": (lambda rand, n, k: rand(2, 3, n, k), -1),
    "classes second": (lambda rand, n, k: rand(6, k, n), 1),
    "channels last": (lambda rand, n, k: rand(2, k, 3, n).contiguous(memory_format=torch.channels_last), 1),
    "classes first": (lambda rand, n, k: rand(k, 6 * n), 0),
    "time first": (lambda rand, n, k: rand(n, 6, k).transpose(0, 1), -1),
    "batch last": (lambda rand, n, k: rand(6, n, k).transpose(0, 1), -1),
    "permuted": (lambda rand, n, k: rand(2, 3, n, k).permute(2, 0, 1, 3), -1),
    "every other position": (lambda rand, n, k: rand(6, 2 * n, k)[:, ::2], -1),
    "every other row, from the second": (lambda rand, n, k: rand(12 * n, k)[1::2], -1),
    "every other class": (lambda rand, n, k: rand(6 * n, 2 * k)[..., ::2], -1),
    "first half of classes": (lambda rand, n, k: rand(6 * n, 2 * k)[:, :k], -1),
    "second third of classes": (lambda rand, n, k: rand(6, n, 3 * k)[..., k : 2 * k], -1),
    "all but one class": (lambda rand, n, k: rand(6 * n, k + 1)[:, 1:], -1),
    "without the last position": (lambda rand, n, k: rand(6, n + 1, k)[:, :-1], -1),
    "behind an offset": (lambda rand, n, k: rand(6 * n * k + 7)[7:].view(6, n, k), -1),
    "one row again and again": (lambda rand, n, k: rand(1, k).expand(6 * n, k), -1),
    "one sequence again and again": (lambda rand, n, k: rand(1, n, k).expand(6, n, k), -1),
    "one position again and again": (lambda rand, n, k: rand(6, 1, k).expand(6, n, k), -1),
    "one class again and again": (lambda rand, n, k: rand(6 * n, 1).expand(6 * n, k), -1),
    "a size of 1 with an odd stride": (lambda rand, n, k: rand(6 * n * k).as_strided((6 * n, 1, k), (k, 3, 1)), -1),
    "rows that overlap": (lambda rand, n, k: rand(6 * n + k).as_strided((6 * n, k), (1, 1)), -1),
    "blocks that overlap": (lambda rand, n, k: rand((6 + n) * k).as_strided((6, n, k), (k, k, 1)), -1),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def padding(shape: torch.Size) -> Tensor:
    """Leave out the ends of sequences, each of its own length."""
    length = shape[-1] if shape else 1
    return torch.arange(length) >= torch.randint(0, length + 1, (*shape[:-1], 1))


def only(*kept: int) -> Callable[[torch.Size], Tensor]:
    """Leave out all but some rows, counted in row-major order."""

    def mask(shape: torch.Size) -> Tensor:
        ignored = torch.ones(shape.numel(), dtype=torch.bool)
        ignored[list(kept)] = False
        return ignored.view(shape)

    return mask


def share(of: float) -> Callable[[torch.Size], Tensor]:
    """Leave out about so many of the rows, at random."""
    return lambda shape: torch.rand(shape) < of


MASKS: dict[str, Callable[[torch.Size], Tensor]] = {
    **{f"{of:.1%}": share(of) for of in (0.0, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0)},
    "padding": padding,
    "all but the first": only(0),
    "all but the last": only(-1),
    "all but one": only(17),
    "all but three in a row": only(7, 8, 9),
    "every other": lambda shape: (torch.arange(shape.numel()) % 2 == 0).view(shape),
}


class Normalized(TorchDispatchMode):
    """Counts the scores whose exponentials are taken, and records where the first of each block is."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = 0
        self.starts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "softmax" in str(func):
            self.scores += args[0].numel()
            self.starts.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


def make_batch(layout: str, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Make enough logits in a layout, and a target for each row."""
    make, class_dim = LAYOUTS[layout]
    preds = make(lambda *shape: (3 * torch.randn(shape)).to(dtype), -(-ENOUGH // (6 * num_classes)) + 3, num_classes)
    assert preds.numel() >= ENOUGH
    return preds, torch.randint(0, num_classes, preds.movedim(class_dim, -1).shape[:-1]), class_dim


# Values.


def sizes_and_layouts() -> Iterator[Any]:
    """Yield numbers of classes and layouts: few classes in every layout, others in some; the rest are slow."""
    for num_classes, (i, layout) in itertools.product((1, 5, 50257), enumerate(LAYOUTS)):
        slow = i % 2 == 1 if num_classes == 5 else i % 5 != (num_classes > 5)
        yield pytest.param(num_classes, layout, marks=pytest.mark.slow if slow else (), id=f"{num_classes}-{layout}")


@pytest.mark.parametrize(("num_classes", "layout"), [*sizes_and_layouts()])
def test_every_bit_is_kept(num_classes: int, layout: str) -> None:
    """A row that is scored has the bits that it has if nothing is ignored; others are 0, and cost next to nothing."""
    for dtype in FLOATS if num_classes == 5 else FLOATS[1:3]:
        preds, target, class_dim = make_batch(layout, num_classes, dtype)
        before = preds.clone()
        expected = per_target_losses(preds, target, class_dim=class_dim)
        for name, mask in MASKS.items():
            ignored = mask(target.shape)
            with Normalized() as normalized:
                found = per_target_losses(preds, target.masked_fill(ignored, -100), class_dim=class_dim)
            assert torch.equal(found, expected.masked_fill(ignored, 0)), f"{dtype} {name}"
            scored = int((~ignored).sum())
            blocks = 1 + scored * num_classes // 2**17
            if scored <= 0.75 * target.numel():
                assert normalized.scores <= (scored + blocks) * num_classes, f"{dtype} {name}"
        assert torch.equal(preds, before), dtype


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"class_weight": torch.linspace(0, 2, 1000)},
    "smoothed and weighted": {"label_smoothing": 0.1, "class_weight": torch.linspace(0, 2, 1000)},
    "another index": {"ignore_index": 3},
    "one that is no class": {"ignore_index": 5000, "label_smoothing": 1.0},
}


def types_and_options() -> Iterator[Any]:
    """Yield types and options: of all options one type each; the others are slow."""
    for (i, dtype), (j, name) in itertools.product(enumerate(FLOATS), enumerate(OPTIONS)):
        marks = () if i == j % 4 else pytest.mark.slow
        yield pytest.param(dtype, OPTIONS[name], marks=marks, id=f"{dtype}-{name}")


@pytest.mark.parametrize(("dtype", "options"), [*types_and_options()])
def test_equal_to_pytorch_in_float64(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Losses are those of `F.cross_entropy` with the same `ignore_index`, whatever the share of ignored rows."""
    for layout, mask in itertools.product(("sequences", "classes second", "batch last"), MASKS.values()):
        preds, target, class_dim = make_batch(layout, 1000, dtype)
        target = target.masked_fill(mask(target.shape), options.get("ignore_index", -100))
        found = per_target_losses(preds, target, class_dim=class_dim, **options)
        expected = judge(preds, target, class_dim, **options)
        torch.testing.assert_close(found.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["smoothed and weighted"]], ids=["plain", "all"])
def test_a_metric_of_the_scored_rows_alone(options: dict[str, Any], mask: Callable[[torch.Size], Tensor]) -> None:
    """A metric that is given only the rows that count has the same state, but for how many were ignored."""
    preds, target, _ = make_batch("rows", 1000, torch.float32)
    ignored, weight = mask(target.shape), torch.rand(target.shape)
    metric, other = CrossEntropy(**options), CrossEntropy(**options)
    metric.update(preds, target.masked_fill(ignored, -100), weight=weight)
    other.update(preds[~ignored], target[~ignored], weight=weight[~ignored])
    expected = other.tally.state.clone()
    expected[NUM_SUM_LIMBS + COUNTS.index("ignored")] = ignored.sum()
    assert torch.equal(metric.tally.state, expected)


def test_shift() -> None:
    """Of sequences whose next labels are ignored, the positions before them are not looked at."""
    preds, labels = torch.randn(4, 66, 1000), torch.randint(0, 1000, (4, 66))
    for name, mask in MASKS.items():
        labels = labels.masked_fill(mask(labels.shape), -100) if name != "all but one" else labels
        metric, other = CrossEntropy(shift=True), CrossEntropy()
        metric.update(preds, labels)
        other.update(preds[:, :-1].contiguous(), labels[:, 1:])
        assert torch.equal(metric.tally.state, other.tally.state), name


@pytest.mark.parametrize("options", [{"input": "log_probs"}, {"input": "probs"}, {"input": "probs", "eps": 0.01}])
@pytest.mark.parametrize("class_dim", [1, 2])
def test_probabilities(class_dim: int, options: dict[str, Any]) -> None:
    """Rows of probabilities and of their logarithms keep their bits, and are not changed where they are clipped."""
    preds = torch.randn(4, 64, 1000).softmax(-1)
    preds = (preds.log() if options["input"] == "log_probs" else preds).movedim(-1, class_dim)
    target = torch.randint(0, 1000, (4, 64))
    before, expected = preds.clone(), per_target_losses(preds, target, class_dim=class_dim, **options)
    for name, mask in MASKS.items():
        ignored = mask(target.shape)
        found = per_target_losses(preds, target.masked_fill(ignored, -100), class_dim=class_dim, **options)
        assert torch.equal(found, expected.masked_fill(ignored, 0)), name
    assert torch.equal(preds, before)


@pytest.mark.parametrize("eps", [None, 0.01])
@pytest.mark.parametrize("bad", [-0.5, 1.5])
def test_improper_probabilities(bad: float, eps: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One counts in a row that is scored and is nobody's business in one that is not."""
    monkeypatch.setattr("xent_metrics._runtime.raises_eagerly", lambda _: False)
    preds, target = torch.randn(256, 1000).softmax(-1), torch.randint(0, 1000, (256,))
    rows = torch.tensor([3, 4, 40, 255])
    preds[rows, 7] = bad
    ignored = torch.rand(256) < 0.5
    ignored[rows] = torch.tensor([True, False, True, False])
    metric = CrossEntropy(input="probs", eps=eps)
    metric.update(preds, target.masked_fill(ignored, -100))
    totals = metric.tally.totals()
    assert (totals.improper, totals.ignored) == (2, int(ignored.sum()))
    assert totals.scored == 256 - totals.improper - totals.ignored
    with pytest.raises(ValueError, match="those of 2 targets did not"):
        metric.compute()


def test_targets_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are no classes raise; where they are counted instead, the other rows have their bits."""
    preds, target = torch.randn(256, 1100), torch.randint(0, 1100, (256,))
    metric, clean = CrossEntropy(), CrossEntropy()
    bad = target.clone()
    bad[::2], bad[1::16] = -100, 1100
    with pytest.raises(ValueError, match="got 16 that are neither, such as 1100"):
        metric.update(preds, bad)
    monkeypatch.setattr("xent_metrics._runtime.raises_eagerly", lambda _: False)
    with Normalized() as normalized:
        metric.update(preds, bad)
    assert normalized.scores == 112 * 1100
    clean.update(preds, bad.masked_fill(bad == 1100, -100))
    totals = metric.tally.totals()
    assert totals._replace(ignored=0, out_of_range=0) == clean.tally.totals()._replace(ignored=0)
    assert (totals.scored, totals.ignored, totals.out_of_range) == (112, 128, 16)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["rows", "classes second", "batch last"])
def test_bad_logits_stay_in_their_row(layout: str, bad: float) -> None:
    """NaN and infinite logits count where they are scored and nowhere else."""
    preds, target, class_dim = make_batch(layout, 1000, torch.float32)
    ignored = torch.rand(target.shape) < 0.5
    expected = per_target_losses(preds, target, class_dim=class_dim).masked_fill(ignored, 0)
    rows = preds.movedim(class_dim, -1)
    rows[ignored] = bad
    target = target.masked_fill(ignored, -100)
    assert torch.equal(per_target_losses(preds, target, class_dim=class_dim), expected)
    assert cross_entropy(preds, target, class_dim=class_dim).isfinite()
    where = tuple((~ignored).nonzero()[0])
    rows[where] = bad
    found = per_target_losses(preds, target, class_dim=class_dim)
    assert found[where].isnan()
    assert found.isnan().sum() == 1


def test_one_ignored_target_of_a_large_vocabulary() -> None:
    """A row without any other dimension can be ignored too."""
    preds = torch.randn(ENOUGH)
    assert per_target_losses(preds, torch.tensor(-100)).item() == 0.0
    assert cross_entropy(preds, torch.tensor(-100)).isnan()


def test_losses_have_no_graph() -> None:
    """Logits that require a gradient come out as plain numbers, and are read where they are."""
    preds = (torch.randn(256, 1000, requires_grad=True) * 2).view(4, 64, 1000)
    target = torch.randint(0, 1000, (4, 64))
    target[:, ::2] = -100
    for scores in (preds, preds.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not per_target_losses(scores, target).requires_grad


# Where rows are, of few, so that every choice can be tried.


@pytest.fixture(name="_of_few")
def _leave_out_rows_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out rows of any number of logits, and have room for three rows of three float32 at a time."""
    monkeypatch.setattr(rows, "_FEW_SCORES", 0)
    monkeypatch.setitem(rows._SIZES, "cpu", rows._SIZES["cpu"]._replace(buffer=3 * 3 * 4))


def assert_rows_are_found(scores: Tensor, kept: Tensor, class_dim: int = -1) -> None:
    """Compare the losses of some rows with those of a copy of these rows alone."""
    rows = scores.movedim(class_dim, -1)
    shape, num_classes = rows.shape[:-1], rows.shape[-1]
    target = torch.arange(shape.numel()) % num_classes
    places = kept.nonzero().squeeze(1)
    found = per_target_losses(scores, target.masked_fill(~kept, -100).view(shape), class_dim=class_dim)
    alone = rows[torch.unravel_index(places, shape)].reshape(len(places), num_classes)
    expected = torch.zeros(len(kept), dtype=found.dtype)
    expected[places] = per_target_losses(alone, target[places])
    assert hexadecimal(found) == hexadecimal(expected), (shape, scores.stride(), places)


@pytest.mark.usefixtures("_of_few")
@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.slow if i % 2 else ()) for i, x in enumerate(LAYOUTS)]
)
def test_every_choice_of_rows(layout: str) -> None:
    """Of six rows, every subset is found where it is."""
    make, class_dim = LAYOUTS[layout]
    for dtype in (torch.float32, torch.bfloat16):
        scores = make(lambda *shape: torch.randn(shape).to(dtype), 1, 3)  # noqa: B023  # Called here.
        for kept in itertools.product((False, True), repeat=6):
            assert_rows_are_found(scores, torch.tensor(kept), class_dim)


@pytest.mark.usefixtures("_of_few")
@pytest.mark.parametrize(
    "shape", [(2, 3), (2, 1, 3), *(pytest.param(x, marks=pytest.mark.slow) for x in ((3, 2), (3, 3), (1, 5), (5, 1)))]
)
def test_every_order_of_dimensions(shape: tuple[int, ...]) -> None:
    """Rows that are not in the order of memory, of which some can look as if they followed each other."""
    for order in itertools.permutations(range(len(shape))):
        scores = torch.randn(*shape, 3).permute(*order, len(shape))
        for kept in itertools.product((False, True), repeat=scores.shape[:-1].numel()):
            assert_rows_are_found(scores, torch.tensor(kept))


@pytest.mark.usefixtures("_of_few")
@pytest.mark.slow
def test_any_strides() -> None:
    """Dimensions that step anywhere, backwards over each other or not at all, from anywhere in memory."""
    memory = torch.randn(500)
    for _ in range(1000):
        shape = torch.randint(1, 5, (int(torch.randint(1, 4, ())),)).tolist()
        strides = (torch.randint(0, 9, (len(shape),)) * (3 if torch.rand(()) < 0.8 else 1)).tolist()
        offset = int(torch.randint(0, 20, ()))
        scores = memory.as_strided((*shape, 3), (*strides, 1), offset)
        assert_rows_are_found(scores, torch.rand(math.prod(shape)) < torch.rand(()))


# Costs.


def large() -> Iterator[Any]:
    """Yield layouts, numbers of rows and classes, and types: both sizes in every layout; the others are slow."""
    layouts = ("sequences", "classes second", "batch last", "all but one class")
    sizes, dtypes = ((2048, 8000), (64, 128256)), (torch.bfloat16, torch.float32, torch.float64)
    for (i, layout), (j, size), (k, dtype) in itertools.product(*map(enumerate, (layouts, sizes, dtypes))):
        marks = () if (i + j) % 3 == k else pytest.mark.slow
        yield pytest.param(layout, *size, dtype, marks=marks, id=f"{layout}-{size}-{dtype}")


@pytest.mark.parametrize(("layout", "num_rows", "num_classes", "dtype"), [*large()])
def test_memory_is_a_fixed_buffer(
    layout: str,
    num_rows: int,
    num_classes: int,
    dtype: torch.dtype,
    peak_bytes: Callable[[Callable[[], object]], int],
) -> None:
    """An update takes 8 MiB and 64 bytes a row at most, whatever is ignored."""
    make, class_dim = LAYOUTS[layout]
    preds = make(lambda *shape: torch.zeros(shape, dtype=dtype), num_rows // 6, num_classes)
    shape = preds.movedim(class_dim, -1).shape[:-1]
    for of in (0.3, 1.0):
        target = torch.randint(0, num_classes, shape).masked_fill(share(of)(shape), -100)
        metric = CrossEntropyReport(class_dim=class_dim)
        peak = peak_bytes(lambda m=metric, t=target: m.update(preds, t))
        assert peak <= 8 * 2**20 + 64 * target.numel(), of


FIRST_UPDATES = """
import tracemalloc, torch
from xent_metrics import CrossEntropy, LinearLogits
preds, target = torch.randn(8, 20, 1024), torch.arange(160).view(8, 20) % 2 * 101 - 100
metric, hidden = CrossEntropy(), torch.randn(8, 21, 4)[:, 1:]
metric.update(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))  # What every first update imports.
tracemalloc.start()
for scores in (preds, preds.mT.contiguous().mT, LinearLogits(hidden, torch.randn(9, 4))):
    metric.update(scores, target)
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.slow
def test_first_update_that_skips_rows_holds_no_more_than_others() -> None:
    """In any layout Python's memory stays small: some functions of PyTorch import 33 MB when they are first called."""
    command = [sys.executable, "-W", "ignore", "-c", FIRST_UPDATES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**18


@pytest.mark.parametrize("layout", ["rows", "sequences of one", "classes second", "batch last", "all but one class"])
@pytest.mark.parametrize("of", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_ignored_rows_are_not_looked_at(of: float, layout: str) -> None:
    """As many rows are normalised as are scored, and one more at most, of those that stand alone in a block."""
    preds, target, class_dim = make_batch(layout, 1100, torch.float32)
    target[torch.rand(target.shape).view(-1).argsort().view(target.shape) < of * target.numel()] = -100
    metric = CrossEntropy(class_dim=class_dim)
    with Normalized() as normalized:
        metric.update(preds, target)
    scored = metric.tally.totals().scored
    assert scored == pytest.approx((1 - of) * target.numel(), abs=1)
    assert 0 <= normalized.scores - scored * 1100 <= 1100


def test_all_rows_are_read_where_few_are_ignored() -> None:
    """A quarter is left out at least: below that, gathering the others would cost more."""
    preds, target, _ = make_batch("rows", 1100, torch.float32)
    target[: len(target) // 5] = -100
    with Normalized() as normalized:
        CrossEntropy().update(preds, target)
    assert normalized.scores == preds.numel()


@pytest.mark.parametrize(("num_rows", "num_classes"), [(256, 1000), (2000, 1000), (40, 128256)])
def test_nothing_is_asked_where_nothing_is_ignored(num_rows: int, num_classes: int, operators: Operators) -> None:
    """With targets that are all classes, an `ignore_index` costs no operator."""
    preds, target = torch.zeros(num_rows, num_classes), torch.randint(0, num_classes, (num_rows,))
    counts = []
    for ignore_index in (-100, None):
        metric = CrossEntropy(ignore_index=ignore_index)
        metric.update(preds, target)
        operators.counts.clear()
        with operators:
            metric.update(preds, target)
        counts.append(dict(operators.counts))
        assert operators.count("aten.nonzero") == operators.count("aten.index.Tensor") == 0
    assert counts[0] == counts[1]
