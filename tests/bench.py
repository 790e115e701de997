"""Prints, as Markdown, what the library costs beside its peers: medians of interleaved rounds. It asserts nothing.

python -m tests.bench
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchmetrics
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.text import perplexity
from torchmetrics.text import Perplexity

from tests.distributed.ranks import Collectives, run_ranks
from tests.instruments import allocator_peak
from tests.score_rows import true_losses
from xent_metrics import CrossEntropy, CrossEntropyReport, LinearLogits
from xent_metrics.functional import cross_entropy

ROOT = Path(__file__).parents[1]
MARK = "<!-- run -->"

Function = Callable[[], object]
Functions = dict[str, "Function | str"]  # What is measured first and what beside it, or why that cannot run.
Shape = tuple[int, ...]

LOGITS = (4096, 32_000)
TINY = (2, 8, 50)
QUICK = 12  # No size is larger in a quick run.
VOCAB = 103  # Of the example's text.
SLOW = 5.0  # Seconds; nothing that takes longer is called a second time.
UNCACHED: Any = {"compute_with_cache": False}

ONE_READ = "one read of the logits"
READS = ("sum()", "max()", "amax(-1)")  # The fastest of them is the one read.
FULL, UPCAST = "`F.cross_entropy`", "`F.cross_entropy(x.float())`"
TORCHMETRICS, TORCHEVAL = "torchmetrics `Perplexity`", "torcheval `Perplexity`"
THREE = "`MetricCollection` of `Perplexity` and two `MeanMetric`s"
NONE_IGNORED, OF_256 = "the same, none ignored", "making them: `F.cross_entropy`, 256 classes"
MATMUL, LINEAR_FULL = "`F.linear` alone", "`F.linear`, `F.cross_entropy`"
LINEAR_CHUNKED = "`F.linear_cross_entropy` in chunks"
LOSSES_ALONE = "the same without them"
ALL_REDUCE = "a bare `all_reduce` of 35 int64"
WITHOUT = "the same fit without it"


class Taken(NamedTuple):
    """What a function says that it took, where not all that it does is to be counted.

    Attributes:
        seconds: How long it took.
        of_which: How many of them are the library's own.
    """

    seconds: float
    of_which: float = 0.0


class Cost(NamedTuple):
    """What a function costs.

    Attributes:
        seconds: Of a call, the median of all rounds.
        of_which: See `Taken`.
        faults: Minor page faults of a call, the median of all rounds.
        system: The share of all its CPU time that was the operating system's, where page faults are handled.
        note: What else was counted.
        error: Of the value that it makes, a mean loss in nats, against float64; None if it makes none.
    """

    seconds: float
    of_which: float
    faults: float
    system: float
    note: str = ""
    error: float | None = None


Costs = dict[str, "Cost | str"]


@dataclass(frozen=True)
class Valued:
    """A function that makes a value of a batch of logits.

    Attributes:
        function: What is measured.
        value: The mean loss that it makes of the batch alone, in nats.
        logits_and_target: The batch.
    """

    function: Function
    value: Callable[[], float]
    logits_and_target: tuple[Tensor, Tensor]

    def __call__(self) -> object:
        return self.function()

    def error(self) -> float:
        return self.value() - true_losses(*self.logits_and_target).mean().item()


@dataclass(frozen=True)
class Case:
    """A block of the table.

    Attributes:
        what: What of the library is measured.
        functions: Make what is measured, from `shape`: the library first, then what it is compared with.
        shape: The sizes; in a quick run each is at most `QUICK`.
        threads: Of torch. Targets for large batches are for two cores; a tiny one is faster on one.
        rounds: How often each function is measured.
        calls: How often it is called for that.
        targets: At most how many times the time of what it is compared with the library should take.
        at_most: The seconds that it should take.
        note: What to count beside the time.
        run: How to measure, if not by `run_here`.
    """

    what: str
    functions: Callable[[Shape], Functions]
    shape: Shape
    threads: int = 2
    rounds: int = 11
    calls: int = 1
    targets: Mapping[str, float] | None = None
    at_most: float | None = None
    note: Callable[[Cost, Function], str] = lambda cost, _: f"page faults: {cost.faults:,.0f}"
    run: Callable[[Case], Costs] | None = None

    def quick(self) -> Case:
        """Return the same with so little to do that its figures mean nothing."""
        return Case(**{**vars(self), "shape": small(self.shape), "rounds": 1, "calls": 1})


def small(shape: Shape) -> Shape:
    return tuple(min(size, QUICK) for size in shape)


# Measuring


def interleave(functions: Mapping[str, Function], rounds: int, calls: int = 1) -> dict[str, Cost]:
    """Measure each function once a round, so that all of them share whatever else the machine does meanwhile.

    The first round, in which caches are cold, is not thrown away: a median does not see it. What is slow is measured
    once.
    """
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if not samples[name] or samples[name][0][0] < SLOW:
                samples[name].append(sample(function, calls))
    costs = {}
    for name, rows in samples.items():
        seconds, of_which, faults, user, system = zip(*rows, strict=True)
        share = sum(system) / max(sum(user) + sum(system), 1e-9)  # Of all rounds: the clock of one is coarse.
        costs[name] = Cost(median(seconds), median(of_which), median(faults), share)
    return costs


def sample(function: Function, calls: int) -> tuple[float, ...]:
    """Return the cost of a call: seconds, which of them are the library's, page faults, user and system time."""
    before, started = getrusage(RUSAGE_SELF), time.perf_counter()
    for _ in range(calls):
        result = function()
    seconds = (time.perf_counter() - started) / calls
    after = getrusage(RUSAGE_SELF)
    taken = result if isinstance(result, Taken) else Taken(seconds)
    names = ("ru_minflt", "ru_utime", "ru_stime")
    return *taken, *((getattr(after, name) - getattr(before, name)) / calls for name in names)


