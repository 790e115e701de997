"""Logits that are made where they are scored: values, rows that are multiplied, memory.

The judge is `F.cross_entropy(F.linear(...))` in float64. Nothing here is timed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

import xent_metrics
from tests.cases import CASES, GROUPS, TOKEN_BYTES, Batch, Case, make_batches, numbers
from tests.instruments import Operators
from tests.losses.test_dense import FLOATS, judge, tolerance
from xent_metrics import BitsPerToken, CrossEntropy, CrossEntropyDifference, LinearLogits, Perplexity, functional
from xent_metrics.functional import cross_entropy, per_target_losses
from xent_metrics.lightning import CrossEntropyMonitor

D, V = 5, 7

# What goes into the head, in some memory layout.
HIDDEN: dict[str, Callable[[], Tensor]] = {
    "one target": lambda: torch.randn(D),
    "one row": lambda: torch.randn(1, D),
    "rows": lambda: torch.randn(6, D),
    "sequences": lambda: torch.randn(3, 4, D),
    "cut short": lambda: torch.randn(3, 5, D)[:, :-1],
    "transposed": lambda: torch.randn(D, 6).t(),
    "steps": lambda: torch.randn(6, 2 * D)[::2, ::2],
    "expanded": lambda: torch.randn(3, 1, D).expand(3, 4, D),
    "four dimensions": lambda: torch.randn(2, 2, 3, D),
}


class Matmuls(TorchDispatchMode):
    """Records the rows and columns of each matmul of a head, and where its result goes.

    A tally has one of its own, of the digits of loss and weight, which are eight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.columns: set[int] = set()
        self.buffers: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_matmul = str(func).startswith(("aten.mm", "aten.addmm", "aten.bmm", "aten.linear", "aten.matmul"))
        if is_matmul and result.shape != (8, 8):
            self.rows.append(result.shape[:-1].numel())
            self.columns.add(result.shape[-1])
            self.buffers.add(result.data_ptr())
        return result


