"""Every metric class with options, batches and a judge: what conformance is tested on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from tests import reference
from tests.reference import Target
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
    functional,
)

K = 6  # Classes, and labels of a binary target.
T = 3  # Positions.
GROUPS = 4  # The group 2 stays empty.
SIZES = (1, 4, 7)

Batch = dict[str, Any]
Options = dict[str, Any]
Rows = list[list[Target]]

CLASS_WEIGHT = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
TOKEN_BYTES = torch.tensor([0, 1, 2, 3, 1, 4])


def make_batches(
    preds: str = "logits",
    target: str = "hard",
    weighed: bool = False,
    ignored: int | None = -100,
    class_dim: int = -1,
    names: Sequence[str] = ("preds",),
    extra: str = "",
) -> list[Batch]:
    """Make batches of unequal size and difficulty, with some ignored targets, so that a mean of means is wrong."""
    batches: list[Batch] = []
    for size in SIZES:
        shape = (size, T) if preds == "losses" else (size, T, K)
        batch: Batch = {}
        for name in names:
            scores = size * torch.randn(shape, dtype=torch.float64)
            batch[name] = (
                _as_scores(scores, preds).movedim(-1, class_dim) if class_dim != -1 else _as_scores(scores, preds)
            )
        batch["target"] = _make_target(target, shape, ignored, class_dim)
        if weighed:
            labels = shape if target.startswith("binary") else (size, T)
            batch["weight"] = torch.rand(labels).masked_fill(torch.rand(labels) < 0.2, 0.0)
        if extra == "group":
            batch["group"] = torch.tensor([0, 1, 3])[torch.randint(0, 3, (size, T))]
        elif extra:
            batch["num_bytes"] = 0 if extra == "number" else torch.zeros(size, dtype=torch.int64)
        batches.append(with_bytes(batch))
    return batches


def _as_scores(scores: Tensor, kind: str) -> Tensor:
    if kind == "binary probs":
        return scores.sigmoid()
    return {"log_probs": scores.log_softmax, "probs": scores.softmax}[kind](-1) if "probs" in kind else scores


def _make_target(kind: str, shape: tuple[int, ...], ignored: int | None, class_dim: int) -> Tensor:
    if kind == "soft":
        return torch.rand(shape, dtype=torch.float64).softmax(-1).movedim(-1, class_dim)
    if kind == "binary soft":
        return torch.rand(shape, dtype=torch.float64)
    labels = shape if kind == "binary" else shape[:2]
    target = torch.randint(0, 2 if kind == "binary" else K, labels)
    if ignored is not None:
        target = target.masked_fill(torch.rand(labels) < 0.2, ignored)
    target[0, -1] = 1  # Also where the first position is shifted away.
    return target


def with_bytes(batch: Batch) -> Batch:
    """Give a batch that has `num_bytes` two for each of its scored targets."""
    if "num_bytes" not in batch:
        return batch
    scored = batch["target"] >= 0
    if "weight" in batch:
        scored &= batch["weight"] > 0
    return {**batch, "num_bytes": 2 * (scored.sum(1) if isinstance(batch["num_bytes"], Tensor) else int(scored.sum()))}


def together(batches: list[Batch]) -> Batch:
    """Concatenate batches."""
    joined = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        joined[name] = torch.cat(parts) if isinstance(parts[0], Tensor) else sum(parts)
    return joined


def some_rows(batch: Batch, rows: slice) -> Batch:
    """Return some sequences of a batch."""
    return with_bytes({name: x[rows] if isinstance(x, Tensor) else x for name, x in batch.items()})


# Judges: the value of one batch, in plain floats.


def score(options: Options, data: Batch, preds: str = "preds") -> Rows:
    """Score every target that is not ignored."""
    form, class_dim = options.get("input", "logits"), options.get("class_dim", -1)
    first = int(options.get("shift", False))
    class_weight = options["class_weight"].tolist() if "class_weight" in options else None
    soft = data["target"].is_floating_point()
    scores = data[preds].movedim(class_dim, -1) if form != "losses" else data[preds]
    target = data["target"].movedim(class_dim, -1) if soft else data["target"]
    weight = data.get("weight", torch.ones(target.shape[:2]))
    rows: Rows = []
    for scores_row, target_row, weight_row in zip(scores.tolist(), target.tolist(), weight.tolist(), strict=True):
        row: list[Target] = []
        for x, y, w in zip(scores_row, target_row[first:], weight_row[first:], strict=False):
            if y == options.get("ignore_index", -100):
                continue
            if form == "losses":
                row.append(Target(x, 1.0, w))
                continue
            log_probs = reference.log_probabilities(x, form, options.get("eps"))
            loss = reference.target_loss(log_probs, y, smoothing(options), class_weight)
            row.append(Target(loss, reference.target_norm(y, class_weight), w))
        rows.append(row)
    return rows


def classes(options: Options, data: Batch) -> list[int]:
    """Return the class of every target that is not ignored."""
    scored = data["target"][:, int(options.get("shift", False)) :].flatten().tolist()
    return [y for y in scored if y != options.get("ignore_index", -100)]


def smoothing(options: Options) -> float:
    """Return the label smoothing over all classes, whatever the convention."""
    over_others = options.get("label_smoothing_over", "all") == "others"
    return options.get("label_smoothing", 0.0) * (K / (K - 1) if over_others else 1)


def in_unit(options: Options, nats: float) -> float:
    """Convert nats to the unit asked for."""
    return reference.bits(nats) if options.get("unit", "nats") == "bits" else nats


def judge_cross_entropy(options: Options, data: Batch) -> float:
    """Cross-entropy in the unit asked for."""
    return in_unit(options, reference.cross_entropy(score(options, data)))


def judge_bits(options: Options, data: Batch) -> float:
    """Bits per token."""
    return reference.bits(judge_cross_entropy(options, data))


def judge_perplexity(options: Options, data: Batch) -> float:
    """Perplexity."""
    return reference.perplexity(judge_cross_entropy(options, data))


def judge_report(options: Options, data: Batch) -> dict[str, float]:
    """Every reading of a report."""
    rows = score(options, data)
    nats, scored = reference.cross_entropy(rows), reference.scored(rows)
    lower, upper = reference.interval(rows, options.get("confidence", 0.95))
    num_tokens = sum(map(len, scored))
    values = {
        "cross_entropy": nats,
        "bits_per_token": reference.bits(nats),
        "perplexity": reference.perplexity(nats),
        "cross_entropy_stderr": reference.stderr(rows),
        "cross_entropy_lower": lower,
        "cross_entropy_upper": upper,
        "perplexity_lower": reference.perplexity(lower),
        "perplexity_upper": reference.perplexity(upper),
        "num_tokens": num_tokens,
        "num_ignored": data["target"][:, int(options.get("shift", False)) :].numel() - num_tokens,
        "num_nonfinite": reference.num_nonfinite(rows),
    }
    if "token_bytes" in options:
        values["bits_per_byte"] = judge_bits_per_byte(options, data)
    for name, value in (("accuracy", is_most_likely), ("entropy", own_entropy)):
        if options.get(name):
            values[name] = reference.cross_entropy([of_predictions(options, data, value)])
    return values


def of_predictions(options: Options, data: Batch, value: Callable[[list[float], Any], float]) -> list[Target]:
    """Return a value of the log-probabilities and the class of every target that is not ignored, with its weight."""
    first, form = int(options.get("shift", False)), options.get("input", "logits")
    weight = data.get("weight", torch.ones(data["target"].shape))
    targets = []
    for scores, classes, weights in zip(data["preds"].tolist(), data["target"].tolist(), weight.tolist(), strict=True):
        for x, y, w in zip(scores, classes[first:], weights[first:], strict=False):
            if y != -100:
                targets.append(Target(value(reference.log_probabilities(x, form), y), 1.0, w))
    return targets


def is_most_likely(log_probs: list[float], target: int) -> float:
    """Return 1 if the target is the first of the most likely classes."""
    return float(log_probs.index(max(log_probs)) == target)


def own_entropy(log_probs: list[float], _: int) -> float:
    """Return the entropy of a distribution."""
    return reference.entropy([math.exp(x) for x in log_probs])


def judge_bits_per_byte(options: Options, data: Batch) -> float:
    """Bits per byte of the table, or of the text."""
    targets = [target for row in score(options, data) for target in row]
    if "token_bytes" not in options:
        nats, num_bytes = math.fsum(t.weight * t.loss for t in targets), data["num_bytes"]
        num_bytes = int(num_bytes.sum()) if isinstance(num_bytes, Tensor) else num_bytes
        return reference.bits_per_byte(nats, num_bytes if any(t.weight for t in targets) else 0)
    table, nats, total = options["token_bytes"].tolist(), [], []
    for target, token in zip(targets, classes(options, data), strict=True):
        if table[token]:
            nats.append(target.weight * target.loss)
            total.append(target.weight * table[token])
    return reference.bits(math.fsum(nats) / math.fsum(total)) if math.fsum(total) else math.nan


def judge_binary(options: Options, data: Batch) -> float:
    """Binary cross-entropy."""
    share, pos_weight = options.get("label_smoothing", 0.0), options.get("pos_weight", torch.ones(()))
    columns = [x.expand(data["preds"].shape) for x in (data.get("weight", torch.ones(())), pos_weight)]
    numbers = zip(*(x.flatten().tolist() for x in (data["preds"], data["target"], *columns)), strict=True)
    targets = []
    for x, y, w, positive in numbers:
        if y == options.get("ignore_index"):
            continue
        spread = (1 - share) * y + share / 2
        yes, no = (
            reference.binary_cross_entropy(x, label, options.get("input", "logits"), options.get("eps"))
            for label in (1.0, 0.0)
        )
        targets.append(Target(positive * spread * yes + (1 - spread) * no, 1.0, w))
    return in_unit(options, reference.cross_entropy([targets]))


def judge_decomposition(options: Options, data: Batch) -> dict[str, float]:
    """Cross-entropy, entropy and divergence, each from its own definition."""
    share, rows = smoothing(options), score(options, data)
    class_dim = options.get("class_dim", -1)
    target = data["target"].movedim(class_dim, -1) if data["target"].is_floating_point() else data["target"]
    entropies, divergences = [], []
    for scores_row, target_row, weight_row in zip(
        data["preds"].movedim(class_dim, -1).tolist(),
        target.tolist(),
        data.get("weight", torch.ones(target.shape[:2])).tolist(),
        strict=True,
    ):
        for x, y, w in zip(scores_row, target_row, weight_row, strict=True):
            if y == options.get("ignore_index", -100):
                continue
            probs = [float(k == y) for k in range(K)] if isinstance(y, int) else y
            probs = [(1 - share) * p + share / K for p in probs]
            log_probs = reference.log_probabilities(x, options.get("input", "logits"))
            entropies.append(Target(reference.entropy(probs), 1.0, w))
            divergences.append(Target(reference.kl_divergence(probs, log_probs), 1.0, w))
    values = zip(("cross_entropy", "entropy", "kl_divergence"), (rows, [entropies], [divergences]), strict=True)
    return {name: reference.cross_entropy(x) for name, x in values}


def judge_groups(options: Options, data: Batch) -> list[float]:
    """Cross-entropy of each group: of its targets, all others masked."""
    weight = data.get("weight", torch.ones(data["group"].shape))
    masked = ({**data, "weight": weight * (data["group"] == group)} for group in range(options["num_groups"]))
    return [judge_cross_entropy(options, part) for part in masked]


def judge_macro(options: Options, data: Batch) -> float:
    """Unweighted mean over the groups that have targets."""
    values = [x for x in judge_groups(options, data) if not math.isnan(x)]
    return math.fsum(values) / len(values) if values else math.nan


def judge_normalized(options: Options, data: Batch) -> float:
    """Cross-entropy over the entropy of the classes."""
    ids, targets = classes(options, data), [target for row in score(options, data) for target in row]
    frequencies = [0.0] * options["num_classes"]
    for target, index in zip(targets, ids, strict=True):
        frequencies[index] += target.weight
    return reference.normalized_cross_entropy(reference.cross_entropy([targets]), frequencies)


def judge_difference(options: Options, data: Batch) -> dict[str, float]:
    """Paired difference of two models."""
    pairs = zip(score(options, data, "preds_a"), score(options, data, "preds_b"), strict=True)
    rows = [[b._replace(loss=b.loss - a.loss) for a, b in zip(*pair, strict=True)] for pair in pairs]
    mean, (lower, upper) = reference.cross_entropy(rows), reference.interval(rows, options.get("confidence", 0.95))
    return {
        "difference": mean,
        "difference_stderr": reference.stderr(rows),
        "difference_lower": lower,
        "difference_upper": upper,
        "perplexity_ratio": reference.perplexity(mean),
        "perplexity_ratio_lower": reference.perplexity(lower),
        "perplexity_ratio_upper": reference.perplexity(upper),
    }


class Quantity(NamedTuple):
    """A metric class, its function, and what both of them take.

    Attributes:
        metric: The class, if there is one.
        function: The function, if there is one.
        arguments: Of an update and of the function.
        inputs: What `input` may be, the default first.
        binary: Whether targets are yes or no.
        soft: Whether targets may be distributions.
        required: Options without a default, by name, for `K` classes.
    """

    metric: Any
    function: Callable[..., Any] | None = None
    arguments: tuple[str, ...] = ("preds", "target", "weight")
    inputs: tuple[str, ...] = ("logits", "log_probs", "probs", "losses")
    binary: bool = False
    soft: bool = True
    required: Options = {}  # noqa: RUF012  # A default of a named tuple, which nothing changes.

    @property
    def positional(self) -> tuple[str, ...]:
        """Return the arguments that may come by position: predictions, and then targets."""
        return self.arguments[: self.arguments.index("target") + 1]

    def options(self, form: Callable[..., Any]) -> set[str]:
        """Return the names of the options of the function or of the metric."""
        return {*_names(form)} - set(self.arguments)


@cache
def _names(form: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters of a function or of a class."""
    parameters = inspect.signature(form).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


