"""With FSDP2 and tensor parallelism, a mean of the ranks' mean losses counts a rank of few tokens as one of many.
A sum over all ranks counts a token once for each tensor-parallel rank that has it.

python examples/fsdp_tp_loop.py
torchrun --nproc-per-node 4 examples/fsdp_tp_loop.py
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, parallel

from xent_metrics import CrossEntropyReport


def make_batches(rank: int = 0, num_ranks: int = 1) -> list[Tensor]:
    """Draw the share of one data-parallel rank: rows of tokens that count up now and then, padded with -100."""
    noise, hard = torch.rand((2, 40, 4, 33), generator=torch.Generator().manual_seed(0))
    tokens = (noise < hard[:, :1, :1] / 2).long().cumsum(-1)
    return list(tokens.masked_fill(torch.arange(33) > 33 - 32 * hard[:, :1, :1], -100)[rank::num_ranks])


def train(mesh: dist.DeviceMesh) -> tuple[dict[str, Tensor], float]:
    """Train; return the readings of all tokens, and the mean of the mean losses of steps and data-parallel ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(36, 32), nn.Linear(32, 36))  # 33 tokens, and some for even shares.
    head = parallel.ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    fully_shard(parallel.parallelize_module(model, mesh["tp"], {"1": head}), mesh=mesh["dp"])
    optimizer, group = torch.optim.AdamW(model.parameters(), lr=1e-2), mesh["dp"].get_group()
    report, losses = CrossEntropyReport(process_group=group), []  # Ranks of other groups have the same tokens.
    for tokens in make_batches(dist.get_rank(group), dist.get_world_size(group)):
        target = tokens[:, 1:]
        with parallel.loss_parallel():
            logits = model(tokens[:, :-1].clamp(min=0))  # A DTensor: each tensor-parallel rank has some classes.
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report.update(logits.detach(), target)
        losses.append(loss.detach().to_local())
    dist.all_reduce(mean := torch.stack(losses).mean() / dist.get_world_size(group), group=group)
    return report.compute(), mean.item()


def main() -> None:
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group("gloo", store=None if num_ranks > 1 else dist.HashStore(), rank=rank, world_size=num_ranks)
    tp = 2 if num_ranks % 4 == 0 else 1
    right, usual = train(dist.init_device_mesh("cpu", (num_ranks // tp, tp), mesh_dim_names=("dp", "tp")))
    if rank == 0:
        print(f"cross-entropy: {right['cross_entropy']:.4f} nats; mean of rank means: {usual:.4f}")
    dist.barrier()  # A process that ends right after a collective may abort.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
