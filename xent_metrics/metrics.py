"""The torchmetrics classes: a tally that grows with every update, and a reading of it.

All of them hold one state, a single int64 tensor, and add to it. They differ in what they tally and what they read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  # The examples need it.
from torch import Tensor

from xent_metrics._validate import (
    as_token_table,
    check_class_weight,
    check_distributions,
    check_num_classes,
    check_omitted_bytes,
    check_pos_weight,
    on_host,
)
from xent_metrics.batch import (
    decomposed,
    tally_binary,
    tally_by_class,
    tally_decomposition,
    tally_difference,
    tally_grouped,
    tally_per_byte,
)
from xent_metrics.losses.linear import LinearLogits
from xent_metrics.losses.options import Backend, BinaryInput, BinaryOptions, Input, LossOptions, SmoothingOver
from xent_metrics.readings import (
    DIFFERENCE,
    DeviceReading,
    ExactReading,
    GroupReading,
    NanPolicy,
    Unit,
    check_unit,
    decomposition,
)
from xent_metrics.tally.tally import GroupTally, Tally
from xent_metrics.tally_metric import LossMetric, TallyMetric

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CrossEntropy(LossMetric):
    """Cross-entropy of a model's distribution and the targets, over all the data at once.

    `H = sum(weight * loss) / sum(weight)` with `loss = -log q[target]`, the value of `F.cross_entropy` on all
    batches of all ranks concatenated. The mean of batch means, which loops usually log, is another number as soon as
    batches differ in their number of targets.

    Sums are exact integers, so the value is the same to the last bit for any batch size, order or number of
    ranks, given the same losses.

    Args:
        input: What `preds` holds: `"logits"`, `"log_probs"`, `"probs"` (not renormalised), or `"losses"`: per-target
            losses in nats of target's shape, which a training step has anyway; `target` then gives mask and sequences.
        class_dim: The dimension of `preds` that counts classes; 1 for PyTorch's `(N, C, ...)`.
        class_weight: A weight for each class, as `weight` in `F.cross_entropy`: the denominator is the sum of
            `class_weight[target] * weight` for class indices, of `weight` for soft targets.
        label_smoothing: `a` in the target `(1 - a) * onehot + a / K`, as in `F.cross_entropy`.
        label_smoothing_over: `"all"` for that; `"others"` for the convention that leaves `1 - b` on the true class and
            gives every other one `b / (K - 1)`: with `label_smoothing=0.1` and three classes, `[0.9, 0.05, 0.05]`. It
            is `"all"` with `a = b * K / (K - 1)`; see `xent_metrics.functional.convert_label_smoothing`.
        ignore_index: The class index that is not scored; None scores all. Does not apply to soft targets.
        eps: Clip probabilities to `[eps, 1 - eps]`; None clips nothing, and a probability of 0 is an infinite loss.
        shift: Let position t of `preds` score target t + 1, for logits and labels as Hugging Face models have them. The
            time is the last dimension of `target` (not counting classes).
        unit: `"nats"`, or `"bits"`, which divides by ln 2.
        nan_policy: What infinite and NaN losses do: `"propagate"` as in IEEE addition, `"omit"` leaves them (and
            their weights) out, `"raise"` lets `compute` raise. Losses of `2**94` nats or more count as infinite.
        backend: `"eager"` makes the losses of a few rows at a time, in one small buffer. `"compile"` compiles that with
            `torch.compile` when it is first needed: some seconds for each dtype, number of classes and set of options,
            whatever the batch sizes (and again in another mode of PyTorch, such as autocast). Its losses agree with the
            others' to a relative 1e-6 and have the same bits in any batch. What it gains is in `docs/benchmarks.md`.
            `"auto"` never compiles: it is `"eager"`, but for a function that you compile, of which it becomes a part
            that the compiler can fuse. Metrics of different backends have different states.
        **kwargs: torchmetrics' own, such as `process_group` and `sync_on_compute`. Only ranks that hold different
            targets are to be added up: pass the data-parallel group where others hold the same targets.

    Shapes:
        `preds`: `(..., K)` for `class_dim=-1`; `target`: `(...)`, or `(..., K)` for soft targets; `weight`:
        broadcastable to `(...)`. In soft targets `0 * log 0` is 0, where `F.cross_entropy` gives NaN.

        Logits may be a DTensor that is sharded over the classes, as `ColwiseParallel(use_local_output=False)` gives, or
        `DTensor.from_local(part, tensor_mesh, [Shard(-1)])`, with `shape=` and `stride=` of the whole if the last part
        is smaller. They are never gathered: an update exchanges the largest logit of each row, and then three numbers
        of each. Losses then agree with those of whole rows to 1e-6.

    Returns:
        A float64 scalar (float32 where the device has no float64), in `unit`. NaN without targets.

    Raises:
        ValueError: If an argument is not one of those named; in the first update, if `backend="compile"` finds no
            compiler; see `update` and `compute` for the rest.

    Source:
        Shannon, A Mathematical Theory of Communication, 1948; Goodfellow et al., Deep Learning, section 3.13.

    >>> metric = CrossEntropy()
    >>> metric.update(torch.tensor([[2.0, 1.0, 0.1]]), torch.tensor([0]))
    >>> metric.compute()  # log(e**2 + e**1 + e**0.1) - 2
    tensor(0.4170, dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        label_smoothing_over: SmoothingOver = "all",
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        unit: Unit = "nats",
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_unit(unit)
        check_class_weight(on_host(class_weight), input)
        options = LossOptions(
            input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, shift, backend
        )
        super().__init__(options, nan_policy, tensors={"class_weight": class_weight}, **kwargs)
        self.unit = unit

    def _read(self, reading: ExactReading | DeviceReading) -> Tensor:
        return self._as_tensor(reading.cross_entropy if self.unit == "nats" else reading.bits_per_token)


class BitsPerToken(LossMetric):
    """Cross-entropy in bits: nats over ln 2, the bits that a code built on the model spends on a token.

    Of the model's distribution, hence without label smoothing and class weights. The arguments that there are, shapes
    and errors are those of `CrossEntropy`; NaN without targets.

    Source:
        Shannon, A Mathematical Theory of Communication, 1948, section 9.

    >>> metric = BitsPerToken()
    >>> metric.update(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    >>> metric.compute()  # log2(8): uniform over 8
    tensor(3.0000, dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend), nan_policy, **kwargs
        )

    def _read(self, reading: ExactReading | DeviceReading) -> Tensor:
        return self._as_tensor(reading.bits_per_token)


class Perplexity(LossMetric):
    """Exponential of the cross-entropy in nats: the number of equally likely tokens that would be as surprising.

    `exp(H in nats) = 2 ** (H in bits)`, of the pooled cross-entropy, never a mean of perplexities. Of the model's
    distribution, hence without label smoothing and class weights. Arguments, shapes and errors are those of
    `CrossEntropy`; NaN without targets, `inf` only where the value exceeds the largest float64.

    Source:
        Jelinek et al., Perplexity: a measure of the difficulty of speech recognition tasks, 1977.

    >>> metric = Perplexity()
    >>> metric.update(torch.zeros(4, 8), torch.tensor([0, 1, 2, 3]))
    >>> metric.compute()  # uniform over 8
    tensor(8.0000, dtype=torch.float64)
    """

    plot_lower_bound = 1.0

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend), nan_policy, **kwargs
        )

    def _read(self, reading: ExactReading | DeviceReading) -> Tensor:
        return self._as_tensor(reading.perplexity)


class CrossEntropyReport(LossMetric):
    """Every reading of one tally: nats, bits and perplexity with their uncertainty, and the counts behind them.

    One pass, one state and one synchronisation, where a collection of metrics needs one of each.

    The interval is that of a sample of sequences (rows of `target`; of targets, where it has one dimension): tokens
    of one text are not independent, and an interval that pretends they are is too narrow. With C sequences of
    positive weight, loss S_c and weight W_c, `m = S / W` and `se^2 = C / (C - 1) * sum((S_c - m * W_c)^2) / W^2`
    (the ratio estimator; Cochran, Sampling Techniques, section 2.11), and a normal quantile.

    Args:
        token_bytes: Bytes of each token, as in `BitsPerByte`; adds `bits_per_byte` to the values.
        confidence: Probability that the interval covers the mean over all sequences that might have been drawn.
        sequence_group: The ranks that hold other targets of the same sequences, as with context or sequence
            parallelism; all of them update with the same number of sequences, and each update is one small collective.
            Without it, the part of a sequence that is on one rank counts as a sequence, and the interval is too narrow.

    The other arguments, shapes and errors mean what they do in `CrossEntropy`.

    Returns:
        A dict of scalar tensors: `cross_entropy` (nats), `bits_per_token`, `perplexity`, `cross_entropy_stderr`,
        `cross_entropy_lower`, `cross_entropy_upper`, `perplexity_lower`, `perplexity_upper`; and as int64 `num_tokens`
        (scored, those of non-finite loss included), `num_ignored`, `num_nonfinite`; with `token_bytes` also
        `bits_per_byte`. Without targets the floats are NaN and the counts 0. The interval is NaN for fewer than two
        sequences, where the cross-entropy is not finite, where weights are too small to square (below some 1e-9 on
        average), and where a sequence sums to `2**26` nats or weight.

    >>> metric = CrossEntropyReport()
    >>> metric.update(torch.zeros(2, 3, 8), torch.tensor([[0, 1, 2], [3, 4, -100]]))
    >>> {name: round(value.item(), 4) for name, value in metric.compute().items() if "lower" not in name}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'cross_entropy': 2.0794, 'bits_per_token': 3.0, 'perplexity': 8.0, 'cross_entropy_stderr': 0.0,
     'cross_entropy_upper': 2.0794, 'perplexity_upper': 8.0, 'num_tokens': 5, 'num_ignored': 1, 'num_nonfinite': 0}
    """

    _NAMES = (
        "cross_entropy",
        "bits_per_token",
        "perplexity",
        "cross_entropy_stderr",
        "cross_entropy_lower",
        "cross_entropy_upper",
        "perplexity_lower",
        "perplexity_upper",
        "num_tokens",
        "num_ignored",
        "num_nonfinite",
    )

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        token_bytes: Tensor | None = None,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        confidence: float = 0.95,
        sequence_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend)
        zero = Tally.zero(num_tallies=None if token_bytes is None else 2)
        tensors = (
            {} if token_bytes is None else {"token_bytes": as_token_table(on_host(token_bytes)).to(token_bytes.device)}
        )
        super().__init__(options, nan_policy, confidence, zero, tensors, sequence_group, **kwargs)

    def _read(
        self, reading: ExactReading | DeviceReading, per_byte: ExactReading | DeviceReading | None = None
    ) -> dict[str, Tensor]:
        values = {name: getattr(reading, name) for name in self._NAMES}
        if per_byte is not None:
            values["bits_per_byte"] = per_byte.bits_per_token
        return self._as_tensors(values)


class BitsPerByte(TallyMetric):
    """Total bits over the total UTF-8 bytes that the tokens stand for: comparable between tokenizers.

    `sum(weight * loss) / ln 2 / sum(weight * bytes)`, loss in nats. A model whose tokens are longer spends more bits on
    each of them; per byte of text the two can be compared.

    The bytes come from one of two sources: a table of the bytes of each token, given once, or the bytes of the text,
    given with every batch. A token of zero bytes (a special token, which stands for no text) is left out of both sums
    with the table; without it, `ignore_index` or `weight` has to leave it out.

    Args:
        token_bytes: Integers, one for each token id; `xent_metrics.token_byte_lengths(tokenizer)` builds them from the
            raw bytes of the tokens. Ids beyond its end are as wrong as ids beyond the classes. None, if `num_bytes`
            comes with every batch.

    The other arguments, shapes and errors mean what they do in `CrossEntropy`; `nan_policy="omit"` needs the table,
    since of a target that is left out the bytes are to be left out too.

    Returns:
        A float64 scalar. NaN without targets, and without bytes.

    Source:
        Graves, Generating sequences with recurrent neural networks, 2013; Gao et al., The Pile, 2020, section 3.1.

    >>> metric = BitsPerByte(token_bytes=torch.tensor([0, 1, 1, 1, 1, 2, 2, 2]))
    >>> metric.update(torch.zeros(4, 8), torch.tensor([0, 1, 5, 6]))
    >>> metric.compute()  # the special token 0 left out: 9 bits for 5 bytes
    tensor(1.8000, dtype=torch.float64)
    """

    _TARGETS = "class indices in [0, number of classes), for which `token_bytes` has an entry"
    _WEIGHTS = "`weight` (or `num_bytes`)"
    _UPDATE = "tally_per_byte"

    def __init__(
        self,
        *,
        token_bytes: Tensor | None = None,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        table = None if token_bytes is None else _table(token_bytes)
        options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend)
        super().__init__(options, nan_policy, tensors={"token_bytes": table}, **kwargs)

    def update(
        self,
        preds: Tensor | LinearLogits,
        target: Tensor,
        num_bytes: int | Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        """Add a batch; see `CrossEntropy.update`.

        Args:
            preds: Scores with classes on `class_dim`.
            target: Token ids.
            num_bytes: The bytes of the text that the scored targets stand for, of the whole batch (an integer) or of
                its parts (a tensor, which is summed). Exactly if there is no `token_bytes`.
            weight: Weights, or a mask; with `num_bytes` those of the targets only.

        Raises:
            TypeError: If a dtype is not one of those named, or targets are soft where a table is to be looked up.
            ValueError: As `CrossEntropy.update`; and if there is both a table and `num_bytes`, or neither, or
                `num_bytes` is negative. The state is then as it was.
        """
        self._add_batch(preds, target, num_bytes, weight)

    def _tally_batch(
        self,
        preds: Tensor | LinearLogits,
        target: Tensor,
        num_bytes: int | Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tally:
        assert isinstance(self.options, LossOptions)
        check_omitted_bytes(self.nan_policy, num_bytes)
        return tally_per_byte(preds, target, num_bytes, weight, self.options, self.token_bytes)  # type: ignore[arg-type]

    def _read(self, reading: ExactReading | DeviceReading) -> Tensor:
        return self._as_tensor(reading.bits_per_token)


class BinaryCrossEntropy(TallyMetric):
    """Binary cross-entropy (log loss) over all the data at once, of one label or of many.

    `sum(weight * loss) / sum(weight)` with `loss = -(pos_weight * y * log p + (1 - y) * log(1 - p))`: the value of
    `F.binary_cross_entropy_with_logits` on all batches of all ranks concatenated, and of `F.binary_cross_entropy` for
    probabilities. Unlike the latter, which takes no logarithm below -100, it is infinite where a probability of 0 or 1
    was wrong, unless `eps` asks for clipping.

    Args:
        input: What `preds` holds: `"logits"`, or `"probs"`, the probabilities of 1.
        pos_weight: Weight of the positive term, broadcastable to `target`: one, or one for each label (column).
        label_smoothing: `a` in the target `(1 - a) * y + a / 2`.
        ignore_index: The target that is not scored, such as -1; None scores all.
        eps: Clip probabilities to `[eps, 1 - eps]`, as the textbook form does; None clips nothing.
        unit: `"nats"`, or `"bits"`, which divides by ln 2.
        nan_policy: As in `CrossEntropy`.
        backend: As in `CrossEntropy`.
        **kwargs: torchmetrics' own.

    Shapes:
        `preds` and `target`: any one shape, `(N,)` or `(N, labels)`; `weight`: broadcastable to it.

    Returns:
        A float64 scalar (float32 where the device has no float64), in `unit`. NaN without targets.

    Raises:
        ValueError: If an argument is not one of those named; see `update` and `compute` for the rest.

    Source:
        Good, Rational decisions, 1952; Bishop, Pattern Recognition and Machine Learning, 2006, equation 4.90.

    >>> metric = BinaryCrossEntropy(input="probs")
    >>> metric.update(torch.tensor([0.1, 0.9, 0.2]), torch.tensor([1, 0, 1]))
    >>> metric.compute()  # -(log(0.1) + log(0.1) + log(0.2)) / 3
    tensor(2.0715, dtype=torch.float64)
    """

    _TARGETS = "0 and 1, or soft labels between them"
    _UPDATE = "tally_binary"

    def __init__(
        self,
        *,
        input: BinaryInput = "logits",
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        eps: float | None = None,
        unit: Unit = "nats",
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_unit(unit)
        check_pos_weight(on_host(pos_weight))
        options = BinaryOptions(input, label_smoothing, ignore_index, eps, backend)
        super().__init__(options, nan_policy, tensors={"pos_weight": pos_weight}, **kwargs)
        self.unit = unit

    def update(self, preds: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: Logits or probabilities: float16, bfloat16, float32 or float64.
            target: 0 and 1 of any dtype, or soft labels between them; of `preds`' shape.
            weight: Weights that are not negative, or a boolean mask, broadcastable to `target`.

        Raises:
            TypeError: If a dtype is not one of those named.
            ValueError: If shapes or devices do not fit; on the CPU also if a target or a probability is outside [0, 1],
                or a weight is invalid (elsewhere `compute` raises). The state is then as it was.
        """
        self._add_batch(preds, target, weight)

    def _tally_batch(self, preds: Tensor, target: Tensor, weight: Tensor | None = None) -> Tally:
        assert isinstance(self.options, BinaryOptions)
        return tally_binary(preds, target, weight, self.options, self.pos_weight)  # type: ignore[arg-type]

    def _read(self, reading: ExactReading | DeviceReading) -> Tensor:
        return self._as_tensor(reading.cross_entropy if self.unit == "nats" else reading.bits_per_token)