SCORES = ("logits", "log_probs", "probs")
QUANTITIES = {
    "cross_entropy": Quantity(CrossEntropy, functional.cross_entropy),
    "bits_per_token": Quantity(BitsPerToken, functional.bits_per_token),
    "perplexity": Quantity(Perplexity, functional.perplexity),
    "report": Quantity(CrossEntropyReport),
    "bits_per_byte": Quantity(BitsPerByte, functional.bits_per_byte, ("preds", "target", "num_bytes", "weight")),
    "binary_cross_entropy": Quantity(
        BinaryCrossEntropy, functional.binary_cross_entropy, inputs=("logits", "probs"), binary=True, soft=False
    ),
    "cross_entropy_decomposition": Quantity(
        CrossEntropyDecomposition, functional.cross_entropy_decomposition, inputs=SCORES
    ),
    "grouped_cross_entropy": Quantity(
        GroupedCrossEntropy,
        functional.grouped_cross_entropy,
        ("preds", "target", "group", "weight"),
        required={"num_groups": GROUPS},
    ),
    "normalized_cross_entropy": Quantity(
        NormalizedCrossEntropy, functional.normalized_cross_entropy, soft=False, required={"num_classes": K}
    ),
    "cross_entropy_difference": Quantity(
        CrossEntropyDifference, functional.cross_entropy_difference, ("preds_a", "preds_b", "target", "weight")
    ),
}


