"""What the monitor costs and keeps, both packages, and their command lines."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI

from tests.instruments import Operators
from tests.lightning.fits import (
    NUM_TRAIN,
    Data,
    Expected,
    Model,
    Steps,
    assert_points,
    make_trainer,
    points_of_csv,
    ragged_loader,
    readings,
)
from tests.lightning.monitored import NUM_BYTES, logged, monitored
from xent_metrics.lightning import CrossEntropyMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
]


def host_copies(tmp_path: Path, module: Model, *callbacks: Callback) -> list[Counter[str]]:
    """Count, at the start of every batch of an epoch of 102, what has waited for a device."""
    counts: Counter[str] = Counter()
    at_starts = []
    operators = Operators()

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            counts["_local_scalar_dense"] = operators.count("_local_scalar_dense")  # What item, int, bool, ... call.
            at_starts.append(counts.copy())

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "cpu", "numpy"):
            method = getattr(torch.Tensor, name)

            def counted(tensor: torch.Tensor, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
                counts[name] += 1
                return method(tensor, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        trainer = make_trainer(tmp_path, *callbacks, Watch(), max_epochs=1, log_every_n_steps=50)
        with operators:
            trainer.fit(module, ragged_loader(102))
    return at_starts


@pytest.mark.usefixtures("hidden_values")
@pytest.mark.parametrize("form", ["losses", *(pytest.param(x, marks=pytest.mark.slow) for x in ("logits", "mean"))])
def test_windows_cost_no_more_host_copies_than_logging_the_loss(tmp_path, form) -> None:
    """None between log points, and one at each, for all values together: that of a scalar that is logged."""

    class Logs(Model):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            self.log("loss", outputs["loss"])
            return outputs

    logs = host_copies(tmp_path / "logs", Logs(form))
    reads = host_copies(tmp_path / "reads", Model(form), CrossEntropyMonitor())
    assert logs[101] - logs[1] == Counter({"_local_scalar_dense": 2})
    assert reads[101] - reads[1] == Counter({"cpu": 2, "tolist": 2})  # A list of what has been copied.
    steps = {number: after - before for number, (before, after) in enumerate(itertools.pairwise(reads))}
    assert {number for number, counts in steps.items() if counts and number > 0} == {49, 99}


@pytest.mark.parametrize("names", [None, (), ("perplexity", "cross_entropy")])
def test_progress_bars_show_what_was_logged_last(tmp_path, names) -> None:
    """The last window and the last validation, as numbers: Lightning would copy a tensor at every batch."""
    seen: list[dict[str, Any]] = []

    class Bar(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(dict(trainer.progress_bar_metrics))

    options = {} if names is None else {"prog_bar": names}
    trainer = make_trainer(tmp_path, CrossEntropyMonitor(prefix="a/", **options), Bar())
    trainer.fit(Model(), ragged_loader(NUM_TRAIN), ragged_loader(3))
    shown = ("bits_per_token",) if names is None else names
    train, val = ({f"a/{stage}/{name}" for name in shown} for stage in ("train", "val"))
    assert [set(each) for each in seen] == [set()] + [train] * (NUM_TRAIN - 1) + [train | val] * NUM_TRAIN
    points = logged(trainer)
    for tag, value in trainer.progress_bar_metrics.items():
        assert isinstance(value, float)
        assert value == pytest.approx(points[tag][-1][1], rel=1e-6)


def test_a_progress_bar_of_something_unknown_is_refused() -> None:
    """The error lists what can be shown."""
    with pytest.raises(ValueError, match=r"`prog_bar` must be a list of some of \['cross_.*got 'bits'"):
        CrossEntropyMonitor(prog_bar=["bits"])


def test_outputs_are_not_kept(tmp_path) -> None:
    """Those of a training step carry the graph; a window that never ends must not hold one of any batch."""
    kept = []

    def adapt(stage: str, outputs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
        assert not [number for number, logits in enumerate(kept) if logits() is not None]
        kept.append(weakref.ref(outputs["logits"]))
        return outputs

    trainer = make_trainer(tmp_path, CrossEntropyMonitor(), log_every_n_steps=0)
    trainer.fit(Model("logits", adapt=adapt), ragged_loader(NUM_TRAIN))
    assert len(kept) == 2 * NUM_TRAIN


# Both packages, and their command lines.

PACKAGES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("in_a_list", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning.utilities._pytree")
def test_it_serves_both_packages(tmp_path, package, in_a_list) -> None:
    """Lightning is published under two names with unrelated classes; the callback is one of either's."""
    package = PACKAGES[package]
    monitor = CrossEntropyMonitor()
    assert isinstance(monitor, package.Callback)
    module = type("Own", (Steps, package.LightningModule), {})()
    trainer = package.Trainer(
        accelerator="cpu",
        max_epochs=2,
        log_every_n_steps=2,
        callbacks=[monitor] if in_a_list else monitor,
        logger=package.loggers.TensorBoardLogger(tmp_path, version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, ragged_loader(NUM_TRAIN), [ragged_loader(3), ragged_loader(2)])
    batches = module.train_batches
    expected = Expected().windows(batches, *((end, end - 1) for end in range(2, 15, 2)))
    expected.epochs(batches, (7, 6), (14, 13)).validations(module.evaluations, 6, 13)
    assert_points(logged(trainer), expected.points)


def run_cli(tmp_path: Path, *arguments: str, package: str = "lightning.pytorch", run: bool = True) -> LightningCLI:
    """Run a command line in this process."""
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 2,
        "default_root_dir": str(tmp_path),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": {
            "class_path": f"{package}.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path), "version": 0},
        },
    }
    module = importlib.import_module(f"{package}.cli")
    model, data = (Model, Data) if package == "lightning.pytorch" else (OfTheOther, DataOfTheOther)
    args = [*(["fit"] if run else []), f"--trainer={json.dumps(settings)}", *arguments]
    return module.LightningCLI(model, data, args=args, run=run)


