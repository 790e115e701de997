"""Class weights, smoothing, tables and numbers of bytes, and constructors refuse what they do not understand."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor.cpu_vec_isa import pick_vec_isa

from tests.metrics.bad_input import (
    CLASSES,
    KINDS,
    OF_CLASSES,
    TABLE,
    K,
    assert_no_trace,
    bits,
    each_call,
    each_kind,
    make_batch,
    numbers,
    raised,
    with_preds,
)
from xent_metrics import BitsPerByte, CrossEntropy, CrossEntropyDifference, CrossEntropyReport, LinearLogits, functional

HIDDEN, HEAD = torch.ones(2, 3, 5), torch.ones(K, 5)

BAD_FACTORS: list[tuple[Any, Any, Any, type[Exception], str]] = [
    ([[1.0]], HEAD, None, TypeError, "`hidden` of `{}` must be a tensor, got list; convert it"),
    (HIDDEN, np.ones((K, 5)), None, TypeError, "`weight` of `{}` must be a tensor, got ndarray; convert it"),
    (HIDDEN, HEAD, 1.0, TypeError, "`bias` of `{}` must be a tensor, got float; convert it"),
    (HIDDEN.long(), HEAD, None, TypeError, r"`hidden` of `{}` must be float16, .* got torch.int64; .*\.float\(\)"),
    (HIDDEN, HEAD.cfloat(), None, TypeError, "`weight` of `{}` must be float16, .* got torch.complex64"),
    (HIDDEN, HEAD, HEAD[:, 0].bool(), TypeError, "`bias` of `{}` must be float16, .* got torch.bool"),
    (HIDDEN, HEAD.to_sparse(), None, TypeError, "`weight` of `{}` must be a dense tensor, .*to_dense"),
    (HIDDEN.bfloat16(), HEAD, None, TypeError, "`hidden` of `{}` must have the dtype of `weight`, .*autocast"),
    (HIDDEN, HEAD, HEAD[:, 0].double(), TypeError, "dtype of `weight`, `bias`, got .*32, .*32, .*64; convert"),
    (HIDDEN[0, 0, 0], HEAD, None, ValueError, r"`weight` of `{}` must have the shape .* got \(4, 5\) and \(\)"),
    (HIDDEN[..., :3], HEAD, None, ValueError, r"\(4, 5\) and \(2, 3, 3\); pass what the head is given"),
    (HIDDEN, HEAD.t(), None, ValueError, r"got \(5, 4\) and \(2, 3, 5\); pass weight.t\(\)"),
    (HIDDEN, HEAD[0], None, ValueError, r"`weight` of `{}` must have the shape \(classes, D\) .* got \(5,\)"),
    (HIDDEN, HEAD[:, :4], None, ValueError, r"got \(4, 4\) and \(2, 3, 5\); pass what the head is given"),
    (HIDDEN, HEAD, HEAD[0], ValueError, r"`bias` of `{}` must have the shape \(4,\), .* got \(5,\); leave it out"),
    (HIDDEN, HEAD, HEAD, ValueError, r"`bias` of `{}` must have the shape \(4,\), .* got \(4, 5\)"),
    (HIDDEN, HEAD.to("meta"), None, ValueError, "`hidden` of `{}` must be on the device of `weight`, got cpu, meta"),
    (HIDDEN, HEAD, HEAD[:, 0].to("meta"), ValueError, "device of `weight`, `bias`, got cpu, cpu, meta; move one"),
    (HIDDEN, HEAD[:0], None, ValueError, r"`{}` must have at least one class, got shape \(2, 3, 0\)"),
    (HIDDEN[:1], HEAD, None, ValueError, r"`target` must have the shape \(1, 3\) for `{}` of shape \(1, 3, 4\)"),
]

A_FACTOR = (
    "`LinearLogits` whose parts do not fit, read as anything but logits with classes last, or for yes-or-no targets"
)


@pytest.mark.parametrize(("hidden", "weight", "bias", "error", "text"), BAD_FACTORS)
@pytest.mark.parametrize("name", ["CrossEntropy", "CrossEntropyDifference(a)", "CrossEntropyDifference(b)"])
def test_factors_that_do_not_fit(
    name: str, hidden: Any, weight: Any, bias: Any, error: type[Exception], text: str
) -> None:
    """The sentence says which part of whose predictions."""
    key = f"preds_{name[-2]}" if "preds_a" in KINDS[name].arguments else "preds"
    good = make_batch(name)
    bad = {**good, key: LinearLogits(hidden, weight, bias)}
    message = assert_no_trace(name, bad, {}, good, error)
    assert re.search(text.replace("{}", key), message), message


@each_call
@pytest.mark.parametrize("name", OF_CLASSES)
def test_factors_are_logits_with_classes_last(name: str, call: str) -> None:
    """No other input, and no other dimension, is what a matmul makes."""
    forms = [form for form in KINDS[name].inputs if form != "logits"]
    wrong: list[tuple[dict[str, Any], str]] = [
        *(({"input": form}, f"`input` must be 'logits' .* got '{form}'; leave it out") for form in forms),
        *(
            ({"class_dim": dim}, f"`class_dim` must be the last .* got {dim} .* shape .2, 3, 4.")
            for dim in (0, 1, -2, 3)
        ),
    ]
    batch = KINDS[name].chosen(with_preds(name, LinearLogits(HIDDEN, HEAD), make_batch(name)))
    for options, text in wrong:
        metric = KINDS[name].make(**options)
        assert re.search(text, raised(ValueError, lambda m=metric: getattr(m, call)(**batch)))
        assert not metric.tally.state.any()
    for class_dim in (-1, 2):
        assert KINDS[name].make(class_dim=class_dim)(**batch) is not None


def test_no_factors_for_yes_or_no_targets() -> None:
    """Targets of the size of the logits are there anyway, so that nothing would be saved."""
    good = make_batch("BinaryCrossEntropy")
    bad = {**good, "preds": LinearLogits(HIDDEN, HEAD)}
    message = assert_no_trace("BinaryCrossEntropy", bad, {}, good, TypeError)
    assert re.match(r"`preds` must be a tensor .* got LinearLogits; pass F.linear\(hidden, weight, bias\)", message)


def test_hidden_states_that_are_spread_over_ranks() -> None:
    """They are refused, with what to pass instead; a head may be spread."""

    class Spread(torch.Tensor):
        placements = device_mesh = None  # By which the library knows a DTensor.

    preds = LinearLogits(HIDDEN.as_subclass(Spread), HEAD)
    message = raised(TypeError, lambda: functional.cross_entropy(preds, torch.zeros(2, 3, dtype=torch.int64)))
    assert message == "`hidden` of `preds` must be a plain tensor, got a DTensor; pass its full_tensor()."


@each_call
@pytest.mark.parametrize("length", [0, 1, K - 1, K + 1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["CrossEntropy", "GroupedCrossEntropy"])
def test_class_weights_of_the_wrong_length(name: str, soft: bool, length: int, call: str) -> None:
    """There is one for each class; nothing is broadcast."""
    metric = KINDS[name].make(class_weight=torch.ones(length))
    batch = KINDS[name].chosen(make_batch(name, soft=soft))
    text = f"`class_weight` must have one weight for each of the {K} classes, got {length}"
    assert text in raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert metric.update_count == metric.tally.state.abs().sum() == 0


WEIGHTS_OF_CLASSES = "class weights or `pos_weight` that are negative, infinite or NaN"


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf, 2.0**47])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "option"),
    [("CrossEntropy", "class_weight"), ("GroupedCrossEntropy", "class_weight"), ("BinaryCrossEntropy", "pos_weight")],
)
def test_class_weights_are_checked_when_a_metric_is_made(
    name: str, option: str, dtype: torch.dtype, bad: float
) -> None:
    """A metric that could only be wrong is not made, and functions say the same."""
    values = torch.tensor([1.0, bad, 0.0, 2.0], dtype=dtype)
    text = f"`{option}` must hold finite numbers that are not negative (and below 2**47), got {float(bad)}"
    assert text in raised(ValueError, lambda: KINDS[name].make(**{option: values}))
    assert text in raised(ValueError, lambda: KINDS[name].call(make_batch(name), **{option: values}))


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "soft"),
    [("CrossEntropy", False), ("CrossEntropy", True), ("GroupedCrossEntropy", True), ("BinaryCrossEntropy", False)],
)
def test_class_weights_are_checked_on_any_device(name: str, soft: bool, bad: float) -> None:
    """Bad ones never read as a number: the metric is not made, or they are counted."""
    values = torch.tensor([1.0, bad, 0.0] if KINDS[name].binary else [1.0, bad, 0.0, 2.0])
    option = "pos_weight" if KINDS[name].binary else "class_weight"

    def read() -> None:
        metric = KINDS[name].make(**{option: values})
        metric.update(**KINDS[name].chosen(make_batch(name, soft=soft)))
        metric.compute()

    raised(ValueError, read)


@each_call
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["CrossEntropy", "GroupedCrossEntropy", "CrossEntropyDecomposition"])
def test_too_much_smoothing_over_the_others(name: str, soft: bool, call: str) -> None:
    """The most is what makes the target uniform; more is refused with the limit, and alone over all classes allowed."""
    batch = KINDS[name].chosen(make_batch(name, soft=soft))
    options = {"label_smoothing_over": "others"}
    uniform = KINDS[name].make(label_smoothing=0.75, **options)(**batch)
    assert numbers(uniform) == pytest.approx(numbers(KINDS[name].make(label_smoothing=1.0)(**batch)), nan_ok=True)
    metric = KINDS[name].make(label_smoothing=0.76, **options)
    message = raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert re.match(r"`label_smoothing` .* at most \(K - 1\) / K = 3/4, got 0\.76: .*; lower it\.", message)
    assert metric.update_count == metric.tally.state.abs().sum() == 0
    raised(ValueError, lambda: KINDS[name].call(make_batch(name), label_smoothing=0.76, **options))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # Of the compiler.
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("CrossEntropy", "update"),
        ("BinaryCrossEntropy", "forward"),
        pytest.param("CrossEntropyReport", "forward", marks=pytest.mark.slow),
    ],
)
def test_no_compiler(name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch says what was looked for, and what to do instead; an empty one needs no compiler."""
    pick_vec_isa()  # What the processor can do is found out by compiling, and remembered.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    batch = KINDS[name].chosen(make_batch(name))
    metric = KINDS[name].make(backend="compile")
    metric.update(**{key: None if x is None else x[:0] for key, x in batch.items()})
    state, count = metric.tally.state.clone(), metric.update_count
    torch._dynamo.reset()  # What was compiled for another test would do.
    with torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler"), "fx_graph_cache": False}):
        message = raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert re.match("`backend` must be 'auto' or 'eager' where the losses cannot be compiled, got 'compile'", message)
    assert "/no/such/compiler" in message
    assert "; install the compiler if it is missing (C++, on CUDA Triton)" in message
    assert torch.equal(metric.tally.state, state)
    assert metric.update_count == count


