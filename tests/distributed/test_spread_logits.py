"""Logits whose classes are spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.cases import CASES
from tests.distributed.ranks import Collectives, run_ranks
from tests.score_rows import make_rows
from xent_metrics import CrossEntropy, CrossEntropyReport, functional
from xent_metrics.readings import ExactReading

if TYPE_CHECKING:
    from pathlib import Path
from tests.distributed.shares import (
    FUNCTIONS,
    METRICS,
    alone,
    assert_close,
    bits,
    distributed,
    error,
    made,
    make_data,
    numbers,
    update,
)

MANY = 1000


class Scored(NamedTuple):
    """Logits and targets, and what decides the losses."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    options: Mapping[str, Any] = MappingProxyType({})


def cases(num_classes: int) -> Iterator[tuple[str, Scored]]:
    """Yield everything that a loss of whole rows may depend on."""
    generator = torch.Generator().manual_seed(num_classes)
    if num_classes > MANY:  # More rows than are worked on at once.
        logits = 3 * torch.randn(3, 800, num_classes, generator=generator)
        target = torch.randint(num_classes, (3, 800), generator=generator)
        yield "many rows", Scored(logits, target, None, {"label_smoothing": 0.1})
        yield "many columns", Scored(logits.mT, target, None, {"class_dim": 1})
        yield "flat tail", Scored(*make_rows("flat tail, 6 to 10 below", 64, num_classes))
        return
    logits = 3 * torch.randn(6, 4, num_classes, generator=generator)
    target = torch.randint(num_classes, (6, 4), generator=generator)
    target[0, 1] = -100
    weight = torch.rand(6, 4, generator=generator)
    class_weight = torch.linspace(0, 3, num_classes)
    for name, options in {
        "plain": {},
        "smoothed": {"label_smoothing": 0.1},
        "smoothed over others": {"label_smoothing": 0.1, "label_smoothing_over": "others"},
        "nothing but smoothing": {"label_smoothing": 1.0},
        "class weights": {"class_weight": class_weight},
        "smoothed class weights": {"class_weight": class_weight.double(), "label_smoothing": 0.2},
        "ignored class": {"ignore_index": 2},
        "all scored": {"ignore_index": None},
        "shifted": {"shift": True},
    }.items():
        yield name, Scored(logits, target, None, options)
        yield f"{name}, weighted", Scored(logits, target, weight, options)
    channels = {"class_dim": 1}
    yield "class_dim", Scored(logits.mT.contiguous(), target, None, channels)
    yield "class_dim, strided", Scored(logits.mT, target, weight, channels)
    yield (
        "class_dim of images",
        Scored(logits.view(3, 2, 4, -1).permute(0, 3, 1, 2), target.view(3, 2, 4), None, channels),
    )
    yield "class_dim, shifted", Scored(logits.mT, target, None, channels | {"shift": True})
    yield "very large", Scored((logits * 0 + 1e30), target)
    yield "one sequence", Scored(logits[0], target[0])
    yield "one row", Scored(logits[0, 0], target[0, 0])
    yield "no rows", Scored(logits[:0], target[:0])
    yield "mask", Scored(logits, target, weight > 0.5)
    yield "uint8", Scored(logits, target.clamp(min=0).to(torch.uint8))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield str(dtype), Scored(logits.to(dtype), target, None, {"label_smoothing": 0.1})
    yield "large", Scored(logits * 1e4, target)
    yield "large, smoothed", Scored(logits * 1e4, target, None, {"label_smoothing": 0.1})
    beyond = target.clone()
    beyond[1] = torch.tensor([num_classes, -1, 2**40, -(2**40)])
    yield "out of range", Scored(logits, beyond, weight)
    unlikely = logits.clone()
    unlikely[1, :, 1:] = -math.inf
    unlikely[2, 0] = -math.inf
    unlikely[3, 0, :-1] = -math.inf
    unlikely[3, 1, 0] = math.inf
    unlikely[4, 0, -1] = math.nan
    unlikely[4, 1, 0] = math.nan
    yield "not finite", Scored(unlikely, target)
    yield "not finite, smoothed", Scored(unlikely, target, None, {"label_smoothing": 0.1, "class_weight": class_weight})
    yield "not finite, ignored", Scored(unlikely, target.masked_fill(unlikely.isfinite().all(-1).logical_not(), -100))