def run_here(case: Case) -> Costs:
    """Measure a case in this process."""
    torch.set_num_threads(case.threads)
    functions = case.functions(case.shape)
    # What cannot run says so on a small input, which also fills what the first call of an operator has to fill.
    tried = {name: why_not(function) for name, function in case.functions(small(case.shape)).items()}
    refused = {name: reason if isinstance(functions[name], str) else tried[name] for name, reason in functions.items()}
    runnable: dict[str, Any] = {name: function for name, function in functions.items() if not refused[name]}
    measured = interleave(runnable, case.rounds, case.calls)
    costs: Costs = {}
    for name, reason in refused.items():
        if reason:
            costs[name] = str(reason)
            continue
        cost, function = measured[name], runnable[name]
        error = function.error() if isinstance(function, Valued) else None
        costs[name] = cost._replace(note=case.note(cost, function), error=error)
    return with_one_read(costs)


def why_not(function: Function | str) -> str:
    """Call a function and return why it cannot run; nothing if it can."""
    if isinstance(function, str):
        return function
    try:
        function()
    except Exception as error:
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """Return one line of an error that fits into a cell."""
    return f"cannot run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}".replace("|", "/")


def attempt(make: Callable[[], Function]) -> Function | str:
    """Make what needs a package that may not be there."""
    try:
        return make()
    except Exception as error:
        return reason(error)


def with_one_read(costs: Costs) -> Costs:
    """Put the fastest of the reads in place of all of them."""
    reads = {name: cost for name, cost in costs.items() if name in READS and isinstance(cost, Cost)}
    if not reads:
        return costs
    fastest = min(reads, key=lambda name: reads[name].seconds)
    library, *others = ((name, cost) for name, cost in costs.items() if name not in READS)
    return dict([library, (ONE_READ, reads[fastest]._replace(note=f"`{fastest}`")), *others])