@each_call
def test_two_sources_of_bytes_or_none(call: str) -> None:
    """The bytes come from exactly one place."""
    name, good = "BitsPerByte", make_batch("BitsPerByte")
    message = assert_no_trace(name, {**good, "num_bytes": None}, {}, good, ValueError)
    assert re.match("`num_bytes` must be given exactly if there is no `token_bytes` table, got neither; pass", message)
    metric = BitsPerByte(token_bytes=TABLE)
    args = good["preds"], good["target"]
    for num_bytes in (9, 0, torch.tensor(9)):
        message = raised(ValueError, lambda n=num_bytes: getattr(metric, call)(*args, num_bytes=n))
        assert "got both; pass the table once" in message
        assert metric.update_count == metric.tally.state.abs().sum() == 0
        raised(ValueError, lambda n=num_bytes: functional.bits_per_byte(*args, num_bytes=n, token_bytes=TABLE))
    raised(ValueError, lambda: functional.bits_per_byte(*args))


BAD_BYTES = [
    (-1, ValueError),
    (9.0, TypeError),
    (True, TypeError),
    ("9", TypeError),
    (2**63, ValueError),
    (2**70, ValueError),
    (torch.tensor(9.0), TypeError),
    (torch.tensor([True]), TypeError),
    (torch.tensor([9, -1]), ValueError),
    (torch.tensor([2**62] * 4), ValueError),
    (torch.tensor([2**64 - 1], dtype=torch.uint64), ValueError),
    (torch.tensor(9j), TypeError),
]


