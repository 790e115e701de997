"""What a metric saves, and what it does with what another metric or version saved."""

from __future__ import annotations

import io
import itertools
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, Running

import xent_metrics
from tests.cases import CASES, Case, bits, numbers
from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyReport,
    GroupedCrossEntropy,
    Perplexity,
)
from xent_metrics.metrics.saved_state import FORMAT_VERSION

OLD_STATES = json.loads(Path(__file__).parent.with_name("fixtures").joinpath("states_before_0_1_0.json").read_text())

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def persistent(metric: Any) -> Any:
    """Let a metric save its state."""
    metric.persistent(True)
    return metric


def saved_by(module: nn.Module) -> dict[str, Any]:
    """Return what a module saves, after a trip through a file that may hold nothing but plain values and tensors."""
    for metric in module.modules():
        if isinstance(metric, Metric):
            metric.persistent(True)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_case
def test_one_plain_key(case: Case) -> None:
    """A state is saved as `tally`, with the version of the format, what decides an update, and whose state it is."""
    saved = saved_by(case.filled(*case.batches()))
    assert list(saved) == ["tally"]
    assert set(saved["tally"]) == {"version", "update", "settings", "share", "state"}
    assert saved["tally"]["version"] == FORMAT_VERSION
    assert saved["tally"]["share"] == [0, 1]


def test_only_options_that_differ_from_their_defaults_are_saved() -> None:
    """A new option cannot rename old states; what only decides a reading is not saved."""
    assert saved_by(CrossEntropy(unit="bits", nan_policy="omit", backend="eager"))["tally"]["settings"] == []
    assert saved_by(CrossEntropy(ignore_index=0))["tally"]["settings"] == [["ignore_index", 0]]
    settings = saved_by(CrossEntropy(class_weight=torch.ones(3), label_smoothing=0.1))["tally"]["settings"]
    assert [name for name, _ in settings] == ["class_weight", "label_smoothing"]
    assert saved_by(GroupedCrossEntropy(3))["tally"]["settings"] == [["num_groups", 3]]


@pytest.mark.parametrize("parent", ["sequential", "collection", "collection in a module"])
@each_case
def test_a_metric_within_a_module_goes_on(case: Case, parent: str) -> None:
    """Strict loading of whatever holds a metric restores it, and what it adds then has the same bits."""

    def make() -> tuple[nn.Module, Any]:
        metric = persistent(case.metric())
        if parent == "sequential":
            return nn.Sequential(nn.Linear(2, 2), metric), metric
        collection = MetricCollection({"metric": metric})
        return (collection if parent == "collection" else nn.Sequential(collection)), metric

    first, *others = case.batches()
    (module, metric), (other, restored) = make(), make()
    metric.update(**first)
    saved = deepcopy(module.state_dict())
    assert sum(key.split(".")[-1] == "tally" for key in saved) == 1
    other.load_state_dict(saved, strict=True)
    for batch in others:
        restored.update(**batch)
    assert bits(restored.compute()) == bits(case.filled(first, *others).compute())


@pytest.mark.parametrize("wrap", [MinMaxMetric, ClasswiseWrapper, lambda metric: Running(metric, window=3)])
def test_wrapped_metrics_go_on(wrap: Any) -> None:
    """The states within torchmetrics' wrappers are restored by strict loading too."""
    batches = CASES["GroupedCrossEntropy"].batches() if wrap is ClasswiseWrapper else CASES["CrossEntropy"].batches()

    def make() -> Any:
        return persistent(wrap(persistent(GroupedCrossEntropy(4) if wrap is ClasswiseWrapper else CrossEntropy())))

    metric, other = make(), make()
    metric.update(**batches[0])
    other.load_state_dict(deepcopy(metric.state_dict()), strict=True)
    if isinstance(metric, Running):
        other._num_vals_seen = other._update_count = 1  # It saves its window, but not how much of it was filled.
    for each in (metric, other):
        each.update(**batches[1])
    assert numbers(other.compute()) == pytest.approx(numbers(metric.compute()), nan_ok=True, abs=0)


@each_case
def test_a_saved_state_is_merged(case: Case) -> None:
    """`merge_state` takes what `state_dict` returned, also from a file, and refuses that of another update."""
    first, *others = case.batches()
    metric = case.filled(*others)
    metric.merge_state(saved_by(case.filled(first)))
    assert bits(metric.compute()) == bits(case.filled(first, *others).compute())
    with pytest.raises(ValueError, match="`tally` must come from a metric"):
        metric.merge_state(saved_by(CrossEntropy(ignore_index=77)))


