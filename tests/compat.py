"""Runs the suite with other versions of what the library needs, and prints a table, as Markdown.

python -m tests.compat [NAME ...]

Each combination gets a fresh environment, one at a time, which is removed after its run: one with a CUDA build of
PyTorch takes 6 GB. It needs the Pythons (`python3.10` and so on), and about ten minutes of two cores for each row.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# What the table shows of an environment; `lightning` stands for both of its names.
SHOWN = ("torch", "torchmetrics", "lightning", "numpy")
HEAD = ("combination", "Python", *SHOWN, "passed", "failed", "skipped", "date")


class Combination(NamedTuple):
    """What to install beside what the project asks for.

    Attributes:
        python: The version of Python.
        pins: Requirements; the newest of all others that fit is installed.
    """

    python: str
    pins: tuple[str, ...] = ()


_OLDEST = (
    "torch==2.6.0", "torchmetrics==1.7.0", "lightning==2.5.3", "pytorch-lightning==2.5.3", "numpy==1.26.4",
    "tensorboard==2.18.0", "matplotlib==3.10.0", "jsonargparse==4.43.0",
)  # fmt: skip
COMBINATIONS: Mapping[str, Combination] = {
    "oldest": Combination("3.10", _OLDEST),
    "middle": Combination("3.12", ("torch==2.11.0",)),
    "newest": Combination("3.14"),
}


def python_of(name: str) -> str:
    """Return the path of a Python, which may be there under its name without being installed."""
    path = shutil.which(f"python{name}")
    if path is None or subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode:
        raise SystemExit(f"Python {name} is needed, as `python{name}` on the PATH.")
    return path


def install(folder: Path, combination: Combination) -> Path:
    """Make an environment with the library and what its tests need, and return its Python."""
    subprocess.check_call([python_of(combination.python), "-m", "venv", folder])
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    subprocess.check_call([*pip, "--upgrade", "pip"])
    # PyTorch is large: what does not fit it is found before anything is downloaded.
    subprocess.check_call([*pip, "--editable", ".[examples]", "--group", "dev", *combination.pins], cwd=ROOT)
    return python


def versions(python: Path) -> list[str]:
    """Return the versions that an environment has, of Python first."""
    code = (
        "import platform; from importlib.metadata import version;"
        f"print(platform.python_version(), *map(version, {SHOWN}))"
    )
    return subprocess.check_output([python, "-c", code], text=True).split()


def counts(summary: str) -> list[str]:
    """Return how many tests passed, failed and were skipped, from what pytest writes last; errors are failures."""
    numbers = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", summary)}
    failed = numbers.get("failed", 0) + numbers.get("error", 0)
    return [str(numbers.get("passed", 0)), str(failed), str(numbers.get("skipped", 0))]


def run_suite(python: Path, log: Path) -> list[str]:
    """Run the tests without those marked `slow`, and return their counts; what they print goes to a file."""
    command = [python, "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "not slow", "-p", "no:cacheprovider"]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(log.parent / "compiled")}  # Of another version they would be no test.
    with log.open("w") as output:
        code = subprocess.call(command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, **caches})
    shutil.rmtree(caches["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
    numbers = counts(log.read_text(errors="replace").rstrip().rpartition("\n")[2])
    assert code == 0 or numbers[1] != "0", f"pytest ended with {code}: see {log}"
    return numbers


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(names: Sequence[str], logs: Path) -> Iterator[str]:
    """Yield the lines of the table as they are known."""
    yield row(HEAD)
    yield "|" + "---|" * len(HEAD)
    for name in names:
        with tempfile.TemporaryDirectory(prefix=f"compat-{name}-") as folder:
            python = install(Path(folder), COMBINATIONS[name])
            numbers = run_suite(python, logs / f"{name}.log")
            yield row([name, *versions(python), *numbers, str(date.today())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and return whether a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*COMBINATIONS, []], help="default: all")
    parser.add_argument("--logs", type=Path, default=Path("runs/compat"), help="where pytest's output goes")
    options = parser.parse_args(arguments)
    options.logs.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in table(options.names or list(COMBINATIONS), options.logs.resolve()):
        print(line, flush=True)
        lines.append(line)
    return int(any(line.split("|")[-4].strip() != "0" for line in lines[2:]))


if __name__ == "__main__":
    sys.exit(main())
