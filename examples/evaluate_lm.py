"""Bits per byte, perplexity and accuracy of a causal language model on text files, and whether another one is better.

python examples/evaluate_lm.py --model FOLDER texts/*.txt
python examples/evaluate_lm.py --model FOLDER --compare FOLDER news.jsonl code.jsonl
torchrun --nproc-per-node 2 examples/evaluate_lm.py --model FOLDER news.jsonl code.jsonl

It needs transformers and tqdm beside the library; `evaluate` takes any model whose outputs have `logits`. A text file
is one document. A file that ends in .jsonl has one on each line, {"text": ...}. An interval is one over documents, so
there is none for a single one.

Bytes are those of the text and no sums of tokens, so models with different tokenizers can be compared. Ranks share the
documents, and the windows of one are a batch of their own: with as many threads a rank, any number of them prints the
same.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric
from tqdm import tqdm

from xent_metrics import CrossEntropy, CrossEntropyDifference, CrossEntropyReport, TokenWindows, compute_together
from xent_metrics.functional import per_target_losses

ALL = "all files"
HEAD = ("bits/byte", "95 % interval", "perplexity", "accuracy", "tokens", "documents")


class LanguageModel(NamedTuple):
    """A model, and how it reads text.

    Attributes:
        forward: Of token ids `[rows, positions]`; what it returns has `logits` `[rows, positions, tokens]`.
        encode: The token ids of a text, without special tokens.
        prefix: The token that stands before a text, so that the first token is scored too.
        device: Where the model is.
    """

    forward: Callable[[Tensor], Any]
    encode: Callable[[str], Sequence[int]]
    prefix: int
    device: str = "cpu"


class Document(NamedTuple):
    """A text and the file that it is from."""

    file: str
    text: str


def read_documents(files: Sequence[str]) -> list[Document]:
    """Return the documents of all files that are not empty."""
    documents = []
    for file in files:
        text = Path(file).read_text(encoding="utf-8")
        is_jsonl = file.endswith(".jsonl")
        texts = [json.loads(line)["text"] for line in text.split("\n") if line.strip()] if is_jsonl else [text]
        documents += [Document(file, text) for text in texts if text]
    return documents


@torch.no_grad()
def score(model: LanguageModel, text: str, context: int, stride: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return for each token of a text its loss in nats, and whether it is the most likely one."""
    windows = TokenWindows([model.encode(text)], context=context, stride=stride, prefix=model.prefix)
    losses, hits = [], []
    for inputs, targets, _ in DataLoader(windows, batch_size, collate_fn=windows.collate):
        logits = model.forward(inputs.to(model.device)).logits
        is_scored = targets != -100
        # The logits of a whole document may not fit into memory, so a batch leaves two numbers for each token.
        logits, target = logits[is_scored.to(model.device)], targets[is_scored].to(model.device)
        losses.append(per_target_losses(logits, target).cpu())
        hits.append((logits.argmax(-1) == target).double().cpu())
    return torch.cat(losses), torch.cat(hits)


class Row:
    """The metrics of a set of documents. Each document is one sequence of them."""

    def __init__(self) -> None:
        self.metrics = {
            "per_byte": CrossEntropyReport(input="losses"),  # One target a document: its nats per byte, for each byte.
            "per_token": CrossEntropyReport(input="losses"),
            "accuracy": CrossEntropy(input="losses"),  # The mean of any numbers.
        }

    def update(self, losses: Tensor, hits: Tensor, num_bytes: int) -> None:
        """Add a document."""
        update_per_byte(self.metrics["per_byte"], num_bytes, losses)
        target = torch.zeros(1, len(losses), dtype=torch.int64)  # Any class: the losses are there already.
        self.metrics["per_token"].update(losses[None], target)
        self.metrics["accuracy"].update(hits[None], target)


def update_per_byte(metric: Metric, num_bytes: int, *losses: Tensor) -> None:
    """Add the nats per byte of a document, of one model or of two, which count as often as it has bytes."""
    values = [(x.sum() / num_bytes)[None] for x in losses]
    weight = torch.tensor([num_bytes], dtype=torch.float64)
    metric.update(*values, torch.zeros(1, dtype=torch.int64), weight=weight)


class Evaluation(NamedTuple):
    """What the documents of all ranks read.

    Attributes:
        rows: Of each model, by the name of a file or `ALL`, what the metrics of a `Row` read.
        difference: What the second model needs more than the first, in nats per byte; NaN of one model.
    """

    rows: list[dict[str, dict[str, Any]]]
    difference: dict[str, Tensor]