def spread(x: Tensor, mesh: DeviceMesh, dim: int = -1) -> DTensor:
    """Keep this rank's part of a tensor that all ranks have."""
    parts = x.chunk(mesh.size(), dim)
    rank = mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else x.narrow(dim, 0, 0)
    return DTensor.from_local(part, mesh, [Shard(dim)], shape=x.shape, stride=x.stride())


def score_cases(rank: int, sizes: list[int]) -> dict[str, Any]:
    """Tally every case from whole rows and from rows that are spread over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    seen = {}
    for num_classes in sizes:
        for name, (logits, target, weight, options) in cases(num_classes):
            spread_logits = spread(logits, mesh, options.get("class_dim", -1))
            whole = functional.tally(logits, target, weight=weight, **options)
            with Collectives() as collectives:
                parts = functional.tally(spread_logits, target, weight=weight, **options)
            seen[f"{num_classes}: {name}"] = (whole.totals(), parts.totals(), collectives.taken())
    return seen


def assert_losses_agree(seen: dict[str, Any], sizes: list[int]) -> None:
    """Counts and weights are equal, mean losses to 1e-6, and three numbers a row were exchanged after the largest."""
    for num_classes in sizes:
        for name, case in cases(num_classes):
            whole, parts, calls = seen[f"{num_classes}: {name}"]
            rows = (case.target[..., 1:] if "shift" in case.options else case.target).numel()
            exact = dict.fromkeys(("loss", "loss_loss", "loss_weight"), 0)

            assert parts._replace(**exact) == whole._replace(**exact), name
            assert ExactReading(parts, "omit").cross_entropy == pytest.approx(
                ExactReading(whole, "omit").cross_entropy, rel=1e-6, nan_ok=True
            ), name
            assert parts.loss_loss == pytest.approx(whole.loss_loss, rel=1e-5), name
            assert [(call.name, call.operation) for call in calls] == [("allreduce_", "MAX"), ("allreduce_", "SUM")], (
                name
            )
            assert [call.num_bytes for call in calls] == [(rows + 5) * 8, 3 * rows * 8], name


@distributed
def test_classes_spread_over_ranks(tmp_path: Path) -> None:
    """Losses of spread logits are those of whole rows, for any option, dtype and value; logits are never gathered."""
    sizes = [2, 7, 8, 2 * MANY + 1]
    first, second = run_ranks(2, score_cases, sizes, tmp_path=tmp_path)

    assert_losses_agree(first, sizes)
    assert first == second


@distributed
def test_classes_spread_over_four_ranks(tmp_path: Path) -> None:
    """The same for parts of unequal size on four ranks, and for more ranks than parts: 5 are 2, 2, 1 and none."""
    sizes = [5, 10]
    first, *others = run_ranks(4, score_cases, sizes, tmp_path=tmp_path)

    assert_losses_agree(first, sizes)
    assert others == [first] * 3


def read_mesh(rank: int) -> dict[str, Any]:
    """Read metrics on a mesh of 2 x 2: sequences are dealt to the rows, classes spread over the columns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    group, columns = mesh["data"].get_group(), mesh["classes"]
    own = make_data().rows(slice(mesh["data"].get_local_rank(), None, 2))
    seen, calls = {}, {}
    for name in SPREAD:
        data = own._replace(logits=spread(own.logits, columns), other=spread(own.other, columns))
        with Collectives() as collectives:
            metric = update(made(name, process_group=group), name, data)
            calls[name] = [call.operation for call in collectives.taken()]
            seen[name] = bits(metric.compute())
            calls[name] += [call.operation for call in collectives.taken()]
    whole = DTensor.from_local(own.logits, columns, [Replicate()])
    part = spread(own.logits, columns).to_local()
    placement = {"shape": own.logits.shape, "stride": own.logits.stride()}
    placed = DTensor.from_local(part, mesh, [Replicate(), Shard(-1)], **placement)
    with Collectives() as collectives:
        for name, logits in (("replicated", whole), ("on the whole mesh", placed)):
            metric = CrossEntropyReport(process_group=group)
            metric.update(logits, own.target)
            calls[name] = [call.operation for call in collectives.taken()]
            seen[name] = bits(metric.compute())
            collectives.taken()
        metric = CrossEntropyReport(process_group=group)
        metric.update(whole, own.soft)
        seen["replicated, soft"] = bits(metric.compute())
    values = {
        name: call(make_data()._replace(logits=spread(make_data().logits, columns)))
        for name, call in FUNCTIONS.items()
        if name in SPREAD_FUNCTIONS
    }
    expected = {name: FUNCTIONS[name](make_data()) for name in SPREAD_FUNCTIONS}
    seen["functions"] = {name: (bits(values[name]), bits(expected[name])) for name in SPREAD_FUNCTIONS}
    return {"values": seen, "calls": calls}


