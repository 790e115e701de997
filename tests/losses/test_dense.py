"""From what a model returns to one loss per target, judged by `F.cross_entropy` in float64.

Half types are widened and computed in float32, so one tolerance, a few roundings of float32, holds for them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional.text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xent_metrics.functional import cross_entropy, per_target_losses
from xent_metrics.losses import kernels

K = 7
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]

# Scores of a shape in some memory layout, and the dimension that counts classes.
LAYOUTS: dict[str, tuple[Callable[[Callable[..., Tensor]], Tensor], int]] = {
    "one target": (lambda rand: rand(K), -1),
    "one strided target": (lambda rand: rand(2 * K)[::2], 0),
    "rows": (lambda rand: rand(6, K), -1),
    "transposed": (lambda rand: rand(K, 6).t(), 1),
    "expanded": (lambda rand: rand(3, 1, K).expand(3, 4, K), -1),
    "shifted": (lambda rand: rand(3, 5, K)[:, :-1], -1),
    "steps": (lambda rand: rand(6, 2 * K)[::2, ::2], -1),
    "narrow": (lambda rand: rand(2, 3, 2 * K)[:, 1:, 2 : K + 2], 2),
    "classes first": (lambda rand: rand(K, 5), 0),
    "classes second": (lambda rand: rand(3, K, 4), 1),
    "classes second of three, shifted": (lambda rand: rand(3, K, 4)[..., 1:], -2),
    "image": (lambda rand: rand(2, K, 2, 3), 1),
    "channels last": (lambda rand: rand(2, K, 2, 3).contiguous(memory_format=torch.channels_last), 1),
    "four dimensions": (lambda rand: rand(2, 2, 3, K), 3),
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """What is promised of losses that are read in float32; some roundings of float64."""
    return {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-7, "atol": 5e-7}


def judge(preds: Tensor, target: Tensor, class_dim: int, **options: Any) -> Tensor:
    """Losses of `F.cross_entropy` in float64, of target's shape."""
    flat = preds.double().movedim(class_dim, -1).reshape(-1, preds.shape[class_dim])
    if target.is_floating_point():
        flat_target = target.double().movedim(class_dim, -1).reshape(flat.shape)
    else:
        flat_target = target.long().reshape(-1)
    if options.get("class_weight") is not None:
        options["weight"] = options["class_weight"].double()
    options.pop("class_weight", None)
    losses = F.cross_entropy(flat, flat_target, reduction="none", **options)
    shape = list(preds.shape)
    del shape[class_dim]
    return losses.reshape(shape)


def hexadecimal(x: Tensor) -> list[str]:
    """Every bit of every number."""
    return [value.hex() for value in x.flatten().tolist()]


def layouts_and_types() -> Iterator[Any]:
    """Yield layouts and types: of each layout one type, and of each type some layouts; the others are slow."""
    for (i, layout), (j, dtype) in itertools.product(enumerate(LAYOUTS), enumerate(FLOATS)):
        yield pytest.param(layout, dtype, marks=() if i % 4 == j else pytest.mark.slow, id=f"{layout}-{dtype}")


