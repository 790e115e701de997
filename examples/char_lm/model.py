"""A character language model of the GPT kind, small enough for a minute on one CPU core.

What differs from GPT-2 pays at this size and budget: rotary positions, RMSNorm without weights, squared ReLU, no
biases.
"""

import math

import torch
from data import IGNORE_INDEX
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each added to what comes in.

    Args:
        width: Numbers per position.
        num_heads: Attention heads that share the width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Return `[rows, positions, width]` for the same, and for the `turn` of each position."""
        x = x + self._attend(_norm(x), turn)
        hidden = F.relu(self.mlp_in(_norm(x)))
        return x + self.mlp_out(hidden * hidden)

    def _attend(self, x: Tensor, turn: Tensor) -> Tensor:
        # [rows, heads, positions, width / heads] each
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.attention_in(x).chunk(3, dim=-1)
        )
        query, key = _rotate(query, turn), _rotate(key, turn)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(attended.transpose(1, 2).flatten(2))


class CharModel(LightningModule):
    """A decoder-only transformer over characters.

    The steps return what `CrossEntropyMonitor` needs; it logs all likelihoods, so there is no `self.log` here.

    Args:
        vocab_size: How many characters there are.
        width: Numbers per position.
        num_layers: Blocks.
        num_heads: Attention heads in each block; the width of a head must be even.
        learning_rate: The highest learning rate of AdamW, for the matrices of the blocks.
        outer_learning_rate: The same for the embedding and the head, where a much higher one pays at this budget.
        weight_decay: How strongly AdamW draws every matrix to zero.
        warmup: Share of the training over which the learning rate rises from 0; over the rest it falls to 0.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 64,
        num_layers: int = 3,
        num_heads: int = 4,
        learning_rate: float = 4e-3,
        outer_learning_rate: float = 3.2e-2,
        weight_decay: float = 0.1,
        warmup: float = 0.02,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width < 1 or width % (2 * num_heads):
            raise ValueError(
                f"`width` must be a multiple of twice `num_heads`, got {width} and {num_heads}; 64 and 4 fit."
            )
        if not 0 <= warmup < 1:
            raise ValueError(f"`warmup` must be a share in [0, 1), got {warmup}; 0.02 is 2 % of the steps.")
        self.save_hyperparameters()
        self.head_width = width // num_heads
        self.learning_rate = learning_rate
        self.outer_learning_rate = outer_learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.head = nn.Linear(width, vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Start as a model that knows nothing: all logits are 0, so the cross-entropy is ln(vocab_size)."""
        for block in self.blocks:
            for matrix in (block.attention_in.weight, block.mlp_in.weight):
                nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
            nn.init.zeros_(block.attention_out.weight)
            nn.init.zeros_(block.mlp_out.weight)
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits `[rows, positions, vocab_size]` for character codes `[rows, positions]`."""
        turn = _turn(inputs.shape[1], self.head_width, inputs.device)
        x = _norm(self.embedding(inputs))
        for block in self.blocks:
            x = block(x, turn)
        return self.head(_norm(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the mean loss to train on, and the losses it is the mean of for `CrossEntropyMonitor`."""
        inputs, target = batch
        logits = self(inputs)
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        loss = losses.sum() / (target != IGNORE_INDEX).sum()
        # Detached: what a step returns is kept, and would keep the graph.
        return {"loss": loss, "losses": losses.detach().view_as(target), "target": target}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return logits and targets for `CrossEntropyMonitor`."""
        inputs, target = batch
        return {"logits": self(inputs), "target": target}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a learning rate that rises linearly and falls like a cosine, over all steps."""
        outer = [*self.embedding.parameters(), *self.head.parameters()]
        groups = [
            {"params": self.blocks.parameters(), "lr": self.learning_rate, "name": "blocks"},
            {"params": outer, "lr": self.outer_learning_rate, "name": "embedding_and_head"},
        ]
        # Nothing is exempt from the decay: every parameter is a matrix.
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=self.weight_decay)
        num_steps = int(self.trainer.estimated_stepping_batches)
        num_warmup = max(1, round(self.warmup * num_steps))

        def share(step: int) -> float:
            if step < num_warmup:
                return (step + 1) / num_warmup
            progress = (step - num_warmup) / max(1, num_steps - num_warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step"}}

    @torch.no_grad()
    def generate(self, start: Tensor, num_characters: int, window: int, generator: torch.Generator) -> Tensor:
        """Draw characters from the model, each from all the probabilities as they are.

        Args:
            start: Character codes `[rows, positions]` to continue.
            num_characters: How many to draw.
            window: How many characters to look back at; no more than in training.
            generator: The source of randomness, on the device of `start`.

        Returns:
            The characters drawn, `[rows, num_characters]`.
        """
        characters = start
        for _ in range(num_characters):
            probabilities = self(characters[:, -window:])[:, -1].softmax(dim=-1)
            drawn = torch.multinomial(probabilities, num_samples=1, generator=generator)
            characters = torch.cat((characters, drawn), dim=1)
        return characters[:, start.shape[1] :]


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _turn(num_positions: int, head_width: int, device: torch.device) -> Tensor:
    """Return by how much each pair of numbers is turned at each position: `[cosine and sine, positions, pairs]`."""
    # With a base of 100 the slowest pair turns once in 350 positions; the usual 10,000 is for windows of thousands.
    frequencies = 100.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)
    angles = torch.outer(torch.arange(num_positions, device=device), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the pairs of `x`: a query and a key then meet at an angle that tells how far apart they are."""
    cosine, sine = turn.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