SPREAD = [
    name
    for name in METRICS  # Accuracy and entropy are of whole rows.
    if METRICS[name][1]["target"] == "target" and not {"accuracy", "entropy"} & set(CASES[name].options)
]

SPREAD_FUNCTIONS = (
    "cross_entropy",
    "bits_per_token",
    "perplexity",
    "bits_per_byte",
    "grouped_cross_entropy",
    "normalized_cross_entropy",
    "per_target_losses",
)


@distributed
def test_data_and_classes_on_a_mesh(tmp_path: Path) -> None:
    """With the data group as `process_group`, metrics of spread logits read all the data, each sequence once."""
    for seen in run_ranks(4, read_mesh, tmp_path=tmp_path):
        values, calls = seen["values"], seen["calls"]
        for name in SPREAD:
            updates = CASES[name].passes

            assert_close(values[name], alone(name, make_data()))
            assert calls[name] == ["MAX", "SUM"] * updates + ["SUM"], name
        assert values["replicated"] == alone("CrossEntropyReport", make_data())
        assert calls["replicated"] == []
        assert_close(values["on the whole mesh"], alone("CrossEntropyReport", make_data()))
        assert calls["on the whole mesh"] == ["MAX", "SUM"]
        soft = CrossEntropyReport()
        soft.update(make_data().logits, make_data().soft)
        assert values["replicated, soft"] == bits(soft.compute())
        for name, (value, expected) in values["functions"].items():
            assert numbers(value) == pytest.approx(numbers(expected), rel=1e-6, abs=1e-6, nan_ok=True), name


def make_head(num_classes: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """Make a language model's last layer, what goes in, and targets."""
    generator = torch.Generator().manual_seed(7)
    head = nn.Linear(6, num_classes, dtype=torch.float64)
    for parameter in head.parameters():
        nn.init.normal_(parameter, generator=generator)
    hidden = torch.randn(4, 5, 6, dtype=torch.float64, generator=generator)
    return head, hidden, torch.randint(num_classes, (4, 5), generator=generator)


def use_column_parallel_head(rank: int) -> dict[int, Any]:
    """Score what a column-parallel layer returns, in and out of training."""
    mesh, seen = init_device_mesh("cpu", (2,)), {}
    for num_classes in (7, 8):
        head, hidden, target = make_head(num_classes)
        head = parallelize_module(head, mesh, ColwiseParallel(use_local_output=False))
        logits = head(hidden)
        metric = CrossEntropy(sync_on_compute=False, shift=True)
        with Collectives() as collectives:
            metric.update(logits, target)
            operations = [call.operation for call in collectives.taken()]
        seen[num_classes] = (logits.to_local().shape[-1], bits(metric.compute()), operations)
    return seen


@distributed
def test_column_parallel_head(tmp_path: Path) -> None:
    """The output of `ColwiseParallel(use_local_output=False)` can be scored as it is."""
    ranks = run_ranks(2, use_column_parallel_head, tmp_path=tmp_path)
    for num_classes in (7, 8):
        head, hidden, target = make_head(num_classes)
        expected = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), target[:, 1:].flatten()).item()
        widths, values, operations = zip(*(seen[num_classes] for seen in ranks), strict=True)

        assert widths == (4, num_classes - 4)
        assert values[0] == values[1]
        assert numbers(values[0]) == pytest.approx([expected], rel=1e-12)
        assert operations == (["MAX", "SUM"],) * 2