class Operators(TorchDispatchMode):
    """Counts the ATen operators that run and are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def num_operators(_: Cost, function: Function) -> str:
    with Operators() as operators:
        function()
    return f"{operators.count} operators"


def share_of_library(cost: Cost, _: Function) -> str:
    return f"{cost.of_which / cost.seconds:.2%} in its hook" if cost.of_which else ""


def extra_memory(function: Function, patient: bool) -> list[int | None]:
    """Return the most bytes that a call holds beyond what it found: as the kernel counts them, and torch's allocator.

    What is slow is called again for the second only if one is patient.
    """
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts again from here. Linux only.
    before, started = resident("VmRSS"), time.perf_counter()
    function()
    of_kernel, seconds = max(0, resident("VmHWM") - before), time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        return [of_kernel, allocator_peak(function, Path(folder)) if patient or seconds < SLOW else None]


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# What is measured


def logits_and_target(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype), torch.randint(shape[-1], shape[:-1])


def updates(dtype: torch.dtype, shape: Shape) -> Functions:
    """A large batch, once through each metric, and once read."""
    batch = preds, target = logits_and_target(shape, dtype)
    functions: Functions = {"`CrossEntropy.update`": own_update(batch)}
    functions |= {"sum()": preds.sum, "max()": preds.max, "amax(-1)": lambda: preds.amax(-1)}
    functions[FULL] = Valued(partial(F.cross_entropy, *batch), lambda: F.cross_entropy(*batch).item(), batch)
    if dtype != torch.float32:
        upcast = lambda: F.cross_entropy(preds.float(), target)  # noqa: E731
        functions[UPCAST] = Valued(upcast, lambda: upcast().item(), batch)
    sequence = preds[None], target[None]
    value = lambda: math.log(perplexity(*sequence).item())  # noqa: E731
    functions[TORCHMETRICS] = Valued(partial(Perplexity().update, *sequence), value, batch)
    functions[TORCHEVAL] = attempt(lambda: torcheval_update(*sequence))
    return functions


def own_update(batch: tuple[Tensor, Tensor], backend: Any = "auto") -> Function:
    update = partial(CrossEntropy(backend=backend).update, *batch)
    return Valued(update, lambda: cross_entropy(*batch, backend=backend).item(), batch)


def compiled_updates(dtype: torch.dtype, shape: Shape) -> Functions:
    """The same with compiled losses, beside those that are not."""
    batch = preds, _ = logits_and_target(shape, dtype)
    functions: Functions = {'`CrossEntropy(backend="compile").update`': own_update(batch, backend="compile")}
    functions |= {"sum()": preds.sum, "max()": preds.max, "amax(-1)": lambda: preds.amax(-1)}
    return {**functions, "`CrossEntropy.update`": own_update(batch)}


def torcheval_update(preds: Tensor, target: Tensor) -> Function:
    from torcheval.metrics import Perplexity as OfTorcheval  # noqa: PLC0415

    temporary = target.numel() ** 2 * preds.element_size()
    if temporary > 2**30:
        raise MemoryError(f"its N x N temporary has {temporary / 2**30:.1f} GiB")
    value = lambda: math.log(OfTorcheval().update(preds, target).compute().item())  # noqa: E731
    return Valued(partial(OfTorcheval().update, preds, target), value, (preds[0], target[0]))


def mostly_ignored(shape: Shape) -> Functions:
    preds, target = logits_and_target(shape)
    few = target.masked_fill(torch.rand(target.shape) < 0.9, -100)
    metric = CrossEntropy()
    return {
        "`CrossEntropy.update`, 90 % ignored": lambda: metric.update(preds, few),
        NONE_IGNORED: lambda: metric.update(preds, target),
        FULL: lambda: F.cross_entropy(preds, few, reduction="sum"),
    }


def reports(dtype: torch.dtype, shape: Shape) -> Functions:
    """A report of all that there is to say of predictions, beside one of losses."""
    batch = logits_and_target(shape, dtype)
    more, alone = (CrossEntropyReport(accuracy=x, entropy=x) for x in (True, False))
    with_accuracy = CrossEntropyReport(accuracy=True)
    return {
        "`CrossEntropyReport(accuracy=True, entropy=True).update`": lambda: more.update(*batch),
        "`CrossEntropyReport(accuracy=True).update`": lambda: with_accuracy.update(*batch),
        LOSSES_ALONE: lambda: alone.update(*batch),
    }


def ready_losses(shape: Shape) -> Functions:
    preds, target = logits_and_target(shape)
    rows, flat = preds.view(-1, shape[-1]), target.view(-1)
    losses = F.cross_entropy(rows, flat, reduction="none").view_as(target)
    metric = CrossEntropy(input="losses")
    return {
        '`CrossEntropy(input="losses").update`': lambda: metric.update(losses, target),
        OF_256: lambda: F.cross_entropy(rows, flat, reduction="none"),
    }


def tiny(method: str, shape: Shape) -> Functions:
    """A batch so small that only the number of operations counts."""
    preds, target = logits_and_target(shape)
    # The loss is given to the peers, as it would be in training.
    batch = {"preds": preds, "target": target, "value": F.cross_entropy(preds.mT, target), "weight": target.numel()}
    report = CrossEntropyReport()
    functions: Functions = {f"`CrossEntropyReport.{method}`": partial(getattr(report, method), preds, target)}
    functions[TORCHMETRICS] = partial(getattr(Perplexity(), method), preds, target)
    functions[THREE] = partial(getattr(collection_of_three(), method), **batch)
    return functions


def collection_of_three() -> torchmetrics.MetricCollection:
    means = {name: torchmetrics.MeanMetric(**UNCACHED) for name in ("loss", "bits")}
    return torchmetrics.MetricCollection({"perplexity": Perplexity(**UNCACHED), **means})


def linear(dtype: torch.dtype, shape: Shape) -> Functions:
    """Hidden states, through a language model's head and into a loss."""
    rows, width, num_classes = shape
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(num_classes, width).div(width**0.5).to(dtype)
    target = torch.randint(num_classes, (rows,))
    metric = CrossEntropy()
    return {
        "`CrossEntropy.update(LinearLogits(...))`": lambda: metric.update(LinearLogits(hidden, weight), target),
        MATMUL: lambda: F.linear(hidden, weight),
        LINEAR_FULL: lambda: F.cross_entropy(F.linear(hidden, weight), target, reduction="sum"),
        LINEAR_CHUNKED: attempt(lambda: linear_in_chunks(hidden, weight, target)),
    }


