"""The example without Lightning: the same bits from 1 and 3 processes, and curves that TensorBoard reads."""

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
@pytest.mark.slow
def test_fixed_weights_read_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    """The last line, in hexadecimal, is the same for any number of ranks."""
    lines = {}
    for num_ranks in (1, 3):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        lines[num_ranks] = run_example(num_ranks, folder)
        assert f"number of ranks {num_ranks}:" in lines[num_ranks][1]
    last = {printed[-1] for printed in lines.values()}
    assert len(last) == 1
    assert len({printed[1] for printed in lines.values()}) == len(lines)
    for num_ranks, printed in lines.items():
        assert_right(printed, tmp_path / str(num_ranks) / "logs")


def test_a_run_of_one_process_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It ends by itself, prints what is true, and logs what it prints."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--steps", "20", "--log-dir", str(tmp_path)])
    example.main()
    assert_right(capsys.readouterr().out.splitlines(), tmp_path)


def assert_right(lines: list[str], logs: Path) -> None:
    """The last line is what float64 says of all documents, and the curves have the points that the others print."""
    torch.manual_seed(4)
    model = example.Model()
    documents = example.make_documents(example.NUM_VALIDATION, seed=2)
    with torch.no_grad():
        nats = [
            F.cross_entropy(model(doc[None, :-1])[0].double(), doc[1:], reduction="sum").item() for doc in documents
        ]
    num_tokens = sum(len(document) - 1 for document in documents)
    number, value = re.search(r"bits per token of (\d+); .* ranks: (\S+),", lines[-1]).groups()
    assert int(number) == num_tokens
    assert float.fromhex(value) == pytest.approx(math.fsum(nats) / num_tokens / math.log(2), rel=1e-6)

    events = EventAccumulator(str(logs)).Reload()
    assert [event.step for event in events.Scalars("train/bits_per_token")] == [9, 19]
    (validation,) = events.Scalars("val/bits_per_token")
    assert f"Validation: {validation.value:.4f} bits per token" in lines[2]


@pytest.mark.slow
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