def make_head(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """Make the weight and the bias of a head."""
    return torch.randn(V, D).to(dtype), torch.randn(V).to(dtype) if bias else None


def make_target(shape: torch.Size, soft: bool, ignored: float) -> Tensor:
    """Make targets, some of them ignored."""
    if soft:
        return torch.rand(*shape, V, dtype=torch.float64).softmax(-1)
    return torch.randint(0, V, shape).masked_fill(torch.rand(shape) < ignored, -100)


# Values.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", HIDDEN)
def test_losses_are_those_of_the_products(layout: str, dtype: torch.dtype) -> None:
    """Equal to PyTorch in float64; in half precision with logits that are rounded, as `F.linear` rounds the model's."""
    for bias, ignored, weighed, smoothing, soft in itertools.product(
        (False, True), (0.0, 0.4, 1.0), (False, True), (0.0, 0.1), (False, True)
    ):
        hidden, head = HIDDEN[layout]().to(dtype), make_head(dtype, bias)
        half = dtype in (torch.float16, torch.bfloat16)
        logits = (
            F.linear(hidden, *head) if half else F.linear(*(x if x is None else x.double() for x in (hidden, *head)))
        )
        target = make_target(hidden.shape[:-1], soft, ignored)
        options = {"class_weight": torch.rand(V) if weighed else None, "label_smoothing": smoothing}
        losses = per_target_losses(LinearLogits(hidden, *head), target, **options)
        assert losses.dtype == torch.float64
        expected = judge(logits, target, -1, **options)
        torch.testing.assert_close(losses.double(), expected, **tolerance(dtype), msg=lambda m, o=options: f"{o}\n{m}")


def factored(case: Case) -> Case:
    """Let a case have its classes last, as a head gives them."""
    last = {name: {k: v for k, v in getattr(case, name).items() if k != "class_dim"} for name in ("options", "data")}
    return case._replace(**last)


def factorize(batch: Batch) -> Batch:
    """Give a batch factors for its logits, which must have as many columns as classes."""
    return {name: factors(x) if name.startswith("preds") else x for name, x in batch.items()}


def factors(logits: Tensor) -> LinearLogits:
    """Return a head with a bias, and what has to go into it."""
    num_classes = logits.shape[-1]
    weight = torch.linalg.qr(torch.randn(num_classes, num_classes, dtype=logits.dtype)).Q  # Its inverse is weight.T.
    bias = torch.randn(num_classes, dtype=logits.dtype)
    return LinearLogits((logits - bias) @ weight, weight, bias)


OF_LOGITS = {
    name: factored(case)
    for name, case in CASES.items()
    if "input" not in case.options and not name.startswith("BinaryCrossEntropy")
}


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("case", OF_LOGITS.values(), ids=OF_LOGITS)
def test_every_metric(case: Case, weighed: bool) -> None:
    """Every metric of logits, with whatever options, reads what the independent judge reads, in all ways to update."""
    batches = case.batches(weighed=weighed)
    # The ends of an interval of few sequences are many standard errors away, and are exponentiated.
    expected = pytest.approx(numbers(case.expected(*batches)), rel=1e-9, abs=1e-9, nan_ok=True)
    assert numbers(case.filled(*map(factorize, batches)).compute()) == expected
    metric = case.metric()
    for batch in batches:
        value = numbers(metric(**factorize(batch)))
        assert value == pytest.approx(numbers(case.expected(batch)), rel=1e-6, abs=1e-6, nan_ok=True)
    assert numbers(metric.compute()) == expected


def test_every_metric_of_logits_is_there() -> None:
    """All classes but the one for yes-or-no targets."""
    classes = {case.metric_class.__name__ for case in OF_LOGITS.values()} | {"BinaryCrossEntropy"}
    assert classes == {case.metric_class.__name__ for case in CASES.values()}


GROUP = torch.arange(4 * 3).view(4, 3) % GROUPS
FUNCTIONS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"label_smoothing": 0.1, "shift": True},
    "bits_per_token": {},
    "perplexity": {},
    "bits_per_byte": {"token_bytes": TOKEN_BYTES},
    "cross_entropy_decomposition": {"label_smoothing": 0.1},
    "grouped_cross_entropy": {"num_groups": GROUPS, "group": GROUP},
    "normalized_cross_entropy": {"num_classes": 6},
    "cross_entropy_difference": {},
    "per_target_losses": {},
    "tally": {},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function(name: str) -> None:
    """Every function of logits gives what it gives for the product."""
    pair = {"names": ("preds_a", "preds_b")} if name == "cross_entropy_difference" else {}
    batch = make_batches(**pair)[1]
    function = getattr(functional, name)
    value, expected = (function(**b, **FUNCTIONS[name]) for b in (factorize(batch), batch))
    if name == "tally":
        value, expected = value.totals()._asdict(), expected.totals()._asdict()
    else:
        value, expected = (numbers(x if isinstance(x, dict) else x.flatten()) for x in (value, expected))
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def test_every_function_of_logits_is_there() -> None:
    """All functions but the one for yes-or-no targets, and the one that takes no predictions."""
    assert {*FUNCTIONS} == {*functional.__all__} - {"binary_cross_entropy", "convert_label_smoothing"}
    assert "LinearLogits" in xent_metrics.__all__


@pytest.mark.parametrize("bias", [False, True])
def test_many_parts_agree_with_one_matmul(bias: bool) -> None:
    """In float32 a value is that of `F.linear` to 1e-6, wherever the rows are cut; also with some left out."""
    hidden, weight = torch.randn(3, 401, 96), torch.randn(3001, 96) / 10
    head = weight, torch.randn(3001) if bias else None
    target = torch.randint(0, 3001, (3, 401))
    for ignored, shift in itertools.product((0.0, 0.3), (False, True)):
        labels = target.masked_fill(torch.rand(target.shape) < ignored, -100)
        preds = LinearLogits(hidden, *head)
        expected = cross_entropy(F.linear(hidden, *head), labels, shift=shift).item()
        assert cross_entropy(preds, labels, shift=shift).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("layout", HIDDEN)