def linear_in_chunks(hidden: Tensor, weight: Tensor, target: Tensor) -> Function:
    # Without options it makes all logits at once. A sum in bfloat16 would have two digits.
    settings: Any = {"options": torch.nn.LinearCrossEntropyOptions(), "reduction": "none"}
    return partial(F.linear_cross_entropy, hidden, weight, target, **settings)


def fits(form: str, shape: Shape) -> Functions:
    """Short fits of the example's model in the demo's configuration, on characters drawn at random."""
    steps, batch_size, window = shape
    torch.manual_seed(0)
    characters = torch.randint(VOCAB, (steps * batch_size, window + 1))
    batches = DataLoader(TensorDataset(characters[:, :-1], characters[:, 1:]), batch_size)
    return {
        f"`CrossEntropyMonitor(dashboards=())`, {form}": attempt(lambda: fit(form, batches, monitored=True)),
        WITHOUT: attempt(lambda: fit(form, batches, monitored=False)),
    }


def fit(form: str, batches: DataLoader[Any], monitored: bool) -> Function:
    from lightning.pytorch import Callback, Trainer  # noqa: PLC0415
    from lightning.pytorch.loggers import TensorBoardLogger  # noqa: PLC0415

    from xent_metrics.lightning import CrossEntropyMonitor  # noqa: PLC0415

    class Clock(Callback):
        """From the first step to the last, without what a fit does before and after."""

        def on_train_batch_start(self, *args: Any) -> None:
            if args[-1] == 0:
                self.started = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    class Monitor(CrossEntropyMonitor):
        """Says how long its own hook takes, which is less noisy than the difference of two fits."""

        seconds = 0.0

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            super().on_train_batch_end(*args, **kwargs)
            self.seconds += time.perf_counter() - started

    model_class = char_model(form)

    def run() -> Taken:
        torch.manual_seed(0)
        clock, monitors = Clock(), [Monitor(dashboards=())] if monitored else []
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                gradient_clip_val=1.0,
                limit_val_batches=0,
                log_every_n_steps=10,
                logger=TensorBoardLogger(folder, default_hp_metric=False),
                callbacks=[*monitors, clock],
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            logging.disable(logging.INFO)  # Every fit would say what machine it is on.
            try:
                trainer.fit(model_class(VOCAB), batches, batches)
            finally:
                logging.disable(logging.NOTSET)
        own = sum(monitor.seconds for monitor in monitors)
        return Taken(clock.seconds / len(batches), own / len(batches))

    return run


