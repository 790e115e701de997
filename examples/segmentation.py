"""In the mean of batch means, a labelled pixel counts the more, the more void pixels (255) there are in its batch.
A batch that is all void makes that mean NaN.

python examples/segmentation.py
torchrun --nproc-per-node 2 examples/segmentation.py
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from xent_metrics import CrossEntropyReport, GroupedCrossEntropy, compute_together

NUM_CLASSES, VOID = 4, 255


def make_batches(rank: int = 0, num_ranks: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Draw the share of one process: images (N, 3, H, W), and the classes of their pixels (N, H, W)."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(NUM_CLASSES, (21, 8, 8), generator=generator)
    images = torch.randn(21, 3, 8, 8, generator=generator) + target[:, None] * torch.arange(21).view(-1, 1, 1, 1) / 10
    target.masked_fill_(torch.arange(8)[:, None] < torch.arange(21).view(-1, 1, 1) // 3, VOID)  # At the top.
    return list(zip(images[rank::num_ranks].split(3), target[rank::num_ranks].split(3), strict=True))


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor, float]:
    """Return the readings of all pixels, the loss of each class, and the mean of means of batches and processes."""
    report = CrossEntropyReport(class_dim=1, ignore_index=VOID)  # Its interval is one over images.
    by_class, losses = GroupedCrossEntropy(NUM_CLASSES, class_dim=1, ignore_index=VOID), []
    for images, target in batches:
        logits = model(images)
        report.update(logits, target)
        by_class.update(logits, target, group=target)
        losses.append(F.cross_entropy(logits, target, ignore_index=VOID))
    mean = torch.stack(losses).mean()
    if dist.is_initialized():
        dist.all_reduce(mean.div_(dist.get_world_size()))
    return *compute_together({"all": report, "by_class": by_class}).values(), mean.item()  # In one collective.


def main() -> None:
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    right, by_class, usual = evaluate(nn.Conv2d(3, NUM_CLASSES, 3, padding=1), make_batches(rank, num_ranks))
    if rank == 0:
        print("cross-entropy: {cross_entropy:.4f} nats, standard error {cross_entropy_stderr:.4f}".format(**right))
        print(f"mean of batch means: {usual:.4f}; of each class:", *(f"{x:.4f}" for x in by_class))
    if num_ranks > 1:
        dist.barrier()  # A process that ends right after a collective may abort.
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