@each_call
@pytest.mark.parametrize(("num_bytes", "error"), BAD_BYTES)
def test_bad_numbers_of_bytes(num_bytes: Any, error: type[Exception], call: str) -> None:
    """Bytes are integers that are not negative and can be summed."""
    good = make_batch("BitsPerByte")
    bad = {**good, "num_bytes": num_bytes}
    assert "`num_bytes`" in assert_no_trace("BitsPerByte", bad, {}, good, error)
    raised(error, lambda: KINDS["BitsPerByte"].call(bad))


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("num_bytes", [-1, 2**47, torch.tensor([9, -1]), torch.tensor([2**62] * 4)], ids=str)
def test_bad_numbers_of_bytes_are_counted_elsewhere(num_bytes: Any) -> None:
    """On an accelerator the batch reads NaN, and `compute` raises until a reset, also after a good batch."""
    good, metric = make_batch("BitsPerByte"), BitsPerByte()
    bad = {**good, "num_bytes": num_bytes}
    assert metric(**KINDS["BitsPerByte"].chosen(bad)).isnan()
    assert KINDS["BitsPerByte"].call(bad).isnan()
    assert not metric(**KINDS["BitsPerByte"].chosen(good)).isnan()
    for _ in range(2):
        assert re.search(r"num_bytes.* but 1 were not; .*reset\(\)", raised(ValueError, metric.compute))
    metric.reset()
    assert bits(metric(**KINDS["BitsPerByte"].chosen(good))) == bits(KINDS["BitsPerByte"].call(good))
    assert metric.compute().isfinite()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint32, torch.uint64])
