"""Several real ranks: the same bits for any number of them, few collectives, errors that all raise, spread logits."""

from __future__ import annotations

import inspect
import itertools
import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchmetrics.text
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DistributedSampler
from torchmetrics import MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from tests.cases import CASES, GROUPS, TOKEN_BYTES, Case, K
from tests.distributed.ranks import Collective, Collectives, run_ranks
from tests.strategies import UNIT, tally_of
from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    NormalizedCrossEntropy,
    Perplexity,
    Tally,
    compute_together,
    functional,
    num_unpadded_samples,
)
from xent_metrics.readings import ExactReading
from xent_metrics.tally import tally_mean
from xent_metrics.tally.tally import COUNTS, GROUP_SIZE, STATE_SIZE

if TYPE_CHECKING:
    from pathlib import Path

NUM_ROWS, LENGTH, NUM_GROUPS = 24, 5, GROUPS
DTYPES = (torch.float32, torch.bfloat16)

distributed = pytest.mark.distributed


class Data(NamedTuple):
    """All that the metrics take, for some sequences; the first dimension counts them."""

    logits: Tensor
    other: Tensor
    target: Tensor
    soft: Tensor
    weight: Tensor
    group: Tensor
    num_bytes: Tensor
    score: Tensor
    label: Tensor

    def rows(self, index: Any) -> Data:
        """Return some of the sequences, whole."""
        return Data(*(x[index] for x in self))


def fields_of(case: Case) -> dict[str, str]:
    """Say which field of the data each argument of an update is; every other metric has weights."""
    binary = case.data.get("target", "").startswith("binary")
    weighed = [*CASES.values()].index(case) % 2
    fields = {
        "preds": "score" if binary else "logits",
        "preds_a": "logits",
        "preds_b": "other",
        "target": "label" if binary else "soft" if case.data.get("target") == "soft" else "target",
        "group": "group",
        "num_bytes": "num_bytes" if case.data.get("extra") else "",
        "weight": "weight" if weighed else "",
    }
    names = inspect.signature(case.metric_class.update).parameters
    return {name: fields[name] for name in names if fields.get(name)}


def fits(case: Case) -> bool:
    """Say whether a metric takes the data as they are: logits with classes last, of which -100 is ignored."""
    options = case.options
    return not ({"class_dim", "shift", "input", "pos_weight"} & set(options) or options.get("ignore_index") == 2) and (
        case.data.get("extra") != "number"
    )


# Each metric of the registry that takes these data, and what its update takes.
METRICS = {name: (case.metric, fields_of(case)) for name, case in CASES.items() if fits(case)}


def state_size(case: Case) -> int:
    """Return how many numbers a state has; each is 8 bytes."""
    if "num_groups" in case.options or "num_classes" in case.options:
        return GROUP_SIZE * (case.options.get("num_groups", K) + 1)
    if case.metric_class is CrossEntropyDecomposition:
        return 3 * STATE_SIZE
    return STATE_SIZE * (2 if case.metric_class is CrossEntropyReport and "token_bytes" in case.options else 1)


STATE_SIZES = {name: state_size(CASES[name]) for name in METRICS}


