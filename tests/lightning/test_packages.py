"""Lightning is published as two packages, and importing the monitor imports neither that the user has not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDERS = {
    "the one": ["lightning.pytorch", "xent_metrics.lightning"],
    "the other": ["pytorch_lightning", "xent_metrics.lightning"],
    "both": ["pytorch_lightning", "lightning.pytorch", "xent_metrics.lightning"],
    "neither": ["xent_metrics.lightning"],
    "one later": ["xent_metrics.lightning", "lightning.pytorch"],
    "the other later": ["xent_metrics.lightning", "pytorch_lightning"],
    "one more later": ["pytorch_lightning", "xent_metrics.lightning", "lightning.pytorch"],
}
# Each order in a process that is forked after what is slow to import.
CODE = """
import importlib, os, sys
import xent_metrics, torch.utils.data.distributed

def loaded():
    return [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]

for name, order in {orders}.items():
    if os.fork() == 0:
        first, seen = None, []
        for package in order:
            importlib.import_module(package)
            if package == "xent_metrics.lightning":
                seen, first = loaded(), sys.modules[package].CrossEntropyMonitor()
        # Asked for by its name, as a command line does, and made again.
        classes = [sys.modules[package].Callback for package in loaded()]
        monitor = sys.modules["xent_metrics.lightning"].CrossEntropyMonitor
        assert all(issubclass(monitor, one) and isinstance(first, one) for one in classes), name
        assert monitor is type(first)
        print(name, *seen, sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_only_what_is_loaded_is_a_base(tmp_path) -> None:
    """And whatever is loaded later is one too; with neither, the first that is installed is loaded."""
    for package in ("lightning/pytorch", "pytorch_lightning"):  # Stand-ins, as the real ones take seconds.
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("class Callback:\n    pass\n")
    (tmp_path / "lightning" / "__init__.py").touch()
    command = [sys.executable, "-c", CODE.format(orders=ORDERS)]
    path = f"{tmp_path}:{ROOT}"
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": path}).stdout
    before = {name: order[: order.index("xent_metrics.lightning")] for name, order in ORDERS.items()}
    expected = {name: sorted(packages) or ["lightning.pytorch"] for name, packages in before.items()}
    assert dict(line.split(": ", 1) for line in out.splitlines()) == {
        name: ": ".join(packages) for name, packages in expected.items()
    }


def test_the_name_of_the_package_is_all_that_it_has() -> None:
    """A typo is an AttributeError, and `*` imports the monitor."""
    import xent_metrics.lightning as package  # noqa: PLC0415

    assert not hasattr(package, "CrossEntropyMonitr")
    names: dict[str, object] = {}
    exec("from xent_metrics.lightning import *", names)
    assert names["CrossEntropyMonitor"] is package.CrossEntropyMonitor