class OfTheOther(Steps, pytorch_lightning.LightningModule):
    """The steps as a module of `pytorch_lightning`."""


class DataOfTheOther(pytorch_lightning.LightningDataModule):
    """The batches of the other package."""

    train_dataloader = Data.train_dataloader
    val_dataloader = Data.val_dataloader


def write_config(tmp_path: Path, callbacks: list[dict[str, Any]], model: dict[str, Any] | None = None) -> str:
    """Write a configuration (JSON is YAML too), and return the argument that names it."""
    path = tmp_path / "given.yaml"
    path.write_text(json.dumps({"trainer": {"callbacks": callbacks}, "model": model or {}, "seed_everything": 1}))
    return f"--config={path}"


def described(**init_args: Any) -> dict[str, Any]:
    """Return what a configuration says of the monitor."""
    return {"class_path": "xent_metrics.lightning.CrossEntropyMonitor", "init_args": init_args}


ARGUMENTS = {
    "none": {},
    "plain": {"nan_policy": "omit", "confidence": 0.9, "prefix": "ema/", "class_dim": -1, "ignore_index": -100},
    "nulls": {"extract": None, "groups": None, "token_bytes": None},
    "groups": {"groups": ["even", "odd"]},
    "list": {"token_bytes": NUM_BYTES},
    "file": {"token_bytes": "bytes.pt", "groups": ["even", "odd"]},
    "extract": {"extract": "tests.lightning.fits.second_head"},
    "shift": {"shift": True},
    "backend": {"backend": "eager"},
    "stages": {"stages": ["train", "val"]},
    "readings": {"readings": ["cross_entropy", "num_tokens", "entropy"]},
    "extras": {"extras": ["z_loss"]},
    "bar": {"prog_bar": ["perplexity"]},
    "ranks": {"process_group": ["data_parallel"], "sequence_group": "tensor_parallel"},
    "several": {"token_bytes": NUM_BYTES, "groups": ["even", "odd"], "backend": "eager", "prog_bar": ["perplexity"]},
}
QUICK = {("none", "lightning.pytorch"), ("nulls", "pytorch_lightning"), ("extract", "pytorch_lightning")}
QUICK |= {("readings", "lightning.pytorch"), ("several", "lightning.pytorch")}


def arguments_and_packages() -> Iterator[Any]:
    """Yield arguments and packages: most arguments, several of them together, in either package; the rest is slow."""
    for pair in itertools.product(ARGUMENTS, PACKAGES):
        yield pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("arguments", "package"), [*arguments_and_packages()])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning.cli")
