"""Loops with Lightning Fabric, such as litgpt's, log `exp` of the mean of the batch means of the first process.
A batch of few tokens then counts as much as one of many, and what the other processes have does not count at all.

python examples/fabric_loop.py
torchrun --nproc-per-node 2 examples/fabric_loop.py
"""

import os

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn, optim
from torch.nn import functional as F

from xent_metrics import Perplexity

NUM_TOKENS, ACCUMULATE = 16, 2


def make_batches(num: int, rank: int = 0, num_ranks: int = 1) -> list[Tensor]:
    """Draw the share of one process: rows of tokens that count up now and then, padded with -100."""
    noise, hard = torch.rand((2, num, 4, 33), generator=torch.Generator().manual_seed(num))
    tokens = (noise < hard[:, :1, :1] / 2).long().cumsum(-1) % NUM_TOKENS  # Hard batches are short.
    return list(tokens.masked_fill(torch.arange(33) > 33 - 32 * hard[:, :1, :1], -100)[rank::num_ranks])


def run(fabric: Fabric, model: nn.Module, batches: list[Tensor], optimizer: optim.Optimizer | None) -> list[float]:
    """Validate, or train if there is an optimizer; return the perplexity of all tokens, and the usual one."""
    metric, losses = Perplexity().to(fabric.device), []
    for i, tokens in enumerate(batches, start=1):
        target, is_accumulating = tokens[:, 1:], i % ACCUMULATE != 0
        with torch.set_grad_enabled(optimizer is not None), fabric.no_backward_sync(model, enabled=is_accumulating):
            logits = model(tokens[:, :-1].clamp(min=0))
            loss = F.cross_entropy(logits.mT, target)
            if optimizer:
                fabric.backward(loss / ACCUMULATE)
        metric.update(logits.detach(), target)
        losses.append(loss.detach())
        if optimizer and not is_accumulating:
            optimizer.step()
            optimizer.zero_grad()
    return [metric.compute().item(), torch.stack(losses).mean().exp().item()]  # `compute` on every process.


def main() -> None:
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy="ddp" if num_ranks > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    module = nn.Sequential(nn.Embedding(NUM_TOKENS, 32), nn.Linear(32, NUM_TOKENS))
    model, optimizer = fabric.setup(module, optim.AdamW(module.parameters(), lr=1e-2))
    for name, num, step in (("train", 40, optimizer), ("val", 14, None)):
        right, usual = run(fabric, model, make_batches(num, fabric.global_rank, num_ranks), step)
        fabric.print(f"{name}/perplexity: {right:.4f}; exp(mean of batch means): {usual:.4f}")
    fabric.barrier()  # A process that ends right after a collective may abort.


if __name__ == "__main__":
    main()