def make_data(dtype: torch.dtype = torch.float32, num_rows: int = NUM_ROWS) -> Data:
    """Make the same data everywhere: sequences of unequal difficulty, some targets ignored."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(num_rows, *shape, generator=generator) * torch.linspace(0.5, 4, num_rows).view(
            -1, *[1] * len(shape)
        )

    def draw_integers(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, (num_rows, *shape), generator=generator)

    target = draw_integers(K, LENGTH)
    target[draw(LENGTH) > 1.5] = -100
    return Data(
        logits=draw(LENGTH, K).to(dtype),
        other=draw(LENGTH, K).to(dtype),
        target=target,
        soft=draw(LENGTH, K).softmax(-1),
        weight=draw(LENGTH).abs(),
        group=draw_integers(NUM_GROUPS, 1),
        num_bytes=draw_integers(20),
        score=draw(LENGTH).to(dtype),
        label=draw_integers(2, LENGTH),
    )


def made(name: str, **kwargs: Any) -> Any:
    """Make a metric of the table."""
    return METRICS[name][0](**kwargs)


def update(metric: Any, name: str, data: Data) -> Any:
    """Update a metric of the table."""
    metric.update(**arguments(name, data))
    return metric


def arguments(name: str, data: Data) -> dict[str, Tensor]:
    """Return what an update of a metric takes of the data."""
    return {argument: getattr(data, field) for argument, field in METRICS[name][1].items()}


def bits(value: Any) -> Any:
    """Every bit of a value, or of a dict of values."""
    if isinstance(value, dict):
        return {name: bits(x) for name, x in value.items()}
    return " ".join(float(x).hex() for x in value.flatten().tolist())


def error(call: Callable[[], object]) -> str:
    """Return the type and text of the error of a call, or an empty string."""
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def deal(world_size: int, split: str) -> list[Tensor]:
    """Deal all sequences to ranks in a random order; the ranks may have unequally many, or one of them none."""
    generator = torch.Generator().manual_seed(world_size)
    order = torch.randperm(NUM_ROWS, generator=generator)
    if split == "even" or world_size == 1:
        return list(order.tensor_split(world_size))
    if split == "uneven":
        cuts = 1 + torch.randperm(NUM_ROWS - 2, generator=generator)[: world_size - 1].sort().values
        return list(order.tensor_split(cuts))
    shares = list(order.tensor_split(world_size - 1))
    return [*shares[: world_size // 2], order[:0], *shares[world_size // 2 :]]


def read_all(data: Data, batches: list[Tensor]) -> dict[str, Any]:
    """Read every metric of the table after some batches."""
    values = {}
    for name in METRICS:
        metric = made(name)
        for rows in batches:
            update(metric, name, data.rows(rows))
        values[name] = bits(metric.compute())
    return values


# How many ranks, how unequal their shares, and the type of the logits: every pair of two of these, and 8 ranks.
WORLDS = {
    1: [("even", torch.float32), ("even", torch.bfloat16)],
    2: [("uneven", torch.float32), ("one empty", torch.bfloat16)],
    3: [("even", torch.bfloat16), ("uneven", torch.bfloat16), ("one empty", torch.float32)],
    8: [("even", torch.float32), ("one empty", torch.bfloat16)],
}


def read_shares(rank: int) -> dict[tuple[str, torch.dtype], dict[str, Any]]:
    """Read every metric on ranks that go through their shares in batches of 3, the last one smaller."""
    values = {}
    for split, dtype in WORLDS[dist.get_world_size()]:
        rows = deal(dist.get_world_size(), split)[rank]
        values[split, dtype] = read_all(make_data(dtype), [*rows.split(3)] if len(rows) else [])
    return values


@distributed
@pytest.mark.parametrize("world_size", WORLDS)
def test_any_number_of_ranks_reads_the_bits_of_one_process(world_size: int, tmp_path: Path) -> None:
    """1, 2, 3 and 8 ranks read the bits of one process, however unequal their shares."""
    alone = {dtype: read_all(make_data(dtype), [torch.arange(NUM_ROWS)]) for dtype in DTYPES}
    for values in run_ranks(world_size, read_shares, tmp_path=tmp_path):
        assert list(values) == WORLDS[world_size]
        for (split, dtype), readings in values.items():
            assert readings == alone[dtype], (split, dtype)
    assert "nan" not in str(alone)
    assert len({str(x) for x in alone.values()}) == len(DTYPES)


def count_collectives(rank: int) -> dict[str, list[Collective]]:
    """Record what each call exchanges."""
    data = make_data().rows(slice(rank * 5, rank * 5 + 5))
    calls = {}
    with Collectives() as collectives:
        metrics = {name: made(name) for name in METRICS}
        for name, metric in metrics.items():
            update(metric, name, data)
            metric(**arguments(name, data))
            calls["update and forward", name] = collectives.taken()
            metric.compute()
            calls["compute", name] = collectives.taken()
            if rank == 0:
                update(metric, name, data)
            metric.compute()  # Also on the rank that has seen nothing since.
            calls["compute again", name] = collectives.taken()
        for name, function in FUNCTIONS.items():
            function(data)
            calls["function", name] = collectives.taken()
        compute_together(metrics)
        calls["together", "all"] = collectives.taken()
        collection = MetricCollection([CrossEntropy(), BitsPerToken(), Perplexity(), CrossEntropyReport()])
        collection.update(data.logits, data.target)
        compute_together(collection)
        calls["together", "collection"] = collectives.taken()
        reference = torchmetrics.text.Perplexity(ignore_index=-100)
        reference.update(data.logits, data.target)
        reference.compute()
        calls["torchmetrics", "one"] = collectives.taken()
        references = MetricCollection({str(i): torchmetrics.text.Perplexity(ignore_index=i) for i in (-100, 0, 1)})
        references.update(data.logits, data.target.clamp(min=0))
        references.compute()
        calls["torchmetrics", "three"] = collectives.taken()
    return calls


FUNCTIONS: dict[str, Callable[[Data], object]] = {
    "cross_entropy": lambda d: functional.cross_entropy(d.logits, d.target, d.weight),
    "bits_per_token": lambda d: functional.bits_per_token(d.logits, d.target),
    "perplexity": lambda d: functional.perplexity(d.logits, d.target),
    "bits_per_byte": lambda d: functional.bits_per_byte(d.logits, d.target, token_bytes=TOKEN_BYTES),
    "binary_cross_entropy": lambda d: functional.binary_cross_entropy(d.score, d.label),
    "cross_entropy_decomposition": lambda d: functional.cross_entropy_decomposition(d.logits, d.soft),
    "grouped_cross_entropy": lambda d: functional.grouped_cross_entropy(
        d.logits, d.target, d.group, num_groups=NUM_GROUPS
    ),
    "normalized_cross_entropy": lambda d: functional.normalized_cross_entropy(d.logits, d.target, num_classes=K),
    "cross_entropy_difference": lambda d: functional.cross_entropy_difference(d.logits, d.other, d.target),
    "per_target_losses": lambda d: functional.per_target_losses(d.logits, d.target),
    "tally": lambda d: functional.tally(d.logits, d.target),
}


def one_sum(size: int) -> list[Collective]:
    """One sum of so many int64 numbers, and nothing else."""
    return [Collective("allreduce_", "SUM", torch.int64, 8 * size)]


@distributed
def test_one_collective_for_each_reading(tmp_path: Path) -> None:
    """`compute` is one sum of 280 bytes (144 more for each group), whatever a rank has in store; an update is nothing.

    For comparison, torchmetrics makes a barrier and a gather for each of the two states of its perplexity.
    """
    for calls in run_ranks(2, count_collectives, tmp_path=tmp_path):
        for (when, name), made_calls in calls.items():
            if when in ("compute", "compute again"):
                assert made_calls == one_sum(STATE_SIZES[name]), name
            elif when in ("update and forward", "function"):
                assert made_calls == [], (when, name)

        assert calls["together", "all"] == one_sum(sum(STATE_SIZES.values()))
        assert calls["together", "collection"] == one_sum(4 * STATE_SIZE)
        assert [call.name for call in calls["torchmetrics", "one"]] == ["barrier", "allgather_"] * 2
        assert [call.name for call in calls["torchmetrics", "three"]] == ["barrier", "allgather_"] * 6
    assert 8 * STATE_SIZE == 280
    assert 8 * GROUP_SIZE == 144


def own_rows(rank: int) -> Data:
    """Unequal shares of the sequences."""
    return make_data().rows(slice(rank * 3, rank * 3 + rank + 1))


def rows_of(ranks: list[int]) -> Data:
    """Return the sequences of several ranks together."""
    return Data(*(torch.cat(parts) for parts in zip(*map(own_rows, ranks), strict=True)))


def alone(name: str, data: Data) -> Any:
    """Read a metric in one process."""
    return bits(update(made(name, sync_on_compute=False), name, data).compute())


def use_options(rank: int, name: str) -> dict[str, Any]:
    """Read a metric under each of torchmetrics' options for synchronization."""
    data, seen = own_rows(rank), {}
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[rank % 2]
    fields = arguments(name, data)
    metric = update(made(name, process_group=group), name, data)
    with Collectives() as collectives:
        seen["process_group"] = bits(metric.compute())
        seen["together in process_group"] = bits(compute_together({"": metric})[""])
        seen["collectives in process_group"] = collectives.taken()
        metric = made(name, dist_sync_on_step=True)
        seen["forward"] = bits(metric(**fields))
        seen["collectives of forward"] = collectives.taken()
    seen["second forward"] = bits(metric(**fields))
    seen["after forward"] = bits(metric.compute())
    seen["forward alone"] = bits(made(name)(**fields))
    seen["sync_on_compute"] = bits(update(made(name, sync_on_compute=False), name, data).compute())
    unavailable = made(name, distributed_available_fn=lambda: False)
    seen["distributed_available_fn"] = bits(update(unavailable, name, data).compute())

    asked = []

    def twice(state: Tensor, group: Any) -> list[Tensor]:
        asked.append(group)
        return [state, state]

    seen["dist_sync_fn"] = bits(update(made(name, dist_sync_fn=twice), name, data).compute())
    seen["asked for"] = [x is None for x in asked]
    gathered = made(name, dist_sync_fn=partial(gather_all_tensors))
    seen["gathered"] = bits(update(gathered, name, data).compute())

    metric = update(made(name), name, data)
    before = metric.tally.state.clone()
    with metric.sync_context():
        seen["synced"] = bits(metric.read(metric.tally))
    metric.sync()
    metric.unsync()
    seen["unsynced"] = torch.equal(metric.tally.state, before) and not metric._is_synced
    seen["pickled"] = pickle.dumps(metric)
    return seen