def test_numbers_of_bytes_of_any_integer_type(dtype: torch.dtype) -> None:
    """9 bytes are 9 bytes, in the table and beside the batch."""
    batch = make_batch("BitsPerByte")
    expected = KINDS["BitsPerByte"].call(batch).item()
    assert KINDS["BitsPerByte"].call({**batch, "num_bytes": torch.tensor([4, 5]).to(dtype)}).item() == expected
    table = KINDS["BitsPerByte(token_bytes)"]
    assert table.call(batch, token_bytes=TABLE.to(dtype)).item() == table.call(batch).item()


def test_many_bytes_do_not_overflow() -> None:
    """No number of bytes that is accepted, however often, makes a sum negative."""
    batch = make_batch("BitsPerByte")
    metric = BitsPerByte()
    try:
        for _ in range(4):
            assert metric(batch["preds"], batch["target"], num_bytes=2**63 - 1).item() >= 0
    except ValueError:
        return
    assert metric.compute().item() > 0


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ([1, 2], TypeError),
        (torch.ones(K), TypeError),
        (torch.ones(K, dtype=torch.bool), TypeError),
        (torch.ones(1, K, dtype=torch.int64), TypeError),
        (torch.tensor(1), TypeError),
        (torch.tensor([1, -1, 1, 1]), ValueError),
        (torch.tensor([1, 2**24, 1, 1]), ValueError),
        (torch.tensor([1, 2**64 - 1, 1, 1], dtype=torch.uint64), ValueError),
    ],
)
@pytest.mark.parametrize("metric_class", [BitsPerByte, CrossEntropyReport])
def test_bad_tables_of_bytes(metric_class: Any, table: Any, error: type[Exception]) -> None:
    """A table is checked when the metric is made."""
    assert raised(error, lambda: metric_class(token_bytes=table)).startswith("`token_bytes` must")
    batch = make_batch("BitsPerByte")
    raised(error, lambda: functional.bits_per_byte(batch["preds"], batch["target"], token_bytes=table))


@each_call
@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", ["BitsPerByte(token_bytes)", "CrossEntropyReport(token_bytes)"])
def test_token_ids_beyond_the_table(name: str, length: int, call: str, hide_values: Callable[[], None]) -> None:
    """An id that the table does not reach is out of range, also for a table without entries."""
    metric = KINDS[name].make(token_bytes=TABLE[:length])
    batch = KINDS[name].chosen(make_batch(name))
    message = raised(ValueError, lambda: getattr(metric, call)(**batch))
    assert re.match(rf"`target` must hold class indices in \[0, {length}\) .* got {6 - 3 * length} that", message)
    assert metric.update_count == metric.tally.state.abs().sum() == 0
    hide_values()
    assert all(map(math.isnan, numbers(metric(**batch))))
    assert f"{6 - 3 * length} targets were outside" in raised(ValueError, metric.compute)


