"""Train and evaluate without Lightning, on any number of processes.

torchrun --nproc-per-node 2 examples/custom_loop.py
tensorboard --logdir runs/custom_loop

It needs tensorboard beside the library (`pip install .[lightning]` brings it).

The text is drawn from a Markov chain, so its entropy is known: no model gets below it. Documents differ in length and
ranks in their number of documents, which is where a mean of batch means goes wrong. The training and validation lines
differ from one number of ranks to another: more ranks take more documents a step, and gradients are sums of floats,
which depend on their order. The last line does not differ: fixed weights score one document at a time, and what is
summed are integers.
"""

import argparse
import math
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from xent_metrics import CrossEntropyReport

NUM_TOKENS = 16
NUM_TRAIN, NUM_VALIDATION = 301, 43  # Documents; neither is a multiple of the number of ranks.
IGNORE_INDEX = -100
BATCH_SIZE, ACCUMULATE, LOG_EVERY = 4, 2, 10


def markov_chain() -> Tensor:
    """Return the probabilities of the next token after each token."""
    return (2.5 * torch.randn(NUM_TOKENS, NUM_TOKENS, generator=torch.Generator().manual_seed(0))).softmax(-1)


def entropy_rate(transitions: Tensor) -> float:
    """Return the bits per token that the best of all models would read."""
    frequencies = torch.linalg.matrix_power(transitions.double(), 1000)[0]
    return float(frequencies @ torch.special.entr(transitions.double()).sum(-1)) / math.log(2)


def make_documents(num: int, seed: int) -> list[Tensor]:
    """Draw documents of 5 to 60 tokens."""
    generator = torch.Generator().manual_seed(seed)
    transitions, documents = markov_chain(), []
    for length in torch.randint(5, 61, (num,), generator=generator).tolist():
        tokens = [int(torch.randint(NUM_TOKENS, (), generator=generator))]
        while len(tokens) < length:
            tokens.append(int(torch.multinomial(transitions[tokens[-1]], 1, generator=generator)))
        documents.append(torch.tensor(tokens))
    return documents


def batches(documents: list[Tensor], seed: int) -> Iterator[Tensor]:
    """Yield padded batches for ever, in a new order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        for start in range(0, len(order), BATCH_SIZE):
            rows = [documents[i] for i in order[start : start + BATCH_SIZE]]
            yield nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)


class Model(nn.Module):
    """Scores of the next token, from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 32)
        self.head = nn.Linear(32, NUM_TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[rows, positions, tokens]`; what stands behind the end of a document does not matter."""
        return self.head(self.embedding(tokens.clamp(min=0)).relu())


def train(model: nn.Module, documents: list[Tensor], steps: int, writer: SummaryWriter | None) -> CrossEntropyReport:
    """Train, and return the report of the last window."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    report = CrossEntropyReport(ignore_index=IGNORE_INDEX)
    source = batches(documents, seed=rank)
    for step in range(steps):
        micro_batches = [next(source) for _ in range(ACCUMULATE)]
        # The mean over the tokens of all ranks and micro-batches is one mean: none of them divides by its own.
        num_targets = sum((batch[:, 1:] != IGNORE_INDEX).sum() for batch in micro_batches)
        dist.all_reduce(num_targets)
        for i, batch in enumerate(micro_batches):
            parallel.require_backward_grad_sync = i == ACCUMULATE - 1
            target = batch[:, 1:]
            logits = parallel(batch[:, :-1])
            losses = F.cross_entropy(logits.mT, target, ignore_index=IGNORE_INDEX, reduction="none")
            (losses.sum() * num_ranks / num_targets).backward()  # DDP divides by the number of ranks.
            report.update(logits.detach(), target)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG_EVERY == 0:
            values = report.compute()  # On every rank: it is one collective.
            if writer:
                for name in ("cross_entropy", "bits_per_token", "perplexity"):
                    writer.add_scalar(f"train/{name}", values[name], step)
            if step + 1 < steps:
                report.reset()
    return report


@torch.no_grad()
def evaluate(model: nn.Module, documents: list[Tensor]) -> CrossEntropyReport:
    """Score documents one by one, so that the shape of a batch cannot change a logit."""
    report = CrossEntropyReport(ignore_index=IGNORE_INDEX)
    for document in documents:
        tokens = document[None]
        report.update(model(tokens[:, :-1]), tokens[:, 1:])
    return report


def main() -> None:
    """Train, evaluate, and print from the first rank what all of them found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps, a multiple of 10")
    parser.add_argument("--log-dir", help="a folder for TensorBoard; by default one for each number of ranks")
    parser.add_argument(
        "--rendezvous", default="env://", help="how ranks find each other; env:// is what torchrun sets"
    )
    args = parser.parse_args()
    if args.steps < LOG_EVERY or args.steps % LOG_EVERY:
        parser.error(f"--steps must be a multiple of {LOG_EVERY}, got {args.steps}")
    torch.set_num_threads(1)
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1 and args.rendezvous == "env://":  # Started with python, not torchrun.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo", init_method=args.rendezvous, rank=rank, world_size=num_ranks)
    try:
        run(rank, num_ranks, args.steps, args.log_dir or f"runs/custom_loop/{num_ranks}_ranks")
        # A rank that ends right after a collective may abort: gloo's thread still has to let go of its tensor.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(rank: int, num_ranks: int, steps: int, log_dir: str) -> None:
    """Do the work of one rank."""
    own_train = make_documents(NUM_TRAIN, seed=1)[rank::num_ranks]
    own_validation = make_documents(NUM_VALIDATION, seed=2)[rank::num_ranks]
    writer = SummaryWriter(log_dir) if rank == 0 else None
    torch.manual_seed(3)
    model = Model()

    window = train(model, own_train, steps, writer).compute()
    validation = evaluate(model, own_validation).compute()
    torch.manual_seed(4)
    fixed = evaluate(Model(), own_validation).compute()
    if writer:
        writer.add_scalar("val/bits_per_token", validation["bits_per_token"], steps - 1)
        writer.close()
        bounds = [validation[f"cross_entropy_{end}"] / math.log(2) for end in ("lower", "upper")]
        print(f"The text's own entropy: {entropy_rate(markov_chain()):.4f} bits per token")
        print(
            f"Training, last {LOG_EVERY} steps, number of ranks {num_ranks}: {window['bits_per_token']:.4f} bits per "
            f"token of {window['num_tokens']} (another number of ranks trains another model)"
        )
        print(
            f"Validation: {validation['bits_per_token']:.4f} bits per token, "
            f"95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}"
        )
        print(
            f"Evaluation of fixed weights: {fixed['bits_per_token']:.4f} bits per token of {fixed['num_tokens']}; the "
            f"same to the last digit on any number of ranks: {fixed['bits_per_token'].item().hex()}, standard error "
            f"{fixed['cross_entropy_stderr'].item().hex()} nats"
        )


if __name__ == "__main__":
    main()