@distributed
@pytest.mark.parametrize("name", ["CrossEntropyReport", "GroupedCrossEntropy"])
def test_synchronization_options(name: str, tmp_path: Path) -> None:
    """`process_group`, `dist_sync_fn`, `sync_on_compute`, `dist_sync_on_step` do what they do in torchmetrics."""
    ranks = run_ranks(4, use_options, name, tmp_path=tmp_path)
    everything = alone(name, rows_of([0, 1, 2, 3]))
    merged = made(name)
    for rank, seen in enumerate(ranks):
        own = rows_of([rank])

        assert (
            seen["process_group"] == seen["together in process_group"] == alone(name, rows_of([rank % 2, rank % 2 + 2]))
        )
        assert seen["collectives in process_group"] == 2 * one_sum(STATE_SIZES[name])
        assert seen["collectives of forward"] == one_sum(STATE_SIZES[name])
        assert_close(seen["forward"], everything)
        assert seen["second forward"] == seen["forward"]
        assert seen["after forward"] == alone(name, rows_of([0, 1, 2, 3, 0, 1, 2, 3]))
        assert_close(seen["forward alone"], alone(name, own))
        assert seen["sync_on_compute"] == seen["distributed_available_fn"] == alone(name, own)
        assert seen["dist_sync_fn"] == alone(name, rows_of([rank, rank]))
        assert seen["asked for"] == [True]
        assert seen["gathered"] == seen["synced"] == everything
        assert seen["unsynced"]
        merged.merge_state(pickle.loads(seen["pickled"]))
    assert bits(merged.compute()) == everything