def test_bad_groups() -> None:
    """Groups are integers."""
    name, good = "GroupedCrossEntropy", make_batch("GroupedCrossEntropy")
    for group in (good["group"].float(), good["group"].bool(), None, [0]):
        message = assert_no_trace(name, {**good, "group": group}, {}, good, TypeError)
        assert re.match(r"`group` must be a dense tensor of integers, got .*; convert it with \.long\(\)", message)


@pytest.mark.parametrize("bad", [2**63, 2**64 - 1])
def test_a_group_above_int64_is_named_as_it_was_given(bad: int) -> None:
    """No group wraps to another one, or to another number in words."""
    group = torch.tensor([0, bad], dtype=torch.uint64)
    with pytest.raises(ValueError, match=rf"`group` must hold integers in \[0, 3\), got 1 .* such as {bad};"):
        functional.grouped_cross_entropy(torch.zeros(2, K), torch.tensor([0, 1]), group=group, num_groups=3)


# Constructors.

JUNK: dict[str, list[Any]] = {
    "input": ["logit", None, 1, True, [], "LOGITS"],
    "class_dim": ["1", None, 1.0, True, [1], torch.tensor(1)],
    "class_weight": [[1.0], 1.0, "1", torch.ones(2, 2), torch.tensor(1.0), torch.ones(2, dtype=torch.int64), True],
    "label_smoothing": ["0", None, True, -0.1, 1.1, math.nan, math.inf, 1j, torch.tensor(0.1)],
    "label_smoothing_over": ["other", None, True, 1],
    "ignore_index": ["-100", 1.0, True, [1], torch.tensor(1), math.nan],
    "eps": ["0", True, 0.0, -1e-3, 0.5, math.nan, torch.tensor(0.1), 1e-7],
    "shift": [0, 1, None, "yes", torch.tensor(1)],
    "backend": ["inductor", None, True, 1, [], "COMPILE"],
    "unit": ["bit", None, True, 2],
    "average": ["micro", None, True],
    "accuracy": [1, None, "macro"],
    "entropy": [0, None, "nats"],
    "nan_policy": ["drop", None, True, 0],
    "sequence_group": ["world", 0],
    "confidence": [0.0, 1.0, 95, True, "0.9", None, math.nan, -0.5],
    "token_bytes": [[1], 1, "1", torch.ones(2), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)],
    "pos_weight": [[1.0], 1.0, "1", torch.ones(2, dtype=torch.int64), True, torch.ones(2, dtype=torch.complex64)],
    "num_groups": [0, -1, 1.0, "2", True, None, [2], torch.tensor(2)],
    "num_classes": [1, 0, -1, 2.0, "2", True, None, [2], torch.tensor(2)],
}

REQUIRED = {"GroupedCrossEntropy": {"num_groups": 2}, "NormalizedCrossEntropy": {"num_classes": 2}}


def constructor_junk() -> Iterator[Any]:
    """Yield every class with every argument that it has, and everything that the argument must not be."""
    for metric_class in CLASSES:
        for name, parameter in inspect.signature(metric_class).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                for value in JUNK[name]:
                    short = re.sub(r"\s+", " ", repr(value))[:30]
                    yield pytest.param(metric_class, name, value, id=f"{metric_class.__name__}-{name}={short}")


@pytest.mark.parametrize(("metric_class", "name", "value"), list(constructor_junk()))
def test_constructors_refuse_what_they_do_not_understand(metric_class: Any, name: str, value: Any) -> None:
    """Every argument of every class, with values of wrong types and out of range: the sentence names it."""
    options = {**REQUIRED.get(metric_class.__name__, {}), name: value}
    message = raised((TypeError, ValueError), lambda: metric_class(**options))
    assert f"`{name}`" in message.split(" must ")[0] or message.startswith(f"`{name}`")