def char_model(form: str) -> Any:
    """Return the class of the example's model, whose training step returns losses, or logits."""
    sys.path.insert(0, str(ROOT / "examples" / "char_lm"))
    try:
        from model import CharModel  # type: ignore[import-not-found]  # noqa: PLC0415
    finally:
        sys.path.pop(0)

    class WithLogits(CharModel):  # type: ignore[misc]
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
            inputs, target = batch
            logits = self(inputs)
            return {"loss": F.cross_entropy(logits.mT, target), "logits": logits.detach(), "target": target}

    return {"losses": CharModel, "logits": WithLogits}[form]


def imports(_: Shape) -> Functions:
    code = (
        "import time, torch, torchmetrics; started = time.perf_counter(); import xent_metrics; "
        "print(time.perf_counter() - started)"
    )
    command = [sys.executable, "-c", code]
    # With the bytecode that an installed package has; the call that is tried first writes it.
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def run() -> Taken:
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=True)
        return Taken(float(done.stdout))

    return {"`import xent_metrics`": run}


def reads_of_two_ranks(method: str, _: Shape) -> Functions:
    """What two ranks that have seen a tiny batch do together; runs on each of them."""
    preds, target = logits_and_target(TINY)
    numbers = torch.zeros(35, dtype=torch.int64)
    metric = {"CrossEntropy": CrossEntropy, "CrossEntropyReport": CrossEntropyReport}[method]()
    metric.update(preds, target)
    perplexity, three = Perplexity(**UNCACHED), collection_of_three()
    perplexity.update(preds, target)
    three.update(preds=preds, target=target, value=preds.sum(), weight=1)
    peers: Functions = {TORCHMETRICS: perplexity.compute}
    if method == "CrossEntropyReport":
        peers = {THREE: three.compute}
    return {f"`{method}.compute`": metric.compute, ALL_REDUCE: lambda: dist.all_reduce(numbers), **peers}


def run_on_two_ranks(case: Case) -> Costs:
    """Measure a case on two processes that meet in every call; the time is the first one's."""
    with tempfile.TemporaryDirectory() as folder:
        first, _ = run_ranks(2, measure_on_rank, case.what, case.rounds, tmp_path=Path(folder))
    return {name: Cost(*cost) for name, cost in first.items()}


def measure_on_rank(_: int, what: str, rounds: int) -> dict[str, tuple[Any, ...]]:
    # Plain tuples go back: a class of a script is another one in another process.
    case = next(case for case in CASES if case.what == what)
    functions: Any = case.functions(case.shape)
    costs = {}
    for name, cost in interleave(functions, rounds).items():
        with Collectives() as collectives:
            functions[name]()
        number = len(collectives.taken())
        costs[name] = tuple(cost._replace(note=f"{number} collective{'s' * (number > 1)}"))
    return costs