def evaluate(
    models: Sequence[LanguageModel], documents: Sequence[Document], context: int, stride: int, batch_size: int = 4
) -> Evaluation:
    """Evaluate one model, or two on the same documents; each rank scores its share of these."""
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = (*dict.fromkeys(document.file for document in documents), ALL)
    rows = [{name: Row() for name in names} for _ in models]
    difference = CrossEntropyDifference(input="losses")
    # Dealt out from the longest to the shortest, so that ranks have about as much to do.
    own = sorted(documents, key=lambda document: len(document.text), reverse=True)[rank::num_ranks]
    with tqdm(total=sum(len(document.text) for document in own), unit="char", disable=rank > 0) as progress:
        for document in own:
            num_bytes = len(document.text.encode())
            scored = [score(model, document.text, context, stride, batch_size) for model in models]
            for row, (losses, hits) in zip(rows, scored, strict=True):
                row[document.file].update(losses, hits, num_bytes)
                row[ALL].update(losses, hits, num_bytes)
            if len(models) == 2:
                update_per_byte(difference, num_bytes, *(losses for losses, _ in scored))
            progress.update(len(document.text))
    metrics = {
        f"{i} {name} {key}": metric
        for i, row in enumerate(rows)
        for name in names
        for key, metric in row[name].metrics.items()
    }
    values = compute_together({**metrics, "difference": difference})  # One collective.
    read = [{n: {key: values[f"{i} {n} {key}"] for key in row[n].metrics} for n in names} for i, row in enumerate(rows)]
    return Evaluation(read, values["difference"])


def table(names: Sequence[str], evaluation: Evaluation) -> str:
    """Return what was found, one line for each model and file."""
    lines = [line("", *HEAD)]
    for model, rows in zip(names, evaluation.rows, strict=True):
        lines += ["", f"{model}:"]
        columns = []
        for file, values in rows.items():
            by_byte, by_token = values["per_byte"], values["per_token"]
            mean, lower, upper = (bits(by_byte[f"cross_entropy{end}"]) for end in ("", "_lower", "_upper"))
            accuracy = float(values["accuracy"])
            cells = f"{mean:.4f}", f"{lower:.4f} .. {upper:.4f}", f"{by_token['perplexity']:.3f}", f"{accuracy:.4f}"
            lines.append(line(file, *cells, f"{by_token['num_tokens']:,}", f"{by_byte['num_tokens']:,}"))
            columns.append((mean, accuracy))
        mean, accuracy = (fmean(column) for column in zip(*columns[:-1], strict=True))
        lines.append(line("macro: mean of files", f"{mean:.4f}", "", "", f"{accuracy:.4f}", "", ""))
    if len(names) == 2:
        num_documents = int(evaluation.rows[0][ALL]["per_byte"]["num_tokens"])
        lines += ["", verdict(*names, evaluation.difference, num_documents)]
    return "\n".join(lines)


def line(name: str, *cells: str) -> str:
    """Return a line of the table."""
    widths = (9, 16, 10, 8, 8, 9)
    return "  ".join((f"{name:<32}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))).rstrip()


def verdict(first: str, second: str, difference: dict[str, Tensor], num_documents: int) -> str:
    """Return in words whether the second model is better, and how sure that is."""
    value, lower, upper = (bits(difference[f"difference{end}"]) for end in ("", "_lower", "_upper"))
    if lower > 0:
        found = f"{second} is worse than {first} by {value:.4f}"
    elif upper < 0:
        found, lower, upper = f"{second} is better than {first} by {-value:.4f}", -upper, -lower
    else:  # Also where there is no interval.
        found = f"{second} and {first} cannot be told apart: {value:+.4f}"
    return f"{found} bits per byte, 95 % interval {lower:.4f} .. {upper:.4f}, {num_documents:,} documents"


def bits(nats: Tensor) -> float:
    """Return nats in bits."""
    return float(nats) / math.log(2)


def load(folder: str, gguf: str | None, dtype: str, prefix: int | None) -> LanguageModel:
    """Return the model and the tokenizer of a local folder, on this rank's GPU if there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  # `evaluate` works without it.

    files = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **files)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=getattr(torch, dtype), **files)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    own = (prefix, tokenizer.bos_token_id, tokenizer.eos_token_id)
    first = next((token for token in own if token is not None), None)
    if first is None:
        raise ValueError(f"`prefix` must be a token id, as the tokenizer of {folder!r} has neither a BOS nor an EOS.")
    return LanguageModel(
        forward=model.to(device).eval(),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False),
        prefix=first,
        device=device,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate what the command line names, and print the table on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", help="files in UTF-8; of a .jsonl file each line is a document")
    parser.add_argument("--model", required=True, help="a folder of transformers with a model and its tokenizer")
    parser.add_argument("--compare", help="the folder of a second model")
    parser.add_argument("--gguf", help="the name of a GGUF file in the folders")
    parser.add_argument("--context", type=int, default=1024, help="tokens that go into the model at most")
    parser.add_argument("--stride", type=int, default=512, help="tokens that a window scores; fewer cost more time")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of one document at a time")
    parser.add_argument("--prefix", type=int, help="the token before each text; by default BOS, or else EOS")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    args = parser.parse_args(arguments)
    documents = read_documents(args.texts)
    if not documents:
        parser.error("texts must hold at least one document, got empty files")
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not is_alone:
        dist.init_process_group("gloo")  # What ranks exchange are a few integers, on the host.
    try:
        folders = [folder for folder in (args.model, args.compare) if folder]
        models = [load(folder, args.gguf, args.dtype, args.prefix) for folder in folders]
        evaluation = evaluate(models, documents, args.context, args.stride, args.batch_size)
        if is_alone or dist.get_rank() == 0:
            print(f"context {args.context}, stride {args.stride}, {args.dtype}", table(folders, evaluation), sep="\n\n")
        if not is_alone:
            dist.barrier()  # A rank that ends right after a collective may abort.
    finally:
        if not is_alone:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