class Case(NamedTuple):
    """A metric class with options, what its batches are made of, and who judges.

    Attributes:
        metric_class: The class.
        judge: What it should read for all of some data.
        options: What it is made with.
        data: What `make_batches` is told.
        passes: How often an update passes over logits.
    """

    metric_class: Any
    judge: Callable[[Options, Batch], Any]
    options: Options = {}  # noqa: RUF012  # A default of a named tuple, which nothing changes.
    data: Options = {}  # noqa: RUF012
    passes: int = 1

    @property
    def quantity(self) -> Quantity:
        """Row of the class in `QUANTITIES`."""
        quantities = {quantity.metric: quantity for quantity in QUANTITIES.values()}
        assert self.metric_class in quantities, f"{self.metric_class.__name__} has a case, but no row in QUANTITIES"
        return quantities[self.metric_class]

    def metric(self, **more: Any) -> Any:
        """Make a metric."""
        return self.metric_class(**self.options, **more)

    def filled(self, *batches: Batch) -> Any:
        """Make a metric and update it."""
        return filled(self.metric(), *batches)

    def batches(self, **more: Any) -> list[Batch]:
        """Make batches."""
        return make_batches(**{**self.data, **more})

    def expected(self, *batches: Batch) -> Any:
        """Judge all the data at once."""
        return self.judge(self.options, together(list(batches)))


