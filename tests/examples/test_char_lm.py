"""The example: its text, its model, its configurations, and the numbers that it prints."""

import hashlib
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.browser import fetch, serve
from xent_metrics import CrossEntropy

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "char_lm"


@pytest.fixture(name="example", autouse=True)
def _example(monkeypatch) -> None:
    """Make the example's modules importable, as they are for its script."""
    monkeypatch.syspath_prepend(str(EXAMPLE))


def run_cli(tmp_path: Path, *arguments: str) -> str:
    """Run the script as a user would, from another folder, and return what it prints."""
    command = [sys.executable, str(EXAMPLE / "main.py"), "fit", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=tmp_path).stdout


def parse(*arguments: str) -> int:
    """Give the command line arguments with which it ends before anything runs, and return its status."""
    from data import CharData  # noqa: PLC0415
    from main import CharCLI  # noqa: PLC0415
    from model import CharModel  # noqa: PLC0415

    with pytest.raises(SystemExit) as ended:
        CharCLI(CharModel, CharData, args=["fit", *arguments])
    return ended.value.code


def config(name: str) -> str:
    """Return the argument that names a configuration."""
    return f"--config={ROOT / 'configs' / name}.yaml"


def test_cross_entropy_of_the_untrained_model_is_exactly_ln_v() -> None:
    """All logits are zero at step 0, so every target costs ln V to the last bit."""
    from model import CharModel  # noqa: PLC0415

    model, metric = CharModel(vocab_size=103), CrossEntropy()
    characters = torch.randint(103, (4, 65))
    metric.update(model(characters[:, :-1]), characters[:, 1:])
    assert metric.compute().item() == math.log(103)


def test_the_model_does_not_look_ahead() -> None:
    """Changing a character changes no logits before it, and some from it on."""
    from model import CharModel  # noqa: PLC0415

    model = CharModel(vocab_size=11)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    characters = torch.randint(10, (2, 20))
    changed = characters.clone()
    changed[:, 12] = 10
    before, after = model(characters), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_the_names_are_the_same_text_on_every_python() -> None:
    """The frozen names of Unicode 3.2 have a known digest."""
    from data import read_names  # noqa: PLC0415

    corpus = read_names()
    assert corpus.sha256 == "ed37fef8051fddf454cedf9f4af417f90536e22f741f8822f2e7a77fbb57fe51"
    assert sum(map(len, corpus.train + corpus.validation)) == 354_744
    assert not set(corpus.train) & set(corpus.validation)


@pytest.mark.parametrize("text", ["topics", "names"])
def test_every_held_out_character_is_scored_once(text) -> None:
    """Rows do not overlap, and the padding between them is not scored."""
    from data import IGNORE_INDEX, CharData  # noqa: PLC0415

    data = CharData(text, window=64)
    data.setup("fit")
    scored = [row[row != IGNORE_INDEX] for _, target in data.val_dataloader() for row in target]
    assert data.decode(torch.cat(scored).tolist()) == "".join(data.corpus.validation)


def test_targets_are_inputs_one_character_later() -> None:
    """A row begins with what stands before it, and is padded on the right only."""
    from data import IGNORE_INDEX, CharData  # noqa: PLC0415

    data = CharData("names")
    data.setup("fit")
    inputs, target = next(iter(data.val_dataloader()))
    scored = target != IGNORE_INDEX
    assert torch.equal(inputs[:, 1:][scored[:, 1:]], target[:, :-1][scored[:, 1:]])
    assert (scored[:, 1:] <= scored[:, :-1]).all()
    assert not scored.all()