@pytest.mark.filterwarnings("ignore::FutureWarning:pytorch_lightning.utilities._pytree")
@pytest.mark.filterwarnings("ignore:.* returned losses, from which:UserWarning")
def test_every_argument_comes_from_yaml_and_goes_back_there(tmp_path, monkeypatch, package, arguments) -> None:
    """A configuration that was saved beside a run repeats the run."""
    monkeypatch.chdir(tmp_path)
    torch.save(torch.tensor(NUM_BYTES), "bytes.pt")
    given = ARGUMENTS[arguments]
    model = {"adapt": "tests.lightning.fits.with_all"}
    first = run_cli(tmp_path / "first", write_config(tmp_path, [described(**given)], model), package=package)
    folder = Path(first.trainer.logger.log_dir)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    [of_the_monitor] = [
        callback for callback in saved["trainer"]["callbacks"] if callback["class_path"].startswith("xent_metrics")
    ]
    parameters = inspect.signature(CrossEntropyMonitor).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    # YAML has no tuples.
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    assert of_the_monitor == described(**(defaults | given))

    points = points_of_csv(folder)
    assert {f"{given.get('prefix', '')}{tag}" for tag in ("train/cross_entropy", "val/cross_entropy")} <= set(points)
    factor = 3 if arguments == "extract" else 1
    expected = factor * readings(first.model.evaluations[0][0])["cross_entropy"]
    assert points[f"{given.get('prefix', '')}val/cross_entropy"] == [(6, pytest.approx(expected, rel=1e-6))]
    assert ("val_by_group/cross_entropy/odd" in points) == bool(given.get("groups"))
    assert ("val/bits_per_byte" in points) == bool(given.get("token_bytes"))

    saved["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "second")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(saved))
    cli = importlib.import_module(f"{package}.cli").LightningCLI
    again = cli(type(first.model), type(first.datamodule), args=["fit", f"--config={tmp_path / 'again.yaml'}"])
    assert points_of_csv(again.trainer.logger.log_dir) == points


def test_numbers_of_numpy_are_numbers() -> None:
    """A monitor that is made of them is configured as one that was given Python's."""
    plain = CrossEntropyMonitor(class_dim=1, ignore_index=-1, num_classes=5, confidence=0.5)
    numbers: dict[str, Any] = {"class_dim": np.int64(1), "ignore_index": np.int8(-1), "num_classes": np.array(5)}
    monitor = CrossEntropyMonitor(**numbers, confidence=np.float32(0.5))
    assert monitor.state_key == plain.state_key
    assert type(monitor.confidence) is float


def test_no_index_may_be_ignored(tmp_path) -> None:
    """`ignore_index: null` is a setting, and not the default."""
    trainer = run_cli(tmp_path, write_config(tmp_path, [described(ignore_index=None)]), run=False).trainer
    with pytest.raises(ValueError, match=r"got 2 that are neither, such as -100; pass ignore_index=-100 if"):
        trainer.validate(Model("logits"), ragged_loader(3), verbose=False)


def test_the_monitor_is_appended_on_the_command_line(tmp_path) -> None:
    """`callbacks+=` adds to those of a configuration."""
    config = write_config(tmp_path, [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}])
    added = "--trainer.callbacks+=xent_metrics.lightning.CrossEntropyMonitor"
    trainer = run_cli(tmp_path, config, added, "--trainer.callbacks.nan_policy=omit").trainer
    [monitor] = [callback for callback in trainer.callbacks if isinstance(callback, CrossEntropyMonitor)]
    assert monitor.nan_policy == "omit"
    points = points_of_csv(trainer.logger.log_dir)
    assert {"lr-SGD", "val/cross_entropy"} <= set(points)


def test_two_monitors_come_from_one_configuration(tmp_path) -> None:
    """`callbacks+` in a second configuration adds one with another prefix."""
    config = write_config(tmp_path, [described()], {"adapt": "tests.lightning.fits.with_all"})
    more = tmp_path / "more.yaml"
    second = described(extract="tests.lightning.fits.second_head", prefix="b/")
    more.write_text(json.dumps({"trainer": {"callbacks+": second}}))
    trainer = run_cli(tmp_path, config, f"--config={more}").trainer
    seen = monitored(trainer)
    assert seen["b/val/cross_entropy"] == pytest.approx(3 * seen["val/cross_entropy"], rel=1e-6)


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"nan_policy": "ommit"}, "(?s)nan_policy.*'propagate'.*'omit'.*'raise'.*ommit"),
        ({"nan_polici": "omit"}, "(?s)nan_polici"),
        ({"backend": "inductor"}, "(?s)backend.*'auto'.*'eager'.*'compile'.*inductor"),
        ({"groups": "even"}, "(?s)groups.*even"),
        ({"extract": "tests.lightning.fits.no_such_function"}, "(?s)extract.*no_such_function"),
        ({"confidence": "high"}, "(?s)confidence.*high"),
        ({"token_bytes": [1, "x"]}, "(?s)token_bytes.*x"),
    ],
)
def test_a_typo_in_a_configuration_is_named(tmp_path, capsys, init_args, message) -> None:
    """The command line ends with the argument and its value, before anything runs."""
    with pytest.raises(SystemExit):
        run_cli(tmp_path, write_config(tmp_path, [described(**init_args)]), run=False)
    assert re.search(message, capsys.readouterr().err)