def named(call: Callable[..., Any], *values: Any) -> Batch:
    """Name the arguments of a call, which are in the order of its signature."""
    return dict(zip(inspect.signature(call).parameters, values, strict=False))


def filled(metric: Any, *batches: Batch) -> Any:
    """Update a metric with batches."""
    for batch in batches:
        metric.update(**batch)
    return metric


PAIR = {"names": ("preds_a", "preds_b")}
CASES = {
    "CrossEntropy": Case(CrossEntropy, judge_cross_entropy),
    "CrossEntropy-bits": Case(CrossEntropy, judge_cross_entropy, {"unit": "bits"}),
    "CrossEntropy-weights": Case(
        CrossEntropy, judge_cross_entropy, {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.1}
    ),
    "CrossEntropy-others": Case(
        CrossEntropy, judge_cross_entropy, {"label_smoothing": 0.1, "label_smoothing_over": "others"}
    ),
    "CrossEntropy-soft": Case(CrossEntropy, judge_cross_entropy, {"class_dim": 1}, {"target": "soft", "class_dim": 1}),
    "CrossEntropy-soft-weights": Case(
        CrossEntropy, judge_cross_entropy, {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.2}, {"target": "soft"}
    ),
    "CrossEntropy-shift": Case(CrossEntropy, judge_cross_entropy, {"shift": True}),
    "CrossEntropy-ignore-2": Case(CrossEntropy, judge_cross_entropy, {"ignore_index": 2}, {"ignored": 2}),
    "CrossEntropy-probs": Case(
        CrossEntropy, judge_cross_entropy, {"input": "probs", "eps": 0.01}, {"preds": "probs"}, passes=0
    ),
    "CrossEntropy-losses": Case(CrossEntropy, judge_cross_entropy, {"input": "losses"}, {"preds": "losses"}, passes=0),
    "BitsPerToken": Case(BitsPerToken, judge_bits),
    "BitsPerToken-log-probs": Case(BitsPerToken, judge_bits, {"input": "log_probs"}, {"preds": "log_probs"}, passes=0),
    "Perplexity": Case(Perplexity, judge_perplexity),
    "Perplexity-shift": Case(Perplexity, judge_perplexity, {"shift": True, "class_dim": 1}, {"class_dim": 1}),
    "CrossEntropyReport": Case(CrossEntropyReport, judge_report),
    "CrossEntropyReport-bytes": Case(CrossEntropyReport, judge_report, {"token_bytes": TOKEN_BYTES, "confidence": 0.8}),
    "CrossEntropyReport-more": Case(
        CrossEntropyReport, judge_report, {"token_bytes": TOKEN_BYTES, "accuracy": True, "entropy": True}
    ),
    "CrossEntropyReport-probs": Case(
        CrossEntropyReport,
        judge_report,
        {"input": "probs", "accuracy": True, "entropy": True},
        {"preds": "probs"},
        passes=0,
    ),
    "BitsPerByte-table": Case(BitsPerByte, judge_bits_per_byte, {"token_bytes": TOKEN_BYTES}),
    "BitsPerByte-number": Case(BitsPerByte, judge_bits_per_byte, {}, {"extra": "number"}),
    "BitsPerByte-numbers": Case(BitsPerByte, judge_bits_per_byte, {}, {"extra": "numbers"}),
    "BinaryCrossEntropy": Case(
        BinaryCrossEntropy, judge_binary, {"ignore_index": -1}, {"target": "binary", "ignored": -1}, passes=0
    ),
    "BinaryCrossEntropy-weights": Case(
        BinaryCrossEntropy,
        judge_binary,
        {"pos_weight": CLASS_WEIGHT, "label_smoothing": 0.1, "unit": "bits"},
        {"target": "binary soft"},
        passes=0,
    ),
    "BinaryCrossEntropy-probs": Case(
        BinaryCrossEntropy,
        judge_binary,
        {"input": "probs", "eps": 0.01},
        {"preds": "binary probs", "target": "binary", "ignored": None},
        passes=0,
    ),
    "CrossEntropyDecomposition": Case(CrossEntropyDecomposition, judge_decomposition, {}, {"target": "soft"}),
    "CrossEntropyDecomposition-smoothed": Case(
        CrossEntropyDecomposition, judge_decomposition, {"label_smoothing": 0.1, "class_dim": 1}, {"class_dim": 1}
    ),
    "CrossEntropyDecomposition-soft-smoothed": Case(
        CrossEntropyDecomposition, judge_decomposition, {"label_smoothing": 0.2}, {"target": "soft"}
    ),
    "CrossEntropyDecomposition-others": Case(
        CrossEntropyDecomposition, judge_decomposition, {"label_smoothing": 0.1, "label_smoothing_over": "others"}
    ),
    "GroupedCrossEntropy": Case(GroupedCrossEntropy, judge_groups, {"num_groups": GROUPS}, {"extra": "group"}),
    "GroupedCrossEntropy-weights": Case(
        GroupedCrossEntropy,
        judge_groups,
        {"num_groups": GROUPS, "class_weight": CLASS_WEIGHT, "label_smoothing": 0.1, "unit": "bits"},
        {"extra": "group"},
    ),
    "GroupedCrossEntropy-soft": Case(
        GroupedCrossEntropy,
        judge_groups,
        {"num_groups": GROUPS, "class_weight": CLASS_WEIGHT},
        {"extra": "group", "target": "soft"},
    ),
    "GroupedCrossEntropy-macro": Case(
        GroupedCrossEntropy, judge_macro, {"num_groups": GROUPS, "average": "macro", "unit": "bits"}, {"extra": "group"}
    ),
    "NormalizedCrossEntropy": Case(NormalizedCrossEntropy, judge_normalized, {"num_classes": K}),
    "CrossEntropyDifference": Case(CrossEntropyDifference, judge_difference, {}, PAIR, passes=2),
    "CrossEntropyDifference-shift": Case(
        CrossEntropyDifference, judge_difference, {"shift": True, "confidence": 0.8}, PAIR, passes=2
    ),
}