def test_a_file_of_ones_own_is_read(tmp_path) -> None:
    """The last tenth is held out, and the digest is that of the file."""
    from data import CharData  # noqa: PLC0415

    (tmp_path / "my.txt").write_text("abcdefghij" * 10)
    data = CharData(path=tmp_path / "my.txt")
    assert "".join(data.corpus.validation) == "abcdefghij"
    assert data.corpus.sha256 == hashlib.sha256(b"abcdefghij" * 10).hexdigest()
    assert data.vocab_size == 11


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"window": 0}, "`window` must be at least 1, got 0"),
        ({"path": Path("missing.txt")}, "`path` must be a text file"),
    ],
)
def test_wrong_data_arguments_are_named(arguments, error) -> None:
    """The error names the argument, the rule and the value."""
    from data import CharData  # noqa: PLC0415

    with pytest.raises(ValueError, match=error):
        CharData(**arguments)


def test_a_python_without_help_texts_reads_the_names(monkeypatch) -> None:
    """The fallback says what is missing and what is read instead."""
    from data import CharData  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # An import of it then fails.
    with pytest.warns(UserWarning, match="no `pydoc_data.topics`, so `text='names'` is read"):
        data = CharData("topics")
    assert data.corpus.source == "unicodedata.ucd_3_2_0"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"width": 20}, "`width` must be a multiple of twice `num_heads`, got 20 and 4"),
        ({"warmup": 1.0}, r"`warmup` must be a share in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_model_arguments_are_named(arguments, error) -> None:
    """The error names the argument, the rule and the value."""
    from model import CharModel  # noqa: PLC0415

    with pytest.raises(ValueError, match=error):
        CharModel(vocab_size=11, **arguments)


@pytest.mark.parametrize("names", [["char_lm"], ["char_lm", "names"], ["char_lm", "smoke"]], ids=" and ".join)
def test_every_configuration_parses(capsys, names) -> None:
    """A configuration that the command line would refuse does not get in."""
    assert parse(*map(config, names), "--print_config") == 0
    assert "xent_metrics.lightning.CrossEntropyMonitor" in capsys.readouterr().out


def test_a_misspelt_option_is_refused(capsys) -> None:
    """Nothing is ignored in silence."""
    assert parse(config("char_lm"), "--trainer.max_epochz=3") != 0
    assert "max_epochz" in capsys.readouterr().err


@pytest.mark.slow
def test_the_numbers_printed_are_those_in_the_event_files(tmp_path) -> None:
    """The smoke configuration trains, prints a table, and logs what it prints; TensorBoard serves it."""
    out = run_cli(tmp_path, config("char_lm"), config("smoke"))
    events = EventAccumulator(str(next(tmp_path.glob("runs/char_lm/smoke/*"))), size_guidance={"scalars": 0}).Reload()
    logged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for line, index in (("untrained", 0), ("trained", -1)):
        row = re.search(rf"held-out text: {line} model +([\d.]+) +([\d.]+) \.\. ([\d.]+) +([\d.]+)", out)
        assert row
        bounds = [logged[f"val/cross_entropy_{end}"][index] / math.log(2) for end in ("lower", "upper")]
        expected = [logged["val/bits_per_token"][index], *bounds, logged["val/perplexity"][index]]
        assert [float(figure) for figure in row.groups()] == pytest.approx(expected, abs=1e-4)
    uniform = re.search(r"uniform over the (\d+) characters +([\d.]+)", out)
    assert uniform
    assert logged["val/cross_entropy"][0] == pytest.approx(math.log(int(uniform[1])), rel=1e-7)
    assert "tensorboard --logdir" in out
    for reading in ("cross_entropy", "bits_per_token", "perplexity"):
        assert {f"train/{reading}", f"train/{reading}_epoch", f"val/{reading}"} <= set(logged)
        assert len(logged[f"train/{reading}"]) == 8
    with serve(tmp_path / "runs") as url:
        (run, tags), *others = sorted(fetch(f"{url}data/plugin/scalars/tags").items())
        assert [name for name, _ in others] == [f"{run}/train", f"{run}/val"]
        assert set(logged) == set(tags)
        points = fetch(f"{url}data/plugin/scalars/scalars?run={run}&tag=val/bits_per_token")
    assert [value for _, _, value in points] == logged["val/bits_per_token"]