@pytest.mark.parametrize(("layout", "dtype"), [*layouts_and_types()])
def test_equal_to_pytorch_in_float64(dtype: torch.dtype, layout: str) -> None:
    """Losses and their mean are those of `F.cross_entropy`, whatever the layout, target, mask and weights."""
    make, class_dim = LAYOUTS[layout]
    integers = itertools.cycle(INTEGERS)
    for ignore_index, weighing, weighed, smoothing, soft in itertools.product(
        (-100, 0, None, K + 4), (None, torch.bool, torch.int32, torch.float16), (False, True), (0.0, 0.1), (False, True)
    ):
        if soft and ignore_index != -100:
            continue
        preds = make(lambda *shape: (3 * torch.randn(shape)).to(dtype))
        shape = preds.movedim(class_dim, -1).shape[:-1]
        class_weight = torch.rand(K, dtype=dtype) if weighed else None
        if soft:
            target = torch.rand(preds.shape).softmax(class_dim).to(dtype)
        else:
            kind = next(integers)
            target = torch.randint(0, K, shape)
            if ignore_index is not None and ignore_index >= torch.iinfo(kind).min:
                target.masked_fill_(torch.rand(shape) < 0.2, ignore_index)
            target = target.to(kind)
        judged_ignore = -100 if ignore_index is None else ignore_index
        options = {"class_weight": class_weight, "label_smoothing": smoothing}
        expected = judge(preds, target, class_dim, ignore_index=judged_ignore, **options)
        settings = {"class_dim": class_dim, "ignore_index": ignore_index, **options}
        losses = per_target_losses(preds, target, **settings)
        context = f"{settings} {target.dtype} {weighing}"
        assert losses.dtype == torch.float64, context
        close = {**tolerance(dtype), "msg": lambda m, c=context: f"{c}\n{m}"}
        torch.testing.assert_close(losses.double(), expected, **close)

        weight = None if weighing is None else (2 * torch.rand(shape)).to(weighing)
        weights = torch.ones(shape, dtype=torch.float64) if weight is None else weight.double()
        norm = weights
        if not soft:
            norm = weights * (target.long() != judged_ignore)
            if class_weight is not None:
                norm = norm * class_weight.double()[target.long().clamp(0, K - 1)]
        value = cross_entropy(preds, target, weight=weight, **settings)
        pooled = (expected * weights).sum() / norm.sum()
        torch.testing.assert_close(value, pooled, equal_nan=True, **close)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("make", "class_dim"),
    [
        (lambda: torch.randn(2500, 1000), -1),
        (lambda: torch.randn(3, 901, 1000)[:, :-1], -1),
        (lambda: torch.randn(901, 3, 1000)[:-1], -1),
        (lambda: torch.randn(1300, 2, 1000)[..., ::2], -1),
        (lambda: torch.randn(1000, 2500).t(), -1),
        (lambda: torch.randn(1, 1000).expand(2500, 1000), -1),
        (lambda: torch.randn(2, 1000, 1250), 1),
        (lambda: torch.randn(5, 1000, 23, 21)[..., :20], 1),
        (lambda: torch.randn(2, 2_000_000), -1),
    ],
)
def test_more_than_fits_the_buffer(make: Callable[[], Tensor], class_dim: int, soft: bool) -> None:
    """Logits that go through the buffer in several parts give every target its own loss."""
    preds = make()
    shape = preds.movedim(class_dim, -1).shape[:-1]
    target = torch.rand(preds.shape) if soft else torch.randint(0, preds.shape[class_dim], shape)
    if soft:
        target = (target / target.sum(class_dim, keepdim=True)).to(torch.bfloat16)
    losses = per_target_losses(preds, target, class_dim=class_dim, label_smoothing=0.1)
    expected = judge(preds, target, class_dim, label_smoothing=0.1)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_probs_and_probs_are_taken_as_they_are(dtype: torch.dtype) -> None:
    """Log-probabilities and probabilities are not normalised: the loss is minus the (logarithm of the) number given."""
    target = torch.randint(0, K, (4, 5))
    log_probs = torch.randn(4, 5, K).log_softmax(-1).to(dtype)
    probs = 0.01 + 0.9 * torch.rand(4, 5, K).to(dtype)  # Rows do not sum to 1.
    for preds, name, logs in ((log_probs, "log_probs", log_probs.double()), (probs, "probs", probs.double().log())):
        losses = per_target_losses(preds, target, input=name)
        expected = -logs.gather(-1, target[..., None])[..., 0]
        torch.testing.assert_close(losses.double(), expected, **tolerance(dtype))
        soft = torch.rand(4, 5, K).softmax(-1).to(dtype)
        expected = -(logs * (0.9 * soft.double() + 0.1 / K)).sum(-1)
        losses = per_target_losses(preds, soft, input=name, label_smoothing=0.1)
        torch.testing.assert_close(losses.double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (6,), (3, 4)])