def numbers(value: Any) -> list[float]:
    """All the numbers of a value as `bits` gives it."""
    words = " ".join(value.values() if isinstance(value, dict) else [value]).split()
    return [float.fromhex(word) for word in words]


def assert_close(value: Any, expected: Any) -> None:
    """Compare what `forward` read in floating point with what `compute` rounded once."""
    assert numbers(value) == pytest.approx(numbers(expected), rel=1e-6, nan_ok=True)


class Mistake(NamedTuple):
    """An update that is wrong, and the start of what is said of it."""

    make: Callable[[], Any]
    good: tuple[Tensor, ...]
    bad: tuple[Tensor, ...]
    says: str
    function: Callable[..., object] | None = None


def mistakes() -> dict[str, Mistake]:
    """Return one of each mistake that is a matter of values."""
    data = make_data(num_rows=4)
    logits, target, weight = data.logits, data.target.clamp(min=0), data.weight
    probs = logits.softmax(-1)
    infinite = logits.index_fill(-1, target[0, :1], -math.inf)
    zeros = torch.zeros_like(target)
    return {
        "target": Mistake(
            CrossEntropyReport,
            (logits, target),
            (logits, target.clone().fill_(99)),
            "ValueError: `target` must hold class indices",
            functional.cross_entropy,
        ),
        "weight": Mistake(
            Perplexity,
            (logits, target, weight),
            (logits, target, -weight),
            "ValueError: `weight` must hold finite numbers",
            functional.perplexity,
        ),
        "probability": Mistake(
            lambda: CrossEntropy(input="probs"),
            (probs, target),
            (probs * 2, target),
            "ValueError: `preds` must hold probabilities in [0, 1]",
            lambda *args: functional.cross_entropy(*args, input="probs"),
        ),
        "soft target": Mistake(
            CrossEntropyDecomposition,
            (logits, probs),
            (logits, probs * 2),
            "ValueError: `target` must hold",
            functional.cross_entropy_decomposition,
        ),
        "binary target": Mistake(
            BinaryCrossEntropy,
            (data.score, data.label),
            (data.score, data.label + 2),
            "ValueError: `target` must hold",
            functional.binary_cross_entropy,
        ),
        "group": Mistake(
            lambda: GroupedCrossEntropy(K),
            (logits, target, zeros),
            (logits, target, zeros - 1),
            "ValueError: `group` must hold integers",
            lambda *args: functional.grouped_cross_entropy(*args, num_groups=K),
        ),
        "class": Mistake(
            lambda: NormalizedCrossEntropy(K),
            (logits, target),
            (logits, target + K),
            "ValueError: `target` must hold class indices",
            lambda *args: functional.normalized_cross_entropy(*args, num_classes=K),
        ),
        "token": Mistake(
            lambda: BitsPerByte(token_bytes=TOKEN_BYTES + 1),
            (logits, target),
            (logits, target + K),
            "ValueError: `target` must hold class indices",
            lambda *args: functional.bits_per_byte(*args, token_bytes=TOKEN_BYTES + 1),
        ),
        "bytes": Mistake(
            BitsPerByte,
            (logits, target, data.num_bytes),
            (logits, target, -1 - data.num_bytes),
            "ValueError: ",
        ),
        "difference": Mistake(
            CrossEntropyDifference,
            (logits, data.other, target),
            (logits, data.other, target - K),
            "ValueError: `target` must hold class indices",
            functional.cross_entropy_difference,
        ),
        "infinite loss": Mistake(
            lambda: CrossEntropy(nan_policy="raise"),
            (logits, target),
            (infinite, target),
            "ValueError: ",
            lambda *args: functional.cross_entropy(*args, nan_policy="raise"),
        ),
    }


def make_mistakes(rank: int) -> dict[str, dict[str, Any]]:
    """Make every mistake on rank 1 only; rank 2 sees nothing in between."""
    return {name: make_mistake(rank, mistake) for name, mistake in mistakes().items()}


def make_mistake(rank: int, mistake: Mistake) -> dict[str, Any]:
    """Make a mistake, and go on."""
    seen: dict[str, Any] = {}
    metric = mistake.make()
    metric.update(*mistake.good)
    if rank < 2:
        batch = mistake.bad if rank == 1 else mistake.good
        seen["update"] = error(lambda: metric.update(*batch))
        seen["forward"] = error(lambda: mistake.make()(*batch))
    before = metric.tally.state.clone()
    with Collectives() as collectives:
        seen["compute"] = [error(metric.compute) for _ in range(2)]
        seen["together"] = error(lambda: compute_together({"": metric}))
        seen["collectives"] = len(collectives.taken())
        if mistake.function is not None:
            seen["function"] = error(lambda: mistake.function(*(mistake.bad if rank == 1 else mistake.good)))
        seen["collectives of the function"] = len(collectives.taken())
    seen["intact"] = torch.equal(metric.tally.state, before) and not metric._is_synced
    metric.update(*mistake.good)
    seen["compute after an update"] = error(metric.compute)
    metric.reset()
    metric.update(*mistake.good)
    seen["healed"] = bits(metric.compute())
    return seen