CASES = (
    Case(
        "4096 x 32,000 logits, float32",
        partial(updates, torch.float32),
        LOGITS,
        targets={ONE_READ: 3.6, TORCHMETRICS: 0.30},
    ),
    Case(
        "4096 x 32,000 logits, bfloat16",
        partial(updates, torch.bfloat16),
        LOGITS,
        targets={ONE_READ: 6.0, UPCAST: 0.16},
    ),
    Case(
        "2048 x 32,000 logits, 90 % of targets ignored",
        mostly_ignored,
        (2048, 32_000),
        targets={NONE_IGNORED: 0.35},
    ),
    *(
        Case(
            f"4096 x 32,000 logits, {str(dtype).removeprefix('torch.')}, compiled",
            partial(compiled_updates, dtype),
            LOGITS,
            targets=targets,
        )
        for dtype, targets in ((torch.float32, {ONE_READ: 3.0}), (torch.bfloat16, {ONE_READ: 6.0}))
    ),
    *(
        Case(
            f"accuracy and entropy of 4096 x 32,000 logits, {str(dtype).removeprefix('torch.')}",
            partial(reports, dtype),
            LOGITS,
            targets={LOSSES_ALONE: 1.35},
        )
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Case("65,536 losses that are there already", ready_losses, (64, 1024, 256), targets={OF_256: 0.01}),
    Case("the same as 65,536 sequences of one", ready_losses, (65_536, 256), targets={OF_256: 0.01}),
    Case(
        "`update` of a tiny batch, 2 x 8 x 50",
        partial(tiny, "update"),
        TINY,
        threads=1,
        rounds=25,
        calls=100,
        at_most=150e-6,
        note=num_operators,
    ),
    Case(
        "`forward` of a tiny batch, 2 x 8 x 50",
        partial(tiny, "forward"),
        TINY,
        threads=1,
        rounds=25,
        calls=50,
        targets={THREE: 0.4},
        note=num_operators,
    ),
    *(
        Case(
            f"two gloo ranks, `{name}.compute`",
            partial(reads_of_two_ranks, name),
            TINY,
            threads=1,
            rounds=200,
            targets={ALL_REDUCE: 1.3},
            run=run_on_two_ranks,
        )
        for name in ("CrossEntropy", "CrossEntropyReport")
    ),
    *(
        Case(
            f"head of {rows} x {width:,} x {num_classes:,}, {str(dtype).removeprefix('torch.')}",
            partial(linear, dtype),
            (rows, width, num_classes),
            rounds=3,
            targets={MATMUL: 1.10},
        )
        for rows, width, num_classes in ((1024, 768, 32_000), (512, 1024, 128_256))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        Case(
            f"a training step of the demo, a step returns {form}",
            partial(fits, form),
            (40, 16, 64),
            threads=1,
            rounds=5,
            targets={WITHOUT: target},
            note=share_of_library,
        )
        for form, target in (("losses", 1.01), ("logits", 1.05))
    ),
    Case(
        "import, beyond torch and torchmetrics",
        imports,
        (),
        threads=1,
        rounds=3,
        at_most=50e-3,
        note=lambda *_: "",
    ),
)

BIG = 2  # So many of the first cases are measured again with other allocators, and their memory is.
MEMORY = {  # At most so many bytes, by the number of the case.
    **dict.fromkeys(range(BIG), 8 * 2**20 + 64 * LOGITS[0]),
    **{index: 64 * 2**20 for index, case in enumerate(CASES) if case.what.startswith("head")},
}

# Blocks of a page or more go back to the system as soon as they are freed, so that no call lives on an earlier one's.
# So does what MKL takes for a matmul, which it would otherwise keep for the next one.
NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "4096", "MKL_DISABLE_FAST_MM": "1"}
ALLOCATORS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("default malloc", {}),
    "keep": (
        "malloc that keeps pages",
        {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)},
    ),
    "thp": ("huge pages", {"THP_MEM_ALLOC_ENABLE": "1"}),
}
OF_ALLOCATORS = ("MALLOC_", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "GLIBC_TUNABLES")


# In a process of its own: a part by name, which prints JSON


