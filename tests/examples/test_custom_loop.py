"""The example without Lightning: the same bits from 1, 2 and 4 processes, and curves that TensorBoard reads."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[2] / "examples" / "custom_loop.py"
spec = importlib.util.spec_from_file_location("custom_loop", SCRIPT)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def run_example(num_ranks: int, folder: Path) -> list[str]:
    """Start that many processes, as torchrun does, and return the lines that they print."""
    command = [sys.executable, SCRIPT, "--steps", "20", "--log-dir", folder / "logs"]
    processes = [
        subprocess.Popen(
            [*command, "--rendezvous", f"file://{folder / 'rendezvous'}"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * num_ranks, [stderr for _, stderr in results]
    assert [stdout for stdout, _ in results[1:]] == [""] * (num_ranks - 1)
    return results[0][0].splitlines()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_fixed_weights_read_the_same_bits_on_any_number_of_ranks(ranks: tuple[int, ...], tmp_path: Path) -> None:
    """The last line, in hexadecimal, is the same for any number of ranks, and what float64 says of all documents."""
    lines = {}
    for num_ranks in ranks:
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        lines[num_ranks] = run_example(num_ranks, folder)
        assert f"number of ranks {num_ranks}:" in lines[num_ranks][1]
    last = {printed[-1] for printed in lines.values()}
    assert len(last) == 1
    assert len({printed[1] for printed in lines.values()}) == len(ranks)

    torch.manual_seed(4)
    model = example.Model()
    documents = example.make_documents(example.NUM_VALIDATION, seed=2)
    with torch.no_grad():
        nats = [
            F.cross_entropy(model(doc[None, :-1])[0].double(), doc[1:], reduction="sum").item() for doc in documents
        ]
    num_tokens = sum(len(document) - 1 for document in documents)
    number, value = re.search(r"bits per token of (\d+); .* ranks: (\S+),", last.pop()).groups()
    assert int(number) == num_tokens
    assert float.fromhex(value) == pytest.approx(math.fsum(nats) / num_tokens / math.log(2), rel=1e-6)

    events = EventAccumulator(str(tmp_path / str(ranks[-1]) / "logs")).Reload()
    assert [event.step for event in events.Scalars("train/bits_per_token")] == [9, 19]
    (validation,) = events.Scalars("val/bits_per_token")
    assert f"Validation: {validation.value:.4f} bits per token" in lines[ranks[-1]][2]


def test_the_text_has_the_entropy_that_is_printed() -> None:
    """The entropy rate is that of the frequencies with which the chain draws, and below what a uniform text has."""
    tokens = torch.cat([document[:-1] for document in example.make_documents(2000, seed=5)])
    entropy = torch.special.entr(example.markov_chain().double()).sum(-1)
    assert example.entropy_rate(example.markov_chain()) == pytest.approx(
        entropy[tokens].mean().item() / math.log(2), abs=0.02
    )
    assert example.entropy_rate(example.markov_chain()) < math.log2(example.NUM_TOKENS)


def test_padding_and_order_of_batches() -> None:
    """Batches are padded to their longest document, and every document comes once before any comes again."""
    documents = example.make_documents(9, seed=1)
    source = example.batches(documents, seed=0)
    rows = [row for batch in (next(source) for _ in range(3)) for row in batch]
    assert sorted(row[row != example.IGNORE_INDEX].tolist() for row in rows) == sorted(d.tolist() for d in documents)
