"""With class weights, the mean of batch means is not the loss of the data: it changes with the size of a batch.
`F.cross_entropy(..., weight=...)` divides by the weights of the targets in a batch, so that a batch with a rare class
counts no more than one without.

python examples/class_weights.py
torchrun --nproc-per-node 2 examples/class_weights.py
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from xent_metrics import CrossEntropy

CLASS_WEIGHT = torch.tensor([0.2, 1.0, 20.0])  # The last class is rare.


def make_batches(rank: int = 0, num_ranks: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Draw the share of one process: points, and their classes."""
    generator = torch.Generator().manual_seed(0)
    target = torch.multinomial(torch.tensor([0.8, 0.17, 0.03]), 403, replacement=True, generator=generator)
    points = F.one_hot(target, 8) + torch.randn(403, 8, generator=generator)
    return list(zip(points[rank::num_ranks].split(16), target[rank::num_ranks].split(16), strict=True))


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the loss of all the data, and the mean of the losses of batches and processes."""
    metric, losses = CrossEntropy(class_weight=CLASS_WEIGHT), []
    for points, target in batches:
        logits = model(points)
        metric.update(logits, target)
        losses.append(F.cross_entropy(logits, target, weight=CLASS_WEIGHT))
    mean = torch.stack(losses).mean()
    if dist.is_initialized():
        dist.all_reduce(mean.div_(dist.get_world_size()))
    return metric.compute().item(), mean.item()  # `compute`, on every process, adds up over all of them.


def main() -> None:
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    right, usual = evaluate(nn.Linear(8, 3), make_batches(rank, num_ranks))
    if rank == 0:
        print(f"weighted cross-entropy: {right:.4f} nats; mean of batch means: {usual:.4f}")
    if num_ranks > 1:
        dist.barrier()  # A process that ends right after a collective may abort.
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