@distributed
def test_mistake_on_one_rank(tmp_path: Path) -> None:
    """Bad values on one rank raise on every rank, at `compute`, in the same words until a reset; nobody waits.

    Rank 0 has made no mistake, rank 1 has, and rank 2 has seen nothing since.
    """
    ranks = run_ranks(3, make_mistakes, tmp_path=tmp_path)
    for name, mistake in mistakes().items():
        metric = mistake.make()
        for _ in range(3):
            metric.update(*mistake.good)
        said = {text for seen in ranks for text in (*seen[name]["compute"], seen[name]["together"])}

        assert len(said) == 1, name
        assert next(iter(said)).startswith(mistake.says), name
        for rank, seen in enumerate(ranks):
            assert not seen[name].get("update"), name
            assert not seen[name].get("forward"), name
            assert seen[name]["collectives"] == 3, name
            assert seen[name]["intact"], name
            assert seen[name]["compute after an update"].startswith(mistake.says), name
            assert seen[name]["healed"] == bits(metric.compute()), name
            assert bool(seen[name].get("function")) == (rank == 1 and mistake.function is not None), name
            assert seen[name].get("function", "").startswith("ValueError" if rank == 1 and mistake.function else "")
            assert seen[name]["collectives of the function"] == 0, name


def compute_in_both_ways(rank: int) -> dict[str, Any]:
    """Compute metrics one by one and together; then ask for what is refused."""
    data = own_rows(rank)
    metrics = {name: update(made(name), name, data) for name in METRICS}
    metrics["nothing"] = CrossEntropy()
    states = {name: metric.tally.state.clone() for name, metric in metrics.items()}
    together = compute_together(metrics)
    intact = all(torch.equal(metric.tally.state, states[name]) for name, metric in metrics.items())
    collection = MetricCollection([CrossEntropy(), Perplexity(), CrossEntropyReport()], prefix="val/")
    rounds = []
    for _ in range(2):  # Metrics of a collection share a state from the first update on.
        collection.update(data.logits, data.target)
        both = compute_together(collection)
        rounds.append((bits(both), bits({name: metric.compute() for name, metric in collection.items()})))
        collection.compute()
    group, other = dist.new_group([0, 1]), CrossEntropy()
    refused = {
        "torchmetrics": lambda: compute_together({"a": other, "b": torchmetrics.MeanMetric()}),
        "groups": lambda: compute_together({"a": other, "b": CrossEntropy(process_group=group)}),
        "dist_sync_fn": lambda: compute_together({"a": CrossEntropy(dist_sync_fn=gather_all_tensors)}),
    }
    return {
        "together": bits(together),
        "one by one": bits({name: metric.compute() for name, metric in metrics.items()}),
        "order": list(together) == list(metrics),
        "intact": intact,
        "rounds": rounds,
        "nothing": compute_together({}),
        "refused": {name: error(call) for name, call in refused.items()},
    }


@distributed
def test_compute_together(tmp_path: Path) -> None:
    """One collective gives the bits of each `compute`, also of metrics that share a state; others are refused."""
    for seen in run_ranks(2, compute_in_both_ways, tmp_path=tmp_path):
        assert seen["together"] == seen["one by one"]
        assert seen["order"]
        assert seen["intact"]
        for both, each in seen["rounds"]:
            assert both == each
        assert seen["together"]["nothing"] == "nan"
        assert seen["nothing"] == {}
        assert seen["refused"]["torchmetrics"] == (
            "TypeError: `metrics` must be metrics of xent_metrics, got MeanMetric as 'b'; compute it by itself."
        )
        for name in ("groups", "dist_sync_fn"):
            assert seen["refused"][name].startswith("ValueError: `metrics` must have one `process_group`"), name
    for name in METRICS:
        assert seen["together"][name] == alone(name, rows_of([0, 1])), name


def test_compute_together_alone() -> None:
    """Without a process group it is `compute` of each."""
    data = make_data()
    metrics = {name: update(made(name), name, data) for name in METRICS}

    assert bits(compute_together(metrics)) == bits({name: metric.compute() for name, metric in metrics.items()})


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
            whole = functional.tally(logits, target, weight, **options)
            with Collectives() as collectives:
                parts = functional.tally(spread_logits, target, weight, **options)
            seen[f"{num_classes}: {name}"] = (whole.totals(), parts.totals(), collectives.taken())
    return seen


def assert_losses_agree(seen: dict[str, Any], sizes: list[int]) -> None:
    """Counts and weights are equal, mean losses to 1e-6, and three numbers a row were exchanged after the largest."""
    for num_classes in sizes:
        for name, case in cases(num_classes):
            whole, parts, calls = seen[f"{num_classes}: {name}"]
            width = 8 if case.logits.dtype == torch.float64 else 4
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
            assert [call.num_bytes for call in calls] == [(rows + 3) * width, 3 * rows * width], name


@distributed
def test_classes_spread_over_ranks(tmp_path: Path) -> None:
    """Losses of spread logits are those of whole rows, for any option, dtype and value; logits are never gathered."""
    sizes = [2, 7, 8, 2 * MANY + 1]
    first, second = run_ranks(2, score_cases, sizes, tmp_path=tmp_path)

    assert_losses_agree(first, sizes)
    assert first == second


