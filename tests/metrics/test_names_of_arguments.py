"""What comes by position means the same for every metric and function; all else goes by its name."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torchmetrics import MetricCollection

from tests.cases import QUANTITIES, Quantity
from tests.metrics.bad_input import FUNCTIONS, KINDS, K, bits, each_call, each_kind, make_batch, raised
from xent_metrics import BitsPerByte, CrossEntropy, GroupedCrossEntropy, functional


@pytest.mark.parametrize("quantity", QUANTITIES.values(), ids=QUANTITIES)
def test_only_predictions_and_targets_have_a_position(quantity: Quantity) -> None:
    """Signatures agree: `preds, target`, or two `preds` and `target`; the rest is keyword-only."""
    for form in (quantity.metric.update, quantity.function):
        if form is not None:
            parameters = [p for p in inspect.signature(form).parameters.values() if p.name != "self"]
            by_position = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
            assert by_position == quantity.positional
    for function in (functional.tally, functional.per_target_losses):
        parameters = [*inspect.signature(function).parameters.values()]
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["preds", "target"]


@each_call
@each_kind
def test_nothing_else_comes_by_position(name: str, call: str) -> None:
    """A third argument by position is refused before anything is added, and the names of what it may be are said."""
    kind, batch = KINDS[name], make_batch(name)
    metric, mask = kind.make(), torch.ones(2, 3, dtype=torch.bool)
    positional = [batch[argument] for argument in QUANTITIES_OF[kind.metric].positional]
    message = raised(TypeError, lambda: getattr(metric, call)(*positional, mask))
    assert re.search(r"`weight`( and `sequence`)? must be passed by name, got ", message)
    assert re.search(r"weight=\.\.\.(, sequence=\.\.\.)?\)", message)
    assert metric.update_count == metric.tally.state.abs().sum() == 0
    assert bits(metric(**kind.chosen(batch))) == bits(kind.make()(**kind.chosen(batch)))


QUANTITIES_OF = {quantity.metric: quantity for quantity in QUANTITIES.values()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_nothing_else_by_position(name: str) -> None:
    """Nor do functions."""
    kind, batch = KINDS[name], make_batch(name)
    positional = [batch[argument] for argument in QUANTITIES_OF[kind.metric].positional]
    with pytest.raises(TypeError, match="positional"):
        kind.function(*positional, torch.ones(2, 3, dtype=torch.bool), **kind.options)  # type: ignore[misc]


@pytest.mark.parametrize("unknown", [{"mask": None}, {"weights": None}])
def test_names_that_are_unknown_count_for_nothing(unknown: dict[str, None]) -> None:
    """A call that Python refuses is no update."""
    metric = CrossEntropy()
    with pytest.raises(TypeError, match="unexpected keyword"):
        metric.update(torch.zeros(2, K), torch.tensor([0, 1]), **unknown)
    with pytest.raises(TypeError):
        metric.update(torch.zeros(2, K))
    assert metric.update_count == 0
    assert not metric.update_called


@each_call
def test_a_collection_gives_each_metric_its_own(call: str) -> None:
    """In a collection one batch has a weight for all, and bytes and groups for those that take them."""
    collection = MetricCollection([CrossEntropy(), BitsPerByte(), GroupedCrossEntropy(2)], compute_groups=False)
    batch = torch.randn(2, 3, K), torch.ones(2, 3, dtype=torch.int64)
    mask, group = torch.tensor([[True, False, True], [False, True, True]]), torch.tensor([[0], [1]])
    getattr(collection, call)(*batch, weight=mask, num_bytes=7, group=group)
    assert collection["CrossEntropy"].tally.totals().scored == 4
    assert collection["BitsPerByte"].compute() == functional.bits_per_byte(*batch, num_bytes=7, weight=mask)
    expected = functional.grouped_cross_entropy(*batch, group=group, weight=mask, num_groups=2)
    torch.testing.assert_close(collection["GroupedCrossEntropy"].compute(), expected)
    with pytest.raises(TypeError, match="must be passed by name"):
        getattr(collection, call)(*batch, mask)


OTHERS = {
    "reduction": ("mean", "leave it out"),
    "weight": (torch.ones(K), "update(preds, target, weight=...)"),
    "dim": (1, "class_dim=..."),
    "axis": (1, "class_dim=..."),
    "from_logits": (True, "input='logits' or input='probs'"),
    "log_base": (2, "BitsPerToken"),
    "num_classes": (K, "since `preds` have it"),
    "num_outputs": (1, "since `preds` have it"),
}


@pytest.mark.parametrize("argument", OTHERS)
@each_kind
def test_names_of_other_libraries(name: str, argument: str) -> None:
    """An argument that is called something else here is refused with what does the same."""
    value, fix = OTHERS[argument]
    if argument in inspect.signature(KINDS[name].metric).parameters:
        assert KINDS[name].make(**{argument: value})
        return
    message = raised(ValueError, lambda: KINDS[name].make(**{argument: value}))
    assert message.startswith(f"`{argument}` must not be passed to {KINDS[name].metric.__name__}")
    assert fix in message


@each_kind
def test_options_of_other_classes(name: str) -> None:
    """So is an option that only other classes have, and none that this one has is in the way."""
    every = {option for quantity in QUANTITIES.values() for option in quantity.options(quantity.metric)}
    for option in sorted(every - {*inspect.signature(KINDS[name].metric).parameters}):
        message = raised(ValueError, lambda o=option: KINDS[name].make(**{o: 1}))
        assert message.startswith(f"`{option}` must not be passed to ")
