"""The evaluation of language models reads what float64 says, on any number of ranks, and says it in words."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch.utils._pytree import tree_leaves

from tests import evaluate as make_evaluate
from tests.distributed.ranks import run_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "evaluate_lm.py"
spec = importlib.util.spec_from_file_location("evaluate_lm", SCRIPT)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

PREFIX, CONTEXT, STRIDE = 256, 8, 3
TEXTS = {"short": ["a", "ä🙂", "three words here"], "long": ["x" * 8, "A text of more than one window. " * 3]}


class Causal(torch.nn.Module):
    """Scores from the mean of all tokens so far, so that they depend on where a window begins."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = torch.nn.Embedding(257, 8), torch.nn.Linear(8, 257)

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        """Return what has the logits, as models of transformers do."""
        count = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=self.head(self.embedding(tokens).cumsum(1) / count))


def language_model(seed: int, tokens_per_byte: int = 1) -> example.LanguageModel:
    """Return a model of bytes; with two tokens for a byte it is one with another tokenizer."""
    return example.LanguageModel(
        Causal(seed), lambda text: [i for i in text.encode() for _ in range(tokens_per_byte)], PREFIX
    )


def evaluate(*models: example.LanguageModel) -> example.Evaluation:
    documents = [example.Document(file, text) for file, texts in TEXTS.items() for text in texts]
    return example.evaluate(models, documents, CONTEXT, STRIDE, batch_size=2)


def evaluate_on_a_rank(rank: int) -> list[str]:
    """Return every number of an evaluation of two models, exactly, and its table."""
    found = evaluate(language_model(0), language_model(1))
    return [*(repr(x.item()) for x in tree_leaves(found)), example.table(["A", "B"], found)]


