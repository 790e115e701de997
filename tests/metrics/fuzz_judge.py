"""The judge of anything that may be passed: what a call must return, or that it must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import reference
from tests.cases import Quantity
from tests.reference import Target
from xent_metrics import BitsPerByte, CrossEntropyReport, Tally

LIMIT = 2.0**94  # The first loss that counts as infinite.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

DEFAULTS: dict[str, Any] = {
    "input": "logits",
    "class_dim": -1,
    "class_weight": None,
    "label_smoothing": 0.0,
    "label_smoothing_over": "all",
    "ignore_index": -100,
    "eps": None,
    "shift": False,
    "unit": "nats",
    "nan_policy": "propagate",
    "backend": "auto",
    "confidence": 0.95,
    "token_bytes": None,
    "pos_weight": None,
    "average": "none",
    "accuracy": False,
    "entropy": False,
}


class RefusalError(Exception):
    """The call must be refused."""


class AmbiguityError(Exception):
    """The documentation does not say what the value is."""


def need(condition: bool) -> None:
    """Refuse unless a condition holds."""
    if not condition:
        raise RefusalError


class Scored(NamedTuple):
    """A target that is scored, its own entropy, what it belongs to, and by how much the loss may be off."""

    target: Target
    tolerance: float
    entropy: float = 0.0
    key: int = 0
    num_bytes: int = 0


class Judged(NamedTuple):
    """What is in a batch: sequences of scored targets, the losses of all targets, and other numbers."""

    sequences: list[list[Scored]]
    losses: list[float]
    ignored: int
    num_bytes: int

    def targets(self) -> list[Scored]:
        """List all targets that are scored."""
        return [one for sequence in self.sequences for one in sequence]


def is_dense(x: Any) -> bool:
    """Say whether something is a tensor that is not sparse."""
    return isinstance(x, Tensor) and x.layout == torch.strided


def is_integral(x: Tensor) -> bool:
    """Say whether a tensor holds integers and no booleans."""
    return not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool


def need_weights(x: Any) -> None:
    """Refuse what are no weights of classes."""
    need(is_dense(x) and x.is_floating_point() and all(0 <= w < 2.0**47 for w in x.reshape(-1).tolist()))


def judge_options(entry: Quantity, form: Callable[..., Any], given_options: dict[str, Any]) -> dict[str, Any]:
    """Refuse options that mean nothing by themselves, and fill in those that were left out."""
    names = entry.options(form)
    options = {**DEFAULTS, **({"ignore_index": None} if entry.binary else {})}
    options |= {name: value for name, value in given_options.items() if name in names}
    need(isinstance(options["input"], str) and options["input"] in entry.inputs)
    for name, choices in (
        ("label_smoothing_over", ("all", "others")),
        ("unit", ("nats", "bits")),
        ("nan_policy", ("propagate", "omit", "raise")),
        ("average", ("none", "macro")),
        ("backend", ("auto", "eager")),  # To compile every example would take hours.
    ):
        need(isinstance(options[name], str) and options[name] in choices)
    need(type(options["class_dim"]) is int)
    need(all(type(options[name]) is bool for name in ("shift", "accuracy", "entropy")))
    need(options["ignore_index"] is None or type(options["ignore_index"]) is int)
    need(-(2**63) <= (options["ignore_index"] or 0) < 2**63)
    need(options.get("sequence_group") is None)
    need(type(options["label_smoothing"]) in (int, float) and 0 <= options["label_smoothing"] <= 1)
    need(type(options["confidence"]) is float and 0 < options["confidence"] < 1)
    if options["eps"] is not None:
        need(type(options["eps"]) in (int, float) and 0 < options["eps"] < 0.5 and options["input"] == "probs")
    if options["input"] == "losses":
        need(not any(options[name] for name in ("label_smoothing", "shift", "accuracy", "entropy")))
        need(options["class_weight"] is None)
    if options["class_weight"] is not None:
        need_weights(options["class_weight"])
        need(options["class_weight"].dim() == 1)
    if options["pos_weight"] is not None:
        need_weights(options["pos_weight"])
    table = options["token_bytes"]
    if table is not None:
        need(is_dense(table) and is_integral(table) and table.dim() == 1)
        need(all(0 <= number < 2**24 for number in table.tolist()))
    for name, least in (("num_classes", 2), ("num_groups", 1)):
        need(name not in options or (type(options[name]) is int and options[name] >= least))
    return options


def broadcast(x: Any, shape: torch.Size) -> Tensor:
    """Expand a tensor to the shape of the targets, or refuse it."""
    need(is_dense(x) and x.dim() <= len(shape))
    need(all(own in (1, wanted) for own, wanted in zip(reversed(x.shape), reversed(shape), strict=False)))
    return x.expand(shape)


def judge(entry: Quantity, options: dict[str, Any], batch: dict[str, Any]) -> Judged:
    """Work out every loss of a batch, or refuse it."""
    all_bytes = num_bytes = judge_num_bytes(entry, options, batch)
    models = [judge_model(entry, options, batch[name], batch["target"]) for name in batch if name.startswith("preds")]
    shape = models[0].shape
    weight = batch.get("weight")
    if weight is not None:
        need(is_dense(weight) and not weight.is_complex())
        weight = broadcast(weight, shape)
    group = batch.get("group")
    if "group" in entry.arguments:
        need(is_dense(group) and is_integral(group))
        group = broadcast(group, shape)
    cut = (lambda x: x[..., 1:]) if options["shift"] else lambda x: x
    weights, groups, indices = (
        None if x is None else cut(x).reshape(-1).tolist()
        for x in (weight, group, torch.arange(shape.numel()).view(shape))
    )
    length = cut(torch.empty(shape, device="meta")).shape
    sequences: list[list[Scored]] = [[] for _ in range(length[0] if len(length) > 1 else len(indices))]
    losses, ignored = [], 0
    for place in range(len(indices)):
        w = 1.0 if weights is None else float(weights[place])
        label = models[0].labels[place]
        if is_ignored(label, options["ignore_index"]) or w == 0:
            ignored += 1
            losses.append(0.0)
            continue
        if options["token_bytes"] is not None:
            need(0 <= label < models[0].num_ids(place))
            num_bytes = int(options["token_bytes"][label])
            if entry.metric is BitsPerByte and not num_bytes:
                ignored += 1  # Nobody looks at its probabilities.
                continue
        parts = [model.loss(place) for model in models]
        by_table = entry.metric is BitsPerByte and options["token_bytes"] is not None
        norm = float(num_bytes) if by_table else parts[0].target.norm
        need(0 < w < 2.0**47)
        key = groups[place] if groups is not None else label if "num_classes" in options else 0
        need(0 <= key < options.get("num_groups", options.get("num_classes", 1)))
        loss = parts[0].target.loss
        losses.append(loss)
        if len(parts) == 2:
            a, b = (math.copysign(math.inf, x) if abs(x) >= LIMIT else x for x in (loss, parts[1].target.loss))
            loss = b - a
        if not abs(w * loss) < LIMIT and not math.isnan(loss):
            loss = math.copysign(math.inf, loss)
        row = place // (len(indices) // len(sequences))
        tolerance = sum(part.tolerance for part in parts)
        sequences[row].append(Scored(Target(loss, norm, w), tolerance, parts[0].entropy, key, num_bytes))
    return Judged(sequences, losses, ignored, all_bytes)


def is_ignored(label: Any, ignore_index: int | None) -> bool:
    """Say whether a label is a class index, or a binary target, that is left out."""
    return ignore_index is not None and not isinstance(label, list) and label == ignore_index


def judge_num_bytes(entry: Quantity, options: dict[str, Any], batch: dict[str, Any]) -> int:
    """Sum the bytes that come with a batch, or refuse them; -1 if there is a table."""
    if "num_bytes" not in entry.arguments:
        return 0
    number = batch["num_bytes"]
    need((number is None) != (options["token_bytes"] is None))
    if number is None:
        return -1
    need(options["nan_policy"] != "omit")
    if isinstance(number, Tensor):
        need(is_dense(number) and is_integral(number) and all(0 <= x < 2**47 for x in number.reshape(-1).tolist()))
        return sum(number.reshape(-1).tolist())
    need(type(number) is int and 0 <= number < 2**47)
    return int(number)


class Model(NamedTuple):
    """The predictions of one model beside the labels, row by row, after a shift."""

    entry: Quantity
    options: dict[str, Any]
    shape: torch.Size  # Of the targets, before the shift.
    rows: list[Any]
    labels: list[Any]
    dtypes: tuple[torch.dtype, torch.dtype]

    def num_ids(self, place: int) -> int:
        """Count the token ids that are a class and have an entry in the table of bytes."""
        num_ids = len(self.options["token_bytes"])
        return num_ids if self.options["input"] == "losses" else min(num_ids, len(self.rows[place]))

    def loss(self, place: int) -> Scored:
        """Work out the loss of one target, or refuse it."""
        row, label, options = self.rows[place], self.labels[place], self.options
        precision = 1e-11 if self.dtypes[0] == torch.float64 else 1e-5
        if options["input"] == "losses":
            need(options["token_bytes"] is None or label >= 0)
            return Scored(Target(row), precision * abs(row) if math.isfinite(row) else 0.0)
        if self.entry.binary:
            loss, scale = self.binary_loss(row, float(label), place)
            return Scored(Target(loss), precision * (1 + scale))
        if options["input"] == "probs":
            need(not any(p < 0 or p > 1 for p in row))
        logs = log_probabilities(row, options["input"], options["eps"])
        smoothing = smoothing_over_all(options, len(row))
        weights = None if options["class_weight"] is None else options["class_weight"].tolist()
        if isinstance(label, list):
            excess = 1e-3 if self.dtypes[1] in (torch.float32, torch.float64) else 1e-2
            need(all(p >= 0 for p in label) and abs(math.fsum(label) - 1) <= excess)
            onehot = label
        else:
            need(0 <= label < len(row))
            onehot = [float(k == label) for k in range(len(row))]
        loss = added(lambda: reference.target_loss(logs, label, smoothing, weights))
        scale = abs(loss)
        if smoothing or isinstance(label, list):
            scale = max([1.0, *(weights or [])]) * sum(abs(q) for q in logs if math.isfinite(q))
        entropy = reference.entropy([(1 - smoothing) * p + smoothing / len(row) for p in onehot])
        norm = reference.target_norm(label, weights)
        tolerance = precision * (max(1.0, norm) + scale) if math.isfinite(scale) else 0.0
        return Scored(Target(loss, norm), tolerance, entropy)

    def binary_loss(self, score: float, label: float, place: int) -> tuple[float, float]:
        """Work out the loss of a binary target, and the size of its terms."""
        options = self.options
        need(0 <= label <= 1)
        if options["input"] == "probs":
            need(not (score < 0 or score > 1))
            logs = log_probabilities([1 - score, score], "probs", options["eps"])
        elif math.isinf(score):
            logs = [-math.inf, 0.0] if score > 0 else [0.0, -math.inf]
        else:
            logs = log_probabilities([0.0, score], "logits")
        label = (1 - options["label_smoothing"]) * label + options["label_smoothing"] / 2
        weight = options["pos_weight"]
        positive = 1.0 if weight is None else float(broadcast(weight, self.shape).reshape(-1)[place])
        loss = added(lambda: reference.target_loss(logs, [1 - label, label * positive]))
        return loss, max(1.0, positive) * (1 + sum(abs(q) for q in logs if math.isfinite(q)))


def judge_model(entry: Quantity, options: dict[str, Any], preds: Any, target: Any) -> Model:
    """Put predictions and labels side by side, or refuse them for their types and shapes."""
    need(is_dense(preds) and preds.dtype in FLOATS and is_dense(target) and not target.is_complex())
    flat = entry.binary or options["input"] == "losses"
    dtypes = preds.dtype, target.dtype
    if flat:
        need(preds.shape == target.shape)
        need(entry.binary or is_integral(target))
        if options["pos_weight"] is not None:
            broadcast(options["pos_weight"], target.shape)
        rows, labels = preds.reshape(-1).tolist(), target.reshape(-1).tolist()
        return Model(entry, options, target.shape, rows, labels, dtypes)
    need(target.dtype != torch.bool and -preds.dim() <= options["class_dim"] < preds.dim())
    preds = preds.movedim(options["class_dim"], -1)
    shape, num_classes = preds.shape[:-1], preds.shape[-1]
    need(num_classes > 0 and options.get("num_classes", num_classes) == num_classes)
    need(options["class_weight"] is None or len(options["class_weight"]) == num_classes)
    need(not options["shift"] or len(shape) > 0)
    smoothing_over_all(options, num_classes)
    soft = target.is_floating_point()
    if soft:
        need(target.dim() == preds.dim() and entry.soft and options["token_bytes"] is None)
        target = target.movedim(options["class_dim"], -1)
    need(target.shape == (preds.shape if soft else shape))
    if options["shift"]:
        preds, target = preds[..., :-1, :], target[..., 1:, :] if soft else target[..., 1:]
    labels = target.reshape(-1, num_classes).tolist() if soft else target.reshape(-1).tolist()
    return Model(entry, options, shape, preds.reshape(-1, num_classes).tolist(), labels, dtypes)


def smoothing_over_all(options: dict[str, Any], num_classes: int) -> float:
    """Convert smoothing over the other classes, or refuse it."""
    share = options["label_smoothing"]
    if options["label_smoothing_over"] == "all" or not share:
        return float(share)
    need(share <= (num_classes - 1) / num_classes)
    return min(1.0, share * num_classes / (num_classes - 1))


def log_probabilities(row: Sequence[float], form: str, eps: float | None = None) -> list[float]:
    """Ask the judge for logarithms; a NaN is one, and poisons a row only where the row is normalised."""
    if form == "logits" and any(x == math.inf or math.isnan(x) for x in row):
        return [math.nan] * len(row)
    if form == "probs":
        return [x if math.isnan(x) else reference.log_probabilities([x], form, eps)[0] for x in row]
    return reference.log_probabilities(row, form, eps)


def added(total: Callable[[], float]) -> float:
    """Sum as IEEE addition would, where `math.fsum` raises."""
    try:
        return total()
    except ValueError:
        return math.nan  # Of infinities of both signs.
    except OverflowError:
        return math.inf


class Value(NamedTuple):
    """A number that is expected, and by how much it may be off."""

    number: float
    tolerance: float = 0.0

    def map(self, change: Callable[[float], float], slope: float = 1.0) -> Value:
        """Change the number by a function, and the tolerance by its slope."""
        return Value(change(self.number), self.tolerance * slope)

    def agrees(self, x: float) -> bool:
        """Say whether a number is the one expected."""
        if self.tolerance == math.inf:
            return True
        if math.isnan(self.number) or math.isinf(self.number):
            return x == self.number or (math.isnan(x) and math.isnan(self.number))
        return abs(x - self.number) <= self.tolerance + 1e-9 * abs(self.number) + 1e-300


def mean_of(targets: list[Scored], policy: str, entropies: bool = False) -> Value:
    """Average the losses of targets, or their entropies, with what the mean may be off."""
    if policy == "omit":
        targets = [one for one in targets if math.isfinite(one.target.loss)]
    each = [one.target._replace(loss=one.entropy) if entropies else one.target for one in targets]
    mean = added(lambda: reference.cross_entropy([each]))
    weight = math.fsum(t.weight * t.norm for t in each)
    if not weight:
        return Value(mean)
    rounding = len(each) * 2.0**-62 / weight
    if rounding > 1e-3:
        raise AmbiguityError
    off = math.fsum(one.target.weight * one.tolerance for one in targets) / weight
    size = math.fsum(abs(t.weight * t.loss) for t in each if math.isfinite(t.loss)) / weight
    return Value(mean, off + rounding + (rounding + 1e-6) * size)


def read(name: str, options: dict[str, Any], parts: list[Judged]) -> dict[str, Value]:
    """Work out what an entry point returns for all of the batches together, or refuse to."""
    targets = [one for part in parts for one in part.targets()]
    policy = options["nan_policy"]
    if policy == "raise" and not all(math.isfinite(one.target.loss) for one in targets):
        raise RefusalError
    mean = mean_of(targets, policy)
    in_unit = (lambda value: value.map(reference.bits, 1.5)) if options["unit"] == "bits" else lambda value: value
    if name in ("cross_entropy", "binary_cross_entropy"):
        return {"": in_unit(mean)}
    if name == "bits_per_token":
        return {"": mean.map(reference.bits, 1.5)}
    if name == "perplexity":
        return {"": perplexity(mean)}
    if name == "grouped_cross_entropy":
        groups = [[one for one in targets if one.key == group] for group in range(options["num_groups"])]
        return {str(group): in_unit(mean_of(members, policy)) for group, members in enumerate(groups)}
    if name == "bits_per_byte":
        return {"": mean.map(reference.bits, 1.5) if options["token_bytes"] is not None else per_byte(parts, policy)}
    if name == "normalized_cross_entropy":
        return {"": normalized(targets, mean, options)}
    if name == "cross_entropy_decomposition":
        entropy = mean_of(targets, policy, entropies=True)
        difference = Value(mean.number - entropy.number, mean.tolerance + entropy.tolerance + 1e-12)
        return {"cross_entropy": mean, "entropy": entropy, "kl_divergence": difference}
    if name == "cross_entropy_difference":
        return {"difference": mean, "perplexity_ratio": perplexity(mean), "difference_stderr": stderr(parts, policy)}
    assert name in ("report", "tally"), f"nobody judges {name}: say here what it reads"
    table = {}
    if options["token_bytes"] is not None:
        spoken = [one for one in targets if one.num_bytes]
        spoken = [one._replace(target=one.target._replace(norm=float(one.num_bytes))) for one in spoken]
        table = {"bits_per_byte": mean_of(spoken, policy).map(reference.bits, 1.5)}
    return {
        **table,
        "cross_entropy": mean,
        "bits_per_token": mean.map(reference.bits, 1.5),
        "perplexity": perplexity(mean),
        "cross_entropy_stderr": stderr(parts, policy),
        "num_tokens": Value(len(targets)),
        "num_ignored": Value(sum(part.ignored for part in parts)),
        "num_nonfinite": Value(sum(not math.isfinite(one.target.loss) for one in targets)),
    }


def perplexity(mean: Value) -> Value:
    """Exponentiate; far from 1, a small error of the mean is a large one."""
    value = reference.perplexity(mean.number)
    if math.isfinite(mean.number) and (abs(mean.number) > 600 or mean.tolerance > 0.1):
        return Value(value, math.inf)
    return Value(value, 2 * value * mean.tolerance if math.isfinite(value) else 0.0)


def per_byte(parts: list[Judged], policy: str) -> Value:
    """Divide all bits by all the bytes that were given, with targets or without."""
    targets = [one for part in parts for one in part.targets()]
    num_bytes = sum(part.num_bytes for part in parts)
    if not all(math.isfinite(one.target.loss) for one in targets):
        if not num_bytes:
            raise AmbiguityError  # An infinity over nothing.
        return Value(reference.bits(mean_of(targets, policy).number))
    if not targets:
        return Value(math.nan)
    total = math.fsum(one.target.weight * one.target.loss for one in targets)
    off = math.fsum(one.target.weight * one.tolerance + 2.0**-62 for one in targets)
    return Value(reference.bits_per_byte(total, num_bytes), 2 * off / num_bytes if num_bytes else 0.0)


def normalized(targets: list[Scored], mean: Value, options: dict[str, Any]) -> Value:
    """Divide by the entropy of the frequencies of the classes that were scored."""
    if options["nan_policy"] == "omit":
        targets = [one for one in targets if math.isfinite(one.target.loss)]
    seen = [math.fsum(one.target.weight for one in targets if one.key == k) for k in range(options["num_classes"])]
    if max(seen, default=0) > 1e9 * min([x for x in seen if x], default=1):
        raise AmbiguityError  # An entropy of next to nothing.
    base = reference.entropy([x / math.fsum(seen) for x in seen]) if any(seen) else 0.0
    if not base:
        if any(not math.isfinite(one.target.loss) for one in targets):
            raise AmbiguityError  # An infinity over nothing.
        return Value(math.nan)
    return Value(mean.number / base, mean.tolerance / base + 1e-6 * abs(mean.number / base))


def stderr(parts: list[Judged], policy: str) -> Value:
    """Work out the standard error, where losses and weights are such that it can be told."""
    sequences = [[one.target for one in sequence] for part in parts for sequence in part.sequences]
    tame = [t for t in (t for sequence in sequences for t in sequence) if math.isfinite(t.loss)]
    if not all(abs(t.loss) < 1e4 and (t.norm == 0 or 1e-3 < t.weight * t.norm < 1e4) for t in tame):
        return Value(0.0, math.inf)
    off = max([one.tolerance for part in parts for one in part.targets()], default=0.0)
    value = reference.stderr(sequences, policy)
    return Value(value, 1e-5 * value + 1e3 * off + 1e-4)


def flat(value: Any) -> dict[str, float]:
    """Name every number of a value."""
    if isinstance(value, Tally):
        report = CrossEntropyReport()
        report.add(value)
        value = report.compute()
    if isinstance(value, dict):
        return {name: x.item() for name, x in value.items()}
    return {"": value.item()} if value.dim() == 0 else {str(i): x for i, x in enumerate(value.tolist())}