@distributed
def test_classes_spread_over_four_ranks(tmp_path: Path) -> None:
    """The same for parts of unequal size on four ranks."""
    sizes = [4, 7, 10]
    first, *others = run_ranks(4, score_cases, sizes, tmp_path=tmp_path)

    assert_losses_agree(first, sizes)
    assert others == [first] * 3


@distributed
def test_more_ranks_than_parts(tmp_path: Path) -> None:
    """A rank may have no class at all: 5 on 4 ranks are 2, 2, 1 and none."""
    first, *others = run_ranks(4, score_cases, [5], tmp_path=tmp_path, timeout=20)

    assert_losses_agree(first, [5])
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


SPREAD = [name for name in METRICS if METRICS[name][1]["target"] == "target"]
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
        assert len(collectives.taken()) == 1  # That is how all of them know.
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


def split_time(rank: int) -> dict[str, Any]:
    """Read sequences that pairs of ranks hold together, the first of them 3 of 5 targets and the second 2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "time"))
    group, part = mesh["time"].get_group(), mesh["time"].get_local_rank()
    data = make_data().rows(slice(mesh["data"].get_local_rank(), None, 2))
    time = slice(None, 3) if part == 0 else slice(3, None)
    own = Data(*(x[:, time] if x.dim() > 1 and x.shape[1] == LENGTH else x for x in data))
    seen = {}
    for name in SPLIT:
        metric, unaware = made(name, sequence_group=group), made(name)
        with Collectives() as collectives:
            for rows in (slice(5), slice(5, None)):
                update(metric, name, own.rows(rows))
                update(unaware, name, own.rows(rows))
            calls = collectives.taken()
        fields = arguments(name, own)
        stepped = made(name, sequence_group=group, dist_sync_on_step=True)
        seen[name] = {
            "value": bits(metric.compute()),
            "forward": bits(stepped(**fields)),
            "unaware": bits(unaware.compute()),
            "calls": calls,
        }
    for name, losses in long_and_many().items():
        share = losses[mesh["data"].get_local_rank() :: 2, time]
        metric = CrossEntropyReport(input="losses", sequence_group=group)
        metric.update(share, torch.zeros_like(share, dtype=torch.int64))
        seen[name] = bits(metric.compute())
    return seen


SPLIT = ("CrossEntropyReport", "CrossEntropyReport-bytes", "CrossEntropyDifference")


def long_and_many() -> dict[str, Tensor]:
    """Losses of more sequences, and of longer ones, than are worked on at once; and of sums that do not fit."""
    generator = torch.Generator().manual_seed(3)
    return {
        "many": torch.randn(20_000, LENGTH, generator=generator).exp(),
        "long": torch.randn(2, 140_001, generator=generator).exp(),
        "wide": torch.full((6, LENGTH), 2.0**24),
        "negative": -torch.randn(6, LENGTH, generator=generator).exp(),
    }


@distributed
def test_sequences_split_over_ranks(tmp_path: Path) -> None:
    """With `sequence_group` the parts of a sequence count as one: every reading has the bits of whole sequences."""
    for rank, seen in enumerate(run_ranks(4, split_time, tmp_path=tmp_path)):
        for name in SPLIT:
            expected = alone(name, make_data())
            mean, stderr = [x for x in expected if x in ("cross_entropy", "difference") or x.endswith("stderr")][:2]
            sequences = [5, len(range(rank // 2, NUM_ROWS, 2)) - 5]

            assert seen[name]["value"] == expected, name
            assert_close(seen[name]["forward"], expected)
            assert seen[name]["unaware"][mean] == expected[mean]
            assert seen[name]["unaware"][stderr] != expected[stderr]
            assert seen[name]["calls"] == [one_sum(10 * number)[0] for number in sequences]
        for name, losses in long_and_many().items():
            report = CrossEntropyReport(input="losses")
            report.update(losses, torch.zeros_like(losses, dtype=torch.int64))

            assert seen[name] == bits(report.compute()), name


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_samples_that_a_sampler_repeats(shuffle: bool, drop_last: bool) -> None:
    """Over all ranks, every sample that is drawn is kept exactly once, whatever the number of samples and ranks."""
    for size, world_size in itertools.product((*range(1, 20), 64, 97), (1, 2, 3, 4, 5, 8, 16)):
        samplers = [
            DistributedSampler(range(size), world_size, rank, shuffle=shuffle, seed=size, drop_last=drop_last)
            for rank in range(world_size)
        ]
        for batch_size, epoch in ((1, 0), (3, 1), (4, 2), (100, 3)):
            drawn, kept = [], []
            for sampler in samplers:
                sampler.set_epoch(epoch)
                own = list(sampler)
                drawn += own
                for start in range(0, len(own), batch_size):
                    batch = own[start : start + batch_size]
                    keep = num_unpadded_samples(sampler, start=start, num_samples=len(batch))

                    assert 0 <= keep <= len(batch)
                    kept += batch[:keep]

            assert sorted(kept) == sorted(set(drawn)), (size, world_size, batch_size)
            assert drop_last or sorted(kept) == list(range(size)), (size, world_size, batch_size)


def simulated_ranks(total: int) -> tuple[Tally, dict[str, Fraction | int]]:
    """Stand the tallies of 16,384 ranks side by side, with so many tokens in total, and work out their sum.

    Each rank has its own number of repetitions of one of 256 batches of 16 tokens; one in 64 knows only a mean.
    """
    chance = random.Random(9)
    losses = torch.randn(256, 4, 4, generator=torch.Generator().manual_seed(9)).exp()
    losses = (losses * 2**20).round() / 2**20  # So that sums over sequences are exact too.
    batches = torch.stack([tally_of(batch).state for batch in losses])
    num_ranks, known = 2**14, 2**14 - 2**8
    average = total // 16 // num_ranks
    repetitions = [average + chance.randint(-1000, 1000) for _ in range(known)]
    means = [(chance.uniform(0, 12), chance.randint(0, 30 * average)) for _ in range(num_ranks - known - 1)]
    missing = total - 16 * sum(repetitions) - sum(count for _, count in means)
    means.append((1.0, missing))

    state = Tally.zero(num_tallies=known)
    own = batches[torch.arange(known) % 256]
    factors = torch.tensor(repetitions)
    for bit in reversed(range(max(repetitions).bit_length())):
        state = state + state + Tally(own * ((factors >> bit) & 1)[:, None])
    rest = torch.stack([tally_mean(torch.tensor(x, dtype=torch.float64), torch.tensor(n)).state for x, n in means])
    tallies = Tally(torch.cat([state.state, rest]))

    rows = [[[Fraction(x) for x in row] for row in batch] for batch in losses.tolist()]
    sums = [(sum(map(sum, batch)), sum(sum(row) ** 2 for row in batch)) for batch in rows]
    expected = dict.fromkeys(("loss", "loss_loss"), Fraction(0))
    for i, times in enumerate(repetitions):
        expected["loss"] += times * sums[i % 256][0]
        expected["loss_loss"] += times * sums[i % 256][1]
    expected["loss"] += sum(Fraction(round(Fraction(x * n) * UNIT), UNIT) for x, n in means)
    return tallies, expected | {"sequences": 4 * sum(repetitions)}


def fold(tallies: Tally, seed: int) -> Tally:
    """Add up tallies in pairs of a random order, and again, until one is left."""
    generator = torch.Generator().manual_seed(seed)
    while len(tallies.state) > 1:
        state = tallies.state[torch.randperm(len(tallies.state), generator=generator)]
        odd, half = len(state) % 2, len(state) // 2
        pairs = Tally(state[:half]) + Tally(state[half : 2 * half])
        tallies = Tally(torch.cat([pairs.state, state[len(state) - odd :]]))
    return Tally(tallies.state[0]) + Tally.zero()


def test_many_ranks_and_tokens() -> None:
    """16,384 ranks with `10**13` tokens in total give the same bits in any tree of sums, and those are exact."""
    total = 10**13
    tallies, expected = simulated_ranks(total)
    sums = [fold(tallies, seed) for seed in range(5)]
    sums += [Tally(tallies.state.sum(0)) + Tally.zero()]  # As one collective adds them.
    order = tallies.unbind()
    random.Random(1).shuffle(order)
    sums += [sum(order, Tally.zero()), fold(Tally(tallies.state[:-5000]), 1) + fold(Tally(tallies.state[-5000:]), 2)]
    totals = sums[0].totals()

    assert len(tallies.state) == 16_384
    assert len({str(tally.state.tolist()) for tally in sums}) == 1
    assert totals.scored == total
    assert totals.sequences == expected["sequences"]
    assert totals.loss == expected["loss"] * UNIT
    assert totals.loss_loss == expected["loss_loss"] * 2**72
    assert totals.weight == total * UNIT
    assert totals._asdict().keys() >= set(COUNTS)
    assert ExactReading(totals).cross_entropy == float(expected["loss"] / total)


def fail_on_one(rank: int) -> None:
    """Raise on rank 1; the others wait for it."""
    if rank == 1:
        raise KeyError("on purpose")
    dist.barrier()


@distributed
def test_failures_of_ranks_are_shown(tmp_path: Path) -> None:
    """A rank that raises fails the test with its traceback, also while others wait for it."""
    with pytest.raises(AssertionError, match=r"(?s)^exit codes of the ranks: .*rank 1:.*KeyError: 'on purpose'"):
        run_ranks(3, fail_on_one, tmp_path=tmp_path)


def pass_parts_without_shape(rank: int) -> str:
    """Score parts of 4 and 3 classes of which each rank was told only its own."""
    x, target, mesh = torch.eye(7), torch.arange(7), init_device_mesh("cpu", (2,))
    parts = DTensor.from_local(x.chunk(2, -1)[rank], mesh, [Shard(-1)])
    return error(lambda: CrossEntropy().update(parts, target))


@distributed
def test_parts_of_unknown_shape(tmp_path: Path) -> None:
    """Parts of which ranks do not agree how many classes there are raise on every rank."""
    for text in run_ranks(2, pass_parts_without_shape, tmp_path=tmp_path, timeout=20):
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
    for text in run_ranks(4, pass_crooked_parts, tmp_path=tmp_path, timeout=20):
        assert text.startswith("ValueError: `preds` must be a DTensor of the parts")


def split_short_time(rank: int) -> Any:
    """Read sequences of one target that two ranks hold together."""
    data = make_data()
    time = slice(0, 1) if rank == 0 else slice(1, 1)
    metric = CrossEntropyReport(sequence_group=dist.group.WORLD)
    metric.update(data.logits[:, time], data.target[:, time])
    return bits(metric.compute())


@distributed
def test_sequences_of_which_a_rank_has_nothing(tmp_path: Path) -> None:
    """A rank of a `sequence_group` may have no targets of the sequences."""
    data = make_data()
    report = CrossEntropyReport()
    report.update(data.logits[:, :1], data.target[:, :1])

    assert run_ranks(2, split_short_time, tmp_path=tmp_path, timeout=20) == [bits(report.compute())] * 2


def compute_local_ones_together(rank: int) -> dict[str, tuple[Any, Any]]:
    """Compute, by itself and together, metrics that are not to be synchronized, or are already."""
    seen = {}
    for name, options in {
        "sync_on_compute": {"sync_on_compute": False},
        "distributed_available_fn": {"distributed_available_fn": lambda: False},
        "synced": {},
    }.items():
        metric = update(CrossEntropyReport(**options), "CrossEntropyReport", own_rows(rank))
        single = bits(metric.compute())
        if name == "synced":
            metric.sync()
        seen[name] = (single, error(lambda metric=metric: compute_together({"": metric})))
        if not seen[name][1]:
            seen[name] = (single, bits(compute_together({"": metric})[""]))
    return seen


@distributed
def test_compute_together_of_local_metrics(tmp_path: Path) -> None:
    """`compute_together` gives what `compute` does, or refuses."""
    for seen in run_ranks(2, compute_local_ones_together, tmp_path=tmp_path):
        for name, (single, together) in seen.items():
            assert together == single or "Error: " in together, name


def name_states(rank: int) -> list[str]:
    """Return the names that a checkpoint has for the state of a metric with a sequence group."""
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    metric = CrossEntropyReport(sequence_group=group)
    metric.persistent(True)
    return list(metric.state_dict())


@distributed
def test_checkpoints_of_one_rank_load_on_another(tmp_path: Path) -> None:
    """A metric's state has one name on all ranks, so that what one of them saved can be loaded and merged by others."""
    first, *others = run_ranks(4, name_states, tmp_path=tmp_path)

    assert others == [first] * 3


