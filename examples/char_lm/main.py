"""Train a character language model, then print what it has learnt and how to see the curves.

python examples/char_lm/main.py fit --config configs/char_lm.yaml
"""

import math
import os
import sys
import time
from pathlib import Path

import torch
from data import CharData
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from model import CharModel
from torch import Tensor

from xent_metrics import BitsPerToken
from xent_metrics.lightning import CrossEntropyMonitor


class CharCLI(LightningCLI):
    """The Lightning command line, which prints a table after training."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs neither to the model, nor to the data, nor to the trainer."""
        parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch.")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Set the number of threads before anything is computed."""
        threads = self.config[self.subcommand].threads
        if threads < 1:
            raise ValueError(f"`threads` must be at least 1, got {threads}; 1 is fastest for a model this small.")
        torch.set_num_threads(threads)

    def before_fit(self) -> None:
        """Log a validation of the untrained model: it must read ln(vocab_size), which checks all that logs."""
        for callback in self.trainer.callbacks:
            if isinstance(callback, CrossEntropyMonitor):
                callback.decode = self.datamodule.decode  # For the text that is coloured by what each character cost.
        self.trainer.validate(self.model, self.datamodule, verbose=False)
        self.untrained = dict(self.trainer.callback_metrics)
        self.started = time.perf_counter()

    def after_fit(self) -> None:
        """Print what was learnt; the model's figures are those of the last validation, as they were logged."""
        seconds = time.perf_counter() - self.started
        parts = (
            describe(self.datamodule, self.model, self.trainer, seconds),
            table(self.datamodule, self.untrained, self.trainer.callback_metrics),
            sample(self.datamodule, self.model),
            tensorboard_command(self.trainer),
        )
        print("", *parts, sep="\n\n")


def describe(data: CharData, model: CharModel, trainer: Trainer, seconds: float) -> str:
    """Return what the figures are figures of."""
    corpus = data.corpus
    num_train, num_validation = (sum(map(len, documents)) for documents in (corpus.train, corpus.validation))
    limit = trainer.limit_val_batches
    scored = "each scored once" if limit == 1.0 else f"of which a validation scores limit_val_batches={limit}"
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join(
        (
            f"Text      {corpus.source}, sha256 {corpus.sha256}",
            f"Training  {num_train:,} characters",
            f"Held out  {corpus.split}: {num_validation:,} characters, {scored}, rows of up to {data.window}",
            f"Model     {num_parameters:,} parameters, {trainer.global_step:,} steps in {seconds:.0f} s",
            f"Threads   {torch.get_num_threads()}",
        )
    )


def table(data: CharData, untrained: dict[str, Tensor], trained: dict[str, Tensor]) -> str:
    """Return the model's bits per character and perplexity below what they are to be compared with."""
    train, validation = (data.encode("".join(text)) for text in (data.corpus.train, data.corpus.validation))
    counts = torch.bincount(train, minlength=data.vocab_size)
    baselines = (
        (f"uniform over the {data.vocab_size} characters", math.log2(data.vocab_size)),
        ("unigram entropy of the training text", unigram_bits(counts, train)),
        # One is added, since the held-out text may have a character that the training text has not.
        ("held-out text: training unigram, add one", unigram_bits(counts + 1, validation)),
    )
    lines = [f"{'':<42}{'bits/char':>10}  {'95 % interval':^18}{'perplexity':>11}"]
    lines += [f"{name:<42}{bits:>10.4f}{'':20}{2**bits:>11.4f}" for name, bits in baselines]
    for name, values in (("untrained model", untrained), ("trained model", trained)):
        if "val/bits_per_token" not in values:
            continue  # Training was cut short of its first validation.
        bits, perplexity = values["val/bits_per_token"], values["val/perplexity"]
        bounds = [values.get(f"val/cross_entropy_{end}", math.nan) / math.log(2) for end in ("lower", "upper")]
        interval = "{:.4f} .. {:.4f}".format(*bounds)
        lines.append(f"{f'held-out text: {name}':<42}{bits:>10.4f}  {interval:^18}{perplexity:>11.4f}")
    return "\n".join(lines)


def unigram_bits(counts: Tensor, text: Tensor) -> float:
    """Return the bits per character of a text under frequencies that are in proportion to `counts`."""
    metric = BitsPerToken()
    metric.update(counts.log().expand(len(text), -1), text)  # Logits need not be normalised.
    return metric.compute().item()


def sample(data: CharData, model: CharModel, num_characters: int = 500, seed: int = 0) -> str:
    """Return text drawn from the model, from what stands before a document; the same for the same model and seed."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, length = (8, data.window) if data.corpus.by_line else (1, num_characters)
    start = data.encode("\n").expand(num_rows, -1)
    texts = [data.decode(row.tolist()) for row in model.cpu().eval().generate(start, length, data.window, generator)]
    if data.corpus.by_line:
        texts = [text.partition("\n")[0] for text in texts]
    return "\n".join((f"Drawn from the model (seed {seed}):", *texts))


def tensorboard_command(trainer: Trainer) -> str:
    """Return the command that shows the curves."""
    if not isinstance(trainer.logger, TensorBoardLogger):
        return "The curves: not in TensorBoard, as the trainer has no TensorBoardLogger"
    beside_python = Path(sys.executable).with_name("tensorboard")
    command = os.path.relpath(beside_python) if beside_python.exists() else "tensorboard"
    # Without smoothing: every value is of many targets already, and a smoothed validation is late.
    return (
        f"The curves: {command} --logdir {os.path.relpath(trainer.logger.save_dir)}\n"
        "then open   http://localhost:6006/#custom_scalars&_smoothingWeight=0"
    )


def main() -> None:
    """Run the command line."""
    CharCLI(CharModel, CharData, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
