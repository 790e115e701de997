"""In the mean of a label's batch means, a sample counts the more, the more others of its batch are unknown (-1).
A batch of which none is known makes that mean NaN.

python examples/multi_label.py
torchrun --nproc-per-node 2 examples/multi_label.py
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from xent_metrics import BinaryCrossEntropy, GroupedCrossEntropy, compute_together

LABELS, UNKNOWN = ("cat", "dog", "night"), -1


def make_batches(rank: int = 0, num_ranks: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Draw the share of one process: points, and the labels of each (N, labels)."""
    points, noise = torch.randn((2, 203, 8), generator=torch.Generator().manual_seed(0))
    labels = (points[:, :3] > torch.linspace(0, 1, 203)[:, None]).long()
    labels[noise[:, :3] < torch.linspace(-2, 2, 203)[:, None]] = UNKNOWN
    return list(zip(points[rank::num_ranks].split(16), labels[rank::num_ranks].split(16), strict=True))


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of all labels, that of each label, and the means of means of batches and processes."""
    overall = BinaryCrossEntropy(ignore_index=UNKNOWN)
    by_label, means = GroupedCrossEntropy(len(LABELS), input="losses", ignore_index=UNKNOWN), []
    for points, labels in batches:
        logits = model(points)
        overall.update(logits, labels)
        losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")  # Anything if unknown.
        by_label.update(losses, labels, group=torch.arange(len(LABELS)))
        means.append(losses.where(labels != UNKNOWN, torch.nan).nanmean(0))
    mean = torch.stack(means).nanmean(0)
    if dist.is_initialized():
        dist.all_reduce(mean.div_(dist.get_world_size()))
    return *compute_together({"all": overall, "by_label": by_label}).values(), mean  # In one collective.


def main() -> None:
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    overall, by_label, usual = evaluate(nn.Linear(8, len(LABELS)), make_batches(rank, num_ranks))
    if rank == 0:
        print(f"binary cross-entropy: {overall:.4f} nats")
        print(*map("{}: {:.4f}; mean of batch means: {:.4f}".format, LABELS, by_label, usual), sep="\n")
    if num_ranks > 1:
        dist.barrier()  # A process that ends right after a collective may abort.
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