@pytest.mark.parametrize("metric_class", CLASSES)
def test_constructors_take_keywords_and_know_no_others(metric_class: Any) -> None:
    """A misspelled option is an error, and so is one by position."""
    options = REQUIRED.get(metric_class.__name__, {})
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `lable_smoothing`"):
        metric_class(**options, lable_smoothing=0.1)
    with pytest.raises(TypeError, match="positional"):
        metric_class(*options.values(), "logits")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"label_smoothing": 0.1}, "`label_smoothing` must be 0"),
        ({"class_weight": torch.ones(K)}, "`class_weight` must be None"),
        ({"shift": True}, "`shift` must be False"),
        ({"eps": 0.1}, "`eps` clips probabilities"),
    ],
)
def test_options_that_losses_do_not_go_with(options: dict[str, Any], text: str) -> None:
    """Losses are made: what would change them is refused."""
    assert text in raised(ValueError, lambda: CrossEntropy(input="losses", **options))
    batch = make_batch("CrossEntropy", "losses")
    raised(ValueError, lambda: functional.cross_entropy(batch["preds"], batch["target"], input="losses", **options))


@pytest.mark.parametrize("name", [name for name in OF_CLASSES if "losses" in KINDS[name].inputs])
@pytest.mark.parametrize("class_dim", [1, -2, 7])
def test_losses_have_no_dimension_of_classes(name: str, class_dim: int) -> None:
    """A `class_dim` that losses do not have does not matter to them."""
    batch = {k: x[0] if isinstance(x, Tensor) else x for k, x in make_batch(name, "losses").items()}
    expected = KINDS[name].make(input="losses")(**KINDS[name].chosen(batch))
    metric = KINDS[name].make(input="losses", class_dim=class_dim)
    assert bits(metric(**KINDS[name].chosen(batch))) == bits(expected)


@each_call
@pytest.mark.parametrize("class_dim", [3, -4, 2**40])
@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_class_dimension_that_is_none(name: str, class_dim: int, call: str) -> None:
    """The sentence names the shape."""
    metric = KINDS[name].make(class_dim=class_dim)
    message = raised(ValueError, lambda: getattr(metric, call)(**KINDS[name].chosen(make_batch(name))))
    assert re.match(rf"`class_dim` must be a dimension of `preds\w*`, got {class_dim} for shape \(2, 3, {K}\)", message)
    assert metric.update_count == 0


@pytest.mark.parametrize("ignore_index", [2**63, -(2**63) - 1, 2**70])
@each_kind
def test_an_ignore_index_that_no_integer_holds(name: str, ignore_index: int) -> None:
    """It ignores nothing, or is refused; it does not overflow."""
    try:
        metric = KINDS[name].make(ignore_index=ignore_index)
    except (TypeError, ValueError):
        return
    expected = KINDS[name].make(ignore_index=None)
    batch = KINDS[name].chosen(make_batch(name))
    assert bits(metric(**batch)) == bits(expected(**batch))


@pytest.mark.parametrize("metric_class", [CrossEntropyReport, CrossEntropyDifference])
def test_every_confidence_that_is_accepted_can_be_read(metric_class: Any) -> None:
    """Also the greatest below 1."""
    try:
        metric = metric_class(confidence=1 - 2**-53)
    except ValueError:
        return
    name = "CrossEntropyReport" if metric_class is CrossEntropyReport else "CrossEntropyDifference(a)"
    metric.update(**KINDS[name].chosen(make_batch(name)))
    metric.compute()


@pytest.mark.parametrize("target", [0, 1])
def test_smoothing_refuses_what_is_no_number_of_classes(target: int) -> None:
    """The conversion checks both of its arguments."""
    for bad in (0, -1, 1.5, True, "2", None):
        assert "`num_classes` must be an integer" in raised(
            ValueError, lambda b=bad: functional.convert_label_smoothing(0.1 * target, b)
        )
    for bad in (-0.1, 1.1, math.nan, "0", None, True):
        assert "`label_smoothing`" in raised(ValueError, lambda b=bad: functional.convert_label_smoothing(b, 3))
    assert "at most (K - 1) / K = 2/3" in raised(ValueError, lambda: functional.convert_label_smoothing(0.67, 3))
