"""What a user writes: every public name, with the types that it promises. `make wheel` checks the types and runs it."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import MetricCollection

from xent_metrics import (
    BinaryCrossEntropy,
    BitsPerByte,
    BitsPerToken,
    CrossEntropy,
    CrossEntropyDecomposition,
    CrossEntropyDifference,
    CrossEntropyReport,
    GroupedCrossEntropy,
    GroupTally,
    LinearLogits,
    NormalizedCrossEntropy,
    Perplexity,
    Tally,
    TokenWindows,
    check_token_bytes,
    compute_together,
    continues_sequence,
    functional,
    num_unpadded_samples,
    sequence_ids,
    token_byte_lengths,
)
from xent_metrics.functional import (
    binary_cross_entropy,
    bits_per_byte,
    bits_per_token,
    convert_label_smoothing,
    cross_entropy,
    cross_entropy_decomposition,
    cross_entropy_difference,
    grouped_cross_entropy,
    normalized_cross_entropy,
    per_target_losses,
    perplexity,
    tally,
)
from xent_metrics.lightning import CrossEntropyMonitor
from xent_metrics.tensorboard import (  # TensorBoard's own layouts have no types.
    Dashboard,
    add_layout,  # pyright: ignore[reportUnknownVariableType]
    build_layout,  # pyright: ignore[reportUnknownVariableType]
    describe_tag,
    merge_layouts,  # pyright: ignore[reportUnknownVariableType]
    read_layout,  # pyright: ignore[reportUnknownVariableType]
)


class Model(LightningModule):
    """A bigram model, with a metric of its own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = torch.nn.Linear(8, num_classes)
        self.embedding = torch.nn.Embedding(num_classes, 8)
        self.perplexity = Perplexity()

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return losses that were made anyway."""
        logits: Tensor = self.head(self.embedding(batch[:, :-1]))
        losses = torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none")
        return {"loss": losses.mean(), "losses": losses, "target": batch[:, 1:]}

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """Return the hidden states and the head."""
        hidden: Tensor = self.embedding(batch[:, :-1])
        logits = LinearLogits(hidden, self.head.weight, self.head.bias)
        self.perplexity.update(logits, batch[:, 1:])
        self.log("own_perplexity", self.perplexity)
        return {"logits": logits, "target": batch[:, 1:]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def use_metrics(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Update and read every metric."""
    token_bytes = torch.ones(logits.shape[-1], dtype=torch.int64)
    report = CrossEntropyReport(accuracy=True, entropy=True, confidence=0.9)
    for metric in (
        report,
        CrossEntropy(label_smoothing=0.1, label_smoothing_over="others", unit="nats"),
        BitsPerToken(ignore_index=None),
        Perplexity(nan_policy="raise"),
        BitsPerByte(token_bytes=token_bytes),
        CrossEntropyDecomposition(),
        NormalizedCrossEntropy(logits.shape[-1]),
    ):
        metric.update(logits, target)
        metric(logits, target)
        metric.compute()
    by_group = GroupedCrossEntropy(num_groups=2, average="macro")
    by_group.update(logits, target, group=target % 2, weight=torch.ones(target.shape))
    difference = CrossEntropyDifference()
    difference.update(logits, logits.flip(0), target)
    binary = BinaryCrossEntropy(input="probs")
    binary.update(logits[..., 0].sigmoid(), target > 0)
    collection = MetricCollection({"a": CrossEntropy(), "b": Perplexity()})
    collection.update(logits, target)
    values: dict[str, Tensor] = report.compute()
    return {**values, **collection.compute(), **compute_together({"by_group": by_group, "binary": binary})}


def use_functions(logits: Tensor, target: Tensor) -> float:
    """Call every function."""
    num_classes = logits.shape[-1]
    parts: dict[str, Tensor] = cross_entropy_decomposition(logits, target)
    parts |= cross_entropy_difference(logits, logits.flip(0), target)
    values: list[Tensor] = [
        cross_entropy(logits, target, label_smoothing=convert_label_smoothing(0.1, num_classes)),
        bits_per_token(logits, target),
        perplexity(logits, target, backend="eager"),
        bits_per_byte(logits, target, num_bytes=target.numel()),
        normalized_cross_entropy(logits, target, num_classes=num_classes),
        grouped_cross_entropy(logits, target, group=target % 2, num_groups=2).sum(),
        binary_cross_entropy(logits[..., 0], target > 0),
        per_target_losses(logits, target).mean(),
        functional.cross_entropy(logits, target),
        *parts.values(),
    ]
    both: Tally = tally(logits, target) + Tally.zero()
    groups: GroupTally = GroupTally.zero(2)
    assert both.state.dtype == groups.state.dtype
    return float(torch.stack([value.double() for value in values]).sum())


def use_data() -> Tensor:
    """Cut texts into windows, number the documents of packed rows, and count bytes."""
    windows = TokenWindows([list(b"a text"), torch.arange(20)], context=8, stride=4)
    batch = next(iter(DataLoader(windows, batch_size=2, collate_fn=windows.collate)))
    sampler: DistributedSampler[Any] = DistributedSampler(windows, num_replicas=2, rank=1)
    assert num_unpadded_samples(sampler, 0, 1) == 1
    sequence = sequence_ids(torch.tensor([0, 3, 8]))
    assert not continues_sequence(sequence)[3]
    assert batch is not None
    return sequence


def count_bytes(tokenizer: Any) -> Tensor:
    """Return the bytes of the tokens of a tokenizer."""
    token_bytes = token_byte_lengths(tokenizer)
    check_token_bytes(tokenizer, ["a text"], token_bytes)
    return token_bytes


def use_dashboards(folder: str) -> str:
    """Write a layout to TensorBoard."""
    with SummaryWriter(folder) as writer:
        dashboard = Dashboard(writer, ["layout", "descriptions"], ["cross_entropy"])
        dashboard.describe_new_tags(["val/cross_entropy"], step=0)
        add_layout(writer, merge_layouts(build_layout()))  # pyright: ignore[reportUnknownArgumentType]
        dashboard.close()
    assert read_layout(folder) is not None
    return describe_tag("val/cross_entropy") or ""


def fit(folder: str) -> dict[str, Tensor]:
    """Fit a model for a few steps with the monitor."""
    monitor = CrossEntropyMonitor(num_classes=50, readings=["cross_entropy", "accuracy"], stages=["train", "val"])
    data: DataLoader[Tensor] = DataLoader(torch.randint(50, (16, 9)), batch_size=4)  # type: ignore[arg-type]
    trainer = Trainer(
        max_epochs=1, default_root_dir=folder, callbacks=[monitor], enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(Model(50), data, data)
    return dict(trainer.callback_metrics)


def main() -> None:
    """Use everything once."""
    logits, target = torch.randn(4, 6, 50), torch.randint(50, (4, 6))
    with tempfile.TemporaryDirectory() as folder:
        values = {**use_metrics(logits, target), **fit(folder)}
        assert use_functions(logits, target) > 0
        assert "val/cross_entropy" in values
        assert use_dashboards(folder)
    assert len(use_data()) == 8


if __name__ == "__main__":
    main()