def test_losses_pass_through(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Losses that were computed elsewhere come out as they went in, 0 where the target is ignored."""
    losses = torch.randn(shape).to(dtype)
    target = torch.where(torch.rand(shape) < 0.3, 9, torch.randint(0, 9, shape))
    result = per_target_losses(losses, target, input="losses", ignore_index=9)
    assert torch.equal(result, losses.to(result.dtype).masked_fill(target == 9, 0))
    assert result.dtype == torch.float64


def test_eps_clips_probabilities() -> None:
    """With `eps` a probability is clipped to `[eps, 1 - eps]`; without, a probability of 0 is an infinite loss."""
    probs = torch.tensor([[0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    target = torch.tensor([0, 0])
    assert per_target_losses(probs, target, input="probs").tolist() == [math.inf, -math.log(0.25)]
    clipped = per_target_losses(probs, target, input="probs", eps=0.01).tolist()
    assert clipped == pytest.approx([-math.log(0.01), -math.log(0.25)], rel=1e-15)
    clipped = per_target_losses(probs, 1 - target, input="probs", eps=0.01).tolist()
    assert clipped == pytest.approx([-math.log(0.99), -math.log(0.75)], rel=1e-15)


def batchings() -> Iterator[Any]:
    """Yield sizes, types and modes: all of the small, and some of the large; the others are slow."""
    modes, dtypes = ("plain", "smoothed", "weighted", "soft"), (torch.bfloat16, torch.float32, torch.float64)
    for num_classes, (i, dtype), (j, mode) in itertools.product(
        (5, 257, 1025, 32000, 128256), enumerate(dtypes), enumerate(modes)
    ):
        # Of short rows the ones that are summed in chunks are quick, and a third of the others.
        quick = num_classes == 1025 or (num_classes <= 257 and (i + j) % 3 == 0)
        slow = not quick and (num_classes, i, j) not in ((32000, 0, 2), (128256, 1, 0))
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(num_classes, dtype, mode, marks=marks, id=f"{num_classes}-{dtype}-{mode}")


@pytest.mark.parametrize(("num_classes", "dtype", "mode"), [*batchings()])
def test_same_bits_for_any_batching(num_classes: int, dtype: torch.dtype, mode: str) -> None:
    """A loss has the same bits alone, among eight or all, with classes last or second, on any number of threads."""
    rows = 11
    preds = (4 * torch.randn(rows, num_classes)).to(dtype)
    target = torch.randint(0, num_classes, (rows,))
    options: dict[str, Any] = {}
    if mode in ("smoothed", "weighted"):
        options["label_smoothing"] = 0.1
    if mode == "weighted":
        options["class_weight"] = torch.rand(num_classes)
    if mode == "soft":
        target = torch.rand(rows, num_classes).softmax(-1)
    expected = hexadecimal(per_target_losses(preds, target, **options))
    second, soft_second = (x.t().contiguous()[None] if x.dim() == 2 else x[None] for x in (preds, target))
    for threads, size in ((1, 1), (1, 8), (2, rows), (5, 8)):
        torch.set_num_threads(threads)
        last, other = [], []
        for start in range(0, rows, size):
            some = slice(start, start + size)
            last += hexadecimal(per_target_losses(preds[some], target[some], **options))
            other += hexadecimal(per_target_losses(second[..., some], soft_second[..., some], class_dim=1, **options))
        assert last == expected, f"threads={threads} size={size}"
        assert other == expected, f"threads={threads} size={size} class_dim=1"


@pytest.mark.parametrize(("num_classes", "threads", "expected"), [(500_000, 6, 6), (500_000, 1, 2), (1024, 6, 256)])
def test_every_thread_has_a_row(num_classes: int, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a large vocabulary fill a buffer, and all but two threads would have nothing to do."""
    sizes = []
    sum_hard = kernels.sum_hard

    def spy(scores: Tensor, *args: Any, **kwargs: Any) -> kernels.Results:
        sizes.append(len(scores))
        return sum_hard(scores, *args, **kwargs)

    monkeypatch.setattr(kernels, "sum_hard", spy)
    torch.set_num_threads(threads)
    preds = torch.zeros(1, num_classes).expand(2 * expected, num_classes)
    losses = per_target_losses(preds, torch.zeros(2 * expected, dtype=torch.int64))
    assert sizes == [expected] * 2
    assert torch.allclose(losses, torch.full_like(losses, math.log(num_classes)))


def large() -> Iterator[Any]:
    """Yield layouts, options and types: both options in every layout, in one type; the others are slow."""
    layouts = ("contiguous", "shifted", "classes second", "transposed", "soft")
    options = {"-": {}, "all": {"label_smoothing": 0.1, "class_weight": torch.ones(1000)}}
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    for (i, layout), (j, name), (k, dtype) in itertools.product(*map(enumerate, (layouts, options, dtypes))):
        marks = () if (i + j) % 3 == k else pytest.mark.slow
        yield pytest.param(layout, options[name], dtype, marks=marks, id=f"{layout}-{name}-{dtype}")


@pytest.mark.parametrize(("layout", "options", "dtype"), [*large()])
def test_memory_is_a_fixed_buffer(
    layout: str, options: dict[str, Any], dtype: torch.dtype, peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    """Nothing of the size of the logits is ever made: 8 MiB is enough for logits of 16 to 63 MiB, in any layout."""
    preds = torch.randn(8, 1025, 1000).to(dtype)
    class_dim = -1
    if layout == "classes second":
        preds, class_dim = preds.view(8, 1000, 1025), 1
    elif layout == "shifted":
        preds = preds[:, :-1]
    elif layout == "transposed":
        preds = preds.view(1000, -1).t().view(8, 1025, 1000)
    target = torch.randint(0, 1000, preds.movedim(class_dim, -1).shape[:-1])
    if layout == "soft":
        target = torch.full((1, 1, 1), 1e-3).expand(preds.shape)
    peak = peak_bytes(lambda: cross_entropy(preds, target, class_dim=class_dim, **options))
    assert peak < 8 * 2**20 < preds.numel() * dtype.itemsize


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 120.0), (torch.float16, 20.0)])
def test_confidently_wrong_is_finite(dtype: torch.dtype, gap: float) -> None:
    """A gap of logits at which softmax-then-log gives infinity costs that gap."""
    preds = torch.zeros(1, 4, 2, dtype=dtype)
    preds[0, 0, 1] = gap
    target = torch.zeros(1, 4, dtype=torch.int64)
    assert torchmetrics.functional.text.perplexity(preds, target).isinf()
    assert per_target_losses(preds, target)[0, 0].item() == pytest.approx(gap, rel=1e-6)
    assert cross_entropy(preds, target).item() == pytest.approx((gap + 3 * math.log(2)) / 4, rel=1e-6)