def misplace(rank: int) -> dict[str, str]:
    """Pass logits that are spread in ways that are refused."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(4, 6, dtype=torch.int64)
    crooked = DTensor.from_local(x.split([3, 4], -1)[rank], mesh, [Shard(-1)], shape=x.shape, stride=x.stride())
    both = DTensor.from_local(
        spread(x, mesh).to_local(),
        init_device_mesh("cpu", (2, 1), mesh_dim_names=("classes", "data")),
        [Shard(-1), Shard(0)],
        shape=x.shape,
        stride=x.stride(),
    )
    calls: dict[str, Callable[[Any], object]] = {
        "sequences": lambda m: m.update(spread(x, mesh, 0), target),
        "time": lambda m: m.update(spread(x, mesh, 1), target),
        "classes are elsewhere": lambda m: m.update(spread(x.mT.contiguous(), mesh, -1), target),
        "partial": lambda m: m.update(DTensor.from_local(x, mesh, [Partial()]), target),
        "soft": lambda m: m.update(spread(x, mesh), x.softmax(-1)),
        "classes and sequences": lambda m: m.update(both, target),
    }
    seen = {}
    with Collectives() as collectives:
        for name, call in calls.items():
            metric = CrossEntropy(class_dim=1 if name == "classes are elsewhere" else -1)
            seen[name] = error(lambda call=call, metric=metric: call(metric))
            assert not metric.update_called
        for form in ("probs", "log_probs"):
            seen[form] = error(lambda form=form: CrossEntropy(input=form).update(spread(x, mesh), target))
        assert not collectives.taken()
        seen["crooked"] = error(lambda: CrossEntropy().update(crooked, target))
        seen["other targets"] = error(lambda: CrossEntropy().update(spread(x, mesh), target + rank))
        assert len(collectives.taken()) == 2  # That is how all of them know.
    return seen


@distributed
def test_logits_that_are_spread_otherwise(tmp_path: Path) -> None:
    """A DTensor that is not spread over the classes as `torch.chunk` would is refused on every rank, with the fix."""
    only_classes = "ValueError: `preds` must be a DTensor that is sharded over the classes only, on dimension {}, got "
    only_logits = "ValueError: `preds` that are sharded over the classes must be logits with integer targets, got "
    chunks = (
        "ValueError: `preds` must be a DTensor of the parts that torch.chunk gives, of as many classes on every rank, "
        "here {} of 7 classes, got {}; pass `shape`"
    )
    expected = {
        "sequences": only_classes.format(2) + "(Shard(dim=0),)",
        "time": only_classes.format(2) + "(Shard(dim=1),)",
        "classes are elsewhere": only_classes.format(1) + "(Shard(dim=2),)",
        "classes and sequences": only_classes.format(2) + "(Shard(dim=2), Shard(dim=0))",
        "partial": only_classes.format(2) + "(Partial(sum),)",
        "soft": only_logits + "input='logits' and torch.float32 targets",
        "probs": only_logits + "input='probs'",
        "log_probs": only_logits + "input='log_probs'",
    }
    for rank, seen in enumerate(run_ranks(2, misplace, tmp_path=tmp_path)):
        for name, text in expected.items():
            assert seen[name].startswith(text), name
        assert seen["crooked"].startswith(chunks.format(*((4, 3), (3, 4))[rank]))
        assert seen["other targets"].startswith(
            "ValueError: `target` must be the same on all ranks that share the classes"
        )


def pass_parts_without_shape(rank: int) -> str:
    """Score parts of 4 and 3 classes of which each rank was told only its own."""
    x, target, mesh = torch.eye(7), torch.arange(7), init_device_mesh("cpu", (2,))
    parts = DTensor.from_local(x.chunk(2, -1)[rank], mesh, [Shard(-1)])
    return error(lambda: CrossEntropy().update(parts, target))


@distributed
def test_parts_of_unknown_shape(tmp_path: Path) -> None:
    """Parts of which ranks do not agree how many classes there are raise on every rank."""
    for text in run_ranks(2, pass_parts_without_shape, tmp_path=tmp_path, timeout=60):
        assert text.startswith("ValueError: `preds` must be a DTensor of the parts")


def pass_crooked_parts(rank: int) -> str:
    """Score 10 classes in parts of 3, 3, 2 and 2, where `torch.chunk` would give 3, 3, 3 and 1."""
    x, group = torch.zeros(2, 10), dist.new_group(timeout=timedelta(seconds=3))
    mesh = DeviceMesh.from_group(group, "cpu")
    part = x.split([3, 3, 2, 2], -1)[rank]
    parts = DTensor.from_local(part, mesh, [Shard(-1)], shape=x.shape, stride=x.stride())
    return error(lambda: CrossEntropy().update(parts, torch.zeros(2, dtype=torch.int64)))


@distributed
def test_parts_of_which_some_have_the_wrong_size(tmp_path: Path) -> None:
    """Where the parts of some ranks are wrong, every rank raises."""
    for text in run_ranks(4, pass_crooked_parts, tmp_path=tmp_path, timeout=60):
        assert text.startswith("ValueError: `preds` must be a DTensor of the parts")