def elsewhere(part: str, quick: bool, settings: Mapping[str, str]) -> Any:
    """Run a part in a fresh process, with these settings of the allocator and no others."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OF_ALLOCATORS)}
    command = [sys.executable, "-m", "tests.bench", "--part", part, *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, env={**clean, **settings}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def part_speed(quick: bool) -> list[Any]:
    """The costs of the first cases."""
    return [measure(case.quick() if quick else Case(**{**vars(case), "rounds": 5})) for case in CASES[:BIG]]


def part_memory(quick: bool) -> list[Any]:
    """The extra memory of cases, by the names of what is measured."""
    return [memory_of(CASES[index].quick() if quick else CASES[index]) for index in MEMORY]


def memory_of(case: Case) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    for function in case.functions(small(case.shape)).values():
        why_not(function)  # What an operator keeps from its first call on is not counted.
    found: dict[str, Any] = {}
    for name, function in case.functions(case.shape).items():
        if name not in READS:
            # The library is the first, and has a target.
            found[name] = function if isinstance(function, str) else extra_memory(function, patient=not found)
    return found


PARTS: dict[str, Callable[[bool], list[Any]]] = {"speed": part_speed, "memory": part_memory}


# The report


def measure(case: Case) -> Costs:
    """Measure a case, or say why it cannot be."""
    try:
        return (case.run or run_here)(case)
    except Exception as error:
        return {"everything": reason(error)}


def time_rows(case: Case, costs: Costs) -> Iterator[str]:
    """A row for the library, and one for each that it is compared with."""
    (first, library), *_ = costs.items()
    for name, cost in costs.items():
        error = "" if isinstance(cost, str) or cost.error is None else f"{cost.error:+.1e}"
        what = f"**{case.what}**, {case.threads} thread{'s' * (case.threads > 1)}" if name == first else ""
        if isinstance(cost, str) or isinstance(library, str):
            yield row(what, name, cost if isinstance(cost, str) else duration(cost.seconds), "", "", "", error)
            continue
        ratio, limit = library.seconds / cost.seconds, (case.targets or {}).get(name)
        if name == first:
            goal = target(library.seconds, case.at_most, duration)
            yield row(what, name, duration(cost.seconds), "", goal, cost.note, error)
        else:
            goal = target(ratio, limit, times)
            yield row(what, name, duration(cost.seconds), times(ratio), goal, cost.note, error)


def memory_rows(index: int, found: Mapping[str, Any]) -> Iterator[str]:
    for number, (name, value) in enumerate(found.items()):
        what = "" if number else f"**{CASES[index].what}**"
        if isinstance(value, str):
            yield row(what, name, value, "", "")
            continue
        of_kernel, of_torch = value
        written = "" if of_torch is None else mebibytes(of_torch)
        # What a matmul takes for itself inside the mathematics library is none of a metric's business.
        counted = of_torch if CASES[index].what.startswith("head") else of_kernel
        goal = "" if number or counted is None else target(counted, MEMORY[index], mebibytes)
        yield row(what, name, mebibytes(of_kernel), written, goal)


def allocator_rows(runs: Mapping[str, Any]) -> Iterator[str]:
    """Of each function, the cost with each allocator, and what page faults take of the first."""
    for index, case in enumerate(CASES[:BIG]):
        tables = {name: {who: revived(cost) for who, cost in run[index].items()} for name, run in runs.items()}
        for number, who in enumerate(next(iter(tables.values()))):
            cells = [allocator_cell(table, who) for table in tables.values()]
            yield row("" if number else f"**{case.what}**", who, *cells, lost_to_faults(tables, who))


def revived(cost: Any) -> Cost | str:
    return cost if isinstance(cost, str) else Cost(*cost)


def allocator_cell(table: Costs, who: str) -> str:
    library, cost = next(iter(table.values())), table.get(who, "")
    if isinstance(cost, str) or isinstance(library, str):
        return cost if isinstance(cost, str) else duration(cost.seconds)
    beside = "" if cost is library else f"{times(library.seconds / cost.seconds)}; "
    return f"{duration(cost.seconds)} ({beside}{cost.faults:,.0f} faults)"


def lost_to_faults(tables: Mapping[str, Costs], who: str) -> str:
    """Tell page faults' share of the default's time in two ways: what keeping pages saves, and what the system took."""
    default, kept = (tables.get(name, {}).get(who) for name in ("default", "keep"))
    if not isinstance(default, Cost):
        return ""
    saved = f"{1 - kept.seconds / default.seconds:.0%} of time; " if isinstance(kept, Cost) else ""
    return f"{saved}{default.system:.0%} of CPU time"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    return [row(*cells), row(*("---" for _ in cells))]


def duration(seconds: float) -> str:
    unit, scale = next(
        (unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if seconds * scale >= 1 or unit == "us"
    )
    return f"{seconds * scale:.3g} {unit}"


def mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def times(ratio: float) -> str:
    return f"{ratio:.3g} x" if ratio < 0.1 else f"{ratio:.2f} x"


def target(value: float, limit: float | None, written: Callable[[float], str]) -> str:
    if limit is None:
        return ""
    return f"<= {written(limit)}: {'yes' if value <= limit else 'no'}"


def describe_machine() -> Iterator[str]:
    names = ("torch", "torchmetrics", "torcheval", "lightning")
    versions = ", ".join(f"{name} {installed(name)}" for name in names)
    settings = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(OF_ALLOCATORS)]
    yield f"- {cpu_model()}, {os.cpu_count()} cores; {platform.system()}, Python {platform.python_version()}"
    yield f"- {versions}"
    yield f"- {date.today().isoformat()}; allocator: {', '.join(settings) or 'default'}; huge pages: {huge_pages()}"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "unknown processor")


def huge_pages() -> str:
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return setting.partition("[")[2].partition("]")[0]


class Load:
    """Says how busy others keep the machine: at the start by its load average, later by the CPU time of all but us."""

    def __init__(self) -> None:
        self.started, self.others_before, self.load = time.perf_counter(), self._others(), os.getloadavg()[0]

    def at_start(self) -> str:
        warning = " **The machine is busy: do not trust the figures below.**" if self.load > 1 else ""
        return f"- load average at the start: {self.load:.1f}.{warning}"

    def at_end(self) -> str:
        seconds = time.perf_counter() - self.started
        others = (self._others() - self.others_before) / seconds
        warning = " **The machine was busy: do not trust the figures above.**" if others > 0.1 else ""
        load = f"load average at the end: {os.getloadavg()[0]:.1f}, of which 1 to 2 are this run"
        return f"Took {seconds:.0f} s; {load}; others (the two ranks among them) kept {others:.2f} cores busy.{warning}"

    def _others(self) -> float:
        """CPU seconds of all processes but this one and those that it has waited for."""
        try:
            user, nice, system, _, _, irq, soft, stolen, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
        except OSError:
            return 0.0
        ticks = user + nice + system + irq + soft + stolen
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def report(quick: bool, allocators: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the report as they are known."""
    load = Load()
    yield from describe_machine()
    yield "- targets are for two idle cores; a round measures each function once, the figures are medians of rounds"
    if quick:
        yield f"- **a quick run: no size is above {QUICK}, whatever the table says, and the figures mean nothing**"
    yield load.at_start()
    yield ""
    yield "### Time"
    yield ""
    yield from head("what", "measured", "time of a call", "library / this", "target", "besides", "error")
    for case in CASES:
        yield from time_rows(case, measure(case.quick() if quick else case))
    yield ""
    yield "### Extra memory of a call"
    yield ""
    yield "Of the process: its peak (VmHWM) less what was there (VmRSS); a fresh one whose malloc and MKL keep nothing."
    yield "Of torch's allocator: the profiler's peak, without what a matmul takes for itself; targets of heads mean it."
    yield ""
    yield from head("what", "measured", "of the process", "of torch's allocator", "target")
    try:
        found = elsewhere("memory", quick, NOTHING_KEPT)
        for index, values in zip(MEMORY, found, strict=True):
            yield from memory_rows(index, values)
    except Exception as error:
        yield row(reason(error), "", "", "", "")
    if allocators:
        yield ""
        yield "### What the allocator does to the first two"
        yield ""
        yield "Time of a call (library / this; its minor page faults), in fresh processes. Settings:"
        yield ""
        for name in allocators:
            settings = " ".join(f"{key}={value}" for key, value in ALLOCATORS[name][1].items())
            yield f"- {ALLOCATORS[name][0]}: {f'`{settings}`' if settings else 'none'}"
        yield ""
        yield from head(
            "what", "measured", *(ALLOCATORS[name][0] for name in allocators), "saved by keeping; system time"
        )
        try:
            yield from allocator_rows({name: elsewhere("speed", quick, ALLOCATORS[name][1]) for name in allocators})
        except Exception as error:
            yield row(reason(error), *("" for _ in allocators), "", "")
    yield ""
    yield load.at_end()


def publish(lines: Iterable[str], page: Path | None) -> None:
    """Print the lines of a report as they come, and put them into a page if there is one."""
    printed = []
    for line in lines:
        print(line, flush=True)
        printed.append(line)
    if page:
        put_between_marks(page, "\n".join(printed))


def put_between_marks(path: Path, text: str) -> None:
    """Put a report in place of the one that a page has."""
    parts = path.read_text().split(MARK)
    if len(parts) != 3:
        sys.exit(f"{path} must have two lines {MARK}, it has {len(parts) - 1}.")
    path.write_text(f"{parts[0]}{MARK}\n\n{text}\n\n{MARK}{parts[2]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: shows only that it runs")
    parser.add_argument(
        "--allocator", nargs="*", choices=ALLOCATORS, default=list(ALLOCATORS), help="which to try; none to skip them"
    )
    parser.add_argument("--into", type=Path, help=f"also put the report between the {MARK} lines of a page")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        print(json.dumps(PARTS[options.part](options.quick)))
        return
    publish(report(options.quick, options.allocator), options.into)


if __name__ == "__main__":
    main()
