"""Prints, as Markdown, whether promises hold on a GPU, and what they cost there. A wrong number makes it exit with 1.

python -m tests.gpu

It needs torch, torchmetrics and pytest, no network, and less than eight minutes. Without a CUDA device it says what it
leaves out, and does the rest on the CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torchmetrics
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from tests import bench
from tests.bench import attempt, duration, head, mebibytes, reason, row, times
from tests.score_rows import ABSOLUTE, BIAS, KINDS, make_rows, true_losses, worst
from tests.test_cuda import extra_memory, never_waiting
from xent_metrics import CrossEntropy, CrossEntropyReport, LinearLogits
from xent_metrics.functional import per_target_losses

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16)
NUM_ROWS = 37  # No slice divides them.
SLICES = (1, 2, 8, 16)
H200 = 4.8e12  # Bytes that its memory is said to give in a second.

# All together stay below eight minutes; what there is no time for is said.
SECONDS, SECONDS_OF_TESTS = 440, 240

# At most: the library's time over that of what stands beside it.
READS, UPCASTS, MATMULS = 1.5, 1.0, 1.15
EAGER, COMPILED = "`CrossEntropy.update`", '`CrossEntropy(backend="compile").update`'
COPY, MATMUL = "copy on the device: a read and a write", "`F.linear` alone"
HEAD, COMPILED_HEAD = "`CrossEntropy.update(LinearLogits(...))`", "the same, compiled"

Function = Callable[[], object]


class Sizes(NamedTuple):
    """How much is measured."""

    of_splits: tuple[int, ...]  # Numbers of classes.
    of_kinds: tuple[int, ...]
    compiled: tuple[int, ...]  # Of both, those that losses are also compiled for, which takes some seconds each.
    scores: int  # Of each kind of rows, at most.
    logits: tuple[int, int]  # Rows and classes whose time is measured.
    head: tuple[int, int, int]  # Rows, width and classes.
    rounds: int


OF_SPLITS, OF_KINDS = (1000, 32000, 32001, 50257, 128256, 151643), (1000, 50257, 128256)
ON_GPU = Sizes(OF_SPLITS, OF_KINDS, OF_KINDS, 2**27, (8192, 128256), (8192, 4096, 131072), 11)
TINY = Sizes((50, 129, 1000), (50, 1000), (), 2**16, (64, 1000), (32, 16, 500), 2)


class Run:
    """What is measured, where, and what was found to be wrong."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes, self.on_gpu = device, sizes, device == "cuda"
        self.wrong: list[str] = []
        self.started = time.perf_counter()
        self.no_compiler = "not asked for on the CPU"
        if sizes.compiled:
            rows = torch.zeros(2, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
            self.no_compiler = bench.why_not(lambda: per_target_losses(*rows, backend="compile"))

    def judge(self, what: str, is_right: bool) -> str:
        """Note what is wrong, and return a cell that says so."""
        if not is_right:
            self.wrong.append(what)
        return "yes" if is_right else "**NO**"

    def cells(self, what: str, make: Callable[..., list[str]], *args: Any) -> list[str]:
        """Return the cells that a function makes, or why it cannot, which is wrong too."""
        try:
            return make(*args)
        except Exception as error:
            return [reason(error), self.judge(f"{what}: {reason(error)}", False)]

    def has_time(self) -> bool:
        return time.perf_counter() - self.started < SECONDS

    def backends(self, num_classes: int) -> list[str]:
        """Return how losses of so many classes are made here; in no way if there is no time."""
        with_compiler = num_classes in self.sizes.compiled and not self.no_compiler
        return [x for x in ("eager", "compile") if self.has_time() and (x == "eager" or with_compiler)]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The tests that need a CUDA device


def cuda_tests(run: Run) -> Iterator[str]:
    """Run them in a process of their own, as a fault of the device ends that."""
    if not run.on_gpu:
        yield "Left out: without a CUDA device each of them is skipped."
        return
    code, lines = run_pytest()
    summary = lines[-1].strip("= ") if lines else "nothing was printed"
    yield f"`{summary}`; all passed: {run.judge(f'the tests marked cuda: {summary}', code == 0)}"
    if code:
        yield from ("", "```", *lines[-120:], "```")


def run_pytest() -> tuple[int, list[str]]:
    """Run all tests that are marked, and return the exit code and the output."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    if importlib.util.find_spec("lightning") is None:
        files = [path for path in files if "lightning" not in path.parts]
    # Without options of plugins that may not be there.
    plain = ["-o", "addopts=", "-o", "minversion=", "-W", "default::pytest.PytestConfigWarning", "-p", "no:randomly"]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "cuda", "--import-mode=importlib", "--tb=short", *plain]
    command += ["-p", "no:cacheprovider", *map(str, files)]
    with tempfile.TemporaryFile("w+") as output:
        try:
            code, more = subprocess.call(command, cwd=ROOT, stdout=output, stderr=output, timeout=SECONDS_OF_TESTS), []
        except subprocess.TimeoutExpired:
            code, more = 1, [f"not done after {SECONDS_OF_TESTS} s"]
        output.seek(0)
        return code, [*output.read().splitlines(), *more]


# The same bits


def splits(run: Run) -> Iterator[str]:
    """Losses of the same rows, cut in every way."""
    yield f"Of {NUM_ROWS} rows, cut: how many losses have other bits than those of all rows at once.\n"
    ways = [f"by {size}" for size in SLICES] + ["`(B, T, V)[:, :-1]`", "`(B, V, T)`"]
    yield from head("classes", "dtype", "losses", *ways, "the same")
    for num_classes, dtype in product(run.sizes.of_splits, DTYPES):
        for backend in run.backends(num_classes):
            what = f"{num_classes:,}", short(dtype), backend
            yield row(*what, *run.cells(f"bits of {what}", split_cells, run, num_classes, dtype, backend))


def split_cells(run: Run, num_classes: int, dtype: torch.dtype, backend: str) -> list[str]:
    differ = [*differences(run.device, num_classes, dtype, backend)]
    what = f"bits of losses of {num_classes:,} classes, {short(dtype)}, {backend}"
    return [*map(str, differ), run.judge(what, not any(differ))]


def differences(device: str, num_classes: int, dtype: torch.dtype, backend: str) -> Iterator[int]:
    """Yield, for each way to cut rows, how many losses have other bits than those of all rows at once."""
    x, index = (part.to(device) for part in make_rows("as of a model", NUM_ROWS, num_classes))
    x = x.to(dtype)
    losses: Any = partial(per_target_losses, backend=backend)
    whole = losses(x, index)
    for size in SLICES:
        parts = zip(x.split(size), index.split(size), strict=True)
        yield num_different(torch.cat([losses(*part) for part in parts]), whole)
    sequences = torch.cat([x[:36].view(4, 9, num_classes), x[:4, None]], 1)  # One row more in each, which is cut off.
    yield num_different(losses(sequences[:, :-1], index[:36].view(4, 9)).flatten(), whole[:36])
    yield num_different(losses(x.t().contiguous()[None], index[None], class_dim=1).flatten(), whole)


def num_different(losses: Tensor, others: Tensor) -> int:
    return int((losses.view(torch.int64) != others.view(torch.int64)).sum())


# Errors


def errors(run: Run) -> Iterator[str]:
    """Losses beside those of float64."""
    yield "In nats, beside float64. The share is that of the largest error in what is promised; 1 is just allowed.\n"
    yield from head("rows", "classes", "dtype", "losses", "bias", "largest error", "share", "as promised")
    for num_classes, kind in product(run.sizes.of_kinds, KINDS):
        count = min(10_000, run.sizes.scores // num_classes)
        logits, index = (x.to(run.device) for x in make_rows(kind, count, num_classes))
        for dtype in DTYPES:
            x = logits.to(dtype)
            true = true_losses(x, index)
            for backend in run.backends(num_classes):
                what = f"{kind}: {count:,}", f"{num_classes:,}", short(dtype), backend
                yield row(*what, *run.cells(f"errors of {what}", error_cells, run, what, x, index, true))


def error_cells(run: Run, what: tuple[str, ...], x: Tensor, index: Tensor, true: Tensor) -> list[str]:
    backend: Any = what[-1]
    error = per_target_losses(x, index, backend=backend) - true
    bias, share = error.mean().item(), worst(error, true)
    # The mean of fewer rows has some of their noise: 2e-7 each, at most.
    allowed = max(BIAS, 4 * 2e-7 / len(error) ** 0.5 if len(error) < 10_000 else 0.0)
    is_right = abs(bias) <= allowed and share <= 1
    verdict = run.judge(f"errors of {', '.join(what)}: bias {bias:.1e}, share {share:.2f}", is_right)
    return [f"{bias:.1e}", f"{error.abs().max().item():.1e}", f"{share:.2f}", verdict]


# A host that never waits


def waiting(run: Run) -> Iterator[str]:
    """Updates under CUDA's own check, and inside a graph."""
    if not run.on_gpu:
        yield "Left out: the CPU has no `torch.cuda.set_sync_debug_mode`, and no graphs."
        return
    batch = make_batch(run, (4, 256, 32000), torch.bfloat16)
    report = CrossEntropyReport().to(run.device)
    report(*batch)  # Copies constants to the device, once in a process.
    for name in ("update", "forward"):
        what = f'`CrossEntropyReport.{name}` under `set_sync_debug_mode("error")`'
        yield f"- {what}: {', '.join(run.cells(what, under_check, getattr(report, name), batch))}"
    what = "`CrossEntropy.update`, captured once and replayed with other logits"
    yield f"- {what}: {', '.join(run.cells(what, replay, run, *batch))}"


def under_check(call: Callable[..., object], batch: tuple[Tensor, ...]) -> list[str]:
    with never_waiting():
        call(*batch)
    return ["does not wait"]


def replay(run: Run, x: Tensor, index: Tensor) -> list[str]:
    """Capture an update, replay it with other logits in the same memory, and compare what it leaves with eager code."""
    metric, side = CrossEntropy().to(run.device), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # What a first call makes must not belong to the graph.
        metric.update(x, index)
    torch.cuda.current_stream().wait_stream(side)
    metric.reset()
    before, graph = metric.tally.state, torch.cuda.CUDAGraph()  # An update reads the old state, and makes a new one.
    with torch.cuda.graph(graph):
        metric.update(x, index)
    cells = []
    for factor in (0.5, 4.0):
        x.mul_(factor)
        graph.replay()
        eager = CrossEntropy().to(run.device)
        eager.update(x, index)
        found, expected = metric.compute().item(), eager.compute().item()
        is_right = torch.equal(metric.tally.state, eager.tally.state) and found == expected and not before.any()
        cells.append(f"{found!r}, eagerly {expected!r}: {run.judge('the value of an update in a graph', is_right)}")
    return cells


# Time and memory


def make_batch(run: Run, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=run.device).mul_(3)
    return x, torch.randint(shape[-1], shape[:-1], device=run.device)


def both(run: Run, names: tuple[str, str]) -> dict[str, CrossEntropy]:
    """Return an eager metric, and one that compiles its losses if that can be."""
    backends: Any = zip(names, ("eager", "compile"), strict=True)
    return {
        name: CrossEntropy(backend=backend).to(run.device)
        for name, backend in backends
        if backend == "eager" or not run.no_compiler
    }


def logits_costs(run: Run, dtype: torch.dtype) -> Iterator[str]:
    x, index = make_batch(run, run.sizes.logits, dtype)
    other, metrics = torch.empty_like(x), both(run, (EAGER, COMPILED))
    functions: dict[str, Function | str] = {
        **{name: partial(metric.update, x, index) for name, metric in metrics.items()},
        "`x.sum()`": x.sum,
        "`x.amax(1)`": lambda: x.amax(1),
        COPY: lambda: other.copy_(x),
        bench.UPCAST: lambda: F.cross_entropy(x.float(), index, reduction="sum"),
        bench.FULL: lambda: F.cross_entropy(x, index, reduction="sum"),
        bench.TORCHMETRICS: partial(Perplexity().to(run.device).update, x[None], index[None]),
    }
    if run.on_gpu:
        upcast = torch.compile(lambda logits: F.cross_entropy(logits.float(), index, reduction="sum"))
        functions |= {"the upcast, compiled": partial(upcast, x)}
        functions |= {"Liger": attempt(lambda: liger(x, index)), "quack": attempt(lambda: quack(x, index))}
    found = measure(run, functions)
    read = min(found["`x.sum()`"].seconds, found["`x.amax(1)`"].seconds, found[COPY].seconds / 2)
    num_bytes = x.numel() * x.element_size()
    yield f"One read: {duration(read)}, {num_bytes / read / 1e12:.2f} TB/s; the fastest of sum, amax and half a copy."
    yield f"An H200, which gives {H200 / 1e12} TB/s, could take {duration(num_bytes / H200)}.\n"
    yield from table(run, found, read, {COMPILED: (read, READS), EAGER: (seconds(found[bench.UPCAST]), UPCASTS)})
    yield from values(run, f"{short(dtype)} logits", metrics, true_losses(x, index).mean().item(), ABSOLUTE)


def head_costs(run: Run) -> Iterator[str]:
    rows, width, num_classes = run.sizes.head
    hidden, index = make_batch(run, (rows, width), torch.bfloat16)
    weight, _ = make_batch(run, (num_classes, width), torch.bfloat16)
    hidden, weight, index = hidden / width**0.5, weight / 3, index * 31 % num_classes
    metrics = both(run, (HEAD, COMPILED_HEAD))
    functions: dict[str, Function | str] = {
        **{name: partial(metric.update, LinearLogits(hidden, weight), index) for name, metric in metrics.items()},
        MATMUL: lambda: F.linear(hidden, weight),
        "`F.linear`, `F.cross_entropy(x.float())`": lambda: F.cross_entropy(F.linear(hidden, weight).float(), index),
    }
    found = measure(run, functions)
    bare = found[MATMUL].seconds
    yield f"One pass is the bare matmul: {2 * hidden.numel() * num_classes / bare / 1e12:.3g} TFLOP/s.\n"
    yield from table(run, found, bare, dict.fromkeys((HEAD, COMPILED_HEAD), (bare, MATMULS)))
    # Another split of a matmul rounds other logits to another bfloat16.
    yield from values(run, "a head", metrics, true_losses(F.linear(hidden, weight), index).mean().item(), 1e-3)


def liger(x: Tensor, index: Tensor) -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy  # noqa: PLC0415

    own = x.clone()  # Some versions write gradients over it.
    return lambda: liger_cross_entropy(own, index, reduction="sum")


def quack(x: Tensor, index: Tensor) -> Function:
    from quack.cross_entropy import cross_entropy  # noqa: PLC0415

    return lambda: cross_entropy(x, index, reduction="sum")


class Cost(NamedTuple):
    """What a call costs: medians of all rounds."""

    seconds: float  # Until the device has done it.
    host: float  # Until the host can go on; where this is no less, the device waits for the host.
    memory: int | None  # Most bytes beyond what was there; None where nobody counts them.


def seconds(cost: Cost | str) -> float:
    return 0.0 if isinstance(cost, str) else cost.seconds


def measure(run: Run, functions: dict[str, Function | str]) -> dict[str, Any]:
    """Measure each function once a round, after two calls that warm up; of what cannot run, return why."""
    found: dict[str, Any] = {name: x if isinstance(x, str) else warmed_up(run, x) for name, x in functions.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name, x in found.items() if not isinstance(x, str)}
    for _ in range(run.sizes.rounds):
        for name, taken in samples.items():
            taken.append(time_of(run, functions[name]))
    costs = {name: Cost(*map(median, zip(*taken, strict=True)), found[name]) for name, taken in samples.items()}
    return {name: costs.get(name, x) for name, x in found.items()}


def warmed_up(run: Run, function: Function) -> int | str | None:
    """Call a function twice, and return its extra memory, or why it cannot run."""
    try:
        if run.on_gpu:
            return extra_memory(function)
        function()
    except Exception as error:
        return reason(error)
    return None


def time_of(run: Run, function: Any) -> tuple[float, float]:
    """Return the seconds of a call on the clock of its device, and those until it returns."""
    if run.on_gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
    began = time.perf_counter()
    function()
    host = time.perf_counter() - began
    if not run.on_gpu:
        return host, host
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, host


def table(run: Run, found: dict[str, Any], unit: float, goals: dict[str, tuple[float, float]]) -> Iterator[str]:
    """Yield a row for each function. A goal is the time of something else, and how many times that is aimed at."""
    yield from head("measured", "time of a call", "host is free after", "passes", "extra memory", "goal")
    for what, cost in found.items():
        if isinstance(cost, str):
            yield row(what, cost, "", "", "", "not reached" if what in goals else "")
            continue
        other, most = goals.get(what, (0.0, None))
        goal = bench.target(cost.seconds / other, most, times) if other and run.on_gpu else ""
        memory = "not counted" if cost.memory is None else mebibytes(cost.memory)
        yield row(what, duration(cost.seconds), duration(cost.host), times(cost.seconds / unit), memory, goal)
    yield ""


def values(run: Run, what: str, metrics: dict[str, CrossEntropy], true: float, allowed: float) -> Iterator[str]:
    """Yield whether metrics that were measured read the mean of the losses."""
    for name, metric in metrics.items():
        found = metric.compute().item()
        cell = run.judge(f"the value of {what}: {name} reads {found!r}, not {true!r}", abs(found - true) <= allowed)
        yield f"- {name} reads {found:.9f}, float64 {true:.9f}: {cell}"


# The page


def sections(run: Run) -> dict[str, Iterator[str]]:
    logits, of_head = (" x ".join(f"{size:,}" for size in shape) for shape in (run.sizes.logits, run.sizes.head))
    return {
        "Tests that need a CUDA device": cuda_tests(run),
        "The same bits in any batch": splits(run),
        "Errors": errors(run),
        "A host that never waits": waiting(run),
        **{f"Time and memory of {logits} logits, {short(x)}": logits_costs(run, x) for x in DTYPES},
        f"Time and memory of a head of {of_head}, bfloat16": head_costs(run),
    }


def about(run: Run) -> Iterator[str]:
    """Say what this was run on."""
    what = torch.cuda.get_device_name() if run.on_gpu else f"the CPU, {torch.get_num_threads()} threads"
    yield f"- {what}; {platform.system()}, Python {platform.python_version()}, CUDA {torch.version.cuda}"
    yield f"- torch {torch.__version__}, torchmetrics {torchmetrics.__version__}; {time.strftime('%Y-%m-%d')}"
    if not run.on_gpu:
        why = "no CUDA device was found" if not torch.cuda.is_available() else "the CPU was asked for"
        yield f"- **{why}: sizes are tiny, times mean nothing, and what needs a GPU is left out**"
    if run.no_compiler:
        yield f"- **compiled losses are left out: {run.no_compiler}**"


def report(run: Run) -> Iterator[str]:
    """Yield the lines of the page as they are known."""
    yield from ("# On a GPU\n", *about(run))
    for title, lines in sections(run).items():
        yield f"\n## {title}\n"
        try:
            yield from lines if run.has_time() else ["Left out: no time."]
        except Exception as error:
            run.wrong.append(f"{title}: {reason(error)}")
            yield from ("", "```", *traceback.format_exc().splitlines(), "```")
    yield from ("\n## Result\n", *(f"- wrong: {what}" for what in run.wrong))
    left = "" if run.has_time() else "; some was left out, for lack of time"
    yield f"- {len(run.wrong)} numbers are wrong; took {time.perf_counter() - run.started:.0f} s{left}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a CUDA device if there is one")
    parser.add_argument("--compile", action="store_true", help="on the CPU too, which takes its compiler a minute")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(1)  # Of tiny sizes, threads wait for each other.
    sizes = ON_GPU if device == "cuda" else TINY._replace(compiled=TINY.of_kinds if options.compile else ())
    run = Run(device, sizes)
    with torch.no_grad():
        for line in report(run):
            print(line, flush=True)
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