class Form(NamedTuple):
    """A function with options, and what its batches are made of."""

    function: Callable[..., Any]
    options: dict[str, Any] = {}  # noqa: RUF012  # Defaults of a named tuple, which nothing changes.
    data: dict[str, Any] = {}  # noqa: RUF012

    def batches(self) -> list[Batch]:
        """Make three batches of one shape."""
        return [make_batches(**self.data)[2] for _ in range(3)]


FORMS = {
    "cross_entropy": Form(functional.cross_entropy),
    "cross_entropy-weights": Form(
        functional.cross_entropy,
        {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.1, "unit": "bits"},
        {"weighed": True},
    ),
    "cross_entropy-soft": Form(
        functional.cross_entropy,
        {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.1, "class_dim": 1, "nan_policy": "raise"},
        {"target": "soft", "class_dim": 1, "weighed": True},
    ),
    "cross_entropy-shift": Form(
        functional.cross_entropy,
        {"shift": True, "label_smoothing": 0.1, "label_smoothing_over": "others", "class_dim": 1},
        {"class_dim": 1, "weighed": True},
    ),
    "cross_entropy-losses": Form(
        functional.cross_entropy, {"input": "losses", "nan_policy": "omit"}, {"preds": "losses", "weighed": True}
    ),
    "bits_per_token-probs": Form(functional.bits_per_token, {"input": "probs", "eps": 0.01}, {"preds": "probs"}),
    "perplexity-shift": Form(functional.perplexity, {"shift": True}, {"weighed": True}),
    "bits_per_byte-table": Form(functional.bits_per_byte, {"token_bytes": TOKEN_BYTES}, {"weighed": True}),
    "bits_per_byte-numbers": Form(functional.bits_per_byte, {"shift": True}, {"extra": "numbers"}),
    "bits_per_byte-number": Form(functional.bits_per_byte, {}, {"extra": "number"}),
    "binary_cross_entropy": Form(
        functional.binary_cross_entropy,
        {"pos_weight": CLASS_WEIGHT, "ignore_index": -1, "label_smoothing": 0.1},
        {"target": "binary", "ignored": -1, "weighed": True},
    ),
    "binary_cross_entropy-probs": Form(
        functional.binary_cross_entropy, {"input": "probs"}, {"preds": "binary probs", "target": "binary soft"}
    ),
    "cross_entropy_decomposition": Form(functional.cross_entropy_decomposition, {}, {"target": "soft"}),
    "cross_entropy_decomposition-smoothed": Form(
        functional.cross_entropy_decomposition,
        {"label_smoothing": 0.1, "class_dim": 1},
        {"class_dim": 1, "weighed": True},
    ),
    "grouped_cross_entropy": Form(
        functional.grouped_cross_entropy,
        {"num_groups": GROUPS, "class_weight": CLASS_WEIGHT},
        {"extra": "group", "weighed": True},
    ),
    "normalized_cross_entropy": Form(functional.normalized_cross_entropy, {"num_classes": K}, {"weighed": True}),
    "cross_entropy_difference": Form(functional.cross_entropy_difference, {"shift": True}, {**PAIR, "weighed": True}),
    "per_target_losses": Form(functional.per_target_losses, {"class_weight": CLASS_WEIGHT}),
    "per_target_losses-soft": Form(functional.per_target_losses, {"label_smoothing": 0.1}, {"target": "soft"}),
    "tally": Form(functional.tally, {"shift": True}, {"weighed": True}),
}
# A function that has no row of its own takes what the first case of its class takes.
_WITH_A_FORM = {form.function for form in FORMS.values()}
_FIRST_CASES = {case.metric_class: case for case in reversed(CASES.values())}
FORMS |= {
    name: Form(quantity.function, _FIRST_CASES[quantity.metric].options, _FIRST_CASES[quantity.metric].data)
    for name, quantity in QUANTITIES.items()
    if quantity.function is not None and quantity.function not in _WITH_A_FORM
}
DICTS = (CrossEntropyReport, CrossEntropyDecomposition, CrossEntropyDifference)
SCALAR = {name: case for name, case in CASES.items() if case.metric_class not in (*DICTS, GroupedCrossEntropy)}


def metric_classes(module: Any) -> set[type[Metric]]:
    """Return the metric classes that a module exports."""
    exported = [getattr(module, name) for name in module.__all__]
    return {x for x in exported if isinstance(x, type) and issubclass(x, Metric)}


def bits(value: Any) -> Any:
    """Every bit of a value, of a dict of values, or of a vector."""
    if isinstance(value, dict):
        return {name: bits(x) for name, x in value.items()}
    return (
        [float(x).hex() for x in value.flatten()] if isinstance(value, Tensor) and value.dim() else float(value).hex()
    )


def numbers(value: Any) -> dict[str, float]:
    """Name every number of a value: of a scalar, of a dict, or of a vector."""
    if isinstance(value, dict):
        return {name: float(x) for name, x in value.items()}
    if isinstance(value, Tensor):
        value = value.tolist()
    return {str(i): float(x) for i, x in enumerate(value)} if isinstance(value, list) else {"": float(value)}
