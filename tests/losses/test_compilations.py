"""What is compiled: once for any size, never unasked, into one graph without a tensor of the size of the logits."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Event
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch._dynamo import convert_frame
from torch.nn import functional as F

from tests.cases import K
from tests.forks import in_a_fork, needs_forks
from tests.losses.compiling import assert_near, bits_of, compilations, needs_compiler
from xent_metrics import BinaryCrossEntropy, CrossEntropy, functional
from xent_metrics._compat import RECOMPILE_LIMIT, TORCH
from xent_metrics.losses import compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of the compiler.


def batches_of_all_sizes(num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Make batches of any size, of two and three dimensions, contiguous or not."""
    for shape in ((4,), (1,), (0,), (2,), (3, 5), (num_classes,), (1, 1), (0, 3), (1, 9), (2, 3, 4), (70_001,), (17,)):
        yield torch.randn(*shape, num_classes), torch.randint(0, num_classes, shape)
    for size in (6, 1, 3000):
        scores, target = torch.randn(size + 1, 6, num_classes + 2), torch.randint(0, num_classes, (size + 1, 6))
        yield scores[1:, :, 1:-1], target[1:]
        yield scores[1:, 1:, :-2].contiguous()[:, 2:], target[1:, 3:]
        yield scores[:1, :1, :num_classes].expand(size, 6, num_classes), target[:-1]


@needs_compiler
@pytest.mark.parametrize("target", ["hard", pytest.param("soft", marks=pytest.mark.slow)])
def test_two_compilations_at_most(target: str) -> None:
    """Any sequence of batches needs two compilations at most, with a shift too."""
    num_classes = {"hard": 11, "soft": 12}[target]
    compiled._compiled.cache_clear()  # Another test may have compiled the same.
    before = compilations()
    for shift in (False, True):
        metric = CrossEntropy(backend="compile", shift=shift)
        for scores, labels in batches_of_all_sizes(num_classes):
            if shift and labels.dim() < 2:
                continue
            if target == "soft":
                metric.update(scores, F.one_hot(labels, num_classes).float())
            else:
                metric.update(scores, labels)
                metric.update(scores, labels.masked_fill(torch.rand(labels.shape) < 0.6, -100))
    assert 1 <= compilations() - before <= 2


@needs_compiler
def test_two_compilations_of_yes_or_no() -> None:
    """So it is for yes-or-no targets, whatever their shape and weights."""
    compiled._compiled.cache_clear()
    before = compilations()
    metric = BinaryCrossEntropy(backend="compile", label_smoothing=0.23, pos_weight=torch.rand(13))
    for scores, _ in batches_of_all_sizes(13):
        metric.update(scores, scores > 0)
    assert 1 <= compilations() - before <= 2


@needs_compiler
def test_modes_of_the_process_do_not_use_up_a_limit() -> None:
    """PyTorch compiles again for another number of threads, and gives up after some times; here it does not."""
    target = torch.randint(0, 6, (70,))
    preds, spread = torch.randn(70, 6), torch.stack([target, target], 1)[:, 0]
    expected = functional.per_target_losses(preds, target)
    with torch._dynamo.config.patch({RECOMPILE_LIMIT: 1}):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_near(functional.per_target_losses(preds, target, backend="compile"), expected)
    before = compilations()
    assert_near(functional.per_target_losses(preds, spread, backend="compile"), expected)
    assert compilations() == before  # Whatever the strides of the target.


def test_nothing_is_compiled_for_nothing() -> None:
    """An empty batch does not reach the compiler; one whose targets are all ignored adds nothing."""
    metric, before = CrossEntropy(backend="compile"), compilations()
    kept = compiled._compiled.cache_info().misses
    for shape in ((0,), (0, 3), (3, 0)):
        metric.update(torch.empty(*shape, 14), torch.empty(shape, dtype=torch.int64))
    assert compilations() == before
    assert compiled._compiled.cache_info().misses == kept
    assert metric.compute().isnan()
    for size in (5, 1, 20_000):
        metric.update(torch.full((size, 14), torch.nan), torch.full((size,), -100))
    assert metric.compute().isnan()
    scores, target = torch.randn(3, 14), torch.tensor([0, 13, -100])
    metric.update(scores, target)
    assert metric.compute().item() == pytest.approx(F.cross_entropy(scores.double(), target).item(), rel=1e-6)


def test_kernels_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many kinds of tensors, only the latest are kept compiled; the others are freed, and compiled again."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(weakref.ref(graph))
        return graph.forward

    def score(num_classes: int) -> None:
        functional.per_target_losses(torch.zeros(3, num_classes), torch.arange(3), backend="compile")

    assert compiled._compiled.cache_parameters()["maxsize"] == compiled._MOST_KERNELS
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    monkeypatch.setattr(compiled, "_compiled", lru_cache(maxsize=2)(compiled._compiled.__wrapped__))
    for num_classes in (21, 22, 23, 24, 22):
        score(num_classes)
    gc.collect()
    assert [graph() is not None for graph in graphs] == [False, False, False, True, True]


# `"auto"`.


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_nothing_is_compiled_unasked(backend: Any) -> None:
    """Neither small nor large batches are compiled unless that is asked for."""
    before = dict(torch._dynamo.utils.counters["stats"]), compiled._compiled.cache_info().misses
    metric = CrossEntropy(backend=backend)
    metric.update(torch.randn(4, K), torch.randint(0, K, (4,)))
    metric.update(torch.randn(300, 8000), torch.randint(0, 8000, (300,)))
    assert (dict(torch._dynamo.utils.counters["stats"]), compiled._compiled.cache_info().misses) == before