class CrossEntropyDecomposition(LossMetric):
    """What of a cross-entropy is the targets' own entropy, and what is the model's divergence from them.

    `H(P, Q) = H(P) + KL(P || Q)`, each a mean over targets in nats: P is a soft target, or a smoothed class index, and
    Q the model's distribution. No model gets below `entropy`; `kl_divergence` is what it could still gain, the value
    of `torch.nn.KLDivLoss(reduction="batchmean")` on all the data at once. It is the difference of the exact means, so
    the equation holds to the last bits, and for a model equal to P it is 0 up to rounding of the losses (some 1e-7
    nats for float32, of either sign).

    The arguments, shapes and errors mean what they do in `CrossEntropy`, except that `input="losses"` is refused. For
    class indices without smoothing the entropy is 0. `nan_policy="omit"` leaves the same targets out of all three.

    Returns:
        A dict of float64 scalars: `cross_entropy`, `entropy`, `kl_divergence`. NaN without targets.

    Source:
        Kullback and Leibler, On information and sufficiency, 1951; Cover and Thomas, Elements of Information Theory,
        section 2.3.

    >>> metric = CrossEntropyDecomposition()
    >>> metric.update(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]))
    >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}  # log 2, and log(4 / 3) / 2
    {'cross_entropy': 0.837, 'entropy': 0.6931, 'kl_divergence': 0.1438}
    """

    _UPDATE = "tally_decomposition"

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        label_smoothing: float = 0.0,
        label_smoothing_over: SmoothingOver = "all",
        ignore_index: int | None = -100,
        eps: float | None = None,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_distributions(input)
        options = LossOptions(
            input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, backend=backend
        )
        super().__init__(options, nan_policy, zero=Tally.zero(num_tallies=3), **kwargs)

    def _tally_batch(self, preds: Tensor | LinearLogits, target: Tensor, weight: Tensor | None = None) -> Tally:
        assert isinstance(self.options, LossOptions)
        return tally_decomposition(preds, target, weight, self.options)

    def _parts(self, tally: Tally) -> tuple[Tally, Tally]:
        return decomposed(tally, self.nan_policy)

    def _read(self, total: Any, entropy: Any) -> dict[str, Tensor]:
        values = decomposition(total, entropy)
        return self._as_tensors({n: x if isinstance(x, Tensor) else float(x) for n, x in values.items()})