def make_other_mistakes(rank: int) -> dict[str, list[str]]:
    """Pass a negative number of bytes on rank 1, and a target out of range to `per_target_losses` on both."""
    data, metric = make_data(), BitsPerByte()
    raised = error(lambda: metric.update(data.logits, data.target, -1 if rank == 1 else 1))
    losses = error(lambda: functional.per_target_losses(data.logits, data.target + K))
    return {"bytes": [raised, error(metric.compute)], "losses": losses}


@distributed
def test_other_mistakes_on_one_rank(tmp_path: Path) -> None:
    """A number of bytes that is negative on one rank raises on all at `compute`; functions raise by themselves."""
    first, second = run_ranks(2, make_other_mistakes, tmp_path=tmp_path)

    assert first["bytes"] == second["bytes"] == ["", first["bytes"][1]]
    assert first["bytes"][1].startswith("ValueError")
    assert first["losses"].startswith("ValueError: `target` must hold class indices")


def compute_in_another_order(rank: int) -> dict[str, Any]:
    """Compute two metrics together that a dict of this rank holds in its own order."""
    metrics = {"a": CrossEntropy(), "b": CrossEntropy()}
    metrics["a"].update(torch.zeros(1, 8), torch.tensor([0]))
    metrics["b"].update(torch.zeros(1, 2), torch.tensor([0]))
    names = ("a", "b") if rank == 0 else ("b", "a")
    return {name: x.item() for name, x in compute_together({name: metrics[name] for name in names}).items()}


@distributed
def test_compute_together_goes_by_name(tmp_path: Path) -> None:
    """The order of a dict on one rank does not mix metrics up."""
    for rank, values in enumerate(run_ranks(2, compute_in_another_order, tmp_path=tmp_path)):
        assert list(values) == (["a", "b"] if rank == 0 else ["b", "a"])
        assert values == pytest.approx({"a": math.log(8), "b": math.log(2)})


def test_what_unrepeated_refuses() -> None:
    """Another sampler, or a position before the first."""
    with pytest.raises(TypeError, match="`sampler` must be a DistributedSampler, got RandomSampler"):
        num_unpadded_samples(torch.utils.data.RandomSampler(range(3)), 0, 1)
    sampler = torch.utils.data.DistributedSampler(range(3), num_replicas=2, rank=0)
    for start, number in ((-1, 1), (0, -1)):
        with pytest.raises(ValueError, match=f"must not be negative, got {start} and {number}"):
            num_unpadded_samples(sampler, start, number)