def judge(model: example.LanguageModel, text: str, context: int = CONTEXT) -> tuple[list[float], list[bool]]:
    """Return losses and hits of a document in float64, one token at a time."""
    ids = [PREFIX, *model.encode(text)]
    forward = Causal(0).double()
    forward.load_state_dict(model.forward.state_dict())
    losses, hits = [], []
    for i in range(1, len(ids)):
        # The first window scores all that it holds, each other one the next tokens; all are as long as they can be.
        end = min(1 + context + max(0, -(-(i - context) // STRIDE)) * STRIDE, len(ids))
        logits = forward(torch.tensor([ids[max(0, end - 1 - context) : i]])).logits[0, -1]
        losses.append(F.cross_entropy(logits, torch.tensor(ids[i])).item())
        hits.append(logits.argmax().item() == ids[i])
    return losses, hits


def interval(sums: list[float], weights: list[float]) -> tuple[float, float, float]:
    """Return the ratio of two sums over documents, and its interval of 95 %."""
    n, total = len(sums), sum(weights)
    mean = sum(sums) / total
    variance = n / (n - 1) * sum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True)) / total**2
    degrees = max(total**2 / sum(w * w for w in weights), 1.25) - 1
    half = student.ppf(0.975, degrees) * math.sqrt(variance)
    return mean, mean - half, mean + half


@pytest.mark.parametrize("tokens_per_byte", [1, 2])
@torch.no_grad()
def test_values_are_those_of_float64(tokens_per_byte: int) -> None:
    """Bits per byte and their interval over documents, perplexity, accuracy, and the paired difference."""
    models = language_model(0), language_model(1, tokens_per_byte)
    found = evaluate(*models)
    sums: list[list[float]] = []
    for model, rows in zip(models, found.rows, strict=True):
        judged = {file: [judge(model, text) for text in texts] for file, texts in TEXTS.items()}
        judged[example.ALL] = [document for documents in judged.values() for document in documents]
        texts = {**TEXTS, example.ALL: [text for texts in TEXTS.values() for text in texts]}
        for file, documents in judged.items():
            losses, hits = ([x for document in documents for x in document[i]] for i in (0, 1))
            num_bytes = [float(len(text.encode())) for text in texts[file]]
            expected = interval([sum(document[0]) for document in documents], num_bytes)
            per_byte, per_token = rows[file]["per_byte"], rows[file]["per_token"]
            read = [per_byte[f"cross_entropy{end}"].item() for end in ("", "_lower", "_upper")]
            assert read == pytest.approx(expected, rel=1e-5)
            assert per_byte["num_tokens"] == len(documents)
            assert per_token["num_tokens"] == len(losses)
            assert per_token["perplexity"].item() == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
            assert rows[file]["accuracy"].item() == pytest.approx(sum(hits) / len(hits), rel=1e-12)
        sums.append([sum(document[0]) for document in judged[example.ALL]])
    expected = interval([b - a for a, b in zip(*sums, strict=True)], num_bytes)
    read = [found.difference[f"difference{end}"].item() for end in ("", "_lower", "_upper")]
    assert read == pytest.approx(expected, rel=1e-4)


@pytest.mark.distributed
def test_any_number_of_ranks_reads_the_same_bits(tmp_path: Path) -> None:
    """Two ranks share the documents, and both read what one process reads of all."""
    alone = evaluate_on_a_rank(0)
    assert len(alone) > 70
    assert run_ranks(2, evaluate_on_a_rank, tmp_path=tmp_path) == [alone, alone]


def test_a_table_says_what_was_found() -> None:
    """A line for each file, their mean, and which model is better."""
    found = evaluate(language_model(0), language_model(1))
    head, _, name, short, long, together, macro, *_, verdict = example.table(["A", "B"], found).splitlines()
    assert head.split() == ["bits/byte", "95", "%", "interval", "perplexity", "accuracy", "tokens", "documents"]
    assert name == "A:"
    assert [x[:10].strip() for x in (short, long, together)] == ["short", "long", example.ALL]
    assert [int(x.split()[-1]) for x in (short, long, together)] == [3, 2, 5]
    values = [float(x.split()[1]) for x in (short, long)]
    assert float(macro.split()[4]) == pytest.approx(sum(values) / 2, abs=1e-4)
    assert verdict.startswith(("A", "B"))
    assert verdict.endswith("5 documents")


@pytest.mark.parametrize(
    ("nats", "expected"),
    [
        ((-0.3, -0.4, -0.2), "B is better than A by 0.4328 bits per byte, 95 % interval 0.2885 .. 0.5771, 9 documents"),
        ((0.3, 0.2, 0.4), "B is worse than A by 0.4328 bits per byte, 95 % interval 0.2885 .. 0.5771, 9 documents"),
        ((-0.1, -0.3, 0.1), "B and A cannot be told apart: -0.1443 bits per byte, 95 % interval -0.4328 .. 0.1443"),
        ((-0.1, math.nan, math.nan), "B and A cannot be told apart: -0.1443 bits per byte, 95 % interval nan .. nan"),
    ],
)
def test_the_verdict_follows_the_interval(nats: tuple[float, ...], expected: str) -> None:
    """A difference is only one if the interval leaves 0 out."""
    difference = dict(zip(("difference", "difference_lower", "difference_upper"), map(torch.tensor, nats), strict=True))
    assert example.verdict("A", "B", difference, 9).startswith(expected)


def test_documents_are_files_or_lines(tmp_path: Path) -> None:
    """Empty ones are left out."""
    files = [tmp_path / name for name in ("a.jsonl", "b.txt", "empty.txt")]
    files[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one\u2028line", "", "two")))
    files[1].write_text("two\nlines")
    files[2].write_text("")
    a, b, _ = map(str, files)
    assert example.read_documents([str(file) for file in files]) == [
        (a, "one\u2028line"),
        (a, "two"),
        (b, "two\nlines"),
    ]


def test_files_without_a_document_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a model is loaded."""
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit):
        example.main(["--model", "none", str(tmp_path / "empty.txt")])
    assert "at least one document" in capsys.readouterr().err


def test_a_model_of_transformers_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line reads a small random Llama and its tokenizer, and prints what `evaluate` returns."""
    transformers = pytest.importorskip("transformers", reason="transformers is not part of the environment")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, **{x: i + 1 for i, x in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    folders = [str(tmp_path / name) for name in "AB"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        fast.save_pretrained(folder)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": x}) + "\n" for x in TEXTS["short"]))
    options = ["--context", str(CONTEXT), "--stride", str(CONTEXT)]
    example.main(["--model", folders[0], "--compare", folders[1], *options, str(text)])
    lines = capsys.readouterr().out.splitlines()

    model = transformers.AutoModelForCausalLM.from_pretrained(folders[0]).double()
    nats, num_bytes = 0.0, 0
    for x in TEXTS["short"]:
        ids = [0, *fast.encode(x, add_special_tokens=False)]
        assert fast.decode(ids[1:]) == x
        num_bytes += len(x.encode())
        for i in range(0, len(ids) - 1, CONTEXT):  # Each window ends a context after the one before it.
            end = min(i + CONTEXT + 1, len(ids))
            start = max(0, end - 1 - CONTEXT)
            with torch.no_grad():
                logits = model(torch.tensor([ids[start : end - 1]])).logits[0, i - start :]
            nats += F.cross_entropy(logits, torch.tensor(ids[i + 1 : end]), reduction="sum").item()
    [of_all, _] = [line.split() for line in lines if line.startswith(example.ALL)]
    assert float(of_all[2]) == pytest.approx(nats / num_bytes / math.log(2), abs=6e-5)
    assert of_all[-1] == "3"
    assert lines[-1].endswith("3 documents")
    assert folders[1] in lines[-1]


@torch.no_grad()
def test_what_is_read_by_hand() -> None:
    """`make evaluate` reads the same losses by hand, on the help texts that this Python has."""
    documents = make_evaluate.help_texts()
    assert {document.file for document in documents} == {"keywords", "topics"}
    assert len({document.text for document in documents}) == len(documents) > 20
    model, texts = (
        language_model(0),
        [document for document in documents if len(document.text) < make_evaluate.CONTEXT][:2],
    )
    perplexity, mean, rough, *_, ours, usual = make_evaluate.by_hand(model, texts)
    [rows] = example.evaluate([model], texts, make_evaluate.CONTEXT, make_evaluate.STRIDE).rows
    expected = rows[example.ALL]["per_token"]["perplexity"].item()
    assert float(perplexity.split()[-1]) == pytest.approx(expected, rel=1e-4)
    windows = [sum(x) / len(x) for x, _ in (judge(model, text.text, make_evaluate.CONTEXT) for text in texts)]
    assert float(mean.split()[-1]) == pytest.approx(math.exp(sum(windows) / 2), rel=1e-4)
    assert float(rough.split()[-1]) == pytest.approx(float(mean.split()[-1]), rel=1e-1)
    assert float(ours.split()[-1]) < 1e-6
    assert usual.startswith("`F.cross_entropy`")