class GroupedCrossEntropy(TallyMetric):
    """Cross-entropy of each of many groups of targets, in one pass whatever their number.

    Each value is that of `CrossEntropy` on the targets of the group. Recipes, with classes on the last dimension:

    - by dataset or domain: `update(preds, target, dataset_of_sequence[:, None])`;
    - by class: `num_groups` is the number of classes, `update(preds, target, group=target)`;
    - by position: `num_groups` is the longest sequence T, `update(preds, target, group=torch.arange(T))`.

    With `shift=True` groups are those of the labels, the first of which is not scored.

    Args:
        num_groups: How many groups there are. The state is 18 int64 numbers for each, also what ranks exchange.

    The other arguments, shapes and errors mean what they do in `CrossEntropy`. `nan_policy` holds for each group by
    itself (`"raise"` for all).

    Returns:
        A float64 tensor of shape `(num_groups,)`, in `unit`; NaN for groups without targets.

    Source:
        That of `CrossEntropy`; by position, Khandelwal et al., Sharp nearby, fuzzy far away, 2018.

    >>> metric = GroupedCrossEntropy(num_groups=3)
    >>> preds = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    >>> metric.update(preds, target=torch.tensor([0, 1, 1]), group=torch.tensor([0, 2, 2]))
    >>> metric.compute()  # log 2; none; the mean of log(1 + e**-2) and log(1 + e**2)
    tensor([0.6931,    nan, 1.1269], dtype=torch.float64)
    """

    _UPDATE = "tally_grouped"

    def __init__(
        self,
        num_groups: int,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        label_smoothing_over: SmoothingOver = "all",
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        unit: Unit = "nats",
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_unit(unit)
        check_num_classes("num_groups", num_groups)
        check_class_weight(on_host(class_weight), input)
        options = LossOptions(
            input, class_dim, label_smoothing, ignore_index, eps, label_smoothing_over, shift, backend
        )
        zero, tensors = GroupTally.zero(num_groups), {"class_weight": class_weight}
        super().__init__(options, nan_policy, zero=zero, tensors=tensors, **kwargs)
        self.num_groups = num_groups
        self.unit = unit

    def update(self, preds: Tensor | LinearLogits, target: Tensor, group: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch; see `CrossEntropy.update`.

        Args:
            preds: Scores with classes on `class_dim`.
            target: Class indices, or soft targets.
            group: Integers in `[0, num_groups)`, broadcastable to `target` (without classes). Those of targets that are
                not scored may be anything.
            weight: Weights, or a mask.

        Raises:
            TypeError: If `group` does not hold integers.
            ValueError: If it does not fit; on the CPU also if a scored target has none of the groups (elsewhere
                `compute` raises). The state is then as it was.
        """
        self._add_batch(preds, target, group, weight)

    def _wrap_compute(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        squeezed = super()._wrap_compute(compute)  # torchmetrics makes a scalar of the value of a single group.

        @wraps(compute)
        def vector() -> Tensor:
            value: Tensor = squeezed()
            return value.view(-1)

        return vector

    def _tally_batch(
        self, preds: Tensor | LinearLogits, target: Tensor, group: Tensor, weight: Tensor | None = None
    ) -> GroupTally:
        assert isinstance(self.options, LossOptions)
        return tally_grouped(preds, target, group, weight, self.options, self.class_weight, self.num_groups)  # type: ignore[arg-type]

    def _read(self, reading: GroupReading | DeviceReading) -> Tensor:
        return self._as_tensor(reading.cross_entropy if self.unit == "nats" else reading.bits_per_token)


class NormalizedCrossEntropy(LossMetric):
    """Cross-entropy over the entropy of the class frequencies seen: 1.0 is no better than knowing the base rate.

    `H / -sum_k f[k] log f[k]`, f being the share of class k in the targets that were scored, by weight. Below 1 a
    model knows more than how frequent the classes are. It makes problems of different base rates comparable, as
    click-through rates are.

    A binary model's logits x come as two columns, `torch.stack([torch.zeros_like(x), x], -1)`.

    Args:
        num_classes: How many classes there are.

    The other arguments, shapes and errors mean what they do in `CrossEntropy`; soft targets are refused.

    Returns:
        A float64 scalar. NaN without targets, and where only one class was seen: its entropy is 0.

    Source:
        He et al., Practical lessons from predicting clicks on ads at Facebook, 2014, section 3.

    >>> metric = NormalizedCrossEntropy(num_classes=2)
    >>> metric.update(torch.tensor([[0.75, 0.25]]).log().expand(4, -1), torch.tensor([0, 0, 0, 1]))
    >>> metric.compute()  # the model is the base rate
    tensor(1.0000, dtype=torch.float64)
    """

    _UPDATE = "tally_by_class"

    def __init__(
        self,
        num_classes: int,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        **kwargs: Any,
    ) -> None:
        check_num_classes("num_classes", num_classes, 2)
        options = LossOptions(input, class_dim, 0.0, ignore_index, eps, backend=backend)
        super().__init__(options, nan_policy, zero=GroupTally.zero(num_classes), **kwargs)
        self.num_classes = num_classes

    def _tally_batch(self, preds: Tensor | LinearLogits, target: Tensor, weight: Tensor | None = None) -> Any:
        assert isinstance(self.options, LossOptions)
        return tally_by_class(preds, target, weight, self.options, self.num_classes)

    def _read(self, reading: GroupReading | DeviceReading) -> Tensor:
        return self._as_tensor(reading.normalized_cross_entropy)


class CrossEntropyDifference(TallyMetric):
    """Whether model b is better than model a on the same targets, and how sure one can be.

    `difference = H(b) - H(a)` in nats per target: negative where b is better. Its standard error is that of the paired
    differences, clustered by sequence as in `CrossEntropyReport`; what is hard for both models cancels, so it is far
    smaller than those of the two cross-entropies. An interval that does not hold 0 says that one of them is better.
    `perplexity_ratio = exp(difference)` is the perplexity of b over that of a.

    Args:
        confidence: Probability that the intervals cover the difference over all sequences that might have been drawn.
        sequence_group: As in `CrossEntropyReport`.

    The other arguments, shapes and errors mean what they do in `CrossEntropy`. Where both losses are infinite their
    difference is NaN.

    Returns:
        A dict of float64 scalars: `difference`, `difference_stderr`, `difference_lower`, `difference_upper`,
        `perplexity_ratio`, `perplexity_ratio_lower`, `perplexity_ratio_upper`. NaN without targets; the interval also
        for fewer than two sequences.

    Source:
        Cochran, Sampling Techniques, 3rd ed., sections 2.11 and 6.5.

    >>> metric = CrossEntropyDifference()
    >>> metric.update(torch.zeros(4, 8), torch.eye(8)[:4].log(), torch.arange(4))  # uniform against certain and right
    >>> values = metric.compute()
    >>> values["difference"], values["perplexity_ratio"]  # -log(8), and 1 / 8
    (tensor(-2.0794, dtype=torch.float64), tensor(0.1250, dtype=torch.float64))
    """

    plot_lower_bound = None
    _UPDATE = "tally_difference"

    def __init__(
        self,
        *,
        input: Input = "logits",
        class_dim: int = -1,
        ignore_index: int | None = -100,
        eps: float | None = None,
        shift: bool = False,
        nan_policy: NanPolicy = "propagate",
        backend: Backend = "auto",
        confidence: float = 0.95,
        sequence_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        options = LossOptions(input, class_dim, 0.0, ignore_index, eps, shift=shift, backend=backend)
        super().__init__(options, nan_policy, confidence, sequence_group=sequence_group, **kwargs)

    def update(
        self,
        preds_a: Tensor | LinearLogits,
        preds_b: Tensor | LinearLogits,
        target: Tensor,
        weight: Tensor | None = None,
    ) -> None:
        """Add a batch; see `CrossEntropy.update`.

        Args:
            preds_a: Scores of the model to compare with.
            preds_b: Scores of the model in question, of the same targets.
            target: Class indices, or soft targets.
            weight: Weights, or a mask.

        Raises:
            TypeError: As `CrossEntropy.update`, naming `preds_a` or `preds_b`.
            ValueError: The same. The state is then as it was.
        """
        self._add_batch(preds_a, preds_b, target, weight)

    def _tally_batch(
        self,
        preds_a: Tensor | LinearLogits,
        preds_b: Tensor | LinearLogits,
        target: Tensor,
        weight: Tensor | None = None,
    ) -> Tally:
        assert isinstance(self.options, LossOptions)
        return tally_difference(preds_a, preds_b, target, weight, self.options, self.sequence_group)

    def _look_at(  # type: ignore[override]  # Its arguments are those of `update`.
        self, preds_a: Tensor | LinearLogits, preds_b: Tensor | LinearLogits, *_: Any, **__: Any
    ) -> None:
        super()._look_at(preds_a)
        super()._look_at(preds_b)

    def _read(self, reading: ExactReading | DeviceReading) -> dict[str, Tensor]:
        return self._as_tensors({name: getattr(reading, attribute) for name, attribute in DIFFERENCE.items()})


def _table(token_bytes: Tensor) -> Tensor:
    """Return the bytes of tokens, checked, where they were."""
    return as_token_table(on_host(token_bytes)).to(token_bytes.device)