def test_distributed_checkpoints() -> None:
    """PyTorch's distributed checkpoints look up what is behind a key, and take plain values beside tensors."""
    model, other = (nn.Sequential(nn.Linear(2, 2), persistent(CrossEntropy())) for _ in range(2))
    model[1].update(torch.randn(3, 5), torch.tensor([0, 1, 2]))
    set_model_state_dict(other, get_model_state_dict(model))
    assert torch.equal(other[1].tally.state, model[1].tally.state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_distributed_checkpoints_know_the_options(tmp_path: Path) -> None:
    """They read only what the loading metric has, so what decides an update is one value of it."""
    metric, other = persistent(CrossEntropy(ignore_index=0)), persistent(CrossEntropy())
    dcp.save(metric.state_dict(), checkpoint_id=tmp_path)
    saved = other.state_dict()
    dcp.load(saved, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="`ignore_index` was 0, and here is -100"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("preset", [False, True])
def test_a_cached_value_is_forgotten(preset: bool) -> None:
    """After loading, `compute` reads what was loaded."""
    metric, other = CrossEntropy(compute_with_cache=preset), CrossEntropy()
    metric.update(torch.zeros(1, 2), torch.tensor([0]))
    other.update(torch.zeros(1, 8), torch.tensor([0]))
    metric.compute()
    metric.load_state_dict(saved_by(other))
    assert metric.compute() == pytest.approx(math.log(8))


# What does not fit.


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        (CrossEntropy(ignore_index=0), CrossEntropy(), r"`ignore_index` was 0, and here is -100; load it into"),
        (CrossEntropy(), Perplexity(shift=True), r"`shift` was False, and here is True"),
        (
            CrossEntropy(ignore_index=0, class_dim=1),
            BitsPerToken(),
            r"`class_dim` was 1, and here is -1; `ignore_index` was 0, and here is -100",
        ),
        (
            CrossEntropy(class_weight=torch.ones(3)),
            CrossEntropy(class_weight=torch.tensor([1.0, 2.0, 1.0])),
            r"`class_weight` was 'a tensor with hash \w+', and here is 'a tensor with hash \w+'",
        ),
        (CrossEntropy(), CrossEntropy(class_weight=torch.ones(3)), r"`class_weight` was None, and here is 'a tensor"),
        (GroupedCrossEntropy(3), GroupedCrossEntropy(4), r"`num_groups` was 3, and here is 4"),
        (CrossEntropy(backend="compile"), CrossEntropy(), r"`backend` was 'compile', and here is 'auto'"),
        (BinaryCrossEntropy(ignore_index=-1), BinaryCrossEntropy(), r"`ignore_index` was -1, and here is None"),
        (
            BitsPerByte(),
            BitsPerToken(),
            r"updates by `tally_batch`, got one by `tally_per_byte`; load it into the class",
        ),
    ],
)
def test_another_update_is_refused(saved: Any, loading: Any, message: str) -> None:
    """A state that another update made is refused with the option that differs, alone and within a module."""
    for state, module in (
        (saved_by(saved), loading),
        (saved_by(nn.Sequential(saved)), nn.Sequential(loading)),
    ):
        before = loading.tally.state
        with pytest.raises(ValueError, match=message):
            module.load_state_dict(state)
        assert loading.tally.state is before


def test_every_two_metrics_that_update_differently_are_told_apart() -> None:
    """Of the cases, a state loads exactly into the metrics that share it in a collection."""
    metrics = [case.metric() for case in CASES.values()]
    for one, other in itertools.permutations(metrics, 2):
        if one._state_name == other._state_name:
            other.load_state_dict(saved_by(one))
        else:
            saved = saved_by(one)
            with pytest.raises(ValueError, match="`tally` must come from a metric"):
                other.load_state_dict(saved)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="This PyTorch has no groups of ranks.")
def test_metrics_of_split_sequences_are_told_apart() -> None:
    """Ranks that share sequences tally them otherwise than ranks that do not; how many share them is saved."""
    groups = [None, torch.distributed.ProcessGroup(0, 2), torch.distributed.ProcessGroup(1, 2)]
    alone, first, second = (CrossEntropyReport(sequence_group=group) for group in groups)
    assert saved_by(first)["tally"]["settings"] == [["sequence_group", 2]]
    second.load_state_dict(saved_by(first))
    second.merge_state(first)
    for one, other in ((alone, first), (first, alone)):
        with pytest.raises(ValueError, match=r"`sequence_group` was (2|None), and here is (2|None)"):
            other.load_state_dict(saved_by(one))
        with pytest.raises(ValueError, match=r"incoming.state"):
            other.merge_state(one)


def test_a_later_format_is_refused() -> None:
    """A state of a format that this version does not know is refused with what to do."""
    saved = saved_by(CrossEntropy())
    saved["tally"]["version"] += 1
    with pytest.raises(ValueError, match=r"must have the format 1 of a saved state, got 2; load it with the version"):
        CrossEntropy().load_state_dict(saved)


