"""Draws the pictures of the site: what `metric.plot()` shows of each metric, and what TensorBoard shows of a run.

python -m tests.site_pictures                                     # plots only
python -m tests.site_pictures --run runs/char_lm/topics/version_0    # and a run, such as the demo's; needs Chromium
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

import xent_metrics as xm
from tests.browser import open_tensorboard, serve, start_chromium

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
NUM_TOKENS, NUM_STEPS, HELD_OUT = 8, 15, 24
TOKEN_BYTES = torch.tensor([1, 1, 2, 2, 3, 3, 4, 5])


def text(num: int, seed: int) -> Tensor:
    """Draw sequences of a Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    transitions = (2.0 * torch.randn(NUM_TOKENS, NUM_TOKENS, generator=torch.Generator().manual_seed(0))).softmax(-1)
    tokens = [torch.randint(NUM_TOKENS, (num, 1), generator=generator)]
    for _ in range(24):
        tokens.append(torch.multinomial(transitions[tokens[-1][:, 0]], 1, generator=generator))
    return torch.cat(tokens, 1)


def learn() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a held-out batch of logits and targets, as the model has it after each step."""
    torch.manual_seed(1)
    train, held_out = text(64, seed=1), text(HELD_OUT, seed=2)
    model = torch.nn.Embedding(NUM_TOKENS, NUM_TOKENS)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(NUM_STEPS):
        yield model(held_out[:, :-1]).detach(), held_out[:, 1:]
        loss = F.cross_entropy(model(train[:, :-1]).mT, train[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def arguments(metric: Metric, logits: Tensor, target: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return what an update of a metric is given of a batch."""
    if isinstance(metric, xm.BinaryCrossEntropy):  # Whether the next token is of the second half.
        halves = logits.unflatten(-1, (2, -1)).logsumexp(-1)
        return (halves[..., 1] - halves[..., 0], (target >= NUM_TOKENS // 2).long()), {}
    if isinstance(metric, xm.CrossEntropyDifference):
        return (torch.zeros_like(logits), logits, target), {}
    if isinstance(metric, xm.GroupedCrossEntropy):
        return (logits, target), {"group": torch.arange(len(target))[:, None] % 3}
    return (logits, target), {}


METRICS = {
    "binary_cross_entropy": xm.BinaryCrossEntropy(),
    "bits_per_byte": xm.BitsPerByte(token_bytes=TOKEN_BYTES),
    "bits_per_token": xm.BitsPerToken(),
    "cross_entropy": xm.CrossEntropy(),
    "cross_entropy_decomposition": xm.CrossEntropyDecomposition(label_smoothing=0.1),
    "cross_entropy_difference": xm.CrossEntropyDifference(),
    "cross_entropy_report": xm.CrossEntropyReport(),
    "grouped_cross_entropy": xm.GroupedCrossEntropy(3),
    "normalized_cross_entropy": xm.NormalizedCrossEntropy(NUM_TOKENS),
    "perplexity": xm.Perplexity(),
}


def plot_metrics() -> None:
    """Plot what each metric reads after each step of a small model."""
    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "xent-metrics", "svg.fonttype": "none", "font.family": "sans-serif"})
    values: dict[str, list[Tensor]] = {name: [] for name in METRICS}
    for logits, target in learn():
        for name, metric in METRICS.items():
            args, named = arguments(metric, logits, target)
            values[name].append(metric(*args, **named))
            metric.reset()
    for name, metric in METRICS.items():
        named = {"group_names": ["web", "code", "books"]} if isinstance(metric, xm.GroupedCrossEntropy) else {}
        figure = metric.plot(values[name], **named)[0]
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


def show_run(run: Path) -> None:
    """Keep the last pictures of a run, its page of text and its hyperparameters."""
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    for tag in events.Tags()["images"]:
        name = FOLDER.parent / "surprisal" if tag == "val/surprisal" else FOLDER / tag.replace("/", "_")
        name.with_suffix(".png").write_bytes(events.Images(tag)[-1].encoded_image_string)
    with serve(run.parent) as url, start_chromium() as chromium, open_tensorboard(chromium, url) as dashboard:
        dashboard.text()
        dashboard.page.locator("table:has(> thead)").first.screenshot(path=FOLDER / "summary.png")
        dashboard.hparams()
        dashboard.screenshot(FOLDER / "hparams.png", full=False)


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a folder with event files")
    run = parser.parse_args().run
    FOLDER.mkdir(exist_ok=True)
    plot_metrics()
    if run:
        show_run(run)


if __name__ == "__main__":
    main()