def test_another_thread_may_compile_meanwhile(
    monkeypatch: pytest.MonkeyPatch, peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    """PyTorch then says of all threads that they compile; this one still looks at its targets, and needs no memory."""
    if TORCH < (2, 7):
        pytest.skip("`is_compiling` of PyTorch 2.6 is what says that a call is exported")
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    metric = CrossEntropy()
    with pytest.raises(ValueError, match="`target` must hold class indices"):
        metric.update(torch.randn(4, K), torch.tensor([0, 1, K, 2]))
    preds, target = torch.randn(1500, 4000).bfloat16(), torch.randint(0, 4000, (1500,))
    assert peak_bytes(lambda: metric.update(preds, target)) < 2**23


@pytest.mark.slow
def test_threads_compile_once_and_agree() -> None:
    """Metrics of several threads make the same losses, of one kernel."""
    preds, target = torch.randn(300, 11), torch.randint(0, 11, (300,))
    before = compilations()
    with ThreadPoolExecutor(4) as pool:
        losses = [pool.submit(functional.per_target_losses, preds, target, backend="compile") for _ in range(8)]
    assert len({bits_of(loss.result()) for loss in losses}) == 1
    assert compilations() - before <= 2


@needs_forks
def test_a_fork_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is forked meanwhile compiles for itself: it does not wait for a thread that it does not have."""
    preds, target = torch.randn(3, K), torch.randint(0, K, (3,))

    def busy(there: Event, leave: Event) -> None:
        with compiled._one_at_a_time, convert_frame.compile_lock:
            there.set()
            leave.wait(60)

    def trace(kernel: Any, _: Any, **constants: Any) -> Any:  # Without the compiler of machine code, which takes long.
        return torch.compile(partial(kernel, **constants), backend="eager", fullgraph=True)

    monkeypatch.setattr(compiled, "_compiled", trace)
    losses = in_a_fork(busy, lambda: functional.per_target_losses(preds, target, backend="compile").tolist())
    assert losses == pytest.approx(F.cross_entropy(preds.double(), target, reduction="none").tolist(), rel=1e-6)


class Graphs:
    """A compiler that runs graphs as they are, and counts their operations."""

    def __init__(self) -> None:
        """Start without one."""
        self.sizes: list[int] = []
        self.passes = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        """Count, and run."""
        calls = Counter(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        self.sizes.append(calls.total())
        self.passes += sum(count for name, count in calls.items() if "method sub of" in name)
        return graph.forward


def graph_of(backend: Any, num_rows: int, soft: bool = False) -> Graphs:
    """Compile a function that a metric is a part of; there must be one graph, with the value of eager code."""
    graphs, num_classes = Graphs(), 8000
    scores, target = torch.randn(num_rows, num_classes), torch.randint(0, num_classes, (num_rows,))
    labels = F.one_hot(target, num_classes).float() if soft else target

    def step(scores: Tensor) -> Tensor:
        return functional.cross_entropy(2 * scores, labels, backend=backend)

    torch._dynamo.reset()
    before, kept = compilations(), compiled._compiled.cache_info().misses
    value = torch.compile(step, backend=graphs, fullgraph=True)(scores)
    assert value.item() == pytest.approx(F.cross_entropy(2 * scores.double(), target).item(), rel=1e-6)
    assert len(graphs.sizes) == 1
    if backend != "compile":
        assert compiled._compiled.cache_info().misses == kept
    assert compilations() - before == 1
    return graphs


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("backend", ["auto", "compile"])
@pytest.mark.slow
def test_a_part_of_what_is_compiled(backend: str, soft: bool) -> None:
    """In a function that is compiled there is one graph, which does not grow with the batch."""
    small, large = (graph_of(backend, num_rows, soft) for num_rows in (20, 300))
    assert small.sizes == large.sizes
    # Soft targets take logits relative to the largest twice, which a compiler makes once.
    assert small.passes == large.passes == 1 + soft


@pytest.mark.slow
def test_eager_is_a_part_in_blocks() -> None:
    """Losses that are to be made a few rows at a time are also there."""
    assert graph_of("eager", 150).passes == 3  # Of 65 rows, which are 2 MiB.


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"input": "probs", "eps": 0.001, "label_smoothing": 0.1}], ids=["", "probs"])
def test_no_tensor_of_the_size_of_the_logits(
    options: dict[str, Any], peak_bytes: Callable[[Callable[[], object]], int]
) -> None:
    """An update holds numbers of rows, and what is finished at once, and writes to nothing that it was given."""
    num_rows, num_classes = 2048, 8000
    scores, target = torch.randn(num_rows, num_classes), torch.randint(0, num_classes, (num_rows,))
    if options:
        scores = scores.softmax(1)
    metric, kept = CrossEntropy(**options, backend="compile"), scores.clone()
    assert peak_bytes(lambda: metric.update(scores, target)) < 160 * num_rows + 3 * 2**19
    assert torch.equal(scores, kept)
    shifted = CrossEntropy(**options, backend="compile", shift=True)
    parts = scores.view(2, -1, num_classes), target.view(2, -1)
    assert peak_bytes(lambda: shifted.update(*parts)) < 9 * 2**20  # Rows that are not together, a few at a time.