@pytest.mark.parametrize("saved", [torch.zeros(45, dtype=torch.int64), None, {"state": 1}])
def test_something_else_is_refused(saved: Any) -> None:
    """What no metric saved is refused."""
    with pytest.raises(ValueError, match=r"must be what a metric of xent_metrics saved, got .*`metric\.add`"):
        CrossEntropy().load_state_dict({"tally": saved})


def test_a_damaged_state_is_refused() -> None:
    """A state of another shape is refused instead of being broadcast."""
    saved = saved_by(CrossEntropy())
    saved["tally"]["state"] = saved["tally"]["state"][:1]
    with pytest.raises(ValueError, match="must hold a state like"):
        CrossEntropy().load_state_dict(saved)


def without_share(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state as it was before it said whose it is."""
    tally = saved["tally"]
    return {"tally": {name: x for name, x in tally.items() if name != "share"} | {"settings": dict(tally["settings"])}}


def test_a_state_that_does_not_say_whose_it_is_loads_in_one_process() -> None:
    """States once lacked the rank that saved them, and had a dict of settings."""
    saved = without_share(saved_by(CASES["CrossEntropy-ignore-2"].filled(*CASES["CrossEntropy-ignore-2"].batches())))
    metric = CASES["CrossEntropy-ignore-2"].metric()
    metric.load_state_dict(deepcopy(saved))
    assert torch.equal(metric.tally.state, saved["tally"]["state"])
    with pytest.raises(ValueError, match="`ignore_index` was 2, and here is -100"):
        CrossEntropy().load_state_dict(saved)


def test_the_state_of_one_rank_of_several_is_refused_alone() -> None:
    """In one process a state that lacks those of other ranks raises, and can be merged."""
    metric = CrossEntropy()
    metric.update(torch.zeros(1, 8), torch.tensor([0]))
    saved = saved_by(metric)
    saved["tally"]["share"] = [0, 2]
    other = CrossEntropy()
    with pytest.raises(ValueError, match=r"the rank that loads it, 0 of 1, but this one is of rank 0 of 2 alone; save"):
        nn.Sequential(other).load_state_dict({f"0.{name}": x for name, x in saved.items()})
    other.merge_state(saved)
    assert other.compute() == pytest.approx(math.log(8))


# What versions before 0.1.0 saved.


def make_old(old: dict[str, Any], **options: Any) -> Any:
    """Make the metric that saved an old state."""
    own = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in old["options"].items()}
    return getattr(xent_metrics, old["class"])(**own, **options)


@pytest.mark.parametrize("within", ["", "0."])
@pytest.mark.parametrize("old", OLD_STATES.values(), ids=OLD_STATES)
def test_states_of_before_0_1_0_are_converted(old: dict[str, Any], within: str) -> None:
    """What the first version saved loads into a metric that is configured alike, and reads the same, but intervals."""
    metric = persistent(make_old(old))
    module = nn.Sequential(metric) if within else metric
    module.load_state_dict({within + old["key"]: torch.tensor(old["state"])}, strict=True)
    found = numbers(metric.compute())
    # The first version made intervals with the quantile of a normal distribution.
    expected = {name: x for name, x in numbers(old["computed"]).items() if not name.endswith(("lower", "upper"))}
    assert {name: found[name] for name in expected} == expected  # A later version may read more of it.
    assert list(module.state_dict()) == [f"{within}tally"]


@pytest.mark.parametrize("old", OLD_STATES.values(), ids=OLD_STATES)
def test_other_states_of_before_0_1_0_are_refused(old: dict[str, Any]) -> None:
    """What a differently configured metric of the first version saved is refused with what to do."""
    metric = make_old({**old, "options": {**old["options"], "ignore_index": 1}})
    with pytest.raises(
        ValueError, match=rf"but a version before 0.1.0 saved {old['key']}, .*; load it into a metric that is"
    ):
        metric.load_state_dict({old["key"]: torch.tensor(old["state"])})


@pytest.mark.parametrize("old", OLD_STATES.values(), ids=OLD_STATES)
def test_a_state_of_before_0_1_0_is_one_of_eager_losses(old: dict[str, Any]) -> None:
    """The first version gave the states of backends with the same bits one name, and those of compiled ones another."""
    state = {old["key"]: torch.tensor(old["state"])}
    metric = make_old(old, backend="eager")
    metric.load_state_dict(state)
    assert torch.equal(metric.tally.state, state[old["key"]])
    with pytest.raises(ValueError, match=r"but a version before 0\.1\.0 saved"):
        make_old(old, backend="compile").load_state_dict(state)