class Exponents(TorchDispatchMode):
    """Records the least number of which an exponential is made."""

    def __init__(self) -> None:
        super().__init__()
        self.least = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "aten.exp_" in str(func):
            self.least = min(self.least, args[0].min().item())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_exponentials_that_are_all_but_nothing(dtype: torch.dtype) -> None:
    """On the CPU some results of `exp` take it a hundred times as long: those that add nothing are not made."""
    preds, target = 100 * torch.randn(40, 90, dtype=dtype), torch.randint(1, 90, (40,))
    preds[:, 0], preds[::2, 1:30] = -math.inf, -95.0
    with Exponents() as exponents:
        losses = per_target_losses(preds, target)
    assert -90 < exponents.least < -80
    assert torch.allclose(losses, F.cross_entropy(preds.double(), target, reduction="none"), rtol=2e-7, atol=5e-7)


def test_vocabulary_of_one_costs_nothing() -> None:
    """Where there is one class there is no surprise."""
    assert per_target_losses(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_zero_times_log_zero_is_zero() -> None:
    """A class that neither target nor model gives any probability adds nothing, where PyTorch gives NaN."""
    preds = torch.tensor([[0.0, 0.0, -math.inf]])
    soft = torch.tensor([[0.5, 0.5, 0.0]])
    assert F.cross_entropy(preds, soft).isnan()
    assert per_target_losses(preds, soft).tolist() == pytest.approx([math.log(2)])
    assert per_target_losses(preds, soft.roll(1, 1)).tolist() == [math.inf]


def test_class_of_weight_zero_is_free() -> None:
    """A class of weight 0 adds nothing even where its loss is infinite, to hard, smoothed and soft targets."""
    preds = torch.tensor([[0.0, 0.0, -math.inf]])
    class_weight = torch.tensor([1.0, 1.0, 0.0])
    assert per_target_losses(preds, torch.tensor([2]), class_weight=class_weight).tolist() == [0.0]
    smoothed = per_target_losses(preds, torch.tensor([0]), class_weight=class_weight, label_smoothing=0.3)
    assert smoothed.tolist() == pytest.approx([math.log(2) * 0.9])
    soft = per_target_losses(preds, torch.tensor([[0.2, 0.2, 0.6]]), class_weight=class_weight)
    assert soft.tolist() == pytest.approx([math.log(2) * 0.4])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("last", [1.0, -math.inf])
def test_hard_targets_are_one_hot_soft_targets(last: float, smoothing: float) -> None:
    """A class index is the distribution that is certain of it, also at the ends of `label_smoothing`."""
    preds = torch.tensor([[0.5, -1.0, last]]).expand(3, 3)
    hard = per_target_losses(preds, torch.arange(3), label_smoothing=smoothing)
    soft = per_target_losses(preds, torch.eye(3), label_smoothing=smoothing)
    torch.testing.assert_close(hard, soft)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weight": torch.ones(K)}])
def test_bad_logits_stay_in_their_row(bad: float, options: dict[str, Any]) -> None:
    """NaN and infinite logits neither leak into other rows nor count where the target is ignored or masked."""
    preds = torch.randn(2, 3, K)
    target = torch.randint(0, K, (2, 3))
    clean = per_target_losses(preds, target, **options)
    preds[0, 1] = bad
    losses = per_target_losses(preds, target, **options)
    assert losses[0, 1].isnan()
    keep = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.equal(losses[keep], clean[keep])
    masked = cross_entropy(preds, target, weight=keep, **options)
    target[0, 1] = -100
    assert cross_entropy(preds, target, **options).item() == masked.item()
    assert math.isfinite(masked.item())
    assert per_target_losses(preds, target, **options)[0, 1].item() == 0.0


@pytest.mark.parametrize("shape", [(0, K), (0, 4, K), (3, 0, K), (2, 0, 3, K)])
@pytest.mark.parametrize("soft", [False, True])
def test_empty_batch(shape: tuple[int, ...], soft: bool) -> None:
    """A batch without targets has no losses, and NaN for a mean."""
    preds = torch.randn(shape)
    target = torch.rand(shape) if soft else torch.zeros(shape[:-1], dtype=torch.int64)
    assert per_target_losses(preds, target).shape == shape[:-1]
    assert cross_entropy(preds, target).isnan()


def test_losses_have_no_graph() -> None:
    """Logits that require a gradient come out as plain numbers."""
    preds = torch.randn(3, K, requires_grad=True)
    target = torch.rand(3, K, requires_grad=True).softmax(-1)
    assert not per_target_losses(preds, target).requires_grad
    assert not cross_entropy(preds, target, weight=torch.rand(3, requires_grad=True)).requires_grad


_X, _Y, _M = torch.zeros(3, K), torch.zeros(3, dtype=torch.int64), torch.ones(3)
_W = torch.ones(K)


@pytest.mark.parametrize(
    ("preds", "target", "weight", "options", "error", "text"),
    [
        ([[1.0]], _Y, None, {}, TypeError, r"`preds` must be a tensor, got list; .*torch\.as_tensor"),
        (_X, 3, None, {}, TypeError, r"`target` must be a tensor, got int"),
        (_X.to_sparse(), _Y, None, {}, TypeError, r"`preds` must be a dense .*torch\.sparse_coo; .*to_dense"),
        (_X, _Y.to_sparse(), None, {}, TypeError, r"`target` must be a dense tensor"),
        (_X.long(), _Y, None, {}, TypeError, r"`preds` must be float16, .*torch\.int64; .*\.float\(\)"),
        (_X.bool(), _Y, None, {}, TypeError, r"`preds` must be .*got torch\.bool"),
        (_X.cfloat(), _Y, None, {}, TypeError, r"`preds` must be .*got torch\.complex64"),
        (_X, _Y.bool(), None, {}, TypeError, r"`target` must hold integers .*got torch\.bool; .*\.long\(\)"),
        (_X, _Y.cfloat(), None, {}, TypeError, r"`target` must hold integers .*got torch\.complex64"),
        (_X, _M, None, {}, TypeError, r"`target` must hold integer .*torch\.float32; .*\.long\(\)"),
        (_X, _X[:, 1:], None, {}, ValueError, r"read as soft targets .*\(3, 7\), got \(3, 6\)"),
        (_X, _X.long(), None, {}, ValueError, r"\(3,\) for .* \(3, 7\).* got \(3, 7\); .*one-hot.*argmax"),
        (torch.zeros(2, K, 4), torch.zeros(2, 4).long(), None, {}, ValueError, r"got \(2, 4\); .*fit with class_dim=1"),
        (
            torch.zeros(2, 5, K),
            torch.zeros(2, 4).long(),
            None,
            {},
            ValueError,
            r"shape \(2, 5\) for .* \(2, 5, 7\) .* dimension -1, got \(2, 4\); .*pass preds\[:, :-1\], or .*shift=True",
        ),
        (
            torch.zeros(2, 5, K),
            torch.zeros(2, 5, 1).long(),
            None,
            {},
            ValueError,
            r"\(2, 5, 7\).*\(2, 5, 1\).*target",
        ),
        (torch.zeros(3, 0), _Y, None, {}, ValueError, r"`preds` must have at least one class, .*\(3, 0\)"),
        (torch.tensor(1.0), torch.tensor(1), None, {}, ValueError, r"`class_dim` must be a dimension .*got -1"),
        (_X, _Y, None, {"class_dim": 2}, ValueError, r"`class_dim` must be a dimension .*got 2 for shape \(3, 7\)"),
        (_X, _Y, None, {"class_dim": 1.0}, TypeError, r"`class_dim` must be an integer, got 1\.0"),
        (_X, _Y, None, {"class_dim": None}, TypeError, r"`class_dim` must be an integer, got None"),
        (_X, _Y, None, {"ignore_index": True}, TypeError, r"`ignore_index` must be an integer.*got True"),
        (_X, _Y, None, {"input": "logit"}, ValueError, r"`input` must be one of \['logits', .*got 'logit'"),
        (_X, _Y, None, {"label_smoothing": 1.5}, ValueError, r"`label_smoothing` must be .*\[0, 1\], got 1\.5"),
        (_X, _Y, None, {"label_smoothing": math.nan}, ValueError, r"`label_smoothing` must be .*got nan"),
        (_X, _Y, None, {"label_smoothing": True}, ValueError, r"`label_smoothing` must be .*got True"),
        (_X, _Y, None, {"eps": 0.1}, ValueError, r"`eps` clips probabilities: .*input='probs'.*'logits'"),
        (_X, _Y, None, {"eps": 0.5, "input": "probs"}, ValueError, r"`eps` must be .*\(0, 0\.5\), got 0\.5"),
        (_X, _Y, None, {"class_weight": _W[1:]}, ValueError, r"`class_weight` .*each of the 7 classes, got 6"),
        (_X, _Y, None, {"class_weight": -_W}, ValueError, r"`class_weight` must .*not negative.*got -1\.0"),
        (_X, _Y, None, {"class_weight": _W * math.nan}, ValueError, r"`class_weight` must hold finite .*got nan"),
        (_X, _Y, None, {"class_weight": _W * math.inf}, ValueError, r"`class_weight` must hold finite .*got inf"),
        (_X, _Y, None, {"class_weight": _W.long()}, TypeError, r"`class_weight` must be a 1-D float.*torch\.int64"),
        (_X, _Y, None, {"class_weight": _X}, TypeError, r"`class_weight` must be a 1-D float tensor.*\(3, 7\)"),
        (_X, _Y, None, {"class_weight": [1.0]}, TypeError, r"`class_weight` must be a 1-D float.*list \[1\.0\]"),
        (_M, _Y, None, {"input": "losses", "class_weight": _W}, ValueError, r"`class_weight` must be None"),
        (
            _M,
            _Y,
            None,
            {"input": "losses", "label_smoothing": 0.1},
            ValueError,
            r"`label_smoothing` must .*got 0\.1",
        ),
        (_M, _M, None, {"input": "losses"}, TypeError, r"`target` must hold integers with .*float32"),
        (
            _X,
            _Y,
            None,
            {"input": "losses"},
            ValueError,
            r"`preds` must have target's shape .*\(3, 7\) and \(3,\).*'logits'",
        ),
        (_X, _Y, _M[:2], {}, ValueError, r"`weight` must be broadcastable .*\(3,\), got \(2,\); .*class_weight"),
        (_X, _Y, _X, {}, ValueError, r"`weight` must be broadcastable .*\(3,\), got \(3, 7\)"),
        (_X, _Y, 2.0, {}, TypeError, r"`weight` must be a dense tensor .*got float 2\.0"),
        (_X, _Y, _M.cfloat(), {}, TypeError, r"`weight` must be a dense .*real numbers.*complex64"),
        (_X, _Y, _M.to_sparse(), {}, TypeError, r"`weight` must be a dense tensor"),
        (_X, _Y.to("meta"), None, {}, ValueError, r"must be on one device, got cpu and meta; .*\.to\(\)"),
        (_X, _Y, _M.to("meta"), {}, ValueError, r"`weight` must be on .*cpu, got meta; .*\.to\(\)"),
        (
            _X.to("meta"),
            _Y.to("meta"),
            None,
            {"class_weight": _W},
            ValueError,
            r"`class_weight` must be on .*meta.*cpu",
        ),
        (_X, _Y, None, {"unit": "bit"}, ValueError, r"`unit` must be one of \['nats', 'bits'\], got 'bit'"),
        (_X, _Y, None, {"nan_policy": "ignore"}, ValueError, r"`nan_policy` must be one of .*got 'ignore'"),
    ],
)
def test_errors_say_what_would_fit(
    preds: Any, target: Any, weight: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """An error names the argument, the rule, what was passed and what would do."""
    with pytest.raises(error, match=text):
        cross_entropy(preds, target, weight=weight, **options)
