"""Several ranks: sums over them, samples that a sampler repeats, and logits whose classes are spread over them.

Everything is `torch.distributed`, looked up when it is called; without a process group nothing here communicates.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.utils.data.distributed import DistributedSampler

_FIRST = 512  # Numbers of the first collective of a sum: so few that their bytes cost nothing beside the latency.
_MARK_BYTES = 4  # Of a hash; sums over 2**31 ranks fit an int64.


def is_distributed() -> bool:
    """Return whether there are other ranks."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def place_among_ranks(group: ProcessGroup | None = None) -> list[int]:
    """Return the number of this rank in a group, or among all, and how many ranks there are."""
    if not is_distributed():
        return [0, 1]
    return [torch.distributed.get_rank(group), torch.distributed.get_world_size(group)]


def check_group_of_ranks(name: str, group: Any) -> None:
    """Raise unless a value is None or a group of ranks."""
    if group is not None and not (
        torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)
    ):
        raise TypeError(
            f"`{name}` must be a process group of torch.distributed or None, got {type(group).__name__} {group!r}; "
            "make it with torch.distributed.new_group, or take it from a device mesh."
        )


def holds_ranks(group: ProcessGroup | None, part: ProcessGroup) -> bool:
    """Return whether all ranks of a group are ranks of another; None is all ranks."""
    ranks_of: Any = torch.distributed.get_process_group_ranks
    return group is None or set(ranks_of(part)) <= set(ranks_of(group))


def sum_over_ranks(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return the sum of a tensor over the ranks of a group, or of all: one collective."""
    total = x.clone()
    torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.SUM, group=group)
    return total


def sum_alike_over_ranks(x: Tensor, about: str, group: ProcessGroup | None = None) -> Tensor:
    """Return the sum of a vector of int64 over ranks, all of which must say the same about it.

    One collective, of one size whatever the vector, so that vectors of different sizes do not meet; a second one for
    what does not fit. The host waits for the first.

    Args:
        x: The vector, of this rank.
        about: What it holds, in words that all ranks use; an error repeats them.
        group: The ranks; None for all.

    Raises:
        ValueError: On every rank, if they say different things, or have different numbers of numbers.
    """
    # Ranks with another mark would have to make up for it by chance: one in 2**32.
    mark = int.from_bytes(blake2b(f"{about} {len(x)}".encode(), digest_size=_MARK_BYTES).digest(), "big")
    first, head = x.new_zeros(_FIRST), x[: _FIRST - 1]
    first[0].fill_(mark)
    first[1 : 1 + len(head)] = head
    total = sum_over_ranks(first, group)
    if total[0].item() != mark * torch.distributed.get_world_size(group):
        raise ValueError(
            f"`compute` must add up the same on every rank, but other ranks do not have what this one has, {about}; "
            "configure metrics alike on all ranks, and compute them in the same order."
        )
    total = total[1 : 1 + len(head)]
    return total if len(head) == len(x) else torch.cat([total, sum_over_ranks(x[_FIRST - 1 :], group)])


def max_over_ranks(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return the largest of a tensor's values over the ranks of a group, or of all: one collective."""
    largest = x.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return largest


def num_unpadded_samples(sampler: DistributedSampler[Any], start: int, num_samples: int) -> int:
    """Count the samples of a batch that are not sampler padding.

    `DistributedSampler` draws some samples twice where their number is no multiple of the number of ranks, so that all
    ranks have equally many. What it repeats comes last on each rank, so the first samples of a batch are the ones to
    score, as many as this says:

        keep = num_unpadded_samples(loader.sampler, start=batch_idx * batch_size, num_samples=len(target))
        metric.update(logits[:keep], target[:keep])

    Args:
        sampler: The sampler of this rank's loader.
        start: How many samples this rank has drawn in this epoch before the batch.
        num_samples: How many samples the batch has.

    Returns:
        A number in `[0, num_samples]`.
    """
    if not all(hasattr(sampler, name) for name in ("rank", "num_replicas", "dataset")):
        raise TypeError(
            f"`sampler` must be a DistributedSampler, got {type(sampler).__name__}; no other repeats samples."
        )
    if start < 0 or num_samples < 0:
        raise ValueError(f"`start` and `num_samples` must not be negative, got {start} and {num_samples}.")
    # Sample i of rank r is entry `r + i * num_replicas` of the list of all samples followed by the repeated ones.
    own = range(sampler.rank, len(sampler.dataset), sampler.num_replicas)  # type: ignore[arg-type]
    return min(max(len(own) - start, 0), num_samples)


class VocabShard(NamedTuple):
    """Which of the classes are on this rank.

    Attributes:
        name: The argument that is sharded.
        offset: The first class.
        num_classes: How many there are on all ranks.
        group: The ranks that have the other classes.
        mismatch: Why these are not the classes that this rank should have; empty if they are.
    """

    name: str
    offset: int
    num_classes: int
    group: ProcessGroup
    mismatch: str


def is_dtensor(x: Any) -> bool:
    """Return whether a tensor is spread over ranks, without importing what would be needed to ask its class."""
    return type(x) is not Tensor and hasattr(x, "placements") and hasattr(x, "device_mesh")


def vocab_shard(name: str, x: Any, class_dim: int) -> tuple[Tensor, VocabShard | None]:
    """Return the part of a DTensor that is on this rank, and which classes these are; None if they are all.

    Raises:
        ValueError: If it is spread in any way but over the classes.
    """
    class_dim %= x.dim()
    part: Tensor = x.to_local()
    placements = [(dim, p) for dim, p in enumerate(x.placements) if not p.is_replicate()]
    if not placements:
        return part, None
    (mesh_dim, placement), *others = placements
    if others or not placement.is_shard(class_dim):
        raise ValueError(
            f"{name} must be a DTensor that is sharded over the classes only, on dimension {class_dim}, got "
            f"{x.placements}; build it with DTensor.from_local on the mesh of the tensor-parallel ranks."
        )
    num_classes, num_ranks = x.shape[class_dim], x.device_mesh.size(mesh_dim)
    size = -(-num_classes // num_ranks)
    offset = min(x.device_mesh.get_local_rank(mesh_dim) * size, num_classes)
    expected = min(size, num_classes - offset)
    mismatch = ""
    if part.shape[class_dim] != expected:  # Not raised here: the other ranks would wait for this one.
        mismatch = f", here {expected} of {num_classes} classes, got {part.shape[class_dim]}"
    return part, VocabShard(name, offset, num_classes, x.device_mesh.get_group(mesh_dim), mismatch)