def test_values_where_nothing_is_looked_at(layout: str) -> None:
    """Elsewhere all rows are multiplied, and the ignored ones still count for nothing."""
    for ignored, soft in itertools.product((0.0, 0.4, 1.0), (False, True)):
        hidden, head = HIDDEN[layout](), make_head()
        target = make_target(hidden.shape[:-1], soft, ignored)
        losses = per_target_losses(LinearLogits(hidden, *head), target)
        torch.testing.assert_close(losses.double(), judge(F.linear(hidden, *head), target, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_decides_about_the_matmul_only(hidden_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Under autocast logits are those that the model would make there, and what follows is in float32."""
    hidden, (weight, bias) = torch.randn(4, 6, D).to(hidden_dtype), make_head()
    target = torch.randint(0, V, (4, 6))
    with torch.autocast("cpu", dtype=dtype):
        logits = F.linear(hidden, weight, bias)
        losses = per_target_losses(LinearLogits(hidden, weight, bias), target)
    assert logits.dtype == dtype
    torch.testing.assert_close(losses.double(), judge(logits, target, -1), rtol=1e-6, atol=1e-6)


def test_autocast_leaves_float64_alone() -> None:
    """As it does in `F.linear`."""
    hidden, head = torch.randn(6, D, dtype=torch.float64), make_head(torch.float64)
    target = torch.randint(0, V, (6,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = per_target_losses(LinearLogits(hidden, *head), target)
    torch.testing.assert_close(losses, judge(F.linear(hidden, *head), target, -1), rtol=1e-13, atol=1e-13)


def test_one_model_may_be_a_tensor() -> None:
    """A model with a head can be compared with one whose logits are there."""
    logits, target = torch.randn(3, 4, V, dtype=torch.float64), torch.randint(0, V, (3, 4))
    other = torch.randn(3, 4, V, dtype=torch.float64)
    expected = functional.cross_entropy_difference(logits, other, target)["difference"].item()
    for preds in ((factors(logits), other), (logits, factors(other))):
        metric = CrossEntropyDifference()
        metric.update(*preds, target)
        assert metric.compute()["difference"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(0, D), (0, 4, D), (3, 0, D), (3, 1, D)])
@pytest.mark.parametrize("soft", [False, True])
def test_no_targets(shape: tuple[int, ...], soft: bool) -> None:
    """Without rows, or with none left by `shift`, the value is NaN."""
    preds = LinearLogits(torch.randn(shape), *make_head())
    target = make_target(torch.Size(shape[:-1]), soft, 0.0)
    assert per_target_losses(preds, target).shape == shape[:-1]
    assert cross_entropy(preds, target, shift=len(shape) > 2).isnan()


def test_bad_rows_stay_where_they_are() -> None:
    """NaN in what goes into the head is one target's NaN, and nobody's where it is ignored."""
    hidden, head = torch.randn(6, D), make_head()
    hidden[2] = math.nan
    target = torch.randint(0, V, (6,))
    assert per_target_losses(LinearLogits(hidden, *head), target).isnan().tolist() == [i == 2 for i in range(6)]
    target[2] = -100
    assert per_target_losses(LinearLogits(hidden, *head), target)[2].item() == 0.0
    assert cross_entropy(LinearLogits(hidden, *head), target).isfinite()


def test_no_graph() -> None:
    """A head that is being trained gives plain numbers, and keeps nothing."""
    hidden = torch.randn(6, D, requires_grad=True)
    head = torch.nn.Linear(D, V)
    target = torch.randint(0, V, (6,))
    preds = LinearLogits(hidden * 2, head.weight, head.bias)
    assert not per_target_losses(preds, target).requires_grad
    metric = CrossEntropy()
    assert not metric(preds, target).requires_grad
    assert hidden.grad is None


# What is multiplied.


@pytest.mark.parametrize(
    ("num_classes", "dtype", "num_rows", "bias", "expected"),
    [
        (32000, torch.float32, 1024, False, [512, 512]),
        (32000, torch.float32, 1025, True, [342, 342, 341]),
        (128256, torch.float32, 512, False, [128] * 4),
        (128256, torch.bfloat16, 512, True, [256, 256]),
        (128256, torch.float64, 256, False, [128, 128]),
        (256000, torch.float32, 129, True, [65, 64]),
        (10, torch.float32, 511, False, [511]),
    ],
)
def test_hundreds_of_rows_at_once(
    num_classes: int, dtype: torch.dtype, num_rows: int, bias: bool, expected: list[int]
) -> None:
    """Parts of 63 MiB of logits, of 128 to 512 rows and about equally many, all of them in one buffer."""
    hidden, weight = torch.randn(num_rows, 2).to(dtype), torch.randn(num_classes, 2).to(dtype)
    target = torch.randint(0, num_classes, (num_rows,))
    with Matmuls() as matmuls:
        cross_entropy(LinearLogits(hidden, weight, weight[:, 0] if bias else None), target)
    assert matmuls.rows == expected
    assert len(matmuls.buffers) == 1


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.9, 1.0])
def test_ignored_rows_are_not_multiplied(ignored: float, cut: bool) -> None:
    """On the CPU the rows of the matmuls are those that are scored, and no more matmuls than they fill."""
    hidden = torch.randn(4, 1025, D)
    hidden = hidden[:, :-1] if cut else hidden[:, :-1].contiguous()
    target = make_target(hidden.shape[:-1], False, ignored)
    metric = CrossEntropy()
    with Matmuls() as matmuls:
        metric.update(LinearLogits(hidden, *make_head()), target)
    scored = int((target != -100).sum())
    assert scored == metric.tally.totals().scored
    assert sum(matmuls.rows) == scored < 4096 * (1.05 - ignored)
    assert len(matmuls.rows) == math.ceil(scored / 512)


def test_rows_that_are_left_are_dealt_evenly() -> None:
    """No part of one row: it would read all of the weight for itself."""
    target = torch.randint(0, V, (600,))
    target[::2][:87] = -100
    with Matmuls() as matmuls:
        cross_entropy(LinearLogits(torch.randn(600, D), *make_head()), target)
    assert matmuls.rows == [257, 256]


def test_shifted_rows_are_not_multiplied() -> None:
    """Of a sequence of T positions T - 1 are scored, but for those whose next label is ignored."""
    target = torch.randint(0, V, (3, 400))
    target[0, 200:], target[:, 0] = -100, -100  # The first label is no target.
    with Matmuls() as matmuls:
        cross_entropy(LinearLogits(torch.randn(3, 400, D), *make_head()), target, shift=True)
    assert sum(matmuls.rows) == 3 * 399 - 200
    assert len(matmuls.rows) == 2


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("soft", [False, True])
def test_all_rows_are_multiplied_where_nothing_is_looked_at(soft: bool) -> None:
    """What only the host could leave out is computed, once."""
    hidden = torch.randn(4, 256, D)
    target = make_target(hidden.shape[:-1], soft, 0.5)
    with Matmuls() as matmuls:
        cross_entropy(LinearLogits(hidden, *make_head()), target)
    assert matmuls.rows == [512, 512]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("metric_class", [CrossEntropy, CrossEntropyDifference])
def test_an_update_never_waits(metric_class: Any, soft: bool, dtype: torch.dtype, operators: Operators) -> None:
    """On a device without data, where looking at a value is impossible, an update and `forward` run."""
    hidden = torch.empty(3, 700, D, device="meta", dtype=dtype)
    preds = LinearLogits(hidden, *(torch.empty(shape, device="meta", dtype=dtype) for shape in ((V, D), (V,))))
    target = torch.empty(3, 700, V, device="meta") if soft else torch.empty(3, 700, device="meta", dtype=torch.int64)
    args = (preds,) * (2 if metric_class is CrossEntropyDifference else 1)
    with operators:
        for shift in (False, True):
            metric = metric_class(shift=shift).to("meta")
            metric.update(*args, target)
            metric(*args, target)
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item")
    assert [name for name in operators.counts if any(part in name for part in waiting)] == []


# Memory.


def sizes_and_forms() -> Iterator[Any]:
    """Yield sizes, limits in MiB, and forms: each size in one form; the others are slow."""
    sizes = (
        (1024, 32000, torch.float32, 66),
        (1024, 32000, torch.bfloat16, 35),
        (512, 128256, torch.float32, 66),
        (512, 128256, torch.bfloat16, 66),
    )
    for (i, size), (j, form) in itertools.product(enumerate(sizes), enumerate(("plain", "some ignored", "shifted"))):
        yield pytest.param(*size, form, marks=() if i % 3 == j else pytest.mark.slow)


@pytest.mark.parametrize(("num_rows", "num_classes", "dtype", "mebibytes", "form"), [*sizes_and_forms()])
def test_memory_is_one_part_of_the_logits(
    num_rows: int,
    num_classes: int,
    dtype: torch.dtype,
    mebibytes: int,
    form: str,
    peak_bytes: Callable[[Callable[[], object]], int],
) -> None:
    """Not more than 66 MiB, where the logits are 62 to 250, whatever is left out."""
    hidden, weight = torch.randn(4, num_rows // 4, 8).to(dtype), torch.randn(num_classes, 8).to(dtype)
    target = torch.randint(0, num_classes, hidden.shape[:-1])
    if form == "some ignored":
        target[0, ::2] = -100
    preds = LinearLogits(hidden, weight)
    peak = peak_bytes(lambda: cross_entropy(preds, target, shift=form == "shifted"))
    # Some processors have no matmul in half precision, and PyTorch then makes wider copies of its factors and product.
    flat, out = hidden.view(-1, 8)[:512], torch.empty(min(512, num_rows), num_classes, dtype=dtype)
    widened = peak_bytes(lambda: torch.mm(flat, weight.t(), out=out))
    assert peak <= mebibytes * 2**20 + widened
    assert peak > mebibytes * 2**19  # The instrument works.


@pytest.mark.slow
def test_memory_of_eight_thousand_rows_of_a_quarter_of_a_million_classes(
    peak_bytes: Callable[[Callable[[], object]], int],
) -> None:
    """Where the logits are 7.8 GiB, 128 rows of them and 4 MiB are enough."""
    num_rows, num_classes = 8192, 256_000
    hidden, weight = torch.randn(num_rows, 16), torch.randn(num_classes, 16)
    target = torch.randint(0, num_classes, (num_rows,))
    rows = iter((130, num_rows))  # The first call only warms up.

    def call() -> Tensor:
        some = slice(next(rows))
        return cross_entropy(LinearLogits(hidden[some], weight), target[some])

    peak = peak_bytes(call)
    assert next(rows, None) is None
    assert peak <= 512 * num_classes + 4 * 2**20 + 64 * num_rows


@pytest.mark.slow
def test_memory_of_soft_targets(peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    """The targets are there; nothing of their size is made."""
    hidden, weight = torch.randn(2048, 16), torch.randn(32000, 16)
    target = torch.full((1, 1), 1 / 32000).expand(2048, 32000)
    assert peak_bytes(lambda: cross_entropy(LinearLogits(hidden, weight), target)) <= 66 * 2**20


# At home.


def test_first_scores_that_look_like_probabilities_still_warn() -> None:
    """Factors are not looked at, and tensors that come after them are."""
    metric, target = CrossEntropy(), torch.zeros(4, dtype=torch.int64)
    metric.update(LinearLogits(torch.zeros(4, D), torch.zeros(V, D), torch.full((V,), 1 / V)), target)
    with pytest.warns(UserWarning, match="look like probabilities"):
        metric.update(torch.full((4, V), 1 / V), target)


def test_collections() -> None:
    """Metrics that make the same update share it."""
    collection = MetricCollection([BitsPerToken(), Perplexity()])
    target = torch.randint(0, V, (6,))
    preds = LinearLogits(torch.randn(6, D), *make_head())
    collection.update(preds, target)
    with Matmuls() as matmuls:
        collection.update(preds, target)
    assert len(matmuls.rows) == 1
    values = collection.compute()
    assert values["Perplexity"].item() == pytest.approx(2 ** values["BitsPerToken"].item())


class Model(LightningModule):
    """Returns what the head would have multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Embedding(V, D), torch.nn.Linear(D, V)

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """Score the next token."""
        hidden = self.body(batch[:, :-1])
        logits = LinearLogits(hidden, self.head.weight, self.head.bias, scale=2.0, softcap=0.5)
        return {"logits": logits, "target": batch[:, 1:]}


@pytest.mark.filterwarnings("ignore:.*sequence is treated as leaf.*")
def test_a_step_may_return_it(tmp_path: Any) -> None:
    """Lightning passes it on to the callback, which takes it for logits."""
    data, model = torch.randint(0, V, (8, 12)), Model()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[CrossEntropyMonitor()], default_root_dir=tmp_path, enable_checkpointing=False, **quiet)
    (logged,) = trainer.validate(model, DataLoader(data, batch_size=3), verbose=False)
    logits = 0.5 * torch.tanh(2 * model.head(model.body(data[:, :-1])).double() / 0.5)
    expected = F.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
    assert logged["val/cross_entropy"] == pytest.approx(expected.item(), rel=1e-6)
